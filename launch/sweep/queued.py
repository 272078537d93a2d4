"""Refuses to start a run in a folder whose SLURM job waits or runs."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import printable
from evspan.launch.sweep.registry import SUBMITTED, jobs_alive

logger = logging.getLogger(__name__)


def refuse_queued(folders: Sequence[Path]) -> None:
    """Refuse folders whose SLURM job waits or runs, unless this process belongs to it.

    Call it with the lock on the folders: a submission is recorded under it.

    Raises:
        UserError: a job does, or SLURM does not answer.
    """
    queued = queued_folders(folders)
    if queued:
        raise UserError(queued_message(queued))


def queued_message(queued: Mapping[Path, str]) -> str:
    """The refusal of folders whose SLURM jobs wait or run. queued: folder -> job."""
    names = ", ".join(f"{folder} (job {job})" for folder, job in queued.items())
    first = next(iter(queued))
    return (
        f"SLURM already has {names}. Watch it by evspan status {first}, or end it first by "
        f"evspan cancel {first}"
    )


def queued_folders(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders whose SLURM job waits or runs, with its id.

    Those of the job that this process belongs to are left out.

    Raises:
        UserError: SLURM does not answer.
    """
    jobs: dict[str, Path] = {}
    for folder in folders:
        jobs |= dict.fromkeys(submitted_jobs(folder), folder)
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        for job, folder in jobs.items():
            logger.warning(
                "%s was submitted as SLURM job %s, and squeue is not on the PATH: make sure that "
                "the job does not wait in the queue",
                folder,
                printable(job),
            )
        return {}
    alive = jobs_alive(jobs) - _own_jobs()
    queued: dict[Path, str] = {}
    for job, folder in jobs.items():
        if job in alive:
            queued.setdefault(folder, job)
    return queued


def submitted_jobs(folder: Path) -> list[str]:
    """SLURM's ids of the job that was last submitted for a run, and of its successor."""
    try:
        submitted = read_json_object(folder / SUBMITTED)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (JsonFileError, OSError) as error:
        logger.warning("%s: the SLURM job of this run is not known: %s", folder, error)
        return []
    ids = [submitted.get("job"), submitted.get("successor")]
    return [str(job) for job in ids if job]


def submitted_job(folder: Path) -> str:
    """SLURM's id of the job that was last submitted for a run; empty if there is none."""
    return next(iter(submitted_jobs(folder)), "")


def _own_jobs() -> set[str]:
    """The ids by which SLURM's queue may list the job that this process is in."""
    env = os.environ
    array = f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}"
    return {env.get("SLURM_JOB_ID", ""), array}
