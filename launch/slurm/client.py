"""Submits job arrays through Submitit; reads the queue and cancels jobs by SLURM's commands."""

import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

from evspan.conf.errors import ConfigError, UserError
from evspan.conf.lock_holder import SLURM_ENDED
from submitit import Job, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
LEAST_MAX_ARRAY_SIZE = 1001  # the default
TIMEOUT_S = 60  # an overloaded controller may take this long to answer
CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")  # the cluster to contact
JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")  # variables that describe a job


class Queued(NamedTuple):
    """A task in SLURM's queue. SLURM removes tasks some minutes after their end (MinJobAge)."""

    id: str  # JOB_INDEX in an array, else the job id
    state: str
    reason: str  # why the task waits; the nodes of a task that runs
    comment: str

    @property
    def job(self) -> str:
        """The job id without the array index."""
        return self.id.split("_")[0]

    @property
    def alive(self) -> bool:
        """Whether the task waits or runs, or may run again."""
        return self.state not in SLURM_ENDED


def require_commands() -> None:
    """Checks that SLURM's commands are installed.

    Raises:
        ConfigError: some are not on the PATH.
    """
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        raise ConfigError(
            f"SLURM commands that are not on the PATH: {', '.join(missing)}. Run this where jobs "
            "can be submitted, such as a login node, or choose cluster=local"
        )


def queue(name: str) -> list[Queued]:
    """The tasks of this user's jobs called `name`.

    Raises:
        UserError: SLURM does not answer.
    """
    return _squeue(f"--user={os.getuid()}", f"--name={name}")


def queued(ids: Iterable[str]) -> dict[str, Queued]:
    """The tasks with these ids that are in SLURM's queue, by id, whoever submitted them.

    Raises:
        UserError: SLURM does not answer.
    """
    requested = set(ids)
    if not requested:
        return {}
    jobs = sorted({id_.split("_")[0] for id_ in requested})
    try:
        tasks = _squeue(f"--jobs={','.join(jobs)}")
    except UserError as error:
        if "Invalid job id" in str(error):  # squeue's answer if it has none of the jobs
            return {}
        raise
    return {task.id: task for task in tasks if task.id in requested}


def _squeue(*filters: str) -> list[Queued]:
    output = _run(
        "squeue", "--noheader", "--array", "--states=all", *filters, "--format=%i|%T|%R|%k"
    )
    lines = [line for line in output.splitlines() if line.count("|") >= 3]
    return [Queued(*line.split("|", 3)) for line in lines]


def cancel(name: str) -> None:
    """Cancels this user's jobs called `name`."""
    _run("scancel", f"--user={os.getuid()}", f"--name={name}")


def cancel_tasks(ids: Sequence[str]) -> None:
    """Cancels these tasks.

    Raises:
        UserError: SLURM does not answer, or refuses.
    """
    try:
        _run("scancel", *ids)
    except UserError:  # scancel also fails for a task that has just ended
        tasks = queued(ids).values()
        if any(task.alive and task.state != "COMPLETING" for task in tasks):
            raise


def signal_tasks(ids: Sequence[str]) -> None:
    """Asks the ranks of these tasks to save and end, without the batch scripts.

    Raises:
        UserError: SLURM does not answer, or refuses.
    """
    try:
        _run("scancel", "--signal=TERM", *ids)
    except UserError:  # scancel also fails for a task that has just ended, or whose ranks start
        queued(ids)


def _run(*command: str) -> str:
    """The output of a SLURM command."""
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
        ).stdout
    except subprocess.CalledProcessError as error:
        reason = sentence(error.stderr) or f"exit code {error.returncode}"
        raise UserError(f"{command[0]} failed: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} has not answered for {TIMEOUT_S} s; is SLURM's controller up?"
        ) from error


def sentence(output: str) -> str:
    """The error messages in a SLURM command's output, on one line, without the command's name."""
    lines = (line.split("error:")[-1].strip() for line in output.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


def submit_array(
    executor: SlurmExecutor, tasks: Sequence[Callable[[], Any]], remedy: str
) -> list[Job[Any]]:
    """Submits these tasks as a job array.

    Args:
        remedy: last sentence of the error message if SLURM refuses the job.

    Raises:
        ConfigError: SLURM refuses the job.
    """
    try:
        # Submitit writes to stderr what it also raises.
        with outside_of_jobs(), redirect_stderr(io.StringIO()):
            return executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"SLURM refuses the job: {sentence(str(error))}. {remedy}") from error


def max_array_size() -> int:
    """The most elements of a job array (MaxArraySize); that of SLURM's default where not known."""
    try:
        config = _run("scontrol", "show", "config")
    except (UserError, FileNotFoundError):
        return LEAST_MAX_ARRAY_SIZE
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return max(1, int(match[1])) if match else LEAST_MAX_ARRAY_SIZE


def sbatch(arguments: Sequence[str]) -> str:
    """Submits a job. Returns its id.

    Args:
        arguments: of sbatch: options, the script, and the script's own arguments.

    Raises:
        ConfigError: SLURM refuses it.
    """
    with outside_of_jobs():
        try:
            return _run("sbatch", "--parsable", *arguments).strip().split(";")[0]
        except UserError as error:
            raise ConfigError(f"SLURM refuses the job: {error}") from error


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hides the variables of the job that this process may be in.

    sbatch would take its cores and memory as defaults for the new job.
    """
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        for name in list(os.environ):
            if name.startswith(JOB_PREFIXES) and name not in CLUSTER_VARIABLES:
                hidden[name] = os.environ.pop(name)
    try:
        yield
    finally:
        os.environ.update(hidden)


def wait_until_gone(name: str, seconds: float, poll_s: float = 1.0) -> bool:
    """Waits until no job called `name` waits or runs; False if that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while any(task.alive for task in queue(name)):
        if time.monotonic() > end:
            return False
        time.sleep(poll_s)
    return True
