"""One writer per run folder: training, submission, evaluation (`evspan.conf.folder_lock`).

`evspan train` holds the lock from before it writes anything until all its ranks have ended. Under
torchrun or SLURM, rank 0 holds it. The processes that a holder starts share its lock, and die with
it: `RunLock.environment` tells them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from evspan.conf.failure_notes import report_lost_ranks
from evspan.conf.folder_lock import STALE_S, WATCH_S, FolderLock, holder_of
from evspan.pipeline.history import HISTORY
from evspan.pipeline.parallel.rank_exit import exit_now

HELD_LOCK = "EVSPAN_RUN_LOCK"  # environment variable: token of the lock that the parent holds
TRAINING_RESULTS = "evaluation"  # below a run: what training evaluates
# An attempt of a SLURM job waits for a submission that is being recorded, and for a holder on
# another node that was killed.
ATTEMPT_WAIT_S = STALE_S + WATCH_S + 80.0

_held: dict[Path, FolderLock] = {}  # by this process


class RunLock:
    """Holds the lock on a run's folder while it is open as a context.

    It does nothing where this process, or the parent that started it as a rank, holds it already.

    Args:
        purpose: the command that holds it, for people.
        wait_s: seconds to wait for another holder.
    """

    def __init__(self, folder: str | Path, purpose: str, *, wait_s: float = 0.0) -> None:
        self.folder = Path(folder)
        self.purpose = purpose
        self.wait_s = wait_s
        self._taken: FolderLock | None = None

    def __enter__(self) -> "RunLock":
        """Takes the lock.

        Raises:
            FolderInUseError: another process has it; the message names the process.
            OSError: the folder cannot be written to.
        """
        if self._key in _held or self._is_parents():
            return self
        lock = FolderLock(self.folder, self.purpose, wait_s=self.wait_s, end=exit_now)
        self._taken = lock.__enter__()
        _held[self._key] = lock
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the lock if this object took it."""
        if self._taken is not None:
            _held.pop(self._key, None)
            self._taken.__exit__(kind, error, traceback)
            self._taken = None

    def environment(self) -> dict[str, str]:
        """Environment variables by which processes that this one starts share the lock."""
        lock = _held.get(self._key)
        return {HELD_LOCK: lock.holder.token} if lock else {}

    @property
    def _key(self) -> Path:
        return self.folder.resolve()

    def _is_parents(self) -> bool:
        token = os.environ.get(HELD_LOCK)
        if not token:
            return False
        holder = holder_of(self.folder)
        return holder is not None and holder.token == token


@contextmanager
def attempt_lock(run: str | Path, *, is_main: bool) -> Iterator[None]:
    """Holds the lock of a run for an attempt, on rank 0.

    In a SLURM job it waits for another holder: for the submission that is being recorded, or an
    earlier attempt that is still ending.

    Raises:
        FolderInUseError: another process has it.
    """
    if not is_main:
        yield
        return
    with training_lock(run):
        yield


def training_lock(run: str | Path) -> RunLock:
    """The lock of a run for a command or a rank that trains it.

    Inside of a SLURM job, also one that the user wrote, it waits for another holder and logs which
    one: the job may follow one whose processes were killed, or still end. Elsewhere it does not.
    """
    wait_s = ATTEMPT_WAIT_S if "SLURM_JOB_ID" in os.environ else 0.0
    return RunLock(run, "evspan train", wait_s=wait_s)


@contextmanager
def results_lock(output: Path, *, is_main: bool) -> Iterator[None]:
    """Holds the lock of an evaluation's folder, on rank 0.

    RUN/evaluation, to which training writes, is locked by the lock of the run.

    Raises:
        FolderInUseError: another process has it.
    """
    if not is_main:
        yield
        return
    folder = output
    if output.name == TRAINING_RESULTS and (output.parent / HISTORY).exists():
        folder = output.parent
    with RunLock(folder, "evspan evaluate"):
        yield


def end_if_taken_over(run: str | Path) -> None:
    """Ends this process if it held the lock of a run and another process has taken it over.

    Call it before writing what two processes must not write.
    """
    lock = _held.get(Path(run).resolve())
    if lock is not None and not lock.is_held():
        message = f"{run} was taken over by another process; this one ends and writes nothing more"
        exit_now(report_lost_ranks(message))
