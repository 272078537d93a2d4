"""The detector: recurrent backbone, neck, head. Reads as single-device code; where a sequence lies is the exchange's affair."""

import torch
from evspan.conf.schema.training import ModelConfig
from evspan.pipeline.model.backbone import Backbone
from evspan.pipeline.model.head import Geometry, YOLOXHead, decode
from evspan.pipeline.model.neck import ATTENDED_SCALES, YOLOPAFPN
from evspan.pipeline.model.postprocess import detections
from evspan.pipeline.model.sequence_protocol import Exchange, LocalExchange
from evspan.pipeline.model.state import DetectorState, StageState, forget_lanes
from torch import Tensor, nn


class Detector(nn.Module):
    """Frames (T, B, in_channels, H, W) uint8 and state in, raw predictions of the labelled frames and next state out.

    Parameter names are those of RVT's published checkpoints without their `mdl.` prefix.
    """

    def __init__(
        self, config: ModelConfig, in_channels: int, exchange: Exchange | None = None
    ) -> None:
        super().__init__()
        self.config, self.exchange = config, exchange or LocalExchange()
        self.backbone = Backbone(config.backbone, in_channels)
        fpn, dims = config.fpn, [config.backbone.dims[s - 1] for s in config.fpn.in_stages]
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

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(Backbone.strides[s - 1] for s in self.config.fpn.in_stages)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that frames are zero-padded to, right and below: multiples of 32 * partition_split_32."""
        return self.backbone.input_size(height, width)

    def geometry(self, height: int, width: int) -> Geometry:
        """Per scale (h, w, stride) for frames of this size."""
        padded = self.input_size(height, width)
        return tuple((padded[0] // s, padded[1] // s, s) for s in self.strides)

    def initial_state(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DetectorState:
        """Zeros for `batch` lanes of frames (height, width)."""
        padded, dims, kind = (
            self.input_size(height, width),
            self.config.backbone.dims,
            {"device": device, "dtype": dtype},
        )

        def zeros(*lead: int, stage: int) -> Tensor:
            stride = Backbone.strides[stage]
            return torch.zeros(*lead, dims[stage], padded[0] // stride, padded[1] // stride, **kind)  # type: ignore[arg-type]

        stages = tuple(StageState(zeros(batch, stage=s), zeros(batch, stage=s)) for s in range(4))
        back = self.config.fpn.looks_back
        attended = self.config.fpn.in_stages[:ATTENDED_SCALES] if back else []
        return DetectorState(stages, tuple(zeros(back, batch, stage=s - 1) for s in attended))

    def forward(
        self,
        frames: Tensor,
        state: DetectorState,
        *,
        starts: Tensor | None = None,
        labelled: Tensor | None = None,
    ) -> tuple[Tensor, DetectorState]:
        """
        Args:
            frames: (T, B, in_channels, H, W) uint8. starts: (B,) bool, lanes whose state begins at zero; None: no lane.
            labelled: (T, B) bool, frames that predictions are wanted of; none at all is fine. None: all frames. Best on the
                CPU, wherever the frames are: how many it marks must be known there, and asking a GPU would wait for it.
        Returns:
            (n, cells, 5 + classes) raw predictions of the n labelled frames in (t, b) order, and the next state.
        """
        if starts is not None:
            state = forget_lanes(state, starts)
        features, stages = self.backbone(frames, state.stages, self.exchange)
        chosen = [features[s - 1].flatten(0, 1) for s in self.config.fpn.in_stages]
        frames_back, mixed = self.config.fpn.looks_back, self.config.fpn.mix_lanes
        if labelled is None:
            look_back: _AllFrames | _LookBack = _AllFrames(
                frames.shape[1], state.previous, frames_back, self.exchange, mixed
            )
        else:
            look_back = _LookBack(
                labelled, state.previous, frames_back, self.exchange, frames.device, mixed
            )
            chosen = [f[look_back.needed] for f in chosen]
        return self.yolox_head(self.fpn(chosen, look_back)), DetectorState(
            stages, tuple(look_back.carry)
        )

    def step(self, frames: Tensor, state: DetectorState) -> tuple[Tensor, DetectorState]:
        """One frame of every lane.

        Args:
            frames: (B, 2 * bins, H, W) uint8. state: of `initial_state`, or what the step before returned.
        Returns:
            (B, cells, 5 + classes): cx, cy, w, h in pixels of the frames, objectness, class scores; cells ordered by scale,
            finest first, then row-major. And the next state.
        """
        raw, state = self(frames[None], state)
        return self.decode(raw, *frames.shape[-2:]), state

    def detect(
        self,
        frames: Tensor,
        state: DetectorState,
        *,
        confidence_threshold: float | None = None,
        nms_threshold: float | None = None,
    ) -> tuple[list[Tensor], DetectorState]:
        """`step`, then thresholds and non-maximum suppression per class; thresholds are the model config's unless given.

        Returns:
            per lane (k, 7): x1, y1, x2, y2 in pixels of the frames, objectness, class score, class id; the surest first.
            And the next state.
        """
        decoded, state = self.step(frames, state)
        config = self.config.postprocess
        confidence = (
            config.confidence_threshold if confidence_threshold is None else confidence_threshold
        )
        nms = config.nms_threshold if nms_threshold is None else nms_threshold
        return detections(decoded, confidence_threshold=confidence, nms_threshold=nms), state

    def decode(self, raw: Tensor, height: int, width: int) -> Tensor:
        """(n, cells, 5 + classes): cx, cy, w, h in pixels of the frames (height, width), objectness, class scores."""
        return decode(raw, self.geometry(height, width))


class _AllFrames:
    """The frames before each frame, where predictions are wanted of all: no indexing, so that it exports and compiles."""

    def __init__(
        self, lanes: int, carried: tuple[Tensor, ...], frames: int, exchange: Exchange, mixed: bool
    ) -> None:
        self.lanes, self.carried, self.frames, self.exchange, self.mixed = (
            lanes,
            carried,
            frames,
            exchange,
            mixed,
        )
        self.carry: list[Tensor] = []

    def __call__(self, scale: int, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        if scale >= len(self.carried):
            return packed, None
        carried, shape = self.carried[scale], (-1, self.lanes, *packed.shape[1:])
        tail = _rows(carried, packed).view(shape)[-self.frames :]
        before, carry = self.exchange.previous(tail, carried)
        self.carry.append(carry)
        rows, count = _rows(before, packed), len(packed)
        if self.mixed:
            rows = rows.view(-1, *shape[1:]).roll(-1, 1).flatten(0, 1)
        return packed, torch.stack(
            [rows[k * self.lanes : k * self.lanes + count] for k in range(self.frames)], dim=1
        )


class _LookBack:
    """Which frames the neck needs, and where each labelled frame finds the ones before it.

    The neck runs on the labelled frames, the frames temporal attention looks back at, and the chunk's last ones, which the
    next chunk looks back at: the same frames, and so the same BatchNorm statistics, however many ranks share the chunk. A
    rank's last frames that nobody looks back at are not among them; what it then hands on in their place is not looked at
    either. They are packed into one batch in (t, b) order; earlier ones come from the exchange.
    """

    def __init__(
        self,
        labelled: Tensor,
        carried: tuple[Tensor, ...],
        frames: int,
        exchange: Exchange,
        device: torch.device,
        mixed: bool,
    ) -> None:
        self.frames, self.carried, self.exchange = frames, carried, exchange
        self.carry: list[Tensor] = []
        steps, lanes = labelled.shape
        ahead = torch.cat((labelled, exchange.following(labelled, frames))) if frames else labelled
        needed = labelled.clone()
        for k in range(1, frames + 1):
            needed |= ahead[k : k + steps].roll(
                int(mixed), 1
            )  # of the lane whose frames the one before it looks back at
        places = labelled.flatten().nonzero()[:, 0]
        rows_needed = needed.flatten().nonzero()[:, 0] if frames else places
        # Row of every frame, the `frames` before the chunk first, in (those before ++ the packed ones).
        before = torch.arange(frames * lanes, device=labelled.device)
        row = torch.cat((before, needed.flatten().cumsum(0) - 1 + frames * lanes))
        looked_at = places // lanes * lanes + (places + 1) % lanes if mixed else places
        rows_before = (
            torch.stack([row[looked_at + k * lanes] for k in range(frames)], 1) if frames else None
        )
        wanted = row[places + frames * lanes] - frames * lanes
        self.needed, self.wanted = (
            rows_needed.to(device, non_blocking=True),
            wanted.to(device, non_blocking=True),
        )
        self.last = row[steps * lanes :].to(device, non_blocking=True)
        self.rows_before = (
            None if rows_before is None else rows_before.to(device, non_blocking=True)
        )

    def __call__(self, scale: int, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        if scale >= len(self.carried) or self.rows_before is None:
            return packed if len(packed) == len(self.wanted) else packed[self.wanted], None
        carried = self.carried[scale]
        tail = _rows(carried, packed)[self.last].view(carried.shape)
        before, carry = self.exchange.previous(tail, carried)
        self.carry.append(carry)
        return packed[self.wanted], _rows(before, packed)[self.rows_before]


def _rows(before: Tensor, packed: Tensor) -> Tensor:
    # One layout whatever the carry went through (a checkpoint, a collective): the same bits come out of what follows.
    parts = (before.flatten(0, 1), packed)
    return torch.cat([part.contiguous(memory_format=torch.channels_last) for part in parts])
