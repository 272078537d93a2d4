"""The detector's state between chunks: a value, passed in and returned. No module stores it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STAGES = 4  # of the backbone


class StageState(NamedTuple):
    """One stage's LSTM: hidden and cell, both (B, C, h, w)."""

    hidden: Tensor
    cell: Tensor


class DetectorState(NamedTuple):
    """The state after a frame.

    stages: one per backbone stage.
    previous: per attended scale (looks_back, B, C, h, w), the last frames' features that temporal
        attention reads, oldest first; () without temporal attention.
    """

    stages: tuple[StageState, ...]
    previous: tuple[Tensor, ...]


def state_tensors(state: DetectorState) -> list[Tensor]:
    """All tensors in a fixed order: hidden and cell of stage 1, 2, ..., then previous frames."""
    tensors: list[Tensor] = []
    for stage in state.stages:
        tensors += stage
    return tensors + list(state.previous)


def state_of(tensors: Sequence[Tensor]) -> DetectorState:
    """A state of tensors in the order of `state_tensors`."""
    return _assemble(tensors, STAGES)


def state_from_tensors(tensors: list[Tensor], like: DetectorState) -> DetectorState:
    """The inverse of `state_tensors`.

    Args:
        tensors: in the order of `state_tensors`.
        like: a state of the expected shapes.

    Raises:
        ValueError: the shapes differ from those of `like`.
    """
    shapes = [tuple(t.shape) for t in tensors]
    expected = [tuple(t.shape) for t in state_tensors(like)]
    if shapes != expected:
        raise ValueError(f"state of shapes {shapes} for {expected}")
    return _assemble(tensors, len(like.stages))


def map_state(function: Callable[..., Tensor], *states: DetectorState) -> DetectorState:
    """Applies function(tensor of the first state, of the second, ...) to every tensor.

    All states must have the same number of stages and attended scales.
    """
    tensors = [function(*group) for group in zip(*map(state_tensors, states), strict=True)]
    return _assemble(tensors, len(states[0].stages))


def _assemble(tensors: Sequence[Tensor], stages: int) -> DetectorState:
    pairs = tuple(StageState(tensors[2 * i], tensors[2 * i + 1]) for i in range(stages))
    return DetectorState(pairs, tuple(tensors[2 * stages :]))


def detach(state: DetectorState) -> DetectorState:
    """Cuts the graph between chunks (truncated back-propagation through time)."""
    return map_state(Tensor.detach, state)


def forget_lanes(state: DetectorState, starts: Tensor) -> DetectorState:
    """Sets lanes to zero. The other lanes pass through, gradients included.

    Args:
        starts: (B,) bool, the lanes to reset.
    """
    # Lanes are the fourth dim from the end, in stages and in previous frames.
    mask = starts.view(-1, 1, 1, 1)
    first = state.stages[0].hidden
    zero = torch.zeros((), dtype=first.dtype, device=first.device)

    def forget(t: Tensor) -> Tensor:
        # where, not a product: 0 * nan is nan, which would stay in the lane after a bad recording.
        return torch.where(mask, zero, t)

    return map_state(forget, state)


def zero_unless(counts: Tensor, state: DetectorState) -> DetectorState:
    """The state, or zeros. counts: () bool, read on its device."""
    return map_state(lambda t: torch.where(counts, t, 0.0), state)
