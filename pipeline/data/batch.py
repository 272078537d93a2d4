"""What the detector takes in one micro-batch."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BatchLabels(NamedTuple):
    """All of a `Batch` but its frames."""

    starts: Tensor
    labelled: Tensor
    following: Tensor
    boxes: Tensor
    counts: Tensor
    regions: Tensor


class Batch(NamedTuple):
    """One micro-batch of one rank: B lanes, T frames, of which n are labelled.

    frames: (T, B, C, H, W) uint8.
    starts: (B,) bool, lanes whose state is reset to zero before the first frame.
    labelled: (T, B) bool.
    following: (looks_back, B) bool, which of the frames after the last one are labelled; True for
        frames of the next chunk, which may be labelled.
    boxes: (n, G, 5) float32 class, cx, cy, w, h in pixels, of the labelled frames in (t, b) order.
    counts: (n,) int64 number of boxes of each labelled frame; rows of `boxes` after them are zero.
    regions: (n, R, 4) float32 cx, cy, w, h of the ignore regions of the labelled frames; rows after
        a frame's are zero. R is 0 where no frame has one.
    """

    frames: Tensor
    starts: Tensor
    labelled: Tensor
    following: Tensor
    boxes: Tensor
    counts: Tensor
    regions: Tensor

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`, except what the detector reads on the CPU: which are labelled."""
        moved = Batch(*(t.to(device, non_blocking=True) for t in self))
        return moved._replace(labelled=self.labelled, following=self.following)


class PaddedBoxes(NamedTuple):
    """`boxes`, `counts` and `regions` of a `Batch`."""

    boxes: Tensor
    counts: Tensor
    regions: Tensor


def pad_rows(rows: list[NDArray[np.float32]]) -> PaddedBoxes:
    """Separates the boxes of n frames from their ignore regions, and pads both.

    Args:
        rows: n arrays (k, 5) class, cx, cy, w, h; those of class -1 are ignore regions.
    """
    ignored = [of_frame[:, 0] < 0 for of_frame in rows]
    if not any(mask.any() for mask in ignored):
        return PaddedBoxes(*pad_boxes(rows), regions=torch.zeros(len(rows), 0, 4))
    boxes = [of_frame[~mask] for of_frame, mask in zip(rows, ignored, strict=True)]
    regions = [of_frame[mask] for of_frame, mask in zip(rows, ignored, strict=True)]
    padded, _ = pad_boxes(regions)
    return PaddedBoxes(*pad_boxes(boxes), regions=padded[..., 1:].contiguous())


def pad_boxes(boxes: list[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Pads boxes to one length, at least one row.

    Args:
        boxes: n arrays (k, 5).

    Returns:
        (n, G, 5) float32 and the numbers of valid rows (n,) int64.
    """
    counts = [len(b) for b in boxes]
    padded = np.zeros((len(boxes), max(counts, default=0) or 1, 5), np.float32)
    for i, rows in enumerate(boxes):
        padded[i, : len(rows)] = rows
    return torch.from_numpy(padded), torch.tensor(counts, dtype=torch.int64)
