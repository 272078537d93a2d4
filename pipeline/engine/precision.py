"""The number format of training, and torch's switches for it."""

from dataclasses import replace
from typing import TypeVar

import torch
from evspan.conf.schema.training import Precision, TrainConfig
from evspan.pipeline.parallel.reductions import gather_json
from evspan.pipeline.parallel.world import World

Config = TypeVar("Config", bound=TrainConfig)


def resolve_precision(config: Config, world: World, saved: str | None) -> Config:
    """The config with a precision in place of `auto`. A collective.

    `auto` is the precision of the checkpoint that the run continues, on any machine. A run
    that starts has bf16 if the GPUs of all ranks compute in it, and fp32 otherwise.

    Args:
        saved: training.precision of the checkpoint; None: the run starts.
    """
    precision = config.training.precision
    if precision is not Precision.auto:
        return config
    if saved is not None and saved in Precision.__members__:
        precision = Precision[saved]
    else:
        everywhere = all(gather_json(_computes_in_bf16(world.device), name="precision"))
        precision = Precision.bf16 if everywhere else Precision.fp32
    return replace(config, training=replace(config.training, precision=precision))


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU with bfloat16 in hardware (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def set_float32_kernels(precision: Precision) -> None:
    """Sets whether a GPU's float32 products and convolutions may round their inputs to TF32.

    torch's own default allows it for convolutions and LSTMs, but not for matrix products.
    """
    allowed = precision is Precision.tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
