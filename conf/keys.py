"""The keys of a config and their types, from its dataclass. Imports neither Hydra nor OmegaConf."""

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any


@cache
def keys_of_schema(schema: type) -> dict[str, Any]:
    """The keys with dots, `training.max_steps`, and their types."""
    return dict(_leaves(schema, ""))


def is_list(type_: Any) -> bool:
    """Whether a key of this type takes [a,b]."""
    return typing.get_origin(type_) is list


def is_text(type_: Any) -> bool:
    """Whether a key of this type takes text."""
    return type_ is str or (is_optional(type_) and str in typing.get_args(type_))


def is_text_list(type_: Any) -> bool:
    """Whether a key of this type takes a list of texts."""
    return is_list(type_) and typing.get_args(type_) == (str,)


def is_mapping_list(type_: Any) -> bool:
    """Whether a key of this type takes a list of mappings, [{a: 1}, {a: 2}]."""
    return is_list(type_) and is_dataclass(typing.get_args(type_)[0])


def is_text_mapping(type_: Any) -> bool:
    """Whether a key of this type takes a mapping to texts, {a: b}."""
    return typing.get_origin(type_) is dict and is_text(typing.get_args(type_)[1])


def is_text_map(type_: Any) -> bool:
    """Whether a key of this type takes a mapping of texts to values."""
    return typing.get_origin(type_) is dict and typing.get_args(type_)[0] is str


def is_optional(type_: Any) -> bool:
    """Whether a key of this type takes null."""
    is_union = typing.get_origin(type_) in (typing.Union, UnionType)
    return is_union and type(None) in typing.get_args(type_)


def _leaves(schema: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    types = typing.get_type_hints(schema)
    for field in fields(schema):
        type_ = types[field.name]
        if is_dataclass(type_):
            yield from _leaves(type_, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", type_
