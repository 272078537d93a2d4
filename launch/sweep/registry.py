"""The runs below a folder, what each one is and does: told by its files and, where it is a job, by SLURM's queue."""

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evspan.conf.errors import UserError
from evspan.launch.sweep.state import Event, State, job_of, judge, number, of_submission
from evspan.pipeline.history import HISTORY, PROGRESS, attempts, read, read_progress

if TYPE_CHECKING:
    from evspan.launch.slurm.client import Queued

SWEEP, SUBMITTED, CONFIG, METRICS = (
    "sweep.json",
    "submitted.json",
    "config.json",
    "evaluation/metrics.json",
)
MARKS = (SUBMITTED, HISTORY, PROGRESS, CONFIG)  # of a run's folder
SILENT_S = 3600.0  # longer than an evaluation or a log interval takes


@dataclass(frozen=True)
class Found:
    """A run's folder. overrides: as sweep.json tells; error: why the run could not be composed or submitted."""

    folder: Path
    name: str  # below the sweep
    overrides: tuple[str, ...] | None = None
    error: str = ""


@dataclass(frozen=True)
class Run:
    """reason: what it waits for, or how it ended. error: the last fault's message. metrics: of the newest evaluation.

    job: SLURM's id, empty for one on this machine. alive: SLURM has it. events: of all its submissions.
    """

    folder: Path
    name: str
    overrides: dict[str, str]
    state: State
    reason: str
    error: str
    job: str
    alive: bool
    step: int | None
    of: int | None
    eta_s: float | None
    node: str
    loss: float | None
    metrics: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def ap(self) -> float | None:
        return number(self.metrics.get("ap"))

    @property
    def goes_on(self) -> bool:
        """By itself."""
        return self.alive or self.state.unfinished

    @property
    def requeues(self) -> int:
        return max(0, attempts(self.events) - 1)


class _Files:
    """What a run's files tell; each may be missing, or be half written."""

    def __init__(self, folder: Path) -> None:
        self.submitted, self.events = _json(folder / SUBMITTED), read(folder)
        self.recent = of_submission(self.events, self.submitted)
        self.job = job_of(self.recent, self.submitted)
        self.progress = read_progress(folder)

    def state(self, found: Found, known: "Mapping[str, Queued] | None") -> tuple[State, str]:
        if found.error:
            return State.failed, ""
        if self.recent or self.job:
            return judge(
                self.recent, self.job, (known or {}).get(self.job), asked=known is not None
            )
        return (State.unknown, f"no {HISTORY}") if found.overrides is None else (State.waiting, "")


def look(path: Path) -> tuple[list[Run], str]:
    """The runs at or below `path` in their order, and why SLURM was not asked where it should have been.

    Raises:
        UserError: there is no run.
    """
    found = find_runs(path)
    before = [(run, _Files(run.folder)) for run in found]
    # First the queue, then the histories: a run that ends in between has said so.
    known, note = _ask(
        [
            files.job
            for run, files in before
            if files.job and files.state(run, None)[0] not in (State.done, State.failed)
        ]
    )
    return [_read(run, known) for run in found], note


def find_runs(path: Path) -> list[Found]:
    """
    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is {'a file' if path.exists() else 'not there'}. Give the folder of a run (its run_dir) or of a "
            "sweep"
        )
    if not (path / SWEEP).exists() and _is_run(path):
        return [Found(path, path.resolve().name)]
    listed = _json(path / SWEEP).get("runs")
    entries = (
        [e for e in listed if isinstance(e, dict) and "folder" in e]
        if isinstance(listed, list)
        else []
    )
    found = {
        name: Found(
            path / name,
            name,
            tuple(map(str, e.get("overrides") or ())),
            printable(e.get("error") or ""),
        )
        for e in entries
        for name in (str(e["folder"]),)
    }
    # A folder of runs that were started singly lists none; the table of a sweep may be half written.
    others = [
        p
        for p in path.iterdir()
        if p.name not in found and not p.name.startswith(".") and _is_run(p)
    ]
    found |= {p.name: Found(p, p.name) for p in others}
    if not found:
        raise UserError(
            f"{path} holds no run. Give the folder of a run (it has {HISTORY} or {CONFIG}) or of a sweep (it has "
            f"{SWEEP}, or folders of runs)"
        )
    return sorted(found.values(), key=lambda run: _natural(run.name))


def jobs_alive(ids: Iterable[str]) -> set[str]:
    """Those that wait or run, of SLURM's ids.

    Raises:
        UserError: SLURM does not answer.
    """
    from evspan.launch.slurm.client import queued

    return {id_ for id_, task in queued(ids).items() if task.alive}


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys of the overrides that are not alike in all runs; of a single run all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    return [
        key for key in keys if len(runs) == 1 or len({run.overrides.get(key) for run in runs}) > 1
    ]


def describe(run: Run) -> str:
    """'running at step 120 of 1000, AP 0.412'."""
    told = run.state.value + (f" ({run.reason})" if run.reason else "")
    told += (
        f" at step {run.step}{f' of {run.of}' if run.of else ''}" if run.step is not None else ""
    )
    told += f", AP {run.ap:.3f}" if run.ap is not None else ""
    return told + (
        f": {run.error}"
        if run.error and run.state in (State.failed, State.lost, State.requeued)
        else ""
    )


# -- one run -----------------------------------------------------------------------------------------------------
def _read(found: Found, known: "Mapping[str, Queued] | None") -> Run:
    files = _Files(found.folder)
    (state, reason), task = files.state(found, known), (known or {}).get(files.job)
    start: Event = next((e for e in reversed(files.recent) if e["event"] == "start"), {})
    silent = time.time() - max(
        (e.get("time", 0.0) for e in (*files.recent, files.progress)), default=0.0
    )
    if state is State.running and not reason and silent > SILENT_S:
        reason = f"silent for {span(silent)}"
    ofs = (
        number(source)
        for source in (start.get("of"), files.progress.get("of"), _max_steps(found.folder))
    )
    step, of = _step(files), next((int(n) for n in ofs if n), None)
    overrides = files.submitted.get("overrides") if found.overrides is None else found.overrides
    return Run(
        found.folder,
        found.name,
        split_overrides(overrides),
        state,
        reason,
        found.error or _error(files.recent),
        files.job,
        alive=bool(task and task.alive),
        step=step,
        of=of,
        eta_s=_eta(files.progress, step, of) if state is State.running else None,
        node=task.reason if task and task.state == "RUNNING" else str(start.get("host", "")),
        loss=number(files.progress.get("loss")),
        metrics=_json(found.folder / METRICS),
        events=files.events,
    )


def _step(files: _Files) -> int | None:
    """By the newest word: an attempt that was killed may have been further than the one that follows it."""
    told = [
        (e.get("time", 0.0), i, e["step"])
        for i, e in enumerate((*files.recent, files.progress))
        if number(e.get("step")) is not None
    ]
    return int(max(told)[-1]) if told else None


def _eta(progress: Event, step: int | None, of: int | None) -> float | None:
    """Seconds to the last step, evaluations not counted."""
    each = number(progress.get("seconds_per_step"))
    if step is None or not of or not each:
        return None
    since = time.time() - progress.get("time", 0.0) if step == progress.get("step") else 0.0
    return max(0.0, (of - step) * each - since)


def _error(events: Sequence[Event]) -> str:
    return next(
        (
            printable(e["message"])
            for e in reversed(events)
            if e["event"] in ("fault", "failed") and e.get("message")
        ),
        "",
    )


def _ask(jobs: Sequence[str]) -> "tuple[dict[str, Queued] | None, str]":
    if not jobs:
        return {}, ""
    if shutil.which("squeue") is None:
        return None, "squeue is not on the PATH"
    from evspan.launch.slurm.client import queued

    try:
        return queued(jobs), ""
    except UserError as error:
        return None, str(error)


# -- files and words ---------------------------------------------------------------------------------------------
def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _json(path: Path) -> dict[str, Any]:
    """{} for a file that is not there, or half written."""
    try:
        told = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _max_steps(folder: Path) -> Any:
    training = _json(folder / CONFIG).get("training")
    return training.get("max_steps") if isinstance(training, dict) else None


def split_overrides(overrides: Any) -> dict[str, str]:
    """['+key=value'] -> {key: value}, without what only says where a run is."""
    pairs = [str(o).lstrip("+").partition("=") for o in overrides or ()]
    return {
        printable(key): printable(value)
        for key, _, value in pairs
        if key != "run_dir" and not key.startswith("hydra")
    }


def printable(text: object) -> str:
    """What others said, harmless to a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))


def span(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(0.0, seconds):.0f} s"


def _natural(name: str) -> list[tuple[int, str]]:
    """2 before 10."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
