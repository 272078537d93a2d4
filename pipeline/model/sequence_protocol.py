"""Where a sequence lies. The model calls these two and knows no rank."""

from collections.abc import Callable
from typing import Protocol

from evspan.pipeline.model.state import StageState
from torch import Tensor

Recurrence = Callable[[Tensor, StageState], tuple[Tensor, StageState]]


class Exchange(Protocol):
    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        """Run `recurrence` over this rank's frames x (T, B, h, w, C) from `state` on; called once per stage.

        The recurrence takes any subset of the cells (h, w), say (T, 1, 1, cells, C) with states (1, C, 1, cells), unless
        the backbone's dws_conv is on. Returns the hidden states, shaped as x, and the next state.
        """

    def previous(self, tail: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The frames before this rank's, and the next carry.

        Args:
            tail: (looks_back, B, C, h, w) this rank's last frames; of a shorter chunk, frames of `carry` come first.
            carry: the same shape, from before the chunk. Called once per attended scale.
        Returns:
            the frames before this rank's first one, oldest first, and the next carry; both shaped as `tail`.
        """

    def following(self, labelled: Tensor, frames: int) -> Tensor:
        """Which of the `frames` frames after this rank's last one are labelled; of the next chunk's, any may be: True.

        Args:
            labelled: (T, B) bool, this rank's.
        Returns:
            (frames, B) bool.
        """


class LocalExchange:
    """A sequence stays on one rank."""

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        return recurrence(x, state)

    def previous(self, tail: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return carry, tail

    def following(self, labelled: Tensor, frames: int) -> Tensor:
        return labelled.new_ones(frames, labelled.shape[1])
