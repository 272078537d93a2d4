"""Prepares recordings in a SLURM job array: the runner of `evspan prep cluster=slurm`."""

import hashlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import current_thread, main_thread
from typing import NoReturn

import psutil
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.private_files import make_private_folder
from evspan.conf.schema.cluster import PrepClusterConfig
from evspan.conf.schema.prep import PrepConfig
from evspan.data_prep.workers import DryRun, PrepJob, PrepOutcomes
from evspan.launch.slurm import client
from evspan.launch.slurm.code_archive import plan_code
from evspan.launch.slurm.job_python import job_python
from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines
from evspan.launch.slurm.prep_task import PrepTask, balanced, number_of_tasks
from evspan.launch.slurm.prep_wait import GRACE_S, ArrayTask, ArrayWatch
from evspan.launch.slurm.submitit_adapter import Executor, script_of

logger = logging.getLogger(__name__)
FOLDER = "slurm"  # next to the part files, removed with them at the end
OUTCOMES = "outcomes"
END_S = 150.0  # a cancelled task ignores SIGTERM (Submitit); SIGKILL follows after KillWait
REMEDY = (
    "Correct cluster.partition, account, qos, constraint, timeout_min, cpus_per_task or mem_gb; "
    "cluster.dry_run=true shows the script, sinfo the partitions"
)


@dataclass(frozen=True)
class PrepArray:
    """The job array of one output folder.

    Attributes:
        name: SLURM's name of the job, the same for every run into this output.
        comment: process and machine that wait for it, shown by squeue.
        folder: gets Submitit's scripts, pickles and logs, and the outcome files.
        job_indices: for each task, the indices of its jobs.
    """

    name: str
    comment: str
    folder: Path
    jobs: Sequence[PrepJob]
    job_indices: list[list[int]]

    @staticmethod
    def plan(jobs: Sequence[PrepJob], cluster: PrepClusterConfig) -> "PrepArray":
        """Assigns the jobs to tasks."""
        parts = jobs[0].part.absolute().parents[1]
        digest = hashlib.sha256(os.fsencode(parts.resolve())).hexdigest()[:8]
        sizes = [_bytes(job) for job in jobs]
        return PrepArray(
            name=f"evspan-prep-{digest}",
            comment=f"process {os.getpid()} on {socket.gethostname()}{_own_job()}",
            folder=parts / FOLDER,
            jobs=jobs,
            job_indices=balanced(sizes, number_of_tasks(sizes, cluster)),
        )

    @property
    def outcomes(self) -> Path:
        """Folder of the outcome files."""
        return self.folder / OUTCOMES

    def executor(self, cluster: PrepClusterConfig) -> Executor:
        """Submitit's executor with the parameters of the config."""
        python = job_python(cluster, plan_code(cluster, self.folder))
        executor = Executor(
            self.folder, max_num_timeout=cluster.max_num_timeout, python=python.command
        )
        executor.update_parameters(
            job_name=self.name,
            comment=self.comment,
            ntasks_per_node=1,
            setup=[*setup_lines(cluster), *python.setup],
            **sbatch_parameters(cluster),
        )
        return executor

    def script(self, cluster: PrepClusterConfig) -> str:
        """The batch script, followed by a comment for each task that lists its recordings."""
        lines = [script_of(self.executor(cluster), len(self.job_indices))]
        for number, indices in enumerate(self.job_indices):
            gigabytes = sum(_bytes(self.jobs[i]) for i in indices) / 1e9
            keys = ", ".join(self.jobs[i].key for i in indices)
            lines.append(f"# task {number}, {gigabytes:.2f} GB: {keys}")
        return "\n".join(lines)

    def submit(self, config: PrepConfig) -> list[ArrayTask]:
        """Submits the array."""
        tasks: list[PrepTask] = []
        for indices in self.job_indices:
            jobs = {i: self.jobs[i] for i in indices}
            tasks.append(PrepTask(jobs, config, self.outcomes))
        submitted = client.submit_array(self.executor(config.cluster), tasks, REMEDY)
        return [
            ArrayTask(job.job_id, indices, job.paths.stderr, job.paths.result_pickle)
            for job, indices in zip(submitted, self.job_indices, strict=True)
        ]


def _bytes(job: PrepJob) -> int:
    return job.source.path.stat().st_size


class SlurmRunner:
    """Prepares recordings in a job array, and waits for it."""

    def run(self, jobs: Sequence[PrepJob], config: PrepConfig) -> PrepOutcomes:
        """Yields each job when its task has ended it. Closing the generator cancels the array.

        Raises:
            ConfigError: SLURM is not installed, or refuses the array.
            UserError: another process has an array for the same output.
            DryRun: cluster.dry_run is set; the message is the batch script.
        """
        if not jobs:
            return
        array = PrepArray.plan(jobs, config.cluster)
        if config.cluster.dry_run:
            raise DryRun(array.script(config.cluster))
        client.require_commands()
        code = plan_code(config.cluster, array.folder)
        _cancel_orphans(array.name)
        shutil.rmtree(array.folder, ignore_errors=True)  # of an earlier run
        make_private_folder(array.folder)
        if code is not None:
            code.write()
        make_private_folder(array.outcomes)
        with _exit_on_signals():
            try:
                yield from _submit_and_wait(array, config)
            except ConfigError:  # SLURM has refused the array
                raise
            except BaseException:
                _cancel(array.name)
                raise


def _submit_and_wait(array: PrepArray, config: PrepConfig) -> PrepOutcomes:
    tasks = array.submit(config)
    job_id = tasks[0].id.split("_")[0]
    logger.info(
        f"SLURM job {job_id}: {len(array.jobs)} to prepare in {len(tasks)} tasks; logs in "
        f"{array.folder}"
    )
    watch = ArrayWatch(array.name, array.outcomes, dict(enumerate(array.jobs)), tasks)
    yield from watch.results()
    _wait_for_files([task.result for task in tasks if task.id not in watch.ended])


def _cancel_orphans(name: str) -> None:
    """Cancels the array of a run that was killed: two tasks would write the same parts.

    Raises:
        UserError: its process may still be alive. (The lock on the output separates two runs only
            where the file system supports locks.)
    """
    alive = [task for task in client.queue(name) if task.alive]
    for task in alive:
        process = re.fullmatch(r"process (\d+) on (\S+)( in job \d+)?", task.comment)
        if process and process[3] and process[3] == _own_job():
            continue  # an earlier attempt of this job, which SLURM has ended
        if process and (process[2] != socket.gethostname() or _is_alive(int(process[1]))):
            raise UserError(
                f"SLURM job {task.job} prepares into the same output for {task.comment}. Wait "
                f"until it is done; if that process is gone, run scancel {task.job} and then the "
                "same again"
            )
    if not alive:
        return
    job = alive[0].job
    logger.info(
        "cancelling SLURM job %s, left by a run that was killed; finished parts are kept", job
    )
    client.cancel(name)
    if not client.wait_until_gone(name, END_S):
        raise UserError(
            f"SLURM job {job} was cancelled {END_S:.0f} s ago and has not ended. Run the same "
            f"again when squeue --name={name} lists nothing"
        )


def _own_job() -> str:
    """' in job ID' for a command that itself is a SLURM job; empty elsewhere."""
    job = os.environ.get("SLURM_JOB_ID")
    return f" in job {job}" if job else ""


def _is_alive(pid: int) -> bool:
    return pid != os.getpid() and psutil.pid_exists(pid)


def _wait_for_files(paths: list[Path]) -> None:
    """Waits for Submitit's results: tasks write them last, into a folder that will be removed."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and not all(path.exists() for path in paths):
        time.sleep(0.1)


def _cancel(name: str) -> None:
    try:
        client.cancel(name)
    except UserError as error:
        logger.info(f"{error}. The SLURM job may go on; to end it: scancel --name={name}")
    else:
        logger.info("cancelled the SLURM job; finished parts are kept for the next run")


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, raise SystemExit, so that the array is cancelled.

    Signals that are ignored, as under nohup, stay ignored.
    """

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    if current_thread() is not main_thread():  # Python sets handlers in the main thread only
        yield
        return
    changed: list[signal.Signals] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)
            changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
