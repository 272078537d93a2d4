"""What a job does when it starts: it works, ends, or waits for further jobs.

python -m evspan.launch.slurm.chain RULES INDEX check JOB KIND
python -m evspan.launch.slurm.chain RULES INDEX waiting|successor JOB NEXT
python -m evspan.launch.slurm.chain RULES INDEX next

RULES is the file that `evspan.launch.slurm.sbatch` wrote, INDEX the run's index in it, JOB the id
of this job. `check` has the exit codes 0 (work) and those of `evspan.launch.slurm.successor`; if
the job has to wait, it prints the dependency. `waiting` and `successor` record a job that this one
has submitted; `next` prints the id of the successor. RUN/submitted.json has `job` and `successor`.
"""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import UserError
from evspan.conf.folder_lock import FolderInUseError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.launch.search.files import STOP, read_info
from evspan.launch.slurm.requeue import JOB_ID, RequeueRule, has_ended, read_rule
from evspan.launch.slurm.successor import (
    END,
    REFUSED,
    SUCCESSOR,
    WAIT,
    WORK_WITH_SUCCESSOR,
)
from evspan.launch.sweep.registry import SUBMITTED, Run, describe, read_chain
from evspan.launch.sweep.state import State, number
from evspan.pipeline.history import append, read
from evspan.pipeline.run_lock import ATTEMPT_WAIT_S, RunLock

MANIFEST = "manifest.json"  # of prepared shards
ENDED = (State.done, State.failed, State.cancelled)
COMPLETE = (State.done, State.pruned)  # a search has ended a pruned run


@dataclass(frozen=True)
class Upstream:
    """The state of what a job waits for.

    jobs: SLURM's ids of the jobs that still wait or run. problem: why the job can never start;
    empty if it can.
    """

    jobs: list[str]
    problem: str = ""

    @property
    def dependency(self) -> str:
        """The value of sbatch's --dependency; empty if there is nothing to wait for."""
        return f"afterany:{':'.join(self.jobs)}" if self.jobs else ""


def read_upstream(folders: Sequence[Path], own: Path, *, any_end: bool = False) -> Upstream:
    """Reads the state of all that was submitted for these folders.

    Args:
        folders: of runs, sweeps or prepared shards.
        own: folder of the run or command that waits. It is left out, and so are commands that were
            submitted after it, which may wait for it.
        any_end: whether a run that has failed, was cancelled, is lost or was never submitted
            counts, too.
    """
    jobs: dict[str, None] = {}
    problems: list[str] = []
    for folder in folders:
        controller = _controller_of(folder)
        if controller:
            jobs[controller] = None
        runs = _submitted_for(folder, own, problems)
        # Commands such as a report are waited for, but nothing needs them where there are runs.
        needed = [run for run in runs if not run.is_command] or runs
        for run in runs:
            if run.state not in ENDED and (run.alive or run.state.unfinished):
                of_run = _jobs_of(run, whole_arrays=len(needed) > 1)
                jobs |= dict.fromkeys(of_run)
                is_counted = any_end and run.state is State.waiting
                if run in needed and not (of_run or controller or is_counted):
                    problems.append(f"{run.folder} is {describe(run)}, but not as a job of SLURM")
            elif run in needed and run.state not in COMPLETE and not any_end:
                problems.append(f"{run.folder} is {describe(run)}")
    return Upstream(list(jobs), "; ".join(problems[:1]))


def _controller_of(folder: Path) -> str:
    """The job that starts the trials of a search; empty once all have ended, or it was ended."""
    try:
        search = read_info(folder)
    except UserError:
        return ""
    if search is None or (folder / STOP).exists():
        return ""
    return search.job if re.fullmatch(JOB_ID, search.job) else ""


def _submitted_for(folder: Path, own: Path, problems: list[str]) -> list[Run]:
    """The runs and commands of a folder; none for shards that were prepared here."""
    try:
        runs = read_chain(folder).runs
    except UserError:
        if not (folder / MANIFEST).is_file() and not _controller_of(folder):
            problems.append(f"{folder} is no run, no sweep and no folder of prepared shards")
        return []
    since = number(submission(own).get("time"))
    earlier = []
    for run in runs:
        time = number(submission(run.folder).get("time")) or 0.0
        is_later = run.is_command and since is not None and time > since
        if not is_later and run.folder.resolve() != own.resolve():
            earlier.append(run)
    return earlier


def _jobs_of(run: Run, *, whole_arrays: bool) -> list[str]:
    """Ids for a dependency. For many runs of a sweep those of their arrays, which are fewer."""
    jobs = [job for job in (run.job, run.successor) if job]
    return [job.split("_")[0] for job in jobs] if whole_arrays else jobs


def main(argv: Sequence[str]) -> int:
    """Runs a command of this module. Returns its exit code."""
    rules, index, command, *values = argv
    rule = read_rule(Path(rules), int(index))
    if command == "check":
        return check(rule, *values)
    if command == "next":
        print(submission(Path(rule.run)).get("successor", ""))
        return 0
    record(rule, command, *values)
    return 0


def check(rule: RequeueRule, job: str, kind: str) -> int:
    """Decides what the job does. Waits for another process that writes into the run's folder."""
    run = Path(rule.run)
    try:
        with RunLock(run, "evspan submit", wait_s=ATTEMPT_WAIT_S):
            return _check(rule, run, job, kind)
    except FolderInUseError as error:
        _log(f"{run}: this job ends: {error}")
        return END


def _check(rule: RequeueRule, run: Path, job: str, kind: str) -> int:
    recorded = submission(run)
    if job not in (recorded.get("job"), recorded.get("successor")):
        _log(f"{run}: job {recorded.get('job')} has the run, job {job} ends")
        return END
    if has_ended(run):
        _log(f"{run}: it has ended, there is nothing to continue")
        return END
    if rule.after and not _has_started(run):
        folders = [Path(folder) for folder in rule.after]
        upstream = read_upstream(folders, run, any_end=rule.any_end)
        problem = upstream.problem
        waits_in_vain = bool(upstream.jobs) and upstream.dependency == recorded.get("waited_for")
        if waits_in_vain and not rule.any_end:
            problem = f"{', '.join(rule.after)}: not done after the end of {upstream.dependency}"
        if problem:
            append(run, "cancelled", step=0, reason=problem)
            _log(f"{run}: not started: {problem}")
            return REFUSED
        if upstream.jobs and not waits_in_vain:
            _update(run, waited_for=upstream.dependency)
            print(upstream.dependency)
            return WAIT
    if recorded.get("job") != job:
        _update(run, job=job, successor="")
        if kind == SUCCESSOR:
            append(run, "continued", job=job)
        recorded = submission(run)
    needs_successor = rule.successor and not recorded.get("successor")
    return WORK_WITH_SUCCESSOR if needs_successor else 0


def record(rule: RequeueRule, kind: str, job: str, following: str = "") -> None:
    """Records in the run's folder a job that `job` has submitted; empty: it could not."""
    run = Path(rule.run)
    with RunLock(run, "evspan submit", wait_s=ATTEMPT_WAIT_S):
        if kind == SUCCESSOR:
            _update(run, successor=following)
        else:
            _update(run, job=following)
    if not following:
        message = (
            f"SLURM refuses the successor of job {job}; if the run is not done when that has "
            "ended, submit it again"
        )
        append(run, "continued", job=job, message=message)
        _log(f"{run}: {message}")


def submission(run: Path) -> dict[str, Any]:
    """What the last submission has recorded; empty without one, or if the file is damaged."""
    with suppress(OSError, JsonFileError):
        return read_json_object(run / SUBMITTED)
    return {}


def _update(run: Path, **values: str) -> None:
    """Changes values of submitted.json, with the lock on the run."""
    replace_file(run / SUBMITTED, json.dumps({**submission(run), **values}, indent=1) + "\n")


def _has_started(run: Path) -> bool:
    """Whether a rank has started since the last submission."""
    for event in reversed(read(run)):
        if event["event"] in ("start", "submitted"):
            return bool(event["event"] == "start")
    return False


def _log(line: str) -> None:
    """Writes into the output of the batch script; standard output has the results."""
    print(f"evspan: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
