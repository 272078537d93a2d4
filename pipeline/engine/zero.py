"""The detector under DeepSpeed: plain data parallelism over all ranks, ZeRO stages 0 to 3.

DeepSpeed averages gradients over the world at every stage, so the loss handed to `backward` is
(local sum / global count) x world size.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402  chooses its accelerator and speaks at import

from data_prep.errors import UserError  # noqa: E402
from pipeline.config import OptimizerConfig, Precision, Schedule, TrainConfig  # noqa: E402
from pipeline.parallel.world import World  # noqa: E402

for handler in (log := logging.getLogger("DeepSpeed")).handlers:
    handler.setLevel(logging.ERROR)
log.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)  # DeepSpeed's own calls


def learning_rate_factor(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """step -> share of the peak learning rate: a linear warm-up, then a linear (OneCycle, as RVT) or cosine descent."""
    warmup = max(1, round(config.warmup_share * max_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return config.start_factor + (1 - config.start_factor) * step / warmup
        done = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
        if config.schedule is Schedule.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 + (config.end_factor - 1) * done

    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms, LayerScale and gates."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


def engine_config(config: TrainConfig, lanes: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.deepspeed.stage, "overlap_comm": False}
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": lanes,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": config.training.gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": config.training.precision is Precision.bf16},
        "fp16": {"enabled": config.training.precision is Precision.fp16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class ZeroEngine:
    """Forward, backward, step, save and load of the sharded model; the same calls in the same order on all ranks."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, *, lanes: int) -> None:
        self.stage = config.deepspeed.stage
        optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer.weight_decay), lr=config.optimizer.lr)
        factor = learning_rate_factor(config.optimizer, config.training.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        # Only inference would use it, and it is compiled, for half a minute, at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False,
                                   verbose=False)
        self.engine, *_ = deepspeed.initialize(model=model.to(world.device), optimizer=optimizer, lr_scheduler=schedule,
                                               config=engine_config(config, lanes), dist_init_required=False)
        self.gradient_norm = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return next(self.engine.module.parameters()).dtype

    @property
    def learning_rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        """Counts a micro-batch; at the last one of an accumulation, clips and updates."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        if boundary and self.stage == 0:  # from stage 1 on DeepSpeed tells it
            norms = [p.grad.norm() for p in self.engine.module.parameters() if p.grad is not None]
            self.gradient_norm = float(torch.stack(norms).norm()) if norms else 0.0
        self.engine.step()
        if boundary and (told := self.engine.get_global_grad_norm()) is not None:
            self.gradient_norm = float(told)

    def train(self) -> None:
        self.engine.train()

    def save(self, folder: Path) -> None:
        # save_latest=False: DeepSpeed's own pointer is neither atomic nor behind the barrier.
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="zero")
        if path is None:
            raise UserError(f"DeepSpeed finds no checkpoint in {folder}. "
                            "Delete this checkpoint folder to resume from the one before")

    def full_state(self) -> dict[str, Tensor]:
        """Copies of all weights and buffers, float32 where floating, on every rank. Collective at stage 3."""
        module = self.engine.module
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=self.stage == 3):
            return {k: (v.detach().float() if v.is_floating_point() else v.detach()).cpu().clone()
                    for k, v in module.state_dict().items()}
