"""What attention of a trained detector does: python tests/benchmarks/attention_reach.py RUN SHARDS [val]

Its gates; how much each part changes the features that it gets (norm of the change / norm of the features); and what its maps,
from 0 to 1, are inside boxes by the speed of their objects, and outside of all boxes.
"""

import sys
from collections import defaultdict

import numpy as np
import torch
from evspan.conf.schema.prep import DatasetConfig
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.model.attention import (
    EventTemporalAttention,
    MultiScaleSpatialAttention,
    ScaleAwareChannelAttention,
)
from evspan.pipeline.tensorboard.attention_probe import MAPS, gate_names, record_attention
from evspan.pipeline.weights import load_weights

CHUNK, STILL = 20, 0.25  # frames; pixels a frame
EDGES = (0.25, 0.5, 1.0)  # cells a frame
GROUPS = ("moved under 0.25 cells", "0.25 to 0.5", "0.5 to 1", "1 and more", "still", "outside")


def main(run: str, shards: str, split: str = "val") -> None:
    weights = load_weights(run)
    data, detector = (
        open_dataset(DatasetConfig(root=shards), split),
        detector_from(weights, device=torch.device("cpu")),
    )
    changes, inside = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for name, module in detector.fpn.named_modules():
        if isinstance(
            module, (MultiScaleSpatialAttention, EventTemporalAttention, ScaleAwareChannelAttention)
        ):

            def tell(_, given, out, name=name):
                changes[name].append(float((out - given[0]).norm() / given[0].norm()))

            module.register_forward_hook(tell)
    for recording in data.recordings:
        state = detector.initial_state(1, data.height, data.width)
        for first in range(0, recording.frames, CHUNK):
            last = min(first + CHUNK, recording.frames)
            with torch.inference_mode(), record_attention(detector) as told:
                _, state = detector(torch.from_numpy(recording.read(first, last)[:, None]), state)
            for name in (n for n in told if n.endswith(MAPS)):
                stride = detector.strides[int(name.partition("/")[0].removeprefix("scale_"))]
                for frame in range(first, last):
                    gather(
                        inside[name],
                        told[name][frame - first, 0].numpy(),
                        stride,
                        boxes_of(recording, frame - 1),
                        boxes_of(recording, frame),
                    )
    for name, told in gate_names(weights.tensors).items():
        print(f"gate {told:24} {float(weights.tensors[name]):+.3f}")
    for name, shares in changes.items():
        print(f"changes its features by {np.mean(shares):6.1%}  {name}")
    for name, groups in inside.items():
        print(
            f"map {name}: "
            + ", ".join(
                f"{group} {np.mean(groups[group]):.3f} ({len(groups[group])})"
                for group in GROUPS
                if group in groups
            )
        )


def boxes_of(recording, frame: int) -> dict[int, tuple[float, float, float, float]]:
    """track_id -> x, y, w, h"""
    return (
        {}
        if frame < 0
        else {
            int(b["track_id"]): (float(b["x"]), float(b["y"]), float(b["w"]), float(b["h"]))
            for b in recording.boxes(frame)
        }
    )


def gather(groups, values, stride: int, before: dict, now: dict) -> None:
    """The map's mean inside each box (the cell of its centre at least), by how far the box moved since the frame before."""
    free = np.ones(values.shape, bool)
    for track, (x, y, w, h) in now.items():
        rows = slice(int(y / stride), max(int(y / stride), int((y + h) / stride)) + 1)
        columns = slice(int(x / stride), max(int(x / stride), int((x + w) / stride)) + 1)
        free[rows, columns] = False
        if track not in before or not values[rows, columns].size:
            continue
        x0, y0, w0, h0 = before[track]
        moved = np.hypot(x + w / 2 - x0 - w0 / 2, y + h / 2 - y0 - h0 / 2)
        group = "still" if moved < STILL else GROUPS[np.digitize(moved / stride, EDGES)]
        groups[group].append(float(values[rows, columns].mean()))
    groups["outside"].append(float(values[free].mean()))


if __name__ == "__main__":
    main(*sys.argv[1:])
