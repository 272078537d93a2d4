"""Every key of every config is read somewhere: none is accepted that does nothing."""

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from evspan.conf.schema.benchmark import BenchConfig
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig

ROOT = Path(__file__).parents[2]
LAYERS = ("conf", "data_prep", "pipeline", "launch")
COMMANDS = (TrainConfig, EvaluateConfig, PrepConfig, BenchConfig)


class Key(NamedTuple):
    """A key of a config, with the class that declares it."""

    schema: type
    group: str  # the key that holds the class, "" for a command
    name: str


class Read(NamedTuple):
    """An attribute that some code reads: `owner.name`. schema: the owner's annotation, "" without one."""

    owner: str
    schema: str
    name: str


def keys_of(schema: type, group: str = "") -> Iterator[Key]:
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default_factory):
            yield from keys_of(field.default_factory, field.name)
        else:
            yield Key(schema, group, field.name)


class Reads(ast.NodeVisitor):
    """Collects the attributes that a file reads, outside the checks of the schema itself."""

    def __init__(self) -> None:
        self.reads: set[Read] = set()
        self.strings: set[str] = set()
        self.annotations: dict[str, str] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self.annotations
        self.annotations = {**outer, "self": node.name}
        self.generic_visit(node)
        self.annotations = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "__post_init__":
            return
        outer = self.annotations
        arguments = [*node.args.args, *node.args.kwonlyargs]
        annotated = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
        self.annotations = {**outer, **annotated}
        self.generic_visit(node)
        self.annotations = outer

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = ast.unparse(node.value)
        schema = self.annotations.get(owner, "")
        self.reads.add(Read(owner.split(".")[-1], schema, node.attr))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.strings.add(node.value)


def reads_of(*sources: str) -> Reads:
    visitor = Reads()
    for source in sources:
        visitor.visit(ast.parse(source))
    return visitor


def is_read(key: Key, found: Reads, shared: set[str]) -> bool:
    """Whether `found` holds a read of `key`. A name that several classes share needs its own group or class."""
    reads = [read for read in found.reads if read.name == key.name]
    if any(read.owner == key.group or read.schema == key.schema.__name__ for read in reads):
        return True
    if key.name != "name" and key.name in found.strings:  # getattr(config, name) for several names
        return True
    return bool(reads) and key.name not in shared


ALL_KEYS = sorted({key for command in COMMANDS for key in keys_of(command)}, key=str)


@pytest.fixture(scope="module")
def product() -> Reads:
    paths = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    return reads_of(*(path.read_text() for path in paths))


def shared_names() -> set[str]:
    counts = Counter(name for _, name in {(key.schema, key.name) for key in ALL_KEYS})
    return {"name"} | {name for name, count in counts.items() if count > 1}


@pytest.mark.parametrize("key", ALL_KEYS, ids=lambda key: f"{key.schema.__name__}.{key.name}")
def test_every_key_is_read(key, product):
    assert is_read(key, product, shared_names())


@dataclasses.dataclass
class Example:
    name: str = ""
    used: int = 0
    unused: int = 0


def test_the_check_finds_keys_without_effect():
    found = reads_of(
        "def f(config: Example, other: Other):\n    return config.used + other.name",
        "class Example:\n    def __post_init__(self):\n        self.unused += 1",
    )
    results = {key.name: is_read(key, found, {"name"}) for key in keys_of(Example, "example")}
    assert results == {"name": False, "used": True, "unused": False}
