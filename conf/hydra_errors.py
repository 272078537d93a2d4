"""Errors of Hydra and OmegaConf as one line that says what to do; neither is imported unless it raised one."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

from evspan.conf.errors import ConfigError

NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "See https://",
    "Config search path",
    "provider=",
)
SIMILAR = 0.6  # of difflib's ratio: below it a suggestion would puzzle
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, such as [1,2]",
    dict: "a mapping, such as {0: 1}",
}


def explain(error: Exception) -> str:
    """What is wrong with a config that could not be composed, and what to do."""
    text, cause = str(error), error.__cause__ if error.__cause__ is not None else error
    kind = type(error).__name__
    if kind == "OverrideParseException":
        return _unreadable(getattr(error, "override", ""))
    if kind == "MissingConfigException" and "Could not find" in text:
        return _missing_option(error)
    if (key := re.match(r"Could not override '([^']*)'", text)) and hasattr(cause, "parent_node"):
        return _unknown_key(key[1], cause.parent_node)
    if unread := re.match(r"In '([^']*)/([^'/]*)': .*Key '([^']*)' not in '", text, re.DOTALL):
        group, option, key = unread.groups()
        return (
            f"{group}={option} sets {key}, which this command does not read; choose another option "
            f"of {group} for it (a copy of conf/{group}/{option}.yaml without {key})"
        )
    if argument := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        name = argument[1].split("=")[0]
        return f"{argument[1]}: a list needs brackets, {name}=[a,b], and text with a comma quotes, '{name}=\"a,b\"'"
    if type(cause).__name__ == "ValidationError" and (told := _wrong_value(cause)):
        return told
    told = _plain(text)
    if cause is not error and _plain(str(cause)) not in told:
        told = f"{told}: {_plain(str(cause))}"
    place = getattr(cause, "full_key", None)
    return f"{told}{f' ({place})' if place and place not in told else ''}; --cfg job shows the config that is composed"


def refuse_unknown_keys(raw: Any) -> None:
    """`+key=value` would add a key that nothing reads.

    raw: the composed config, a DictConfig.
    Raises:
        ConfigError: a config holds a key that its dataclass does not have.
    """
    for path, node in _groups(raw):
        type_ = node._metadata.object_type
        if is_dataclass(type_) and (
            added := sorted(set(map(str, node)) - {f.name for f in fields(type_)})
        ):
            raise ConfigError(_unknown_key(f"{path}{added[0]}", raw, leave_out=f"{path}{added[0]}"))


def _plain(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE)).rstrip(".")


def _unreadable(override: str) -> str:
    if "=" not in override:
        return f"{override!r} is not of the form key=value"
    name, value = override.split("=", 1)
    quoted = value.strip("'\"").replace('"', "")
    return f"{override} cannot be read; a value with special characters needs quotes, for the shell too: '{name}=\"{quoted}\"'"


# -- keys --------------------------------------------------------------------------------------------------------
def _groups(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every mapping in a DictConfig, with its path (ending in a dot). Nothing is resolved: interpolations may not."""
    yield path, node
    for key in node:
        child = node._get_node(key)
        if (
            hasattr(child, "keys")
            and not child._is_none()
            and not child._is_missing()
            and not child._is_interpolation()
        ):
            yield from _groups(child, f"{path}{key}.")


def _unknown_key(key: str, node: Any, leave_out: str = "") -> str:
    root = node
    while root._get_parent() is not None:
        root = root._get_parent()
    keys = [
        f"{path}{name}"
        for path, group in _groups(root)
        for name in group
        if f"{path}{name}" != leave_out
    ]
    if not key.startswith("hydra"):
        keys = [k for k in keys if k.split(".")[0] != "hydra"] + [
            p.name for p in _config_tree().iterdir() if p.is_dir()
        ]
    if "." in key:  # a group would be no help
        keys = [k for k in keys if "." in k]
    return f"there is no key {key!r}{_did_you_mean(key, keys) or '; --cfg job lists the keys that there are'}"


def _did_you_mean(wanted: str, known: list[str], form: str = "{}") -> str:
    """'; did you mean ...?' with the nearest of `known`, or nothing. The last part counts most: people leave out its group."""

    def likeness(name: str) -> float:
        (group, _, last), (known_group, _, known_last) = (
            n.replace("/", ".").rpartition(".") for n in (wanted, name)
        )
        place = (
            0.8 if known_group and not group else SequenceMatcher(None, group, known_group).ratio()
        )
        return SequenceMatcher(None, last, known_last).ratio() * (0.7 + 0.3 * place)

    ranked = sorted(
        ((likeness(name), name) for name in set(known)), key=lambda pair: (-pair[0], pair[1])
    )
    best = [name for value, name in ranked if value >= max(SIMILAR, ranked[0][0] - 0.01)][:3]
    return f"; did you mean {' or '.join(form.format(name) for name in best)}?" if best else ""


# -- group options -----------------------------------------------------------------------------------------------
def _config_tree() -> Path:
    return Path(str(resources.files("evspan.conf")))


def _missing_option(error: Any) -> str:
    missing = str(error.missing_cfg_file)
    listed = re.search(r"Available options in '([^']*)'", str(error))
    group = listed[1] if listed else missing.split("/")[0]
    name = missing.removeprefix(f"{group}/")
    shipped = _config_tree() / group
    options = sorted(
        {
            *(error.options or ()),
            *(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml")),
        }
    )
    return f"{group} has no option {name!r}{_did_you_mean(name, options, f'{group}={{}}') or '.'} There are: {', '.join(options)}"


# -- values ------------------------------------------------------------------------------------------------------
def _wrong_value(error: Any) -> str | None:
    """'training.max_steps is 'abc'; give a whole number', where the key's dataclass tells what it takes."""
    known = fields(error.object_type) if is_dataclass(error.object_type) else ()
    field_ = next((f for f in known if f.name == error.key), None)
    if field_ is None or not error.full_key:
        return None
    value = "null" if error.value is None else repr(error.value)
    return f"{error.full_key} is {value}; give {_wanted(field_, error.full_key)}"


def _wanted(field_: Field, key: str) -> str:
    type_ = get_origin(field_.type) or field_.type
    if isinstance(type_, type) and issubclass(type_, Enum):
        return f"one of {', '.join(member.name for member in type_)}"
    if is_dataclass(type_):
        return f"its keys one by one: {', '.join(f'{key}.{f.name}' for f in fields(type_))}"
    default = "" if field_.default in (MISSING, "") else f" (default: {field_.default})"
    return f"{KINDS.get(type_, str(field_.type))}{default}"  # type: ignore[arg-type]
