"""Checkpoints that appear whole or not at all, and the weights file that goes out into the world.

    RUN/checkpoints/latest               the name of the newest complete checkpoint
    RUN/checkpoints/step-00001000/
        meta.json                        step, world size, the run's resolved config
        weights.safetensors              consolidated weights; its header holds model, frames and classes
        engine/...                       DeepSpeed's own shards (weights, optimizer, schedule)
        rank-0000.pt                     per rank: generator states, its lanes' recurrent carry
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.config import FrameConfig, frame_config
from data_prep.errors import UserError
from pipeline.config import BackboneConfig, FpnConfig, HeadConfig, ModelConfig, PostprocessConfig, SizeWeighting
from pipeline.parallel.reductions import barrier

FOLDER, LATEST, WEIGHTS, META = "checkpoints", "latest", "weights.safetensors", "meta.json"


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


def save_weights(path: Path, weights: Weights) -> None:
    about = {"model": plain(asdict(weights.model)), "frames": plain(asdict(weights.frames)),
             "classes": weights.classes, "step": weights.step}
    # Cloned: one storage per tensor is what the format wants.
    save_file({k: t.detach().cpu().contiguous().clone() for k, t in weights.tensors.items()}, path,
              metadata={"evspan": json.dumps(about)})


def load_weights(path: str | Path) -> Weights:
    """Weights of a .safetensors file, a checkpoint folder, or a run folder (its newest complete checkpoint).

    Raises:
        UserError: nothing there, or a file that this program did not write.
    """
    file = _weights_file(Path(path))
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["evspan"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
        return Weights(tensors, model_config(about["model"]), frame_config(about["frames"]), about["classes"], about["step"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no weights file of evspan ({type(error).__name__}: {error}). Name a run folder, "
                        f"a checkpoint folder, or a {WEIGHTS} that `evspan train` wrote") from error


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (newest := newest_checkpoint(path)) is not None:
        return newest / WEIGHTS
    raise UserError(f"{path} holds no checkpoint. Name a run folder (it has {FOLDER}/{LATEST}), one of its checkpoints, "
                    "or a .safetensors file")


def model_config(raw: dict[str, Any]) -> ModelConfig:
    head = dict(raw["head"], size_aware_mode=SizeWeighting[raw["head"]["size_aware_mode"]])
    return ModelConfig(name=raw["name"], backbone=BackboneConfig(**raw["backbone"]), fpn=FpnConfig(**raw["fpn"]),
                       head=HeadConfig(**head), postprocess=PostprocessConfig(**raw["postprocess"]))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `latest` names; where that is gone, the newest complete one."""
    folder = run / FOLDER
    pointer = folder / LATEST
    if pointer.is_file() and (named := folder / pointer.read_text().strip()) and (named / META).is_file():
        return named
    complete = sorted(p for p in folder.glob("step-*") if (p / META).is_file())
    return complete[-1] if complete else None


class Checkpoints:
    """Saves and finds the checkpoints of one run; every method is called by all ranks together."""

    def __init__(self, run: Path, *, rank: int, keep: int) -> None:
        self.folder, self.run, self.rank, self.keep = run / FOLDER, run, rank, keep

    def save(self, step: int, *, meta: dict[str, Any], sidecar: dict[str, Any], weights: Callable[[], Weights],
             save_engine: Callable[[Path], None]) -> Path:
        """Write beside, barrier, fsync, rename; `latest` last. `weights` and `save_engine` may be collective."""
        name = f"step-{step:08d}"
        beside, final = self.folder / f".writing-{name}", self.folder / name
        if self.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        barrier()
        save_engine(beside / "engine")
        torch.save(sidecar, beside / sidecar_name(self.rank))
        consolidated = weights()
        if self.rank == 0:
            save_weights(beside / WEIGHTS, consolidated)
            (beside / META).write_text(json.dumps(dict(meta, step=step), indent=1) + "\n")
        barrier()
        if self.rank == 0:
            for path in (*beside.rglob("*"), beside):
                _fsync(path)
            if final.exists():  # the same step again, after a resume from an older checkpoint
                _remove(final)
            os.replace(beside, final)
            _write_pointer(self.folder / LATEST, name)
            self._retain(name)
        barrier()
        return final

    def _retain(self, newest: str) -> None:
        complete = sorted(p for p in self.folder.glob("step-*") if p.name <= newest)
        for path in complete[: -self.keep]:
            _remove(path)
        for left in (*self.folder.glob(".deleting-*"), *self.folder.glob(".writing-*")):
            shutil.rmtree(left, ignore_errors=True)

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from, and its meta.json."""
        newest = newest_checkpoint(self.run)
        return None if newest is None else (newest, json.loads((newest / META).read_text()))


def sidecar_name(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


def load_sidecar(checkpoint: Path, rank: int) -> dict[str, Any]:
    # weights_only: a checkpoint is data; nothing in it may run.
    return torch.load(checkpoint / sidecar_name(rank), weights_only=True, map_location="cpu")


def generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_pointer(path: Path, name: str) -> None:
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(name + "\n")
    _fsync(beside)
    os.replace(beside, path)
    _fsync(path.parent)


def _remove(path: Path) -> None:
    """Rename first: a checkpoint that is half deleted must not look complete."""
    gone = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)
