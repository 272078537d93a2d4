"""Submits arrays of runs: a batch script whose tasks are ranks, and which requeues itself.

Values go into the script through `shlex.quote`; what no quoting can make safe, such as a line
break in an #SBATCH line, is refused by `evspan.conf.schema.cluster`.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.private_files import make_private_folder
from evspan.conf.schema.cluster import ClusterConfig, Container
from evspan.launch.slurm.client import python_path_lines, submit_array
from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines
from evspan.launch.slurm.rank_task import RankTask
from evspan.launch.slurm.requeue import DO_NOT_REQUEUE, RequeueRule
from evspan.launch.slurm.submitit_adapter import Executor, script_of
from evspan.launch.slurm.task_secret import create_secret
from evspan.launch.slurm.watchdog import end_lines, watchdog_lines
from evspan.launch.sweep.plan import PlannedRun

RULES = "runs.json"  # next to Submitit's pickles: a RequeueRule for each run of the array
REMEDY = (
    "Correct cluster.partition, account, qos, constraint, timeout_min, cpus_per_task, mem_gb or "
    "gpus_per_node; cluster.dry_run=true shows the script, sinfo the partitions, evspan doctor "
    "the cluster"
)


@dataclass(frozen=True)
class JobArray:
    """Runs that need the same number of nodes and ranks: an element of the array for each run.

    folder: gets the scripts, pickles and output of the jobs. name: of the job, in squeue.
    """

    runs: Sequence[PlannedRun]
    cluster: ClusterConfig
    nodes: int
    ranks_per_node: int
    folder: Path
    name: str

    @property
    def ranks(self) -> int:
        """Ranks of one run."""
        return self.nodes * self.ranks_per_node


class _Container(NamedTuple):
    """How a batch script reaches Python inside a container, or on the node itself.

    python: a shell command. srun_args: further options of srun.
    """

    python: str
    srun_args: list[str]


def submit_job_array(array: JobArray) -> list[str]:
    """Submit the runs.

    Returns:
        SLURM's id of each run: JOB, or JOB_INDEX in an array of several.

    Raises:
        ConfigError: SLURM refuses them.
        ForeignFileError: the folder of the scripts belongs to another user.
    """
    make_private_folder(array.folder.parent)
    make_private_folder(array.folder)
    create_secret(array.folder)
    rules = [
        RequeueRule(
            run=str(run.folder.absolute()),
            log=str(array.folder / "%j_%t_log.out"),
            ranks=array.ranks,
            max_retries=array.cluster.max_retries,
            requeue_after_fault=array.cluster.requeue_after_fault,
            signal_delay_s=array.cluster.signal_delay_s,
        )
        for run in array.runs
    ]
    (array.folder / RULES).write_text(json.dumps([asdict(rule) for rule in rules]))
    tasks = [RankTask(rule.run) for rule in rules]
    return [job.job_id for job in submit_array(_executor(array), tasks, REMEDY)]


def script(array: JobArray) -> str:
    """The script that sbatch would get. Works without SLURM."""
    return script_of(_executor(array), len(array.runs))


def job_name(run: Path) -> str:
    """A name for squeue, which handles no spaces or quotes."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.name)[:40]
    return f"evspan-{name or 'run'}"


def _executor(array: JobArray) -> Executor:
    container = _container(array)
    executor = Executor(array.folder, python=container.python)
    parameters = sbatch_parameters(array.cluster)
    if array.cluster.gpus_per_node:
        parameters["gpus_per_node"] = array.ranks_per_node
    # When a rank dies, the others have a minute to name it before srun ends them.
    parameters["srun_args"] += ["--wait=60", *container.srun_args]
    executor.update_parameters(
        job_name=array.name,
        nodes=array.nodes,
        ntasks_per_node=array.ranks_per_node,
        stderr_to_stdout=True,
        setup=_all_setup_lines(array, container),
        teardown=end_lines(),
        **parameters,
    )
    return executor


def _all_setup_lines(array: JobArray, container: _Container) -> list[str]:
    cluster = array.cluster
    lines = setup_lines(cluster)
    if cluster.container is Container.none:
        lines += python_path_lines()
    # Without a trap, bash would end at a signal on which the ranks save.
    lines.append("trap : TERM USR1 USR2")
    # `python -m` must not find modules of the same name in the working folder.
    lines.append("export PYTHONSAFEPATH=1")
    lines.append(f"export OMP_NUM_THREADS={cluster.cpus_per_task}")
    # A `set -e` in the setup would end the script where the ranks fail, before it can be requeued.
    lines.append("set +e")
    requeue = _requeue_command(array.folder, container)
    return lines + watchdog_lines(requeue, DO_NOT_REQUEUE, cluster.signal_delay_s)


def _requeue_command(folder: Path, container: _Container) -> str:
    """The shell command of `evspan.launch.slurm.requeue`, up to the file of the rules."""
    requeue = (
        f"{container.python} -m evspan.launch.slurm.requeue {shlex.quote(str(folder / RULES))}"
    )
    if not container.srun_args:
        return requeue
    # Before the time limit, the ranks still have all of the job's cores.
    srun = shlex.join(["srun", "--overlap", "--ntasks=1", "--nodes=1", *container.srun_args])
    return f"{srun} {requeue}"


def _container(array: JobArray) -> _Container:
    cluster = array.cluster
    if cluster.container is Container.none:
        return _Container(shlex.quote(cluster.python or sys.executable), [])
    python = shlex.quote(cluster.python or "python")
    working_folder = os.getcwd()
    mounts = list(dict.fromkeys([working_folder, *_folders_of(array.runs), *cluster.mounts]))
    if cluster.container is Container.pyxis:
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        srun_args = [
            f"--container-image={cluster.image}",
            f"--container-mounts={pairs}",
            f"--container-workdir={working_folder}",
        ]
        return _Container(python, srun_args)
    command = ["apptainer", "exec"]
    if cluster.gpus_per_node:
        command.append("--nv")
    for mount in mounts:
        command += ["--bind", mount]
    command += ["--pwd", working_folder, cluster.image]
    return _Container(f"{shlex.join(command)} {python}", [])


def _folders_of(runs: Sequence[PlannedRun]) -> list[str]:
    """Folders that a container must mount: where the runs write, and what they read."""
    folders = set()
    for run in runs:
        paths = [str(run.folder), run.config.checkpoint.init_from]
        paths += [source.root for source in run.config.dataset.sources]
        folders |= {str(Path(path).absolute()) for path in paths if path}
    return sorted(folders)
