"""The number format in which a trained detector runs.

fp32, tf32: float32 weights; on a GPU, tf32 lets matrix products and convolutions read 10 bits of
the mantissa. bf16: weights are cast once, but those of BatchNorm, whose statistics are float32.
fp16: float32 weights under autocast, as in training. In all of them predictions are decoded,
scored and suppressed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.training import Precision
from evspan.pipeline.model.norm import BatchNorm2d
from torch import nn


def parse_precision(name: str | None) -> Precision | None:
    """A precision by name.

    Raises:
        UserError: there is none of this name.
    """
    if name is None:
        return None
    names = [precision.name for precision in Precision]
    if name not in names:
        raise UserError(f"the precision is {name}; give {', '.join(names[:-1])} or {names[-1]}")
    return Precision[name]


def run_precision(
    precision: Precision | None, trained: Precision, device: torch.device
) -> Precision:
    """The precision to run in.

    Args:
        precision: as configured; None: that of training on a GPU that has it, else fp32.
        trained: of the weights.
    """
    if precision is not None:
        return precision
    if device.type == "cpu":
        return Precision.fp32
    if trained is Precision.bf16 and torch.cuda.get_device_capability(device) < (8, 0):
        return Precision.fp32
    return trained


def cast_weights(module: nn.Module, precision: Precision) -> None:
    """Casts float32 parameters and buffers in place to what `precision` runs with."""
    if precision is not Precision.bf16:
        return
    module.to(torch.bfloat16)
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.float()


@contextmanager
def number_format(precision: Precision, device: torch.device) -> Iterator[None]:
    """While open, the operators of a forward pass run in `precision`. On a CPU float32 stays."""
    if precision is Precision.fp16:
        with torch.autocast(device.type, torch.float16):
            yield
        return
    if device.type == "cpu":
        yield
        return
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = precision.name == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
