"""Validates the manifest and the entries of shards before anything in them is used.

A manifest may be damaged, or come with shards of others: types and ranges of all values, names that
are no paths, shards inside the folder, counts and checksums that fit together.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import product
from typing import Any, get_args, get_origin

import xxhash
from evspan.conf.text import printable

MOST_NAME_BYTES = 255  # of a file name
MOST_CLASSES = 10_000
SHARD_PATH = re.compile(r"(train|val|test)/\d{5,9}\.h5", re.ASCII)
CHECKSUM = re.compile(r"[0-9a-f]{16}", re.ASCII)
MOST_COUNT = 1 << 40
MOST_PIXELS = 1 << 14
MOST_TIME = 1 << 62
# Smallest and largest value of an integer; others are from 0 to MOST_TIME.
RANGES = {
    "frames": (0, MOST_COUNT),
    "labelled_frames": (0, MOST_COUNT),
    "boxes": (0, MOST_COUNT),
    "ignore_regions": (0, MOST_COUNT),
    "height": (1, MOST_PIXELS),
    "width": (1, MOST_PIXELS),
    "sensor_height": (1, MOST_PIXELS),
    "sensor_width": (1, MOST_PIXELS),
    "first_us": (-MOST_TIME, MOST_TIME),
    "last_us": (-MOST_TIME, MOST_TIME),
    "source_mtime_ns": (-(1 << 63), (1 << 63) - 1),
}
DEFAULT_RANGE = (0, (1 << 63) - 1)
KINDS = {
    int: "an integer",
    str: "a string",
    dict: "an object",
    list: "an array",
    bool: "true or false",
    float: "a number",
}


def hash_config(config: Mapping[str, Any]) -> str:
    """xxh3-64 of a config, in hex."""
    return xxhash.xxh3_64_hexdigest(json.dumps(config, sort_keys=True).encode())


def name_problem(name: str) -> str:
    """Why a recording cannot have this name; empty: it can."""
    if not name:
        return "is empty"
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return "is no plain name"
    if len(name.encode("utf-8", "surrogatepass")) > MOST_NAME_BYTES:
        return f"is longer than {MOST_NAME_BYTES} bytes"
    return ""


def entry_problem(raw: object, entry_type: Any, *, in_part: bool = False) -> str:
    """What is wrong with a recording's entry; empty: nothing.

    Args:
        raw: the parsed JSON.
        entry_type: the dataclass of an entry.
        in_part: the entry of a part file, which names no shard.
    """
    if not isinstance(raw, dict):
        return "a recording is no object"
    problem = fields_problem(raw, entry_type) or _range_problem(raw)
    if problem:
        return f"{_place(raw)} {problem}"
    for key in ("name", "group"):
        problem = name_problem(raw[key])
        if problem:
            return f"{key} {printable(raw[key][:80])!r} {problem}"
    problem = _shard_problem(raw, in_part) or _count_problem(raw)
    return f"{_place(raw)} {problem}" if problem else ""


def _place(raw: Mapping[str, Any]) -> str:
    name = raw.get("name")
    return f"recording {printable(name[:80])!r}:" if isinstance(name, str) else "a recording:"


def fields_problem(raw: Mapping[str, Any], data_type: Any) -> str:
    """Fields that are missing, unknown, or of another type than the dataclass has."""
    known = {f.name: f for f in fields(data_type)}
    unknown = sorted(raw.keys() - known.keys())
    if unknown:
        return f"has the unknown key {printable(unknown[0][:80])!r}; a later version may have it"
    for name, field in known.items():
        if name not in raw:
            if _is_required(field):
                return f"lacks {name}"
            continue
        problem = _type_problem(raw[name], field.type)
        if problem:
            return f"{name} {problem}"
    return ""


def _is_required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _type_problem(value: object, kind: Any) -> str:
    container = get_origin(kind) or kind
    if container not in KINDS:
        return ""
    accepted: Any = (int, float) if container is float else container
    if not isinstance(value, accepted) or (isinstance(value, bool) and container is not bool):
        return f"is not {KINDS[container]}"
    items: list[object] = []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list):
        items = value
    item_kinds = get_args(kind)[-1:]
    for item, item_kind in product(items, item_kinds):
        problem = _type_problem(item, item_kind)
        if problem:
            return f"has a value that {problem}"
    return ""


def _range_problem(raw: Mapping[str, Any]) -> str:
    for name, value in raw.items():
        numbers = value.values() if isinstance(value, dict) else [value]
        low, high = RANGES.get(name, DEFAULT_RANGE)
        for number in numbers:
            is_count = isinstance(number, int) and not isinstance(number, bool)
            if is_count and not low <= number <= high:
                return f"{name} is {str(number)[:24]}, not {low} to {high}"
    return ""


def _shard_problem(raw: Mapping[str, Any], in_part: bool) -> str:
    if raw["split"] not in ("train", "val", "test"):
        return f"split is {printable(raw['split'][:80])!r}, not train, val or test"
    if in_part and not raw["shard"]:
        return ""
    match = SHARD_PATH.fullmatch(raw["shard"])
    if match is None or match[1] != raw["split"]:
        return (
            f"shard is {printable(raw['shard'][:80])!r}, not a file such as "
            f"{raw['split']}/00000.h5 inside the folder"
        )
    return ""


def _count_problem(raw: Mapping[str, Any]) -> str:
    if raw["labelled_frames"] > raw["frames"]:
        return f"has {raw['labelled_frames']} labelled frames of {raw['frames']}"
    if raw["boxes"] and not raw["labelled_frames"]:
        return f"has {raw['boxes']} boxes and no labelled frame"
    if raw.get("ignore_regions") and not raw["labelled_frames"]:
        return f"has {raw['ignore_regions']} ignore regions and no labelled frame"
    if raw["first_us"] > raw["last_us"]:
        return f"ends at {raw['last_us']} us, before its start at {raw['first_us']} us"
    per_class = raw.get("boxes_per_class")
    if per_class and sum(per_class.values()) != raw["boxes"]:
        return f"has {raw['boxes']} boxes, {sum(per_class.values())} over all classes"
    for name in ("source_xxh3", "boxes_xxh3", "frames_xxh3", "group_xxh3"):
        checksum = raw.get(name, "")
        if len(checksum) == 16 and not CHECKSUM.fullmatch(checksum):
            return f"{name} is {printable(checksum)!r}, no checksum"
    return ""


def recordings_problem(recordings: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    """What is wrong with valid entries together: doubles, classes that the dataset lacks."""
    keys: set[tuple[str, str]] = set()
    groups: set[tuple[str, str]] = set()
    for raw in recordings:
        key = (raw["split"], raw["name"])
        group = (raw["shard"], raw["group"])
        if key in keys:
            return f"{_place(raw)} is listed twice in {raw['split']}"
        if group in groups:
            return f"{_place(raw)} has the group {raw['group']!r} of {raw['shard']} with another"
        keys.add(key)
        groups.add(group)
        unknown = sorted(raw.get("boxes_per_class", {}).keys() - set(classes))
        if unknown:
            return f"{_place(raw)} has boxes of {printable(unknown[0][:80])!r}, which is no class"
    return ""


def config_problem(raw: Mapping[str, Any], config_hash: str) -> str:
    """What is wrong with the config of a manifest or a group.

    Args:
        raw: its `config`.
        config_hash: the checksum of the config; not 16 digits long: there is none.
    """
    frames = raw.get("frames")
    if not isinstance(frames, dict):
        return "config has no frames"
    if not isinstance(raw.get("dataset", {}), dict):
        return "config.dataset is no object"
    if len(config_hash) == 16 and hash_config(raw) != config_hash:
        return f"config has the checksum {hash_config(raw)} instead of {config_hash}"
    return ""


def classes_problem(classes: Sequence[str], config: Mapping[str, Any]) -> str:
    """What is wrong with the classes of a manifest."""
    if len(classes) > MOST_CLASSES:
        return f"has {len(classes)} classes, at most {MOST_CLASSES} are read"
    configured = config.get("dataset", {}).get("classes", list(classes))
    if configured != list(classes):
        return f"classes are {list(classes)}, its config has {configured}"
    return ""
