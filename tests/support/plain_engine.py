"""The oracle of DeepSpeedEngine: AdamW, schedule and clipping in plain torch, a model per rank."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from evspan.conf.schema.training import OptimizerConfig, Schedule
from evspan.pipeline.engine.adam import Update, parameter_groups
from evspan.pipeline.parallel.reductions import sum_over_ranks
from torch.nn.utils import clip_grad_norm_


def learning_rate_factor(config: OptimizerConfig, max_steps: int, step: int) -> float:
    """The schedule written out: its straight lines between the first, the peak and the last step."""
    warmup_steps = max(1, round(config.warmup_fraction * max_steps))
    last_step = max(warmup_steps + 1, max_steps - 1)
    if step > warmup_steps and config.schedule is Schedule.cosine:
        angle = np.interp(step, [warmup_steps, last_step], [0, math.pi])
        return config.end_factor + (1 - config.end_factor) * (1 + math.cos(angle)) / 2
    values = [config.start_factor, 1, config.end_factor]
    return float(np.interp(step, [0, warmup_steps, last_step], values))


class PlainEngine:
    """Has the methods of DeepSpeedEngine. On several ranks, it tests only mesh and exchanges."""

    dtype = torch.float32

    def __init__(self, model, config, world, *, lanes):
        self.module = model.to(self.dtype)
        self.world = world
        self.clip = config.training.gradient_clipping
        self.gradient_accumulation_steps = config.training.gradient_accumulation_steps
        self.micro_batches = 0
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer), lr=config.optimizer.lr
        )
        factor = partial(learning_rate_factor, config.optimizer, config.training.max_steps)
        self.optimizer_state = SimpleNamespace(averaged=list)  # no moving average of the weights
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def __call__(self, *args, **kwargs):
        """The forward pass of the module."""
        return self.module(*args, **kwargs)

    def train(self):
        """Switches to training mode."""
        self.module.train()

    @property
    def updates_next(self):
        """Whether the next `step` is the last one of an accumulation."""
        return (self.micro_batches + 1) % self.gradient_accumulation_steps == 0

    def backward(self, loss, counts):
        """Adds the gradients of a micro-batch that counts."""
        if counts:
            (loss / self.gradient_accumulation_steps / self.world.size).backward()

    def full_gradients(self):
        """Gradients over all ranks by parameter name."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        return {name: sum_over_ranks(p.grad.clone()) for name, p in trained.items()}

    def step(self):
        """Updates the weights after the last micro-batch of a step, unless none counts."""
        updates = self.updates_next
        self.micro_batches += 1
        if not updates:
            return None
        if all(p.grad is None for p in self.module.parameters()):
            return Update(torch.tensor(0.0), torch.tensor(False))
        for name, gradient in self.full_gradients().items():
            self.module.get_parameter(name).grad.copy_(gradient)
        norm = clip_grad_norm_(self.module.parameters(), self.clip or torch.inf)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, torch.tensor(True))

    def advance(self):
        """Does nothing: `step` has advanced the schedule."""

    @property
    def learning_rate(self):
        """Of the first parameter group."""
        return self.optimizer.param_groups[0]["lr"]


class ExactEngine(PlainEngine):
    """In float64, where several ranks agree with one rank to the last few digits."""

    dtype = torch.float64
