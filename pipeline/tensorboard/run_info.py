"""What a run says of itself, once: its config, its code and where it runs."""

import json
import platform
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.parallel.reductions import gather_objects
from evspan.pipeline.parallel.world import World
from evspan.pipeline.weights import plain

PACKAGES = ("evspan", "torch", "deepspeed", "numpy")


def config_lines(config: Any) -> str:
    """KEY=VALUE, a line each, as `evspan train` takes them."""

    def lines(part: Any, path: str) -> Iterator[str]:
        for field in fields(part):
            value = plain(getattr(part, field.name))
            if is_dataclass(value):
                yield from lines(value, f"{path}{field.name}.")
            else:
                added = "++" if isinstance(value, dict) else ""  # its keys are not known beforehand
                yield f"{added}{path}{field.name}={value if isinstance(value, str) else _as_override(value)}"

    return "\n".join(lines(config, ""))


def _as_override(value: Any) -> str:
    if isinstance(value, dict):  # JSON has no whole numbers for keys
        return "{" + ",".join(f"{key}:{_as_override(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, separators=(",", ":"))


def code_commit(file: Path = Path(__file__)) -> str | None:
    """Of the git checkout that `file` is tracked in, "-dirty" where tracked files were changed; None where there is none."""
    here = file.resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", here.name
        )  # installed below a checkout of something else it is none of it
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(world: World) -> dict[str, str]:
    """Versions, and where the ranks are. All ranks call it."""
    cuda = world.device.type == "cuda"
    device = (
        torch.cuda.get_device_name(world.device)
        if cuda
        else f"CPU, {torch.get_num_threads()} threads"
    )
    places = Counter(gather_objects(f"{socket.gethostname()}: {device}"))
    return {
        "ranks": ", ".join(f"{count} on {place}" for place, count in places.items()),
        **{name: told for name in PACKAGES if (told := _version(name))},
        "Python": platform.python_version(),
        "CUDA": str(torch.version.cuda) if cuda else "not used",
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def about_run(config: TrainConfig, environment: dict[str, str]) -> dict[str, str]:
    """Markdown by name, for TensorBoard's page "Text"."""
    rows = {"code": code_commit() or "not in a git checkout", **environment}
    table = "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )
    return {"run/environment": table, "run/config": f"```\n{config_lines(config)}\n```"}
