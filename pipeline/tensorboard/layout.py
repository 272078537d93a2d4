"""Which curves TensorBoard shows together, on its page "Custom Scalars"."""

import re
from collections.abc import Iterable

from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.tensorboard.writer import Layout


def charts(config: TrainConfig, classes: list[str], *, gates: Iterable[str], gpu: bool) -> Layout:
    """Only charts of what this run tells. gates: names of the learned gates. gpu: whether it runs on one."""
    shares = [
        "speed/data_wait_fraction",
        *(["speed/exchange_fraction"] if config.parallel.sequence > 1 else []),
    ]
    memory = ["memory/resident_gib", *(["memory/gpu_gib", "memory/gpu_peak_gib"] if gpu else [])]
    together = {
        "Learning": {
            "losses": ["loss/total", "loss/iou", "loss/objectness", "loss/class"],
            "learning rate": ["train/learning_rate"],
            "gradient norm": ["train/gradient_norm"],
            "boxes that a prediction answers for": ["train/positives"],
        },
        "Average precision": {
            "AP 0.50:0.95, AP50, AP75": [f"evaluation/{k}" for k in ("ap", "ap50", "ap75")],
            "AP by size": [f"evaluation/ap_{k}" for k in ("small", "medium", "large")],
            "AP by class": [f"evaluation/ap_class/{name}" for name in classes],
            "AR by detections a frame": [f"evaluation/ar{k}" for k in (1, 10, 100)],
            "AR by size": [f"evaluation/ar_{k}" for k in ("small", "medium", "large")],
        },
        "Speed": {
            "frames a second": ["speed/frames_per_s"],
            "milliseconds a step": ["speed/step_ms"],
            "share of the time": shares,
            "memory, GiB": memory,
            **({"GPU busy, share of the time": ["speed/gpu_busy_fraction"]} if gpu else {}),
        },
        "Steadiness": {
            "skipped steps": ["train/skipped_steps"],
            "requeues": ["run/requeues"],
        },
    }
    if learned := [f"attention_gates/{name}" for name in gates]:
        together["Learning"]["attention gates"] = learned
    # TensorBoard takes a tag for a regular expression that the tag's beginning must match: "evaluation/ap" would be all of them.
    return {
        category: {title: [f"^{re.escape(tag)}$" for tag in tags] for title, tags in of.items()}
        for category, of in together.items()
    }
