"""What the trainer needs of an engine."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.engine.adam import Update
from evspan.pipeline.engine.host_copies import CopyToHost, copy_as_float32, copy_now
from evspan.pipeline.parallel.world import World
from torch import Tensor, nn


class OptimizerStateOfEngine(Protocol):
    """Adam's state between steps, independent of ranks and engine."""

    def moments(self, *, keep: bool, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """exp_avg/NAME and exp_avg_sq/NAME, float32, copied by `copy`. A collective.

        keep: whether this rank needs them; else {}.
        """

    def counters(self) -> dict[str, Any]:
        """Numbers of updates, as JSON values."""

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        """The float32 tensors that this rank's Adam updates, and for each its average."""

    def averages(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """Averages by parameter name, float32, copied by `copy` on every rank. A collective."""

    def restore_averages(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `averages`, of any ranks and engine."""


class TrainingEngine(Protocol):
    """Forward, backward, step, save and load of a model on all ranks.

    All ranks make the same calls in the same order. The loss that `backward` receives is (local sum
    / global count) x world size.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, *, lanes: int) -> None:
        """lanes: of this rank, in a micro-batch."""

    @property
    def optimizer_state(self) -> OptimizerStateOfEngine:
        """Adam's state."""

    @property
    def module(self) -> nn.Module:
        """The model."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""

    @property
    def learning_rate(self) -> float:
        """Of parameters without a multiplier, for the next update."""

    @property
    def updates_next(self) -> bool:
        """Whether the next `step` is the last one of an accumulation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""

    def train(self) -> None:
        """Sets the model to training mode."""

    def backward(self, loss: Tensor, counts: Tensor) -> None:
        """Adds the gradients of a micro-batch. counts: () bool; False adds nothing."""

    def step(self) -> Update | None:
        """Counts a micro-batch; clips and updates after the last one of an accumulation."""

    def advance(self) -> None:
        """Advances the schedule. The caller knows by then that the last update was applied."""

    def full_gradients(self) -> dict[str, Tensor]:
        """Gradients since the last update over all ranks, by name. A collective."""

    def full_state(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """All weights and buffers, float32, copied by `copy` on every rank. A collective."""

    def load_state(
        self, tensors: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        """The inverse of `full_state` and of the optimizer state's `moments` and `counters`."""

    def close(self) -> None:
        """So that this process can train another model."""


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """Float32 copies, on the CPU, of the parameters that are not trained.

    The model may hold them in half precision, or a part of each on a rank.
    """
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def consolidated_state(
    module: nn.Module, weights: Mapping[str, Tensor], copy: CopyToHost
) -> dict[str, Tensor]:
    """The module's state: `weights` where they have a name, else a float32 copy by `copy`."""
    state: dict[str, Tensor] = module.state_dict()
    others = {name: tensor for name, tensor in state.items() if name not in weights}
    copies = copy_as_float32(others, copy)
    return {name: weights[name] if name in weights else copies[name] for name in state}
