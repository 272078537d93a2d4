"""Reads the runs below a folder: what their files contain, and the state of their jobs in SLURM."""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evspan.conf.errors import UserError, one_line
from evspan.conf.folder_lock import is_in_use
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import plural
from evspan.launch.search.files import SEARCH, STOP, SearchInfo, read_info
from evspan.launch.sweep.spikes import Spike, read_spikes
from evspan.launch.sweep.state import (
    RunState,
    State,
    events_of_submission,
    infer_state,
    job_of_events,
    last_start,
    number,
)
from evspan.pipeline.history import HISTORY, PROGRESS, attempts, parse_progress, read_history

if TYPE_CHECKING:
    from evspan.launch.slurm.client import Queued

logger = logging.getLogger(__name__)
SWEEP = "sweep.json"
SUBMITTED = "submitted.json"
CONFIG = "config.json"
METRICS = "evaluation/metrics.json"
RUN_FILES = (SUBMITTED, HISTORY, PROGRESS, CONFIG)  # a folder with one of these is a run
COMMANDS = ".jobs"  # below a folder: a folder for each evspan command that was submitted for it
ERRORS = ("fault", "failed", "fallback", "continued")  # events whose message status shows
SILENT_S = 3600.0  # longer than an evaluation or a log interval takes


class RunEntry(NamedTuple):
    """Where a run is.

    overrides: from sweep.json; None for a run that no sweep lists. error: why the run could not be
    composed or submitted.
    """

    folder: Path
    name: str  # relative to the sweep
    overrides: tuple[str, ...] | None = None
    error: str = ""


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        name: the folder's name, relative to the sweep.
        reason: what the run waits for, or how it ended. May be empty.
        error: message of the last fault.
        job: SLURM job id; empty for a run that was started on this machine.
        alive: whether the job is in SLURM's queue.
        step: newest completed step. max_steps: step at which the run ends.
        eta_s: seconds until the last step, without evaluations.
        frames_per_s, mfu: of the last logged steps; mfu: None where the device's peak is not known.
        metrics: contents of the newest evaluation's metrics.json.
        events: history of all submissions.
        problem: which of its files cannot be read, and why. May be empty.
        successor: SLURM id of the job that continues the run after `job`; empty without one.
        after: folders of what has to be done before the run starts.
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
    max_steps: int | None
    eta_s: float | None
    node: str
    loss: float | None
    metrics: dict[str, Any]
    events: list[dict[str, Any]]
    problem: str = ""
    successor: str = ""
    after: tuple[str, ...] = ()
    frames_per_s: float | None = None
    mfu: float | None = None

    @property
    def is_command(self) -> bool:
        """Whether it is no run, but a command that was submitted for a folder."""
        return self.folder.parent.name == COMMANDS

    @property
    def spikes(self) -> list[Spike]:
        """Its loss spikes, in the order of their steps."""
        return read_spikes(self.events)

    @property
    def ap(self) -> float | None:
        """AP of the newest evaluation, 0 to 1."""
        return number(self.metrics.get("ap"))

    @property
    def active(self) -> bool:
        """Whether its state may still change without a user's action."""
        return self.alive or self.state.unfinished

    @property
    def requeues(self) -> int:
        """Number of attempts after the first."""
        return max(0, attempts(self.events) - 1)


class RunList(NamedTuple):
    """The runs below a folder, and why SLURM's queue could not be read (empty if it could)."""

    runs: list[Run]
    note: str


def read_runs(path: Path) -> RunList:
    """The runs at or below `path`, in the order of their names.

    Raises:
        UserError: there is no run.
    """
    return read_entries(find_runs(path))


def read_chain(path: Path) -> RunList:
    """The runs at or below `path`, then the commands that were submitted for it.

    A search has none before its first trial.

    Raises:
        UserError: there is neither, and it is no search.
    """
    commands = sorted(path.glob(f"{COMMANDS}/*/{SUBMITTED}"))
    entries = [RunEntry(file.parent, file.parent.name) for file in commands]
    try:
        runs = find_runs(path)
    except UserError:
        if not entries and read_info(path) is None:
            raise
        runs = []
    return read_entries([*runs, *entries])


def read_entries(entries: Sequence[RunEntry]) -> RunList:
    """The runs in these folders, in their order."""
    starts = cache(starts_runs)  # one look per sweep
    final: dict[RunEntry, _RunFiles] = {}
    jobs = []
    for entry in entries:
        files = _RunFiles(entry.folder)
        if files.state(entry, None, starts).state in (State.done, State.failed):
            final[entry] = files
        elif files.job:
            jobs += [job for job in (files.job, files.successor) if job]
    # The queue is read before the files of the others are read again: a run that ends in between
    # has recorded it.
    queue, note = _read_queue(jobs)
    runs = []
    for entry in entries:
        files = final.get(entry) or _RunFiles(entry.folder)
        runs.append(_run_of(entry, files, queue, starts))
    return RunList(runs, note)


def starts_runs(sweep: Path) -> bool:
    """Whether a command, or the controller of a search, still starts runs of a sweep."""
    try:
        search = read_info(sweep)
        stopped = os.path.exists(sweep / STOP)
        if search is not None and search.job and not stopped and _controller_is_alive(search):
            return True
        return is_in_use(sweep)
    except (UserError, OSError):  # damaged, or not readable
        return False


def _controller_is_alive(search: SearchInfo) -> bool:
    """Whether the controller's job waits or runs. True where SLURM does not answer."""
    if shutil.which("squeue") is None:
        return True
    try:
        return bool(jobs_alive([search.job]))
    except UserError:
        return True


def find_runs(path: Path) -> list[RunEntry]:
    """The folders of runs at or below `path`, in the order of their names.

    Raises:
        UserError: there is no run.
    """
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}. Give the folder of a run (its run_dir) or of a sweep")
    if not (path / SWEEP).exists() and is_run(path):
        return [RunEntry(path, path.resolve().name)]
    entries = _entries_of_sweep(path)
    # A folder of runs that were started one by one has no sweep.json, and one may be half written.
    for folder in path.iterdir():
        if folder.name not in entries and not folder.name.startswith(".") and is_run(folder):
            entries[folder.name] = RunEntry(folder, folder.name)
    if not entries and (path / SEARCH).exists():
        raise UserError(
            f"{path} is a search that has started no trial yet. Watch it by evspan status {path}"
        )
    if not entries:
        raise UserError(
            f"{path} contains no run. Give the folder of a run (it has {HISTORY} or {CONFIG}) "
            f"or of a sweep (it has {SWEEP}, or folders of runs)"
        )
    return sorted(entries.values(), key=lambda entry: _natural_order(entry.name))


def _entries_of_sweep(path: Path) -> dict[str, RunEntry]:
    """The runs that sweep.json lists, by name."""
    entries: dict[str, RunEntry] = {}
    for row in _sweep_rows(path / SWEEP):
        name = row["folder"]
        listed = row.get("overrides")
        overrides = tuple(str(text) for text in listed) if isinstance(listed, list) else ()
        error = printable(row.get("error") or "")
        entries[name] = RunEntry(path / name, name, overrides, error)
    return entries


def is_run(folder: Path) -> bool:
    """Whether a folder has files of a run. False where that may not be read."""
    return any(os.path.isfile(folder / name) for name in RUN_FILES)


def is_folder_name(name: object) -> bool:
    """Whether a value of sweep.json is the name of a folder in the sweep's folder."""
    return isinstance(name, str) and name == Path(name).name and not name.startswith(".")


def jobs_alive(ids: Iterable[str]) -> set[str]:
    """Those of the SLURM job ids whose jobs wait or run.

    Raises:
        UserError: SLURM does not answer.
    """
    from evspan.launch.slurm.client import queued

    return {id_ for id_, task in queued(ids).items() if task.alive}


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The override keys whose values differ between the runs; for a single run all its keys."""
    keys: dict[str, None] = {}
    for run in runs:
        keys |= dict.fromkeys(run.overrides)
    if len(runs) == 1:
        return list(keys)
    return [key for key in keys if _values_differ(runs, key)]


def _values_differ(runs: Sequence[Run], key: str) -> bool:
    return len({run.overrides.get(key) for run in runs}) > 1


def short_names(keys: Sequence[str]) -> list[str]:
    """For each dotted key its last words, as few as no other key ends in."""
    return [_short_name(key, keys) for key in keys]


def _short_name(key: str, keys: Sequence[str]) -> str:
    words = key.split(".")
    for count in range(1, len(words)):
        name = ".".join(words[-count:])
        same_end = [other for other in keys if f".{other}".endswith(f".{name}")]
        if same_end == [key]:
            return name
    return key


def describe(run: Run) -> str:
    """One line on the run, such as 'running at step 120 of 1000, AP 0.412'."""
    line = run.state.value
    if run.reason:
        line += f" ({run.reason})"
    if run.step is not None:
        line += f" at step {run.step}"
        if run.max_steps:
            line += f" of {run.max_steps}"
    if run.ap is not None:
        line += f", AP {run.ap:.3f}"
    if run.error and run.state in (State.failed, State.lost, State.requeued):
        line += f": {run.error}"
    if run.problem:
        line += f"; {run.problem}"
    return line


def count_states(runs: Sequence[Run]) -> str:
    """How many runs are in which state, such as '2 running, 1 done'."""
    parts = []
    for state in State:
        count = sum(run.state is state for run in runs)
        if count:
            parts.append(f"{count} {state.value}")
    return ", ".join(parts)


def describe_all(runs: Sequence[Run]) -> str:
    """'3 runs: 2 running, 1 done'."""
    return f"{plural(len(runs), 'run')}: {count_states(runs)}"


# -- one run ---------------------------------------------------------------------------------------
class _RunFiles:
    """The contents of a run's files, each of which may be missing, damaged or not readable.

    Attributes:
        events: all events. recent: those of the last submission.
        problems: a sentence for each file that cannot be read, or of which a part is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.submitted = self._read_json(SUBMITTED)
        self.events = self._read_history()
        self.recent = events_of_submission(self.events, self.submitted)
        self.job = self._valid_job(job_of_events(self.recent, self.submitted))
        self.successor = self._valid_job(str(self.submitted.get("successor") or ""))
        self.after = _texts(self.submitted.get("after"))
        self.progress = self._read_progress()
        self.metrics = self._read_json(METRICS)
        training = self._read_json(CONFIG).get("training")
        self.training = training if isinstance(training, dict) else {}

    def _read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty if the file is missing or cannot be read."""
        try:
            return read_json_object(self.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (JsonFileError, OSError) as error:
            self._add_problem(name, error)
            return {}

    def _read_history(self) -> list[dict[str, Any]]:
        try:
            history = read_history(self.folder)
        except OSError as error:
            self._add_problem(HISTORY, error)
            return []
        if history.problem:
            self.problems.append(history.problem)
        return history.events

    def _read_progress(self) -> dict[str, float]:
        try:
            return parse_progress(self.folder)
        except (JsonFileError, OSError) as error:
            self._add_problem(PROGRESS, error)
            return {}

    def _valid_job(self, job: str) -> str:
        """`job` if it is a job id: SLURM's commands get it as an argument."""
        if job and not re.fullmatch(r"\d+(_\d+)?", job):
            self.problems.append(f"{printable(job)} is no SLURM job id")
            return ""
        return job

    def _add_problem(self, name: str, error: Exception) -> None:
        # The message names the file with its folder, which the row shows already.
        reason = one_line(error).replace(f"{self.folder}/", "")
        self.problems.append(printable(reason))

    def state(
        self,
        entry: RunEntry,
        queue: "Mapping[str, Queued] | None",
        starts: Callable[[Path], bool],
    ) -> RunState:
        """The state of the run.

        Args:
            queue: SLURM's queue by job id; None if it was not read.
            starts: whether the runs of a sweep are still being started.
        """
        if entry.error:
            return RunState(State.failed)
        if self.recent or self.job:
            task = self.task(queue)
            state = infer_state(self.recent, self.job, task, queue_read=queue is not None)
            if state.reason == "Dependency" and self.after:
                return RunState(state.state, f"after {', '.join(self.after)}")
            if state.state is State.cancelled and self.after and not last_start(self.recent):
                reason = state.reason.replace("by scancel", "by SLURM or scancel, not started")
                return RunState(state.state, reason)
            return state
        if entry.overrides is None:
            reason = "damaged files" if self.problems else f"no {HISTORY}"
            return RunState(State.unknown, reason)
        if self.problems:
            return RunState(State.unknown, "damaged files")
        if starts(entry.folder.parent):
            return RunState(State.waiting)
        return RunState(State.unknown, "not submitted")

    def task(self, queue: "Mapping[str, Queued] | None") -> "Queued | None":
        """The job in SLURM's queue; where it has ended, the successor that waits or runs."""
        if queue is None:
            return None
        task = queue.get(self.job)
        successor = queue.get(self.successor)
        if successor is not None and successor.alive and (task is None or not task.alive):
            return successor
        return task

    def overrides(self, entry: RunEntry) -> dict[str, str]:
        if entry.overrides is None:
            return split_overrides(self.submitted.get("overrides"))
        return split_overrides(entry.overrides)

    def seconds_since_last_record(self) -> float:
        times: list[float] = [event.get("time", 0.0) for event in self.recent]
        times.append(self.progress.get("time", 0.0))
        return time.time() - max(times)

    def step(self) -> int | None:
        """The step of the newest record.

        That need not be the largest: an attempt that was killed may have reached a later step than
        the attempt after it.
        """
        newest_time = -1.0
        step = None
        for record in (*self.recent, self.progress):
            recorded_at = record.get("time", 0.0)
            if number(record.get("step")) is not None and recorded_at >= newest_time:
                newest_time = recorded_at
                step = int(record["step"])
        return step

    def max_steps(self) -> int | None:
        configured = self.training.get("max_steps")
        for value in (last_start(self.recent).get("of"), self.progress.get("of"), configured):
            max_steps = number(value)
            if max_steps:
                return int(max_steps)
        return None

    def eta_s(self) -> float | None:
        """Seconds until the last step, without evaluations."""
        step = self.step()
        max_steps = self.max_steps()
        seconds_per_step = number(self.progress.get("seconds_per_step"))
        if step is None or not max_steps or not seconds_per_step:
            return None
        remaining_s = (max_steps - step) * seconds_per_step
        if step == self.progress.get("step"):
            remaining_s -= time.time() - self.progress.get("time", 0.0)
        return max(0.0, remaining_s)

    def error(self) -> str:
        """The message of the last fault, or of the last resume from an older checkpoint."""
        for event in reversed(self.recent):
            if event["event"] == "cancelled" and event.get("reason"):  # a cell for states is short
                return printable(event["reason"])
            if event["event"] in ERRORS and event.get("message"):
                return printable(event["message"])
        return ""


def _run_of(
    entry: RunEntry,
    files: _RunFiles,
    queue: "Mapping[str, Queued] | None",
    starts: Callable[[Path], bool],
) -> Run:
    """The run in a folder, with the arguments of `_RunFiles.state`."""
    state, reason = files.state(entry, queue, starts)
    silent_s = files.seconds_since_last_record()
    if state is State.running and not reason and silent_s > SILENT_S:
        reason = f"silent for {format_duration(silent_s)}"
    task = files.task(queue)
    node = str(last_start(files.recent).get("host", ""))
    if task is not None and task.state == "RUNNING":
        node = task.reason  # squeue's column for both the nodes and the reason
    return Run(
        folder=entry.folder,
        name=entry.name,
        overrides=files.overrides(entry),
        state=state,
        reason=reason,
        error=entry.error or files.error(),
        job=files.job,
        alive=task is not None and task.alive,
        step=files.step(),
        max_steps=files.max_steps(),
        eta_s=files.eta_s() if state is State.running else None,
        node=node,
        loss=number(files.progress.get("loss")),
        frames_per_s=number(files.progress.get("frames_per_s")),
        mfu=number(files.progress.get("mfu")),
        metrics=files.metrics,
        events=files.events,
        problem="; ".join(files.problems),
        successor=files.successor,
        after=files.after,
    )


def _read_queue(jobs: Sequence[str]) -> "tuple[dict[str, Queued] | None, str]":
    """SLURM's queue by job id (None if it cannot be read), and why it cannot be read."""
    if not jobs:
        return {}, ""
    if shutil.which("squeue") is None:
        return None, "squeue is not on the PATH"
    from evspan.launch.slurm.client import queued

    try:
        return queued(jobs), ""
    except UserError as error:
        return None, str(error)


def _texts(values: object) -> tuple[str, ...]:
    """The texts of a JSON list, for a terminal."""
    listed = values if isinstance(values, list) else []
    return tuple(printable(value) for value in listed)


# -- files and text --------------------------------------------------------------------------------
def _sweep_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of sweep.json; those that are damaged are left out with a warning."""
    try:
        rows = read_json_object(path).get("runs")
    except FileNotFoundError:
        return []
    except (JsonFileError, OSError) as error:
        logger.warning("%s. The runs are shown without their overrides", one_line(error))
        return []
    listed = rows if isinstance(rows, list) else [None]
    sound = [row for row in listed if isinstance(row, dict) and is_folder_name(row.get("folder"))]
    if len(sound) < len(listed):
        logger.warning("%s: %s", path, plural(len(listed) - len(sound), "damaged row"))
    return sound


def split_overrides(overrides: object) -> dict[str, str]:
    """['+key=value'] -> {key: value}, without run_dir and hydra.*, which only place the run."""
    values = {}
    for override in overrides if isinstance(overrides, list | tuple) else ():
        key, _, value = str(override).lstrip("+").partition("=")
        if key != "run_dir" and not key.startswith("hydra"):
            values[printable(key)] = printable(value)
    return values


def printable(text: object) -> str:
    """`text` on one line, with characters that could control a terminal replaced."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def format_duration(seconds: float) -> str:
    """A duration in the largest unit that gives at least 2: '119 s', '2 min', '2.3 days'."""
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:.1f} days"
    if seconds >= 2 * 3_600:
        return f"{seconds / 3_600:.1f} h"
    if seconds >= 2 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{max(0.0, seconds):.0f} s"


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2 before 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
