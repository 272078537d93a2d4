"""Jobs that continue a run or wait for others: what a batch script does before its ranks start.

SLURM's dependencies see how a job ended, not how its run did: a run may continue in a requeued job
or in a successor. So a job depends on the end of others (afterany), and reads the state of their
runs when it starts (`evspan.launch.slurm.chain`). It works, ends, or hands over to a copy of itself
that waits for further jobs. All jobs of a run execute the same script, FOLDER/script.sh; its first
argument is the kind of the job.
"""

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from evspan.launch.slurm.requeue import RUN_HAS_ENDED
from evspan.launch.slurm.watchdog import ID_LINES
from evspan.pipeline.history import slurm_job

SCRIPT = "script.sh"  # next to Submitit's pickles
SUCCESSOR = "successor"  # kind of a job that continues the run of another
WAITING = "waiting"  # kind of a job that has taken the place of one that had to wait further
# Exit codes of `evspan.launch.slurm.chain check`, and of the requeue command.
WORK_WITH_SUCCESSOR = 6
END = 3
WAIT = 4
REFUSED = 5
SUBMIT_TRIES = 3
SUBMIT_PAUSE_S = 5

# Needs the variable `script`.
_FUNCTIONS = r"""
submit_again() (  # DEPENDENCY KIND: prints the id of the new job
    array=()
    suffix=
    if [[ ${SLURM_ARRAY_JOB_ID:-} ]]; then
        array=("--array=$SLURM_ARRAY_TASK_ID")
        suffix=_$SLURM_ARRAY_TASK_ID
    fi
    folder=${SLURM_SUBMIT_DIR:-$PWD}
    # sbatch would take the cores and the memory of this job as defaults for the new one.
    for name in "${!SLURM_@}" "${!SLURMD_@}" "${!SRUN_@}" "${!SUBMITIT_@}"; do
        if [[ $name != SLURM_CONF && $name != SLURM_CLUSTERS ]]; then unset "$name"; fi
    done
    if [[ $submitted_path ]]; then PYTHONPATH=$submitted_path; else unset PYTHONPATH; fi
    for ((tries = 1; ; tries++)); do
        new=$(sbatch --parsable --chdir="$folder" "${array[@]}" "--dependency=$1" "$script" "$2") &&
            break
        if ((tries == {tries})); then exit 1; fi
        sleep {pause}
    done
    printf '%s\n' "${new%%;*}$suffix"
)
"""
_START = r"""
jobs=$(chain check "$id" "${1:-first}")
case $? in
    0) ;;
    {end}) exit 0 ;;
    {refused}) exit 1 ;;
    {wait})
        next=$(submit_again "$jobs" {waiting}) || exit 1
        chain waiting "$id" "$next"
        exit 0 ;;
    {with_successor})
        next=$(submit_again "afterany:$id" {successor})
        chain successor "$id" "$next" ;;
    *)
        echo "evspan: this job ends: the check before its start has failed" >&2
        exit 1 ;;
esac
"""


def path_lines() -> list[str]:
    """Lines for the start of the script: jobs that it submits get its own PYTHONPATH."""
    return ["submitted_path=${PYTHONPATH:-}"]


def start_lines(chain: str, folder: Path) -> list[str]:
    """Lines after the setup, before the ranks: the job works, ends, or waits further.

    Args:
        chain: the command of `evspan.launch.slurm.chain`, up to the file of the rules.
        folder: has the script.
    """
    functions = _FUNCTIONS.replace("{tries}", str(SUBMIT_TRIES))
    functions = functions.replace("{pause}", str(SUBMIT_PAUSE_S))
    start = _START
    codes = {
        "end": END,
        "refused": REFUSED,
        "wait": WAIT,
        "with_successor": WORK_WITH_SUCCESSOR,
        "waiting": WAITING,
        "successor": SUCCESSOR,
    }
    for name, value in codes.items():
        start = start.replace(f"{{{name}}}", str(value))
    return [
        "# jobs that this one follows",
        *ID_LINES,
        f"script={shlex.quote(str(folder / SCRIPT))}",
        f'chain() {{ {chain} "${{SLURM_ARRAY_TASK_ID:-0}}" "$@"; }}',
        *functions.strip().splitlines(),
        *start.strip().splitlines(),
    ]


def end_lines() -> list[str]:
    """Lines after srun, instead of those that requeue: its successor continues the run.

    A run that is done, has failed or was cancelled needs none: the waiting job is cancelled.
    """
    return [
        "code=$?",
        'kill -KILL "$watchdog" 2>/dev/null',
        "read_job",
        'should_requeue "$code" "$state" "$reason" "$left"',
        f"if (($? == {RUN_HAS_ENDED})); then",
        "    next=$(chain next)",
        '    if [[ $next ]]; then scancel "$next"; fi',
        "fi",
        'exit "$code"',
    ]


def submit_successors(folder: Path, jobs: Sequence[str]) -> list[str]:
    """Submits for each job one that starts when it has ended, with its place in the array.

    Args:
        folder: of the scripts. jobs: SLURM's ids, of the whole array.

    Returns:
        SLURM's ids of the successors, in the same form.

    Raises:
        ConfigError: SLURM refuses one.
    """
    from evspan.launch.slurm.client import sbatch  # imports Submitit, which a job does not need

    successors = []
    for job in jobs:
        _, _, index = job.partition("_")
        options = [f"--dependency=afterany:{job}"]
        if index:
            options.append(f"--array={index}")
        new = sbatch([*options, str(folder / SCRIPT), SUCCESSOR])
        successors.append(f"{new}_{index}" if index else new)
    return successors


def keep_tasks(folder: Path, pickles: Sequence[Path]) -> None:
    """Links the pickles of the tasks under names that do not contain the id of a job."""
    for index, pickle in enumerate(pickles):
        os.link(pickle, _task_file(folder, index))


def take_task(folder: Path) -> None:
    """Gives a job that another one has submitted the pickle of its task, if it has none."""
    task = _task_file(folder, int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)))
    own = folder / f"{slurm_job()}_submitted.pkl"
    if task.exists() and not own.exists():
        with suppress(FileExistsError):  # another rank has linked it
            os.link(task, own)


def _task_file(folder: Path, index: int) -> Path:
    return folder / f"task-{index}.pkl"
