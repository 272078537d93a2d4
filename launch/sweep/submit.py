"""Starts planned runs: as SLURM jobs, or one after the other on this machine (cluster=local)."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from evspan.conf.errors import USER_ERROR_EXIT_CODE, UserError
from evspan.conf.hydra_adapter import Expansion
from evspan.conf.schema.cluster import ClusterConfig, Scheduler
from evspan.launch.output_streams import drop_lost_output
from evspan.launch.sweep.plan import (
    PlannedRun,
    SweepPlan,
    plan_sweep,
    sweep_settings,
    was_started,
    write_table,
)
from evspan.pipeline.history import append
from evspan.pipeline.run_lock import RunLock

logger = logging.getLogger(__name__)


def submit_sweep(expansion: Expansion, config_dir: Sequence[str]) -> int:
    """Plan and start a run for each combination of overrides.

    The lock on the sweep's folder is held until its runs are submitted, or trained on this machine.
    A dry run writes nothing.

    Args:
        config_dir: `--config-dir FOLDER`, or nothing.

    Returns:
        The exit code: 0 when all runs are done, or submitted and not waited for.

    Raises:
        ConfigError: no combination composes, or the folder is that of a run.
        FolderInUseError: another process starts runs of this sweep.
    """
    settings = sweep_settings(expansion, config_dir)
    with ExitStack() as locks:
        if not settings.cluster.dry_run:
            locks.enter_context(RunLock(settings.folder, "evspan sweep"))
        plan = plan_sweep(expansion, config_dir, settings)
        if not settings.cluster.dry_run:
            record_plan(plan)
        for folder, message in plan.refused.items():
            logger.warning("%s: %s", folder, message)
        code = submit_planned(plan.runs, settings.cluster, settings.folder, locks.close)
    if code == 0 and plan.refused:
        return 1
    return code


def record_plan(plan: SweepPlan) -> None:
    """Write sweep.json, and the message of each refused run that is new into its history."""
    write_table(plan)
    for folder, message in plan.refused.items():
        if was_started(folder):  # it may train at this moment
            continue
        append(folder, "failed", step=0, message=message, code=USER_ERROR_EXIT_CODE)


def submit_planned(
    runs: Sequence[PlannedRun],
    cluster: ClusterConfig,
    folder: Path,
    on_submitted: Callable[[], None] | None = None,
    *,
    smoke: bool = False,
) -> int:
    """Start the runs that are not done: on this machine or on SLURM, as `cluster` selects.

    Args:
        folder: of the sweep, or of the single run.
        on_submitted: is called when the jobs are in SLURM's queue, before waiting for their end.
        smoke: whether two steps in a job of their own come first; for one run.

    Returns:
        The exit code.

    Raises:
        UserError: cluster.after names what has failed, or cluster=local what is not done.
    """
    cluster = replace(cluster, after=[str(Path(name).absolute()) for name in cluster.after])
    if not cluster.dry_run:
        drop_lost_output()
    if cluster.scheduler is Scheduler.local:
        from evspan.launch.local.sequential import run_sequentially

        if smoke:
            raise UserError("--smoke is for SLURM jobs, and cluster=local trains here at once")
        if cluster.after:
            _require_done(cluster.after, folder)
        return run_sequentially(runs, dry_run=cluster.dry_run)
    from evspan.launch.slurm.submit_runs import submit_runs

    remaining = []
    for run in runs:
        if run.is_done():
            logger.info("%s: done already", run.folder)
        else:
            remaining.append(run)
    return submit_runs(remaining, cluster, folder, on_submitted, smoke=smoke and bool(remaining))


def _require_done(folders: Sequence[str], own: Path) -> None:
    """For runs on this machine, which wait for nothing."""
    from evspan.launch.slurm.chain import read_upstream

    upstream = read_upstream([Path(folder) for folder in folders], own)
    problem = upstream.problem
    if upstream.jobs:
        problem = f"SLURM still has {', '.join(upstream.jobs)}, and cluster=local does not wait"
    if problem:
        raise UserError(f"after={','.join(folders)}: {problem}")
