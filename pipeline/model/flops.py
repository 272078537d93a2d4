"""The floating-point operations of the detector, by part, forward and backward: a formula.

Counted are matrix products: convolutions, linear layers, attention and the LSTM. A product of
(m, k) and (k, n) is 2 * m * k * n. Norms, activations and losses are not counted, nor is what
backward recomputes to save memory: the numbers are those of the model, on every device and for
every layout of ranks.

The tests compare the formula with what torch's FlopCounterMode counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from evspan.pipeline.model.attention import (
    EventTemporalAttention,
    MultiScaleSpatialAttention,
    ScaleAwareChannelAttention,
    SmallObjectAttentionModule,
)
from evspan.pipeline.model.backbone import Backbone, PartitionAttention, Stage
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.neck import ATTENDED_SCALES
from torch import Tensor, nn


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part of the detector."""

    name: str
    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class DetectorFlops:
    """FLOPs of some frames. frames: that the backbone runs on. labelled: that are predicted."""

    parts: tuple[PartFlops, ...]
    frames: int
    labelled: int

    @property
    def forward(self) -> int:
        """Of all parts."""
        return sum(part.forward for part in self.parts)

    @property
    def total(self) -> int:
        """Forward and backward of all parts."""
        return sum(part.total for part in self.parts)


class FrameCounts(NamedTuple):
    """What a rank computes in some micro-batches.

    frames: of all lanes. needed: those that the neck runs on (labelled, or read by temporal
    attention). labelled: those that are predicted. sequences: chunks that begin on the rank, one
    per lane; the state before them has no gradient.
    """

    frames: int
    needed: int
    labelled: int
    sequences: int

    def __add__(self, other: object) -> "FrameCounts":
        """The sum of each."""
        if not isinstance(other, FrameCounts):
            return NotImplemented
        return FrameCounts(*(a + b for a, b in zip(self, other, strict=True)))


NO_FRAMES = FrameCounts(0, 0, 0, 0)


def frame_counts(labelled: Tensor, following: Tensor, *, begins: bool = True) -> FrameCounts:
    """Of a micro-batch, whose tensors are on the CPU.

    Args:
        labelled: (T, B) bool, this rank's frames.
        following: (looks_back, B) bool, as of `Detector.forward`.
        begins: whether the rank holds the chunks' first frames.
    """
    of_rank = labelled.numpy()
    steps, lanes = of_rank.shape
    ahead = np.concatenate((of_rank, following.numpy()))
    needed = of_rank.copy()
    for k in range(1, len(following) + 1):
        needed |= ahead[k : k + steps]
    return FrameCounts(
        frames=steps * lanes,
        needed=int(np.count_nonzero(needed)),
        labelled=int(np.count_nonzero(of_rank)),
        sequences=lanes if begins else 0,
    )


class Unit(Enum):
    """What the cost of a layer is proportional to: a field of FrameCounts."""

    frames = "frames"
    needed = "needed"
    labelled = "labelled"
    sequences = "sequences"


class _Cost(NamedTuple):
    """FLOPs per unit."""

    part: str
    unit: Unit
    forward: int
    backward: int


class ModelFlops:
    """FLOPs of a detector, from the sizes of its layers and those of its feature maps.

    What is frozen has no gradients of weights, and nothing that is not trained is differentiated
    before the first layer that is.

    Args:
        detector: on any device; with ZeRO 3, too.
        height, width: of the frames in pixels.
    """

    def __init__(self, detector: Detector, height: int, width: int) -> None:
        layers = _Layers()
        rows, columns = detector.input_size(height, width)
        split = 32 * detector.config.backbone.partition_split_32
        group = (rows // split) * (columns // split)  # cells that attend to each other
        for number, (stage, stride) in enumerate(
            zip(detector.backbone.stages, Backbone.strides, strict=True), 1
        ):
            assert isinstance(stage, Stage)
            cells = (rows // stride) * (columns // stride)
            layers.add_stage(number, stage, cells, group)
        cells_of_scales = [h * w for h, w, _ in detector.geometry(height, width)]
        layers.add_neck(detector, cells_of_scales)
        layers.add_head(detector, cells_of_scales)
        self.costs = layers.costs

    def of(self, counts: FrameCounts) -> DetectorFlops:
        """FLOPs of what a rank computes, by part in the order of the forward pass."""
        forward: dict[str, int] = {}
        backward: dict[str, int] = {}
        for cost in self.costs:
            number = getattr(counts, cost.unit.value)
            forward[cost.part] = forward.get(cost.part, 0) + number * cost.forward
            backward[cost.part] = backward.get(cost.part, 0) + number * cost.backward
        parts = tuple(PartFlops(name, forward[name], backward[name]) for name in forward)
        return DetectorFlops(parts, counts.frames, counts.labelled)


def spatial_name(stage: int) -> str:
    """The part of a stage, counted from 1, without its LSTM."""
    return f"stage {stage} spatial"


def lstm_name(stage: int) -> str:
    """The LSTM of a stage, counted from 1."""
    return f"stage {stage} LSTM"


NECK = "neck"
ATTENTION = "small-object attention"
HEAD = "head"


class _Layers:
    """Collects the costs of layers in the order of the forward pass."""

    def __init__(self) -> None:
        self.costs: list[_Cost] = []
        self.differentiates = False  # whether the features so far have gradients

    def _add(self, part: str, unit: Unit, forward: int, *, trained: bool) -> None:
        """A product with a weight, per unit. Its backward is one product for each gradient."""
        gradients = int(trained) + int(self.differentiates)
        self.costs.append(_Cost(part, unit, forward, forward * gradients))
        self.differentiates = self.differentiates or trained

    def _convolution(self, part: str, unit: Unit, conv: nn.Conv2d, cells: int) -> None:
        """cells: of the output."""
        rows, columns = conv.kernel_size
        inputs = conv.in_channels // conv.groups
        forward = 2 * cells * conv.out_channels * inputs * rows * columns
        self._add(part, unit, forward, trained=_is_trained(conv))

    def _convolutions(self, part: str, unit: Unit, module: nn.Module, cells: int) -> None:
        """All convolutions in a module, which have outputs of one size."""
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                self._convolution(part, unit, conv, cells)

    def _linear(self, part: str, unit: Unit, linear: nn.Linear, rows: int) -> None:
        forward = 2 * rows * linear.in_features * linear.out_features
        self._add(part, unit, forward, trained=_is_trained(linear))

    # -- backbone --------------------------------------------------------------------------------
    def add_stage(self, number: int, stage: Stage, cells: int, group: int) -> None:
        """cells: of the stage's map. group: cells that attend to each other."""
        part = spatial_name(number)
        downsample = stage.downsample_cf2cl.conv
        assert isinstance(downsample, nn.Conv2d)
        self._convolution(part, Unit.frames, downsample, cells)
        for block in stage.att_blocks.modules():
            if isinstance(block, PartitionAttention):
                self._add_attention_block(part, block, cells, group)
        self._add_lstm(number, stage, cells)

    def _add_attention_block(
        self, part: str, block: PartitionAttention, cells: int, group: int
    ) -> None:
        attention = block.self_attn
        self._linear(part, Unit.frames, attention.qkv, cells)
        scores_and_values = 2 * 2 * cells * group * attention.proj.in_features
        # Both factors are features: two gradients, if any.
        backward = 2 * scores_and_values if self.differentiates else 0
        self.costs.append(_Cost(part, Unit.frames, scores_and_values, backward))
        self._linear(part, Unit.frames, attention.proj, cells)
        for layer in block.mlp.layers():
            self._linear(part, Unit.frames, layer, cells)

    def _add_lstm(self, number: int, stage: Stage, cells: int) -> None:
        part = lstm_name(number)
        gates = stage.lstm.conv1x1
        hidden = gates.in_channels // 2
        product = 2 * cells * hidden * gates.out_channels  # of the input, and of the hidden state
        trained = _is_trained(gates)
        self._add(part, Unit.frames, product, trained=trained)
        before_first = product  # has no gradient: the state before the first frame
        depthwise = stage.lstm.conv3x3_dws
        if depthwise is not None:
            self._convolution(part, Unit.frames, depthwise, cells)
            of_depthwise = self.costs[-1].forward
            is_mixed = _is_trained(depthwise)  # then the product's input has a gradient
            before_first = of_depthwise if is_mixed else product + of_depthwise
        self._add(part, Unit.frames, product, trained=trained)
        if self.differentiates:
            self.costs.append(_Cost(part, Unit.sequences, 0, -before_first))

    # -- neck ------------------------------------------------------------------------------------
    def add_neck(self, detector: Detector, cells: Sequence[int]) -> None:
        """cells: of each scale's map, finest first."""
        neck = detector.fpn
        last = len(cells) - 1
        stages = neck.in_stages
        for i in range(last):
            level = last - i
            lateral = "lateral_conv0" if i == 0 else f"reduce_conv{i}"
            self._convolutions(NECK, Unit.needed, neck.get_submodule(lateral), cells[level])
            top_down = neck.get_submodule(f"C3_p{stages[level - 1] + 1}")
            self._convolutions(NECK, Unit.needed, top_down, cells[level - 1])
        for level in range(1, last + 1):
            down = neck.get_submodule(f"bu_conv{stages[-1] - stages[level - 1]}")
            self._convolutions(NECK, Unit.needed, down, cells[level])
            bottom_up = neck.get_submodule(f"C3_n{stages[level - 1] + 1}")
            self._convolutions(NECK, Unit.needed, bottom_up, cells[level])
        if neck.enable_small_object_attention:
            self._add_small_object_attention(detector, cells)

    def _add_small_object_attention(self, detector: Detector, cells: Sequence[int]) -> None:
        neck = detector.fpn
        for scale in range(ATTENDED_SCALES):
            module = getattr(neck.small_object_attention_modules, f"scale_{scale}", None)
            if isinstance(module, SmallObjectAttentionModule):
                self._add_spatial(module.spatial, cells[scale])
                self._add_temporal(module.temporal, cells[scale])
                if module.integration is not None:
                    self._convolution(ATTENTION, Unit.labelled, module.integration, cells[scale])
        for module in neck.scale_aware_attention_modules.values():
            assert isinstance(module, ScaleAwareChannelAttention)
            self._add_linears(module.fc)

    def _add_spatial(self, attention: MultiScaleSpatialAttention | None, cells: int) -> None:
        """The dilated convolutions, multiplied by the first 1x1 convolution; then the last one."""
        if attention is None:
            return
        first, _, last = attention.attention_conv
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        for conv in attention.scale_convs:
            assert isinstance(conv, nn.Conv2d)
            rows, columns = conv.kernel_size
            forward = 2 * cells * first.out_channels * conv.in_channels * rows * columns
            self._add(ATTENTION, Unit.needed, forward, trained=_is_trained(conv))
        self._convolution(ATTENTION, Unit.needed, last, cells)

    def _add_temporal(self, attention: EventTemporalAttention | None, cells: int) -> None:
        """One product for the frames and the taps of motion, then the sum of the shifted taps."""
        if attention is None:
            return
        conv = attention.temporal_conv
        taps = 9
        inputs = conv.in_channels * conv.kernel_size[0]
        forward = 2 * cells * inputs * (conv.out_channels + taps)
        self._add(ATTENTION, Unit.labelled, forward, trained=_is_trained(conv))
        self._add(ATTENTION, Unit.labelled, 2 * cells * taps * taps, trained=False)
        self._add_linears(attention.temporal_fc)

    def _add_linears(self, layers: Iterable[nn.Module]) -> None:
        """Of the values of a frame that are left after pooling."""
        for layer in layers:
            if isinstance(layer, nn.Linear):
                self._linear(ATTENTION, Unit.labelled, layer, 1)

    # -- head ------------------------------------------------------------------------------------
    def add_head(self, detector: Detector, cells: Sequence[int]) -> None:
        """cells: of each scale's map, finest first."""
        head = detector.yolox_head
        branches = (
            head.stems,
            head.cls_convs,
            head.reg_convs,
            head.cls_preds,
            head.reg_preds,
            head.obj_preds,
        )
        for branch in branches:
            for module, cells_of_scale in zip(branch, cells, strict=True):
                self._convolutions(HEAD, Unit.labelled, module, cells_of_scale)


def _is_trained(layer: nn.Module) -> bool:
    return layer.get_parameter("weight").requires_grad
