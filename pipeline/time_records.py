"""What a run records of its time: RUN/time, which `evspan.pipeline.time_use` adds up.

    allocations.jsonl   when SLURM gave nodes to the run, and when the batch script gave them back:
                        {"event": "allocated", "job": "12", "start": 1764338400.0, ...}
                        {"event": "released", "job": "12", "start": 1764338400.0, "end": ...}
    NUMBER.json         the time of one attempt by part. NUMBER is its start in milliseconds since
                        1970. Rank 0 replaces it every few seconds, so that a kill loses no more.

All times are in seconds since 1970. An allocation is identified by its job and start.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from evspan.conf.json_files import JsonFileError, parse_json, read_json_object
from evspan.pipeline.history import slurm_job

FOLDER = "time"
ALLOCATIONS = "allocations.jsonl"
# Set by the batch script: when SLURM put the job into its queue, again after a requeue, and when it
# started the job. Seconds since 1970.
JOB_QUEUED = "EVSPAN_JOB_QUEUED"
JOB_START = "EVSPAN_JOB_START"
MOST_BYTES = 16 << 20
MOST_ATTEMPTS = 100_000
MOST_SECONDS = 2.0**40  # no time stamp or duration is larger


class Part(Enum):
    """What an allocated second was used for. The parts are disjoint.

    launch, imports, process_groups, setup and first_step are the start of an attempt; setup reads
    the dataset and the checkpoint and builds the model, and first_step includes its data.
    exchange: collectives of a sequence that is divided among ranks. repeated: steps that an earlier
    attempt had done after the checkpoint, with their data and exchange. idle: from the last sign of
    an attempt that failed or was killed to the end of the allocation. ending: from the last step to
    the end of the allocation, with the decision on a requeue.
    """

    launch = "launch"
    imports = "imports"
    process_groups = "process_groups"
    setup = "setup"
    first_step = "first_step"
    training = "training"
    data_wait = "data_wait"
    exchange = "exchange"
    evaluation = "evaluation"
    saving = "saving"
    images = "images"
    repeated = "repeated"
    idle = "idle"
    ending = "ending"


START_UP = (Part.launch, Part.imports, Part.process_groups, Part.setup, Part.first_step)
STEP_PARTS = (Part.training, Part.data_wait, Part.exchange, Part.repeated)


@dataclass(frozen=True)
class Allocation:
    """Nodes that the run had.

    queued: when the job was submitted, or put into the queue again; 0 if that is not known.
    end: None if it was not recorded. ranks: of the run.
    """

    job: str
    queued: float
    start: float
    ranks: int
    end: float | None = None


@dataclass(frozen=True)
class AttemptTime:
    """The time of one attempt.

    Attributes:
        start: of rank 0's process.
        written: when the record was made; the parts add up to `written - start`.
        closed: whether the attempt ended in order, and not by an error or a kill.
        part: what the attempt did when the record was made.
        first_step: step of the checkpoint that it continued from. step: the last complete one.
        stepped: when that step was complete; 0 before the first.
        starts_over: whether it ignores the checkpoints of earlier attempts.
        job: SLURM's id. allocated: start of the allocation. Empty and 0 outside of a job of ours.
        gpu: whether a rank is a GPU.
        host, pid: of rank 0.
    """

    start: float
    written: float
    seconds: Mapping[Part, float]
    closed: bool
    part: Part
    first_step: int
    step: int
    stepped: float
    starts_over: bool
    job: str
    allocated: float
    ranks: int
    gpu: bool
    host: str
    pid: int


def this_allocation(ranks: int) -> Allocation | None:
    """The allocation that this process is in; None outside of a job whose script is ours."""
    start = _seconds(os.environ.get(JOB_START, ""))
    if not start:
        return None
    return Allocation(slurm_job(), _seconds(os.environ.get(JOB_QUEUED, "")), start, ranks)


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() else 0.0


def record_allocation(run: str | Path, allocation: Allocation) -> None:
    """Records that SLURM has given nodes to the run.

    Raises:
        OSError: it cannot be written.
    """
    values = vars(allocation).copy()
    del values["end"]
    _append(run, {"event": "allocated", **values})


def record_release(run: str | Path, allocation: Allocation, end: float) -> None:
    """Records the end of an allocation. The batch script does so just before it ends.

    Raises:
        OSError: it cannot be written.
    """
    _append(run, {"event": "released", **vars(allocation), "end": end})


def _append(run: str | Path, values: Mapping[str, Any]) -> None:
    """One write of one line, which also ends a line that was cut off before."""
    folder = Path(run, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    line = "\n" + json.dumps(values) + "\n"
    handle = os.open(folder / ALLOCATIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read_allocations(run: str | Path) -> list[Allocation]:
    """The allocations in the order of their starts, without lines that are damaged.

    Raises:
        OSError: the file exists and cannot be read.
    """
    path = Path(run, FOLDER, ALLOCATIONS)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    allocations: dict[tuple[str, float], Allocation] = {}
    for line in data.splitlines():
        allocation = _parse_allocation(line, path)
        if allocation is None:
            continue
        key = (allocation.job, allocation.start)
        if allocation.end is not None or key not in allocations:
            allocations[key] = allocation
    return sorted(allocations.values(), key=lambda allocation: allocation.start)


def _parse_allocation(line: bytes, path: Path) -> Allocation | None:
    try:
        values = parse_json(line, str(path))
        if not isinstance(values, dict) or not isinstance(values.get("job"), str):
            return None
        return Allocation(
            job=values["job"],
            queued=_number(values, "queued"),
            start=_number(values, "start"),
            ranks=int(_number(values, "ranks")),
            end=_number(values, "end") if values.get("event") == "released" else None,
        )
    except (JsonFileError, ValueError):
        return None


def attempt_path(run: str | Path, start: float) -> Path:
    """The file of an attempt that starts at this time."""
    return Path(run, FOLDER, f"{round(1000 * start)}.json")


def write_attempt(path: Path, attempt: AttemptTime) -> None:
    """Replaces the file as a whole.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    values = dict(vars(attempt))
    values["part"] = attempt.part.value
    values["seconds"] = {part.value: round(s, 3) for part, s in attempt.seconds.items() if s}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values) + "\n")
    os.replace(temporary, path)


def read_attempts(run: str | Path) -> list[AttemptTime]:
    """The attempts in the order of their starts, without files that are damaged.

    Raises:
        OSError: the folder exists and cannot be read.
    """
    folder = Path(run, FOLDER)
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".json"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    attempts = []
    for path in paths[:MOST_ATTEMPTS]:
        try:
            attempts.append(_parse_attempt(read_json_object(path)))
        except (OSError, JsonFileError, ValueError):
            continue
    return sorted(attempts, key=lambda attempt: attempt.start)


def _parse_attempt(values: Mapping[str, Any]) -> AttemptTime:
    """Raises ValueError where a value is missing or has another type."""
    seconds = values.get("seconds")
    if not isinstance(seconds, dict):
        raise ValueError("no seconds")
    return AttemptTime(
        start=_number(values, "start"),
        written=_number(values, "written"),
        seconds={Part(name): _number(seconds, name) for name in seconds},
        closed=values.get("closed") is True,
        part=Part(values.get("part")),
        first_step=int(_number(values, "first_step")),
        step=int(_number(values, "step")),
        stepped=_number(values, "stepped"),
        starts_over=values.get("starts_over") is True,
        job=str(values.get("job", "")),
        allocated=_number(values, "allocated"),
        ranks=int(_number(values, "ranks")),
        gpu=values.get("gpu") is True,
        host=str(values.get("host", "")),
        pid=int(_number(values, "pid")),
    )


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is no number")
    if not 0 <= value < MOST_SECONDS:  # False for NaN
        raise ValueError(f"{key} is {value}")
    return float(value)


def steps_reached(attempts: list[AttemptTime]) -> int:
    """The last step that any attempt has done since the run was last started over."""
    reached = 0
    for attempt in attempts:
        reached = attempt.step if attempt.starts_over else max(reached, attempt.step)
    return reached
