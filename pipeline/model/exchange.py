"""Where a sequence lies. The model calls these two and knows no rank."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pipeline.model.state import StageState

Recurrence = Callable[[Tensor, StageState], tuple[Tensor, StageState]]


class Exchange(Protocol):
    def scan(self, recurrence: Recurrence, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """Run `recurrence` over this rank's frames x (T, B, ...) from `state` on; called once per stage."""

    def previous(self, tail: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """The frames before this rank's, and the next carry.

        Args:
            tail: (looks_back, B, C, h, w) this rank's last frames. carry: the same shape, from before the chunk.
        """


class LocalExchange:
    """A sequence stays on one rank."""

    def scan(self, recurrence: Recurrence, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        return recurrence(x, state)

    def previous(self, tail: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return carry, tail
