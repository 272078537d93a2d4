"""Ends the controller of a search."""

from pathlib import Path

from evspan.conf.atomic_files import replace_file
from evspan.launch.search.files import STOP, read_info


def stop_controller(path: Path) -> str:
    """Asks the controller of the search in `path` to end, and cancels its job.

    A controller that runs elsewhere ends within seconds; so does one that has just been requeued.

    Returns:
        A line on what was done; empty if the folder is not that of a search, or no controller runs.

    Raises:
        UserError: search.json is damaged, or SLURM does not answer.
    """
    info = read_info(path)
    if info is None:
        return ""
    replace_file(path / STOP, "")
    if not info.job:
        return f"{path}: a controller of the search that still runs ends within seconds"
    from evspan.launch.search.job import controller_job
    from evspan.launch.slurm.client import cancel_tasks

    job = controller_job(path, info)
    if not job:
        return ""
    cancel_tasks([job])
    return f"{path}: cancelled SLURM job {job}, the controller of the search"
