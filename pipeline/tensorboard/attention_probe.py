"""What the detector makes of the same few frames all along the training: detections, and where its attention looks."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.model.attention import (
    EventTemporalAttention,
    MultiScaleSpatialAttention,
    ScaleAwareChannelAttention,
)
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.postprocess import detections
from evspan.pipeline.weights import Weights, generator_states, restore_generators
from numpy.typing import NDArray
from torch import Tensor, nn

WATCHED = 4  # frames
SCALE = re.compile(r"scale_(\d+)")  # what the neck calls its scales, the finest is 0
MAPS = ("spatial", "motion")  # of what attention multiplies with, what has a place in the frame


@dataclass(frozen=True)
class Watched:
    """One labelled frame. boxes: shards.BOX. found: (k, 7), as RecordingResult's. maps: name -> (h, w) from 0 to 1, of cells of
    `strides[name]` pixels."""

    recording: str
    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray
    found: NDArray[np.float32]
    maps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    strides: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """frames: those watched. multipliers: "scale_0/spatial" -> values from 0 to 1, of all of them. gates: what those are
    multiplied with before they act."""

    frames: list[Watched]
    multipliers: dict[str, NDArray[np.float32]]
    gates: dict[str, float]


def choose_frames(
    data: Dataset, config: EvaluationConfig, count: int = WATCHED
) -> list[tuple[RecordingData, int]]:
    """Labelled frames with boxes that the protocol scores, spread over all that there are; the same ones at every call."""
    there = [
        (r, int(frame))
        for r in data.recordings
        for frame in np.flatnonzero(
            r.labelled & (np.diff(r.box_start) > 0) & (r.end_us > 1000 * config.skip_first_ms)
        )
    ]
    count = min(count, len(there))
    return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]


def look(weights: Weights, data: Dataset, config: EvaluationConfig, device: torch.device) -> Look:
    """A detector of its own looks, in eval mode, on weights that are whole: any ZeRO stage, and no trace in the training.

    Its state begins at zero `config.sequence_length` frames before each frame.
    """
    generators = generator_states()  # a detector that is built draws weights
    detector = detector_from(weights, device=device)
    restore_generators(generators)
    frames, multipliers = [], dict[str, list[Tensor]]()
    for recording, frame in choose_frames(data, config):
        with attention_of(detector) as told:
            frames.append(_watched(detector, data, recording, frame, config, told))
        for name, values in told.items():
            multipliers.setdefault(name, []).append(values[-1:].flatten())
    return Look(
        frames,
        {name: torch.cat(parts).cpu().numpy() for name, parts in multipliers.items()},
        {told: float(weights.tensors[name]) for name, told in gate_names(weights.tensors).items()},
    )


@torch.inference_mode()
def _watched(
    detector: Detector,
    data: Dataset,
    recording: RecordingData,
    frame: int,
    config: EvaluationConfig,
    told: dict[str, Tensor],
) -> Watched:
    device = next(detector.parameters()).device
    frames = recording.read(max(0, frame + 1 - config.sequence_length), frame + 1)
    labelled = torch.zeros(len(frames), 1, dtype=torch.bool)
    labelled[-1] = True
    state = detector.initial_state(1, data.height, data.width, device=device)
    raw, _ = detector(torch.from_numpy(frames[:, None]).to(device), state, labelled=labelled)
    (found,) = detections(
        detector.decode(raw, data.height, data.width),
        confidence_threshold=config.confidence_threshold,
        nms_threshold=config.nms_threshold,
    )
    maps = {
        name: values[-1, 0].cpu().numpy() for name, values in told.items() if name.endswith(MAPS)
    }
    strides = {
        name: detector.strides[int(name.partition("/")[0].removeprefix("scale_"))] for name in maps
    }
    return Watched(
        recording.name,
        int(recording.end_us[frame]),
        frames[-1],
        recording.boxes(frame),
        found.cpu().numpy(),
        maps,
        strides,
    )


@contextmanager
def attention_of(detector: Detector) -> Iterator[dict[str, Tensor]]:
    """While open, what attention multiplied features with in the last forward, from 0 to 1, before its gates.

    "scale_0/spatial", "scale_0/motion": (N, 1, h, w), "scale_0/temporal", "scale_0/channel": (N, C). Spatial attention sees
    the frames that are looked back at too; the last row is the same frame's in all. By hooks: who does not ask does not pay.
    """
    told: dict[str, Tensor] = {}
    handles = []

    def sigmoid_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, out: Tensor) -> None:
            told[name] = out.detach().sigmoid()

        return hook

    def motion_of(name: str) -> Callable[..., None]:
        def hook(module: EventTemporalAttention, given: tuple[Tensor, Tensor]) -> None:
            x, previous = (
                given  # forward folds this convolution into another one, so there is no output to listen to
            )
            told[name] = (
                module.motion_conv(torch.cat((x, previous[:, -1]), dim=1)).detach().sigmoid()
            )

        return hook

    for path, module in detector.fpn.named_modules():
        scale = next((part for part in path.split(".") if SCALE.fullmatch(part)), "")
        if isinstance(module, MultiScaleSpatialAttention):
            handles.append(
                module.attention_conv[-1].register_forward_hook(sigmoid_of(f"{scale}/spatial"))
            )
        elif isinstance(module, EventTemporalAttention):
            handles.append(module.register_forward_pre_hook(motion_of(f"{scale}/motion")))
            handles.append(
                module.temporal_fc.register_forward_hook(sigmoid_of(f"{scale}/temporal"))
            )
        elif isinstance(module, ScaleAwareChannelAttention):
            handles.append(module.fc.register_forward_hook(sigmoid_of(f"{scale}/channel")))
    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()


def gate_names(parameters: Iterable[str]) -> dict[str, str]:
    """Of the learned gates, which begin at 0: parameter name -> "scale_0/spatial", ".../temporal", "/integration", "/channel"."""
    told = {}
    for name in parameters:
        if name.startswith("fpn.") and name.endswith(".gate"):
            group, *path = name.split(".")[1:-1]
            part = "channel" if group == "scale_aware_attention_modules" else "integration"
            told[name] = "/".join((path[0], *(path[1:] or [part])))
    return told
