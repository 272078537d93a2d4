"""Starts planned runs: as SLURM jobs, or one after the other on this machine (cluster=local)."""

import logging
from collections.abc import Sequence
from pathlib import Path

from evspan.conf.errors import USER_ERROR_EXIT_CODE
from evspan.conf.hydra_adapter import Expansion
from evspan.conf.schema.cluster import ClusterConfig, Scheduler
from evspan.launch.sweep.plan import PlannedRun, plan_sweep
from evspan.pipeline.history import append

logger = logging.getLogger(__name__)


def submit_sweep(expansion: Expansion, config_dir: Sequence[str]) -> int:
    """Plan and start a run for each combination of overrides.

    Args:
        config_dir: `--config-dir FOLDER`, or nothing.

    Returns:
        The exit code: 0 when all runs are done, or submitted and not waited for.

    Raises:
        ConfigError: no combination composes.
    """
    plan = plan_sweep(expansion, config_dir)
    if not plan.cluster.dry_run:
        for folder, message in plan.refused.items():
            append(folder, "failed", step=0, message=message, code=USER_ERROR_EXIT_CODE)
            logger.warning("%s: %s", folder, message)
    code = submit_planned(plan.runs, plan.cluster, plan.folder)
    if code == 0 and plan.refused:
        return 1
    return code


def submit_planned(runs: Sequence[PlannedRun], cluster: ClusterConfig, folder: Path) -> int:
    """Start the runs that are not done: on this machine or on SLURM, as `cluster` selects.

    Args:
        folder: of the sweep, or of the single run.

    Returns:
        The exit code.
    """
    if cluster.scheduler is Scheduler.local:
        from evspan.launch.local.sequential import run_sequentially

        return run_sequentially(runs, dry_run=cluster.dry_run)
    from evspan.launch.slurm.submit_runs import submit_runs

    remaining = []
    for run in runs:
        if run.is_done():
            logger.info("%s: done already", run.folder)
        else:
            remaining.append(run)
    return submit_runs(remaining, cluster, folder)
