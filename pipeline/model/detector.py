"""The detector: recurrent backbone, neck, head.

Single-device code: the exchange spreads a sequence over ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from evspan.conf.schema.training import ModelConfig
from evspan.pipeline.model.backbone import Backbone, Execution
from evspan.pipeline.model.head import Geometry, YOLOXHead, decode
from evspan.pipeline.model.inputs import (
    Frames,
    as_frames,
    check_frames,
    check_positive,
    check_selection,
    check_state,
    limits_from,
)
from evspan.pipeline.model.neck import ATTENDED_SCALES, YOLOPAFPN, LookBack
from evspan.pipeline.model.norm import BatchNorm2d, shared_norm_work
from evspan.pipeline.model.postprocess import PendingDetections
from evspan.pipeline.model.sequence_protocol import Exchange, LocalExchange
from evspan.pipeline.model.state import STAGES, DetectorState, forget_lanes, state_of
from torch import Tensor, nn


class LookBackRows(NamedTuple):
    """Rows of the tensors that the neck and temporal attention read, see `look_back_rows`.

    needed: (p,) int64, the frames that the neck runs on, as rows of all T * B frames of the chunk
        in (t, b) order. They are packed into one batch in that order.
    labelled: (n,) int64, the labelled frames, as rows of the packed ones.
    before: (n, frames) int64, the frames before each labelled frame, oldest first, as rows of the
        carried frames (frames * B) followed by the packed ones; None when `frames` is 0.
    last: (frames * B,) int64, the last frames of the chunk, as rows of the same.
    """

    needed: Tensor
    labelled: Tensor
    before: Tensor | None
    last: Tensor

    def to(self, device: torch.device) -> "LookBackRows":
        """A copy on `device`, made in one transfer that the host does not wait for."""
        if device == self.needed.device:
            return self
        before = self.needed[:0] if self.before is None else self.before
        sources = (self.needed, self.labelled, self.last, before)
        packed = torch.cat([source.flatten() for source in sources])
        if device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        needed, labelled, last, flat = torch.split(packed, [source.numel() for source in sources])
        return LookBackRows(
            needed=needed,
            labelled=labelled,
            before=None if self.before is None else flat.view(before.shape),
            last=last,
        )


def look_back_rows(labelled: Tensor, following: Tensor, frames: int) -> LookBackRows:
    """Finds the frames that the neck needs, and where each labelled frame finds those before it.

    The neck runs on the labelled frames, on those that temporal attention reads for them, and on
    those that labelled frames after this rank's last one read. These are the same frames, and so
    the same BatchNorm statistics, for every number of ranks per sequence. Rows of `last` whose
    frame is not needed point at an earlier frame; nothing reads what is carried in their place.

    Example: a chunk of 4 frames of one lane, each of which reads one frame back (`frames` = 1).
    Only frame 1 is labelled, and the first frame of the next chunk may be:

        labelled  = [[0], [1], [0], [0]]      following = [[1]]

        needed    = [0, 1, 3]   frame 0 is read by frame 1, frame 3 by the next chunk, frame 2 by
        none rows         0 = the carried frame, 1, 2, 3 = the packed frames 0, 1, 3
        labelled  = [1]         frame 1 is row 1 of the packed frames
        before    = [[1]]       the frame before frame 1 is frame 0
        last      = [3]         frame 3 is carried into the next chunk

    Args:
        labelled: (T, B) bool, this rank's frames.
        following: (frames, B) bool, which of the frames after this rank's last one may be labelled.
        frames: number of earlier frames that a labelled frame reads, 0 or more.

    Returns:
        Rows on the device of `labelled`.
    """
    steps, lanes = labelled.shape
    labelled_rows = labelled.flatten().nonzero()[:, 0]
    needed = labelled.clone()
    if frames:
        ahead = torch.cat((labelled, following))
        for k in range(1, frames + 1):
            needed |= ahead[k : k + steps]
    num_carried = frames * lanes
    carried_rows = torch.arange(num_carried, device=labelled.device)
    packed_rows = needed.flatten().cumsum(0) - 1 + num_carried
    # The row of every frame from the oldest carried one on, in (t, b) order.
    row = torch.cat((carried_rows, packed_rows))
    before = None
    if frames:
        before = torch.stack([row[labelled_rows + k * lanes] for k in range(frames)], 1)
    return LookBackRows(
        needed=needed.flatten().nonzero()[:, 0] if frames else labelled_rows,
        labelled=row[labelled_rows + num_carried] - num_carried,
        before=before,
        last=row[steps * lanes :],
    )


class Detector(nn.Module):
    """Maps frames and state to raw predictions and the next state.

    Parameter names are those of RVT's published checkpoints without their `mdl.` prefix.

    Args:
        config: the model.
        in_channels: channels of a frame, 2 * bins.
        exchange: runs the recurrence of a sequence over its ranks; None: one rank.
        execution: how the backbone runs a chunk.
    """

    # Replaced by ablations.
    look_back_rows = staticmethod(look_back_rows)

    def __init__(
        self,
        config: ModelConfig,
        in_channels: int,
        exchange: Exchange | None = None,
        *,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.exchange = exchange or LocalExchange()
        self.backbone = Backbone(config.backbone, in_channels, execution)
        fpn = config.fpn
        dims = [config.backbone.dims[stage - 1] for stage in fpn.in_stages]
        self.fpn = YOLOPAFPN(
            fpn.in_stages,
            dims,
            fpn.depth,
            fpn.enable_small_object_attention,
            fpn.attention_spatial,
            fpn.attention_temporal,
            temporal_window=fpn.temporal_window,
            identity_init=fpn.identity_init,
        )
        self.yolox_head = YOLOXHead(dims, 2 * config.backbone.embed_dim, config.head.num_classes)
        self.norms = [m for m in self.modules() if isinstance(m, BatchNorm2d)]

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per feature cell of each scale, finest first."""
        return tuple(Backbone.strides[stage - 1] for stage in self.config.fpn.in_stages)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that frames are zero-padded to, on the right and below.

        Both are multiples of 32 * partition_split_32 pixels.
        """
        return self.backbone.input_size(height, width)

    def geometry(self, height: int, width: int) -> Geometry:
        """(rows, columns, stride) of each scale's feature map for frames of this size in pixels."""
        padded_height, padded_width = self.input_size(height, width)
        return tuple((padded_height // s, padded_width // s, s) for s in self.strides)

    def initial_state(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DetectorState:
        """The zero state of `batch` lanes of frames of (height, width) pixels.

        Raises:
            InputError: there are no lanes or no pixels.
        """
        check_positive(batch=batch, height=height, width=width)
        shapes = self.state_shapes(batch, height, width)
        return state_of([torch.zeros(shape, device=device, dtype=dtype) for shape in shapes])

    def state_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        """The shapes of a state's tensors, in the order of `state_tensors`."""
        padded_height, padded_width = self.input_size(height, width)

        def shape(stage: int, *leading: int) -> tuple[int, ...]:
            """(*leading, C, h, w) of a stage, counted from 1."""
            channels = self.config.backbone.dims[stage - 1]
            stride = Backbone.strides[stage - 1]
            return (*leading, channels, padded_height // stride, padded_width // stride)

        shapes = []
        for stage in range(1, STAGES + 1):
            shapes += [shape(stage, batch)] * 2  # hidden and cell
        frames_back = self.config.fpn.looks_back
        attended = self.config.fpn.in_stages[:ATTENDED_SCALES] if frames_back else []
        return shapes + [shape(stage, frames_back, batch) for stage in attended]

    def forward(
        self,
        frames: Tensor,
        state: DetectorState,
        *,
        starts: Tensor | None = None,
        labelled: Tensor | None = None,
        following: Tensor | None = None,
    ) -> tuple[Tensor, DetectorState]:
        """Runs one chunk.

        Args:
            frames: (T, B, in_channels, H, W) uint8.
            state: of `initial_state`, or what the previous chunk returned.
            starts: (B,) bool, lanes whose state is reset to zero first; None: no lane.
            labelled: (T, B) bool, the frames to predict; all may be False. None: all frames. Keep
                it on the CPU: its count is needed there, and reading it from a GPU would block.
            following: (looks_back, B) bool, which of the frames after this rank's last one are
                labelled; True for frames of the next chunk. On the same device as `labelled`.
                Without temporal attention it is not read. None: this rank's last frame is the
                chunk's.

        Returns:
            (n, cells, 5 + classes) raw predictions of the n labelled frames in (t, b) order, cells
            ordered by scale, finest first, then row-major; and the next state.
        """
        if starts is not None:
            state = forget_lanes(state, starts)
        features, stages = self.backbone(frames, state.stages, self.exchange)
        chosen = [features[stage - 1].flatten(0, 1) for stage in self.config.fpn.in_stages]
        frames_back = self.config.fpn.looks_back
        if labelled is None:
            history: _History = _AllFrames(state.previous, self.exchange, frames.shape[1])
        else:
            if following is None:
                following = labelled.new_ones(frames_back, labelled.shape[1])
            rows = self.look_back_rows(labelled, following, frames_back).to(frames.device)
            history = _PackedFrames(state.previous, self.exchange, rows)
            chosen = [feature[rows.needed] for feature in chosen]
        with shared_norm_work(self.norms, num_samples=len(chosen[0])):
            raw: Tensor = self.yolox_head(self.fpn(chosen, history))
        return raw, DetectorState(stages, tuple(history.carry))

    def check_inputs(
        self,
        frames: Tensor,
        state: DetectorState,
        starts: Tensor | None = None,
        labelled: Tensor | None = None,
    ) -> None:
        """Checks what `forward` gets; without waiting for a device.

        Raises:
            InputError: frames or state of other channels, sizes, dtypes or devices.
        """
        weight = next(self.parameters())
        frames = as_frames(frames, "T, B, channels, H, W", weight.device)
        check_frames(frames, self.in_channels, weight.device)
        steps, lanes, _, height, width = frames.shape
        check_selection(starts, labelled, steps=steps, lanes=lanes)
        check_state(
            state, self.state_shapes(lanes, height, width), weight, size=(lanes, height, width)
        )

    def step(self, frames: Frames, state: DetectorState) -> tuple[Tensor, DetectorState]:
        """Runs one frame of every lane.

        Args:
            frames: (B, 2 * bins, H, W) uint8, on the detector's device, or an array of numpy.
            state: of `initial_state`, or what the previous step returned.

        Returns:
            (B, cells, 5 + classes): cx, cy, w, h in pixels of the frames, objectness, class scores;
            cells ordered by scale, finest first, then row-major. And the next state.

        Raises:
            InputError: frames or state of other channels, sizes, dtypes or devices.
        """
        frames = as_frames(frames, "B, channels, H, W", next(self.parameters()).device)
        self.check_inputs(frames[None], state)
        raw, state = self(frames[None], state)
        height, width = frames.shape[-2:]
        return self.decode(raw, height, width), state

    def detect(
        self,
        frames: Frames,
        state: DetectorState,
        *,
        confidence_threshold: float | None = None,
        nms_threshold: float | None = None,
    ) -> tuple[list[Tensor], DetectorState]:
        """`step`, then confidence threshold and non-maximum suppression per class.

        Args:
            frames: (B, 2 * bins, H, W) uint8, on the detector's device, or an array of numpy.
            state: of `initial_state`, or what the previous step returned.
            confidence_threshold: lowest objectness * class score; None: the model config's.
            nms_threshold: IoU threshold of the suppression; None: the model config's.

        Returns:
            Per lane (k, 7) on the CPU: x1, y1, x2, y2 in pixels of the frames, objectness, class
            score, class id; highest objectness * class score first. And the next state.

        Raises:
            InputError: frames or state of other channels, sizes, dtypes or devices, or a threshold
                outside 0..1.
        """
        if confidence_threshold is None:
            confidence_threshold = self.config.postprocess.confidence_threshold
        if nms_threshold is None:
            nms_threshold = self.config.postprocess.nms_threshold
        limits = limits_from(confidence_threshold, nms_threshold)
        decoded, state = self.step(frames, state)
        return PendingDetections(decoded, limits).read(), state

    def decode(self, raw: Tensor, height: int, width: int) -> Tensor:
        """Decodes raw predictions of frames of (height, width) pixels.

        Args:
            raw: (n, cells, 5 + classes) of `forward`.

        Returns:
            (n, cells, 5 + classes) float32: cx, cy, w, h in pixels of the frames, objectness and
            class scores in 0..1.
        """
        return decode(raw, self.geometry(height, width))


class _History(LookBack):
    """Provides the neck with the frames before each frame, and collects the next carry.

    Args:
        carried: per attended scale (frames, B, C, h, w), the frames before the chunk.
    """

    def __init__(self, carried: Sequence[Tensor], exchange: Exchange) -> None:
        self.carried = carried
        self.exchange = exchange
        self.carry: list[Tensor] = []

    def __call__(self, packed: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """See `LookBack`. The exchange is called once for all attended scales."""
        attended = packed[: len(self.carried)]
        others = packed[len(self.carried) :]
        results: list[tuple[Tensor, Tensor | None]] = []
        if attended:
            tails = [self._tail(c, x) for c, x in zip(self.carried, attended, strict=True)]
            befores, self.carry = self.exchange.previous(tails, self.carried)
            for before, x in zip(befores, attended, strict=True):
                results.append((self._labelled(x), self._before_each(_joined(before, x))))
        return results + [(self._labelled(x), None) for x in others]

    def _tail(self, carried: Tensor, packed: Tensor) -> Tensor:
        """The last frames of the chunk, shaped as `carried`."""
        raise NotImplementedError

    def _labelled(self, packed: Tensor) -> Tensor:
        """The labelled frames (n, C, h, w) of the packed ones."""
        raise NotImplementedError

    def _before_each(self, rows: Tensor) -> Tensor:
        """(n, frames, C, h, w), those before each labelled frame.

        Args:
            rows: (frames * B + p, C, h, w), the frames before this rank's, then the packed ones.
        """
        raise NotImplementedError


class _AllFrames(_History):
    """All frames of a chunk are predicted. No indexing, so that it can be exported and compiled."""

    def __init__(self, carried: Sequence[Tensor], exchange: Exchange, lanes: int) -> None:
        super().__init__(carried, exchange)
        self.lanes = lanes

    def _tail(self, carried: Tensor, packed: Tensor) -> Tensor:
        rows = _joined(carried, packed)
        return rows.view(-1, self.lanes, *packed.shape[1:])[-len(carried) :]

    def _labelled(self, packed: Tensor) -> Tensor:
        return packed

    def _before_each(self, rows: Tensor) -> Tensor:
        frames = len(self.carried[0])
        packed = len(rows) - frames * self.lanes
        starts = [k * self.lanes for k in range(frames)]
        return torch.stack([rows[start : start + packed] for start in starts], dim=1)


class _PackedFrames(_History):
    """Some frames of a chunk are predicted; the neck runs on `rows.needed`."""

    def __init__(self, carried: Sequence[Tensor], exchange: Exchange, rows: LookBackRows) -> None:
        super().__init__(carried, exchange)
        self.rows = rows

    def _tail(self, carried: Tensor, packed: Tensor) -> Tensor:
        return _joined(carried, packed)[self.rows.last].view(carried.shape)

    def _labelled(self, packed: Tensor) -> Tensor:
        labelled = self.rows.labelled
        return packed if len(packed) == len(labelled) else packed[labelled]

    def _before_each(self, rows: Tensor) -> Tensor:
        assert self.rows.before is not None
        return rows[self.rows.before]


def _joined(before: Tensor, packed: Tensor) -> Tensor:
    """(frames, B, C, h, w) and (p, C, h, w) -> (frames * B + p, C, h, w).

    Always channels last, whatever layout a checkpoint or a collective left the carry in: otherwise
    the convolutions that follow round differently.
    """
    parts = (before.flatten(0, 1), packed)
    return torch.cat([part.contiguous(memory_format=torch.channels_last) for part in parts])
