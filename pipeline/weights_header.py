"""Checks the header of a weights file before a tensor is read or a model is built.

The header comes with the file, so it may be of any content. What it says is compared with the
tensors that the file has: a model is never larger than its file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    PostprocessConfig,
)

MOST_TENSORS = 100_000
MOST_CLASSES = 10_000
MOST_TEXT = 1_000  # characters of a name
MOST_ITEMS = 64  # of a list in a config
MOST_NUMBER = 2**31
MOST_PARTITIONS = 64  # attention windows per side, which no tensor shows
DTYPES = ("F64", "F32", "F16", "BF16", "I64")  # of safetensors; I64: BatchNorm's counters
FIRST_LAYER = "backbone.stages.0.downsample_cf2cl.conv.weight"  # (embed_dim, channels, 7, 7)

Shape = tuple[int, ...]
Config = TypeVar("Config")


class HeaderError(UserError, ValueError):
    """The header is no description of the tensors; the message is a part of a sentence."""


def check_tensors(shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> None:
    """Checks number and dtypes of the tensors in a file.

    Args:
        dtypes: as safetensors names them.

    Raises:
        HeaderError: there are too many, or one is neither float nor a counter.
    """
    if len(shapes) > MOST_TENSORS:
        raise HeaderError(f"{len(shapes)} tensors, at most {MOST_TENSORS} are read")
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise HeaderError(f"the tensor {name[:80]!r} is {dtype}; weights are floats")


def model_from(values: Any) -> ModelConfig:
    """A model config from its JSON values.

    Raises:
        HeaderError: a value is missing, of another type or out of range.
    """
    parts = _object(values, "model")
    try:
        return ModelConfig(
            backbone=_config(BackboneConfig, parts.get("backbone"), "model.backbone"),
            fpn=_config(FpnConfig, parts.get("fpn"), "model.fpn"),
            head=_config(HeadConfig, parts.get("head"), "model.head"),
            postprocess=_config(PostprocessConfig, parts.get("postprocess"), "model.postprocess"),
        )
    except (UserError, TypeError, ZeroDivisionError) as error:  # of __post_init__
        raise HeaderError(str(error)) from error


def frames_from(values: Any) -> FrameConfig:
    """A frame config from its JSON values.

    Raises:
        HeaderError: a value is missing, of another type or out of range.
    """
    try:
        return _config(FrameConfig, values, "frames")
    except (UserError, TypeError, ZeroDivisionError) as error:
        raise HeaderError(str(error)) from error


def classes_from(values: Any) -> list[str]:
    """Names of classes.

    Raises:
        HeaderError: it is no list of names, or a long one.
    """
    if not isinstance(values, list) or len(values) > MOST_CLASSES:
        raise HeaderError(f"classes is no list of at most {MOST_CLASSES} names")
    for name in values:
        if not isinstance(name, str) or len(name) > MOST_TEXT:
            raise HeaderError(f"a class is no name of at most {MOST_TEXT} characters")
    return values


def step_from(value: Any) -> int:
    """The step.

    Raises:
        HeaderError: it is no whole number from 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise HeaderError(f"step is {str(value)[:40]}, no whole number from 0")
    return value


def check_sizes(model: ModelConfig, frames: FrameConfig, shapes: Mapping[str, Shape]) -> None:
    """Checks that the model is no larger than the tensors, before it is built.

    Raises:
        HeaderError: it is.
    """
    backbone = model.backbone
    first = shapes.get(FIRST_LAYER, ())
    if first and first[0] != backbone.embed_dim:
        raise HeaderError(
            f"model.backbone.embed_dim is {backbone.embed_dim}, and the first layer has {first[0]}"
        )
    largest = max((max(shape) for shape in shapes.values() if shape), default=0)
    layers = {
        "model.backbone.num_blocks": sum(backbone.num_blocks),
        "model.fpn.depth": math.ceil(3 * model.fpn.depth),
    }
    widths = {
        "model.backbone.embed_dim": max(backbone.dims),
        "model.backbone.mlp_ratio": backbone.mlp_ratio * max(backbone.dims),
        "model.head.num_classes": model.head.num_classes,
    }
    if model.fpn.looks_back:
        widths["model.fpn.temporal_window"] = model.fpn.temporal_window
    for name, number in layers.items():
        if number > len(shapes):
            raise HeaderError(f"{name} needs {number} layers, and there are {len(shapes)} tensors")
    for name, number in widths.items():
        if number > largest:
            raise HeaderError(f"{name} needs width {number}, and the widest tensor has {largest}")
    smallest = [*backbone.dim_multiplier, *backbone.num_blocks, backbone.mlp_ratio]
    if min(smallest) < 1 or model.fpn.depth < 0 or backbone.dim_head < 1:
        raise HeaderError("the model has a layer of no width, or no layers")
    if backbone.partition_split_32 > MOST_PARTITIONS:
        raise HeaderError(
            f"model.backbone.partition_split_32 is {backbone.partition_split_32}, at most "
            f"{MOST_PARTITIONS}"
        )
    if first and len(first) > 1 and first[1] != frames.channels:
        raise HeaderError(f"frames.bins is {frames.bins}, and the first layer is {first}")


# -- values of a dataclass -------------------------------------------------------------------------
def _object(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise HeaderError(f"{place} is no object")
    return values


def _config(kind: type[Config], values: Any, place: str) -> Config:
    """A dataclass of values whose types are checked."""
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # any dataclass
    typed = {}
    for name, value in _object(values, place).items():
        if name not in names:
            raise HeaderError(f"{place}.{name[:80]} is no key of this version")
        typed[name] = _typed(hints[name], value, f"{place}.{name}")
    return kind(**typed)


def _typed(hint: Any, value: Any, place: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        if not isinstance(value, str) or value not in hint.__members__:
            raise HeaderError(
                f"{place} is {str(value)[:40]}, none of {', '.join(hint.__members__)}"
            )
        return hint[value]
    if hint == list[int]:
        return _numbers(value, place)
    allowed = (int, float) if hint is float else hint
    is_wrong_bool = isinstance(value, bool) and hint is not bool
    if is_wrong_bool or not isinstance(value, allowed):
        raise HeaderError(f"{place} is of type {type(value).__name__}")
    if isinstance(value, int | float) and not -MOST_NUMBER <= value <= MOST_NUMBER:
        raise HeaderError(f"{place} is {str(value)[:40]}")  # NaN too
    if isinstance(value, str) and len(value) > MOST_TEXT:
        raise HeaderError(f"{place} has {len(value)} characters")
    return value


def _numbers(value: Any, place: str) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > MOST_ITEMS:
        raise HeaderError(f"{place} is no list of at most {MOST_ITEMS} numbers")
    return [_typed(int, item, place) for item in value]
