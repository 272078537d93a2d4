"""The calls by which the model reaches a sequence's other frames, which may be on other ranks."""

from collections.abc import Callable, Sequence
from typing import Protocol

from evspan.pipeline.model.state import StageState
from torch import Tensor

# x (T, B, h, w, C) and state -> hidden states, shaped as x, and the state after the last frame.
Recurrence = Callable[[Tensor, StageState], tuple[Tensor, StageState]]


class Exchange(Protocol):
    """Runs a sequence. The model calls these methods and has no notion of ranks."""

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        """Runs `recurrence` over the frames; called once per stage.

        Args:
            recurrence: takes any subset of the cells (h, w), for example (T, 1, 1, cells, C) with
                states (1, C, 1, cells), unless the backbone's dws_conv is on.
            x: (T, B, h, w, C), this rank's frames.
            state: before the first frame of the chunk.

        Returns:
            The hidden states, shaped as x, and the next state.
        """

    def previous(
        self, tails: Sequence[Tensor], carries: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the frames before this rank's, and the next carries.

        Called once, with all attended scales.

        Args:
            tails: per scale (looks_back, B, C, h, w), this rank's last frames. If the rank holds
                fewer, frames of the carry come first.
            carries: the same shapes, the frames before the chunk.

        Returns:
            Per scale the frames before this rank's first one, oldest first, and the next carry;
            shaped as the tails.
        """


class LocalExchange:
    """The exchange of a sequence on one rank."""

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        """Runs the recurrence; for shapes see `Exchange`."""
        return recurrence(x, state)

    def previous(
        self, tails: Sequence[Tensor], carries: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The frames before the chunk are the carry, and its last frames the next one."""
        return list(carries), list(tails)
