"""Collects the text that TensorBoard shows of a run: config, code version, environment."""

import json
import platform
import re
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from evspan.conf.code_version import running_code
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.parallel.reductions import gather_json
from evspan.pipeline.parallel.world import World
from evspan.pipeline.weights import plain

PACKAGES = ("evspan", "torch", "deepspeed", "numpy")


def config_lines(config: Any) -> str:
    """KEY=VALUE, one per line, as `evspan train` accepts them. config: a dataclass."""
    return "\n".join(_overrides(config, prefix=""))


def _overrides(config: Any, prefix: str) -> Iterator[str]:
    for field in fields(config):
        key = f"{prefix}{field.name}"
        value = plain(getattr(config, field.name))
        if is_dataclass(value):
            yield from _overrides(value, prefix=f"{key}.")
        elif isinstance(value, str):
            yield f"{key}={value}"
        elif isinstance(value, dict):  # the schema does not have its keys, so they are added
            yield f"++{key}={_as_override(value)}"
        else:
            yield f"{key}={_as_override(value)}"


def _as_override(value: Any) -> str:
    """A value in Hydra's grammar: JSON, but for the keys of dicts, which JSON quotes."""
    if is_dataclass(value):  # in a list
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    value = plain(value)
    if isinstance(value, dict):
        items = [f"{_as_key(key)}:{_as_override(inner)}" for key, inner in value.items()]
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_override, value)) + "]"
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _as_key(key: Any) -> str:
    """A key of a mapping: quoted, as conf/quoting.py reads it, where it is not a plain word."""
    text = str(key)
    return text if re.fullmatch(r"[\w.-]+", text) else json.dumps(text, ensure_ascii=False)


def environment(world: World) -> dict[str, str]:
    """Versions, and the hosts and devices of all ranks. A collective."""
    cuda = world.device.type == "cuda"
    if cuda:
        device = torch.cuda.get_device_name(world.device)
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    ranks_by_device = Counter(
        gather_json(f"{socket.gethostname()}: {device}", name="devices of the ranks")
    )
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "ranks": ", ".join(f"{count} on {name}" for name, count in ranks_by_device.items()),
        **{name: number for name, number in versions.items() if number},
        "Python": platform.python_version(),
        "CUDA": str(torch.version.cuda) if cuda else "not used",
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_info(config: TrainConfig, environment: dict[str, str]) -> dict[str, str]:
    """TensorBoard tag -> markdown, for the page "Text"."""
    code = running_code()
    commit = code.commit or "not in a git checkout"
    values = {"code": f"{commit}, digest {code.digest}", **environment}
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    table = "\n".join(["| | |", "|---|---|", *rows])
    return {"run/environment": table, "run/config": f"```\n{config_lines(config)}\n```"}
