"""Submits arrays of runs: a batch script whose tasks are ranks, and which requeues itself.

Values go into the script through `shlex.quote`; what no quoting can make safe, such as a line
break in an #SBATCH line, is refused by `evspan.conf.schema.cluster`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evspan.conf.private_files import make_private_folder
from evspan.conf.schema.cluster import ClusterConfig
from evspan.launch.slurm.client import submit_array
from evspan.launch.slurm.code_archive import CodeArchive
from evspan.launch.slurm.job_python import JobPython, job_python
from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines
from evspan.launch.slurm.rank_task import RankTask
from evspan.launch.slurm.requeue import DO_NOT_REQUEUE, RequeueRule
from evspan.launch.slurm.submitit_adapter import Executor, script_of
from evspan.launch.slurm.successor import SCRIPT, keep_tasks, path_lines, start_lines
from evspan.launch.slurm.successor import end_lines as end_lines_with_successor
from evspan.launch.slurm.task_secret import create_secret
from evspan.launch.slurm.watchdog import end_lines, watchdog_lines
from evspan.launch.sweep.plan import PlannedRun

REQUEUE_MODULE = "evspan.launch.slurm.requeue"
CHAIN_MODULE = "evspan.launch.slurm.chain"
RULES = "runs.json"  # next to Submitit's pickles: a RequeueRule for each run of the array
REMEDY = (
    "Correct cluster.partition, account, qos, constraint, timeout_min, cpus_per_task, mem_gb or "
    "gpus_per_node; cluster.dry_run=true shows the script, sinfo the partitions, evspan doctor "
    "the cluster"
)


@dataclass(frozen=True)
class JobArray:
    """Runs that need the same number of nodes and ranks: an element of the array for each run.

    folder: gets the scripts, pickles and output of the jobs. name: of the job, in squeue. code:
    what the jobs import; None: what is installed. dependency: of sbatch; empty for none. smoke_of:
    folder of the run that waits for this smoke run.
    """

    runs: Sequence[PlannedRun]
    cluster: ClusterConfig
    nodes: int
    ranks_per_node: int
    folder: Path
    name: str
    code: CodeArchive | None = None
    dependency: str = ""
    smoke_of: str = ""

    @property
    def follows(self) -> bool:
        """Whether a job has to look, before its ranks start, at what it continues or waits for."""
        return self.cluster.successor or bool(self.cluster.after)

    @property
    def ranks(self) -> int:
        """Ranks of one run."""
        return self.nodes * self.ranks_per_node

    def python(self) -> JobPython:
        """Python of the array's jobs, and of jobs that belong to them."""
        upstream = [str(Path(name).absolute()) for name in self.cluster.after]
        folders = [str(self.folder.parent), *_folders_of(self.runs), *upstream]
        if self.smoke_of:
            folders.append(self.smoke_of)  # gets an event in its history if the smoke run fails
        return job_python(self.cluster, self.code, folders)


def submit_job_array(array: JobArray) -> list[str]:
    """Submit the runs.

    Returns:
        SLURM's id of each run: JOB, or JOB_INDEX in an array of several.

    Raises:
        ConfigError: SLURM refuses them.
        ForeignFileError: the folder of the scripts belongs to another user.
    """
    if array.code is not None:
        array.code.write()
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
            successor=array.cluster.successor,
            after=array.cluster.after,
            smoke_of=array.smoke_of,
            fail_fast=array.cluster.fail_fast and len(array.runs) > 1,
        )
        for run in array.runs
    ]
    (array.folder / RULES).write_text(json.dumps([asdict(rule) for rule in rules]))
    (array.folder / SCRIPT).write_text(script(array))
    tasks = [RankTask(rule.run) for rule in rules]
    jobs = submit_array(_executor(array), tasks, REMEDY)
    keep_tasks(array.folder, [job.paths.submitted_pickle for job in jobs])
    return [job.job_id for job in jobs]


def script(array: JobArray) -> str:
    """The script that sbatch would get. Works without SLURM."""
    return script_of(_executor(array), len(array.runs))


def job_name(run: Path) -> str:
    """A name for squeue, which handles no spaces or quotes."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.name)[:40]
    return f"evspan-{name or 'run'}"


def _executor(array: JobArray) -> Executor:
    python = array.python()
    executor = Executor(array.folder, python=python.command)
    parameters = sbatch_parameters(array.cluster)
    if array.cluster.gpus_per_node and not array.cluster.gpus_in_gres():
        parameters["gpus_per_node"] = array.ranks_per_node
    options = parameters["additional_parameters"]
    if array.cluster.successor:
        options.pop("requeue", None)
        options["no-requeue"] = True
    if array.dependency:
        others = [options["dependency"]] if "dependency" in options else []
        options["dependency"] = ",".join([*others, array.dependency])
        options["kill-on-invalid-dep"] = "yes"
    # When a rank dies, the others have a minute to name it before srun ends them.
    parameters["srun_args"] += ["--wait=60", *python.srun_args]
    executor.update_parameters(
        job_name=array.name,
        nodes=array.nodes,
        ntasks_per_node=array.ranks_per_node,
        stderr_to_stdout=True,
        setup=_all_setup_lines(array, python),
        teardown=(
            end_lines_with_successor() if array.cluster.successor else end_lines(DO_NOT_REQUEUE)
        ),
        **parameters,
    )
    return executor


def _all_setup_lines(array: JobArray, python: JobPython) -> list[str]:
    cluster = array.cluster
    lines = [*path_lines(), *setup_lines(cluster)] if array.follows else setup_lines(cluster)
    # Without a trap, bash would end at a signal on which the ranks save.
    lines.append("trap : TERM USR1 USR2")
    lines += python.setup
    lines.append(f"export OMP_NUM_THREADS={cluster.cpus_per_task}")
    # A `set -e` in the setup would end the script where the ranks fail, before it can be requeued.
    lines.append("set +e")
    rules = str(array.folder / RULES)
    requeue = python.on_first_node(REQUEUE_MODULE, rules)
    watchdog = watchdog_lines(requeue, DO_NOT_REQUEUE, cluster.signal_delay_s)
    if cluster.successor:
        lines.append("successor=1")
    if not array.follows:
        return lines + watchdog
    return lines + start_lines(python.on_first_node(CHAIN_MODULE, rules), array.folder) + watchdog


def _folders_of(runs: Sequence[PlannedRun]) -> list[str]:
    """Folders that a container must mount: where the runs write, and what they read."""
    folders = set()
    for run in runs:
        paths = [str(run.folder), run.config.checkpoint.init_from]
        paths += [source.root for source in run.config.dataset.sources]
        folders |= {str(Path(path).absolute()) for path in paths if path}
    return sorted(folders)
