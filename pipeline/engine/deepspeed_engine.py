"""The detector under DeepSpeed: plain data parallelism over all ranks, ZeRO stages 0 to 3.

DeepSpeed averages gradients over the world at every stage, so the loss handed to `backward` is
(local sum / global count) x world size.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402  chooses its accelerator and speaks at import
from evspan.conf.schema.training import OptimizerConfig, Precision, Schedule, TrainConfig  # noqa: E402
from evspan.pipeline.parallel.reductions import sum_over_ranks  # noqa: E402
from evspan.pipeline.parallel.world import World  # noqa: E402

for handler in (log := logging.getLogger("DeepSpeed")).handlers:
    handler.setLevel(logging.ERROR)
log.setLevel(logging.ERROR)
warnings.filterwarnings(
    "ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning
)  # DeepSpeed's


def learning_rate_factor(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """step -> share of the peak learning rate: a linear warm-up, then a linear (OneCycle, as RVT) or cosine descent."""
    warmup = max(1, round(config.warmup_fraction * max_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return config.start_factor + (1 - config.start_factor) * step / warmup
        done = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
        if config.schedule is Schedule.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 + (config.end_factor - 1) * done

    return factor


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms, LayerScale and gates. Gates last, if at another rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gates = (
        [p for name, p in named if name.endswith(".gate")] if config.gate_lr_multiplier != 1 else []
    )
    others = [p for name, p in named if not (gates and name.endswith(".gate"))]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    return (
        [
            *groups,
            {"params": gates, "weight_decay": 0.0, "lr": config.lr * config.gate_lr_multiplier},
        ]
        if gates
        else groups
    )


def engine_config(config: TrainConfig, lanes: int, parameters: int) -> dict[str, Any]:
    # A buffer of that many elements is allocated, 2 GB by default; all gradients go through one of them anyway.
    zero: dict[str, Any] = {
        "stage": config.deepspeed.stage,
        "overlap_comm": False,
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


MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)  # what DeepSpeed's loss scalers count


class DeepSpeedEngine:
    """Forward, backward, step, save and load of the sharded model; the same calls in the same order on all ranks."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, *, lanes: int) -> None:
        self.stage = config.deepspeed.stage
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer), lr=config.optimizer.lr
        )
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        factor = learning_rate_factor(config.optimizer, config.training.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        # Only inference would use it, and it is compiled, for half a minute, at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
        )
        asked = engine_config(config, lanes, sum(p.numel() for p in trained))
        self.engine, *_ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=asked,
            dist_init_required=False,
        )
        self.optimizer_state = OptimizerMemory(
            self.engine, optimizer, schedule, trained, self.stage, world
        )
        self.gradient_norm = 0.0
        self.gathered = 0  # micro-batches since the last update that gave gradients

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def learning_rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.gathered += 1
        self.engine.backward(loss)

    def skip(self) -> None:
        """Counts a micro-batch without gradients: those of the others in its accumulation make the update, if there are any."""
        if not (self.gathered and self.engine.is_gradient_accumulation_boundary()):
            self.engine.micro_steps += 1
            return
        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(
            parameters, enabled=self.stage == 3
        ):  # DeepSpeed sums over ranks in a backward
            self.engine.backward(sum((p * 0).sum() for p in parameters))
        self.step()

    def step(self) -> None:
        """Counts a micro-batch; at the last one of an accumulation, clips and updates."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        if boundary and self.stage == 0:  # from stage 1 on DeepSpeed tells it
            norms = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
            self.gradient_norm = float(torch.stack(norms).norm()) if norms else 0.0
        self.engine.step()
        self.gathered = 0 if boundary else self.gathered
        if boundary and (told := self.engine.get_global_grad_norm()) is not None:
            self.gradient_norm = float(told)

    def full_gradients(self) -> dict[str, Tensor]:
        """Float32, of the micro-batches since the last step, unclipped, on every rank. Collective; after `backward`."""
        got = {
            name: deepspeed.utils.safe_get_full_grad(p)
            for name, p in self.module.named_parameters()
        }
        return {
            name: gradient.float().cpu().clone()
            for name, gradient in got.items()
            if gradient is not None
        }

    def train(self) -> None:
        self.engine.train()

    def close(self) -> None:
        """Takes DeepSpeed's hooks off, so that this process can train another model."""
        self.engine.destroy()

    def full_state(self) -> dict[str, Tensor]:
        """Copies of all weights (the float32 ones that the optimizer updates) and buffers, float32 where floating, on every
        rank. A collective."""
        weights = self.optimizer_state.weights()
        return {
            k: weights[k]
            if k in weights
            else (v.detach().float() if v.is_floating_point() else v.detach()).cpu().clone()
            for k, v in self.engine.module.state_dict().items()
        }

    def load_state(
        self, tensors: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        """The inverse of `full_state`, `memory.moments` and `memory.counters`, whatever the ranks and stage of their run."""
        module = self.engine.module
        with deepspeed.zero.GatheredParameters(
            list(module.parameters()), modifier_rank=0, enabled=self.stage == 3
        ):
            module.load_state_dict(tensors)
        self.optimizer_state.restore(tensors, moments, counters)


class OptimizerMemory:
    """What Adam, the schedule and the loss scale remember, in a form that knows neither ranks nor stages.

    Args:
        trained: the parameters that `adam` was made for, in its order; DeepSpeed puts its own tensors in their place.
    """

    def __init__(
        self,
        engine: Any,
        adam: torch.optim.AdamW,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        trained: list[nn.Parameter],
        stage: int,
        world: World,
    ) -> None:
        self.engine, self.adam, self.schedule, self.stage, self.world = (
            engine,
            adam,
            schedule,
            stage,
            world,
        )
        held = [p for group in adam.param_groups for p in group["params"]]
        if stage == 3:
            held = list(engine.optimizer.fp32_partitioned_groups_flat)
        self.names = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.masters = dict(zip(trained, held, strict=True)) if stage == 0 else {}
        # What Adam would make at its first step, made now: it can be loaded before that, and memory that is short ends the run
        # at its start.
        self.states = [adam.state[p] for p in held]
        for p, state in zip(held, self.states, strict=True):
            if not state:
                state.update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(p.data),
                    exp_avg_sq=torch.zeros_like(p.data),
                )
        if stage in (1, 2):
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # as it does at the end of its first step

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights by parameter name, copied to the CPU of every rank. A collective."""
        return self._wholes(None)

    def moments(self, *, keep: bool) -> dict[str, Tensor]:
        """exp_avg/NAME and exp_avg_sq/NAME, float32, where `keep`; {} elsewhere. A collective."""
        moments: dict[str, Tensor] = {}
        for key in MOMENTS:
            wholes = self._wholes(key)
            if keep:
                moments |= {f"{key}/{name}": whole for name, whole in wholes.items()}
        return moments

    def counters(self) -> dict[str, Any]:
        """JSON values. Adam's count may be one ahead of the schedule's: in bf16, stage 0 begins with an empty step."""
        scaler = self._scaler
        return {
            "updates": self.schedule.last_epoch,
            "adam_steps": int(max(state["step"] for state in self.states)),
            "loss_scale": {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)},
        }

    def restore(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        for name, p in self.names.items():
            self._set(p, None, weights[name])
            for key in MOMENTS:
                self._set(p, key, moments[f"{key}/{name}"])
        for state in self.states:
            state["step"].fill_(counters["adam_steps"])
        self.schedule.last_epoch = counters["updates"]
        for group, peak, factor in zip(
            self.adam.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(counters["updates"])
        for name, value in counters["loss_scale"].items():
            if hasattr(self._scaler, name):
                setattr(self._scaler, name, value)

    @property
    def _scaler(self) -> Any:
        optimizer = self.engine.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(
            optimizer, "loss_scale_config", None
        )

    @torch.no_grad()
    def _wholes(self, key: str | None) -> dict[str, Tensor]:
        """Adam's `key` of all parameters, or these themselves, in one collective: one for each took a second over gloo."""
        if self.stage == 0:
            masters = {name: self.masters[p] for name, p in self.names.items()}
            return {
                name: (m if key is None else self.adam.state[m][key]).detach().float().cpu().clone()
                for name, m in masters.items()
            }
        sizes = [
            p.ds_tensor.numel() * self.world.size if self.stage == 3 else p.numel()
            for p in self.names.values()
        ]
        flat = torch.zeros(
            sum(sizes), device=self.world.device
        )  # of each rank, but for its own parts
        for p, place in zip(self.names.values(), flat.split(sizes), strict=True):
            start, mine = self._mine(p, key)
            place[start : start + mine.numel()] = mine.to(place)
        flat = sum_over_ranks(flat).cpu()
        shapes = [p.ds_shape if self.stage == 3 else p.shape for p in self.names.values()]
        return {
            name: place[: math.prod(shape)].view(tuple(shape)).clone()
            for name, place, shape in zip(self.names, flat.split(sizes), shapes, strict=True)
        }

    def _mine(self, p: Any, key: str | None) -> tuple[int, Tensor]:
        """Where this rank's part of p, or of Adam's `key` of it, begins, and the part, flat."""
        if self.stage == 3:  # padded
            part = (
                deepspeed.utils.safe_get_local_fp32_param(p)
                if key is None
                else deepspeed.utils.safe_get_local_optimizer_state(p, key)
            )
            return self.world.rank * p.ds_tensor.numel(), part.flatten()
        if (mapping := p._hp_mapping) is None:  # all of it is other ranks'
            return 0, torch.empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).flatten()

    def _set(self, p: nn.Parameter, key: str | None, whole: Tensor) -> None:
        if self.stage == 0:
            master = self.masters[p]
            (master if key is None else self.adam.state[master][key]).data.copy_(whole)
        elif (
            self.stage == 3
        ):  # DeepSpeed's own setter of the whole fails where the ranks do not divide it
            part = p.ds_tensor.numel()  # type: ignore[attr-defined]  # of this rank, padded
            padded = torch.zeros(part * self.world.size)
            padded[: whole.numel()] = whole.flatten()
            mine = padded[self.world.rank * part :][:part]
            if key is None:
                deepspeed.utils.safe_set_local_fp32_param(p, mine)
            else:
                deepspeed.utils.safe_set_local_optimizer_state(p, mine, key)
        elif key is None:
            deepspeed.utils.safe_set_full_fp32_param(p, whole)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(p, whole, key)
