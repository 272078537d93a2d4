"""Trains a model with torch alone: every rank has all weights and Adam's whole state.

Weights, gradients and moments are each one flat tensor, so an update takes about twenty operators
and one collective, however many parameters the model has.
"""

from collections.abc import Mapping
from typing import Any

import torch
from evspan.conf.schema.training import Precision, TrainConfig
from evspan.pipeline.engine.adam import (
    MOMENTS,
    LearningRateSchedule,
    SkippableAdamW,
    Update,
    clip_factor,
    learning_rate_factor,
    parameter_groups,
    sum_of_squares,
)
from evspan.pipeline.engine.host_copies import CopyToHost, copy_now
from evspan.pipeline.engine.training_engine import consolidated_state, frozen_weights
from evspan.pipeline.parallel.reductions import sum_over_ranks
from evspan.pipeline.parallel.world import World
from torch import Tensor, nn

ALIGNED = 8  # elements


class PlainEngine:
    """Forward, backward, step, save and load of the model, replicated on every rank.

    The methods are those of TrainingEngine.

    Args:
        lanes: not used; the signature is that of the other engine.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, *, lanes: int) -> None:
        self.frozen = frozen_weights(model)
        self._module = model.to(world.device)
        self.world = world
        self.clip = config.training.gradient_clipping
        self.micro_batches = config.training.gradient_accumulation_steps  # per update
        self.micro_batch = 0  # of them, since the last update
        groups = parameter_groups(model, config.optimizer)
        half = config.training.precision is Precision.bf16
        self.weights = FlatWeights(model, groups, torch.bfloat16 if half else torch.float32)
        self.adam = SkippableAdamW(
            [
                {**group, "params": [part]}
                for group, part in zip(groups, self.weights.parts, strict=True)
                if part.numel()
            ],
            lr=config.optimizer.lr,
            fused=world.device.type != "cpu",
        )
        factor = learning_rate_factor(config.optimizer, config.training.max_steps)
        self.schedule = LearningRateSchedule(self.adam, factor, peak=config.optimizer.lr)
        self.optimizer_state = PlainOptimizerState(
            self.adam, self.schedule, self.weights, has_average=config.training.ema_decay > 0
        )
        self.gradient: Tensor | None = None  # (n,) float32, since the last update, of this rank
        self.any_counts: Tensor | None = None  # () bool, of the micro-batches since then

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self.weights.model.dtype

    @property
    def learning_rate(self) -> float:
        """Of parameters without a multiplier, for the next update."""
        return self.schedule.learning_rate

    @property
    def updates_next(self) -> bool:
        """Whether the next `step` is the last one of an accumulation."""
        return self.micro_batch == self.micro_batches - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self._module(*args, **kwargs)

    def train(self) -> None:
        """Sets the model to training mode."""
        self._module.train()

    def backward(self, loss: Tensor, counts: Tensor) -> None:
        """Adds the gradients of a micro-batch, in float32.

        Args:
            loss: a scalar.
            counts: () bool, the same on all ranks; False adds nothing, whatever the gradients are.
        """
        (loss / (self.micro_batches * self.world.size)).backward()  # type: ignore[no-untyped-call]  # torch's
        gradient = self.weights.take_gradients()
        if self.micro_batches > 1:
            before = torch.zeros_like(gradient) if self.gradient is None else self.gradient
            gradient = torch.where(counts, before + gradient, before)
        self.gradient = gradient
        self.any_counts = counts if self.any_counts is None else self.any_counts | counts

    @torch.no_grad()
    def step(self) -> Update | None:
        """Counts a micro-batch; clips and updates after the last one of an accumulation.

        An update is left out if no micro-batch of the accumulation counts, or if the gradients are
        not finite.

        Returns:
            None before the last micro-batch of an accumulation.
        """
        if not self.updates_next:
            self.micro_batch += 1
            return None
        assert self.gradient is not None
        assert self.any_counts is not None
        gradient = sum_over_ranks(self.gradient, name="gradients")
        norm = sum_of_squares([gradient], gradient.device).sqrt()
        applied = self.any_counts & torch.isfinite(norm)
        if self.clip:
            gradient = gradient * clip_factor(norm, self.clip)
        self.weights.set_gradient(gradient)
        self.adam.skip = (~applied).float()
        self.adam.step()
        self.weights.copy_to_model()
        self.weights.set_gradient(None)
        self.micro_batch = 0
        self.gradient = None
        self.any_counts = None
        return Update(norm, applied)

    def advance(self) -> None:
        """Advances the schedule. The caller knows by then that the last update was applied."""
        self.schedule.set(self.schedule.updates + 1)

    def full_gradients(self) -> dict[str, Tensor]:
        """Gradients since the last update, by parameter name. A collective; after `backward`.

        Returns:
            Float32 on the CPU of every rank, over all ranks, before clipping.
        """
        assert self.gradient is not None
        return self.weights.by_name(sum_over_ranks(self.gradient, name="gradients to report"))

    def full_state(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """All weights and buffers, copied by `copy`.

        Weights are the float32 ones that the optimizer updates; other floating tensors are cast to
        float32.
        """
        weights = {name: tensor.clone() for name, tensor in self.frozen.items()}
        weights |= self.weights.by_name(self.weights.master, copy)
        return consolidated_state(self._module, weights, copy)

    def load_state(
        self, tensors: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        """The inverse of `full_state` and of the optimizer state's `moments` and `counters`.

        They may be from a run with other ranks and another engine.
        """
        self._module.load_state_dict(tensors)
        self.frozen = {name: tensors[name].float().clone() for name in self.frozen}
        self.weights.set_by_name(self.weights.master, tensors)
        self.weights.copy_to_model()
        self.optimizer_state.restore(moments, counters)

    def close(self) -> None:
        """Nothing to do: the engine has no hooks."""


class FlatWeights:
    """The trained parameters of a model as views of one flat tensor, ordered by group.

    Args:
        groups: as of `parameter_groups`.
        dtype: of the model's parameters.

    Attributes:
        model: (n,) the model's parameters.
        master: (n,) float32, which the optimizer updates; the same tensor if the model computes in
            float32.
        parts: per group, the part of `master` that is its parameter.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parameters: list[nn.Parameter] = []
        sizes = []
        for group in groups:
            # Kernels are fast at addresses that are multiples of 16 bytes.
            self.parameters += sorted(group["params"], key=lambda p: p.numel() % ALIGNED != 0)
            sizes.append(sum(p.numel() for p in group["params"]))
        self.names = [names[p] for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.master = torch.cat([p.detach().reshape(-1).float() for p in self.parameters])
        self.model = self.master if dtype == torch.float32 else self.master.to(dtype)
        for parameter, values in zip(self.parameters, self._split(self.model), strict=True):
            parameter.data = values.view(parameter.shape)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.parts = [nn.Parameter(part) for part in _split(self.master, sizes)]

    def take_gradients(self) -> Tensor:
        """(n,) float32, the parameters' gradients, which are then cleared."""
        gradients = []
        for parameter in self.parameters:
            gradient = parameter.grad
            gradients.append(torch.zeros_like(parameter) if gradient is None else gradient)
            parameter.grad = None
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).float()

    def set_gradient(self, gradient: Tensor | None) -> None:
        """Of the optimizer's parameters. gradient: (n,) float32; None: none."""
        sizes = [part.numel() for part in self.parts]
        split = [None] * len(sizes) if gradient is None else _split(gradient, sizes)
        for part, values in zip(self.parts, split, strict=True):
            part.grad = values

    def copy_to_model(self) -> None:
        """After `master` has changed."""
        if self.model is not self.master:
            self.model.copy_(self.master)

    def by_name(self, flat: Tensor, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """Views of one copy by `copy`, in the parameters' shapes. flat: (n,)."""
        parts = self._split(copy(flat))
        return {
            name: part.view(parameter.shape)
            for name, parameter, part in zip(self.names, self.parameters, parts, strict=True)
        }

    def set_by_name(self, flat: Tensor, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """The inverse of `by_name`, in place."""
        whole = torch.cat([tensors[prefix + name].reshape(-1).float() for name in self.names])
        flat.copy_(whole)

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return _split(flat, self.sizes)


class PlainOptimizerState:
    """Adam's moments by parameter name, and its counters."""

    def __init__(
        self,
        adam: SkippableAdamW,
        schedule: LearningRateSchedule,
        weights: FlatWeights,
        *,
        has_average: bool,
    ) -> None:
        self.schedule = schedule
        self.weights = weights
        self.flat = {key: torch.zeros_like(weights.master) for key in MOMENTS}
        # (n,) float32: the moving average of the weights.
        self.average = torch.zeros_like(weights.master) if has_average else None
        self.steps = []
        sizes = [part.numel() for part in weights.parts]
        split = {key: _split(flat, sizes) for key, flat in self.flat.items()}
        for i, part in enumerate(weights.parts):
            steps = torch.zeros((), device=part.device if adam.is_fused else "cpu")
            adam.state[part].update({"step": steps}, **{key: split[key][i] for key in MOMENTS})
            self.steps.append(steps)

    def moments(self, *, keep: bool, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """exp_avg/NAME and exp_avg_sq/NAME, float32. keep: whether needed; else {}."""
        moments = {}
        for key, flat in self.flat.items():
            if keep:
                named = self.weights.by_name(flat, copy)
                moments.update({f"{key}/{name}": tensor for name, tensor in named.items()})
        return moments

    def counters(self) -> dict[str, Any]:
        """Numbers of updates, as JSON values."""
        return {
            "updates": self.schedule.updates,
            "adam_steps": int(max(self.steps)),
            "loss_scale": {},  # part of the format
        }

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        """(float32 weights, their average), of all parameters; [] without averages."""
        return [] if self.average is None else [(self.weights.master, self.average)]

    def averages(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """Averages by parameter name, float32, copied by `copy`."""
        assert self.average is not None
        return self.weights.by_name(self.average, copy)

    def restore_averages(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `averages`."""
        assert self.average is not None
        self.weights.set_by_name(self.average, tensors)

    def restore(self, moments: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of `moments` and `counters`."""
        for key, flat in self.flat.items():
            self.weights.set_by_name(flat, moments, f"{key}/")
        for steps in self.steps:
            steps.fill_(counters["adam_steps"])
        self.schedule.set(counters["updates"])


def _split(flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """(n,) -> one part per size. Tensor.split has no type annotations."""
    return torch.split(flat, sizes)
