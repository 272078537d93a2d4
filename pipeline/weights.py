"""Reads and writes weights files, and finds the checkpoints of a run.

RUN/checkpoints/latest               the name of the newest complete checkpoint
RUN/checkpoints/best                 the name of the one with the highest AP
RUN/checkpoints/step-00001000/       see evspan.pipeline.engine.checkpoints
    weights.safetensors              consolidated weights; its header has model, frames, classes
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
    Precision,
    SizeWeighting,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
META = "meta.json"
WEIGHTS = "weights.safetensors"
HEADER_KEY = "evspan"  # of the description in the header of a weights file


@dataclass(frozen=True)
class Weights:
    """What a detector needs to run: tensors by parameter name, and what they were trained for.

    precision: of the training. The tensors are float32.
    """

    tensors: dict[str, Tensor]
    model: ModelConfig
    frames: FrameConfig
    classes: list[str]
    step: int
    precision: Precision = Precision.fp32


def plain(config: Any) -> Any:
    """A config as JSON values; enums by name."""
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


# -- weights files -----------------------------------------------------------------------------
def describe(weights: Weights) -> dict[str, Any]:
    """All but the tensors, as JSON values."""
    return {
        "model": plain(asdict(weights.model)),
        "frames": plain(asdict(weights.frames)),
        "classes": weights.classes,
        "step": weights.step,
        "precision": weights.precision.name,
    }


def parse_description(tensors: dict[str, Tensor], description: str, file: Path) -> Weights:
    """The inverse of `describe`.

    Args:
        description: as JSON. file: where it is from, for the error.

    Raises:
        UserError: it is not such a description.
    """
    try:
        values = json.loads(description)
        return Weights(
            tensors,
            model_config(values["model"]),
            frame_config(values["frames"]),
            [str(name) for name in values["classes"]],
            int(values["step"]),
            _trained_in(values.get("precision")),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise _not_a_weights_file(file, error) from error


def _trained_in(name: str | None) -> Precision:
    """fp32 where a file of an older version names none, or one that is no more."""
    return Precision.__members__.get(name or "", Precision.fp32)


def model_config(values: dict[str, Any]) -> ModelConfig:
    """A model config from its JSON values."""
    head = dict(values["head"])
    head["size_aware_mode"] = SizeWeighting[head["size_aware_mode"]]
    return ModelConfig(
        backbone=BackboneConfig(**values["backbone"]),
        fpn=FpnConfig(**values["fpn"]),
        head=HeadConfig(**head),
        postprocess=PostprocessConfig(**values["postprocess"]),
    )


def save_weights(path: Path, weights: Weights) -> None:
    """Writes a weights file."""
    save_tensors(path, weights.tensors, {HEADER_KEY: json.dumps(describe(weights))})


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Writes a .safetensors file.

    It is composed in memory: safetensors' own `save_file` makes files that only their owner may
    read, and does not raise OSError on a full disk.
    """
    # Cloned, since the format requires a storage of its own for each tensor.
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    path.write_bytes(save(copies, metadata=header))


def load_weights(path: str | Path) -> Weights:
    """Reads a weights file.

    Args:
        path: a .safetensors file, a checkpoint folder, a run folder (its newest complete
            checkpoint), or RUN/checkpoints/best.

    Raises:
        UserError: there is none, or another program wrote it.
    """
    file = _weights_file(Path(path))
    try:
        with safe_open(file, "pt") as opened:
            description = (opened.metadata() or {})[HEADER_KEY]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, KeyError) as error:
        raise _not_a_weights_file(file, error) from error
    return parse_description(tensors, description, file)


def _not_a_weights_file(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is no weights file of evspan ({type(error).__name__}: {error}). Name a run "
        "folder, a checkpoint folder, or a .safetensors file of evspan train or of evspan convert, "
        "which reads RVT's published .ckpt"
    )


def _weights_file(path: Path) -> Path:
    if path.is_file() and path.name in (LATEST, BEST):
        path = path.parent / path.read_text().strip()
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    newest = newest_checkpoint(path)
    if newest is not None:
        return newest / WEIGHTS
    raise UserError(
        f"{path} holds no checkpoint. Name a run folder (it has {FOLDER}/{LATEST}), one of its "
        "checkpoints, or a .safetensors file"
    )


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `latest` names; without that file, the newest complete one."""
    folder = run / FOLDER
    pointer = folder / LATEST
    if pointer.is_file():
        name = pointer.read_text().strip()
        if name and (folder / name / META).is_file():
            return folder / name
    complete = sorted(p for p in folder.glob("step-*") if (p / META).is_file())
    return complete[-1] if complete else None


# -- generators --------------------------------------------------------------------------------
def generator_states() -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and the current GPU."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch and NumPy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
