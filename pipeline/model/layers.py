"""Convolution blocks of YOLOX (Ge et al. 2021, arXiv:2107.08430), under its parameter names."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from evspan.pipeline.model.autograd import run_function
from evspan.pipeline.model.norm import BatchNorm2d, batch_norms
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

# Bytes of frames that are cast from uint8 at a time; on CPU what the cache holds.
CAST_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
DEFAULT_CAST_AT_ONCE = 2**28


class FrameConv2d(nn.Conv2d):
    """A convolution without bias on uint8 frames, which are cast and zero-padded a few at a time.

    Backward reads the uint8 frames, a quarter of their float32 copy. Frames get no gradient.
    """

    def forward(self, frames: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
        """Casts, pads and convolves.

        Args:
            frames: (N, C, h, w) uint8.
            padding: zero rows below and zero columns on the right.

        Returns:
            (N, C', h', w') in the weight's dtype.
        """
        if torch.compiler.is_compiling():  # the compiler fuses the cast, and repeats it in backward
            x = F.pad(frames.to(self.weight.dtype), (0, padding[1], 0, padding[0]))
            return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        out: Tensor = run_function(
            _FrameConvolution, frames, self.weight, padding, self.stride, self.padding
        )
        return out


class _FrameConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        weight: Tensor,
        padding: tuple[int, int],
        stride: tuple[int, int],
        border: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(frames, weight)
        ctx.padding = padding
        ctx.stride = stride
        ctx.border = border
        kernel = weight.contiguous(memory_format=torch.channels_last)
        parts = _cast(frames, weight, padding)
        return torch.cat([F.conv2d(x, kernel, stride=stride, padding=border) for x in parts])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        frames, weight = ctx.saved_tensors
        total = torch.zeros_like(weight, dtype=torch.float32)
        start = 0
        for x in _cast(frames, weight, ctx.padding):
            part = gradient[start : start + len(x)].contiguous(memory_format=torch.channels_last)
            total += conv2d_weight(  # type: ignore[no-untyped-call]  # torch does not annotate it
                x, weight.shape, part, stride=ctx.stride, padding=ctx.border
            )
            start += len(x)
        return None, total.to(weight.dtype), None, None, None


def _cast(frames: Tensor, weight: Tensor, padding: tuple[int, int]) -> Iterator[Tensor]:
    """Parts of the frames (N, C, h, w) in the weight's dtype, zero-padded below and right."""
    budget = CAST_AT_ONCE.get(frames.device.type, DEFAULT_CAST_AT_ONCE)
    frame_bytes = max(1, frames[:1].numel() * weight.element_size())
    height, width = frames.shape[2:]
    for part in torch.split(frames, max(1, budget // frame_bytes)):
        # Channels last: with 20 channels and a stride of 4, oneDNN takes half the time.
        shape = (len(part), height + padding[0], width + padding[1], part.shape[1])
        x = weight.new_empty(shape).permute(0, 3, 1, 2)
        # To half precision in two steps: torch's copy that casts and transposes at a time is slow.
        x[:, :, :height, :width].copy_(part if x.dtype == torch.float32 else part.to(x.dtype))
        x[:, :, height:].zero_()
        x[:, :, :height, width:].zero_()
        yield x


class BaseConv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride)."""
        return F.silu(self.bn(self.conv(x)))


def parallel_convs(convs: Sequence[BaseConv], xs: Sequence[Tensor]) -> list[Tensor]:
    """[conv(x), ...] of blocks that do not depend on each other.

    All their BatchNorms share one exchange between ranks.

    Args:
        xs: (N, C, h, w), one for each block; sizes may differ.
    """
    maps = [conv.conv(x) for conv, x in zip(convs, xs, strict=True)]
    norms = [conv.bn for conv in convs]
    return [F.silu(y) for y in batch_norms(norms, maps)]


class Bottleneck(nn.Module):
    """1x1, then 3x3 convolution, without shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = BaseConv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        out: Tensor = self.conv2(self.conv1(x))
        return out


class CSPLayer(nn.Module):
    """Cross-stage partial layer with `depth` bottlenecks, without shortcut."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        hidden = outputs // 2
        self.conv1 = BaseConv(inputs, hidden, 1)
        self.conv2 = BaseConv(inputs, hidden, 1)
        self.conv3 = BaseConv(2 * hidden, outputs, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h, w)."""
        inner, around = parallel_convs((self.conv1, self.conv2), (x, x))
        out: Tensor = self.conv3(torch.cat((self.m(inner), around), dim=1))
        return out
