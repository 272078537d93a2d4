"""Checks what a program passes to a detector: one clear error, before any kernel reads it.

Only shapes, dtypes and devices are compared, on the host: a device is never waited for.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.pipeline.model.postprocess import DetectionLimits
from evspan.pipeline.model.state import DetectorState, state_tensors
from numpy.typing import NDArray
from torch import Tensor

Frames = Tensor | NDArray[np.uint8]


class InputError(UserError, ValueError):
    """Frames, state or thresholds that a detector cannot take."""


def as_frames(frames: Any, dims: str, device: torch.device) -> Tensor:
    """Frames as a tensor; those of numpy are copied to `device`.

    Args:
        frames: uint8, a tensor or an array.
        dims: names of its dims, such as 'B, channels, H, W'.

    Raises:
        InputError: another type, dtype or number of dims, or no frame at all.
    """
    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8:
            raise InputError(_wrong_dtype(frames.dtype))
        writable = frames if frames.flags.writeable and frames.flags.c_contiguous else frames.copy()
        frames = torch.from_numpy(writable).to(device)
    if not isinstance(frames, Tensor):
        raise InputError(
            f"frames are of type {type(frames).__name__}; pass a uint8 tensor or numpy array"
        )
    if frames.dtype != torch.uint8:
        raise InputError(_wrong_dtype(frames.dtype))
    if frames.dim() != len(dims.split(", ")) or not frames.numel():
        raise InputError(f"frames are {_shape(frames)}; pass ({dims}), none of them empty")
    return frames


def check_frames(frames: Tensor, channels: int, device: torch.device) -> None:
    """Checks frames (..., channels, H, W) against the detector's channels and device.

    Raises:
        InputError: they differ.
    """
    if frames.shape[-3] != channels:
        raise InputError(
            f"frames have {frames.shape[-3]} channels, and the detector was trained on {channels} "
            f"(2 polarities x {channels // 2} bins); make frames with bins={channels // 2}"
        )
    if frames.device != device:
        raise InputError(
            f"frames are on {frames.device}, and the detector is on {device}; move them: "
            f"frames.to('{device}')"
        )


def check_positive(**sizes: int) -> None:
    """Checks numbers of lanes and pixels.

    Raises:
        InputError: one is no whole number of 1 or more.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; pass a whole number, 1 or more")


def check_state(
    state: Any,
    shapes: Sequence[tuple[int, ...]],
    weight: Tensor,
    *,
    size: tuple[int, int, int],
) -> None:
    """Checks a state.

    Args:
        shapes: of its tensors, in the order of `state_tensors`.
        weight: of the detector; has the dtype and the device.
        size: lanes, height and width of the frames.

    Raises:
        InputError: it is for other frames, or of another dtype or device.
    """
    remedy = f"pass detector.initial_state{size}, or the last call's state for such frames"
    if not isinstance(state, DetectorState):
        raise InputError(f"the state is of type {type(state).__name__}; {remedy}")
    tensors = state_tensors(state)
    if len(tensors) != len(shapes):
        raise InputError(
            f"the state has {len(tensors)} tensors, and this detector's has {len(shapes)}: it is "
            f"of another detector; {remedy}"
        )
    lanes, height, width = size
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape:
            raise InputError(
                f"the state is for other frames: it has a tensor {_shape(tensor)}, and frames of "
                f"{plural(lanes, 'lane')}, {height} x {width} pixels, need {shape}; {remedy}"
            )
        if tensor.dtype != weight.dtype:
            raise InputError(
                f"the state is {_name(tensor.dtype)}, and the detector computes in "
                f"{_name(weight.dtype)}; {remedy}"
            )
        if tensor.device != weight.device:
            raise InputError(
                f"the state is on {tensor.device}, and the detector is on {weight.device}; {remedy}"
            )


def check_selection(
    starts: Tensor | None, labelled: Tensor | None, *, steps: int, lanes: int
) -> None:
    """Checks which lanes start, (lanes,) bool, and which frames are predicted, (T, lanes) bool.

    Raises:
        InputError: another shape or dtype.
    """
    for name, given, shape in (
        ("starts", starts, (lanes,)),
        ("labelled", labelled, (steps, lanes)),
    ):
        if given is not None and (given.dtype != torch.bool or tuple(given.shape) != shape):
            raise InputError(
                f"{name} is {_shape(given)} {_name(given.dtype)}; pass {shape} bool for {steps} x "
                f"{lanes} frames (time, lanes)"
            )


def limits_from(confidence_threshold: float, nms_threshold: float) -> DetectionLimits:
    """The thresholds of detections.

    Raises:
        InputError: one is no number from 0 to 1.
    """
    for name, value in (
        ("confidence_threshold", confidence_threshold),
        ("nms_threshold", nms_threshold),
    ):
        try:
            is_fraction = math.isfinite(value) and 0 <= value <= 1
        except TypeError:
            is_fraction = False
        if not is_fraction:
            raise InputError(f"{name} is {value!r}; pass a number from 0 to 1")
    return DetectionLimits(confidence_threshold, nms_threshold)


def _wrong_dtype(dtype: Any) -> str:
    return (
        f"frames are {_name(dtype)}; pass uint8, the counts of events as Evspan makes them, "
        "without scaling"
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
