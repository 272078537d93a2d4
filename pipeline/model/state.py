"""What the detector remembers between chunks: a value, handed in and returned. No module keeps any of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class StageState(NamedTuple):
    """One stage's LSTM: hidden and cell, both (B, C, h, w)."""

    hidden: Tensor
    cell: Tensor


class DetectorState(NamedTuple):
    """stages: one per backbone stage. previous: per attended scale the last frames' features (looks_back, B, C, h, w),
    oldest first, those that temporal attention looks back at; () without it."""

    stages: tuple[StageState, ...]
    previous: tuple[Tensor, ...]


def state_tensors(state: DetectorState) -> list[Tensor]:
    """All tensors in one fixed order: hidden and cell of stage 1, 2, ..., then the previous frames."""
    return [t for stage in state.stages for t in stage] + list(state.previous)


def state_from_tensors(tensors: list[Tensor], like: DetectorState) -> DetectorState:
    """The inverse of `state_tensors`. Raises ValueError when shapes are not those of `like`."""
    wanted = state_tensors(like)
    if [t.shape for t in tensors] != [t.shape for t in wanted]:
        raise ValueError(
            f"state of shapes {[tuple(t.shape) for t in tensors]} for {[tuple(t.shape) for t in wanted]}"
        )
    return _assemble(tensors, len(like.stages))


def map_state(function: Callable[..., Tensor], *states: DetectorState) -> DetectorState:
    """function(tensor of the first state, of the second, ...) for every tensor; states of one form."""
    return _assemble(
        [function(*ts) for ts in zip(*map(state_tensors, states), strict=True)],
        len(states[0].stages),
    )


def _assemble(tensors: list[Tensor], stages: int) -> DetectorState:
    pairs = tuple(StageState(tensors[2 * i], tensors[2 * i + 1]) for i in range(stages))
    return DetectorState(pairs, tuple(tensors[2 * stages :]))


def detach(state: DetectorState) -> DetectorState:
    """Cut the graph between chunks (truncated back-propagation through time)."""
    return map_state(Tensor.detach, state)


def forget_lanes(state: DetectorState, starts: Tensor) -> DetectorState:
    """Zero the lanes where `starts` (B,) is true; the others pass through, gradients included."""

    def forget(t: Tensor) -> Tensor:
        shape = (
            -1,
            1,
            1,
            1,
        )  # lanes are the fourth dim from the end, for states and for previous frames
        # where, not a product: 0 * nan is nan, and one bad recording must not poison its lane for ever.
        return torch.where(starts.view(shape), torch.zeros((), dtype=t.dtype, device=t.device), t)

    return map_state(forget, state)
