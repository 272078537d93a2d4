"""Checkpoints that appear whole or not at all, in a form that any layout can continue.

    RUN/checkpoints/step-00001000/
        meta.json                        step, the optimizer's counters, the run's resolved config
        weights.safetensors              consolidated weights
        moments.safetensors              Adam's averages by parameter name
        lanes-0000-0003.safetensors      recurrent carry of lanes 0, 1 and 2, as one rank would hold it
        rank-0000.safetensors            a rank's generator states
        metrics.json                     AP, once it was evaluated

Nothing but the generator states knows how many ranks there were, or how the optimizer lay over them.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evspan.conf.errors import UserError
from evspan.pipeline.parallel.reductions import broadcast_object, gather_objects
from evspan.pipeline.weights import (
    BEST,
    FOLDER,
    LATEST,
    META,
    WEIGHTS,
    Weights,
    generator_states,
    newest_checkpoint,
    save_tensors,
    save_weights,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MOMENTS, METRICS = "moments.safetensors", "metrics.json"
FORM = 2  # of a checkpoint's folder; in the first, DeepSpeed's shards stood in the place of moments and lanes


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
    """Saves and finds the checkpoints of one run.

    Args:
        keep: so many of the newest, and the best.
        ignore_best: the run does not continue what is in its folder; the best there is not its best.
    """

    def __init__(self, run: Path, *, rank: int, keep: int, ignore_best: bool = False) -> None:
        self.folder, self.run, self.rank, self.keep, self.ignore_best = (
            run / FOLDER,
            run,
            rank,
            keep,
            ignore_best,
        )

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
            raise UserError(
                f"the checkpoint could not be saved: {problems[0]}. Those before stand in {self.folder}; mend that "
                "(room, rights) and run the same command again"
            )

    def _begin(self, beside: Path) -> None:
        for left in (
            *self.folder.glob(".deleting-*"),
            *self.folder.glob(".writing-*"),
        ):  # of a run that was killed
            shutil.rmtree(left)
        beside.mkdir(parents=True)

    def _write(self, beside: Path, step: int, snapshot: Snapshot) -> None:
        if self.rank == 0:
            save_weights(beside / WEIGHTS, snapshot.weights)
            save_tensors(beside / MOMENTS, snapshot.moments)
            (beside / META).write_text(
                json.dumps(dict(snapshot.meta, form=FORM, step=step), indent=1) + "\n"
            )
        if snapshot.carry is not None:
            save_tensors(
                beside / _lanes_file(snapshot.lanes),
                {f"{i:04d}": t for i, t in enumerate(snapshot.carry)},
            )
        save_tensors(beside / _generators_file(self.rank), generator_states())
        for name in (
            WEIGHTS,
            MOMENTS,
            META,
            _lanes_file(snapshot.lanes),
            _generators_file(self.rank),
        ):
            if (beside / name).exists():
                _fsync(beside / name)  # on the machine that wrote it

    def _commit(self, beside: Path, final: Path) -> None:
        _fsync(beside)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            _remove(final)
        if self.ignore_best:
            (self.folder / BEST).unlink(missing_ok=True)
            self.ignore_best = False
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
        """The checkpoint to resume from, and its meta.json. A collective: file systems may show ranks different things."""
        newest = newest_checkpoint(self.run) if self.rank == 0 else None
        return broadcast_object(newest and (newest, json.loads((newest / META).read_text())))

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


CONTINUES = {  # config values that a run must have in common with the checkpoint that it continues
    "training": (
        "batch_size",
        "sequence_length",
        "gradient_accumulation_steps",
        "sampling",
        "max_steps",
        "precision",
    ),
    "model": ("backbone", "fpn", "head"),
}


def check_continues(folder: Path, meta: dict[str, Any], config: dict[str, Any]) -> None:
    """Checks that a run may continue from a checkpoint.

    Args:
        meta: of the checkpoint in `folder`. config: the run's, as JSON values.

    Raises:
        UserError: another form, batch or model.
    """
    if meta.get("form") != FORM:
        raise UserError(
            f"{folder} was saved by another version of evspan, in a form that this one cannot "
            f"continue. Start from its weights: run_dir=NEW checkpoint.init_from={folder}"
        )
    saved = meta["config"]
    for group, keys in CONTINUES.items():
        for key in keys:
            if saved[group][key] != config[group][key]:
                raise UserError(
                    f"{folder} was saved with {group}.{key}={saved[group][key]}, this run has "
                    f"{config[group][key]}, so it cannot continue it. "
                    "Give the old value, or another run_dir"
                )


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
        return Loaded(
            load_file(folder / WEIGHTS),
            load_file(folder / MOMENTS),
            _load_carry(folder, lanes),
            load_file(own) if own.exists() else None,
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {error}). "
            "Delete it to resume from the one before"
        ) from error


def _load_carry(folder: Path, lanes: range) -> list[Tensor]:
    parts: list[list[Tensor]] = []
    for file in sorted(folder.glob("lanes-*.safetensors")):
        first, stop = map(int, file.stem.split("-")[1:])
        here = range(max(first, lanes.start), min(stop, lanes.stop))
        if here:
            parts.append(
                [
                    t.narrow(-4, here.start - first, len(here))
                    for _, t in sorted(load_file(file).items())
                ]
            )
    carry = [torch.cat(of_all, -4) for of_all in zip(*parts, strict=True)]
    if not carry or any(t.shape[-4] != len(lanes) for t in carry):
        raise ValueError(f"no carry of lanes {lanes.start} to {lanes.stop - 1}")
    return carry


def _lanes_file(lanes: range) -> str:
    return f"lanes-{lanes.start:04d}-{lanes.stop:04d}.safetensors"


def _generators_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


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
