"""Reads presets of the Hydra tree without composing a config: model sizes, classes of a dataset."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError
from evspan.conf.schema.training import ModelConfig
from omegaconf import OmegaConf

Preset = dict[str, dict[str, Any]]


@cache
def size_names() -> tuple[str, ...]:
    """The names of the presets in conf/size, sorted."""
    return tuple(sorted(path.stem for path in _conf_path("size").glob("*.yaml")))


def size_preset(name: str) -> Preset:
    """A preset of conf/size: values of `model`, by config group.

    Raises:
        UserError: there is no such size.
    """
    if name not in size_names():
        raise UserError(f"{name!r} is no size in conf/size; there are {', '.join(size_names())}")
    return _read(f"size/{name}.yaml")


def size_of(model: ModelConfig) -> str:
    """The name of the size with the model's widths and depth; 'custom' if there is none."""
    values = {
        "backbone": {"embed_dim": model.backbone.embed_dim, "dim_head": model.backbone.dim_head},
        "fpn": {"depth": model.fpn.depth},
    }
    return next((name for name in size_names() if size_preset(name) == values), "custom")


def dataset_classes(name: str) -> list[str]:
    """The class names of a preset of conf/dataset, by class id."""
    return list(_read(f"dataset/{name}.yaml")["classes"])


def _conf_path(path: str) -> Path:
    return Path(str(resources.files("evspan.conf"))) / path


def _read(path: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(_conf_path(path)))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
