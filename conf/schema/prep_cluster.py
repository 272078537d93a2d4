"""Config of `evspan prep` on a cluster: `launch` submits, data_prep itself knows only the processes of one machine."""

from dataclasses import dataclass, field

from evspan.conf.schema.prep import LauncherConfig, require


@dataclass(kw_only=True)
class SlurmConfig(LauncherConfig):
    """launcher=slurm: a job array on a SLURM cluster, in Submitit's words; what is empty is left to the cluster's defaults."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    timeout_min: int = 240  # time limit of a task; one that reaches it is requeued and goes on with what is missing
    max_num_timeout: int = 10  # so many times; preemptions do not count
    cpus_per_task: int = 1  # recordings that a task prepares side by side
    mem_gb: float = 4.0  # per task; a recording takes less than 1
    tasks: int = 0  # in the array; 0: one per 16 GiB of recordings, at most 64
    array_parallelism: int = 64  # tasks at once
    signal_delay_s: int = 60  # a task is told so long before its end, in time to requeue
    setup: list[str] = field(
        default_factory=list
    )  # shell lines before a task's Python, such as 'module load hdf5'
    dry_run: bool = False  # print the batch script and what each task would do, submit nothing

    def __post_init__(self) -> None:
        self.setup = list(self.setup)
        for name in ("timeout_min", "cpus_per_task", "array_parallelism", "signal_delay_s"):
            require(
                getattr(self, name) >= 1,
                f"launcher.{name} is {getattr(self, name)}; give 1 or more",
            )
        for name in ("tasks", "max_num_timeout"):
            require(
                getattr(self, name) >= 0,
                f"launcher.{name} is {getattr(self, name)}; give 0 or more",
            )
        require(self.mem_gb > 0, f"launcher.mem_gb is {self.mem_gb}; give a number above 0")
        require(
            self.signal_delay_s < 60 * self.timeout_min,
            f"launcher.signal_delay_s is {self.signal_delay_s}, but a task may run {60 * self.timeout_min} s "
            "(launcher.timeout_min); leave it time to work before it is told to end",
        )
