"""What SLURM is asked: to run a job array, by Submitit; what became of it, and to end it, by SLURM's own commands."""

import io
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.prep_cluster import SlurmConfig
from submitit import Job, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
# A task in any other state may still run, or run again: it may be waiting, suspended, held, or on its way back to the queue.
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
TIMEOUT_S = 60  # a controller at its limit may take so long to answer
CONTACT = ("SLURM_CONF", "SLURM_CLUSTERS")  # how to reach the cluster, which stays


class Queued(NamedTuple):
    """A task that SLURM knows. It forgets those that have ended some minutes ago (MinJobAge)."""

    id: str  # ARRAY_INDEX, or the job's alone where it is no array
    state: str
    reason: str  # why it waits, or the nodes
    comment: str

    @property
    def job(self) -> str:
        return self.id.split("_")[0]

    @property
    def alive(self) -> bool:
        return self.state not in ENDED


def require_commands() -> None:
    if missing := [c for c in COMMANDS if shutil.which(c) is None]:
        raise ConfigError(
            f"SLURM's {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not on the PATH. Run this where "
            "jobs can be submitted, such as a login node, or leave out launcher=slurm"
        )


def queue(name: str) -> list[Queued]:
    """The tasks of this user's jobs called `name`.

    Raises:
        UserError: SLURM does not answer.
    """
    return _tasks(f"--user={os.getuid()}", f"--name={name}")


def queued(ids: Iterable[str]) -> dict[str, Queued]:
    """Those of these tasks that SLURM knows, by id, whoever submitted them.

    Raises:
        UserError: SLURM does not answer.
    """
    wanted = set(ids)
    jobs = sorted({id_.split("_")[0] for id_ in wanted})
    try:
        return (
            {task.id: task for task in _tasks(f"--jobs={','.join(jobs)}") if task.id in wanted}
            if jobs
            else {}
        )
    except UserError as error:
        if "Invalid job id" in str(error):  # said where it has forgotten them all
            return {}
        raise


def _tasks(*which: str) -> list[Queued]:
    told = _ask("squeue", "--noheader", "--array", "--states=all", *which, "--format=%i|%T|%R|%k")
    return [Queued(*line.split("|", 3)) for line in told.splitlines() if line.count("|") >= 3]


def cancel(name: str) -> None:
    _ask("scancel", f"--user={os.getuid()}", f"--name={name}")


def cancel_tasks(ids: Sequence[str]) -> None:
    """
    Raises:
        UserError: SLURM does not answer, or does not allow it.
    """
    try:
        _ask("scancel", *ids)
    except UserError:  # of one that has just ended, too
        if any(task.alive and task.state != "COMPLETING" for task in queued(ids).values()):
            raise


def _ask(*command: str) -> str:
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
        ).stdout
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{command[0]} failed: {sentence(error.stderr) or f'exit code {error.returncode}'}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} has not answered for {TIMEOUT_S} s; is SLURM's controller up?"
        ) from error


def sentence(told: str) -> str:
    """What a command of SLURM's said on several lines, each with its name in front."""
    lines = (line.split("error:")[-1].strip() for line in told.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


def submit(
    tasks: Sequence[Callable[[], Any]], name: str, comment: str, folder: Path, config: SlurmConfig
) -> list[Job]:
    """An array with these tasks (or one job, of one), in their order; scripts, pickles and logs lie in `folder`.

    Raises:
        ConfigError: SLURM refuses it.
    """
    return submit_array(
        _executor(name, comment, folder, config),
        tasks,
        "Correct launcher.partition, account, qos, constraint, "
        "timeout_min, cpus_per_task or mem_gb; launcher.dry_run=true shows the script, sinfo the partitions",
    )


def submit_array(
    executor: SlurmExecutor, tasks: Sequence[Callable[[], Any]], remedy: str
) -> list[Job]:
    """Raises ConfigError with the remedy where SLURM refuses it."""
    try:
        with (
            outside_of_jobs(),
            redirect_stderr(io.StringIO()),
        ):  # where Submitit repeats what it raises
            return executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"SLURM refuses the job: {sentence(str(error))}. {remedy}") from error


def script(tasks: int, name: str, comment: str, folder: Path, config: SlurmConfig) -> str:
    """What sbatch would be given. SLURM need not be there."""
    return script_of(_executor(name, comment, folder, config), tasks)


def script_of(executor: SlurmExecutor, tasks: int) -> str:
    if tasks > 1:
        executor.parameters["map_count"] = tasks  # as Submitit does it for an array
    return executor._make_submission_file_text(executor._submitit_command_str, "")


class Executor(SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        """Submitit makes no executor without srun, not even to see its script."""
        return 2


def _executor(name: str, comment: str, folder: Path, config: SlurmConfig) -> SlurmExecutor:
    executor = Executor(folder, max_num_timeout=config.max_num_timeout)
    given = {
        key: getattr(config, key)
        for key in ("partition", "account", "qos", "constraint")
        if getattr(config, key)
    }
    executor.update_parameters(
        job_name=name,
        comment=comment,
        time=config.timeout_min,
        cpus_per_task=config.cpus_per_task,
        ntasks_per_node=1,
        mem=f"{int(1024 * config.mem_gb)}MB",
        array_parallelism=config.array_parallelism,
        signal_delay_s=config.signal_delay_s,
        setup=[*config.setup, *python_path_lines()],
        wckey=None,
        additional_parameters={"requeue": True},
        srun_args=[
            f"--cpus-per-task={config.cpus_per_task}"
        ],  # from SLURM 22.05 on, srun does not take the job's
        **given,
    )
    return executor


def python_path_lines() -> list[str]:
    """Lines that give a node's Python this process's PYTHONPATH, with absolute folders."""
    paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    joined = shlex.quote(os.pathsep.join(dict.fromkeys(paths)))
    return [f'export PYTHONPATH={joined}"${{PYTHONPATH:+:$PYTHONPATH}}"'] if paths else []


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Submitting from within a job, such as an interactive one: its cores and memory are not those of the new job."""
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {
        k: os.environ.pop(k)
        for k in list(os.environ)
        if inside and k.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and k not in CONTACT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def wait_until_gone(name: str, seconds: float, poll_s: float = 1.0) -> bool:
    end = time.monotonic() + seconds
    while any(task.alive for task in queue(name)):
        if time.monotonic() > end:
            return False
        time.sleep(poll_s)
    return True
