"""The layers, who may import whom, and who owns which third-party name. To change a table here is a design decision."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LAYERS = ("conf", "data_prep", "pipeline", "launch")  # each imports only from those before it

# Packages of pipeline that may import less than their layer: package -> what it may import besides itself and conf.
NARROWER = {
    "pipeline.model": set(),
    "pipeline.data": {
        "data_prep.hdf5_files",
        "data_prep.shards",
        "data_prep.labels",
        "data_prep.frames",
    },
    "pipeline.parallel": {
        "pipeline.model.autograd",
        "pipeline.model.state",
        "pipeline.model.sequence_protocol",
    },
    "pipeline.evaluation": {"data_prep.labels", "pipeline.data"},
    "pipeline.history": set(),
}
OWNED = {  # third-party name -> the only places that may import it
    "torch": {"pipeline"},
    "torch.distributed": {"pipeline.parallel", "pipeline.engine.checkpoints"},
    "torch.utils.tensorboard": {"pipeline.tensorboard"},
    "deepspeed": {"pipeline.engine.deepspeed_adapter"},
    "hydra": {"conf.compose", "conf.hydra_adapter", "launch.slurm.hydra_plugin"},
    "omegaconf": {
        "conf.compose",
        "conf.hydra_adapter",
        "conf.hydra_errors",
        "conf.omegaconf_adapter",
        "conf.presets",
    },
    "hydra_plugins": {"launch.slurm.hydra_plugin"},
    "argparse": {"launch.cli"},
    "submitit": {"launch"},
    "h5py": {"data_prep", "pipeline.data"},
    "hdf5plugin": {"data_prep", "pipeline.data"},
    "numba": {"data_prep"},
    "hotcoco": {"pipeline.evaluation"},
    "optuna": {"launch.search.study"},
    "onnx": {"launch.cli.export", "pipeline.inference.exported_step"},
    "onnxruntime": {"launch.cli.export", "pipeline.inference.exported_step"},
    "onnxscript": {"launch.cli.export", "pipeline.inference.exported_step"},
}
# Modules that still break a rule, with the reason. Nothing is added here; a module that is corrected is removed.
PENDING: set[str] = set()


class Use(NamedTuple):
    """A name that a module imports, or names in full: package.module.object."""

    name: str
    line: int


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of ours by its name without `evspan.`."""
    found = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def uses(source: str) -> Iterator[Use]:
    """Imports by statement, "evspan.module:function" strings, and dotted names such as torch.distributed.barrier."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Use(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield Use(f"{module}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"evspan\.[\w.]+:\w+", str(node.value)
        ):
            yield Use(str(node.value).split(":")[0], node.lineno)
        elif isinstance(node, ast.Attribute):
            yield Use(ast.unparse(node), node.lineno)


def under(name: str, *prefixes: str) -> bool:
    """Whether `name` is one of the prefixes or below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def may_import(module: str, other: str) -> bool:
    """Whether the layers and the table NARROWER let `module` import `other`."""
    narrow = [package for package in NARROWER if under(module, package)]
    if narrow:
        return under(other, "conf", *narrow, *NARROWER[narrow[0]])
    layer, other_layer = module.split(".")[0], other.split(".")[0]
    return LAYERS.index(other_layer) <= LAYERS.index(layer)


def violations(module: str, source: str) -> list[str]:
    """One sentence for each rule that `module` breaks."""
    messages = []
    for use in uses(source):
        where = f"{module}:{use.line}"
        name = use.name.removeprefix("evspan.")
        if use.name.startswith("."):
            messages.append(f"{where}: relative import {use.name}; write the full name")
        elif use.name.startswith("evspan.") and not may_import(module, name):
            messages.append(f"{where}: {module} may not import {name}")
        for owned, places in OWNED.items():
            if under(use.name, owned) and not under(module, *places):
                messages.append(f"{where}: {owned} belongs to {sorted(places)}, not to {module}")
        if (
            use.name == "sys.argv"
            and not under(module, "launch.cli")
            and not _in_main(source, use.line)
        ):
            messages.append(f"{where}: sys.argv belongs to launch.cli")
    return messages


def _in_main(source: str, line: int) -> bool:
    """Whether the line is in the block `if __name__ == "__main__"`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return node.lineno <= line <= (node.end_lineno or node.lineno)
    return False


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, at its top or inside a function."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _imported(node):
                while name and name not in known:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    targets.add(name)
        graph[module] = targets
    return graph


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [name.removeprefix("evspan.") for name in names if name.startswith("evspan.")]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            position = stack.index(module)
            group = stack[position:]
            del stack[position:]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_keep_to_the_layers(module):
    if module in PENDING:
        pytest.xfail("known, not yet mended")
    assert violations(module, modules()[module].read_text()) == []


def test_no_files_import_each_other_in_a_circle():
    pending = [group for group in cycles(import_graph()) if set(group) & PENDING]
    assert [group for group in cycles(import_graph()) if group not in pending] == []


def test_every_line_of_the_tables_names_something_that_exists():
    named = set(NARROWER).union(*NARROWER.values(), *OWNED.values(), PENDING)
    assert sorted(named - modules().keys()) == []


def distributions_by_package() -> dict[str, set[str]]:
    """Top-level package -> names of the distributions that install it.

    `packages_distributions` of Python 3.10 misses those without a file top_level.txt.
    """
    mapping: dict[str, set[str]] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"].lower()
        for path in distribution.files or ():
            package = path.parts[0].removesuffix(".py")
            mapping.setdefault(package, set()).add(name)
    return mapping


@pytest.mark.slow
def test_third_party_packages_are_declared_dependencies():
    # Of the extras only those whose commands name them where a package is missing.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + extras["export"] + extras["search"]
    declared = {Requirement(requirement).name.lower() for requirement in requirements}
    offered_by = distributions_by_package()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for top in (
                {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"evspan"}
            ):
                offers = {distribution.lower() for distribution in offered_by.get(top, [])}
                assert declared & offers, f"{module} imports {top}: not in pyproject.toml"


def test_links_between_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tests/*/*.md")):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#]+)", prose):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        ("conf.errors", "import evspan.data_prep.draw", "may not import data_prep.draw"),
        ("data_prep.draw", "import evspan.pipeline.weights", "may not import pipeline.weights"),
        ("data_prep.draw", "import torch", "torch belongs to"),
        ("pipeline.weights", "import evspan.launch.demo", "may not import launch.demo"),
        ("pipeline.model.neck", "from evspan.pipeline import data", "may not import pipeline.data"),
        (
            "pipeline.model.neck",
            "import torch\ntorch.distributed.barrier()",
            "torch.distributed belongs",
        ),
        (
            "pipeline.model.neck",
            "from torch import distributed as d",
            "torch.distributed belongs to",
        ),
        (
            "pipeline.parallel.world",
            "from evspan.pipeline.model.detector import D",
            "may not import",
        ),
        ("pipeline.data.loader", "def f():\n    import evspan.data_prep.prepare", "may not import"),
        ("launch.demo", "import sys\nprint(sys.argv)", "sys.argv belongs to"),
        ("launch.demo", "import argparse", "argparse belongs to"),
        ("pipeline.weights", "from omegaconf import DictConfig", "omegaconf belongs to"),
        ("pipeline.weights", "X = 'evspan.launch.cli.main:main'", "may not import launch.cli.main"),
        ("pipeline.data.loader", "from . import plan", "relative import"),
    ],
)
def test_the_check_finds(module, source, part):
    assert any(part in message for message in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("launch.cli.main", "import sys, argparse\nprint(sys.argv)"),
        ("launch.slurm.requeue", "import sys\nif __name__ == '__main__':\n    print(sys.argv)"),
        ("pipeline.engine.deepspeed_adapter", "import deepspeed, torch"),
        ("pipeline.parallel.world", "import torch.distributed\nimport evspan.pipeline.model.state"),
        ("launch.demo", "import evspan.pipeline.weights\nimport evspan.data_prep.draw"),
    ],
)
def test_the_check_lets_pass(module, source):
    assert violations(module, source) == []


def test_the_check_finds_circles():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_test_imports_from_another_test_file():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        imported = [use.name for use in uses(path.read_text()) if under_test_file(use.name)]
        assert imported == [], f"{path}: move what both need to tests/support"


def under_test_file(name: str) -> bool:
    """Whether a dotted name goes through a module `test_...`."""
    return any(part.startswith("test_") for part in name.split(".")[:-1])
