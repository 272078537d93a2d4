"""Zeroes the gradients of micro-batches that an accumulation leaves out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientGate:
    """Replaces the gradients of a micro-batch by zeros if it does not count, on the device.

    Multiplying by zero would not do: the gradients that must not count are often not finite. With
    one micro-batch per update nothing needs to be replaced, since the update is left out.

    Args:
        parameters: those that have gradients.
        micro_batches: per update.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], micro_batches: int) -> None:
        self.counts: Tensor | None = None  # () bool, of this micro-batch
        self.any_counts: Tensor | None = None  # () bool, of the micro-batches since the last update
        if micro_batches > 1:
            for parameter in parameters:
                parameter.register_hook(self._select)  # type: ignore[no-untyped-call]  # torch's

    def open(self, counts: Tensor) -> None:
        """Before the backward pass of a micro-batch. counts: () bool."""
        self.counts = counts
        if self.any_counts is None:
            self.any_counts = counts
        else:
            self.any_counts = self.any_counts | counts

    def close(self) -> Tensor:
        """At the update. () bool: whether any micro-batch since the last update counts."""
        assert self.any_counts is not None
        any_counts = self.any_counts
        self.any_counts = None
        return any_counts

    def _select(self, gradient: Tensor) -> Tensor:
        assert self.counts is not None
        return torch.where(self.counts, gradient, 0.0)
