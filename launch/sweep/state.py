"""A run's state, from its history and from what SLURM's queue says of its job."""

import math
import os
import socket
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evspan.launch.slurm.client import Queued

Event = Mapping[str, Any]
WAITS = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESV_DEL_HOLD",
        "SPECIAL_EXIT",
    }
)


class State(Enum):
    waiting = "waiting"
    running = "running"
    requeued = "requeued"  # waits again
    saved = "saved"  # stopped by a signal; it continues when it is started again
    done = "done"
    failed = "failed"
    cancelled = "cancelled"
    lost = "lost"  # neither in the queue nor ended
    unknown = "unknown"  # has told nothing

    @property
    def unfinished(self) -> bool:
        """It goes on by itself."""
        return self in (State.waiting, State.running, State.requeued)


def judge(
    events: Sequence[Event], job: str, task: "Queued | None", *, asked: bool
) -> tuple[State, str]:
    """A run's state, and in a few words what it waits for or how it ended.

    Args:
        events: of its last submission. job: SLURM's id, empty where it is none. task: what the queue says of it; None: it is not
            there, or (not asked) there was no queue to ask.
    """
    since = events[_last_start(events) :]
    told = [e["event"] for e in since if e["event"] != "submitted"]
    last, begun = told[-1] if told else "", any(e["event"] == "start" for e in since)
    goes_on = task is not None and task.alive and task.state != "COMPLETING"
    for ended in (State.done, State.failed, State.cancelled):
        if ended.value in told and not (ended is State.cancelled and goes_on):
            return ended, ""
    if task is not None and task.alive:
        return _in_queue(task, last, begun)
    if last == "saved":
        return State.saved, "not in the queue" if job and asked else ""
    if job and asked:
        if task is not None and task.state == "CANCELLED":
            return State.cancelled, "by scancel"
        return State.lost, f"SLURM ended it: {task.state}" if task else "not in SLURM's queue"
    if last in ("fault", "requeued"):
        return State.requeued, ""
    if begun and not job and _gone(since[0]):
        return State.lost, f"process {since[0]['pid']} is gone"
    return (State.running, _starting(last)) if begun else (State.waiting, "")


def _in_queue(task: "Queued", last: str, begun: bool) -> tuple[State, str]:
    if task.state in WAITS:
        reason = task.reason.strip("()") if task.state == "PENDING" else task.state.lower()
        return State.requeued if begun else State.waiting, "" if reason == "None" else reason
    if last == "saved":
        return State.saved, "ending"
    return State.running, _starting(last) if task.state == "RUNNING" else task.state.lower()


def _starting(last: str) -> str:
    return "" if last == "running" else "starting"


def _gone(start: Event) -> bool:
    return (
        "pid" in start
        and start.get("host") == socket.gethostname()
        and not os.path.exists(f"/proc/{start['pid']}")
    )


def _last_start(events: Sequence[Event]) -> int:
    return max((i for i, e in enumerate(events) if e["event"] == "start"), default=0)


def of_submission(events: list[dict[str, Any]], submitted: Event) -> list[dict[str, Any]]:
    """Those since the run was last submitted: what came before belongs to another job."""
    job, at = submitted.get("job"), number(submitted.get("time")) or 0.0
    if not job:
        return events
    return next(
        (
            events[i:]
            for i, e in enumerate(events)
            if e.get("job") == job or e.get("time", 0.0) >= at
        ),
        [],
    )


def job_of(recent: Sequence[Event], submitted: Event) -> str:
    """SLURM's id of the job that these events are of; empty if it was started on this machine."""
    start = next((e for e in reversed(recent) if e["event"] == "start"), None)
    if start is not None and not start.get("job"):
        return ""
    return str(submitted.get("job") or (start or {}).get("job") or "")


def number(value: Any) -> float | None:
    """A finite one, or None."""
    return (
        value
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )
