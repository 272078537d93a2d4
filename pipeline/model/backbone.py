"""RVT's recurrent MaxViT (Gehrig & Scaramuzza, CVPR 2023), all frames of a chunk at once.

Only the LSTM knows time: a stage's spatial part runs on T*B frames in one call, the input half of the gates is one product,
and only the hidden half steps through time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.model.exchange import Exchange
from pipeline.model.layers import FrameConv2d
from pipeline.model.state import StageState

# Positions. Up to here plain products take half the time of the fused CPU kernel, which pays for every head and window.
SMALL_WINDOW = 32


class LayerScale(nn.Module):
    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        # Nested and with an empty third place: the published parameter names are net.0.0 and net.2.
        self.net = nn.Sequential(nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU()), nn.Identity(),
                                 nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SelfAttention(nn.Module):
    """Multi-head attention over (groups, positions, C); qkv is head-major: head 0's q, k, v, then head 1's, ..."""

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.heads = dim // dim_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        groups, positions, dim = x.shape
        qkv = self.qkv(x).view(groups, positions, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        out = _attend(qkv) if x.is_cpu and positions <= SMALL_WINDOW else F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(groups, positions, dim))


def _attend(qkv: Tensor) -> Tensor:
    """scaled_dot_product_attention of (3, groups, heads, positions, c) in plain products."""
    q, k, v = qkv.reshape(3, -1, *qkv.shape[3:]).unbind(0)  # contiguous: the batched products copy otherwise
    weights = _ShortSoftmax.apply(torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)))
    return torch.bmm(weights, v).view(qkv.shape[1:])


class _ShortSoftmax(torch.autograd.Function):
    """softmax over a short last dim in whole-tensor steps: torch's CPU kernel goes row by row, six times as slow at 15."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        weights = (x - x.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        change = gradient * weights
        return change.addcmul_(weights, change.sum(-1, keepdim=True), value=-1)


class PartitionAttention(nn.Module):
    """Attention inside windows of neighbouring cells, or inside grids of cells spread evenly; then an MLP."""

    def __init__(self, dim: int, config: BackboneConfig, *, grid: bool, first_norm: bool) -> None:
        super().__init__()
        self.grid = grid
        self.norm1: nn.Module = nn.LayerNorm(dim) if first_norm else nn.Identity()
        self.self_attn = SelfAttention(dim, config.dim_head)
        self.ls1 = LayerScale(dim, config.ls_init_value)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, config.mlp_ratio)
        self.ls2 = LayerScale(dim, config.ls_init_value)

    def forward(self, x: Tensor, partition: tuple[int, int]) -> Tensor:
        """x: (N, h, w, C), partition: (rows, columns) of a window, which divide h and w."""
        n, h, w, c = x.shape
        rows, columns = partition
        down, across = h // rows, w // columns
        # dims: (n, outer row, inner row, outer column, inner column, c); a grid's members are the outer ones
        if self.grid:
            split, order, back = (n, rows, down, columns, across, c), (0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)
            shape = (n, down, across, rows, columns, c)
        else:
            split, order, back = (n, down, rows, across, columns, c), (0, 1, 3, 2, 4, 5), (0, 1, 3, 2, 4, 5)
            shape = (n, down, across, rows, columns, c)
        groups = self.norm1(x).view(split).permute(order).reshape(-1, rows * columns, c)
        attended = self.self_attn(groups).view(shape).permute(back).reshape(n, h, w, c)
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPair(nn.Module):
    def __init__(self, dim: int, config: BackboneConfig, *, first: bool) -> None:
        super().__init__()
        self.att_window = PartitionAttention(dim, config, grid=False, first_norm=not first)
        self.att_grid = PartitionAttention(dim, config, grid=True, first_norm=True)

    def forward(self, x: Tensor, partition: tuple[int, int]) -> Tensor:
        return self.att_grid(self.att_window(x, partition), partition)


class Downsample(nn.Module):
    """Overlapping convolution, then LayerNorm over channels: (N, C, h, w) -> (N, h/s, w/s, C')."""

    def __init__(self, channels: int, dim: int, factor: int) -> None:
        super().__init__()
        kernel, kind = (7, FrameConv2d) if factor == 4 else (3, nn.Conv2d)
        self.conv = kind(channels, dim, kernel, stride=factor, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *padding: tuple[int, int]) -> Tensor:
        """`padding` (rows below, columns on the right) is for frames only."""
        return self.norm(self.conv(x, *padding).permute(0, 2, 3, 1).contiguous())


class CellLSTM(nn.Module):
    """An LSTM per feature cell (Shi et al. 2015 with 1x1 gates): order forget, input, output (sigmoid), candidate (tanh)."""

    def __init__(self, dim: int, *, dws_conv: bool) -> None:
        super().__init__()
        self.conv3x3_dws = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if dws_conv else None
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)

    def forward(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """x: (T, B, h, w, C) -> hidden states of the same shape, and the state after the last frame.

        Without conv3x3_dws every cell (h, w) is on its own, so any subset of them may be handed in.
        """
        dim = x.shape[-1]
        weight = self.conv1x1.weight.flatten(1)
        # One layout whatever the state went through (a checkpoint, a collective): the same bits come out.
        hidden, cell = (t.permute(0, 2, 3, 1).contiguous() for t in state)
        out = []
        for gates in F.linear(x, weight[:, :dim], self.conv1x1.bias).unbind(0):
            if self.conv3x3_dws is not None:
                hidden = self.conv3x3_dws(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            forget, write, read, candidate = (gates + F.linear(hidden, weight[:, dim:])).chunk(4, dim=-1)
            cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
            hidden = read.sigmoid() * cell.tanh()
            out.append(hidden)
        return torch.stack(out), StageState(hidden.permute(0, 3, 1, 2), cell.permute(0, 3, 1, 2))


class Stage(nn.Module):
    def __init__(self, channels: int, dim: int, factor: int, blocks: int, config: BackboneConfig) -> None:
        super().__init__()
        self.downsample_cf2cl = Downsample(channels, dim, factor)
        self.att_blocks = nn.ModuleList(AttentionPair(dim, config, first=i == 0) for i in range(blocks))
        self.lstm = CellLSTM(dim, dws_conv=config.dws_conv)

    def spatial(self, x: Tensor, partition: tuple[int, int], *padding: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> (N, h', w', C'), all frames alike."""
        x = self.downsample_cf2cl(x, *padding)
        for pair in self.att_blocks:
            x = pair(x, partition)
        return x


class Backbone(nn.Module):
    """Four stages at strides 4, 8, 16, 32."""

    strides = (4, 8, 16, 32)

    def __init__(self, config: BackboneConfig, in_channels: int) -> None:
        super().__init__()
        self.config = config
        inputs = [in_channels, *config.dims[:-1]]
        self.stages = nn.ModuleList(Stage(inputs[i], config.dims[i], 4 if i == 0 else 2, config.num_blocks[i], config)
                                    for i in range(4))

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that frames are zero-padded to, below and on the right, so that windows divide every stage's map."""
        step = 32 * self.config.partition_split_32
        return -(-height // step) * step, -(-width // step) * step

    def forward(self, frames: Tensor, states: tuple[StageState, ...],
                exchange: Exchange) -> tuple[list[Tensor], tuple[StageState, ...]]:
        """
        Args:
            frames: (T, B, in_channels, H, W) uint8, unpadded. states: one per stage.
        Returns:
            per stage the features (T, B, C, h, w) = hidden states, and the states after the last frame.
        """
        steps, lanes, _, height, width = frames.shape
        padded = self.input_size(height, width)
        step = 32 * self.config.partition_split_32
        partition = (padded[0] // step, padded[1] // step)
        x, padding = frames.flatten(0, 1), [(padded[0] - height, padded[1] - width)]
        features, after = [], []
        for stage, state in zip(self.stages, states, strict=True):
            assert isinstance(stage, Stage)
            y = stage.spatial(x, partition, *padding)
            y, state = exchange.scan(stage.lstm, y.view(steps, lanes, *y.shape[1:]), state)
            features.append(y.permute(0, 1, 4, 2, 3))
            x, padding = features[-1].flatten(0, 1), []
            after.append(state)
        return features, tuple(after)
