"""Divides the wall time of a rank into parts, by the host's clock.

    account = TimeAccount()
    account.enter(Part.setup)              # what the rank does from now on
    with account.part(Part.evaluation):    # what it does inside, instead
        ...

Every second belongs to exactly one part, so the parts add up to the time since the start. Nothing
waits for a device: on a GPU, the host's time in a step is mostly the time that the device needs for
the steps before it. Every rank has an account; rank 0 writes its own into the run's folder.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
from evspan.pipeline.history import slurm_job
from evspan.pipeline.time_records import (
    FOLDER,
    AttemptTime,
    Part,
    attempt_path,
    read_attempts,
    steps_reached,
    this_allocation,
    write_attempt,
)

logger = logging.getLogger(__name__)
WRITE_EVERY_S = 5.0
# These count as the part around them where that is one of ENCLOSING.
ENCLOSED = frozenset({Part.data_wait, Part.exchange})
ENCLOSING = frozenset({Part.first_step, Part.repeated, Part.setup})

_process_is_counted = False  # whether an account has counted the time since the process's start


class TimeAccount:
    """The time of one attempt of a rank, by part. Starts with `part`.

    Args:
        part: what the rank does now.
        since_process_start: whether the time since the start of this process counts, as that of
            imports. Only the first account of a process counts it.
    """

    def __init__(self, part: Part = Part.setup, *, since_process_start: bool = False) -> None:
        self.start = time.time()
        self.repeats_until = 0  # the last step that an earlier attempt has done
        self._lock = threading.RLock()  # the writer's thread reads what the rank's thread changes
        self._seconds = dict.fromkeys(Part, 0.0)
        self._stack = [part]  # innermost last
        self._since = time.perf_counter()  # until then, all time is counted
        self._movable = 0.0  # training since the last `move_from_training`
        self._has_stepped = False
        self._step = 0
        self._stepped = 0.0
        self.is_recorded = False  # in the folder of a run
        self._writer: _Writer | None = None
        if since_process_start:
            self._count_process()

    def _count_process(self) -> None:
        global _process_is_counted
        if _process_is_counted:
            return
        _process_is_counted = True
        created = min(self.start, psutil.Process().create_time())
        self._seconds[Part.imports] += self.start - created
        self.start = created

    # -- what the rank does ------------------------------------------------------------------------
    def enter(self, part: Part) -> None:
        """The rank does this from now on, where it is not inside of `part()`."""
        with self._lock:
            self._charge()
            self._stack[0] = part

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """The rank does this inside; afterwards again what it did before."""
        with self._lock:
            self._charge()
            is_enclosed = part in ENCLOSED and self._stack[-1] in ENCLOSING
            self._stack.append(self._stack[-1] if is_enclosed else part)
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._stack.pop()

    def start_step(self, step: int) -> None:
        """A training step begins. Until `first_step_ended`, it is part of the start."""
        if not self._has_stepped:
            part = Part.first_step
        elif step <= self.repeats_until:
            part = Part.repeated
        else:
            part = Part.training
        self.enter(part)

    def end_step(self, step: int) -> None:
        """The step is complete, or all its work is queued on the device."""
        with self._lock:
            self._step = step
            self._stepped = time.time()

    def first_step_ended(self) -> None:
        """The values of the attempt's first step were read; what follows is training."""
        self._has_stepped = True
        self.enter(Part.training)

    def move_from_training(self, part: Part, seconds: float) -> None:
        """Counts a part of the training time since the last call as another part.

        For times that are measured otherwise, such as by events on a device.
        """
        with self._lock:
            self._charge()
            moved = min(max(0.0, seconds), self._movable)
            self._seconds[Part.training] -= moved
            self._seconds[part] += moved
            self._movable = 0.0

    def _charge(self) -> None:
        """Counts the time until now as the innermost part."""
        now = time.perf_counter()
        elapsed = now - self._since
        self._since = now
        part = self._stack[-1]
        self._seconds[part] += elapsed
        if part is Part.training:
            self._movable += elapsed

    def seconds(self) -> dict[Part, float]:
        """The time since the start by part."""
        with self._lock:
            self._charge()
            return dict(self._seconds)

    # -- the record in the run's folder ------------------------------------------------------------
    def write_to(
        self, run: str | Path, *, first_step: int, starts_over: bool, ranks: int, gpu: bool
    ) -> None:
        """Keeps a record in the run's folder from now on, and finds out which steps are repeated.

        Args:
            first_step: of the checkpoint that the attempt continues from.
            starts_over: whether earlier attempts do not count.
            ranks: of the run. gpu: whether they are GPUs.
        """
        attempts = []
        try:
            Path(run, FOLDER).mkdir(parents=True, exist_ok=True)
            attempts = read_attempts(run)
        except OSError as error:
            logger.warning("the time of earlier attempts is not known: %s", error)
        with self._lock:
            self._step = first_step
            if not starts_over:
                self.repeats_until = steps_reached(attempts)
        allocation = this_allocation(ranks)
        record = AttemptTime(
            start=self.start,
            written=self.start,
            seconds={},
            closed=False,
            part=Part.setup,
            first_step=first_step,
            step=first_step,
            stepped=0.0,
            starts_over=starts_over,
            job=slurm_job(),
            allocated=allocation.start if allocation else 0.0,
            ranks=ranks,
            gpu=gpu,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.is_recorded = True
        self._writer = _Writer(self, attempt_path(run, self.start), record)

    def record(self, base: AttemptTime, *, closed: bool) -> AttemptTime:
        """`base` with the times until now."""
        with self._lock:
            self._charge()
            return replace(
                base,
                written=self.start + sum(self._seconds.values()),
                seconds=dict(self._seconds),
                closed=closed,
                part=self._stack[-1],
                step=self._step,
                stepped=self._stepped,
            )

    def close(self) -> None:
        """Writes the last record of an attempt that ends in order. The rest counts as its end."""
        self.enter(Part.ending)
        if self._writer is not None:
            self._writer.close(in_order=True)
            self._writer = None

    def abandon(self) -> None:
        """Writes the last record of an attempt that ends by an error."""
        if self._writer is not None:
            self._writer.close(in_order=False)
            self._writer = None


class _Writer:
    """Writes the record of an account every few seconds, in a thread."""

    def __init__(self, account: TimeAccount, path: Path, record: AttemptTime) -> None:
        self.account = account
        self.path = path
        self.base = record
        self.has_failed = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="time account", daemon=True)
        self._write(closed=False)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.wait(WRITE_EVERY_S):
            self._write(closed=False)

    def _write(self, *, closed: bool) -> None:
        """A run does not end because its time cannot be recorded: the first failure is logged."""
        try:
            write_attempt(self.path, self.account.record(self.base, closed=closed))
        except OSError as error:
            if not self.has_failed:
                logger.warning("%s could not be written; the run goes on: %s", self.path, error)
            self.has_failed = True

    def close(self, *, in_order: bool) -> None:
        self.ended.set()
        self.thread.join()
        self._write(closed=in_order)
