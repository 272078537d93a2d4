"""Config of where a command works: this machine or SLURM. Keys as in Submitit and sbatch.

`SlurmConfig` holds the keys that every command on a cluster reads. `ClusterConfig` adds those of
`evspan submit` and `evspan sweep`, `PrepClusterConfig` those of `evspan prep`. A command refuses
the keys that it does not read.
"""

import re
from dataclasses import dataclass, field, fields
from enum import Enum

from evspan.conf.errors import ConfigError, require


class Scheduler(Enum):
    """What starts the work."""

    local = "local"  # this machine
    slurm = "slurm"


class Container(Enum):
    """How ranks run in a container."""

    none = "none"
    apptainer = "apptainer"  # image: a .sif file, or an address that apptainer can pull
    pyxis = "pyxis"  # image: a .sqsh file, or a name that enroot imports


@dataclass(kw_only=True)
class SlurmConfig:
    """Options of sbatch that all commands share. An empty value leaves the cluster's default."""

    scheduler: Scheduler = Scheduler.local
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""  # nodes
    cpus_per_task: int = 1
    mem_gb: float = 0.0  # memory per node in GiB; 0: the cluster's default
    # Time limit of one attempt, in minutes. A job that reaches it is requeued.
    timeout_min: int = 240
    signal_delay_s: int = 120  # SLURM sends a signal this many seconds before the time limit
    array_parallelism: int = 16  # tasks of a job array that run at the same time
    # Shell lines at the start of the batch script, such as 'module load cuda'.
    setup: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)  # NAME=VALUE
    # More options of sbatch: mail-type=END, exclusive.
    sbatch_args: list[str] = field(default_factory=list)
    python: str = ""  # Python on the nodes; empty: the one that runs this command
    dry_run: bool = False  # print the batch script, submit nothing

    def __post_init__(self) -> None:
        for name in ("setup", "environment", "sbatch_args"):
            setattr(self, name, list(getattr(self, name)))
        for name in ("cpus_per_task", "timeout_min", "signal_delay_s", "array_parallelism"):
            self._require_at_least(1, name)
        self._require_at_least(0, "mem_gb")
        require(
            self.signal_delay_s < 60 * self.timeout_min,
            f"cluster.signal_delay_s is {self.signal_delay_s}, but the time limit is "
            f"{60 * self.timeout_min} s (cluster.timeout_min); lower signal_delay_s, so that the "
            "job has time to work before the signal",
        )
        self._check_script_lines()

    def _require_at_least(self, minimum: int, name: str) -> None:
        value = getattr(self, name)
        require(value >= minimum, f"cluster.{name} is {value}; give {minimum} or more")

    def _check_script_lines(self) -> None:
        """Refuses values that would break a line of the batch script; quoting cannot help."""
        for name in ("partition", "account", "qos", "constraint", "exclude", "python"):
            _require_printable(name, getattr(self, name))
        for option in self.sbatch_args:
            require(
                bool(re.fullmatch(r"[a-z][a-z0-9-]*(=.*)?", option)) and option.isprintable(),
                f"cluster.sbatch_args has {option!r}; give names of sbatch's options without "
                "leading dashes, and values on one line: [mail-type=END, exclusive]",
            )
        for number, setting in enumerate(self.environment, start=1):
            # Without the entry: its value may be a secret.
            require(
                bool(re.match(r"[A-Za-z_][A-Za-z0-9_]*=", setting)),
                f"entry {number} of cluster.environment is not NAME=VALUE, with a name of letters, "
                "digits and _",
            )


@dataclass(kw_only=True)
class ClusterConfig(SlurmConfig):
    """`cluster` of `evspan submit` and `evspan sweep`.

    The number of nodes follows from parallel.ranks and ranks_per_node.
    """

    gpus_per_node: int = 0  # GPUs that a node has; each rank gets one
    ranks_per_node: int = 0  # at most; 0: one per GPU, or one where there are none
    max_retries: int = 3  # consecutive failures at the same step after which a run has failed
    requeue_after_fault: bool = True
    container: Container = Container.none
    image: str = ""
    # PATH or PATH:INSIDE; the working folder is always mounted.
    mounts: list[str] = field(default_factory=list)
    detach: bool = False  # return when SLURM has accepted the runs, do not wait for their end

    def __post_init__(self) -> None:
        self.mounts = list(self.mounts)
        super().__post_init__()
        self._require_at_least(1, "max_retries")
        self._require_at_least(0, "gpus_per_node")
        self._require_at_least(0, "ranks_per_node")
        require(
            not self.gpus_per_node or self.ranks_per_node <= self.gpus_per_node,
            f"cluster.ranks_per_node is {self.ranks_per_node} but a node has "
            f"{self.gpus_per_node} GPUs (cluster.gpus_per_node), and each rank needs one; lower "
            "ranks_per_node, or leave it out",
        )
        require(
            (self.container is Container.none) == (not self.image),
            "cluster.container and cluster.image come together: container=apptainer "
            "image=evspan.sif, or container=pyxis image=evspan.sqsh",
        )
        _require_printable("image", self.image)

    def most_ranks_per_node(self) -> int:
        """Ranks on a full node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def nodes(self, ranks: int) -> tuple[int, int]:
        """(nodes, ranks on each).

        Raises:
            ConfigError: this number of ranks does not fill whole nodes.
        """
        per_node = self.most_ranks_per_node()
        if ranks <= per_node:
            return 1, ranks
        if ranks % per_node:
            fewer = ranks // per_node * per_node
            raise ConfigError(
                f"parallel.ranks is {ranks}, which does not fill whole nodes of {per_node} ranks "
                f"(cluster.ranks_per_node, or its GPUs); set parallel.ranks={fewer} or "
                f"{fewer + per_node}"
            )
        return ranks // per_node, per_node


@dataclass(kw_only=True)
class PrepClusterConfig(SlurmConfig):
    """`cluster` of `evspan prep`: with scheduler=slurm a job array prepares the recordings."""

    mem_gb: float = 4.0  # per task, in GiB; a recording takes less than 1
    signal_delay_s: int = 60
    array_parallelism: int = 64
    array_size: int = 0  # tasks in the job array; 0: one per 16 GiB of recordings, at most 64
    max_num_timeout: int = 10  # requeues of a task after a time-out; preemptions do not count

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "array_size")
        self._require_at_least(0, "max_num_timeout")
        if self.scheduler is Scheduler.local:
            self._refuse_keys_of_slurm()

    def _refuse_keys_of_slurm(self) -> None:
        for option in fields(self):
            default = [] if option.default_factory is list else option.default
            require(
                getattr(self, option.name) == default,
                f"cluster.{option.name} needs a cluster, and cluster=local prepares on this "
                f"machine; add cluster=slurm, or leave out cluster.{option.name}",
            )


def _require_printable(name: str, value: str) -> None:
    """Raises ConfigError where the value of cluster.NAME would break a line of a batch script."""
    require(
        value.isprintable(),
        f"cluster.{name} contains a line break or another control character: {value!r}; "
        "give it on one line",
    )
