"""`cluster.fail_fast`: ends a sweep when its first runs fail with the same error."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evspan.pipeline.history import read

FIRST_RUNS = 3  # of a sweep; all of a smaller one, but at least two
LEAST_RUNS = 2
_RANK = re.compile(r"rank-\d+ on \S+: ")


class EndedRun(NamedTuple):
    """A run that has ended. error: its message; empty if it did not fail."""

    folder: Path
    error: str


def same_error(ended: Sequence[EndedRun], runs: int) -> str:
    """The message with which the sweep ends; empty while it goes on.

    Args:
        ended: the runs that have ended, in the order of their ends.
        runs: of the sweep.
    """
    count = max(LEAST_RUNS, min(FIRST_RUNS, runs))
    first = ended[:count]
    if len(first) < count or not all(run.error for run in first):
        return ""
    if len({_without_place(run) for run in first}) > 1:
        return ""
    return (
        f"the first {count} runs failed with the same error, which ends the sweep "
        f"(cluster.fail_fast): {first[0].error}"
    )


def error_of_sweep(folders: Sequence[Path]) -> str:
    """As `same_error`, from the histories of a sweep's runs."""
    return same_error(ended_runs(folders), len(folders))


def ended_runs(folders: Sequence[Path]) -> list[EndedRun]:
    """The runs that were started and have ended, in the order of their ends."""
    ended: list[tuple[float, EndedRun]] = []
    for folder in folders:
        events = read(folder)
        was_started = any(event["event"] in ("start", "submitted") for event in events)
        if not was_started:
            continue
        if events[-1]["event"] == "failed":
            error = str(events[-1].get("message") or "failed")
            ended.append((events[-1]["time"], EndedRun(folder, error)))
        elif events[-1]["event"] == "done":
            ended.append((events[-1]["time"], EndedRun(folder, "")))
    return [run for _, run in sorted(ended)]


def _without_place(run: EndedRun) -> str:
    """The error without numbers, and without names of ranks, nodes and folders."""
    text = _RANK.sub("", run.error)
    text = text.replace(str(run.folder.absolute()), "").replace(str(run.folder), "")
    return re.sub(r"\d+", "#", text)
