"""The detector as the published code runs it: the other side of `detector_speed.py`.

The network of `evspan.pipeline.model.detector` (3 scales, no small-object attention) under the same
parameter names, written after uzh-rpg/RVT (MIT) and its YOLOX head (Apache-2.0). It processes one
frame at a time through the whole backbone, with attention in plain products and an LSTM that
convolves cat(x, h). It gathers the labelled frames' features after the loop, runs neck and head
once over them, then SimOTA frame by frame with boolean indexing and values that the host reads. As
there, maps are channel-last from a stage's convolution to its LSTM, and training decodes its
predictions too. Left out: what the published code does when a GPU is out of memory, and its
`empty_cache` after every labelled frame.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from evspan.conf.schema.training import BackboneConfig, ModelConfig
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)
State = list[tuple[Tensor, Tensor]]  # per stage hidden and cell, (B, C, h, w)


# -- backbone --------------------------------------------------------------------------------------
class LayerScale(nn.Module):
    """A learnable factor per channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return x * self.gamma


class MLP(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU()),
            nn.Dropout(0.0),
            nn.Linear(ratio * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return self.net(x)


class SelfAttention(nn.Module):
    """(groups, rows, columns, C), heads attending over rows x columns."""

    def __init__(self, dim: int, dim_head: int) -> None:
        super().__init__()
        self.heads = dim // dim_head
        self.dim_head = dim_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the shape of x."""
        qkv = self.qkv(x).view(len(x), -1, self.heads, 3 * self.dim_head).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=3)
        weights = ((q @ k.transpose(-2, -1)) * self.dim_head**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


class PartitionAttention(nn.Module):
    """Attention within windows, or over a grid of distant cells, then an MLP."""

    def __init__(self, dim: int, config: BackboneConfig, *, grid: bool, first_norm: bool) -> None:
        super().__init__()
        self.grid = grid
        self.norm1 = nn.LayerNorm(dim) if first_norm else nn.Identity()
        self.self_attn = SelfAttention(dim, config.dim_head)
        self.ls1 = LayerScale(dim, config.ls_init_value)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, config.mlp_ratio)
        self.ls2 = LayerScale(dim, config.ls_init_value)

    def forward(self, x: Tensor, partition: tuple[int, int]) -> Tensor:
        """x: (B, h, w, C)."""
        b, h, w, c = x.shape
        rows, columns = partition
        down = h // rows
        across = w // columns
        y = self.norm1(x)
        if self.grid:
            y = y.view(b, rows, down, columns, across, c).permute(0, 2, 4, 1, 3, 5)
        else:
            y = y.view(b, down, rows, across, columns, c).permute(0, 1, 3, 2, 4, 5)
        y = self.self_attn(y.contiguous().view(-1, rows, columns, c))
        y = y.view(b, down, across, rows, columns, c)
        back = (0, 3, 1, 4, 2, 5) if self.grid else (0, 1, 3, 2, 4, 5)
        y = y.permute(back).contiguous().view(b, h, w, c)
        x = x + self.ls1(y)
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPair(nn.Module):
    """Window attention, then grid attention."""

    def __init__(self, dim: int, config: BackboneConfig, *, first: bool) -> None:
        super().__init__()
        self.att_window = PartitionAttention(dim, config, grid=False, first_norm=not first)
        self.att_grid = PartitionAttention(dim, config, grid=True, first_norm=True)

    def forward(self, x: Tensor, partition: tuple[int, int]) -> Tensor:
        """x: (B, h, w, C)."""
        return self.att_grid(self.att_window(x, partition), partition)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, h/s, w/s, C')."""

    def __init__(self, channels: int, dim: int, factor: int) -> None:
        super().__init__()
        kernel = 2 * factor - 1
        self.conv = nn.Conv2d(channels, dim, kernel, stride=factor, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w)."""
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class ConvLSTM(nn.Module):
    """An LSTM per cell; its gates are a 1x1 convolution of cat(x, h)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """x: (B, C, h, w). state: hidden and cell; None is zero. Returns the next state."""
        if state is None:
            state = (torch.zeros_like(x), torch.zeros_like(x))
        hidden, cell = state
        gates, candidate = self.conv1x1(torch.cat((x, hidden), dim=1)).tensor_split(
            [3 * self.dim], dim=1
        )
        forget, write, read = gates.sigmoid().tensor_split(3, dim=1)
        cell = forget * cell + write * candidate.tanh()
        return read * cell.tanh(), cell


class Stage(nn.Module):
    """Downsampling, attention blocks, LSTM."""

    def __init__(
        self, channels: int, dim: int, factor: int, blocks: int, config: BackboneConfig
    ) -> None:
        super().__init__()
        self.downsample_cf2cl = Downsample(channels, dim, factor)
        self.att_blocks = nn.ModuleList(
            AttentionPair(dim, config, first=i == 0) for i in range(blocks)
        )
        self.lstm = ConvLSTM(dim)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None, partition: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """x: (B, C, h, w). Returns the next hidden and cell state."""
        x = self.downsample_cf2cl(x)
        for pair in self.att_blocks:
            x = pair(x, partition)
        return self.lstm(x.permute(0, 3, 1, 2), state)


class FrameBackbone(nn.Module):
    """Four stages."""

    def __init__(self, config: BackboneConfig, in_channels: int) -> None:
        super().__init__()
        self.split = 32 * config.partition_split_32
        inputs = [in_channels, *config.dims[:-1]]
        self.stages = nn.ModuleList(
            Stage(inputs[i], config.dims[i], 4 if i == 0 else 2, config.num_blocks[i], config)
            for i in range(4)
        )

    def forward(self, x: Tensor, states: State | None) -> State:
        """x: (B, C, H, W) of one frame, padded. The hidden states are the features."""
        partition = (x.shape[2] // self.split, x.shape[3] // self.split)
        after = []
        for i, stage in enumerate(self.stages):
            after.append(stage(x, None if states is None else states[i], partition))
            x = after[-1][0]
        return after


# -- neck ------------------------------------------------------------------------------------------
class BaseConv(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w)."""
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = BaseConv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w)."""
        return self.conv2(self.conv1(x))


class CSPLayer(nn.Module):
    """Bottlenecks on half of the channels."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        hidden = outputs // 2
        self.conv1 = BaseConv(inputs, hidden, 1)
        self.conv2 = BaseConv(inputs, hidden, 1)
        self.conv3 = BaseConv(2 * hidden, outputs, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w)."""
        inner = self.conv1(x)
        shortcut = self.conv2(x)
        return self.conv3(torch.cat((self.m(inner), shortcut), dim=1))


class PAFPN(nn.Module):
    """The neck of 3 scales."""

    def __init__(self, channels: Sequence[int], depth: float) -> None:
        super().__init__()
        fine, middle, coarse = channels
        blocks = round(3 * depth)
        self.lateral_conv0 = BaseConv(coarse, middle, 1)
        self.C3_p4 = CSPLayer(2 * middle, middle, blocks)
        self.reduce_conv1 = BaseConv(middle, fine, 1)
        self.C3_p3 = CSPLayer(2 * fine, fine, blocks)
        self.bu_conv2 = BaseConv(fine, fine, 3, 2)
        self.C3_n3 = CSPLayer(2 * fine, middle, blocks)
        self.bu_conv1 = BaseConv(middle, middle, 3, 2)
        self.C3_n4 = CSPLayer(2 * middle, coarse, blocks)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """features: (B, C, h, w) by scale, finest first. Returns the same shapes."""
        fine, middle, coarse = features
        lateral0 = self.lateral_conv0(coarse)
        x = self.C3_p4(torch.cat((_upsample(lateral0), middle), 1))
        lateral1 = self.reduce_conv1(x)
        out = [self.C3_p3(torch.cat((_upsample(lateral1), fine), 1))]
        out.append(self.C3_n3(torch.cat((self.bu_conv2(out[-1]), lateral1), 1)))
        out.append(self.C3_n4(torch.cat((self.bu_conv1(out[-1]), lateral0), 1)))
        return out


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")


# -- head, assignment, loss ------------------------------------------------------------------------
class Assigned(NamedTuple):
    """The assignment of one frame."""

    foreground: Tensor  # (cells,) bool
    box: Tensor  # index of the box per foreground cell
    iou: Tensor  # per foreground cell
    class_id: Tensor  # per foreground cell
    count: int  # foreground cells


class Head(nn.Module):
    """The decoupled head of YOLOX with SimOTA and the losses."""

    strides = STRIDES[1:]

    def __init__(self, in_channels: Sequence[int], hidden: int, classes: int) -> None:
        super().__init__()
        self.classes = classes

        def branch() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(BaseConv(hidden, hidden, 3), BaseConv(hidden, hidden, 3))
                for _ in in_channels
            )

        def prediction(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(hidden, outputs, 1) for _ in in_channels)

        self.stems = nn.ModuleList(BaseConv(c, hidden, 1) for c in in_channels)
        self.cls_convs = branch()
        self.reg_convs = branch()
        self.cls_preds = prediction(classes)
        self.reg_preds = prediction(4)
        self.obj_preds = prediction(1)
        for conv in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(conv.bias, -math.log(99))
        self.grids: dict[tuple, Tensor] = {}  # by size
        self.all_cells: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(
        self, features: Sequence[Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Predicts, and computes the losses in training.

        Args:
            targets: (n, G, 5) class, cx, cy, w, h; rows of zeros are padding. For training.

        Returns:
            (n, cells, 5 + classes) decoded predictions; the losses in training, else None.
        """
        trained = []
        grids = []
        strides = []
        decoded = []
        for i, (x, stride) in enumerate(zip(features, self.strides, strict=True)):
            x = self.stems[i](x)
            class_features = self.cls_convs[i](x)
            box_features = self.reg_convs[i](x)
            classes = self.cls_preds[i](class_features)
            box = self.reg_preds[i](box_features)
            objectness = self.obj_preds[i](box_features)
            grid = self._grid(x)
            if self.training:
                raw = torch.cat((box, objectness, classes), 1)
                trained.append(_flat_decoded(raw, grid, stride))
                strides.append(torch.zeros(1, grid.shape[1]).fill_(stride).type_as(x))
            grids.append(grid)
            decoded.append(torch.cat((box, objectness.sigmoid(), classes.sigmoid()), 1))
        losses = None
        if self.training:
            assert targets is not None
            losses = self.losses(
                torch.cat(grids, 1)[0], torch.cat(strides, 1)[0], targets, torch.cat(trained, 1)
            )
        flat = torch.cat([x.flatten(start_dim=2) for x in decoded], dim=2).permute(0, 2, 1)
        cells, scale = self._all_cells(grids)
        centre = (flat[..., :2] + cells) * scale
        size = flat[..., 2:4].exp() * scale
        return torch.cat((centre, size, flat[..., 4:]), dim=-1), losses

    def _grid(self, like: Tensor) -> Tensor:
        """(1, cells, 2) column and row of every cell of a map (B, C, h, w)."""
        height, width = like.shape[-2:]
        key = (height, width, like.dtype, like.device)
        if key not in self.grids:
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            self.grids[key] = torch.stack((columns, rows), 2).view(1, -1, 2).to(like)
        return self.grids[key]

    def _all_cells(self, grids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        key = (*(g.shape[1] for g in grids), grids[0].dtype, grids[0].device)
        if key not in self.all_cells:
            strides = [
                torch.full_like(grid[..., :1], stride) for grid, stride in zip(grids, self.strides)
            ]
            self.all_cells[key] = torch.cat(list(grids), 1), torch.cat(strides, 1)
        return self.all_cells[key]

    def losses(
        self, cells: Tensor, strides: Tensor, targets: Tensor, outputs: Tensor
    ) -> dict[str, Tensor]:
        """The losses by name, divided by the number of positives.

        Args:
            cells: (cells, 2) column and row. strides: (cells,).
            targets: as in forward. outputs: (n, cells, 5 + classes), boxes in pixels.
        """
        boxes = outputs[..., :4]
        objectness = outputs[..., 4:5]
        classes = outputs[..., 5:]
        labels = (targets.sum(dim=2) > 0).sum(dim=1)
        class_targets = []
        box_targets = []
        object_targets = []
        masks = []
        positives = 0
        for i in range(len(outputs)):
            count = int(labels[i])
            if count == 0:
                class_targets.append(outputs.new_zeros((0, self.classes)))
                box_targets.append(outputs.new_zeros((0, 4)))
                object_targets.append(outputs.new_zeros((outputs.shape[1], 1)))
                masks.append(outputs.new_zeros(outputs.shape[1]).bool())
                continue
            class_ids = targets[i, :count, 0]
            truth = targets[i, :count, 1:5]
            assigned = self.assign(
                truth, class_ids, boxes[i], classes[i], objectness[i], cells, strides
            )
            positives += assigned.count
            onehot = F.one_hot(assigned.class_id.to(torch.int64), self.classes)
            class_targets.append(onehot * assigned.iou.unsqueeze(-1))
            box_targets.append(truth[assigned.box])
            object_targets.append(assigned.foreground.unsqueeze(-1).to(outputs.dtype))
            masks.append(assigned.foreground)
        mask = torch.cat(masks)
        divisor = max(positives, 1)
        iou = _iou_loss(boxes.reshape(-1, 4)[mask], torch.cat(box_targets)).sum() / divisor
        conf = _cross_entropy(objectness.reshape(-1, 1), torch.cat(object_targets)).sum() / divisor
        logits = classes.reshape(-1, self.classes)[mask]
        cls = _cross_entropy(logits, torch.cat(class_targets)).sum() / divisor
        return {
            "loss": 5.0 * iou + conf + cls,
            "iou_loss": 5.0 * iou,
            "conf_loss": conf,
            "cls_loss": cls,
        }

    @torch.no_grad()
    def assign(
        self,
        truth: Tensor,
        class_ids: Tensor,
        boxes: Tensor,
        classes: Tensor,
        objectness: Tensor,
        cells: Tensor,
        strides: Tensor,
    ) -> Assigned:
        """SimOTA of one frame. truth: (G, 4), class_ids: (G,), the others per cell."""
        mask, near = _near_centre(truth, cells, strides)
        iou = _pairwise_iou(truth, boxes[mask])
        score = (classes[mask].float().sigmoid_() * objectness[mask].float().sigmoid_()).sqrt()
        onehot = F.one_hot(class_ids.to(torch.int64), self.classes).float()
        class_cost = F.binary_cross_entropy(
            score.unsqueeze(0).repeat(len(truth), 1, 1),
            onehot.unsqueeze(1).repeat(1, len(score), 1),
            reduction="none",
        ).sum(-1)
        cost = class_cost - 3.0 * torch.log(iou + 1e-8) + 1e6 * (~near)
        return _match(cost, iou, class_ids, mask)


def _flat_decoded(output: Tensor, grid: Tensor, stride: int) -> Tensor:
    """(n, 5 + classes, h, w) raw -> (n, h * w, 5 + classes), its boxes in pixels."""
    n, channels = output.shape[:2]
    output = (
        output.view(n, 1, channels, *output.shape[2:])
        .permute(0, 1, 3, 4, 2)
        .reshape(n, -1, channels)
    )
    output[..., :2] = (output[..., :2] + grid) * stride
    output[..., 2:4] = torch.exp(output[..., 2:4]) * stride
    return output


def _near_centre(truth: Tensor, cells: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """(cells,) bool: near any box's centre. (G, those cells) bool: near this box's."""
    x = ((cells[:, 0] + 0.5) * strides).unsqueeze(0)
    y = ((cells[:, 1] + 0.5) * strides).unsqueeze(0)
    radius = strides.unsqueeze(0) * 1.5
    left = x - (truth[:, 0:1] - radius)
    right = (truth[:, 0:1] + radius) - x
    top = y - (truth[:, 1:2] - radius)
    bottom = (truth[:, 1:2] + radius) - y
    near = torch.stack((left, top, right, bottom), 2).min(dim=-1).values > 0.0
    mask = near.sum(dim=0) > 0
    return mask, near[:, mask]


def _pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    low = torch.max(a[:, None, :2] - a[:, None, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    high = torch.min(a[:, None, :2] + a[:, None, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    shared = torch.prod(high - low, 2) * (low < high).type(low.type()).prod(dim=2)
    return shared / (torch.prod(a[:, 2:], 1)[:, None] + torch.prod(b[:, 2:], 1) - shared)


def _match(cost: Tensor, iou: Tensor, class_ids: Tensor, mask: Tensor) -> Assigned:
    """Matches every box with its dynamic k cheapest cells.

    A cell that several boxes match goes to the cheapest one. `mask` becomes the foreground in
    place.
    """
    matching = torch.zeros_like(cost, dtype=torch.uint8)
    best_ious = torch.topk(iou, min(10, iou.size(1)), dim=1).values
    dynamic_k = torch.clamp(best_ious.sum(1).int(), min=1)
    for i in range(len(cost)):
        matching[i][torch.topk(cost[i], k=dynamic_k[i], largest=False).indices] = 1
    num_boxes = matching.sum(0)
    if num_boxes.max() > 1:
        contested = num_boxes > 1
        cheapest = torch.min(cost[:, contested], dim=0).indices
        matching[:, contested] *= 0
        matching[cheapest, contested] = 1
    inside = num_boxes > 0
    count = inside.sum().item()
    mask[mask.clone()] = inside
    box = matching[:, inside].argmax(0)
    return Assigned(mask, box, (matching * iou).sum(0)[inside], class_ids[box], count)


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def _iou_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    low = torch.max(predicted[:, :2] - predicted[:, 2:] / 2, truth[:, :2] - truth[:, 2:] / 2)
    high = torch.min(predicted[:, :2] + predicted[:, 2:] / 2, truth[:, :2] + truth[:, 2:] / 2)
    shared = torch.prod(high - low, 1) * (low < high).type(low.type()).prod(dim=1)
    union = torch.prod(predicted[:, 2:], 1) + torch.prod(truth[:, 2:], 1) - shared
    return 1 - (shared / (union + 1e-16)) ** 2


# -- the detector ----------------------------------------------------------------------------------
class FrameByFrame(nn.Module):
    """`load_state_dict` takes `Detector.state_dict()` of the same configuration."""

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        plain = config.fpn.in_stages == [2, 3, 4] and not config.fpn.enable_small_object_attention
        if not plain or config.backbone.dws_conv or config.head.size_aware_loss:
            raise ValueError(
                "the frame-by-frame version supports 3 scales without attention, without dws_conv "
                "and size_aware_loss"
            )
        self.backbone = FrameBackbone(config.backbone, in_channels)
        dims = config.backbone.dims[1:]
        self.fpn = PAFPN(dims, config.fpn.depth)
        self.yolox_head = Head(dims, 2 * config.backbone.embed_dim, config.head.num_classes)

    def padded(self, frames: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> the dtype of the weights, padded below and right with zeros."""
        split = self.backbone.split
        height, width = frames.shape[-2:]
        return F.pad(
            frames.to(self.fpn.lateral_conv0.conv.weight.dtype),
            (0, -width % split, 0, -height % split),
        )

    def losses(
        self,
        frames: Tensor,
        state: State | None,
        labelled: Sequence[Sequence[int]],
        targets: Tensor,
    ) -> tuple[dict[str, Tensor], State]:
        """Losses of a chunk, and the next state.

        Args:
            frames: (T, B, C, H, W) uint8.
            state: None is zero.
            labelled: per frame, the lanes that are labelled.
            targets: (n, G, 5) of the n labelled frames in (t, b) order; class, cx, cy, w, h; rows
                of zeros are padding.
        """
        selected: list[list[Tensor]] = [[] for _ in STRIDES]
        for x, lanes in zip(frames, labelled, strict=True):
            state = self.backbone(self.padded(x), state)
            if len(lanes):
                for kept, (hidden, _) in zip(selected, state, strict=True):
                    kept.append(hidden[list(lanes)])
        features = [torch.cat(kept, dim=0) for kept in selected]
        losses = self.yolox_head(self.fpn(features[1:]), targets)[1]
        assert losses is not None
        assert state is not None
        return losses, [(hidden.detach(), cell.detach()) for hidden, cell in state]

    def step(self, frames: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One frame (B, C, H, W) uint8 -> (B, cells, 5 + classes) decoded, and the next state."""
        state = self.backbone(self.padded(frames), state)
        return self.yolox_head(self.fpn([hidden for hidden, _ in state[1:]]))[0], state
