"""Waiting for the tasks of an array: what they tell, and which of them ended without telling."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from evspan.conf.errors import RecordingError, UserError
from evspan.launch.slurm.client import Queued, queue
from evspan.launch.slurm.prep_task import Results, arrived, read_told
from tqdm import tqdm

POLL_S = 1.0  # between looks at what the tasks have told
QUEUE_S = 10.0  # between questions to SLURM's controller, which all users share
GRACE_S = 10.0  # a shared file system may show so late what a task told at its end


def say(line: str) -> None:
    """Beside a progress bar, too."""
    tqdm.write(line)


@dataclass
class Watch:
    """`sacct` is not asked: many clusters have no accounting, and without it Submitit waits for killed tasks for ever.

    name: of the job. missing: what is not told of yet, by number. tasks: SLURM's ids. groups: the numbers that each task has.
    """

    name: str
    told: Path
    missing: dict[int, Any]
    tasks: list[str]
    groups: list[list[int]]
    logs: list[Path]
    ended: dict[str, float] = field(default_factory=dict)  # task -> since when SLURM says so
    said: str = ""

    def results(self) -> Results:
        """As they come: each job with a function that gives or raises what became of it."""
        asked = -math.inf
        while True:
            yield from self._told()
            if not self.missing:
                return
            if time.monotonic() - asked >= QUEUE_S:
                yield from self._lost()
                asked = time.monotonic()
            time.sleep(POLL_S)

    def _told(self) -> Results:
        for number in sorted(arrived(self.told) & self.missing.keys()):
            entry, failure = read_told(self.told, number)
            yield self.missing.pop(number), _giver(entry) if failure is None else _raiser(failure)

    def _lost(self) -> Results:
        """Jobs of tasks that ended without telling of them."""
        try:
            known = {task.id: task for task in queue(self.name)}
        except UserError as error:  # it will answer again
            self._say(f"{error}; still waiting")
            return
        self._say(_summary([known[id_] for id_ in self.tasks if id_ in known]))
        now = time.monotonic()
        for id_, numbers, log in zip(self.tasks, self.groups, self.logs, strict=True):
            task = known.get(id_)
            if (task and task.alive) or not self.missing.keys() & set(numbers):
                self.ended.pop(id_, None)
            elif now - self.ended.setdefault(id_, now) >= GRACE_S:
                os.utime(self.told)  # has NFS read the folder anew
                yield from self._told()
                how = f"ended as {task.state}" if task else "is no longer known to SLURM"
                for number in [n for n in numbers if n in self.missing]:
                    yield (
                        self.missing.pop(number),
                        _raiser(
                            RecordingError(
                                f"SLURM task {id_} {how} before it was done; its log is {log}{_last_line(log)}"
                            )
                        ),
                    )

    def _say(self, line: str) -> None:
        if line and line != self.said:
            say(line)
        self.said = line


def _summary(tasks: list[Queued]) -> str:
    """'SLURM: 2 running, 3 pending (Priority)'; nothing when all have ended."""
    counts: dict[str, int] = {}
    for task in tasks:
        if task.alive:
            why = f" {task.reason}" if task.state == "PENDING" and task.reason != "(None)" else ""
            what = f"{task.state.lower()}{why}"
            counts[what] = counts.get(what, 0) + 1
    return (
        f"SLURM: {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}" if counts else ""
    )


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:  # it never began
        return ""
    return next((f" and ends with: {line.strip()}" for line in reversed(lines) if line.strip()), "")


def _giver(value: Any) -> Callable[[], Any]:
    return lambda: value


def _raiser(error: Exception) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail
