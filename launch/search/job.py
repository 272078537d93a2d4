"""The controller of a search as a SLURM job of one task, which requeues itself."""

import logging
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evspan.conf.errors import (
    IO_EXIT_CODE,
    STOPPED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    exit_code_of,
    is_user_error,
    one_line,
)
from evspan.conf.private_files import make_private_folder
from evspan.conf.schema.cluster import ClusterConfig, Container
from evspan.conf.schema.training import TrainConfig
from evspan.launch.logging_config import configure_logging
from evspan.launch.search.files import SearchInfo
from evspan.launch.search.run import run_as_job
from evspan.launch.slurm.client import queue, submit_array
from evspan.launch.slurm.code_archive import plan_code
from evspan.launch.slurm.job_python import job_python
from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines
from evspan.launch.slurm.rank_task import redirect_output
from evspan.launch.slurm.sbatch import REMEDY, job_name
from evspan.launch.slurm.submitit_adapter import Executor, script_of

logger = logging.getLogger(__name__)
FOLDER = ".submitit/controller"  # in the sweep's folder: script and pickle
LOG = "logs/search.log"  # in the sweep's folder
# Options of the trials that the controller does not need, besides those that begin with "gpu".
TRIAL_OPTIONS = (
    "gres",
    "gres-flags",
    "exclusive",
    "mem",
    "mem-per-gpu",
    "cpus-per-gpu",
    "ntasks-per-gpu",
    "tres-bind",
    "tres-per-task",
)
PARTITION_OPTIONS = ("partition", "constraint", "exclude")  # of nodes of the trials' partition
MOST_FAULTS = 20  # restarts after which an error of the code ends the job
# A controller that was stopped or killed, or whose node failed, comes back; one that was cancelled
# does not: SLURM would requeue it all the same.
REQUEUE_LINES = [
    "code=$?",
    "id=$SLURM_JOB_ID",
    'job=" $(scontrol show job --oneliner "$id" 2>/dev/null)"',
    "state=RUNNING",
    "if [[ $job =~ ' JobState='([A-Z_]+) ]]; then state=${BASH_REMATCH[1]}; fi",
    f"if ((code == {STOPPED_EXIT_CODE} || code > 128)) || "
    f"((code != 0 && code != {USER_ERROR_EXIT_CODE} "
    f"&& ${{SLURM_RESTART_COUNT:-0}} < {MOST_FAULTS})); then",
    "    if [[ $state == RUNNING || $state == PREEMPTED ]]; then",
    "        for ((tries = 0; tries < 20; tries++)); do",
    '            scontrol requeue "$id" && break',
    "            sleep 3",
    "        done",
    "    fi",
    "fi",
    'exit "$code"',
]


@dataclass(frozen=True)
class SearchTask:
    """What the job does.

    sweep: the folder. argv: of `evspan sweep`, with its run_dir.
    """

    sweep: str
    argv: tuple[str, ...]

    def __call__(self) -> None:
        """Runs the controller. Ends the process with its exit code unless the search is over."""
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Submitit's handlers
        redirect_output(Path(self.sweep, LOG))
        configure_logging(0, log_file=True)
        try:
            code = run_as_job(self.argv)
        except Exception as error:
            if not is_user_error(error):
                logger.exception("the controller failed")
                os._exit(1)
            logger.error("%s", one_line(error))
            code = exit_code_of(error)
        logging.shutdown()
        if code in (STOPPED_EXIT_CODE, USER_ERROR_EXIT_CODE, IO_EXIT_CODE):
            os._exit(code)


def submit_controller(sweep: Path, config: TrainConfig, info: SearchInfo, argv: list[str]) -> str:
    """Submits the job. Returns SLURM's id.

    Raises:
        ConfigError: SLURM refuses it.
        ForeignFileError: the folder of the scripts belongs to another user.
    """
    folder = sweep.absolute() / FOLDER
    make_private_folder(folder.parent)
    make_private_folder(folder)
    task = SearchTask(str(sweep.absolute()), tuple(argv))
    code = plan_code(config.cluster, sweep)
    if code is not None:
        code.write()
    executor = _executor(sweep, config, info)
    (job,) = submit_array(executor, [task], REMEDY)
    return str(job.job_id)


def controller_script(sweep: Path, config: TrainConfig, info: SearchInfo) -> str:
    """The script that sbatch would get. Works without SLURM."""
    return script_of(_executor(sweep, config, info), 1)


def controller_job(sweep: Path, info: SearchInfo) -> str:
    """The controller's job that waits or runs; empty if there is none.

    Raises:
        UserError: SLURM does not answer.
    """
    alive = [task.id for task in queue(_name(sweep, info)) if task.alive]
    return alive[-1] if alive else ""


def _name(sweep: Path, info: SearchInfo) -> str:
    return f"{job_name(sweep)}-{info.id}-search"


def _executor(sweep: Path, config: TrainConfig, info: SearchInfo) -> Executor:
    cluster = config.cluster
    if cluster.container is not Container.none:
        # It needs SLURM's commands, which a container has not.
        cluster = replace(cluster, container=Container.none, image="", python="")
    python = job_python(cluster, plan_code(cluster, sweep))
    executor = Executor(sweep.absolute() / FOLDER, python=python.command)
    parameters = _controller_parameters(cluster, config.search.partition)
    executor.update_parameters(
        job_name=_name(sweep, info),
        nodes=1,
        ntasks_per_node=1,
        stderr_to_stdout=True,
        setup=[
            *setup_lines(cluster),
            *python.setup,
            "trap : TERM USR1 USR2",
            "set +e",
        ],
        teardown=REQUEUE_LINES,
        **parameters,
    )
    return executor


def _controller_parameters(cluster: ClusterConfig, partition: str) -> dict[str, Any]:
    """Parameters of the trials, without their GPUs, nodes and memory.

    Args:
        partition: of the controller; empty for that of the trials.
    """
    parameters = sbatch_parameters(cluster)
    parameters["cpus_per_task"] = 1
    parameters["srun_args"] = ["--cpus-per-task=1"]
    parameters.pop("mem", None)
    options = parameters["additional_parameters"]
    for name in list(options):
        if name in TRIAL_OPTIONS or name.startswith("gpu"):
            del options[name]
    if partition:
        for name in PARTITION_OPTIONS:
            parameters.pop(name, None)
            options.pop(name, None)
        parameters["partition"] = partition
    return parameters
