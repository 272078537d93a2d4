"""Records detections and attention maps on the same few evaluation frames throughout training."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.evaluation.frames import large_enough
from evspan.pipeline.inference.streaming import of_named_classes
from evspan.pipeline.inference.trained_detector import TrainedDetector, detector_from
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
from torch.utils.hooks import RemovableHandle

NUM_FRAMES = 4
SCALE = re.compile(r"scale_(\d+)")  # the neck's name of a scale; scale_0 is the finest
MAPS = ("spatial", "motion")  # the multipliers that have a value per cell


@dataclass(frozen=True)
class ProbeFrame:
    """One labelled frame with its detections and attention maps.

    frame: (2 * bins, H, W) uint8. end_us: end of its window, in microseconds. boxes: shards.BOX.
    detections: (k, 7) float32 x1, y1, x2, y2 (pixels of the frame), objectness, class score, class
    id. maps: "scale_0/spatial" -> (h, w) float32 from 0 to 1. strides: of each map, in pixels per
    cell.
    """

    recording: str
    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray[np.void]
    detections: NDArray[np.float32]
    maps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    strides: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeResult:
    """The detector's output on the probe frames.

    multipliers: "scale_0/spatial" -> (n,) values from 0 to 1, of all frames.
    gates: "scale_0/spatial" -> the gate that scales these multipliers.
    """

    frames: list[ProbeFrame]
    multipliers: dict[str, NDArray[np.float32]]
    gates: dict[str, float]


def choose_frames(
    data: Dataset, config: EvaluationConfig, count: int = NUM_FRAMES
) -> list[tuple[RecordingData, int]]:
    """Labelled frames with boxes that the protocol scores, evenly spaced; the same at every call.

    Args:
        config: from `protocol_of`.

    Returns:
        At most `count` pairs of a recording and the index of a frame.
    """
    candidates = []
    for recording in data.recordings:
        boxes, frame_of_box = recording.all_boxes()
        is_scored = large_enough(boxes["w"], boxes["h"], config)
        has_boxes = np.zeros(recording.frames, bool)
        has_boxes[frame_of_box[is_scored]] = True
        is_late = recording.end_us > 1000 * config.skip_first_ms
        for frame in np.flatnonzero(recording.labelled & has_boxes & is_late):
            candidates.append((recording, int(frame)))
    count = min(count, len(candidates))
    return [candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)]


def probe(
    weights: Weights, data: Dataset, config: EvaluationConfig, device: torch.device
) -> ProbeResult:
    """Runs a detector with these weights on the probe frames, in eval mode.

    It is built for the purpose: the weights are whole at every ZeRO stage, and training is not
    affected. Its state is zero `config.sequence_length` frames before each probe frame.
    """
    generators = generator_states()  # building a detector draws random weights
    detector = detector_from(weights, device=device, precision=config.precision)
    restore_generators(generators)
    frames = []
    parts: dict[str, list[Tensor]] = {}
    for recording, index in choose_frames(data, config):
        with record_attention(detector) as multipliers:
            frames.append(_probe_frame(detector, data, recording, index, config, multipliers))
        for name, values in multipliers.items():
            parts.setdefault(name, []).append(values[-1:].flatten())
    return ProbeResult(
        frames,
        multipliers={name: torch.cat(values).cpu().numpy() for name, values in parts.items()},
        gates={
            name: float(weights.tensors[parameter])
            for parameter, name in gate_names(weights.tensors).items()
        },
    )


@torch.inference_mode()
def _probe_frame(
    detector: TrainedDetector,
    data: Dataset,
    recording: RecordingData,
    index: int,
    config: EvaluationConfig,
    multipliers: dict[str, Tensor],
) -> ProbeFrame:
    """Runs the detector on the frames up to `index`; its hooks fill `multipliers`."""
    device = next(detector.parameters()).device
    frames = recording.read(max(0, index + 1 - config.sequence_length), index + 1)
    labelled = torch.zeros(len(frames), 1, dtype=torch.bool)
    labelled[-1] = True
    state = detector.initial_state(1, data.height, data.width, device=device)
    raw, _ = detector(torch.from_numpy(frames[:, None]).to(device), state, labelled=labelled)
    (rows,) = detections(
        detector.decode(raw, data.height, data.width),
        confidence_threshold=config.confidence_threshold,
        nms_threshold=config.nms_threshold,
    )
    maps = {
        name: values[-1, 0].cpu().numpy()
        for name, values in multipliers.items()
        if name.endswith(MAPS)
    }
    return ProbeFrame(
        recording.name,
        int(recording.end_us[index]),
        frames[-1],
        recording.boxes(index),
        of_named_classes(rows.cpu().numpy(), data.classes),
        maps,
        strides={name: detector.strides[_scale_index(name)] for name in maps},
    )


def _scale_index(name: str) -> int:
    """scale_2/spatial -> 2."""
    return int(name.partition("/")[0].removeprefix("scale_"))


@contextmanager
def record_attention(detector: Detector) -> Iterator[dict[str, Tensor]]:
    """While open, records what attention multiplies features with, before its gates, in float32.

    Hooks record it, so a forward outside of this context does no additional work.

    Yields:
        The multipliers of the last forward, from 0 to 1. "scale_0/spatial" and "scale_0/motion":
        (n, 1, h, w); "scale_0/temporal" and "scale_0/channel": (n, C). Spatial attention also runs
        on the frames that temporal attention looks back at, so n differs; the last row is the last
        frame in each of them.
    """
    multipliers: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for path, module in detector.fpn.named_modules():
        scale = next((part for part in path.split(".") if SCALE.fullmatch(part)), "")
        handles += _attention_hooks(module, scale, multipliers)
    try:
        yield multipliers
    finally:
        for handle in handles:
            handle.remove()


def _attention_hooks(
    module: nn.Module, scale: str, multipliers: dict[str, Tensor]
) -> list[RemovableHandle]:
    """Hooks that record the multipliers of an attention block; [] for other modules."""

    def record_sigmoid_of(layer: nn.Module, name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            multipliers[f"{scale}/{name}"] = output.detach().float().sigmoid()

        return layer.register_forward_hook(hook)

    if isinstance(module, MultiScaleSpatialAttention):
        return [record_sigmoid_of(module.attention_conv[-1], "spatial")]
    if isinstance(module, EventTemporalAttention):
        motion = module.register_forward_pre_hook(_motion_hook(f"{scale}/motion", multipliers))
        return [motion, record_sigmoid_of(module.temporal_fc, "temporal")]
    if isinstance(module, ScaleAwareChannelAttention):
        return [record_sigmoid_of(module.fc, "channel")]
    return []


def _motion_hook(name: str, multipliers: dict[str, Tensor]) -> Callable[..., None]:
    """Computes the motion map again: forward folds its convolution into another one."""

    def hook(module: EventTemporalAttention, args: tuple[Any, ...]) -> None:
        x, previous = args
        pair = torch.cat((x, previous[:, -1]), dim=1)
        multipliers[name] = module.motion_conv(pair).detach().float().sigmoid()

    return hook


def gate_names(parameters: Iterable[str]) -> dict[str, str]:
    """Names of the learned attention gates in the charts, by parameter name.

    Returns:
        "fpn....gate" -> "scale_0/spatial", ".../temporal", ".../integration" or ".../channel".
    """
    names = {}
    for parameter in parameters:
        if parameter.startswith("fpn.") and parameter.endswith(".gate"):
            group, scale, *path = parameter.split(".")[1:-1]
            is_channel = group == "scale_aware_attention_modules"
            part = "channel" if is_channel else "integration"
            names[parameter] = "/".join((scale, *(path or [part])))
    return names
