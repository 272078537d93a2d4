"""Explains errors of Hydra and OmegaConf in one line, with the remedy."""

import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from evspan.conf.errors import ConfigError, UserError
from evspan.conf.keys import is_text_list, keys_of_schema
from evspan.conf.omegaconf_adapter import root_of
from evspan.conf.quoting import quoted_list, split_list
from evspan.conf.schema.benchmark import BenchConfig
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.conf.text import quote_override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

LIBRARIES = ("hydra", "omegaconf", "antlr4")  # that composition errors come from
NOISE = (  # starts of lines that a user does not need
    "full_key:",
    "object_type=",
    "reference_type=",
    "See https://",
    "Config search path",
    "provider=",
)
MIN_SIMILARITY = 0.6  # difflib ratio below which a suggestion would confuse
MAX_SUGGESTIONS = 3
TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, such as [1,2]",
    dict: "a mapping, such as {0: 1}",
}
WORDS = {"training.batch_size": ", or auto"}  # that a key accepts beside its type


def is_composition_error(error: Exception) -> bool:
    """Whether Hydra or OmegaConf raised the error, and not the code of a config or a task."""
    if isinstance(error, UserError):
        return False
    # Some bad overrides end in a plain ValueError inside the library.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    modules = (type(error).__module__, raised_in)
    return any(module.split(".")[0] in LIBRARIES for module in modules)


def explain(error: Exception) -> str:
    """What is wrong with a config that could not be composed, and what to do."""
    text = str(error)
    cause: Any = error.__cause__ if error.__cause__ is not None else error
    kind = type(error).__name__
    if kind == "OverrideParseException":
        return _explain_grammar(getattr(error, "override", ""))
    if kind == "MissingConfigException" and "Could not find" in text:
        return _explain_missing_option(error)
    in_list = _explain_list_of_mappings(error)
    if in_list:
        return in_list
    unknown = re.match(r"Could not override '([^']*)'", text)
    if unknown and hasattr(cause, "parent_node"):
        return _explain_unknown_key(unknown[1], cause.parent_node)
    unread = re.match(r"In '([^']*)/([^'/]*)': .*Key '([^']*)' not in '", text, re.DOTALL)
    if unread:
        return _explain_unread_key(*unread.groups())
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'\n", text)
    if ambiguous:
        return _explain_ambiguous_value(ambiguous[1])
    if isinstance(cause, ValidationError):
        expected = _explain_wrong_value(cause)
        if expected:
            return expected
    return _explain_other(text, cause)


def refuse_unknown_keys(raw: DictConfig) -> None:
    """Refuse keys that no dataclass has, which `+key=value` adds and nothing reads.

    Raises:
        ConfigError: names the key, and the most similar known one.
    """
    for group in _groups(raw):
        type_ = OmegaConf.get_type(group.node)
        if not is_dataclass(type_):
            continue
        known = {field.name for field in fields(type_)}
        added = sorted({str(key) for key in group.node} - known)
        if added:
            key = f"{group.prefix}{added[0]}"
            raise ConfigError(_explain_unknown_key(key, raw, exclude=key))


def _explain_grammar(override: str) -> str:
    if "=" not in override:
        return f"{override!r} is not of the form key=value"
    name, value = override.split("=", 1)
    if value.startswith("[") or _is_list_of_texts(name.lstrip("+")):
        quoted = quoted_list(split_list(value.removeprefix("[").removesuffix("]")))
    else:
        quoted = quote_override(value.strip("'\""), '"')
    return (
        f"{override} cannot be read; a value with special characters needs quotes, for the shell "
        f"too: {shlex.quote(f'{name}={quoted}')}"
    )


def _is_list_of_texts(key: str) -> bool:
    """Whether the key of a command takes a list of texts."""
    schemas = (TrainConfig, EvaluateConfig, PrepConfig, BenchConfig)
    return any(is_text_list(keys_of_schema(schema).get(key)) for schema in schemas)


def _explain_unread_key(group: str, option: str, key: str) -> str:
    return (
        f"{group}={option} sets {key}, which this command does not read; choose another option "
        f"of {group} for it (a copy of conf/{group}/{option}.yaml without {key})"
    )


def _explain_ambiguous_value(override: str) -> str:
    name, _, value = override.partition("=")
    return (
        f"{override}: a list needs brackets, {shlex.quote(f'{name}=[{value}]')}; evspan sweep "
        "starts a training run for each value"
    )


def _explain_other(text: str, cause: Any) -> str:
    message = _without_noise(text)
    cause_message = _without_noise(str(cause))
    if cause_message not in message:
        message = f"{message}: {cause_message}"
    key = getattr(cause, "full_key", None)
    if key and key not in message:
        message = f"{message} ({key})"
    return f"{message}; --cfg job shows the config that is composed"


def _explain_list_of_mappings(error: Exception) -> str:
    """An unknown key in, or another value than, a mapping of a list; else an empty string."""
    cause: Any = error.__cause__
    unknown = re.match(r"Could not override '([^']*)'", str(error))
    type_ = getattr(cause, "object_type", None)
    if unknown and isinstance(type_, type) and is_dataclass(type_):
        key = str(cause.key)
        known = [field.name for field in fields(type_)]
        if key not in [*known, *unknown[1].split(".")]:
            suggestion = _suggestion(key, known) or f"; there are: {', '.join(known)}"
            return f"{unknown[1]}: an entry has no key {key!r}{suggestion}"
    wrong = re.search(
        r"override ([a-z_.]+?)(?:\.\d+[\w.]*)?=(.*?): Invalid type", f"{error}: {cause}", re.DOTALL
    )
    full_key = str(getattr(cause, "full_key", ""))
    if wrong and "is not a subclass of" in str(cause) and full_key.endswith("]"):
        return (
            f"{wrong[1]}={wrong[2]}: give a list of mappings, "
            f"'{wrong[1]}=[{{root: A}}, {{root: B, weight: 2}}]'"
        )
    return ""


def _without_noise(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE)).rstrip(".")


# -- keys ----------------------------------------------------------------------------------------
class _Group(NamedTuple):
    """A mapping inside a config. prefix: its path with a dot at the end; empty for the root."""

    prefix: str
    node: DictConfig


def _groups(node: DictConfig, prefix: str = "") -> Iterator[_Group]:
    """Every mapping in a config. Interpolations are not resolved, because they may be wrong."""
    yield _Group(prefix, node)
    for key in node:
        if not isinstance(key, str):  # a class map, whose values are numbers
            continue
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        child = node[key]
        if isinstance(child, DictConfig):
            yield from _groups(child, f"{prefix}{key}.")


def _explain_unknown_key(key: str, node: Any, exclude: str = "") -> str:
    known = [name for name in _known_keys(root_of(node)) if name != exclude]
    if not key.startswith("hydra"):
        known = [name for name in known if name.split(".")[0] != "hydra"]
        known += [path.name for path in _config_tree().iterdir() if path.is_dir()]
    if "." in key:  # the name of a group alone is no help then
        known = [name for name in known if "." in name]
    suggestion = _suggestion(key, known) or "; --cfg job lists the keys that there are"
    return f"there is no key {key!r}{suggestion}"


def _known_keys(root: Any) -> list[str]:
    names = []
    for group in _groups(root):
        names += [f"{group.prefix}{key!s}" for key in group.node]
    return names


def _suggestion(name: str, known: Sequence[str], form: str = "{}") -> str:
    """'; did you mean ...?' with the most similar of `known`, or an empty string."""
    similarities = {other: _similarity(name, other) for other in known}
    if not similarities:
        return ""
    threshold = max(MIN_SIMILARITY, max(similarities.values()) - 0.01)
    best = sorted(other for other, value in similarities.items() if value >= threshold)
    if not best:
        return ""
    options = " or ".join(form.format(other) for other in best[:MAX_SUGGESTIONS])
    return f"; did you mean {options}?"


def _similarity(name: str, known: str) -> float:
    """0 to 1. The last part of a dotted name counts most, because people leave out its group."""
    group, _, last = name.replace("/", ".").rpartition(".")
    known_group, _, known_last = known.replace("/", ".").rpartition(".")
    group_similarity = SequenceMatcher(None, group, known_group).ratio()
    if known_group and not group:
        group_similarity = 0.8
    return SequenceMatcher(None, last, known_last).ratio() * (0.7 + 0.3 * group_similarity)


# -- group options -------------------------------------------------------------------------------
def _config_tree() -> Path:
    return Path(str(resources.files("evspan.conf")))


def _explain_missing_option(error: Any) -> str:
    missing = str(error.missing_cfg_file)
    listed = re.search(r"Available options in '([^']*)'", str(error))
    group = listed[1] if listed else missing.split("/")[0]
    name = missing.removeprefix(f"{group}/")
    folder = _config_tree() / group
    shipped = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    options = sorted({*(error.options or ()), *shipped})
    suggestion = _suggestion(name, options, f"{group}={{}}") or "."
    return f"{group} has no option {name!r}{suggestion} There are: {', '.join(options)}"


# -- values --------------------------------------------------------------------------------------
def _explain_wrong_value(error: Any) -> str:
    """'training.max_steps is 'abc'; give a whole number', or an empty string for no known field."""
    known = fields(error.object_type) if is_dataclass(error.object_type) else ()
    matching = [field for field in known if field.name == error.key]
    if not matching or not error.full_key:
        return ""
    value = "null" if error.value is None else repr(error.value)
    return f"{error.full_key} is {value}; give {_expected_value(matching[0], error.full_key)}"


def _expected_value(field: Field[Any], key: str) -> str:
    type_: Any = get_origin(field.type) or field.type
    if isinstance(type_, type) and issubclass(type_, Enum):
        return f"one of {', '.join(member.name for member in type_)}"
    if is_dataclass(type_):
        keys = ", ".join(f"{key}.{child.name}" for child in fields(type_))
        return f"its keys one by one: {keys}"
    description = TYPE_NAMES.get(type_, str(field.type)) + WORDS.get(key, "")
    if field.default in (MISSING, ""):
        return description
    return f"{description} (default: {field.default})"
