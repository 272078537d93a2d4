"""Temporal attention that reads the frames of the next lane, not of its own.

As published, small-object attention keeps earlier frames in a buffer that all lanes share. Here every lane
reads its neighbour's frames, everything else stays the same. learn-v2 has compared the two.
"""

import torch
from evspan.pipeline.model.detector import Detector, LookBackRows, look_back_rows
from evspan.pipeline.model.state import DetectorState
from torch import Tensor


def mixed_look_back_rows(labelled: Tensor, following: Tensor, frames: int) -> LookBackRows:
    """`look_back_rows` with the frames of lane b + 1 before a labelled frame of lane b.

    Args:
        labelled: (T, B) bool.
        following: (frames, B) bool.
        frames: number of earlier frames that a labelled frame reads.
    """
    if not frames:
        return look_back_rows(labelled, following, frames)
    steps, lanes = labelled.shape
    labelled_rows = labelled.flatten().nonzero()[:, 0]
    needed = labelled.clone()
    ahead = torch.cat((labelled, following))
    for k in range(1, frames + 1):
        needed |= ahead[k : k + steps].roll(1, 1)
    num_carried = frames * lanes
    carried_rows = torch.arange(num_carried, device=labelled.device)
    row = torch.cat((carried_rows, needed.flatten().cumsum(0) - 1 + num_carried))
    neighbours = labelled_rows // lanes * lanes + (labelled_rows + 1) % lanes
    return LookBackRows(
        needed=needed.flatten().nonzero()[:, 0],
        labelled=row[labelled_rows + num_carried] - num_carried,
        before=torch.stack([row[neighbours + k * lanes] for k in range(frames)], 1),
        last=row[steps * lanes :],
    )


PLAIN_FORWARD = Detector.forward


def mixed_forward(
    self: Detector,
    frames: Tensor,
    state: DetectorState,
    *,
    starts: Tensor | None = None,
    labelled: Tensor | None = None,
    following: Tensor | None = None,
) -> tuple[Tensor, DetectorState]:
    """`Detector.forward` that always finds earlier frames by `look_back_rows`."""
    if labelled is None:
        labelled = torch.ones(frames.shape[:2], dtype=torch.bool)
    return PLAIN_FORWARD(self, frames, state, starts=starts, labelled=labelled, following=following)


class MixedLanesDetector(Detector):
    """A detector whose temporal attention reads the frames of the next lane."""

    look_back_rows = staticmethod(mixed_look_back_rows)
    forward = mixed_forward
