"""Decides whether SLURM requeues a job after its ranks have ended, or before its time limit.

python -m evspan.launch.slurm.requeue RULES INDEX CODE STATE REASON SECONDS

RULES is the file that `evspan.launch.slurm.sbatch` wrote, INDEX the run's index in it. CODE is the
exit code of srun, or `limit` if the ranks still run shortly before the time limit. STATE and REASON
are those of the job in SLURM, SECONDS the time that it has left (may be empty). Exit code 0:
requeue; 3: do not; 7: do not, and the run has ended for good. The batch script calls it on the
first node, outside of any container, or by srun inside one; it needs no GPU and does not import
torch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import (
    LOST_EXIT_CODE,
    STOPPED_CODES,
    STOPPED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
)
from evspan.launch.slurm.rank_task import (
    SIGNAL_EARLY_S,
    RankNote,
    notes_folder,
    read_notes,
)
from evspan.launch.sweep.fail_fast import error_of_sweep
from evspan.launch.sweep.queued import submitted_jobs
from evspan.pipeline.checkpoint_files import find_newest_intact, step_of
from evspan.pipeline.history import (
    append,
    faults_in_a_row,
    read,
    read_activity,
    slurm_job,
    time_limits_in_a_row,
)
from evspan.pipeline.time_records import record_release, this_allocation

CAN_REQUEUE = ("RUNNING", "PREEMPTED")  # in other states the job is cancelled or already requeued
STILL_RUNS = "limit"  # instead of an exit code
DO_NOT_REQUEUE = 3  # exit code; an error of this command gives 1
JOB_ID = r"\d+(_\d+)?"
EXITED = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): Exited with exit code", re.MULTILINE)
RUN_HAS_ENDED = 7  # exit code: do not requeue, and no successor is needed
TIME_LIMIT_REMEDY = (
    "Submit it again with a longer cluster.timeout_min, or a smaller checkpoint.every"
)


@dataclass(frozen=True)
class RequeueRule:
    """What the decision needs of a run.

    run: its folder. log: output of a rank as SLURM keeps it, with %j for the job and %t for the
    rank in its name. max_retries: faults in a row, or time limits in a row but at least 2, at the
    same step after which the run has failed. signal_delay_s: seconds from SLURM's signal to the
    time limit. successor: whether another job continues the run, so that this one is not requeued.
    after: folders of what has to be done before. any_end: whether a failure of these counts, too.
    smoke_of: the run that waits for this smoke run.
    """

    run: str
    log: str
    ranks: int
    max_retries: int
    requeue_after_fault: bool
    signal_delay_s: int = 0
    successor: bool = False
    after: Sequence[str] = ()
    smoke_of: str = ""
    any_end: bool = False
    fail_fast: bool = False  # whether the array ends when its first runs fail with the same error

    @property
    def continuation(self) -> str:
        """How the run goes on."""
        return "its successor continues" if self.successor else "requeued"


@dataclass(frozen=True)
class JobEnd:
    """How the ranks of an attempt ended.

    notes: of ranks that failed. code: exit code of srun; None if it still runs. state: of the job
    in SLURM; may be empty. logs: output of each rank, for those without a note. time_limit: whether
    the job has reached its time limit, or is about to.
    """

    notes: Sequence[RankNote]
    code: int | None
    state: str
    logs: Sequence[Path] = ()
    time_limit: bool = False


class Decision(NamedTuple):
    """Whether to requeue, and why in one line."""

    requeue: bool
    reason: str


def main(argv: Sequence[str]) -> int:
    """Print the decision. Returns 0 for a requeue, else DO_NOT_REQUEUE."""
    rules, index, code_text, state = argv[:4]
    reason, seconds_left = [*argv[4:], "", ""][:2]  # scripts of older versions do not give them
    rule = read_rule(Path(rules), int(index))
    log = Path(rule.log)
    log_of_rank = log.name.replace("%j", slurm_job())
    code = None if code_text == STILL_RUNS else int(code_text)
    end = JobEnd(
        notes=read_notes(notes_folder(rule.run, os.environ)),
        code=code,
        state=state,
        logs=[log.with_name(log_of_rank.replace("%t", str(rank))) for rank in range(rule.ranks)],
        time_limit=code is None
        or "TIMEOUT" in state
        or reason == "TimeLimit"
        or _was_stopped_at_the_limit(code, state, seconds_left, rule),
    )
    _record_release(rule)  # SLURM may end this script at once
    decision = decide(rule, end)
    _record_release(rule)
    failed_smoke = rule.smoke_of and not decision.requeue and code != 0
    if failed_smoke and not has_ended(Path(rule.smoke_of)):
        reason = f"the smoke run before it has not succeeded: {decision.reason}"
        append(rule.smoke_of, "cancelled", step=0, reason=reason)
    print(f"evspan: {decision.reason}", flush=True)
    if rule.fail_fast and not decision.requeue:
        _end_array_if_same_error(Path(rules))
    if decision.requeue:
        return 0
    return RUN_HAS_ENDED if rule.successor and has_ended(Path(rule.run)) else DO_NOT_REQUEUE


def read_rule(rules: Path, index: int) -> RequeueRule:
    """The rule of a run from the file that `evspan.launch.slurm.sbatch` wrote."""
    return RequeueRule(**json.loads(rules.read_text())[index])


def has_ended(run: Path) -> bool:
    """Whether a run that was submitted needs no further attempt, according to its history."""
    for event in reversed(read(run)):
        if event["event"] in ("done", "failed", "cancelled", "pruned"):
            return True
        if event["event"] in ("start", "submitted", "requeued", "continued"):
            return False
    return False


def _record_release(rule: RequeueRule) -> None:
    """Records that the allocation ends now. The last record counts."""
    allocation = this_allocation(rule.ranks)
    if allocation is None:
        return
    try:
        record_release(rule.run, allocation, round(time.time(), 3))
    except OSError as error:
        print(f"evspan: the end of this job is not recorded: {error}", flush=True)


def _end_array_if_same_error(rules: Path) -> None:
    """Ends this job's array if its first runs have failed with the same error.

    `evspan sweep` does so, too, while it waits. Inside of a container there is no scancel.
    """
    runs = [Path(rule["run"]) for rule in json.loads(rules.read_text())]
    message = error_of_sweep(runs)
    scancel = shutil.which("scancel")
    if not message or not scancel:
        return
    print(f"evspan: {message}", flush=True)
    jobs: list[str] = []
    for run in runs:
        if not has_ended(run):
            jobs += [job for job in submitted_jobs(run) if re.fullmatch(JOB_ID, job)]
            # First of all: a successor that starts meanwhile reads it, and ends.
            append(run, "cancelled", step=newest_step(run, read_files=False), reason=message)
    for state in ("PENDING", "RUNNING"):
        if jobs:
            subprocess.run([scancel, f"--state={state}", *jobs], check=False, timeout=60)


def _was_stopped_at_the_limit(
    code: int | None, state: str, seconds_left: str, rule: RequeueRule
) -> bool:
    """Whether the ranks have ended on SLURM's signal of the time limit.

    A job that is cancelled, or whose node failed, has no time left either: its end is now.
    """
    if code not in STOPPED_CODES or state not in ("RUNNING", ""):
        return False
    try:
        return int(seconds_left) <= rule.signal_delay_s + SIGNAL_EARLY_S
    except ValueError:
        return False


def decide(rule: RequeueRule, end: JobEnd) -> Decision:
    """Whether to run again. Writes the decision into the run's history.

    | the ranks                                | decision                                  |
    |------------------------------------------|-------------------------------------------|
    | were cancelled or pruned, or SLURM has   | nothing; SLURM decides                    |
    | ended or requeued the job                |                                           |
    | ended with exit code 0                   | done                                      |
    | ended with a user's error in any rank    | failed: it would happen again             |
    | reached the time limit, whatever they do | requeue, until max_retries at one step    |
    | saved on a stop signal                   | requeue                                   |
    | otherwise: a fault                       | requeue, until max_retries at one step    |
    """
    run = Path(rule.run)
    recorded = _recorded_end(run)
    if recorded:
        return Decision(False, f"{run}: {recorded}")
    # Before the exit code: srun may return 0 where SLURM has killed its ranks.
    if end.state and end.state not in CAN_REQUEUE and not end.time_limit:
        return Decision(False, f"{run}: SLURM has ended the job ({end.state})")
    if end.code == 0:
        return Decision(False, f"{run}: done")
    # At the time limit or a preemption, there is no time to read the checkpoints.
    is_fault = not end.time_limit and end.code != STOPPED_EXIT_CODE
    step = newest_step(run, read_files=is_fault)
    for note in end.notes:
        if note.code == USER_ERROR_EXIT_CODE:
            append(run, "failed", step=step, message=note.message, code=note.code)
            return Decision(False, f"{run}: {note.message}")
    if end.time_limit:
        return _decide_time_limit(rule, step)
    if end.code == STOPPED_EXIT_CODE:
        append(run, "requeued", step=step)
        return Decision(True, f"{run}: saved at step {step}; {rule.continuation}")
    return _decide_fault(rule, end, step)


def _recorded_end(run: Path) -> str:
    """The end of this attempt, as a rank, `evspan cancel` or a search has recorded it; or empty."""
    for event in reversed(read(run)):
        if event["event"] in ("done", "cancelled", "pruned"):
            return str(event["event"])
        if event["event"] in ("start", "submitted", "requeued"):
            break
    return ""


def _decide_time_limit(rule: RequeueRule, step: int) -> Decision:
    run = Path(rule.run)
    message = f"time limit reached while {read_activity(run).value}"
    append(run, "time_limit", step=step, message=message)
    limits = time_limits_in_a_row(read(run))
    if rule.smoke_of:
        message = f"{message}, at step {step}; a smoke run is not started again"
    elif limits < max(2, rule.max_retries):
        append(run, "requeued", step=step, reason=message)
        return Decision(True, f"{run}: {message}; {rule.continuation}, at step {step}")
    else:
        message = f"{message}, {limits} times in a row at step {step}. {TIME_LIMIT_REMEDY}"
    append(run, "failed", step=step, message=message)
    return Decision(False, f"{run}: {message}")


def newest_step(run: Path, *, read_files: bool = True) -> int:
    """Step of the newest intact checkpoint, from which the next attempt continues; 0 without one.

    Args:
        read_files: whether their contents are checked, or only their sizes.
    """
    try:
        newest = find_newest_intact(run, None if read_files else ())
    except OSError:
        return 0
    return 0 if newest.name is None else step_of(newest.name)


def _decide_fault(rule: RequeueRule, end: JobEnd, step: int) -> Decision:
    run = Path(rule.run)
    message = _fault_message(end)
    append(run, "fault", step=step, message=message, code=end.code)
    faults = faults_in_a_row(read(run))
    if rule.requeue_after_fault and faults < rule.max_retries:
        append(run, "requeued", step=step)
        count = f"fault {faults} of {rule.max_retries} at step {step}"
        return Decision(True, f"{run}: {count}: {message}; {rule.continuation}")
    if rule.requeue_after_fault and faults > 1:
        message = f"failed {faults} times in a row at step {step}: {message}"
    append(run, "failed", step=step, message=message, code=end.code)
    return Decision(False, f"{run}: {message}")


def _fault_message(end: JobEnd) -> str:
    """Names the rank that failed by itself.

    Without one: what the other ranks report of it. To that the output of a rank is added that ended
    by itself without a note, as one that fails while it starts.
    """
    own = [
        f"{note.rank} on {note.host}: {note.message or f'exit code {note.code}'}"
        for note in end.notes
        if note.code not in (LOST_EXIT_CODE, STOPPED_EXIT_CODE)
    ]
    reported = [note.message for note in end.notes if note.code == LOST_EXIT_CODE and note.message]
    messages = own[:1] or reported[:1]
    with_note = {note.rank for note in end.notes}
    logs = {n: log for n, log in enumerate(end.logs) if f"rank-{n:02d}" not in with_note}
    ended = _ended_by_themselves(end.logs[:1]) & logs.keys()
    if logs and (ended or not reported):
        rank = min(ended or logs)
        last = _last_line(logs[rank])
        messages.append(f"rank-{rank:02d} left no note; {logs[rank]} ends with: {last}")
    if messages:
        return "; ".join(messages)
    if end.code is not None and end.code > 128:
        return f"a rank was killed by signal {end.code - 128}"
    return f"srun ended with exit code {end.code}"


def _ended_by_themselves(outputs: Sequence[Path]) -> set[int]:
    """The ranks of which srun reports an exit code. It kills the others later.

    Args:
        outputs: of srun, which writes to that of rank 0.
    """
    ended: set[int] = set()
    for output in outputs:
        attempt = _text(output).rpartition("\nevspan: ")[2]  # the decision after an earlier one
        for tasks in EXITED.findall(attempt):
            for part in tasks.split(","):
                first, _, last = part.partition("-")
                ended.update(range(int(first), int(last or first) + 1))
    return ended


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def _text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
