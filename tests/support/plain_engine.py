"""The oracle of DeepSpeedEngine: AdamW, schedule and clipping in plain torch, a model per rank."""

import torch
from evspan.pipeline.engine.deepspeed_engine import learning_rate_factor, parameter_groups
from evspan.pipeline.parallel.reductions import sum_over_ranks
from torch.nn.utils import clip_grad_norm_


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
        factor = learning_rate_factor(config.optimizer, config.training.max_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def __call__(self, *args, **kwargs):
        """The forward pass of the module."""
        return self.module(*args, **kwargs)

    def train(self):
        """Switches to training mode."""
        self.module.train()

    def backward(self, loss):
        """Adds the gradients of a micro-batch."""
        (loss / self.gradient_accumulation_steps / self.world.size).backward()

    def full_gradients(self):
        """Gradients over all ranks by parameter name."""
        return {name: sum_over_ranks(p.grad.clone()) for name, p in self.module.named_parameters()}

    def skip(self):
        """Counts a micro-batch without gradients."""
        self.step()

    def step(self):
        """Updates the weights after the last micro-batch of a step, unless all were skipped."""
        self.micro_batches += 1
        if self.micro_batches % self.gradient_accumulation_steps:
            return
        if all(p.grad is None for p in self.module.parameters()):
            return
        for name, gradient in self.full_gradients().items():
            self.module.get_parameter(name).grad.copy_(gradient)
        if self.clip:
            clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


class ExactEngine(PlainEngine):
    """In float64, where several ranks agree with one rank to the last few digits."""

    dtype = torch.float64
