"""The only module that uses private names of Submitit. Verified against submitit 1.5.4."""

import shlex
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core import job_environment, utils
from submitit.core.submission import process_job
from submitit.slurm import slurm

VERIFIED_VERSION = "1.5.4"
TASK_MODULE = "evspan.launch.slurm.submitted_task"
# Stands for a '%' of the folder until SLURM's own %j and %t are in the script.
PERCENT = "\ue000"


class JobPaths(utils.JobPaths):
    """The files of a job. %j, %t, %A and %a are replaced in their names, not in their folder's."""

    @property
    def folder(self) -> Path:
        """Contains all files."""
        return Path(self._folder)

    def _format_id(self, path: str | Path) -> Path:
        return self.folder / super()._format_id(Path(path).name)

    @staticmethod
    def get_first_id_independent_folder(folder: str | Path) -> Path:
        """Gets the files of a job until its id is known: the folder itself."""
        return Path(folder).expanduser().absolute()


class Executor(SlurmExecutor):
    """Submitit's executor. It can be created without srun, to show its script."""

    @classmethod
    def affinity(cls) -> int:
        """Submitit's rating of this executor; it creates none whose rating is negative."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        """Checks who could have written the task's pickle before it is loaded."""
        return f"{self.python} -u -m {TASK_MODULE} {shlex.quote(str(self.folder))}"

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """SLURM replaces %x in the paths of its logs; %% is a '%'."""
        folder = str(self.folder).replace("%", PERCENT)
        text = slurm._make_sbatch_string(command=command, folder=folder, **self.parameters)
        return text.replace(PERCENT, "%%")


def script_of(executor: SlurmExecutor, tasks: int, command: str = "") -> str:
    """The sbatch script that the executor would submit for an array of `tasks` tasks.

    Args:
        command: that srun starts instead of Submitit's; a shell command.
    """
    if tasks > 1:
        executor.parameters["map_count"] = tasks  # as Submitit does for an array
    command = command or executor._submitit_command_str
    return str(executor._make_submission_file_text(command, ""))


def run_submitted(folder: Path) -> None:
    """Unpickles and calls the task of this process, and writes its result to the folder."""
    process_job(folder)


def _replace_classes() -> None:
    """Makes Submitit use our classes: it creates an executor of its own for an array."""
    vars(utils)["JobPaths"] = JobPaths
    vars(job_environment)["JobPaths"] = JobPaths
    vars(slurm)["SlurmExecutor"] = Executor


_replace_classes()
