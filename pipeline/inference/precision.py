"""The number format in which a trained detector runs.

fp32, tf32: float32 weights; on a GPU, tf32 lets products and convolutions round their inputs to 10
bits of mantissa. bf16: activations, state and weights are bfloat16, which has 8 bits; weights are
cast once, but those of BatchNorm, which stay float32 like its statistics. In all of them
predictions are decoded, scored and suppressed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.training import Precision
from evspan.pipeline.model.norm import BatchNorm2d
from torch import nn


def parse_precision(name: str) -> Precision:
    """A precision by name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in Precision.__members__:
        raise UserError(f"the precision is {name}; give one of {', '.join(Precision.__members__)}")
    return Precision[name]


def run_precision(precision: Precision, trained: Precision, device: torch.device) -> Precision:
    """The precision to run in.

    Args:
        precision: as configured; auto: that of training on a GPU that has it, else fp32.
        trained: of the weights.
    """
    if precision is not Precision.auto:
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
    for part in module.modules():
        if isinstance(part, BatchNorm2d):
            continue
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.bfloat16)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(part, name, buffer.to(torch.bfloat16))


@contextmanager
def float32_kernels(precision: Precision, device: torch.device) -> Iterator[None]:
    """While open, a GPU's float32 products and convolutions round to TF32 only if `precision` is.

    torch's own default is TF32 for convolutions and LSTMs, but not for products.
    """
    if device.type == "cpu":
        yield
        return
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    matmul_before = matmul.allow_tf32
    cudnn_before = cudnn.allow_tf32
    matmul.allow_tf32 = precision is Precision.tf32
    cudnn.allow_tf32 = precision is Precision.tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = matmul_before
        cudnn.allow_tf32 = cudnn_before
