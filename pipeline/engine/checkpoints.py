"""Saves and loads checkpoints that are complete or absent, and that any layout can continue.

    RUN/checkpoints/step-00001000/
        meta.json                        step, the optimizer's counters, the run's resolved config,
                                         a digest of the data, checksums of all other files
        weights.safetensors              consolidated weights
        ema.safetensors                  their moving average, without training.ema_decay=0
        moments.safetensors              Adam's averages by parameter name
        lanes-0000-0003.safetensors      recurrent state of lanes 0, 1 and 2, as of one rank
        rank-0000.safetensors            a rank's generator states
        metrics.json                     AP, after an evaluation

Only the generator states depend on the number of ranks; nothing depends on the ZeRO stage. Every
rank computes the checksums of the files that it writes, from memory, and checks the files that it
reads; see evspan.pipeline.checkpoint_files.

A save has two phases. In the first, every rank writes its files; in the second, rank 0 writes
meta.json and renames the folder. A phase runs in a thread of each rank while training goes on, and
ends with an agreement of all ranks, outside of the thread: process groups are not shared with it.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evspan.conf.errors import TRANSIENT_ERRNOS, UserError
from evspan.pipeline.checkpoint_files import (
    BEST,
    EMA,
    FILES,
    FOLDER,
    FORMAT_VERSION,
    LATEST,
    META,
    MISSING,
    WEIGHTS,
    Damage,
    DamagedError,
    FileSum,
    Meta,
    Search,
    check_file,
    check_inventory,
    checkpoint_name,
    dump_with_checksum,
    find_newest_intact,
    find_weights,
    parse_meta,
    read_meta,
    step_names,
    step_of,
)
from evspan.pipeline.engine.background_task import start_task
from evspan.pipeline.engine.best_checkpoint import BestCheckpoint, fsync, write_file
from evspan.pipeline.engine.host_copies import HostCopies
from evspan.pipeline.history import append
from evspan.pipeline.parallel.reductions import broadcast_json, gather_json
from evspan.pipeline.rvt_checkpoint import is_published, open_weights
from evspan.pipeline.tensor_files import save_tensors
from evspan.pipeline.weights import (
    AVERAGE_KEY,
    Weights,
    generator_states,
    parse_average,
    read_weights,
    save_weights,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

logger = logging.getLogger(__name__)
MOMENTS = "moments.safetensors"
THREAD = "evspan-checkpoint"  # name of the thread that writes
CLOSE_S = 30.0  # how long the end of a run that failed waits for the thread
LATE_TRIES = 5
LATE_S = 2.0  # seconds between them
FALLBACK = "fallback"  # event in the history: a resume did not use what it expected


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, as one rank passes it to `Checkpoints.save`.

    weights, moments, average: read on rank 0 only. average: of the weights; None without one.
    lanes: of this rank.
    carry: the canonical state of these lanes, one tensor after the other; None if another rank of
        the sequence group saves it.
    generators: this rank's.
    copies: which all tensors are; they are read once its `wait` has returned.
    """

    meta: dict[str, Any]
    weights: Weights
    moments: dict[str, Tensor]
    lanes: range
    carry: Sequence[Tensor] | None
    average: Weights | None = None
    generators: dict[str, Tensor] = field(default_factory=generator_states)
    copies: HostCopies = field(default_factory=HostCopies)


@dataclass
class PendingSave:
    """A checkpoint that is being saved.

    Attributes:
        name: of the checkpoint. meta: of it, without checksums.
        task: this rank's part of the phase; its result are the checksums of the written files.
        commits: whether this is the second phase.
        first_step: the first step at whose micro-batches ranks can know that the task is done.
        is_agreed: whether it is done on all ranks.
    """

    name: str
    meta: dict[str, Any]
    task: "Future[dict[str, FileSum]]"
    first_step: int
    commits: bool = False
    is_agreed: bool = False


class LoadedSnapshot(NamedTuple):
    """The part of a checkpoint that one rank continues from.

    weights, moments: by name. carry: the canonical state of the rank's lanes, one tensor after the
    other. generators: None if the checkpoint was saved with fewer ranks. average: of the weights,
    by name; None if the checkpoint has none.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    carry: list[Tensor]
    generators: dict[str, Tensor] | None
    average: dict[str, Tensor] | None = None


class Resumed(NamedTuple):
    """The checkpoint that a run continues from: its folder, its meta.json, what this rank loads.

    search: rank 0's; of the other ranks, only the run.
    """

    folder: Path
    meta: dict[str, Any]
    snapshot: LoadedSnapshot
    search: Search


class Checkpoints:
    """Saves and finds the checkpoints of one run.

    Args:
        keep: how many of the newest ones to keep, in addition to the best.
        start_over: the run does not continue what is in its folder: the first save moves the
            checkpoints of the run before to `former-N`.
        started_over: work of rank 0 once that save is committed, in the thread that commits.
        asynchronous: write in a thread. The owner reports, with every step, whether any rank
            `is_writing`, and calls `advance` between steps.
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        keep: int,
        start_over: bool = False,
        started_over: Callable[[], None] = lambda: None,
        asynchronous: bool = False,
    ) -> None:
        self.folder = run / FOLDER
        self.run = run
        self.rank = rank
        self.keep = keep
        self.start_over = start_over
        self.started_over = started_over
        self.asynchronous = asynchronous
        self.best = BestCheckpoint(self.folder)
        self.pending: PendingSave | None = None
        self.warned_of_leftover = False

    # -- saving --------------------------------------------------------------------------------
    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Saves a checkpoint, after the one that is pending. A collective.

        The files are written to a temporary folder and synced, and the folder is renamed after all
        ranks have finished. `latest` is updated last. An asynchronous save returns once the thread
        has begun; `wait`, or `advance` between steps, ends it.

        Args:
            snapshot: its tensors must not change until then.

        Raises:
            UserError: on every rank, if one of them could not write. Earlier checkpoints stay.
        """
        self.wait()
        name = checkpoint_name(step)
        temporary = self._temporary(name)
        begin = start_task(lambda: self._begin(temporary, run=self.rank == 0), in_thread=False)
        self._agree(begin, name)
        self.pending = PendingSave(
            name,
            dict(snapshot.meta, form=FORMAT_VERSION, step=step),
            self._start(lambda: self._write_copies(temporary, snapshot)),
            first_step=step + 1,
        )
        if not self.asynchronous:
            self.wait()
        return self.folder / name

    def wait(self) -> None:
        """Ends the save that is pending, if one is. A collective.

        Raises:
            UserError: as `save` does.
        """
        while self.pending is not None:
            self._end_phase(self.pending, self.pending.first_step)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread has work."""
        return self.pending is not None and not self.pending.task.done()

    def observe(self, step: int, *, any_writing: bool) -> None:
        """Takes note of a step of all ranks.

        Args:
            any_writing: whether `is_writing` was true on any rank in its last micro-batch, the same
                on all ranks.
        """
        if self.pending is not None and step >= self.pending.first_step and not any_writing:
            self.pending.is_agreed = True

    @property
    def can_advance(self) -> bool:
        """Whether `advance` has something to do. The same on all ranks."""
        return self.pending is not None and self.pending.is_agreed

    def advance(self, step: int) -> None:
        """Ends the phase of the save that is pending once all ranks are done. A collective.

        Args:
            step: whose micro-batches were queued last.

        Raises:
            UserError: as `save` does.
        """
        if self.pending is not None and self.pending.is_agreed:
            self._end_phase(self.pending, step + 1)

    def close(self) -> None:
        """Waits for the thread for a while. What is not committed by now never will be."""
        if self.pending is not None:
            wait_for([self.pending.task], timeout=CLOSE_S)

    def _start(self, work: Callable[[], dict[str, FileSum]]) -> "Future[dict[str, FileSum]]":
        return start_task(work, in_thread=self.asynchronous, name=THREAD)

    def _end_phase(self, pending: PendingSave, first_step: int) -> None:
        """Agrees on a phase. Begins the second one after the first. first_step: for that one."""
        self.pending = None
        files = self._agree(pending.task, pending.name)
        if pending.commits:
            return
        self.pending = replace(
            pending,
            task=self._start(lambda: self._commit_on_main(pending, files)),
            first_step=first_step,
            commits=True,
            is_agreed=False,
        )

    def _agree(self, task: "Future[dict[str, FileSum]]", name: str) -> dict[str, FileSum]:
        """Waits for the task of every rank. Raises on all if one failed.

        Returns:
            What the tasks returned, together.
        """
        error = task.exception()
        result = {} if error else task.result()
        own_answer: list[Any] = [self._problem(error), _is_transient(error), result]
        answers = gather_json(own_answer, name="whether all ranks have saved")
        problems = [(text, is_transient) for text, is_transient, _ in answers if text]
        if problems:
            if self.rank == 0:
                # Frees space on a full disk.
                shutil.rmtree(self._temporary(name), ignore_errors=True)
            text, is_transient = problems[0]
            remedy = "free space or correct the permissions"
            if is_transient:
                remedy = "check the file system"
            problem = UserError(
                f"the checkpoint could not be saved: {text}. Earlier checkpoints are still in "
                f"{self.folder}; {remedy}, then run the same command again"
            )
            problem.is_transient = is_transient
            raise problem from error
        together: dict[str, FileSum] = {}
        for _, _, sums in answers:
            together |= {name: FileSum(*values) for name, values in sums.items()}
        return together

    def _problem(self, error: BaseException | None) -> str:
        """For the message; empty without an error."""
        if error is None:
            return ""
        if isinstance(error, OSError):
            return f"{error.filename or self.folder}: {error.strerror or error}"
        logger.error("a checkpoint could not be written", exc_info=error)
        return f"{type(error).__name__}: {error}"

    def _temporary(self, name: str) -> Path:
        return self.folder / f".writing-{name}"

    def _begin(self, temporary: Path, *, run: bool) -> dict[str, FileSum]:
        if not run:
            return {}
        for leftover in self.folder.glob(".writing-*"):  # of a run that was killed
            os.replace(leftover, _deleted_name(leftover))  # works where deleting does not
        for leftover in self.folder.glob(".deleting-*"):
            self._delete(leftover)
        temporary.mkdir(parents=True)
        return {}

    def _write_copies(self, folder: Path, snapshot: Snapshot) -> dict[str, FileSum]:
        snapshot.copies.wait()
        return self._write(folder, snapshot)

    def _write(self, folder: Path, snapshot: Snapshot) -> dict[str, FileSum]:
        """Writes this rank's files. Returns their checksums."""
        files = {}
        if self.rank == 0:
            files[WEIGHTS] = save_weights(folder / WEIGHTS, snapshot.weights)
            files[MOMENTS] = save_tensors(folder / MOMENTS, snapshot.moments)
            if snapshot.average is not None:
                files[EMA] = save_weights(folder / EMA, snapshot.average)
        if snapshot.carry is not None:
            lanes_file = _lanes_file(snapshot.lanes)
            files[lanes_file] = save_tensors(
                folder / lanes_file,
                {f"{i:04d}": tensor for i, tensor in enumerate(snapshot.carry)},
            )
        generators_file = _generators_file(self.rank)
        files[generators_file] = save_tensors(folder / generators_file, snapshot.generators)
        for name in files:
            fsync(folder / name)  # on the machine that wrote it
        return files

    def _commit_on_main(
        self, pending: PendingSave, files: dict[str, FileSum]
    ) -> dict[str, FileSum]:
        if self.rank == 0:
            final = self.folder / pending.name
            self._commit(self._temporary(pending.name), final, pending.meta, files)
        return {}

    def _commit(
        self, temporary: Path, final: Path, meta: dict[str, Any], files: dict[str, FileSum]
    ) -> None:
        sums = {name: files[name]._asdict() for name in sorted(files)}
        (temporary / META).write_bytes(dump_with_checksum({**meta, FILES: sums}))
        fsync(temporary / META)
        fsync(temporary)
        starts_over = self.start_over
        if starts_over:
            self._move_former()
            self.start_over = False
        replaced = _deleted_name(final)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        fsync(self.folder)
        if replaced.exists():
            self._delete(replaced)
        self._write_latest(final.name)
        try:
            self._remove_old(final.name)
        except OSError as error:  # the new checkpoint is complete in any case
            self._warn_of_leftover(self.folder, error)
        if starts_over:
            self.started_over()

    def _write_latest(self, name: str) -> None:
        write_file(self.folder / LATEST, f"{name}\n".encode())

    def _move_former(self) -> None:
        """Moves the checkpoints of a run that is started over to a folder of their own."""
        names = [*step_names(self.folder), LATEST, BEST]
        former = [self.folder / name for name in names if (self.folder / name).exists()]
        if not former:
            return
        number = 1
        while (self.folder / f"former-{number}").exists():
            number += 1
        folder = self.folder / f"former-{number}"
        folder.mkdir()
        for path in former:
            os.replace(path, folder / path.name)
        logger.info("the checkpoints of the run before this one are kept in %s", folder)

    def _remove_old(self, newest: str) -> None:
        """Removes all but `keep` intact checkpoints up to `newest`, and the best one."""
        best = self.best.name()
        kept = 0
        for name in step_names(self.folder):
            if step_of(name) > step_of(newest):
                continue
            if kept < self.keep:
                kept += self._is_complete(name)
            elif name != best:
                self._remove(self.folder / name)

    def _remove(self, path: Path) -> None:
        """Renames first: a checkpoint that is half deleted must not look complete."""
        renamed = _deleted_name(path)
        os.replace(path, renamed)
        self._delete(renamed)

    def _delete(self, path: Path) -> None:
        """Deletes a folder, as far as possible: the next save tries again.

        On NFS a file that a process has open becomes `.nfsXXXX`, and its folder stays.
        """
        try:
            shutil.rmtree(path)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)  # what the error has left
            if path.exists():
                self._warn_of_leftover(path, error)

    def _warn_of_leftover(self, path: Path, error: OSError) -> None:
        """Warns once. A save that is committed does not fail for what it leaves behind."""
        if self.warned_of_leftover:
            return
        self.warned_of_leftover = True
        logger.warning(
            "%s: an old checkpoint could not be deleted (%s: %s); it takes space and is not read. "
            "Every save tries again; to free it earlier, end the process that has its files open",
            path,
            error.filename or path.name,
            error.strerror or error,
        )

    def _is_complete(self, name: str) -> bool:
        """Whether meta.json is intact. The contents of the other files are not read."""
        try:
            read_meta(self.folder / name)
        except DamagedError:
            return False
        return True

    # -- resuming ------------------------------------------------------------------------------
    def resume(self, lanes: range, check: Callable[[Path, dict[str, Any]], None]) -> Resumed | None:
        """Loads the newest intact checkpoint. A collective.

        Rank 0 chooses, since a file system may show different files to different machines. Each
        rank checks what it reads. Where one finds damage, all use the next older checkpoint.

        Args:
            lanes: of this rank.
            check: is called with a checkpoint and its meta.json before anything else is read, on
                every rank; raises UserError where the run cannot continue it.

        Returns:
            None: the run has no checkpoint.

        Raises:
            UserError: none is intact, or `check` refuses.
        """
        damaged: list[Damage] = []
        while True:
            meta = self._find(damaged)
            if meta is None:
                return None
            folder = self.folder / checkpoint_name(meta.values["step"])
            check(folder, meta.values)
            problem: list[str] = []
            try:
                _check_counters(folder, meta)
                snapshot = self._load(folder, lanes, meta)
            except DamagedError as error:
                problem = [error.file, error.problem]
            problems = [
                found
                for found in gather_json(problem, name="whether all ranks have loaded")
                if found
            ]
            if not problems:
                return Resumed(folder, meta.values, snapshot, self.search)
            damaged.append(Damage(folder.name, *problems[0]))

    def _find(self, damaged: Sequence[Damage]) -> Meta | None:
        """The newest checkpoint with all its files, on every rank. A collective."""
        self.search = Search(self.run)
        answer: dict[str, Any] = {}
        if self.rank == 0:
            try:
                self.search = find_newest_intact(self.run, (), passed_over=damaged)
                self.search.require()
                if self.search.name is not None:
                    meta = read_meta(self.search.folder)
                    answer = {"meta": meta.values, "has_checksum": meta.files is not None}
            except UserError as error:
                answer = {"problem": str(error)}
        answer = broadcast_json(answer, name="newest checkpoint")
        if "problem" in answer:
            raise UserError(answer["problem"])
        if not answer:
            return None
        return parse_meta(self.folder, answer["meta"], has_checksum=answer["has_checksum"])

    def _load(self, folder: Path, lanes: range, meta: Meta) -> LoadedSnapshot:
        """What this rank needs. Rank 0 also checks what no rank may need.

        A network file system may show a file late to another machine than rank 0's, which has seen
        all of them.
        """
        if self.rank == 0:
            self._check_generators(folder, meta)
            return load_snapshot(folder, lanes, self.rank, meta)
        for _ in range(LATE_TRIES):
            try:
                return load_snapshot(folder, lanes, self.rank, meta)
            except DamagedError as error:
                if error.problem != MISSING:
                    raise
            time.sleep(LATE_S)
        return load_snapshot(folder, lanes, self.rank, meta)

    def _check_generators(self, folder: Path, meta: Meta) -> None:
        """Checks the files of ranks that this run may not have."""
        for name in meta.files or {}:
            if name.startswith("rank-"):
                check_file(folder, meta, name)

    def accept(self, resumed: Resumed) -> None:
        """Sets damaged checkpoints aside, corrects the pointers and reports it. Rank 0 only.

        Raises:
            OSError: the folder cannot be written to.
        """
        search = resumed.search
        message = search.message()
        problems = [message] if message else []
        if problems:
            for damage in search.damaged:
                self._set_aside(damage.checkpoint)
            self._write_latest(resumed.folder.name)
        problems += self.best.repair(resumed.folder.name)
        if search.damaged:
            problems.append("what is damaged is kept as damaged-*")
        if problems:
            message = f"{self.folder}: {'; '.join(problems)}"
            logger.warning("%s", message)
            append(self.run, FALLBACK, step=resumed.meta["step"], message=message)
        if FILES not in resumed.meta:
            logger.warning(
                "%s has no checksums, as an earlier version saved it: what is damaged in it would "
                "not be noticed",
                resumed.folder,
            )

    def _set_aside(self, name: str) -> None:
        """Renames a checkpoint, so that it is not counted, and a later save does not replace it."""
        aside = self.folder / f"damaged-{name}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"damaged-{name}-{number}"
        os.replace(self.folder / name, aside)

    # -- AP, rank 0 only -----------------------------------------------------------------------
    def evaluated(self, step: int) -> bool:
        """Whether the checkpoint of `step` has metrics."""
        return self.best.evaluated(step)

    def recorded(self, step: int) -> dict[str, Any]:
        """The metrics of the checkpoint of `step`; {} without intact ones."""
        return self.best.recorded(step)

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes metrics.json of the newest checkpoint; updates `best` where it has an AP.

        Args:
            metrics: JSON values; `ap` is a number or None.
        """
        self.best.record(step, metrics)


# -- loading -----------------------------------------------------------------------------------
def load_snapshot(
    folder: Path, lanes: range, rank: int, meta: Meta | None = None
) -> LoadedSnapshot:
    """Loads what a rank with these lanes needs from a checkpoint, and checks it before.

    Args:
        meta: of the checkpoint, where the caller has read it.

    Raises:
        DamagedError: a file is missing or damaged.
    """
    if meta is None:
        meta = read_meta(folder)
        check_inventory(folder, meta)
    generators_file = _generators_file(rank)
    names = _names(folder, meta)
    return LoadedSnapshot(
        _load_tensors(folder, meta, WEIGHTS),
        _load_tensors(folder, meta, MOMENTS),
        _load_carry(folder, meta, lanes),
        _load_tensors(folder, meta, generators_file) if generators_file in names else None,
        _load_tensors(folder, meta, EMA) if EMA in names else None,
    )


def _check_counters(folder: Path, meta: Meta) -> None:
    for name in ("updates", "adam_steps"):
        value = meta.values["counters"].get(name)
        if not isinstance(value, int) or value < 0:
            raise DamagedError(folder, META, f"has no counter {name}")
    if EMA in (meta.files or ()):
        try:
            parse_average(meta.values.get(AVERAGE_KEY))
        except (UserError, KeyError, TypeError):
            raise DamagedError(
                folder, META, f"has no {AVERAGE_KEY}, or not as it is saved"
            ) from None


def _names(folder: Path, meta: Meta) -> list[str]:
    """The files of a checkpoint."""
    if meta.files is not None:
        return sorted(meta.files)
    return sorted(path.name for path in folder.iterdir())


def _load_tensors(folder: Path, meta: Meta, name: str) -> dict[str, Tensor]:
    check_file(folder, meta, name)
    try:
        return load_file(folder / name)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(folder, name, f"cannot be read ({error})") from error


def _load_carry(folder: Path, meta: Meta, lanes: range) -> list[Tensor]:
    """Collects `lanes` from the files of all ranks that saved them."""
    parts: list[list[Tensor]] = []
    for name in _names(folder, meta):
        saved = _saved_lanes(name)
        common = range(max(saved.start, lanes.start), min(saved.stop, lanes.stop))
        if common:
            tensors = [tensor for _, tensor in sorted(_load_tensors(folder, meta, name).items())]
            parts.append([t.narrow(-4, common.start - saved.start, len(common)) for t in tensors])
    files = _lanes_file(lanes)
    if len({len(tensors) for tensors in parts}) != 1:
        raise DamagedError(folder, files, "is missing, or of another model")
    carry = [torch.cat(pieces, -4) for pieces in zip(*parts, strict=True)]
    if not carry or any(t.shape[-4] != len(lanes) for t in carry):
        raise DamagedError(folder, files, "and others do not have the state of all these lanes")
    return carry


def load_same_weights(path: str | Path, rank: int, *, raw: bool = False) -> Weights:
    """`open_weights`, the same file on every rank. A collective; rank 0 chooses and reports.

    Raises:
        UserError: there is none, another program wrote it, or the checkpoint is damaged.
    """
    answer: dict[str, str] = {}
    if rank == 0:
        try:
            found = find_weights(Path(path), raw=raw)
            if found.message:
                logger.warning("%s", found.message)
            answer = {"file": str(found.file)}
        except UserError as error:
            answer = {"problem": str(error)}
    answer = broadcast_json(answer, name="weights to load")
    if "problem" in answer:
        raise UserError(answer["problem"])
    file = Path(answer["file"])
    return read_weights(file) if rank == 0 and not is_published(file) else open_weights(file)


# -- files -------------------------------------------------------------------------------------
def _lanes_file(lanes: range) -> str:
    return f"lanes-{lanes.start:04d}-{lanes.stop:04d}.safetensors"


def _saved_lanes(name: str) -> range:
    """The inverse of `_lanes_file`; no lanes for another file."""
    words = name.removesuffix(".safetensors").split("-")
    if len(words) == 3 and words[0] == "lanes" and words[1].isdecimal() and words[2].isdecimal():
        return range(int(words[1]), int(words[2]))
    return range(0)


def _generators_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _deleted_name(path: Path) -> Path:
    """A new name for a folder that is deleted: the one before may still be there."""
    name = f".deleting-{path.name.lstrip('.')}"
    renamed = path.with_name(name)
    number = 1
    while renamed.exists():
        number += 1
        renamed = path.with_name(f"{name}-{number}")
    return renamed


def _is_transient(error: BaseException | None) -> bool:
    """Whether a save may succeed later, unchanged."""
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS
