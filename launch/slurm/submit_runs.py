"""Runs as SLURM jobs: which of them to submit, in arrays of one shape, and what comes of them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evspan.conf.errors import UserError
from evspan.conf.schema.cluster import ClusterConfig
from evspan.launch.slurm import sbatch as batch
from evspan.launch.slurm.client import require_commands
from evspan.launch.sweep.registry import SUBMITTED, Run, State, describe, jobs_alive, read_runs
from evspan.pipeline.history import append

if TYPE_CHECKING:
    from evspan.launch.sweep.submit import Planned

POLL_S = 5.0
SUBMITIT = ".submitit"  # Submitit's scripts and pickles, and what batch scripts say
GRACE = 3  # looks after which a job that SLURM no longer has, and whose run has not told its end, is given up


def submit_runs(plans: Sequence["Planned"], cluster: ClusterConfig, folder: Path, name: str) -> int:
    """One array for all runs of as many nodes and ranks; 0 when all are done, or when they are not waited for.

    Raises:
        ConfigError: SLURM is not there or refuses them. UserError: a run is in its queue already.
    """
    shapes: dict[tuple[int, int], list[Planned]] = {}
    for plan in plans:
        assert plan.config is not None
        shapes.setdefault(cluster.nodes(plan.config.parallel.ranks), []).append(plan)
    if cluster.dry_run:
        for (nodes, each), alike in shapes.items():
            print(
                batch.script(
                    _tasks(alike, cluster),
                    cluster,
                    nodes=nodes,
                    each=each,
                    folder=folder.absolute() / SUBMITIT,
                    name=batch.job_name(folder),
                )
            )
            for plan in alike:
                print(f"# {plan.run}: {' '.join(plan.overrides)}")
        return 0
    require_commands()
    _refuse_queued(plans)
    for number, ((nodes, each), alike) in enumerate(shapes.items()):
        beside = folder.absolute() / SUBMITIT / f"{int(time.time())}-{number}"
        _submit(alike, cluster, nodes, each, beside, batch.job_name(folder))
    if cluster.detach:
        print(f"watch: evspan status {folder}")
        return 0
    return _wait([plan.run for plan in plans], folder)


def _tasks(plans: Sequence["Planned"], cluster: ClusterConfig) -> list[batch.Task]:
    return [
        batch.Task(plan.run.absolute(), [*plan.argv, *_threads(plan, cluster)], _seen(plan))
        for plan in plans
    ]


def _threads(plan: "Planned", cluster: ClusterConfig) -> list[str]:
    """A rank would count the node's cores, of which it has its share."""
    assert plan.config is not None
    return [] if plan.config.parallel.threads else [f"parallel.threads={cluster.cpus_per_task}"]


def _seen(plan: "Planned") -> list[Path]:
    """Folders that a container must be given: where the run writes, and what it reads."""
    assert plan.config is not None
    root, start = plan.config.dataset.root, plan.config.checkpoint.init_from
    return [plan.run.absolute(), *(Path(path).absolute() for path in (root, start) if path)]


def _submit(
    plans: Sequence["Planned"],
    cluster: ClusterConfig,
    nodes: int,
    each: int,
    folder: Path,
    name: str,
) -> None:
    for plan in plans:
        plan.run.mkdir(parents=True, exist_ok=True)  # a container can be given only what is there
    tasks = _tasks(plans, cluster)
    jobs = batch.submit(tasks, cluster, nodes=nodes, each=each, folder=folder, name=name)
    for plan, job in zip(plans, jobs, strict=True):
        about = {
            "job": job,
            "overrides": plan.overrides,
            "nodes": nodes,
            "ranks": nodes * each,
            "time": round(time.time(), 3),
        }
        (plan.run / SUBMITTED).write_text(json.dumps(about, indent=1) + "\n")
        append(plan.run, "submitted", job=job)
    where = f"{nodes} node{'s' if nodes > 1 else ''} x {each} rank{'s' if each > 1 else ''}"
    print(
        f"SLURM job {jobs[0].split('_')[0]}: {len(plans)} run{'s' if len(plans) > 1 else ''} of {where}",
        flush=True,
    )


def _refuse_queued(plans: Sequence["Planned"]) -> None:
    """Two jobs would write one folder."""
    jobs = {}
    for plan in plans:
        try:
            jobs[plan.run] = json.loads((plan.run / SUBMITTED).read_text())["job"]
        except (FileNotFoundError, ValueError, KeyError):
            continue
    alive = jobs_alive(jobs.values()) if jobs else set()
    if queued := [f"{run} (job {job})" for run, job in jobs.items() if job in alive]:
        raise UserError(
            f"SLURM already has {', '.join(queued)}. Watch it by evspan status, or end it first by evspan cancel "
            f"{next(run for run, job in jobs.items() if job in alive)}"
        )


def _wait(folders: Sequence[Path], folder: Path) -> int:
    """Tells what changes, until no run can go on; Ctrl-C leaves the jobs alone."""
    said: dict[Path, str] = {}
    gone: dict[Path, int] = {}
    try:
        while True:
            runs = [run for run in read_runs(folder).runs if run.folder in folders]
            for run in runs:
                if said.get(run.folder) != (line := f"{run.state.value} {run.reason}"):
                    print(f"{run.folder}: {describe(run)}", flush=True)
                    said[run.folder] = line
                gone[run.folder] = (
                    gone.get(run.folder, 0) + 1
                    if run.state in (State.lost, State.saved) and not run.alive
                    else 0
                )
            if not any(_goes_on(run, gone[run.folder]) for run in runs):
                return int(any(run.state is not State.done for run in runs))
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"the jobs go on; watch: evspan status {folder}; end them: evspan cancel {folder}")
        return 0


def _goes_on(run: Run, gone: int) -> bool:
    return run.alive or run.state.unfinished or 0 < gone < GRACE
