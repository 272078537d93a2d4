"""Reports what the attention blocks of a trained detector do.

    python tests/benchmarks/attention_reach.py RUN SHARDS [val]

Prints the gates; how much each block changes its features (norm of the change / norm of the
features); and the mean of its maps, from 0 to 1, inside boxes by the speed of their objects, and
outside all boxes.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.tensorboard.attention_probe import MAPS, gate_names, record_attention
from evspan.pipeline.weights import load_weights

CHUNK = 20  # frames
STILL = 0.25  # pixels per frame
EDGES = (0.25, 0.5, 1.0)  # cells per frame
GROUPS = ("moved under 0.25 cells", "0.25 to 0.5", "0.5 to 1", "1 and more", "still", "outside")
BLOCKS = (MultiScaleSpatialAttention, EventTemporalAttention, ScaleAwareChannelAttention)

Boxes = dict[int, tuple[float, float, float, float]]  # track_id -> x, y, w, h
MeansByGroup = dict[str, list[float]]


class FrameMaps(NamedTuple):
    """The attention maps of one frame, by name."""

    recording: Any
    frame: int
    maps: dict[str, np.ndarray]


def main(run: str, shards: str, split: str = "val") -> None:
    """Prints the report of a run on a split of the shards."""
    weights = load_weights(run)
    data = open_dataset(DatasetConfig(root=shards), split)
    detector = detector_from(weights, device=torch.device("cpu"))
    changes = record_changes(detector)
    means: dict[str, MeansByGroup] = defaultdict(lambda: defaultdict(list))
    for item in frame_maps(detector, data):
        previous_boxes = boxes_of(item.recording, item.frame - 1)
        boxes = boxes_of(item.recording, item.frame)
        for name, values in item.maps.items():
            stride = detector.strides[int(name.partition("/")[0].removeprefix("scale_"))]
            add_means(means[name], values, stride, previous_boxes, boxes)
    for name, label in gate_names(weights.tensors).items():
        print(f"gate {label:24} {float(weights.tensors[name]):+.3f}")
    for name, fractions in changes.items():
        print(f"changes its features by {np.mean(fractions):6.1%}  {name}")
    for name, groups in means.items():
        cells = [
            f"{group} {np.mean(groups[group]):.3f} ({len(groups[group])})"
            for group in GROUPS
            if group in groups
        ]
        print(f"map {name}: {', '.join(cells)}")


def record_changes(detector: Detector) -> dict[str, list[float]]:
    """Adds hooks that append the relative change of each attention block, call by call."""
    changes: dict[str, list[float]] = defaultdict(list)
    for name, module in detector.fpn.named_modules():
        if isinstance(module, BLOCKS):

            def on_forward(_, inputs, output, name=name):
                change = (output - inputs[0]).norm() / inputs[0].norm()
                changes[name].append(float(change))

            module.register_forward_hook(on_forward)
    return changes


def frame_maps(detector: Detector, data) -> Iterator[FrameMaps]:
    """Runs the detector over all recordings and yields the maps of each frame."""
    for recording in data.recordings:
        state = detector.initial_state(1, data.height, data.width)
        for first in range(0, recording.frames, CHUNK):
            last = min(first + CHUNK, recording.frames)
            frames = torch.from_numpy(recording.read(first, last)[:, None])
            with torch.inference_mode(), record_attention(detector) as record:
                _, state = detector(frames, state)
            names = [name for name in record if name.endswith(MAPS)]
            for i in range(last - first):
                maps = {name: record[name][i, 0].numpy() for name in names}
                yield FrameMaps(recording, first + i, maps)


def boxes_of(recording, frame: int) -> Boxes:
    """Boxes of a frame by track; none before the first frame."""
    if frame < 0:
        return {}
    boxes = {}
    for row in recording.boxes(frame):
        x, y, w, h = (float(row[name]) for name in "xywh")
        boxes[int(row["track_id"])] = (x, y, w, h)
    return boxes


def add_means(
    groups: MeansByGroup, values: np.ndarray, stride: int, previous_boxes: Boxes, boxes: Boxes
) -> None:
    """Appends the mean of a map inside each box, by the box's motion since the previous frame.

    Args:
        groups: group -> means, extended in place.
        values: (h, w) the map.
        stride: input pixels per cell. A box covers at least the cell of its top left corner.
    """
    outside = np.ones(values.shape, bool)
    for track, (x, y, w, h) in boxes.items():
        top = int(y / stride)
        left = int(x / stride)
        rows = slice(top, max(top, int((y + h) / stride)) + 1)
        columns = slice(left, max(left, int((x + w) / stride)) + 1)
        outside[rows, columns] = False
        if track not in previous_boxes or not values[rows, columns].size:
            continue
        x0, y0, w0, h0 = previous_boxes[track]
        motion = np.hypot(x + w / 2 - x0 - w0 / 2, y + h / 2 - y0 - h0 / 2)
        group = "still" if motion < STILL else GROUPS[np.digitize(motion / stride, EDGES)]
        groups[group].append(float(values[rows, columns].mean()))
    groups["outside"].append(float(values[outside].mean()))


if __name__ == "__main__":
    main(*sys.argv[1:])
