"""An evspan command as a SLURM job of its own: preparation, evaluation and report of a chain.

python -m evspan.launch.slurm.command_job FOLDER COMMAND_FILE

FOLDER is TARGET/.jobs/NAME. It has the files of a run that launchers read: submitted.json,
history.jsonl and logs/rank-00.log. So `evspan status` and `cancel` treat the command as they treat
a run, and other jobs can wait for it. A command that SLURM stops is run again.
"""

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import STOP_SIGNALS, STOPPED_EXIT_CODE, UserError
from evspan.conf.private_files import make_private_folder
from evspan.conf.schema.cluster import ClusterConfig, SlurmConfig
from evspan.conf.secret_values import hidden_overrides
from evspan.launch.local.child_end import last_error
from evspan.launch.local.ranks import die_with_parent
from evspan.launch.slurm.rank_task import redirect_output
from evspan.launch.slurm.requeue import RequeueRule
from evspan.launch.sweep.registry import SUBMITTED
from evspan.pipeline.history import append, attempts, read, slurm_job
from evspan.pipeline.run_lock import RunLock

if TYPE_CHECKING:
    from evspan.conf.schema.training import EvaluateConfig
    from evspan.launch.slurm.code_archive import CodeArchive

logger = logging.getLogger(__name__)
SCRIPTS = ".submitit"  # below the folder: the batch script, and its output
RULES = "runs.json"
COMMAND = "command.json"
MOST_STOPS = 10  # after which a command that was stopped is not run again
REMEDY = (
    "Correct cluster.partition, account, qos, constraint, timeout_min, cpus_per_task, mem_gb or "
    "gpus_per_node; cluster.dry_run=true shows the script"
)


@dataclass(frozen=True)
class CommandJob:
    """A command to submit.

    Attributes:
        folder: TARGET/.jobs/NAME.
        argv: the arguments of `evspan`.
        cpus, gpus: of the one node that the job gets.
        after: folders of what has to be done before.
        mounts: further paths that a container mounts, such as datasets.
        any_end: whether runs that have failed count as done.
    """

    folder: Path
    argv: Sequence[str]
    cluster: SlurmConfig
    cpus: int = 1
    gpus: int = 0
    after: Sequence[str] = ()
    mounts: Sequence[str] = ()
    any_end: bool = False


def evaluation_mounts(config: "EvaluateConfig") -> list[str]:
    """Paths for CommandJob.mounts: what an evaluation reads, and where it writes.

    Args:
        config: with the dataset of the checkpoint's run where none is given.
    """
    paths = [source.root for source in config.dataset.sources]
    paths.append(config.checkpoint)
    if config.output:
        paths.append(_existing_folder(Path(config.output).absolute()))
    return [str(Path(path).absolute()) for path in paths if path]


def _existing_folder(path: Path) -> str:
    """The path or the closest folder above it: a container cannot mount what does not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return str(path)


def submit_command_job(job: CommandJob) -> str:
    """Submits the command. Returns SLURM's id; with cluster.dry_run the script.

    Raises:
        ConfigError: SLURM is missing, or refuses the job.
        UserError: the same command waits or runs already, or what it waits for has failed.
    """
    from evspan.launch.slurm.chain import read_upstream
    from evspan.launch.slurm.client import require_commands, sbatch
    from evspan.launch.slurm.code_archive import plan_code, submitted_code
    from evspan.launch.slurm.successor import SCRIPT
    from evspan.launch.sweep.queued import refuse_queued

    upstream = read_upstream([Path(name) for name in job.after], job.folder, any_end=job.any_end)
    if upstream.problem:
        raise UserError(f"after={','.join(job.after)}: {upstream.problem}")
    scripts = job.folder.absolute() / SCRIPTS / str(time.time_ns() // 1_000_000)
    code = plan_code(job.cluster, job.folder)
    text = _script(job, scripts, upstream.dependency, code)
    if job.cluster.dry_run:
        return text
    require_commands()
    with RunLock(job.folder, "evspan submit"):
        refuse_queued([job.folder])
        if code is not None:
            code.write()
        make_private_folder(scripts.parent)
        make_private_folder(scripts)
        (scripts / RULES).write_text(json.dumps([asdict(_rule(job))]))
        (scripts / COMMAND).write_text(json.dumps(list(job.argv)))
        (scripts / SCRIPT).write_text(text)
        number = sbatch([str(scripts / SCRIPT)])
        submission = {
            "job": number,
            "after": list(job.after),
            "overrides": hidden_overrides(job.argv),
            "time": round(time.time(), 3),
            "code": submitted_code(code),
        }
        replace_file(job.folder / SUBMITTED, json.dumps(submission, indent=1) + "\n")
        append(job.folder, "submitted", job=number)
    return number


def _rule(job: CommandJob) -> RequeueRule:
    """What the job reads when it starts."""
    return RequeueRule(
        run=str(job.folder.absolute()),
        log="",
        ranks=1,
        max_retries=1,
        requeue_after_fault=False,
        after=list(job.after),
        any_end=job.any_end,
    )


def _script(job: CommandJob, scripts: Path, dependency: str, code: "CodeArchive | None") -> str:
    from evspan.launch.slurm.job_python import job_python
    from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines
    from evspan.launch.slurm.submitit_adapter import Executor, script_of
    from evspan.launch.slurm.successor import path_lines, start_lines

    target = str(job.folder.absolute().parents[1])
    python = job_python(job.cluster, code, [target, *job.after, *job.mounts])
    chain = python.on_first_node("evspan.launch.slurm.chain", str(scripts / RULES))
    parameters = sbatch_parameters(job.cluster)
    parameters["cpus_per_task"] = job.cpus
    parameters["srun_args"] = [f"--cpus-per-task={job.cpus}", *python.srun_args]
    gpus_in_gres = isinstance(job.cluster, ClusterConfig) and job.cluster.gpus_in_gres()
    if job.gpus and not gpus_in_gres:
        parameters["gpus_per_node"] = job.gpus
    if dependency:
        parameters["additional_parameters"]["dependency"] = dependency
    executor = Executor(scripts, python=python.command)
    executor.update_parameters(
        job_name=f"evspan-{job.argv[0]}",
        nodes=1,
        ntasks_per_node=1,
        stderr_to_stdout=True,
        setup=[
            *path_lines(),
            *setup_lines(job.cluster),
            "trap : TERM USR1 USR2",
            *python.setup,
            "set +e",
            *start_lines(chain, scripts),
        ],
        teardown=["code=$?", *requeue_lines(), 'exit "$code"'],
        **parameters,
    )
    words = [str(job.folder.absolute()), str(scripts / COMMAND)]
    module = "evspan.launch.slurm.command_job"
    return script_of(executor, 1, f"{python.command} -u -m {module} {shlex.join(words)}")


def requeue_lines() -> list[str]:
    """Lines that requeue the job of a command that was stopped: SLURM may be away for a minute."""
    from evspan.launch.slurm.watchdog import REQUEUE_PAUSE_S, REQUEUE_TRIES

    return [
        f"if ((code == {STOPPED_EXIT_CODE})); then",
        f"    for ((tries = 0; tries < {REQUEUE_TRIES}; tries++)); do",
        '        scontrol requeue "$id" && break',
        f"        sleep {REQUEUE_PAUSE_S}",
        "    done",
        "fi",
    ]


# -- in the job ------------------------------------------------------------------------------------
class _Stop:
    """Passes the first stop signal on to the command."""

    def __init__(self) -> None:
        self.received = False
        self.child: subprocess.Popen[str] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        self.received = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)


def run_command_job(folder: Path, argv: Sequence[str]) -> int:
    """Runs the command, and records its end in the folder's history. Returns the exit code."""
    stop = _Stop()
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    redirect_output(folder / "logs" / "rank-00.log")
    append(
        folder,
        "start",
        attempt=attempts(read(folder)) + 1,
        host=socket.gethostname(),
        pid=os.getpid(),
        job=slurm_job(),
    )
    error = ""
    code = STOPPED_EXIT_CODE
    if not stop.received:
        stop.child = subprocess.Popen(
            [sys.executable, "-m", "evspan.launch", *argv],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent(os.getpid()),
        )
        append(folder, "running")
        error = last_error(stop.child)
        code = stop.child.wait()
    if code == 0:
        append(folder, "done")
        return 0
    if stop.received and _stops(folder) < MOST_STOPS:
        append(folder, "requeued", reason="stopped by SLURM")
        return STOPPED_EXIT_CODE
    message = error or f"evspan {argv[0]} ended with exit code {code}"
    append(folder, "failed", message=message, code=code)
    return 1


def _stops(folder: Path) -> int:
    """How often the command was stopped since it was submitted."""
    stops = 0
    for event in read(folder):
        if event["event"] == "submitted":
            stops = 0
        stops += event["event"] == "requeued"
    return stops


if __name__ == "__main__":
    arguments = json.loads(Path(sys.argv[2]).read_text())
    sys.exit(run_command_job(Path(sys.argv[1]), arguments))
