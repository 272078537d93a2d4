"""What became of a run, attempt by attempt: lines of JSON in RUN/history.jsonl, that ranks and launchers add.

Events (each with `time`, in seconds since 1970, and `step`, of the newest checkpoint where nothing else is said):
start (attempt, of, host, job), running (seconds from the process's start to the end of its first step), saved, done, fault
(message, code), failed (message, code), cancelled, requeued.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

HISTORY, PROGRESS = "history.jsonl", "progress.json"


def append(run: str | Path, event: str, **values: Any) -> None:
    """One write of one line: several processes may add at once."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
    Path(run).mkdir(parents=True, exist_ok=True)
    handle = os.open(Path(run, HISTORY), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if (
            size and os.pread(handle, 1, size - 1) != b"\n"
        ):  # left half written by a process that died
            line = "\n" + line
        os.write(handle, line.encode())
        os.fsync(handle)  # other machines decide by it
    finally:
        os.close(handle)


def read(run: str | Path) -> list[dict[str, Any]]:
    """The events in their order; a line that a dying process left half written is passed over."""
    try:
        lines = Path(run, HISTORY).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def write_progress(run: str | Path, values: dict[str, Any]) -> None:
    """How far a run is, whole or not at all."""
    beside = Path(run, f".{PROGRESS}")
    beside.write_text(json.dumps({"time": round(time.time(), 3), **values}))
    os.replace(beside, Path(run, PROGRESS))


def read_progress(run: str | Path) -> dict[str, Any]:
    """{} before there is any."""
    try:
        told = json.loads(Path(run, PROGRESS).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def attempts(events: list[dict[str, Any]]) -> int:
    """How often the run was started."""
    return sum(event["event"] == "start" for event in events)


def faults_in_a_row(events: list[dict[str, Any]]) -> int:
    """How many of the last attempts failed by a fault of their own, from one and the same step on.

    An attempt that was stopped and saved, or that was lost with its node, or that got further, begins the count anew.
    """
    faults, at = 0, None
    began = None
    for event in events:
        if event["event"] == "start":
            began = event.get("step")
        elif event["event"] == "fault":
            step = event.get("step", began)
            faults, at = (faults + 1 if faults and step == at else 1), step
        elif event["event"] in ("saved", "done"):
            faults = 0
    return faults


def slurm_job() -> str:
    """SLURM's id of the job that this process is in, JOB_INDEX in an array; empty elsewhere."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return (
        f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if array
        else os.environ.get("SLURM_JOB_ID", "")
    )
