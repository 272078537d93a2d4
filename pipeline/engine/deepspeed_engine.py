"""Trains a model with DeepSpeed: plain data parallelism over all ranks, ZeRO stages 0 to 3.

DeepSpeed averages gradients over the world at every stage, so the loss that `backward` receives is
(local sum / global count) x world size.
"""

from typing import Any, cast

import torch
from evspan.conf.schema.training import Precision, TrainConfig
from evspan.pipeline.engine import deepspeed_adapter as adapter
from evspan.pipeline.engine.adam import (
    LearningRateSchedule,
    SkippableAdamW,
    Update,
    clip_factor,
    learning_rate_factor,
    parameter_groups,
)
from evspan.pipeline.engine.gradient_gate import GradientGate
from evspan.pipeline.engine.host_copies import CopyToHost, copy_now
from evspan.pipeline.engine.optimizer_state import OptimizerState
from evspan.pipeline.engine.training_engine import consolidated_state, frozen_weights
from evspan.pipeline.parallel.world import World
from torch import Tensor, nn


def engine_config(config: TrainConfig, lanes: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config.

    Args:
        lanes: of this rank. parameters: elements of all that are trained.
    """
    zero: dict[str, Any] = {
        "stage": config.deepspeed.stage,
        "overlap_comm": False,
        # DeepSpeed allocates a buffer of this many elements, by default of 2 GB. All gradients pass
        # through one bucket.
        "reduce_bucket_size": max(1, parameters),
    }
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": lanes,
        "gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        # DeepSpeed's clipping without ZeRO makes the host wait. The engine clips there.
        "gradient_clipping": config.training.gradient_clipping if config.deepspeed.stage else 0.0,
        "zero_optimization": zero,
        # The engine checks the norm instead, which is one value.
        "bf16": {
            "enabled": config.training.precision is Precision.bf16,
            "check_grad_overflow": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # DeepSpeed's timer makes the host wait at the start and at the end of a step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


class DeepSpeedEngine:
    """Forward, backward, step, save and load of the sharded model.

    All ranks make the same calls in the same order.

    Args:
        lanes: of this rank, in a micro-batch.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, *, lanes: int) -> None:
        self.stage = config.deepspeed.stage
        self.clip = config.training.gradient_clipping
        self.frozen = frozen_weights(model)
        model.to(world.device)
        self.adam = SkippableAdamW(
            parameter_groups(model, config.optimizer),
            lr=config.optimizer.lr,
            fused=world.device.type != "cpu" and not config.deepspeed.offload_optimizer,
        )
        trained = [p for group in self.adam.param_groups for p in group["params"]]
        # DeepSpeed's optimizer for bf16 in stage 0 makes a step without gradients when it is built.
        self.adam.skip = torch.ones((), device=world.device)
        self.engine = adapter.initialize(
            model,
            self.adam,
            engine_config(config, lanes, sum(p.numel() for p in trained)),
            world.device,
        )
        self.adam.skip = None
        adapter.watch_norm(self.engine, self._gate_update, stage=self.stage, clip=self.clip)
        factor = learning_rate_factor(config.optimizer, config.training.max_steps)
        self.schedule = LearningRateSchedule(self.adam, factor, peak=config.optimizer.lr)
        self.optimizer_state = OptimizerState(
            self.engine,
            self.adam,
            self.schedule,
            trained,
            self.stage,
            world,
            has_average=config.training.ema_decay > 0,
        )
        self.gate = GradientGate(trained, config.training.gradient_accumulation_steps)
        self.update: Update | None = None  # the last one

    @property
    def module(self) -> nn.Module:
        """The model. In ZeRO stage 3, its parameters are partitioned."""
        return cast(nn.Module, self.engine.module)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return next(self.module.parameters()).dtype

    @property
    def learning_rate(self) -> float:
        """Of parameters without a multiplier, for the next update."""
        return self.schedule.learning_rate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.engine(*args, **kwargs)

    def train(self) -> None:
        """Sets the model to training mode."""
        self.engine.train()

    @property
    def updates_next(self) -> bool:
        """Whether the next `step` is the last one of an accumulation."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    def backward(self, loss: Tensor, counts: Tensor) -> None:
        """Adds the gradients of a micro-batch.

        Args:
            loss: a scalar.
            counts: () bool, the same on all ranks; False adds nothing, whatever the gradients are.
        """
        self.gate.open(counts)
        self.engine.backward(loss)

    def step(self) -> Update | None:
        """Counts a micro-batch; clips and updates after the last one of an accumulation.

        An update is left out if no micro-batch of the accumulation counts, or if the gradients are
        not finite.

        Returns:
            None before the last micro-batch of an accumulation.
        """
        updates = self.updates_next
        if updates and self._clips:
            self._clip_gradients()
        self.engine.step()
        return self.update if updates else None

    def advance(self) -> None:
        """Advances the schedule. The caller knows by then that the last update was applied."""
        self.schedule.set(self.schedule.updates + 1)

    @property
    def _clips(self) -> bool:
        return self.stage == 0 and self.dtype == torch.float32

    def _clip_gradients(self) -> None:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.stack(list(torch._foreach_norm(gradients))).square().sum().sqrt()
        self._gate_update(norm)
        if self.clip:
            torch._foreach_mul_(gradients, clip_factor(norm, self.clip))

    def _gate_update(self, norm: Tensor) -> None:
        applied = self.gate.close() & torch.isfinite(norm)
        self.adam.skip = (~applied).float()
        self.update = Update(norm, applied)

    def full_gradients(self) -> dict[str, Tensor]:
        """Gradients since the last update, by parameter name. A collective; after `backward`.

        Returns:
            Float32 on the CPU of every rank, averaged over ranks, before clipping.
        """
        gradients = {}
        for name, parameter in self.module.named_parameters():
            gradient = None
            if parameter.requires_grad:
                gradient = adapter.full_gradient(parameter)
            if gradient is not None:
                gradients[name] = gradient.float().cpu().clone()
        return gradients

    def full_state(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """All weights and buffers, copied by `copy` on every rank. A collective.

        Weights are the float32 ones that the optimizer updates; other floating tensors are cast to
        float32.
        """
        weights = {name: tensor.clone() for name, tensor in self.frozen.items()}
        return consolidated_state(self.module, weights | self.optimizer_state.weights(copy), copy)

    def load_state(
        self, tensors: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        """The inverse of `full_state` and of the optimizer state's `moments` and `counters`.

        They may be from a run with other ranks and another ZeRO stage.
        """
        with adapter.whole_parameters(self.module.parameters(), stage=self.stage, write=True):
            self.module.load_state_dict(tensors)
        self.frozen = {name: tensors[name].float().clone() for name in self.frozen}
        self.optimizer_state.restore(tensors, moments, counters)

    def close(self) -> None:
        """Removes DeepSpeed's hooks, so that this process can train another model."""
        self.engine.destroy()
