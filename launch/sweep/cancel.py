"""`evspan cancel`: ends the jobs of a run, or of all runs of a sweep that are not finished."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.slurm.requeue import newest_step
from evspan.launch.sweep.registry import Run, describe, look
from evspan.launch.sweep.state import State
from evspan.pipeline.history import append

DESCRIPTION = """Cancels the SLURM jobs of a run, or of all runs of a sweep that wait or run. Their folders stay: submitted again,
they continue from their newest checkpoints. Nothing to cancel is no mistake."""
EXAMPLES = """examples:
  evspan cancel sweeps/lr/3
  evspan cancel sweeps/lr"""


def cancel(path: Path) -> None:
    """
    Raises:
        UserError: there is no run, or SLURM cannot be asked.
    """
    runs, note = look(path)
    if note:
        raise UserError(f"{note}; run it where SLURM's commands reach the cluster")
    jobs = [run for run in runs if run.alive]
    if jobs:
        from evspan.launch.slurm.client import cancel_tasks

        cancel_tasks([run.job for run in jobs])
        for run in jobs:
            append(run.folder, "cancelled", step=newest_step(run.folder))
            print(f"{run.folder}: cancelled SLURM job {run.job}, which was {describe(run)}")
    here = [run for run in runs if not run.job and run.state.unfinished]
    for run in here:
        print(f"{run.folder}: {_how(run)}")
    if not jobs and not here:
        print(f"nothing to cancel: {_counted(runs)}")


def _how(run: Run) -> str:
    start = next((e for e in reversed(run.events) if e["event"] == "start"), None)
    if run.state is not State.running or start is None:
        return "is no job of SLURM's, and has not begun; end the command that is to start it, by Ctrl-C in its terminal"
    return f"runs on {start['host']} without SLURM; there, kill -TERM {start['pid']} saves and ends it, Ctrl-C ends it at once"


def _counted(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"{runs[0].folder} is {describe(runs[0])}"
    counts = Counter(run.state for run in runs)
    return f"{len(runs)} runs: {', '.join(f'{counts[state]} {state.value}' for state in State if counts[state])}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "evspan cancel",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder of a run or of a sweep")
    given = parser.parse_args(argv)
    run_command(lambda: cancel(given.path))


if __name__ == "__main__":
    main()
