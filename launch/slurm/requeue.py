"""Decides whether SLURM requeues a job after its ranks have ended, or before its time limit.

python -m evspan.launch.slurm.requeue RULES INDEX CODE STATE REASON SECONDS

RULES is the file that `evspan.launch.slurm.sbatch` wrote, INDEX the run's index in it. CODE is the
exit code of srun, or `limit` if the ranks still run shortly before the time limit. STATE and REASON
are those of the job in SLURM, SECONDS the time that it has left (may be empty). Exit code 0:
requeue; 3: do not. The batch script calls it on the first node, outside of any container, or by
srun inside one; it needs no GPU and does not import torch.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import (
    LOST_EXIT_CODE,
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
)
from evspan.launch.slurm.rank_task import (
    SIGNAL_EARLY_S,
    RankNote,
    notes_folder,
    read_notes,
)
from evspan.pipeline.checkpoint_files import find_newest_intact, step_of
from evspan.pipeline.history import (
    append,
    faults_in_a_row,
    read,
    read_activity,
    slurm_job,
    time_limits_in_a_row,
)

CAN_REQUEUE = ("RUNNING", "PREEMPTED")  # in other states the job is cancelled or already requeued
STILL_RUNS = "limit"  # instead of an exit code
DO_NOT_REQUEUE = 3  # exit code; an error of this command gives 1
# Ranks that have saved, or were ended by the signal before they could handle it.
STOPPED_CODES = frozenset({STOPPED_EXIT_CODE, *(128 + number for number in STOP_SIGNALS)})
TIME_LIMIT_REMEDY = (
    "Submit it again with a longer cluster.timeout_min, or a smaller checkpoint.every"
)


@dataclass(frozen=True)
class RequeueRule:
    """What the decision needs of a run.

    run: its folder. log: output of a rank as SLURM keeps it, with %j for the job and %t for the
    rank in its name. max_retries: faults in a row, or time limits in a row but at least 2, at the
    same step after which the run has failed. signal_delay_s: seconds from SLURM's signal to the
    time limit.
    """

    run: str
    log: str
    ranks: int
    max_retries: int
    requeue_after_fault: bool
    signal_delay_s: int = 0


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
    rule = RequeueRule(**json.loads(Path(rules).read_text())[int(index)])
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
    decision = decide(rule, end)
    print(f"evspan: {decision.reason}", flush=True)
    return 0 if decision.requeue else DO_NOT_REQUEUE


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
    | ended with exit code 0                   | done                                      |
    | were cancelled, or SLURM has ended or    | nothing; SLURM decides                    |
    | requeued the job                         |                                           |
    | ended with a user's error in any rank    | failed: it would happen again             |
    | reached the time limit, whatever they do | requeue, until max_retries at one step    |
    | saved on a stop signal                   | requeue                                   |
    | otherwise: a fault                       | requeue, until max_retries at one step    |
    """
    run = Path(rule.run)
    if end.code == 0:
        return Decision(False, f"{run}: done")
    recorded = _recorded_end(run)
    if recorded:
        return Decision(False, f"{run}: {recorded}")
    if end.state and end.state not in CAN_REQUEUE and not end.time_limit:
        return Decision(False, f"{run}: SLURM has ended the job ({end.state})")
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
        return Decision(True, f"{run}: saved at step {step} and requeued")
    return _decide_fault(rule, end, step)


def _recorded_end(run: Path) -> str:
    """The end of this attempt, as a rank or `evspan cancel` has recorded it; empty without one."""
    for event in reversed(read(run)):
        if event["event"] in ("done", "cancelled"):
            return str(event["event"])
        if event["event"] in ("start", "submitted", "requeued"):
            break
    return ""


def _decide_time_limit(rule: RequeueRule, step: int) -> Decision:
    run = Path(rule.run)
    message = f"time limit reached while {read_activity(run).value}"
    append(run, "time_limit", step=step, message=message)
    limits = time_limits_in_a_row(read(run))
    if limits < max(2, rule.max_retries):
        append(run, "requeued", step=step, reason=message)
        return Decision(True, f"{run}: {message}; requeued, continues at step {step}")
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
        return Decision(True, f"{run}: {count}: {message}; requeued")
    if rule.requeue_after_fault:
        message = f"failed {faults} times in a row at step {step}: {message}"
    append(run, "failed", step=step, message=message, code=end.code)
    return Decision(False, f"{run}: {message}")


def _fault_message(end: JobEnd) -> str:
    """Names the rank that failed by itself.

    Without one: what the other ranks report of it; else the output of a rank that left no note.
    """
    own = [
        f"{note.rank} on {note.host}: {note.message or f'exit code {note.code}'}"
        for note in end.notes
        if note.code not in (LOST_EXIT_CODE, STOPPED_EXIT_CODE)
    ]
    reported = [note.message for note in end.notes if note.code == LOST_EXIT_CODE and note.message]
    messages = own[:1] or reported[:1]
    if not reported:
        messages += _ranks_without_note(end)[:1]
    if messages:
        return "; ".join(messages)
    if end.code is not None and end.code > 128:
        return f"a rank was killed by signal {end.code - 128}"
    return f"srun ended with exit code {end.code}"


def _ranks_without_note(end: JobEnd) -> list[str]:
    """A sentence for each rank that left no note."""
    with_note = {note.rank for note in end.notes}
    sentences = []
    for number, log in enumerate(end.logs):
        rank = f"rank-{number:02d}"
        if rank not in with_note:
            sentences.append(f"{rank} left no note; {log} ends with: {_last_line(log)}")
    return sentences


def _last_line(log: Path) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return "nothing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
