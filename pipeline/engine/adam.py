"""AdamW with updates that a flag on the device can skip, its parameter groups and its schedule."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from evspan.conf.schema.training import OptimizerConfig, Schedule
from evspan.pipeline.engine.parameter_patterns import LearningRates
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's averages; also the names in a checkpoint
AVERAGE = "average"  # the moving average of the weights, in Adam's state; see ema

_STEP = inspect.unwrap(torch.optim.AdamW.step)  # without the import of torch's compiler, as below


class Update(NamedTuple):
    """The result of one optimizer step, on the device.

    gradient_norm: () float32, L2 over all parameters and ranks, before clipping.
    applied: () bool; False: weights, moments and counters are as before.
    """

    gradient_norm: Tensor
    applied: Tensor


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose `step` does nothing if `skip` is 1.

    On a GPU the fused kernel reads `skip`, so the host does not wait for it. On a CPU, where
    reading is free, the step is not run.

    Args:
        groups: as of `parameter_groups`.
        fused: whether the parameters that are updated are on a GPU.

    Attributes:
        skip: () float32, 0 or 1, or None, which is 0.
    """

    # torch wraps these in functions that import its compiler, to have it leave them alone. That
    # takes a second and reads hundreds of files in every rank; nothing compiles an optimizer here.
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, fused: bool) -> None:
        super().__init__(groups, lr=lr, fused=fused or None)
        self.is_fused = fused
        self.skip: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        """Updates the parameters, unless `skip` is 1."""
        if self.is_fused:
            self.found_inf = self.skip  # torch's name; GradScaler sets it too
        elif self.skip is not None and bool(self.skip):
            return None
        with torch.no_grad():
            return _STEP(self, closure)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups; none is empty.

    Matrices and kernels have weight decay; biases, norms, LayerScale and gates have none. Each
    learning rate has groups of its own; first are those of the learning rate itself.

    Raises:
        UserError: a pattern of `lr_multipliers` matches no trained parameter.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = LearningRates(trained.keys(), config.lr_multipliers, of_gates=config.gate_lr_multiplier)
    # (is decayed, multiplier) -> parameters
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in trained.items():
        key = (parameter.ndim >= 2, rates.multiplier(name))
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "lr": config.lr * multiplier,
        }
        for (is_decayed, multiplier), parameters in groups.items()
        if parameters
    ]


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


class LearningRateSchedule:
    """Sets the learning rates of an optimizer's groups from the number of updates.

    torch's schedulers advance with every step. Here the host advances when it knows that an update
    was applied.

    Args:
        factor: updates -> fraction of the group's peak learning rate.
        peak: learning rate of parameters without a multiplier.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], *, peak: float
    ) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.peak = peak
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.set(0)

    def set(self, updates: int) -> None:
        """After this number of updates."""
        self.updates = updates
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(updates)

    @property
    def learning_rate(self) -> float:
        """Of parameters without a multiplier, for the next update."""
        return self.peak * self.factor(self.updates)


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of all elements: () float32 on `device`, summed in float64. One kernel for all on a GPU."""
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return torch.stack(norms).square().sum().float()


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """() by which gradients of this norm are multiplied to have at most the norm `clip`."""
    return (torch.full_like(norm, clip) / (norm + 1e-6)).clamp(max=1.0)
