"""Groups the scalars into charts for TensorBoard's page "Custom Scalars"."""

import re
from collections.abc import Iterable

from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.tensorboard.time_tags import GOODPUT, QUEUE_HOURS, RANK_HOURS, tag_of_group
from evspan.pipeline.tensorboard.writer import Layout
from evspan.pipeline.time_use import GROUPS


def charts(
    config: TrainConfig, classes: list[str], *, gates: Iterable[str], gpu: bool, mfu: bool
) -> Layout:
    """The charts of the scalars that this run writes; none is empty.

    Args:
        classes: names by class id.
        gates: names of the attention gates, as in the tags `model/attention_gates/NAME`.
        gpu: whether the run is on a GPU.
        mfu: whether it has an MFU.
    """
    tags_by_category = {
        "Learning": _learning(gates),
        "Average precision": _average_precision(classes),
        "Speed": _speed(config, gpu=gpu, mfu=mfu),
        "Time": _time(gpu=gpu),
        "Stability": {
            "skipped steps": ["train/skipped_steps"],
            "requeues": ["run/requeues"],
        },
    }
    return {category: _as_patterns(tags) for category, tags in tags_by_category.items()}


def _learning(gates: Iterable[str]) -> dict[str, list[str]]:
    tags = {
        "losses": ["loss/total", "loss/iou", "loss/objectness", "loss/class"],
        "learning rate": ["train/learning_rate"],
        "gradient norm": ["train/gradient_norm"],
        "positives (predictions assigned to a box)": ["train/positives"],
    }
    gate_tags = [f"model/attention_gates/{name}" for name in gates]
    if gate_tags:
        tags["attention gates"] = gate_tags
    return tags


def _average_precision(classes: list[str]) -> dict[str, list[str]]:
    return {
        "AP 0.50:0.95, AP50, AP75": [f"evaluation/{k}" for k in ("ap", "ap50", "ap75")],
        "AP by size": [f"evaluation/ap_{k}" for k in ("small", "medium", "large")],
        "AP by class": [f"evaluation/ap_class/{name}" for name in classes],
        "AR by detections per frame": [f"evaluation/ar{k}" for k in (1, 10, 100)],
        "AR by size": [f"evaluation/ar_{k}" for k in ("small", "medium", "large")],
    }


def _speed(config: TrainConfig, *, gpu: bool, mfu: bool) -> dict[str, list[str]]:
    fractions = ["speed/data_wait_fraction"]
    if config.parallel.sequence > 1:
        fractions.append("speed/exchange_fraction")
    memory = ["memory/resident_gib"]
    if gpu:
        memory += ["memory/gpu_gib", "memory/gpu_peak_gib"]
    tags = {
        "frames per second": ["speed/frames_per_s"],
        "milliseconds per step": ["speed/step_ms"],
        "model TFLOP/s of all ranks": ["speed/model_tflops_per_s"],
        "fraction of the time": fractions,
        "memory, GiB": memory,
    }
    if config.parallel.ranks > 1 and config.training.slow_rank_factor > 0:
        tags["milliseconds per step without waiting, over the ranks"] = [
            f"ranks/own_ms_{name}" for name in ("min", "median", "p90", "max")
        ]
        tags["slowest rank over the median"] = ["ranks/slowest_over_median"]
        tags["slowest rank"] = ["ranks/slowest_rank"]
    if mfu:
        tags["MFU"] = ["speed/mfu"]
    if gpu:
        tags["GPU busy, fraction of the time"] = ["speed/gpu_busy_fraction"]
    return tags


def _time(*, gpu: bool) -> dict[str, list[str]]:
    """Of the whole run, with all its attempts."""
    return {
        "goodput": [GOODPUT],
        "fraction of the allocated time": [tag_of_group(name) for name in GROUPS],
        "hours in the queue": [QUEUE_HOURS],
        "hours of all GPUs" if gpu else "hours of all ranks": [RANK_HOURS],
    }


def _as_patterns(tags_by_title: dict[str, list[str]]) -> dict[str, list[str]]:
    """TensorBoard matches the start of a tag: "evaluation/ap" alone would match every AP."""
    return {title: [f"^{re.escape(tag)}$" for tag in tags] for title, tags in tags_by_title.items()}
