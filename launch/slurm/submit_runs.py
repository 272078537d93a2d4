"""Submits planned runs to SLURM, in job arrays of one shape, and waits for them."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from evspan.conf.compose import CONFIG_FILE, save_config
from evspan.conf.errors import UserError
from evspan.conf.folder_lock import FolderInUseError
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.text import plural
from evspan.data_prep.shards.atomic import atomic_write
from evspan.launch.slurm.chain import read_upstream
from evspan.launch.slurm.client import (
    LEAST_MAX_ARRAY_SIZE,
    cancel_tasks,
    max_array_size,
    require_commands,
)
from evspan.launch.slurm.code_archive import plan_code, submitted_code
from evspan.launch.slurm.sbatch import JobArray, job_name, script, submit_job_array
from evspan.launch.slurm.smoke_run import FOLDER as SMOKE
from evspan.launch.slurm.smoke_run import smoke_cluster, smoke_run
from evspan.launch.slurm.successor import submit_successors
from evspan.launch.sweep.fail_fast import error_of_sweep
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.queued import queued_folders, queued_message, refuse_queued
from evspan.launch.sweep.registry import SUBMITTED, Run, describe, read_runs
from evspan.launch.sweep.state import State
from evspan.pipeline.history import append
from evspan.pipeline.run_lock import RunLock

logger = logging.getLogger(__name__)
POLL_S = 5.0
SUBMITIT = ".submitit"  # below the run or sweep: scripts, pickles, and output of batch scripts
# A run is lost after this many polls without a job in SLURM's queue or an end in its history.
MAX_POLLS_WITHOUT_JOB = 3


def submit_runs(
    runs: Sequence[PlannedRun],
    cluster: ClusterConfig,
    folder: Path,
    on_submitted: Callable[[], None] | None = None,
    *,
    smoke: bool = False,
) -> int:
    """Submit the runs: one array for each number of nodes and ranks.

    Args:
        folder: of the sweep, or of the single run.
        on_submitted: is called when the jobs are in SLURM's queue, before waiting for their end.
        smoke: whether the job of the only run depends on that of a smoke run.

    Returns:
        The exit code: 0 when all runs are done, or are not waited for.

    Raises:
        ConfigError: SLURM is missing, or refuses them.
        UserError: a run is in SLURM's queue already, or what it waits for has failed.
        FolderInUseError: another process trains in the folder of a run, or submits it.
    """
    upstream = _upstream(cluster, folder)
    if cluster.dry_run:
        if smoke:
            _log_scripts(_smoke_array(runs[0], cluster, upstream))
            cluster, upstream = _after_smoke(runs[0], cluster, upstream, "SMOKE")
        for array in plan_arrays(runs, cluster, folder, upstream):
            _log_scripts(array)
        return 0
    require_commands()
    with ExitStack() as locks:
        free = _lock_free(runs, locks)
        if smoke:
            job = _submit_smoke_run(runs[0], cluster, upstream)
            cluster, upstream = _after_smoke(runs[0], cluster, upstream, job)
        for array in plan_arrays(free, cluster, folder, upstream):
            _save_configs(array)
            jobs = submit_job_array(array)
            _record_submission(array, jobs, _submit_successors(array, jobs))
    if on_submitted is not None:
        on_submitted()
    if cluster.detach:
        logger.info("watch: evspan status %s", folder)
        return 0
    return _wait([run.folder for run in runs], folder, fail_fast=cluster.fail_fast)


def submit_trial(run: PlannedRun, cluster: ClusterConfig, folder: Path, name: str) -> None:
    """Submit one run of a search, and return.

    Args:
        folder: of the sweep. name: of the job, by which the queue is searched for it.

    Raises:
        ConfigError: SLURM is missing, or refuses it.
        UserError: the run is in SLURM's queue already, or what it waits for has failed.
        FolderInUseError: another process trains in the folder of the run, or submits it.
    """
    require_commands()
    upstream = _upstream(cluster, folder)
    with _locked([run]):
        refuse_queued([run.folder])
        for planned in plan_arrays([run], cluster, folder, upstream):
            array = replace(planned, name=name)
            _save_configs(array)
            jobs = submit_job_array(array)
            _record_submission(array, jobs, _submit_successors(array, jobs))


def record_trial(run: PlannedRun, cluster: ClusterConfig, folder: Path, job: str) -> None:
    """Record the job of a run that `submit_trial` has submitted, where it was killed before it did.

    Args:
        folder: of the sweep. job: SLURM's id.
    """
    for array in plan_arrays([run], cluster, folder):
        _record_submission(array, [job], [""])


def _upstream(cluster: ClusterConfig, folder: Path) -> str:
    """The dependency on the jobs of cluster.after; empty for none.

    Raises:
        UserError: one of them has failed, or there is nothing.
    """
    upstream = read_upstream([Path(name) for name in cluster.after], folder)
    if upstream.problem:
        raise UserError(f"after={','.join(cluster.after)}: {upstream.problem}")
    return upstream.dependency


def _log_scripts(array: JobArray) -> None:
    logger.info("%s", script(array))
    for run in array.runs:
        logger.info("# %s: %s", run.folder, " ".join(run.overrides))


# -- the smoke run ---------------------------------------------------------------------------------
def _smoke_array(run: PlannedRun, cluster: ClusterConfig, dependency: str) -> JobArray:
    smoke = smoke_run(run)
    (array,) = plan_arrays([smoke], smoke_cluster(cluster), smoke.folder, dependency)
    return replace(array, smoke_of=str(run.folder.absolute()))


def _submit_smoke_run(run: PlannedRun, cluster: ClusterConfig, dependency: str) -> str:
    """Submits the smoke run of `run`. Returns the id of its job."""
    array = _smoke_array(run, cluster, dependency)
    with _locked(array.runs):
        refuse_queued([smoke.folder for smoke in array.runs])
        _save_configs(array)
        jobs = submit_job_array(array)
        _record_submission(array, jobs, [""])
    return jobs[0]


def _after_smoke(
    run: PlannedRun, cluster: ClusterConfig, dependency: str, job: str
) -> tuple[ClusterConfig, str]:
    """The cluster and the dependency of a run that waits for its smoke run in `job`, too."""
    after = [*cluster.after, str(run.folder.absolute() / SMOKE)]
    dependencies = [dependency, f"afterok:{job}"]
    return replace(cluster, after=after), ",".join(filter(None, dependencies))


# -- arrays ----------------------------------------------------------------------------------------
def plan_arrays(
    runs: Sequence[PlannedRun], cluster: ClusterConfig, folder: Path, dependency: str = ""
) -> list[JobArray]:
    """One array for each number of nodes and ranks that the runs need.

    More runs than SLURM allows in an array (MaxArraySize) get several.

    Args:
        dependency: of sbatch; empty for none.
    """
    shapes: dict[tuple[int, int], list[PlannedRun]] = {}
    for run in runs:
        shapes.setdefault(cluster.nodes(run.config.parallel.ranks), []).append(run)
    arrays: list[JobArray] = []
    code = plan_code(cluster, folder)
    most = max_array_size() if len(runs) > LEAST_MAX_ARRAY_SIZE else len(runs)
    for (nodes, ranks_per_node), same_shape in shapes.items():
        for first in range(0, len(same_shape), most):
            part = same_shape[first : first + most]
            name = f"{time.time_ns() // 1_000_000}-{len(arrays)}"
            scripts = folder.absolute() / SUBMITIT / name
            array = JobArray(part, cluster, nodes, ranks_per_node, scripts, job_name(folder), code)
            arrays.append(replace(array, dependency=dependency))
    return arrays


def _save_configs(array: JobArray) -> None:
    """Write the resolved configs, which ranks read. It creates the folders, for containers."""
    for run in array.runs:
        config = deepcopy(run.config)
        if not config.parallel.threads:
            # By default, the ranks of a machine would divide all its cores among them.
            config.parallel.threads = array.cluster.cpus_per_task
        save_config(config, run.folder / CONFIG_FILE)


def _submit_successors(array: JobArray, jobs: Sequence[str]) -> list[str]:
    """The successor of each job; empty ids without any.

    A job that waits for others submits its successor when it starts: until then it may be replaced.
    """
    if not array.cluster.successor or array.cluster.after:
        return [""] * len(jobs)
    try:
        return submit_successors(array.folder, jobs)
    except UserError:
        cancel_tasks(jobs)
        raise


def _record_submission(array: JobArray, jobs: Sequence[str], successors: Sequence[str]) -> None:
    """Write the job of each run into its folder.

    jobs, successors: SLURM's ids of each run.
    """
    for run, job, successor in zip(array.runs, jobs, successors, strict=True):
        submission = {
            "job": job,
            "successor": successor,
            "after": array.cluster.after,
            "overrides": run.overrides,
            "nodes": array.nodes,
            "ranks": array.ranks,
            "time": round(time.time(), 3),
            "code": submitted_code(array.code),
        }
        with atomic_write(run.folder / SUBMITTED) as temporary:
            temporary.write_text(json.dumps(submission, indent=1) + "\n")
        append(run.folder, "submitted", job=job)
    logger.info(
        "SLURM job %s: %s of %s x %s",
        jobs[0].split("_")[0],
        "the smoke run" if array.smoke_of else plural(len(array.runs), "run"),
        plural(array.nodes, "node"),
        plural(array.ranks_per_node, "rank"),
    )


def _lock_free(runs: Sequence[PlannedRun], locks: ExitStack) -> list[PlannedRun]:
    """Locks the runs that no process trains and that SLURM does not have; returns them.

    Raises:
        FolderInUseError, UserError: there is none, or SLURM does not answer.
    """
    locked = []
    refusals: list[UserError] = []
    for run in runs:
        try:
            locks.enter_context(RunLock(run.folder, "evspan submit"))
        except FolderInUseError as error:
            refusals.append(error)
        else:
            locked.append(run)
    queued = queued_folders([run.folder for run in locked])
    for folder, job in queued.items():
        refusals.append(UserError(queued_message({folder: job})))
    free = [run for run in locked if run.folder not in queued]
    if refusals and not free:
        raise refusals[0]
    for refusal in refusals:
        logger.info("left alone: %s", refusal)
    return free


@contextmanager
def _locked(runs: Sequence[PlannedRun]) -> Iterator[None]:
    """Holds the locks of all runs: another submission, or a process that trains, is refused."""
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(RunLock(run.folder, "evspan submit"))
        yield


# -- waiting -------------------------------------------------------------------------------------
def _wait(folders: Sequence[Path], folder: Path, *, fail_fast: bool) -> int:
    """Log each change of state until no run can continue. Ctrl-C leaves the jobs alone.

    Raises:
        UserError: `fail_fast` is set, and the first runs have failed with the same error.
    """
    own = frozenset(folders)
    shown: dict[Path, str] = {}
    polls_without_job: Counter[Path] = Counter()
    try:
        while True:
            runs = [run for run in read_runs(folder).runs if run.folder in own]
            for run in runs:
                _log_change(run, shown)
                _count_missing(run, polls_without_job)
            message = error_of_sweep(folders) if fail_fast else ""
            if message:  # which a job may have noticed before
                _cancel([run for run in runs if run.alive], message)
                raise UserError(message)
            if not any(_can_continue(run, polls_without_job[run.folder]) for run in runs):
                return int(any(run.state is not State.done for run in runs))
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        logger.info(
            "the jobs continue; watch: evspan status %s; end them: evspan cancel %s", folder, folder
        )
        return 0


def _cancel(runs: Sequence[Run], reason: str) -> None:
    """Cancels the jobs of these runs, and records it."""
    if not runs:
        return
    for run in runs:  # first: a successor that starts meanwhile reads it, and ends
        append(run.folder, "cancelled", step=run.step or 0, reason=reason)
    cancel_tasks([job for run in runs for job in (run.successor, run.job) if job])


def _log_change(run: Run, shown: dict[Path, str]) -> None:
    state = f"{run.state.value} {run.reason}"
    if shown.get(run.folder) != state:
        shown[run.folder] = state
        logger.info("%s: %s", run.folder, describe(run))


def _count_missing(run: Run, polls_without_job: Counter[Path]) -> None:
    if run.state in (State.lost, State.saved) and not run.alive:
        polls_without_job[run.folder] += 1
    else:
        polls_without_job[run.folder] = 0


def _can_continue(run: Run, polls_without_job: int) -> bool:
    if run.alive or run.state.unfinished:
        return True
    return 0 < polls_without_job < MAX_POLLS_WITHOUT_JOB
