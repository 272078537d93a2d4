"""Decides whether SLURM requeues a job after its ranks have ended.

python -m evspan.launch.slurm.requeue RULES INDEX CODE STATE

RULES is the file that `evspan.launch.slurm.sbatch` wrote, INDEX the run's index in it, CODE the
exit code of srun, STATE the state of the job in SLURM. Exit code 0: requeue. The batch script calls
it on the first node, outside of any container, or by srun inside one; it needs nothing but Python.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import LOST_EXIT_CODE, STOPPED_EXIT_CODE, USER_ERROR_EXIT_CODE
from evspan.launch.slurm.rank_task import RankNote, notes_folder, read_notes
from evspan.pipeline.checkpoint_files import find_newest_intact, step_of
from evspan.pipeline.history import append, faults_in_a_row, read, slurm_job

CAN_REQUEUE = ("RUNNING", "PREEMPTED")  # in other states the job is cancelled or already requeued


@dataclass(frozen=True)
class RequeueRule:
    """What the decision needs of a run.

    run: its folder. log: output of a rank as SLURM keeps it, with %j for the job and %t for the
    rank in its name. max_retries: faults in a row at the same step after which the run has failed.
    """

    run: str
    log: str
    ranks: int
    max_retries: int
    requeue_after_fault: bool


@dataclass(frozen=True)
class JobEnd:
    """How the ranks of an attempt ended.

    notes: of ranks that failed. code: exit code of srun. state: of the job in SLURM; may be empty.
    logs: output of each rank, for those without a note.
    """

    notes: Sequence[RankNote]
    code: int
    state: str
    logs: Sequence[Path] = ()


class Decision(NamedTuple):
    """Whether to requeue, and why in one line."""

    requeue: bool
    reason: str


def main(argv: Sequence[str]) -> int:
    """Print the decision. Returns 0 for a requeue, else 1."""
    rules, index, code, state = argv
    rule = RequeueRule(**json.loads(Path(rules).read_text())[int(index)])
    log = Path(rule.log)
    log_of_rank = log.name.replace("%j", slurm_job())
    end = JobEnd(
        notes=read_notes(notes_folder(rule.run, os.environ)),
        code=int(code),
        state=state,
        logs=[log.with_name(log_of_rank.replace("%t", str(rank))) for rank in range(rule.ranks)],
    )
    decision = decide(rule, end)
    print(f"evspan: {decision.reason}", flush=True)
    return 0 if decision.requeue else 1


def decide(rule: RequeueRule, end: JobEnd) -> Decision:
    """Whether to run again. Writes the decision into the run's history.

    | the ranks ended                          | decision                                  |
    |------------------------------------------|-------------------------------------------|
    | with exit code 0                         | done                                      |
    | and SLURM has ended or requeued the job  | nothing; SLURM decides                    |
    | with a user's error in any rank          | failed: it would happen again             |
    | saved on a stop signal                   | requeue                                   |
    | otherwise: a fault                       | requeue, until max_retries at one step    |
    """
    run = Path(rule.run)
    if end.code == 0:
        return Decision(False, f"{run}: done")
    if end.state and end.state not in CAN_REQUEUE:
        return Decision(False, f"{run}: SLURM has ended the job ({end.state})")
    step = newest_step(run)
    for note in end.notes:
        if note.code == USER_ERROR_EXIT_CODE:
            append(run, "failed", step=step, message=note.message, code=note.code)
            return Decision(False, f"{run}: {note.message}")
    if end.code == STOPPED_EXIT_CODE:
        append(run, "requeued", step=step)
        return Decision(True, f"{run}: saved at step {step} and requeued")
    return _decide_fault(rule, end, step)


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
    if end.code > 128:
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
