"""`evspan sweep search=optuna`: runs the controller here, or submits it with cluster.detach."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evspan.conf.compose import config_dir_options, replace_override
from evspan.conf.errors import UserError
from evspan.conf.schema.cluster import Scheduler
from evspan.launch.output_streams import drop_lost_output
from evspan.launch.search.files import STOP, SearchInfo, new_info, write_info
from evspan.launch.search.job import controller_job, controller_script, submit_controller
from evspan.launch.search.run import SearchPlan, plan_search, record_search, run_controller
from evspan.launch.slurm.submit_runs import submit_runs
from evspan.pipeline.run_lock import RunLock

logger = logging.getLogger(__name__)


def start_search(argv: Sequence[str]) -> int:
    """Runs a search, or submits its controller with cluster.detach.

    Args:
        argv: of `evspan sweep`: overrides, and `--config-dir FOLDER`.

    Returns:
        The exit code.

    Raises:
        UserError: the search cannot start, or its runs fail.
        FolderInUseError: another process runs it.
    """
    plan = plan_search(argv)
    cluster = plan.config.cluster
    if cluster.dry_run:
        return _show(plan)
    drop_lost_output()
    with RunLock(plan.folder, "evspan sweep"):
        info = record_search(plan)
        _refuse_controller(plan.folder, info)
        (plan.folder / STOP).unlink(missing_ok=True)
        if cluster.detach and cluster.scheduler is Scheduler.slurm:
            _submit_controller(plan, info)
            return 0
        return run_controller(plan, info)


def _refuse_controller(folder: Path, info: SearchInfo) -> None:
    """Refuses a second controller while the job of the first one waits or runs.

    Raises:
        UserError: it does, or SLURM does not answer.
    """
    if not info.job:
        return
    job = controller_job(folder, info)
    if job:
        raise UserError(
            f"SLURM job {job} runs the search in {folder}. Watch it by evspan status {folder}; "
            f"evspan cancel {folder} ends it and its runs, and the same command continues it"
        )


def _submit_controller(plan: SearchPlan, info: SearchInfo) -> None:
    # The folder, where the command has not named one; absolute, as the job may start elsewhere.
    words = replace_override(
        [word for word in plan.argv if word not in config_dir_options(plan.argv)],
        "run_dir",
        str(plan.folder.absolute()),
    )
    argv = [*config_dir_options(plan.argv), *words]
    # Any job, until it is known which: a second command must look into the queue.
    write_info(plan.folder, replace(info, job="0"))
    job = submit_controller(plan.folder, plan.config, info, argv)
    write_info(plan.folder, replace(info, job=job))
    logger.info("SLURM job %s: controller of the %s", job, info.describe())
    logger.info("watch: evspan status %s", plan.folder)


def _show(plan: SearchPlan) -> int:
    """Prints the batch script of a trial, and of the controller with cluster.detach."""
    run = plan.example()
    if plan.config.cluster.scheduler is Scheduler.local:
        logger.info("%s: %s", run.folder, " ".join(run.overrides))
        return 0
    info = new_info(plan.config.search, plan.space, plan.first_rung, None)
    logger.info("# %s", info.describe())
    if plan.config.cluster.detach:
        logger.info("%s", controller_script(plan.folder, plan.config, info))
    return submit_runs([run], plan.config.cluster, plan.folder)
