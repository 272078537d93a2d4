"""RVT's recurrent MaxViT (Gehrig & Scaramuzza, CVPR 2023), all frames of a chunk at a time.

Only the LSTM depends on time: a stage's spatial part runs on T * B frames in one call, the input
half of the gates is one product, and only the hidden half steps through time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from evspan.conf.schema.training import BackboneConfig
from evspan.pipeline.model import cpu_blocks
from evspan.pipeline.model.autograd import run_function
from evspan.pipeline.model.layers import FrameConv2d
from evspan.pipeline.model.lstm import CellLSTM, even_part, parts_of, truncated
from evspan.pipeline.model.sequence_protocol import Exchange
from evspan.pipeline.model.state import StageState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Groups per call of the fused attention. CUDA's kernels put them into a grid dimension of at most
# 2**16 - 1 (pytorch issues 142228 and 146704).
MOST_GROUPS = 2**16 - 1
# Values per call: FlashAttention's backward indexes groups x heads x positions x channels per head
# with 32 bits. It pads the positions to a multiple of 128 and the channels to 32 or more.
MOST_VALUES = 2**31 - 1

# Positions per group. Up to this number plain products take half the time of the fused CPU kernel,
# which has a fixed cost per head and window.
SMALL_WINDOW = 32


@dataclass(frozen=True)
class Execution:
    """How the backbone runs a chunk. Only `bptt_frames` changes results (gradients).

    Attributes:
        frames_per_call: frames, over all lanes, per call of a stage's spatial part; 0: the whole
            chunk.
        bptt_frames: gradients flow back through at most this number of frames; 0: the whole chunk.
        activation_checkpointing: backward recomputes the spatial part, one call at a time.
        compile: torch.compile of each stage's spatial part. It compiles once for every number of
            frames in a call: keep that number constant.
        cuda_graphs: each stage's spatial part runs as CUDA graphs, forward and backward, recorded
            once for every number of frames in a call. On a CPU it runs without. Not with
            activation_checkpointing.
    """

    frames_per_call: int = 0
    bptt_frames: int = 0
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.cuda_graphs and self.activation_checkpointing:
            raise ValueError(
                "cuda_graphs keeps the activations that activation_checkpointing would drop; "
                "set one of them to False"
            )

    def compile_options(self) -> dict[str, Any] | None:
        """Keyword arguments of torch.compile for the spatial parts; None: not compiled.

        Torch's trees of CUDA graphs record the operators as they are, or those of the compiler.
        They keep the memory of calls apart whose backward is pending, copy inputs to where the
        graph reads them, and leave out what cannot be recorded.
        """
        if self.compile and self.cuda_graphs:
            return {"dynamic": False, "mode": "reduce-overhead"}
        if self.compile:
            return {"dynamic": False}
        if self.cuda_graphs:
            return {"dynamic": False, "backend": "cudagraphs"}
        return None


class LayerScale(nn.Module):
    """y * gamma per channel, folded into the linear layer that computes y.

    Folding saves a pass over all cells, forward and backward. It needs the exponents of float32 or
    bfloat16: in float16, a weight of 0.05 times a gamma of 1e-5 has an error of 5 to 14 %.
    """

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def after(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (dim, inputs) and bias (dim,) of `layer` followed by this scale."""
        return layer.weight * self.gamma[:, None], layer.bias * self.gamma


class MLP(nn.Module):
    """Linear, GELU, linear; `ratio` times as wide in the middle."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        # Nested, with an identity in second place: the published parameter names are net.0.0 and
        # net.2.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU()),
            nn.Identity(),
            nn.Linear(ratio * dim, dim),
        )

    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """The first and the second linear layer."""
        inner = self.net[0]
        assert isinstance(inner, nn.Sequential)
        first = inner[0]
        second = self.net[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        return first, second

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        """(..., C) -> the same shape, times `scale`."""
        first, second = self.layers()
        hidden = F.gelu(F.linear(x, first.weight, first.bias))
        return F.linear(hidden, *scale.after(second))


class SelfAttention(nn.Module):
    """Multi-head attention inside groups; qkv is ordered by head, then query, key, value."""

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.heads = dim // dim_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        """(groups, positions, C) -> the same shape, times `scale`."""
        groups, positions, dim = x.shape
        qkv = self.qkv(x).view(groups, positions, self.heads, 3, -1)
        # In half precision the fused CPU kernel's backward takes four times as long as plain
        # products.
        is_half = x.dtype in (torch.bfloat16, torch.float16)
        if x.is_cpu and (positions <= SMALL_WINDOW or is_half):
            out = _attend(qkv.permute(3, 0, 2, 1, 4))
        else:
            out = _fused_attention(qkv)
        attended = out.transpose(1, 2).reshape(groups, positions, dim)
        return F.linear(attended, *scale.after(self.proj))


def _fused_attention(qkv: Tensor) -> Tensor:
    """scaled_dot_product_attention, on no more groups per call than CUDA's kernels take.

    Args:
        qkv: (groups, positions, heads, 3, c).

    Returns:
        (groups, heads, positions, c).
    """
    _, positions, heads, _, channels = qkv.shape
    values_per_group = heads * -(-positions // 128) * 128 * max(32, channels)
    at_once = even_part(len(qkv), min(MOST_GROUPS, MOST_VALUES // values_per_group))
    results = []
    for part in parts_of(qkv, at_once, dim=0):
        # Unbound where they lie: the gradients are stacked to what the product's backward reads.
        q, k, v = part.unbind(3)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        results.append(out)
    if len(results) == 1:
        return results[0]
    # (groups, positions, heads, c) is the order in memory.
    return torch.cat([out.transpose(1, 2) for out in results]).transpose(1, 2)


def _attend(qkv: Tensor) -> Tensor:
    """scaled_dot_product_attention in plain products.

    Args:
        qkv: (3, groups, heads, positions, c).

    Returns:
        (groups, heads, positions, c).
    """
    # Contiguous: the batched products would copy otherwise.
    q, k, v = qkv.reshape(3, -1, *qkv.shape[3:]).unbind(0)
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    if scores.shape[-1] <= SMALL_WINDOW:
        weights: Tensor = run_function(_ShortSoftmax, scores)
    else:
        weights = scores.softmax(-1)
    return torch.bmm(weights, v).view(qkv.shape[1:])


class _ShortSoftmax(torch.autograd.Function):
    """softmax over a short last dim in whole-tensor steps.

    torch's CPU kernel goes row by row and takes six times as long at 15 positions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        weights = (x - x.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        change: Tensor = gradient * weights
        return change.addcmul_(weights, change.sum(-1, keepdim=True), value=-1)


class PartitionAttention(nn.Module):
    """Attention inside groups of cells, then an MLP.

    A group is a window of neighbouring cells or, with `grid`, cells spread evenly over the map.
    """

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
        """(N, h, w, C) -> the same shape.

        Args:
            partition: (rows, columns) of a group; they divide h and w.
        """
        x = self._attended(x, partition)
        if cpu_blocks.is_supported(x):
            first, second = self.mlp.layers()
            return cpu_blocks.mlp_block(x, self.norm2, first, self.ls2.after(second))
        change: Tensor = self.mlp(self.norm2(x), self.ls2)
        return x + change

    def _attended(self, x: Tensor, partition: tuple[int, int]) -> Tensor:
        """x plus its attention, (N, h, w, C)."""
        n, h, w, c = x.shape
        rows, columns = partition
        down = h // rows
        across = w // columns
        # Split dims: (n, outer row, inner row, outer column, inner column, c). A window's members
        # are the inner rows and columns, a grid's the outer ones. `order` brings the groups to the
        # front, `back` is its inverse.
        if self.grid:
            split = (n, rows, down, columns, across, c)
            order = (0, 2, 4, 1, 3, 5)
            back = (0, 3, 1, 4, 2, 5)
        else:
            split = (n, down, rows, across, columns, c)
            order = (0, 1, 3, 2, 4, 5)
            back = (0, 1, 3, 2, 4, 5)
        attention = self.self_attn
        is_narrow = c < cpu_blocks.WIDE
        if cpu_blocks.is_supported(x) and is_narrow and rows * columns > SMALL_WINDOW:
            projection = self.ls1.after(attention.proj)
            return cpu_blocks.attention_block(
                x, split, order, self.norm1, attention.qkv, projection, attention.heads
            )
        groups = self.norm1(x).view(split).permute(order).reshape(-1, rows * columns, c)
        change: Tensor = attention(groups, self.ls1).view(n, down, across, rows, columns, c)
        # Added where the cells lie, so that no map is copied into the order of the cells first.
        return (x.view(split) + change.permute(back)).reshape(n, h, w, c)


class AttentionPair(nn.Module):
    """Window attention, then grid attention."""

    def __init__(self, dim: int, config: BackboneConfig, *, first: bool) -> None:
        super().__init__()
        self.att_window = PartitionAttention(dim, config, grid=False, first_norm=not first)
        self.att_grid = PartitionAttention(dim, config, grid=True, first_norm=True)

    def forward(self, x: Tensor, partition: tuple[int, int]) -> Tensor:
        """(N, h, w, C) -> the same shape; partition: (rows, columns) of a group."""
        out: Tensor = self.att_grid(self.att_window(x, partition), partition)
        return out


class Downsample(nn.Module):
    """Overlapping convolution, then LayerNorm over channels."""

    def __init__(self, channels: int, dim: int, factor: int) -> None:
        super().__init__()
        kernel = 7 if factor == 4 else 3
        kind = FrameConv2d if factor == 4 else nn.Conv2d
        self.conv = kind(channels, dim, kernel, stride=factor, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *padding: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> (N, h / factor, w / factor, dim).

        Args:
            padding: (rows below, columns on the right) to zero-pad; for uint8 frames only.
        """
        out: Tensor = self.norm(self.conv(x, *padding).permute(0, 2, 3, 1).contiguous())
        return out


class Stage(nn.Module):
    """One level of the backbone: downsampling, attention blocks, LSTM."""

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
        """The part of the stage that treats every frame alike.

        Args:
            x: (N, C, h, w); uint8 in stage 1.
            partition: (rows, columns) of an attention group.
            padding: (rows below, columns on the right) to zero-pad; for frames only.

        Returns:
            (N, h', w', dim).
        """
        x = self.downsample_cf2cl(x, *padding)
        for pair in self.att_blocks:
            x = pair(x, partition)
        return x


class Backbone(nn.Module):
    """Four stages at strides 4, 8, 16, 32.

    Args:
        config: sizes of the stages.
        in_channels: channels of a frame, 2 * bins.
        execution: how a chunk is run; None: all of it at a time.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self, config: BackboneConfig, in_channels: int, execution: Execution | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.execution = execution or Execution()
        inputs = [in_channels, *config.dims[:-1]]
        self.stages = nn.ModuleList(
            Stage(inputs[i], config.dims[i], 4 if i == 0 else 2, config.num_blocks[i], config)
            for i in range(4)
        )
        options = self.execution.compile_options()
        if options is not None:
            for stage in self.stages:
                assert isinstance(stage, Stage)
                compiled = torch.compile(stage.spatial, **options)
                # Only this part is compiled; the LSTM stays as it is.
                stage.spatial = compiled  # type: ignore[method-assign]

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that frames are zero-padded to, on the right and below.

        Multiples of 32 * partition_split_32, so that attention groups divide every stage's map.
        """
        step = 32 * self.config.partition_split_32
        return -(-height // step) * step, -(-width // step) * step

    def forward(
        self, frames: Tensor, states: tuple[StageState, ...], exchange: Exchange
    ) -> tuple[list[Tensor], tuple[StageState, ...]]:
        """Runs one chunk.

        Args:
            frames: (T, B, in_channels, H, W) uint8, unpadded.
            states: one per stage.
            exchange: runs the recurrences.

        Returns:
            Per stage the hidden states (T, B, C, h, w); and the states after the last frame.
        """
        if self.execution.cuda_graphs:
            # What the previous chunk's graphs put out has been read: their memory is free.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # untyped
        steps, lanes, _, height, width = frames.shape
        padded_height, padded_width = self.input_size(height, width)
        step = 32 * self.config.partition_split_32
        partition = (padded_height // step, padded_width // step)
        x = frames.flatten(0, 1)
        padding = [(padded_height - height, padded_width - width)]
        features = []
        next_states = []
        for stage, state in zip(self.stages, states, strict=True):
            assert isinstance(stage, Stage)
            y = self._spatial(stage, x, partition, *padding)
            recurrence = stage.lstm.recurrence()
            if self.execution.bptt_frames:
                recurrence = truncated(recurrence, self.execution.bptt_frames)
            y = y.view(steps, lanes, *y.shape[1:])
            if torch.is_grad_enabled() and not _needs_gradients(stage, y, state):
                # The same on all ranks, so none of them waits for gradients.
                with torch.no_grad():
                    hidden, next_state = exchange.scan(recurrence, y, state)
            else:
                hidden, next_state = exchange.scan(recurrence, y, state)
            feature = hidden.permute(0, 1, 4, 2, 3)
            features.append(feature)
            next_states.append(next_state)
            x = feature.flatten(0, 1)
            padding = []
        return features, tuple(next_states)

    def _spatial(self, stage: Stage, x: Tensor, *layout: tuple[int, int]) -> Tensor:
        """`stage.spatial` on a few frames at a time, recomputed in backward if configured.

        Recomputation would repeat communication, so none takes place in here.
        """
        results: list[Tensor] = []
        for part in parts_of(x, self.execution.frames_per_call or len(x), dim=0):
            if self.execution.activation_checkpointing and torch.is_grad_enabled():
                result = checkpoint(
                    stage.spatial, part, *layout, use_reentrant=False, preserve_rng_state=False
                )
            else:
                result = stage.spatial(part, *layout)
            results.append(result)
        return results[0] if len(results) == 1 else torch.cat(results)


def _needs_gradients(stage: Stage, x: Tensor, state: StageState) -> bool:
    """Whether gradients flow to the recurrence of a stage, or through it."""
    if x.requires_grad or any(t.requires_grad for t in state):
        return True
    return any(parameter.requires_grad for parameter in stage.lstm.parameters())
