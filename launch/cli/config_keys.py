"""The config keys and group choices of each command, from the dataclasses and the files in conf/.

Neither Hydra nor torch is imported: the grammar check and the shell completion use it.
"""

import re
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import evspan.conf
from evspan.conf.keys import keys_of_schema


class Command(NamedTuple):
    """A command that has a config: the file conf/CONFIG.yaml and its dataclass."""

    config: str
    module: str
    schema: str


TRAIN = Command("train", "evspan.conf.schema.training", "TrainConfig")
COMMANDS = {
    "prep": Command("prep", "evspan.conf.schema.prep", "PrepConfig"),
    "train": TRAIN,
    "submit": TRAIN,
    "sweep": TRAIN,
    "evaluate": Command("evaluate", "evspan.conf.schema.training", "EvaluateConfig"),
    "bench": Command("bench", "evspan.conf.schema.benchmark", "BenchConfig"),
}


@cache
def keys_of(command: str) -> dict[str, Any]:
    """The keys with dots, `training.max_steps`, and their types.

    Args:
        command: one of COMMANDS.
    """
    from importlib import import_module

    schema: type = getattr(import_module(COMMANDS[command].module), COMMANDS[command].schema)
    return keys_of_schema(schema)


@cache
def choices_of(command: str) -> dict[str, list[str]]:
    """The groups that can be chosen, `experiment`, and their options, `gen4/base`, sorted.

    Args:
        command: one of COMMANDS.
    """
    tree = Path(evspan.conf.__path__[0])
    text = (tree / f"{COMMANDS[command].config}.yaml").read_text()
    groups = re.findall(r"^  - (\w+): ", text, re.MULTILINE)
    return {group: _options(tree / group) for group in groups}


def values_of(type_: Any) -> list[str]:
    """The values of a key of this type: true and false, or an enum's names; empty for others."""
    if type_ is bool:
        return ["true", "false"]
    if isinstance(type_, type) and issubclass(type_, Enum):
        return [member.name for member in type_]
    return []


def _options(group: Path) -> list[str]:
    files = sorted(group.rglob("*.yaml"))
    return [file.relative_to(group).with_suffix("").as_posix() for file in files]
