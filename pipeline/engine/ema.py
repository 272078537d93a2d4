"""The exponential moving average (EMA) of the weights, which evaluation and inference use.

It is one more float32 value per parameter in Adam's state, so it is partitioned over the ranks and
offloaded as Adam's moments are, and follows the float32 weights that Adam updates, not the rounded
ones of bf16. The running means and variances of BatchNorm are averaged likewise: those of the last
few batches are noisy, and so is the AP with them (tests/benchmarks/LOG.md). Counters and frozen
parameters are those of the model.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from evspan.pipeline.engine.host_copies import CopyToHost, copy_now
from evspan.pipeline.engine.running_statistics import RunningStatistics
from evspan.pipeline.engine.training_engine import TrainingEngine
from evspan.pipeline.weights import Average
from torch import Tensor

logger = logging.getLogger(__name__)
PART = 2**18  # elements that are updated at once on a CPU


def warmed_up_decay(decay: float, updates: int) -> float:
    """The decay of the next update: min(decay, (1 + n) / (10 + n)) after n = `updates`.

    The first updates follow the weights, so that the average of a short run is not of its random
    start. Source: `num_updates` of TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + updates) / (10 + updates))


def follow(averages: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    """average += weight * (source - average), in place, in three kernels for all tensors.

    Each of the three operations is rounded by itself, so the result does not depend on where an
    element lies in a buffer, nor on how parameters are cut into buffers. `lerp` and `addcmul` may
    round otherwise in vector code than for the last elements of a buffer, and on other devices.

    Args:
        averages, sources: float32 of the same shapes, on one device.
        weight: () float32, 1 - decay; 0 changes nothing.
    """
    differences = torch._foreach_sub(sources, averages)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(averages, differences)


def follow_in_parts(averages: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    """`follow`, a part of 1 MB after the other: on a CPU the differences then stay in its cache."""
    for average, source in zip(averages, sources, strict=True):
        parts = torch.split(average.reshape(-1), PART)
        values_of_parts = torch.split(source.reshape(-1), PART)
        for part, values in zip(parts, values_of_parts, strict=True):
            follow([part], [values], weight)


class _Pair(NamedTuple):
    """A tensor that changes, and its average, float32."""

    source: Tensor
    average: Tensor


class MovingAverage:
    """The average of a model's weights and running statistics over the updates of a run.

    With n applied updates since it began, an update is
    average += (1 - d) * (weights - average), where d = min(decay, (1 + n) / (10 + n)).

    It is the same to the bit on every layout on which the weights are, and the host never waits for
    the device: an update that was skipped there changes the average by 0 times a difference.

    Args:
        engine: with `averaged` in its optimizer state.
        statistics: of the engine's model.

    Attributes:
        updates: that were applied since the average began.
    """

    def __init__(self, decay: float, engine: TrainingEngine, statistics: RunningStatistics) -> None:
        self.decay = decay
        self.updates = 0
        self.optimizer_state = engine.optimizer_state
        self.statistics = statistics
        self.trained = [_Pair(*pair) for pair in self.optimizer_state.averaged()]
        self.buffers = [_Pair(flat, flat.float().clone()) for flat in statistics.floating]
        self.begin()

    @property
    def info(self) -> Average:
        """Its decay and the number of its updates."""
        return Average(self.decay, self.updates)

    @torch.no_grad()
    def begin(self) -> None:
        """Makes the average that of no updates: the weights as they are."""
        self.updates = 0
        for pair in [*self.trained, *self.buffers]:
            pair.average.copy_(pair.source)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """After an optimizer step. applied: () bool, on any device; False: changes nothing."""
        weight = applied.float() * (1 - warmed_up_decay(self.decay, self.updates))
        for pairs in _by_device([*self.trained, *self.buffers]):
            averages = [pair.average for pair in pairs]
            sources = [pair.source.data.float() for pair in pairs]  # float32 ones are not copied
            device = averages[0].device
            step = follow_in_parts if device.type == "cpu" else follow
            step(averages, sources, weight.to(device))

    def advance(self) -> None:
        """Counts an update. The caller knows by then that the last one was applied."""
        self.updates += 1

    def state(self, raw: Mapping[str, Tensor], copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """The averaged tensors by name, float32, copied by `copy` on every rank. A collective.

        Args:
            raw: the model's state, copied by `copy`. What is not averaged is taken from it.
        """
        averages = self.optimizer_state.averages(copy)
        for pair, parts in zip(self.buffers, self.statistics.names, strict=True):
            averages.update(parts.by_name(copy(pair.average)))
        return {name: averages.get(name, tensor) for name, tensor in raw.items()}

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """The inverse of `state`, of any ranks and ZeRO stage."""
        self.optimizer_state.restore_averages(tensors)
        for pair, parts in zip(self.buffers, self.statistics.names, strict=True):
            pair.average.copy_(parts.flat(tensors))
        self.updates = updates

    def resume(
        self, tensors: Mapping[str, Tensor] | None, info: Mapping[str, int], *, log: bool
    ) -> None:
        """Continues the average of a checkpoint.

        Args:
            tensors: None: the checkpoint has none, so the average begins with its weights.
            info: `info` as JSON values; read where there are tensors.
            log: whether to log that it begins.
        """
        if tensors is not None:
            self.restore(tensors, info["updates"])
            return
        self.begin()
        if log:
            logger.info(
                "the checkpoint has no moving average of the weights: it begins with its weights "
                "(training.ema_decay=%g)",
                self.decay,
            )


def open_average(
    decay: float, engine: TrainingEngine, statistics: RunningStatistics
) -> MovingAverage | None:
    """The average that `training.ema_decay` requests; None: 0, none."""
    return MovingAverage(decay, engine, statistics) if decay else None


def _by_device(pairs: Iterable[_Pair]) -> list[list[_Pair]]:
    """With offloading, the float32 weights are on the CPU and the buffers on a GPU."""
    groups: dict[torch.device, list[_Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.average.device, []).append(pair)
    return list(groups.values())
