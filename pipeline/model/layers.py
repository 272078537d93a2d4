"""Convolution blocks of YOLOX (Ge et al. 2021, arXiv:2107.08430), under its parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.norm import BatchNorm2d


class BaseConv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = BaseConv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


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
        return self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))
