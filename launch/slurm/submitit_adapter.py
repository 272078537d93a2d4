"""The only module that uses private names of Submitit. Verified against submitit 1.5.4."""

from submitit import SlurmExecutor

VERIFIED_VERSION = "1.5.4"


class Executor(SlurmExecutor):
    """Submitit's executor. It can be created without srun, to show its script."""

    @classmethod
    def affinity(cls) -> int:
        """Submitit's rating of this executor; it creates none whose rating is negative."""
        return 2


def script_of(executor: SlurmExecutor, tasks: int) -> str:
    """The sbatch script that the executor would submit for an array of `tasks` tasks."""
    if tasks > 1:
        executor.parameters["map_count"] = tasks  # as Submitit does for an array
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))
