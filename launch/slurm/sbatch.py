"""A batch script whose tasks are the ranks of a run, and which asks SLURM to run it again where that helps."""

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evspan.conf.schema.cluster import ClusterConfig, Container
from evspan.launch.slurm.client import Executor, python_path_lines, script_of, submit_array
from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines
from evspan.launch.slurm.rank_task import Attempt
from submitit import SlurmExecutor

RUNS = "runs.json"  # beside Submitit's pickles: what `evspan.launch.slurm.requeue` must know of each run of the array
# SLURM's id of this job, as it asks for an element of an array.
ID = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"


class Task(NamedTuple):
    """A run that is to be submitted. folders: what a container must see of this machine."""

    run: Path
    argv: list[str]
    folders: list[Path]


def submit(
    tasks: Sequence[Task], cluster: ClusterConfig, *, nodes: int, each: int, folder: Path, name: str
) -> list[str]:
    """SLURM's ids of the runs (JOB, or JOB_INDEX of an array), each of nodes x each ranks; scripts and pickles in `folder`.

    Raises:
        ConfigError: SLURM refuses them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = str(folder / "%j_%t_log.out")
    (folder / RUNS).write_text(
        json.dumps(
            [
                {
                    "run": str(task.run),
                    "log": log,
                    "ranks": nodes * each,
                    "max_retries": cluster.max_retries,
                    "requeue_after_fault": cluster.requeue_after_fault,
                }
                for task in tasks
            ]
        )
    )
    jobs = submit_array(
        _executor(tasks, cluster, nodes, each, folder, name),
        [Attempt(str(t.run), t.argv) for t in tasks],
        "Correct cluster.partition, account, qos, constraint, timeout_min, cpus_per_task, mem_gb or gpus_per_node; "
        "cluster.dry_run=true shows the script, sinfo the partitions, evspan doctor the cluster",
    )
    return [job.job_id for job in jobs]


def script(
    tasks: Sequence[Task], cluster: ClusterConfig, *, nodes: int, each: int, folder: Path, name: str
) -> str:
    """What sbatch would be given. SLURM need not be there."""
    return script_of(_executor(tasks, cluster, nodes, each, folder, name), len(tasks))


def _executor(
    tasks: Sequence[Task], cluster: ClusterConfig, nodes: int, each: int, folder: Path, name: str
) -> SlurmExecutor:
    inside, of_srun = _contained(
        cluster, sorted({folder for task in tasks for folder in task.folders})
    )
    python = inside or shlex.quote(cluster.python or sys.executable)
    executor = Executor(folder, python=python)
    parameters = sbatch_parameters(cluster)
    if cluster.gpus_per_node:
        parameters["gpus_per_node"] = each
    # Ranks name a dead one before a minute has passed.
    parameters["srun_args"] += ["--wait=60", *of_srun]
    executor.update_parameters(
        job_name=name,
        nodes=nodes,
        ntasks_per_node=each,
        stderr_to_stdout=True,
        setup=_before(cluster),
        teardown=_after(folder, python, of_srun),
        **parameters,
    )
    return executor


def _before(cluster: ClusterConfig) -> list[str]:
    paths = [] if cluster.container is not Container.none else python_path_lines()
    # The script must outlive the ranks, which save on these signals; bash would end at once.
    # The working folder may hold another Evspan, or modules of the same names, which python -m would take first.
    return [
        *setup_lines(cluster),
        *paths,
        "trap : TERM USR1 USR2",
        "export PYTHONSAFEPATH=1",
        f"export OMP_NUM_THREADS={cluster.cpus_per_task}",
    ]


def _after(folder: Path, python: str, of_srun: list[str]) -> list[str]:
    again = f"{python} -m evspan.launch.slurm.requeue {shlex.quote(str(folder / RUNS))}"
    if of_srun:
        again = f"srun --ntasks=1 --nodes=1 {' '.join(map(shlex.quote, of_srun))} {again}"
    return [
        "code=$?",
        f"id={ID}",
        "id=${id:-$SLURM_JOB_ID}",
        "state=$(scontrol show job --oneliner \"$id\" 2>/dev/null | grep -o 'JobState=[A-Z_]*' | head -n 1)",
        f'{again} "${{SLURM_ARRAY_TASK_ID:-0}}" "$code" "${{state#JobState=}}" && scontrol requeue "$id"',
        'exit "$code"',
    ]


def _contained(cluster: ClusterConfig, folders: Sequence[Path]) -> tuple[str, list[str]]:
    """(Python's command in a container, what srun is told of it)."""
    if cluster.container is Container.none:
        return "", []
    python, here = shlex.quote(cluster.python or "python"), os.getcwd()
    seen = list(dict.fromkeys([here, *map(str, folders), *cluster.mounts]))
    if cluster.container is Container.pyxis:
        mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in seen)
        return python, [
            f"--container-image={cluster.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={here}",
        ]
    nv = ["--nv"] if cluster.gpus_per_node else []
    command = [
        "apptainer",
        "exec",
        *nv,
        *(part for mount in seen for part in ("--bind", mount)),
        "--pwd",
        here,
        cluster.image,
    ]
    return f"{shlex.join(command)} {python}", []


def job_name(run: Path) -> str:
    """What squeue shows: SLURM's names take no spaces or quotes without trouble."""
    return f"evspan-{re.sub(r'[^A-Za-z0-9_.-]+', '-', run.name)[:40] or 'run'}"
