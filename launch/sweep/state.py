"""Infers the state of a run from its history and from SLURM's queue."""

import math
import socket
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from evspan.conf.text import printable
from evspan.pipeline.history import OBSERVATIONS

if TYPE_CHECKING:
    from evspan.launch.slurm.client import Queued

Event = Mapping[str, Any]
CLOCK_S = 60.0  # the clock may have been set since
WAITING_STATES = frozenset(
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
    """What a run is doing, or how it ended."""

    waiting = "waiting"
    running = "running"
    requeued = "requeued"  # waits for its next attempt
    saved = "saved"  # stopped by a signal; it continues when it is started again
    done = "done"
    failed = "failed"
    cancelled = "cancelled"
    pruned = "pruned"  # a search has stopped it; its checkpoint is kept
    lost = "lost"  # it has not ended, but neither SLURM nor this machine runs it
    unknown = "unknown"  # there is no history

    @property
    def unfinished(self) -> bool:
        """Whether the run continues without a user's action."""
        return self in (State.waiting, State.running, State.requeued)


class RunState(NamedTuple):
    """A state, and in a few words what the run waits for or how it ended (may be empty)."""

    state: State
    reason: str = ""


def infer_state(
    events: Sequence[Event], job: str, task: "Queued | None", *, queue_read: bool
) -> RunState:
    """Infers the state of a run.

    Args:
        events: history of the last submission, oldest first.
        job: SLURM job id; empty for a run that was started on this machine.
        task: the job's entry in SLURM's queue. None if the queue has no such job, or was not read.
        queue_read: whether SLURM's queue was read.
    """
    events = [event for event in events if event["event"] not in OBSERVATIONS]
    attempt = events[_last_start(events) :]
    names = [event["event"] for event in attempt if event["event"] != "submitted"]
    last_name = names[-1] if names else ""
    started = "start" in names or "requeued" in names
    in_queue = task is not None and task.alive

    for final in (State.done, State.failed, State.cancelled, State.pruned):
        if final.value not in names:
            continue
        ending = task is not None and task.state == "COMPLETING"
        if final in (State.cancelled, State.pruned) and in_queue and not ending:
            continue  # SLURM has not carried it out yet
        reasons = [event.get("reason") for event in attempt if event["event"] == final.value]
        return RunState(final, printable(str(reasons[-1])) if reasons[-1] else "")
    if task is not None and in_queue:
        return _queued_state(task, attempt, last_name, started)
    if last_name == "saved":
        return RunState(State.saved, "not in the queue" if job and queue_read else "")
    if job and queue_read:
        return _state_outside_queue(task)
    if last_name in ("fault", "requeued"):
        return RunState(State.requeued, _requeue_reason(attempt))
    if not started:
        return RunState(State.waiting)
    if not job and _process_ended(attempt[0]):
        return RunState(State.lost, f"process {attempt[0]['pid']} has ended")
    return RunState(State.running, _startup_reason(last_name))


def _queued_state(
    task: "Queued", attempt: Sequence[Event], last_name: str, started: bool
) -> RunState:
    """The state of a run whose job is in the queue."""
    if task.state in WAITING_STATES:
        state = State.requeued if started else State.waiting
        reason = task.state.lower()
        if task.state == "PENDING":
            reason = task.reason.strip("()")
        reasons = [_requeue_reason(attempt), "" if reason == "None" else reason]
        return RunState(state, ", ".join(filter(None, reasons)))
    if last_name == "saved":
        return RunState(State.saved, "ending")
    if task.state == "COMPLETING" and last_name == "requeued":
        return RunState(State.requeued, _requeue_reason(attempt))
    if task.state == "RUNNING":
        return RunState(State.running, _startup_reason(last_name))
    return RunState(State.running, task.state.lower())


def _state_outside_queue(task: "Queued | None") -> RunState:
    """The state of a run that did not record its end and whose job SLURM does not run."""
    if task is None:
        return RunState(State.lost, "not in SLURM's queue")
    if task.state == "CANCELLED":
        return RunState(State.cancelled, "by scancel")
    return RunState(State.lost, f"SLURM ended it: {task.state}")


def _requeue_reason(attempt: Sequence[Event]) -> str:
    """Why the run was requeued, if its history has a reason."""
    last = attempt[-1] if attempt else {}
    return str(last.get("reason", "")) if last.get("event") == "requeued" else ""


def _startup_reason(last_name: str) -> str:
    if last_name == "pruned":
        return "pruned, ending"
    return "" if last_name == "running" else "starting"


def _process_ended(start: Event) -> bool:
    """Whether the attempt ran on this machine and its process no longer exists."""
    if "pid" not in start or start.get("host") != socket.gethostname():
        return False
    try:
        created = psutil.Process(start["pid"]).create_time()
    except psutil.AccessDenied:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return True
    # A later process may have the same id, after a reboot for instance.
    return bool(created > start["time"] + CLOCK_S)


def _last_start(events: Sequence[Event]) -> int:
    """Index of the last start event; 0 if there is none."""
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    return starts[-1] if starts else 0


def last_start(events: Sequence[Event]) -> Event:
    """The last start event; empty if there is none."""
    for event in reversed(events):
        if event["event"] == "start":
            return event
    return {}


def events_of_submission(events: list[dict[str, Any]], submitted: Event) -> list[dict[str, Any]]:
    """The events since the run was last submitted. Earlier ones belong to another job."""
    job = submitted.get("job")
    submitted_at = number(submitted.get("time")) or 0.0
    if not job:
        return events
    for i, event in enumerate(events):
        if event.get("job") == job or event.get("time", 0.0) >= submitted_at:
            return events[i:]
    return []


def job_of_events(events: Sequence[Event], submitted: Event) -> str:
    """SLURM id of the job that wrote the events; empty if the run was started on this machine."""
    start = last_start(events)
    if start and not start.get("job"):
        return ""
    return str(submitted.get("job") or start.get("job") or "")


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
