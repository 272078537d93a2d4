"""What the batch script asks when the ranks of a run have ended: shall SLURM run it again?

python -m evspan.launch.slurm.requeue RUNS INDEX CODE STATE

RUNS is the file that `evspan.launch.slurm.sbatch` wrote, INDEX the place in the array, CODE that of srun, STATE what SLURM says of the job.
Exit code 0: requeue. It runs on the first node, outside of any container, or by srun within one; nothing but Python is needed.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evspan.conf.errors import LOST_EXIT_CODE, STOPPED_EXIT_CODE, USER_ERROR_EXIT_CODE
from evspan.launch.slurm.rank_task import notes_of
from evspan.pipeline.history import append, faults_in_a_row, read, slurm_job


class Note(NamedTuple):
    rank: str
    code: int
    message: str
    host: str


def main(argv: list[str]) -> int:
    runs, index, code, state = Path(argv[0]), int(argv[1]), int(argv[2]), argv[3]
    about = json.loads(runs.read_text())[index]
    run, log = Path(about["run"]), about["log"].replace("%j", slurm_job())
    logs = [Path(log.replace("%t", str(rank))) for rank in range(about["ranks"])]
    again, line = decide(
        run,
        notes_in(notes_of(run, os.environ)),
        code,
        state,
        most=about["max_retries"],
        retry=about["requeue_after_fault"],
        logs=logs,
    )
    print(f"evspan: {line}", flush=True)
    return 0 if again else 1


def decide(
    run: Path,
    notes: list[Note],
    code: int,
    state: str,
    *,
    most: int,
    retry: bool,
    logs: Sequence[Path],
) -> tuple[bool, str]:
    """Whether to run again, and what to say; writes it into the run's history.

    most: so many faults in a row at one step are enough. logs: what SLURM has kept of each rank, for those without a note.
    """
    if code == 0:
        return False, f"{run}: done"
    if state and state not in (
        "RUNNING",
        "PREEMPTED",
    ):  # cancelled, or already on its way back to the queue
        return False, f"{run}: SLURM has ended the job ({state})"
    step = newest_step(run)
    if mistake := next((note for note in notes if note.code == USER_ERROR_EXIT_CODE), None):
        append(run, "failed", step=step, message=mistake.message, code=mistake.code)
        return False, f"{run}: {mistake.message}"
    if code == STOPPED_EXIT_CODE:
        append(run, "requeued", step=step)
        return True, f"{run}: saved at step {step} and requeued"
    message = _fault(notes, code, logs)
    append(run, "fault", step=step, message=message, code=code)
    faults = faults_in_a_row(read(run))
    if not retry or faults >= most:
        why = f"failed {faults} times in a row at step {step}: {message}" if retry else message
        append(run, "failed", step=step, message=why, code=code)
        return False, f"{run}: {why}"
    append(run, "requeued", step=step)
    return True, f"{run}: fault {faults} of {most} at step {step}: {message}; requeued"


def notes_in(folder: Path) -> list[Note]:
    notes = []
    for path in sorted(folder.glob("rank-*.json")):
        told: dict[str, Any] = json.loads(path.read_text())
        notes.append(Note(path.stem, told["code"], told["message"], told["host"]))
    return notes


def newest_step(run: Path) -> int:
    """Of the checkpoint that the next attempt will begin with; 0 if there is none."""
    try:
        return int((run / "checkpoints" / "latest").read_text().strip().rpartition("-")[2])
    except (OSError, ValueError):
        return 0


def _fault(notes: list[Note], code: int, logs: Sequence[Path]) -> str:
    """Of the rank that failed by itself, else what the others say of it, else what SLURM has kept of those that say nothing."""
    others = [note.message for note in notes if note.code == LOST_EXIT_CODE and note.message]
    own = [
        f"{note.rank} on {note.host}: {note.message or f'exit code {note.code}'}"
        for note in notes
        if note.code not in (LOST_EXIT_CODE, STOPPED_EXIT_CODE)
    ]
    told = {note.rank for note in notes}
    silent = [
        f"rank-{rank:02d} ended without a word; {log} ends with: {_last_line(log)}"
        for rank, log in enumerate(logs)
        if f"rank-{rank:02d}" not in told
    ]
    said = own[:1] or others[:1]
    if silent and not others:
        said.append(silent[0])
    how = (
        f"srun ended with exit code {code}"
        if code <= 128
        else f"a rank was killed by signal {code - 128}"
    )
    return "; ".join(said or [how])


def _last_line(log: Path) -> str:
    try:
        lines = [
            line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return "nothing"
    return lines[-1] if lines else "nothing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
