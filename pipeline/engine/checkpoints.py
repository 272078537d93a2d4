"""Saves and loads checkpoints that are complete or absent, and that any layout can continue.

    RUN/checkpoints/step-00001000/
        meta.json                        step, the optimizer's counters, the run's resolved config
        weights.safetensors              consolidated weights
        moments.safetensors              Adam's averages by parameter name
        lanes-0000-0003.safetensors      recurrent state of lanes 0, 1 and 2, as of one rank
        rank-0000.safetensors            a rank's generator states
        metrics.json                     AP, after an evaluation

Only the generator states depend on the number of ranks; nothing depends on the ZeRO stage.
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
from evspan.conf.schema.training import Precision
from evspan.pipeline.parallel.reductions import broadcast_json, gather_json
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

MOMENTS = "moments.safetensors"
METRICS = "metrics.json"
FORMAT_VERSION = 2  # 1 had DeepSpeed's shards instead of moments and lanes
CONTINUES = {  # config values that must be equal in a run and in the checkpoint that it continues
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


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, as one rank passes it to `Checkpoints.save`.

    weights, moments: read on rank 0 only.
    lanes: of this rank.
    carry: the canonical state of these lanes, one tensor after the other; None if another rank of
        the sequence group saves it.
    """

    meta: dict[str, Any]
    weights: Weights
    moments: dict[str, Tensor]
    lanes: range
    carry: Sequence[Tensor] | None


class Checkpoints:
    """Saves and finds the checkpoints of one run.

    Args:
        keep: how many of the newest ones to keep, in addition to the best.
        ignore_best: the run does not continue what is in its folder, so the first save discards the
            best checkpoint of the run before it.
    """

    def __init__(self, run: Path, *, rank: int, keep: int, ignore_best: bool = False) -> None:
        self.folder = run / FOLDER
        self.run = run
        self.rank = rank
        self.keep = keep
        self.ignore_best = ignore_best

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Writes a checkpoint. A collective.

        The files are written to a temporary folder and synced, and the folder is renamed after all
        ranks have finished. `latest` is updated last.

        Raises:
            UserError: on every rank, if one of them could not write. Earlier checkpoints stay.
        """
        name = f"step-{step:08d}"
        temporary = self.folder / f".writing-{name}"
        final = self.folder / name
        try:
            self._on_all_ranks(lambda: self._begin(temporary), run=self.rank == 0)
            self._on_all_ranks(lambda: self._write(temporary, step, snapshot))
            self._on_all_ranks(lambda: self._commit(temporary, final), run=self.rank == 0)
        except UserError:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # frees space on a full disk
            raise
        return final

    def _on_all_ranks(self, work: Callable[[], None], *, run: bool = True) -> None:
        """Runs `work` where `run`, then waits for all ranks. Raises on all if one fails."""
        problem = ""
        try:
            if run:
                work()
        except OSError as error:
            problem = f"{error.filename or self.folder}: {error.strerror or error}"
        problems = [text for text in gather_json(problem) if text]
        if problems:
            raise UserError(
                f"the checkpoint could not be saved: {problems[0]}. Earlier checkpoints are still "
                f"in {self.folder}; free space or correct the permissions, then run the same "
                "command again"
            )

    def _begin(self, temporary: Path) -> None:
        for pattern in (".deleting-*", ".writing-*"):  # of a run that was killed
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)

    def _write(self, folder: Path, step: int, snapshot: Snapshot) -> None:
        written = []
        if self.rank == 0:
            save_weights(folder / WEIGHTS, snapshot.weights)
            save_tensors(folder / MOMENTS, snapshot.moments)
            meta = dict(snapshot.meta, form=FORMAT_VERSION, step=step)
            (folder / META).write_text(json.dumps(meta, indent=1) + "\n")
            written += [WEIGHTS, MOMENTS, META]
        if snapshot.carry is not None:
            lanes_file = _lanes_file(snapshot.lanes)
            save_tensors(
                folder / lanes_file,
                {f"{i:04d}": tensor for i, tensor in enumerate(snapshot.carry)},
            )
            written.append(lanes_file)
        save_tensors(folder / _generators_file(self.rank), generator_states())
        written.append(_generators_file(self.rank))
        for name in written:
            _fsync(folder / name)  # on the machine that wrote it

    def _commit(self, temporary: Path, final: Path) -> None:
        _fsync(temporary)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            _remove(final)
        if self.ignore_best:
            (self.folder / BEST).unlink(missing_ok=True)
            self.ignore_best = False
        os.replace(temporary, final)
        _fsync(self.folder)
        _write_pointer(self.folder / LATEST, final.name + "\n")
        self._remove_old(final.name)

    def _remove_old(self, newest: str) -> None:
        complete = sorted(p for p in self.folder.glob("step-*") if p.name <= newest)
        for path in complete[: -self.keep]:
            if path.name != self.best():
                _remove(path)

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from, with its meta.json. A collective.

        Rank 0 decides, since a file system may show different files to different machines.
        """
        newest: list[Any] = []
        if self.rank == 0:
            folder = newest_checkpoint(self.run)
            if folder is not None:
                newest = [str(folder), json.loads((folder / META).read_text())]
        newest = broadcast_json(newest)
        return (Path(newest[0]), newest[1]) if newest else None

    # -- AP, rank 0 only -----------------------------------------------------------------------
    def evaluated(self, step: int) -> bool:
        """Whether the checkpoint of `step` has metrics."""
        return (self.folder / f"step-{step:08d}" / METRICS).exists()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes metrics.json of a checkpoint; updates `best` if no other one has a higher AP.

        Args:
            metrics: JSON values; `ap` is a number or None.
        """
        name = f"step-{step:08d}"
        _write_pointer(self.folder / name / METRICS, json.dumps(metrics, indent=1) + "\n")
        if metrics["ap"] is not None and metrics["ap"] > self._best_ap():
            _write_pointer(self.folder / BEST, name + "\n")

    def best(self) -> str | None:
        """The name of the checkpoint with the highest AP."""
        pointer = self.folder / BEST
        return pointer.read_text().strip() if pointer.is_file() else None

    def _best_ap(self) -> float:
        """-1 before the first evaluation."""
        metrics = self.folder / (self.best() or "none") / METRICS
        return float(json.loads(metrics.read_text())["ap"]) if metrics.is_file() else -1.0


# -- loading -----------------------------------------------------------------------------------
def check_continues(folder: Path, meta: dict[str, Any], config: dict[str, Any]) -> None:
    """Checks that a run may continue from a checkpoint.

    Args:
        meta: of the checkpoint in `folder`. config: of the run, as JSON values.

    Raises:
        UserError: another format, batch or model.
    """
    if meta.get("form") != FORMAT_VERSION:
        raise UserError(
            f"{folder} was saved by another version of evspan, in a format that this one cannot "
            f"continue. Start from its weights: run_dir=NEW checkpoint.init_from={folder}"
        )
    saved = meta["config"]
    precision = saved["training"]["precision"]
    if precision not in Precision.__members__:
        raise UserError(
            f"{folder} was trained with training.precision={precision}, which this version does "
            f"not have. Start from its weights: run_dir=NEW checkpoint.init_from={folder}"
        )
    for group, keys in CONTINUES.items():
        for key in keys:
            if saved[group][key] != config[group][key]:
                raise UserError(
                    f"{folder} was saved with {group}.{key}={saved[group][key]}, this run has "
                    f"{config[group][key]}, so it cannot continue it. "
                    "Give the old value, or another run_dir"
                )


def saved_precision(meta: dict[str, Any]) -> str | None:
    """training.precision of a checkpoint; None in a format that `check_continues` refuses."""
    training = meta.get("config", {}).get("training", {})
    precision: str | None = training.get("precision")
    return precision


class LoadedSnapshot(NamedTuple):
    """The part of a checkpoint that one rank continues from.

    weights, moments: by name. carry: the canonical state of the rank's lanes, one tensor after the
    other. generators: None if the checkpoint was saved with fewer ranks.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    carry: list[Tensor]
    generators: dict[str, Tensor] | None


def load_snapshot(folder: Path, lanes: range, rank: int) -> LoadedSnapshot:
    """Loads what a rank with these lanes needs from a checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    generators_file = folder / _generators_file(rank)
    try:
        return LoadedSnapshot(
            load_file(folder / WEIGHTS),
            load_file(folder / MOMENTS),
            _load_carry(folder, lanes),
            load_file(generators_file) if generators_file.exists() else None,
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {error}). "
            "Delete it to resume from the one before"
        ) from error


def _load_carry(folder: Path, lanes: range) -> list[Tensor]:
    """Collects `lanes` from the files of all ranks that saved them."""
    parts: list[list[Tensor]] = []
    for file in sorted(folder.glob("lanes-*.safetensors")):
        first, stop = map(int, file.stem.split("-")[1:])
        common = range(max(first, lanes.start), min(stop, lanes.stop))
        if common:
            tensors = [tensor for _, tensor in sorted(load_file(file).items())]
            parts.append([t.narrow(-4, common.start - first, len(common)) for t in tensors])
    carry = [torch.cat(pieces, -4) for pieces in zip(*parts, strict=True)]
    if not carry or any(t.shape[-4] != len(lanes) for t in carry):
        raise ValueError(f"no state of lanes {lanes.start} to {lanes.stop - 1}")
    return carry


# -- files -------------------------------------------------------------------------------------
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


def _write_pointer(path: Path, text: str) -> None:
    """Replaces a small file as a whole."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def _remove(path: Path) -> None:
    """Renames first: a checkpoint that is half deleted must not look complete."""
    renamed = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(path, renamed)
    shutil.rmtree(renamed)
