"""Checkpoints that appear whole or not at all, and the weights file that goes out into the world.

    RUN/checkpoints/latest               the name of the newest complete checkpoint
    RUN/checkpoints/best                 the name of the one with the highest AP of those that were evaluated
    RUN/checkpoints/step-00001000/
        meta.json                        step, the optimizer's counters, the run's resolved config
        weights.safetensors              consolidated weights; its header holds model, frames and classes
        moments.safetensors              Adam's averages by parameter name
        lanes-0000-0003.safetensors      recurrent carry of lanes 0, 1 and 2, as one rank would hold it
        rank-0000.safetensors            a rank's generator states
        metrics.json                     AP, once it was evaluated

Nothing but the generator states knows how many ranks there were, or how the optimizer lay over them.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data_prep.config import FrameConfig, frame_config
from data_prep.errors import UserError
from pipeline.config import BackboneConfig, FpnConfig, HeadConfig, ModelConfig, PostprocessConfig, SizeWeighting
from pipeline.parallel.reductions import gather_objects

FOLDER, LATEST, BEST = "checkpoints", "latest", "best"
META, WEIGHTS, MOMENTS, METRICS = "meta.json", "weights.safetensors", "moments.safetensors", "metrics.json"
FORM = 2  # of a checkpoint's folder; in the first, DeepSpeed's shards stood in the place of moments and lanes


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
    return {"model": plain(asdict(weights.model)), "frames": plain(asdict(weights.frames)),
            "classes": weights.classes, "step": weights.step}


def described(tensors: dict[str, Tensor], about: str, file: Path) -> Weights:
    """The inverse of `describe`, of its JSON text. Raises UserError where `file` tells something else there."""
    try:
        told = json.loads(about)
        return Weights(tensors, model_config(told["model"]), frame_config(told["frames"]),
                       [str(name) for name in told["classes"]], int(told["step"]))
    except (KeyError, ValueError, TypeError) as error:
        raise _unreadable(file, error) from error


def save_weights(path: Path, weights: Weights) -> None:
    save_tensors(path, weights.tensors, {"evspan": json.dumps(describe(weights))})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    # Cloned: one storage per tensor is what the format wants. By way of memory: `save_file` makes files that only their owner
    # may read, and a full disk is then an OSError as anywhere.
    path.write_bytes(save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, metadata=about))


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
    return UserError(f"{file} is no weights file of evspan ({type(error).__name__}: {error}). Name a run folder, a checkpoint "
                     "folder, or a .safetensors file of evspan train or of evspan convert, which reads RVT's published .ckpt")


def _weights_file(path: Path) -> Path:
    if path.is_file() and path.name in (LATEST, BEST):
        path = path.parent / path.read_text().strip()
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


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. `weights` and `moments` count on rank 0 only.

    lanes, carry: those that this rank writes, and their canonical state, tensor by tensor; None: another rank of its
    sequence does.
    """

    meta: dict[str, Any]
    weights: Weights
    moments: dict[str, Tensor]
    lanes: range
    carry: Sequence[Tensor] | None


class Checkpoints:
    """Saves and finds the checkpoints of one run."""

    def __init__(self, run: Path, *, rank: int, keep: int) -> None:
        self.folder, self.run, self.rank, self.keep = run / FOLDER, run, rank, keep

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Written beside, synced and renamed once all ranks are through; `latest` last. All ranks call it together.

        Raises:
            UserError: on every rank, when one could not write. The checkpoints before stand.
        """
        name = f"step-{step:08d}"
        beside, final = self.folder / f".writing-{name}", self.folder / name
        try:
            self._together(lambda: self._begin(beside), on=self.rank == 0)
            self._together(lambda: self._write(beside, step, snapshot))
            self._together(lambda: self._commit(beside, final), on=self.rank == 0)
        except UserError:
            if self.rank == 0:
                shutil.rmtree(beside, ignore_errors=True)  # room for whoever wants to mend it
            raise
        return final

    def _together(self, work: Callable[[], None], *, on: bool = True) -> None:
        """A barrier that also tells all ranks what went wrong on one, so that none waits for it."""
        problem = ""
        try:
            if on:
                work()
        except OSError as error:
            problem = f"{error.filename or self.folder}: {error.strerror or error}"
        if problems := [told for told in gather_objects(problem) if told]:
            raise UserError(f"the checkpoint could not be saved: {problems[0]}. Those before stand in {self.folder}; mend that "
                            "(room, rights) and run the same command again")

    def _begin(self, beside: Path) -> None:
        for left in (*self.folder.glob(".deleting-*"), *self.folder.glob(".writing-*")):  # of a run that was killed
            shutil.rmtree(left)
        beside.mkdir(parents=True)

    def _write(self, beside: Path, step: int, snapshot: Snapshot) -> None:
        if self.rank == 0:
            save_weights(beside / WEIGHTS, snapshot.weights)
            save_tensors(beside / MOMENTS, snapshot.moments)
            (beside / META).write_text(json.dumps(dict(snapshot.meta, form=FORM, step=step), indent=1) + "\n")
        if snapshot.carry is not None:
            save_tensors(beside / f"lanes-{snapshot.lanes.start:04d}-{snapshot.lanes.stop:04d}.safetensors",
                         {f"{i:04d}": t for i, t in enumerate(snapshot.carry)})
        save_tensors(beside / _generators_file(self.rank), generator_states())

    def _commit(self, beside: Path, final: Path) -> None:
        for path in (*beside.iterdir(), beside):
            _fsync(path)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            _remove(final)
        os.replace(beside, final)
        _fsync(self.folder)
        _write_whole(self.folder / LATEST, final.name + "\n")
        self._retain(final.name)

    def _retain(self, newest: str) -> None:
        complete = sorted(p for p in self.folder.glob("step-*") if p.name <= newest)
        for path in complete[: -self.keep]:
            if path.name != self.best():
                _remove(path)

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from, and its meta.json."""
        newest = newest_checkpoint(self.run)
        return None if newest is None else (newest, json.loads((newest / META).read_text()))

    # -- AP, rank 0 only -----------------------------------------------------------------------------------------
    def evaluated(self, step: int) -> bool:
        return (self.folder / f"step-{step:08d}" / METRICS).exists()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep what the checkpoint of `step` reached, and point `best` to it where no other has a higher AP."""
        name = f"step-{step:08d}"
        _write_whole(self.folder / name / METRICS, json.dumps(metrics, indent=1) + "\n")
        if metrics["ap"] is not None and metrics["ap"] > self._best_ap():
            _write_whole(self.folder / BEST, name + "\n")

    def best(self) -> str | None:
        pointer = self.folder / BEST
        return pointer.read_text().strip() if pointer.is_file() else None

    def _best_ap(self) -> float:
        told = self.folder / (self.best() or "none") / METRICS
        return json.loads(told.read_text())["ap"] if told.is_file() else -1.0


# -- reading back ------------------------------------------------------------------------------------------------
class Loaded(NamedTuple):
    """weights, moments: by name. carry: canonical, tensor by tensor. generators: None where there was no such rank."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    carry: list[Tensor]
    generators: dict[str, Tensor] | None


def load_snapshot(folder: Path, lanes: range, rank: int) -> Loaded:
    """What `rank`, which works on `lanes`, needs of a checkpoint to continue from it.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        own = folder / _generators_file(rank)
        return Loaded(load_file(folder / WEIGHTS), load_file(folder / MOMENTS), _load_carry(folder, lanes),
                      load_file(own) if own.exists() else None)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}). "
                        "Delete it to resume from the one before") from error


def _load_carry(folder: Path, lanes: range) -> list[Tensor]:
    parts: list[list[Tensor]] = []
    for file in sorted(folder.glob("lanes-*.safetensors")):
        first, stop = map(int, file.stem.split("-")[1:])
        here = range(max(first, lanes.start), min(stop, lanes.stop))
        if here:
            parts.append([t.narrow(-4, here.start - first, len(here)) for _, t in sorted(load_file(file).items())])
    carry = [torch.cat(of_all, -4) for of_all in zip(*parts, strict=True)]
    if not carry or any(t.shape[-4] != len(lanes) for t in carry):
        raise ValueError(f"no carry of lanes {lanes.start} to {lanes.stop - 1}")
    return carry


def _generators_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text)
    _fsync(beside)
    os.replace(beside, path)
    _fsync(path.parent)


def _remove(path: Path) -> None:
    """Rename first: a checkpoint that is half deleted must not look complete."""
    gone = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)
