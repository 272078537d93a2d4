"""Reads and writes the history of a run: RUN/history.jsonl and RUN/progress.json.

history.jsonl has one line of JSON per event, appended by ranks and launchers. An attempt is one
life of a run, from its start to its exit. Every event has `event`, `time` (seconds since 1970) and
mostly `step`, by default the step of the newest checkpoint:

    start      attempt, of (the last step), host, pid, job; digest and commit of the code
    initialized message: the weights that the run started from, and what was loaded of them
    running    seconds from the start of the process to the end of its first step
    saved, done, cancelled, submitted
    pruned     reason: a search has stopped the run
    requeued   reason, if the time limit was reached
    continued  job: a successor has taken over; message, if it could not submit the next one
    time_limit message
    fallback   message: what was damaged in the checkpoints, and which one is used instead
    changed    message: the settings that differ from the checkpoint's
    fault      message, code
    failed     message, code
    spike      loss, mean, sigma, sigmas, steps, micro_batch, batch: a loss far above those of the
               steps before it, and what was read (engine/loss_spikes.py)
    slow_rank  message, rank, ratio, part: a rank takes longer than the others
               (engine/slow_ranks.py)

ranks.json has the step times of all ranks (engine/slow_ranks.py).
progress.json is the state after the last logged step. activity.json is what the run does: its
`activity`, `time` and `step`.
"""

import json
import logging
import os
import socket
import time
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from evspan.conf.code_version import running_code
from evspan.conf.json_files import JsonFileError, parse_json, read_json_object
from evspan.conf.text import plural

logger = logging.getLogger(__name__)
HISTORY = "history.jsonl"
PROGRESS = "progress.json"
RANKS = "ranks.json"
ACTIVITY = "activity.json"
SPIKE = "spike"
SLOW_RANK = "slow_rank"
OBSERVATIONS = frozenset({SPIKE, SLOW_RANK})  # events that do not change the state of a run
MOST_HISTORY_BYTES = 64 << 20
MOST_NUMBER = 2.0**62  # no time, step or rate is larger
EVENT_TYPES: dict[str, type] = {  # of an event's values, where they are used
    "event": str,
    "time": float,
    "step": int,
    "of": int,
    "attempt": int,
    "pid": int,
    "code": int,
    "seconds": float,
    "host": str,
    "job": str,
    "message": str,
    "reason": str,
    "digest": str,
}


_not_written: set[Path] = set()  # files whose last write failed, which was logged


class Activity(Enum):
    """What a run does, as in "time limit reached while ..."."""

    starting = "starting"
    training = "training"
    saving = "saving"
    images = "writing images"
    evaluating = "evaluating"


def append(run: str | Path, event: str, **values: Any) -> None:
    """Appends one event. It is one write of one line, so several processes may append at once."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
    Path(run).mkdir(parents=True, exist_ok=True)
    handle = os.open(Path(run, HISTORY), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if _last_line_is_cut(handle):
            line = "\n" + line
        os.write(handle, line.encode())
        os.fsync(handle)  # launchers on other machines read it
    finally:
        os.close(handle)


def append_observation(run: str | Path, event: str, **values: Any) -> None:
    """Appends one of OBSERVATIONS, if the file can be written: a run does not end because of it."""
    path = Path(run, HISTORY)
    try:
        append(run, event, **values)
    except OSError as error:
        if path not in _not_written:
            _not_written.add(path)
            logger.warning("%s could not be written; the run goes on: %s", path, error)
    else:
        _not_written.discard(path)


def _last_line_is_cut(handle: int) -> bool:
    """Whether a process was killed while it wrote the last line."""
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


def read(run: str | Path) -> list[dict[str, Any]]:
    """The events in their order, without lines that are cut off or damaged.

    Raises:
        OSError: the file exists and cannot be read.
    """
    return read_history(run).events


class History(NamedTuple):
    """events: in their order. problem: what of the file is damaged; empty for a sound file."""

    events: list[dict[str, Any]]
    problem: str


def read_history(run: str | Path) -> History:
    """The events, without lines that are cut off or damaged; those are counted as a problem.

    A value whose type is not that of its key is left out. A last line without its end is being
    written.

    Raises:
        OSError: the file exists and cannot be read.
    """
    path = Path(run, HISTORY)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_HISTORY_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return History([], "")
    events = []
    damaged = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        event = _parse_event(line, path)
        if event is not None:
            events.append(event)
        elif number < len(lines):
            damaged.append(number)
    if not damaged:
        return History(events, "")
    return History(
        events,
        f"{HISTORY} has {plural(len(damaged), 'damaged line')}, the first in line {damaged[0]}",
    )


def _parse_event(line: bytes, path: Path) -> dict[str, Any] | None:
    """The event of a line; None if it is damaged."""
    try:
        values = parse_json(line, str(path))
    except JsonFileError:
        return None
    if not isinstance(values, dict):
        return None
    event = {key: value for key, value in values.items() if _has_type(key, value)}
    return event if "event" in event and "time" in event else None


def _has_type(key: str, value: Any) -> bool:
    expected = EVENT_TYPES.get(key)
    if expected is None:
        return True
    if expected is str:
        return isinstance(value, str)
    return _is_number(value) and (expected is float or isinstance(value, int))


def write_progress(run: str | Path, values: dict[str, Any]) -> None:
    """Replaces progress.json as a whole, if the file can be written."""
    _replace(Path(run, PROGRESS), values)


def write_ranks(run: str | Path, values: dict[str, Any]) -> None:
    """Replaces ranks.json as a whole, if the file can be written."""
    _replace(Path(run, RANKS), values)


def _replace(path: Path, values: dict[str, Any]) -> None:
    """A run does not end because people cannot see what it does: the first failure is logged."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(json.dumps({"time": round(time.time(), 3), **values}))
        os.replace(temporary, path)
    except OSError as error:
        if path not in _not_written:
            _not_written.add(path)
            logger.warning("%s could not be written; the run goes on: %s", path, error)
    else:
        _not_written.discard(path)


def read_progress(run: str | Path) -> dict[str, float]:
    """The numbers of progress.json; {} before the first logged step, or if it is damaged."""
    try:
        return parse_progress(run)
    except (OSError, JsonFileError):
        return {}


def parse_progress(run: str | Path) -> dict[str, float]:
    """The numbers of progress.json; {} before the first logged step.

    Raises:
        JsonFileError: the file is damaged.
        OSError: the file exists and cannot be read.
    """
    try:
        values = read_json_object(Path(run, PROGRESS))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {key: value for key, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < MOST_NUMBER  # False for NaN


def write_activity(run: str | Path, activity: Activity, step: int) -> None:
    """Replaces activity.json as a whole, if the file can be written.

    Args:
        step: the last one that is complete.
    """
    _replace(Path(run, ACTIVITY), {"activity": activity.value, "step": step})


def read_activity(run: str | Path) -> Activity:
    """What the last attempt does, or did when it was killed."""
    events = read(run)
    names = [event["event"] for event in events]
    last_start = max((i for i, name in enumerate(names) if name == "start"), default=-1)
    if {"requeued", "submitted"} & set(names[last_start + 1 :]) or last_start < 0:
        return Activity.starting
    try:
        values = read_json_object(Path(run, ACTIVITY))
    except (OSError, JsonFileError):
        values = {}
    time_of_activity = values.get("time")
    if not _is_number(time_of_activity):
        time_of_activity = 0.0
    if time_of_activity < events[last_start].get("time", 0.0):
        is_running = "running" in names[last_start:]
        return Activity.training if is_running else Activity.starting
    try:
        return Activity(values.get("activity"))
    except ValueError:
        return Activity.training


def attempts(events: list[dict[str, Any]]) -> int:
    """How often the run was started."""
    return sum(event["event"] == "start" for event in events)


def faults_in_a_row(events: list[dict[str, Any]]) -> int:
    """How many of the last attempts failed by a fault of their own at the same step.

    An attempt that was stopped and saved, or got further, resets the count. So does submitting the
    run again: its user may have removed the cause. One that was lost with its node is left out.
    """
    faults = 0
    fault_step = None
    start_step = None
    for event in events:
        if event["event"] == "start":
            start_step = event.get("step")
        elif event["event"] == "fault":
            step = event.get("step", start_step)
            faults = faults + 1 if faults and step == fault_step else 1
            fault_step = step
        elif event["event"] in ("saved", "done", "submitted"):
            faults = 0
    return faults


def time_limits_in_a_row(events: list[dict[str, Any]]) -> int:
    """How many of the last attempts reached their time limit without a further checkpoint.

    The limit of one attempt may be recorded twice: before it is reached, and at its end.
    """
    limits = 0
    limit_step = None
    is_counted = False  # the limit of this attempt
    for event in events:
        if event["event"] == "start":
            is_counted = False
        elif event["event"] == "time_limit":
            step = event.get("step")
            if step != limit_step:
                limits = 1
            elif not is_counted:
                limits += 1
            limit_step = step
            is_counted = True
        elif event["event"] == "submitted":  # with another limit, perhaps
            limits = 0
            limit_step = None
    return limits


class AttemptStart(NamedTuple):
    """An attempt, and how far the run was before it.

    number: of the attempt, from 1. step: of the checkpoint that it continues from. last_seen: time
    of the last event or progress before it (seconds since 1970). step_reached: by the attempts
    before it; 0 if it starts from step 0.
    """

    number: int
    step: int
    last_seen: float
    step_reached: int


def record_start(run: Path, step: int, max_steps: int) -> AttemptStart:
    """Appends a `start` event. step: of the checkpoint that the attempt continues from."""
    events = read(run)
    progress = read_progress(run)
    event_times = [e["time"] for e in events if e["event"] not in ("requeued", "submitted")]
    steps = [event.get("step", 0) for event in events]
    attempt = AttemptStart(
        number=attempts(events) + 1,
        step=step,
        last_seen=max([*event_times, progress.get("time", 0.0)]),
        step_reached=max([*steps, progress.get("step", 0)]) if step else 0,
    )
    append(
        run,
        "start",
        step=step,
        of=max_steps,
        attempt=attempt.number,
        host=socket.gethostname(),
        pid=os.getpid(),
        job=slurm_job(),
        **running_code()._asdict(),
    )
    return attempt


def record_first_step(run: Path, attempt: AttemptStart) -> dict[str, float]:
    """Appends a `running` event; call it after the attempt's first step.

    Returns:
        TensorBoard scalars: requeues, and what the last one cost in seconds and repeated steps.
    """
    seconds = time.time() - psutil.Process().create_time()
    append(run, "running", step=attempt.step, seconds=round(seconds, 2))
    scalars = {"run/requeues": float(attempt.number - 1)}
    if attempt.number > 1:
        scalars["run/seconds_lost"] = time.time() - attempt.last_seen
        scalars["run/steps_repeated"] = float(max(0, attempt.step_reached - attempt.step))
    return scalars


def slurm_job() -> str:
    """SLURM's id of this process's job, JOB_INDEX in an array; empty elsewhere."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")
