"""The rooms and who may import whom; a change of these tables is a design decision."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OURS = ("conf", "data_prep", "launch", "pipeline", "tests")

COMMON = {  # plain Python without dependencies: errors, what a command does around its work, the shard contract's config
    "evspan.conf.errors",
    "evspan.launch.cli.command",
    "evspan.conf.schema.prep",
    "evspan.conf.hydra_errors",
    "evspan.conf.schema.prep_cluster",
}
SHARDS = {  # the shard contract: what a manifest, a stored frame, a stored box and a raw box are
    "evspan.data_prep.shards.format",
    "evspan.data_prep.labels.box_files",
    "evspan.data_prep.frames.codec",
}
MAY_IMPORT = {  # room -> names it may import besides its own; what lies below a name comes with it
    "data_prep": set(),
    "evspan.conf.schema.layout": COMMON,
    "evspan.conf.schema.cluster": COMMON,
    "evspan.pipeline.history": set(),
    "evspan.conf.schema.training": COMMON
    | {"evspan.conf.schema.layout", "evspan.conf.schema.cluster"},
    "evspan.pipeline.model": COMMON | {"evspan.conf.schema.training"},
    "evspan.pipeline.data": COMMON | {"evspan.conf.schema.training"} | SHARDS,
    "evspan.pipeline.parallel": COMMON
    | {"evspan.conf.schema.training", "evspan.conf.schema.layout", "evspan.pipeline.model.state"},
    "evspan.pipeline.evaluation": COMMON
    | {
        "evspan.conf.schema.training",
        "evspan.pipeline.data.boxes",
        "evspan.data_prep.labels.box_files",
    },
    "evspan.pipeline.weights": COMMON | {"evspan.conf.schema.training", "evspan.pipeline.parallel"},
    "evspan.pipeline.tensorboard.writer": COMMON
    | {"evspan.conf.schema.training", "evspan.pipeline.parallel"},
    "evspan.pipeline.infer_config": COMMON | {"evspan.conf.schema.training"},
    "evspan.pipeline.rvt_checkpoint": COMMON
    | {"evspan.conf.schema.training", "evspan.pipeline.weights", "evspan.pipeline.infer_config"},
}
MAY_IMPORT["evspan.pipeline.engine"] = (
    set(MAY_IMPORT) - {"data_prep"}
    | COMMON
    | {
        "evspan.data_prep.labels.box_files",  # detections are written as box files
        "evspan.data_prep.draw",  # boxes over frames, for TensorBoard
    }
)
MAY_IMPORT |= {
    root: MAY_IMPORT["evspan.pipeline.engine"] | {"evspan.pipeline.engine"}
    for root in (
        "evspan.launch.cli.train",
        "evspan.launch.cli.evaluate",
        "evspan.launch.smoke_rank",
    )
}
MAY_IMPORT["evspan.launch.cli.infer"] = MAY_IMPORT["evspan.launch.cli.train"] | {
    "data_prep",  # straight from a recording: decoders, frames, drawing
}
MAY_IMPORT["evspan.launch.cli.export"] = MAY_IMPORT["evspan.launch.cli.train"] | {
    "evspan.data_prep.shards.atomic"
}  # written whole
MAY_IMPORT["evspan.launch.cli.convert"] = MAY_IMPORT["evspan.launch.cli.train"] | {
    "evspan.data_prep.shards.atomic",  # what it writes appears whole
}
MAY_IMPORT["launch"] = COMMON | {
    "evspan.conf.schema.training",
    "evspan.conf.schema.cluster",
    "evspan.pipeline.history",
}
MAY_IMPORT["evspan.launch.sweep.report.html"] = MAY_IMPORT["launch"] | {
    "launch",
    "evspan.data_prep.shards.atomic",
    "evspan.data_prep.report",  # a page like that of evspan prep report
}
MAY_IMPORT["learning.curves"] = MAY_IMPORT["launch"] | {
    "launch",
    "evspan.data_prep.report",
}  # its charts
CALLED_BY_LAUNCH = {  # the parts of the command, which launch imports inside a function: `evspan --help` loads none of them
    "evspan.launch.cli.prep",
    "evspan.launch.cli.simulate",
    "evspan.launch.cli.train",
    "evspan.launch.cli.evaluate",
    "evspan.launch.cli.infer",
    "evspan.launch.cli.export",
    "evspan.launch.cli.convert",
    "evspan.pipeline.parallel.rank_env",  # where SLURM's first node is
}
INSIDE_FUNCTIONS = {  # room, or module of none -> what it may import inside a function alone
    "launch": CALLED_BY_LAUNCH,
    "pipeline": {
        "evspan.pipeline.inference.trained_detector",
        "evspan.pipeline.rvt_checkpoint",
    },  # what it offers: `import pipeline` itself loads no torch
}
COMPUTED = {  # modules that may import a name that they compute
    "evspan.launch.cli.main",  # from its table of commands; the entries, "module:function", are checked like imports in a function
}

HYDRA = {
    "evspan.launch.cli.prep",
    "evspan.launch.cli.train",
    "evspan.launch.cli.evaluate",
    "launch",  # the files that compose a config
    "evspan.launch.cli.command",  # what they all do around @hydra.main
}
OWNED: dict[str, set[str]] = {  # third-party name -> the only places that may say it
    "torch": {"pipeline"},
    "torch.distributed": {"evspan.pipeline.parallel", "evspan.pipeline.weights"},
    "torch.utils.tensorboard": {"evspan.pipeline.tensorboard.writer"},
    "deepspeed": {"evspan.pipeline.engine.deepspeed_engine"},
    "hydra": HYDRA,
    "omegaconf": HYDRA | {"evspan.pipeline.infer_config"},  # which reads conf/size as it lies there
    "submitit": {"launch"},
    "h5py": {"data_prep", "evspan.pipeline.data"},
    "hdf5plugin": {"data_prep", "evspan.pipeline.data"},
    "numba": {"data_prep"},
    "hotcoco": {"evspan.pipeline.evaluation"},
    **{
        name: {"evspan.launch.cli.export", "evspan.pipeline.inference.exported_step"}
        for name in ("onnx", "onnxruntime", "onnxscript")
    },
}


class Use(NamedTuple):
    name: str  # in full: package.module.object
    line: int
    in_function: bool


def uses(source: str) -> Iterator[Use]:
    """What a module imports, by statement or import_module, and what it names: torch.distributed.x, "package.module:function"."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Use]:
        if isinstance(node, ast.Import):
            yield from (Use(a.name, node.lineno, in_function) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Use(f"{module}.{a.name}", node.lineno, in_function) for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            name = (
                node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "?"
            )
            yield Use(str(name), node.lineno, in_function)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+:\w+", str(node.value)):
            yield Use(str(node.value).split(":")[0], node.lineno, True)
        elif isinstance(node, ast.Attribute):
            yield Use(ast.unparse(node), node.lineno, True)
        inside = (
            in_function
            or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        )  # not run either when the module is imported
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def under(name: str, *prefixes: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def violations(module: str, source: str) -> list[str]:
    """What `module` may not import, a sentence each."""
    room = max((r for r in MAY_IMPORT if under(module, r)), key=len, default=None)
    may = {room} | MAY_IMPORT[room] if room else set()
    told = []
    for use in uses(source):
        where = f"{module}:{use.line}"
        if use.name.startswith("."):
            told.append(f"{where}: relative import {use.name}; write the full name")
        elif use.name == "?":
            told += (
                []
                if module in COMPUTED
                else [f"{where}: imports a name that is computed; write it out"]
            )
        elif under(use.name, *OURS) and not under(use.name, *may):
            if under(use.name, *INSIDE_FUNCTIONS.get(room or module, ())):
                if not use.in_function:
                    told.append(
                        f"{where}: {room or module} imports {use.name} only inside a function"
                    )
            else:
                told.append(f"{where}: {room or 'no room'} may not import {use.name}")
        told += [
            f"{where}: {owned} belongs to {sorted(places)}, not to {module}"
            for owned, places in OWNED.items()
            if under(use.name, owned) and not under(module, *places)
        ]
    return told


def modules() -> dict[str, Path]:
    paths = [
        p
        for top in ("conf", "data_prep", "launch", "pipeline")
        for p in sorted((ROOT / top).rglob("*.py"))
    ]
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }


@pytest.mark.parametrize("module", modules())
def test_imports_keep_to_the_rooms(module):
    assert violations(module, modules()[module].read_text()) == []


def test_every_line_of_the_tables_speaks_of_something():
    there = modules()
    named = set(MAY_IMPORT).union(*MAY_IMPORT.values(), *OWNED.values(), *INSIDE_FUNCTIONS.values())
    assert sorted(named - there.keys()) == []


def test_third_party_packages_are_declared_dependencies():
    # Of the extras only `export`, whose command names it where a package is missing.
    declared = {
        r.name
        for r in map(Requirement, requires("evspan") or [])
        if not r.marker
        or r.marker.evaluate({"extra": ""})
        or r.marker.evaluate({"extra": "export"})
    }
    offered_by = packages_distributions()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - set(OURS):
                assert declared & {d.lower() for d in offered_by.get(top, [])}, (
                    f"{module} imports {top}: not in pyproject.toml"
                )


def test_every_room_says_what_it_is_on_one_screen():
    for room in ("conf", "containers", "data_prep", "launch", "pipeline", "tests"):
        most = 100 if room == "launch" else 80  # which holds the tutorials, too
        assert len((ROOT / room / "README.md").read_text().splitlines()) <= most, room


def test_links_between_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tests/*/*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        (
            "evspan.data_prep.labels.filters",
            "import evspan.conf.schema.training",
            "data_prep may not import evspan.conf.schema.training",
        ),
        ("evspan.data_prep.labels.filters", "import torch", "torch belongs to"),
        (
            "evspan.pipeline.model.neck",
            "from pipeline import data",
            "evspan.pipeline.model may not import evspan.pipeline.data",
        ),
        (
            "evspan.pipeline.model.neck",
            "def f():\n    from evspan.pipeline.engine.trainer import train",
            "may not import evspan.pipeline.engine",
        ),
        (
            "evspan.pipeline.model.neck",
            "import torch\ntorch.distributed.barrier()",
            "torch.distributed belongs to",
        ),
        (
            "evspan.pipeline.model.neck",
            "from torch import distributed as d",
            "torch.distributed belongs to",
        ),
        (
            "evspan.pipeline.parallel.world",
            "from evspan.pipeline.model.detector import Detector",
            "may not import evspan.pipeline.model.detector",
        ),
        (
            "evspan.pipeline.data.loader",
            "from evspan.data_prep.prepare import prepare",
            "may not import evspan.data_prep.prepare",
        ),
        ("evspan.pipeline.engine.trainer", "import deepspeed", "deepspeed belongs to"),
        (
            "evspan.pipeline.engine.trainer",
            "from evspan.data_prep.recordings.open import open_recording",
            "may not import evspan.data_prep.recordings.open",
        ),
        (
            "evspan.launch.cli.train",
            "from evspan.launch.cli.evaluate import main",
            "may not import evspan.launch.cli.evaluate",
        ),
        ("evspan.conf.schema.training", "from omegaconf import DictConfig", "omegaconf belongs to"),
        (
            "evspan.launch.cli.main",
            "from evspan.launch.cli.train import main",
            "only inside a function",
        ),
        (
            "evspan.launch.cli.main",
            "def f():\n    from evspan.pipeline.engine.trainer import train",
            "launch may not import evspan.pipeline.engine",
        ),
        (
            "evspan.launch.local.run",
            "from importlib import import_module\ndef f(n):\n    import_module(n)",
            "is computed",
        ),
        (
            "evspan.launch.cli.main",
            "COMMANDS = {'x': 'evspan.pipeline.engine.trainer:train'}",
            "launch may not import evspan.pipeline.engine",
        ),
        (
            "evspan.launch.cli.main",
            "import importlib\nimportlib.import_module('evspan.launch.cli.train')",
            "only inside a function",
        ),
        (
            "pipeline",
            "from evspan.conf.schema.training import TrainConfig",
            "no room may not import",
        ),
        (
            "pipeline",
            "from evspan.pipeline.rvt_checkpoint import open_weights",
            "pipeline imports evspan.pipeline.rvt_checkpoint.open_weights only inside",
        ),
        ("pipeline.newcomer", "import evspan.conf.schema.training", "no room may not import"),
        ("evspan.pipeline.data.loader", "from . import plan", "relative import"),
    ],
)
def test_the_check_finds(module, source, part):
    assert any(part in sentence for sentence in violations(module, source)), violations(
        module, source
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "evspan.launch.cli.main",
            "def f():\n    from evspan.launch.cli.train import main\n    import evspan.launch.cli.prep",
        ),
        (
            "evspan.launch.cli.main",
            "from importlib import import_module\nC = {'x': 'evspan.launch.cli.train:main'}\ndef f(n):\n    import_module(n)",
        ),
        (
            "evspan.pipeline.engine.deepspeed_engine",
            "import deepspeed, torch\nfrom evspan.pipeline.model.detector import Detector",
        ),
        ("evspan.launch.cli.infer", "from evspan.data_prep.recordings.open import open_recording"),
        (
            "evspan.pipeline.parallel.world",
            "import torch.distributed as dist\nfrom evspan.pipeline.model.state import StageState",
        ),
        (
            "evspan.data_prep.shards.write",
            "import h5py\nfrom evspan.data_prep.recordings.open import open_recording",
        ),
    ],
)
def test_the_check_lets_pass(module, source):
    assert violations(module, source) == []
