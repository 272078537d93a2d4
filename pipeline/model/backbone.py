"""RVT's recurrent MaxViT (Gehrig & Scaramuzza, CVPR 2023), all frames of a chunk at once.

Only the LSTM knows time: a stage's spatial part runs on T*B frames in one call, the input half of the gates is one product,
and only the hidden half steps through time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from evspan.conf.schema.training import BackboneConfig
from evspan.pipeline.model import cpu_blocks as cached
from evspan.pipeline.model.layers import FrameConv2d
from evspan.pipeline.model.lstm import CellLSTM, truncated
from evspan.pipeline.model.sequence_protocol import Exchange
from evspan.pipeline.model.state import StageState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Positions. Up to here plain products take half the time of the fused CPU kernel, which pays for every head and window.
SMALL_WINDOW = 32


class LayerScale(nn.Module):
    """y * gamma, taken into the weights of the layer that gives y: a pass over all cells less, forward and backward."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def after(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of `layer` followed by this."""
        return layer.weight * self.gamma[:, None], layer.bias * self.gamma


class MLP(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        # Nested and with an empty third place: the published parameter names are net.0.0 and net.2.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU()),
            nn.Identity(),
            nn.Linear(ratio * dim, dim),
        )

    def layers(self, scale: LayerScale) -> tuple[nn.Linear, tuple[Tensor, Tensor]]:
        """The first linear layer; weight and bias of the second one, times `scale`."""
        return self.net[0][0], scale.after(self.net[2])  # type: ignore[arg-type, index]  # the layers above

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        """(..., C) -> the same shape, times `scale`."""
        first, second = self.layers(scale)
        return F.linear(F.gelu(F.linear(x, first.weight, first.bias)), *second)


class SelfAttention(nn.Module):
    """Multi-head attention over (groups, positions, C); qkv is head-major: head 0's q, k, v, then head 1's, ..."""

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.heads = dim // dim_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        groups, positions, dim = x.shape
        qkv = self.qkv(x).view(groups, positions, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        # In half precision the fused CPU kernel's backward takes four times as long as that of plain products.
        plain = x.is_cpu and (
            positions <= SMALL_WINDOW or x.dtype in (torch.bfloat16, torch.float16)
        )
        out = _attend(qkv) if plain else F.scaled_dot_product_attention(*qkv.unbind(0))
        return F.linear(
            out.transpose(1, 2).reshape(groups, positions, dim), *scale.after(self.proj)
        )


def _attend(qkv: Tensor) -> Tensor:
    """scaled_dot_product_attention of (3, groups, heads, positions, c) in plain products."""
    q, k, v = qkv.reshape(3, -1, *qkv.shape[3:]).unbind(
        0
    )  # contiguous: the batched products copy otherwise
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    weights = (
        _ShortSoftmax.apply(scores) if scores.shape[-1] <= SMALL_WINDOW else scores.softmax(-1)
    )
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
            split, order, back = (
                (n, rows, down, columns, across, c),
                (0, 2, 4, 1, 3, 5),
                (0, 3, 1, 4, 2, 5),
            )
            shape = (n, down, across, rows, columns, c)
        else:
            split, order, back = (
                (n, down, rows, across, columns, c),
                (0, 1, 3, 2, 4, 5),
                (0, 1, 3, 2, 4, 5),
            )
            shape = (n, down, across, rows, columns, c)
        if cached.serves(x) and c < cached.WIDE and rows * columns > SMALL_WINDOW:
            attn = self.self_attn
            x = cached.attention_block(
                x, split, order, self.norm1, attn.qkv, self.ls1.after(attn.proj), attn.heads
            )
        else:
            groups = self.norm1(x).view(split).permute(order).reshape(-1, rows * columns, c)
            x = x + self.self_attn(groups, self.ls1).view(shape).permute(back).reshape(n, h, w, c)
        if cached.serves(x):
            return cached.mlp_block(x, self.norm2, *self.mlp.layers(self.ls2))
        return x + self.mlp(self.norm2(x), self.ls2)


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


class Stage(nn.Module):
    def __init__(
        self, channels: int, dim: int, factor: int, blocks: int, config: BackboneConfig
    ) -> None:
        super().__init__()
        self.downsample_cf2cl = Downsample(channels, dim, factor)
        self.att_blocks = nn.ModuleList(
            AttentionPair(dim, config, first=i == 0) for i in range(blocks)
        )
        self.lstm = CellLSTM(dim, dws_conv=config.dws_conv, forget_bias=config.forget_bias)

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
        self.frames_per_call = (
            0  # frames (of all lanes) in a call of a stage's spatial part; 0: all of a chunk
        )
        self.bptt_frames = 0  # that gradients flow back through at most; 0: all of a chunk
        self.recompute = False  # activation checkpointing: backward makes the spatial part anew, a call at a time
        inputs = [in_channels, *config.dims[:-1]]
        self.stages = nn.ModuleList(
            Stage(inputs[i], config.dims[i], 4 if i == 0 else 2, config.num_blocks[i], config)
            for i in range(4)
        )

    def compile_spatial(self) -> None:
        """torch.compile of each stage's spatial part, anew for every number of frames in a call: keep it the same."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.spatial = torch.compile(stage.spatial, dynamic=False)  # type: ignore[method-assign]

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that frames are zero-padded to, below and on the right, so that windows divide every stage's map."""
        step = 32 * self.config.partition_split_32
        return -(-height // step) * step, -(-width // step) * step

    def forward(
        self, frames: Tensor, states: tuple[StageState, ...], exchange: Exchange
    ) -> tuple[list[Tensor], tuple[StageState, ...]]:
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
            y = self._spatial(stage, x, partition, *padding)
            recurrence = stage.lstm.recurrence()
            if self.bptt_frames:
                recurrence = truncated(recurrence, self.bptt_frames)
            y, state = exchange.scan(recurrence, y.view(steps, lanes, *y.shape[1:]), state)
            features.append(y.permute(0, 1, 4, 2, 3))
            x, padding = features[-1].flatten(0, 1), []
            after.append(state)
        return features, tuple(after)

    def _spatial(self, stage: Stage, x: Tensor, *layout: tuple[int, int]) -> Tensor:
        """stage.spatial, some frames at a time, and recomputed in backward where asked. Communication stays outside."""
        parts = x.split(self.frames_per_call or len(x)) if len(x) else [x]
        if self.recompute and torch.is_grad_enabled():
            done = [
                checkpoint(
                    stage.spatial, part, *layout, use_reentrant=False, preserve_rng_state=False
                )
                for part in parts
            ]
        else:
            done = [stage.spatial(part, *layout) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)
