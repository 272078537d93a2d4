"""Submits planned runs to SLURM, in job arrays of one shape, and waits for them."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path

from evspan.conf.compose import CONFIG_FILE, save_config
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.text import plural
from evspan.data_prep.shards.atomic import atomic_write
from evspan.launch.slurm.client import require_commands
from evspan.launch.slurm.sbatch import JobArray, job_name, script, submit_job_array
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.queued import refuse_queued
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
) -> int:
    """Submit the runs: one array for each number of nodes and ranks.

    Args:
        folder: of the sweep, or of the single run.
        on_submitted: is called when the jobs are in SLURM's queue, before waiting for their end.

    Returns:
        The exit code: 0 when all runs are done, or are not waited for.

    Raises:
        ConfigError: SLURM is missing, or refuses them.
        UserError: a run is in SLURM's queue already.
        FolderInUseError: another process trains in the folder of a run, or submits it.
    """
    arrays = plan_arrays(runs, cluster, folder)
    if cluster.dry_run:
        for array in arrays:
            logger.info("%s", script(array))
            for run in array.runs:
                logger.info("# %s: %s", run.folder, " ".join(run.overrides))
        return 0
    require_commands()
    with _locked(runs):
        refuse_queued([run.folder for run in runs])
        for array in arrays:
            _save_configs(array)
            _record_submission(array, submit_job_array(array))
    if on_submitted is not None:
        on_submitted()
    if cluster.detach:
        logger.info("watch: evspan status %s", folder)
        return 0
    return _wait([run.folder for run in runs], folder)


def plan_arrays(runs: Sequence[PlannedRun], cluster: ClusterConfig, folder: Path) -> list[JobArray]:
    """One array for each number of nodes and ranks that the runs need."""
    shapes: dict[tuple[int, int], list[PlannedRun]] = {}
    for run in runs:
        shapes.setdefault(cluster.nodes(run.config.parallel.ranks), []).append(run)
    arrays = []
    for number, ((nodes, ranks_per_node), same_shape) in enumerate(shapes.items()):
        scripts = folder.absolute() / SUBMITIT / f"{time.time_ns() // 1_000_000}-{number}"
        array = JobArray(same_shape, cluster, nodes, ranks_per_node, scripts, job_name(folder))
        arrays.append(array)
    return arrays


def _save_configs(array: JobArray) -> None:
    """Write the resolved configs, which ranks read. It creates the folders, for containers."""
    for run in array.runs:
        config = deepcopy(run.config)
        if not config.parallel.threads:
            # By default, the ranks of a machine would divide all its cores among them.
            config.parallel.threads = array.cluster.cpus_per_task
        save_config(config, run.folder / CONFIG_FILE)


def _record_submission(array: JobArray, jobs: Sequence[str]) -> None:
    """Write the job of each run into its folder.

    jobs: SLURM's id of each run.
    """
    for run, job in zip(array.runs, jobs, strict=True):
        submission = {
            "job": job,
            "overrides": run.overrides,
            "nodes": array.nodes,
            "ranks": array.ranks,
            "time": round(time.time(), 3),
        }
        with atomic_write(run.folder / SUBMITTED) as temporary:
            temporary.write_text(json.dumps(submission, indent=1) + "\n")
        append(run.folder, "submitted", job=job)
    logger.info(
        "SLURM job %s: %s of %s x %s",
        jobs[0].split("_")[0],
        plural(len(array.runs), "run"),
        plural(array.nodes, "node"),
        plural(array.ranks_per_node, "rank"),
    )


@contextmanager
def _locked(runs: Sequence[PlannedRun]) -> Iterator[None]:
    """Holds the locks of all runs: another submission, or a process that trains, is refused."""
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(RunLock(run.folder, "evspan submit"))
        yield


# -- waiting -------------------------------------------------------------------------------------
def _wait(folders: Sequence[Path], folder: Path) -> int:
    """Log each change of state until no run can continue. Ctrl-C leaves the jobs alone."""
    shown: dict[Path, str] = {}
    polls_without_job: Counter[Path] = Counter()
    try:
        while True:
            runs = [run for run in read_runs(folder).runs if run.folder in folders]
            for run in runs:
                _log_change(run, shown)
                _count_missing(run, polls_without_job)
            if not any(_can_continue(run, polls_without_job[run.folder]) for run in runs):
                return int(any(run.state is not State.done for run in runs))
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        logger.info(
            "the jobs continue; watch: evspan status %s; end them: evspan cancel %s", folder, folder
        )
        return 0


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
