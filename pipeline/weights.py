"""A run's checkpoints as files that anyone reads: where they lie, and the weights file that goes out into the world.

RUN/checkpoints/latest               the name of the newest complete checkpoint
RUN/checkpoints/best                 the name of the one with the highest AP of those that were evaluated
RUN/checkpoints/step-00001000/       see evspan.pipeline.engine.checkpoints
    weights.safetensors              consolidated weights; its header holds model, frames and classes
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig, frame_config
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    PostprocessConfig,
    SizeWeighting,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FOLDER, LATEST, BEST = "checkpoints", "latest", "best"
META, WEIGHTS = "meta.json", "weights.safetensors"


@dataclass(frozen=True)
class Weights:
    """What a detector needs to run: tensors by parameter name, and what they were made for."""

    tensors: dict[str, Tensor]
    model: ModelConfig
    frames: FrameConfig
    classes: list[str]
    step: int


def plain(config: Any) -> Any:
    """A config as JSON values: enums by name."""
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {k: plain(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [plain(v) for v in config]
    return config


def describe(weights: Weights) -> dict[str, Any]:
    """All but the tensors, as JSON values."""
    return {
        "model": plain(asdict(weights.model)),
        "frames": plain(asdict(weights.frames)),
        "classes": weights.classes,
        "step": weights.step,
    }


def described(tensors: dict[str, Tensor], about: str, file: Path) -> Weights:
    """The inverse of `describe`, of its JSON text. Raises UserError where `file` tells something else there."""
    try:
        told = json.loads(about)
        return Weights(
            tensors,
            model_config(told["model"]),
            frame_config(told["frames"]),
            [str(name) for name in told["classes"]],
            int(told["step"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise _unreadable(file, error) from error


def save_weights(path: Path, weights: Weights) -> None:
    save_tensors(path, weights.tensors, {"evspan": json.dumps(describe(weights))})


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None
) -> None:
    # Cloned: one storage per tensor is what the format wants. By way of memory: `save_file` makes files that only their owner
    # may read, and a full disk is then an OSError as anywhere.
    path.write_bytes(
        save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, metadata=about)
    )


def load_weights(path: str | Path) -> Weights:
    """Weights of a .safetensors file, a checkpoint folder, or a run folder (its newest complete checkpoint).

    Raises:
        UserError: nothing there, or a file that this program did not write.
    """
    file = _weights_file(Path(path))
    try:
        with safe_open(file, "pt") as opened:
            about = (opened.metadata() or {})["evspan"]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, KeyError) as error:
        raise _unreadable(file, error) from error
    return described(tensors, about, file)


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is no weights file of evspan ({type(error).__name__}: {error}). Name a run folder, a checkpoint "
        "folder, or a .safetensors file of evspan train or of evspan convert, which reads RVT's published .ckpt"
    )


def _weights_file(path: Path) -> Path:
    if path.is_file() and path.name in (LATEST, BEST):
        path = path.parent / path.read_text().strip()
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (newest := newest_checkpoint(path)) is not None:
        return newest / WEIGHTS
    raise UserError(
        f"{path} holds no checkpoint. Name a run folder (it has {FOLDER}/{LATEST}), one of its checkpoints, "
        "or a .safetensors file"
    )


def model_config(raw: dict[str, Any]) -> ModelConfig:
    head = dict(raw["head"], size_aware_mode=SizeWeighting[raw["head"]["size_aware_mode"]])
    return ModelConfig(
        backbone=BackboneConfig(**raw["backbone"]),
        fpn=FpnConfig(**raw["fpn"]),
        head=HeadConfig(**head),
        postprocess=PostprocessConfig(**raw["postprocess"]),
    )


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `latest` names; where that is gone, the newest complete one."""
    folder = run / FOLDER
    pointer = folder / LATEST
    if (
        pointer.is_file()
        and (named := folder / pointer.read_text().strip())
        and (named / META).is_file()
    ):
        return named
    complete = sorted(p for p in folder.glob("step-*") if (p / META).is_file())
    return complete[-1] if complete else None


def generator_states() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
