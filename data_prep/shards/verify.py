"""Verifies a prepared dataset, and marks damaged recordings for the next `evspan prep`."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import RecordingError, ShardError
from evspan.data_prep.recordings.sources import find_sources
from evspan.data_prep.shards.atomic import FolderPermissionError, locked
from evspan.data_prep.shards.check import Task, Verified, verify_recording
from evspan.data_prep.shards.format import MANIFEST, SPLITS, load_manifest
from evspan.data_prep.shards.marks import read_marks, write_marks
from evspan.data_prep.shards.rvt_tree import (
    frame_problems,
    is_rvt_tree,
    open_recording,
    recording_folders,
)
from evspan.data_prep.workers import Progress, map_unordered

logger = logging.getLogger(__name__)
EARLIER = "marked earlier: "
MOST_TREE_CLASSES = 256  # RVT's tree has no names of classes


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification.

    Attributes:
        results: of each recording, by split/recording.
        damaged: what is wrong, by split/recording; includes those that were marked earlier.
        marked: whether the damage is marked; False where the folder may not be written to.
        is_tree: it is RVT's tree, which `evspan prep` does not mend.
    """

    results: dict[str, Verified]
    damaged: dict[str, str]
    marked: bool
    is_tree: bool = False


def verify(
    root: Path,
    source: Path | None = None,
    *,
    sample: int | None = 3,
    seed: int = 0,
    processes: int = 0,
) -> VerifyReport:
    """Checks all recordings of a prepared dataset, or of RVT's tree, where nothing is marked.

    Args:
        source: folder or list of the recordings; None: no frames are recomputed.
        sample: frames to recompute per recording; None: all.
        seed: selects the frames.
        processes: 0: one per core.

    Raises:
        ShardError: `root` is no prepared dataset.
        RecordingError: the source is not there, or has none of the recordings.
        UnavailableFileError: a file cannot be read now, which is no damage; nothing is marked.
        UserError: another process writes to `root`.
    """
    if not (root / MANIFEST).exists() and is_rvt_tree(root):
        return _verify_tree(root, processes)
    # Raises before a lock file is left in a folder that is no dataset.
    split = load_manifest(root).split_fractions
    sources = {s.key: s for s in find_sources(source, split)} if source else {}
    with _locked_to_mark(root) as writable:
        manifest = load_manifest(root)
        entries = {f"{r.split}/{r.name}": r for r in manifest.recordings}
        if sources and not sources.keys() & entries.keys():
            raise RecordingError(
                f"source {source} has none of the recordings of {root} ({min(sources)}, ...). Give "
                "the source of evspan prep"
            )
        absent = f"{source} does not have it" if source else ""
        tasks = [
            Task(root, entry, manifest.config, sources.get(key), absent, sample, seed)
            for key, entry in entries.items()
        ]
        results = _run(tasks, processes)
        damaged: dict[str, str] = {}
        for key, reason in read_marks(root).items():
            damaged[key] = EARLIER + reason.removeprefix(EARLIER)
        for key, result in results.items():
            if result.problems:
                damaged[key] = "; ".join(result.problems)
        if writable:
            write_marks(root, damaged)
    return VerifyReport(results, damaged, marked=writable)


@contextmanager
def _locked_to_mark(root: Path) -> Iterator[bool]:
    """Holds the lock on a folder that may be written to. Yields whether it may."""
    with ExitStack() as stack:
        writable = os.access(root, os.W_OK)
        if writable:
            try:
                stack.enter_context(locked(root, "evspan prep verify"))
            except FolderPermissionError as error:
                logger.warning("%s; what is found is not marked", error)
                writable = False
        yield writable


@dataclass(frozen=True)
class _TreeTask:
    """A recording of RVT's tree to check."""

    root: Path
    folder: Path

    @property
    def key(self) -> str:
        """split/recording."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def _verify_tree(root: Path, processes: int) -> VerifyReport:
    tasks: list[_TreeTask] = []
    for split in SPLITS:
        tasks += [_TreeTask(root, folder) for folder in recording_folders(root, split)]
    results: dict[str, Verified] = {}
    with (
        closing(map_unordered(_verify_tree_recording, tasks, processes)) as outcomes,
        Progress("verifying", len(tasks)) as progress,
    ):
        for outcome in outcomes:
            result = outcome.get()
            results[outcome.task.key] = result
            line = f"{outcome.task.key}: {_summary(result)}"
            progress.advance(line, important=bool(result.problems))
    damaged = {key: "; ".join(r.problems) for key, r in results.items() if r.problems}
    return VerifyReport(results, damaged, marked=False, is_tree=True)


def _verify_tree_recording(task: _TreeTask) -> Verified:
    try:
        recording = open_recording(task.root, task.folder, MOST_TREE_CLASSES)
    except ShardError as error:
        return Verified([str(error)])
    return Verified(frame_problems(recording))


def _run(tasks: list[Task], processes: int) -> dict[str, Verified]:
    results: dict[str, Verified] = {}
    with (
        closing(map_unordered(verify_recording, tasks, processes)) as outcomes,
        Progress("verifying", len(tasks)) as progress,
    ):
        for outcome in outcomes:
            key = outcome.task.key
            result = outcome.get()
            results[key] = result
            important = bool(result.problems or result.not_compared)
            progress.advance(f"{key}: {_summary(result)}", important=important)
    return results


def _summary(result: Verified) -> str:
    if result.problems:
        return f"damaged: {'; '.join(result.problems)}"
    if result.not_compared:
        return f"sound, but not compared with its recording: {result.not_compared}"
    if result.compared:
        return f"sound, {result.compared} frames equal those of its recording"
    return "sound"
