"""Trains a model with DeepSpeed: plain data parallelism over all ranks, ZeRO stages 0 to 3.

DeepSpeed averages gradients over the world at every stage, so the loss that `backward` receives is
(local sum / global count) x world size.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from evspan.conf.schema.training import OptimizerConfig, Precision, Schedule, TrainConfig
from evspan.pipeline.engine import deepspeed_adapter as adapter
from evspan.pipeline.engine.optimizer_state import OptimizerState
from evspan.pipeline.parallel.world import World
from torch import Tensor, nn


def learning_rate_factor(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """The schedule: step -> fraction of the peak learning rate.

    A linear warm-up, then a linear (OneCycle, as in RVT) or cosine descent.
    """
    warmup = max(1, round(config.warmup_fraction * max_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return config.start_factor + (1 - config.start_factor) * step / warmup
        progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
        if config.schedule is Schedule.cosine:
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (config.end_factor - 1) * progress

    return factor


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups.

    Matrices and kernels have weight decay; biases, norms, LayerScale and gates have none. Gates are
    a last group of their own if `gate_lr_multiplier` is not 1.
    """
    decayed = []
    not_decayed = []
    gates = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".gate") and config.gate_lr_multiplier != 1:
            gates.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            not_decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    if gates:
        gate_lr = config.lr * config.gate_lr_multiplier
        groups.append({"params": gates, "weight_decay": 0.0, "lr": gate_lr})
    return groups


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
        "gradient_clipping": config.training.gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": config.training.precision is Precision.bf16},
        "fp16": {"enabled": config.training.precision is Precision.fp16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """Forward, backward, step, save and load of the sharded model.

    All ranks make the same calls in the same order.

    Args:
        lanes: of this rank, in a micro-batch.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, *, lanes: int) -> None:
        self.stage = config.deepspeed.stage
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer), lr=config.optimizer.lr
        )
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        factor = learning_rate_factor(config.optimizer, config.training.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.engine = adapter.initialize(
            model,
            optimizer,
            schedule,
            engine_config(config, lanes, sum(p.numel() for p in trained)),
            world.device,
        )
        self.optimizer_state = OptimizerState(
            self.engine, optimizer, schedule, trained, self.stage, world
        )
        self.gradient_norm = 0.0  # of the last update, before clipping
        self.num_backwards = 0  # since the last update

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
        """Of the first parameter group, for the next update."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.engine(*args, **kwargs)

    def train(self) -> None:
        """Sets the model to training mode."""
        self.engine.train()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch. loss: a scalar."""
        self.num_backwards += 1
        self.engine.backward(loss)

    def step(self) -> None:
        """Counts a micro-batch; clips and updates after the last one of an accumulation."""
        updates = self.engine.is_gradient_accumulation_boundary()
        if updates and self.stage == 0:  # DeepSpeed computes the norm from stage 1 on
            norms = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
            self.gradient_norm = float(torch.stack(norms).norm()) if norms else 0.0
        self.engine.step()
        if updates:
            self.num_backwards = 0
            norm = self.engine.get_global_grad_norm()
            if norm is not None:
                self.gradient_norm = float(norm)

    def skip(self) -> None:
        """Counts a micro-batch without gradients.

        If it is the last one of an accumulation, the gradients of the others, if any, update the
        weights.
        """
        updates = self.num_backwards > 0 and self.engine.is_gradient_accumulation_boundary()
        if not updates:
            adapter.count_micro_batch(self.engine)
            return
        parameters = list(self.module.parameters())
        # DeepSpeed sums gradients over ranks in a backward, here of a loss that is zero.
        with adapter.whole_parameters(parameters, stage=self.stage):
            self.engine.backward(sum((p * 0).sum() for p in parameters))
        self.step()

    def full_gradients(self) -> dict[str, Tensor]:
        """Gradients since the last update, by parameter name. A collective; after `backward`.

        Returns:
            Float32 on the CPU of every rank, averaged over ranks, before clipping.
        """
        gradients = {}
        for name, parameter in self.module.named_parameters():
            gradient = adapter.full_gradient(parameter)
            if gradient is not None:
                gradients[name] = gradient.float().cpu().clone()
        return gradients

    def full_state(self) -> dict[str, Tensor]:
        """Copies of all weights and buffers on the CPU of every rank. A collective.

        Weights are the float32 ones that the optimizer updates; other floating tensors are cast to
        float32.
        """
        weights = self.optimizer_state.weights()
        state = {}
        for name, tensor in self.module.state_dict().items():
            if name in weights:
                state[name] = weights[name]
            else:
                tensor = tensor.detach()
                if tensor.is_floating_point():
                    tensor = tensor.float()
                state[name] = tensor.cpu().clone()
        return state

    def load_state(
        self, tensors: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        """The inverse of `full_state` and of the optimizer state's `moments` and `counters`.

        They may be from a run with other ranks and another ZeRO stage.
        """
        with adapter.whole_parameters(self.module.parameters(), stage=self.stage, write=True):
            self.module.load_state_dict(tensors)
        self.optimizer_state.restore(tensors, moments, counters)

    def close(self) -> None:
        """Removes DeepSpeed's hooks, so that this process can train another model."""
        self.engine.destroy()
