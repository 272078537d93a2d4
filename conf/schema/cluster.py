"""Config of where `evspan submit` and `evspan sweep` run: conf/cluster/*.yaml. A run itself knows only its ranks."""

import re
from dataclasses import dataclass, field
from enum import Enum

from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import require


class Scheduler(Enum):
    local = "local"  # this machine, one run after the other
    slurm = "slurm"


class Container(Enum):
    none = "none"
    apptainer = "apptainer"  # image: a .sif file, or what apptainer can pull
    pyxis = "pyxis"  # image: a .sqsh file, or a name that enroot imports


@dataclass(kw_only=True)
class ClusterConfig:
    """What is empty is left to the cluster's own defaults. Nodes follow from parallel.ranks and ranks_per_node."""

    scheduler: Scheduler = Scheduler.local
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    gpus_per_node: int = 0  # that a node has; each rank gets one
    ranks_per_node: int = 0  # at most; 0: one per GPU, or one where there are none
    cpus_per_task: int = 1
    mem_gb: float = 0.0  # per node; 0: the cluster's default
    timeout_min: int = 240  # limit of one attempt; a run that reaches it is saved and requeued
    signal_delay_s: int = 120  # a run is told so long before the limit; it saves at its next step
    array_parallelism: int = 16  # runs of a sweep at once
    max_retries: int = 3  # a run that fails so many times in a row at the same step is given up
    requeue_after_fault: bool = True
    setup: list[str] = field(
        default_factory=list
    )  # shell lines before everything else, such as 'module load cuda'
    environment: list[str] = field(default_factory=list)  # NAME=VALUE
    sbatch_args: list[str] = field(
        default_factory=list
    )  # further ones of sbatch: mail-type=END, exclusive
    container: Container = Container.none
    image: str = ""
    mounts: list[str] = field(
        default_factory=list
    )  # PATH or PATH:INSIDE; the working folder is always there
    python: str = ""  # on the nodes, or in the container; empty: the one that runs this, or the container's `python`
    detach: bool = False  # return when SLURM has taken the runs, instead of waiting for their end
    dry_run: bool = False  # print the batch script, submit nothing

    def __post_init__(self) -> None:
        for name in ("setup", "environment", "sbatch_args", "mounts"):
            setattr(self, name, list(getattr(self, name)))
        for name in (
            "cpus_per_task",
            "timeout_min",
            "signal_delay_s",
            "array_parallelism",
            "max_retries",
        ):
            require(
                getattr(self, name) >= 1, f"cluster.{name} is {getattr(self, name)}; give 1 or more"
            )
        for name in ("gpus_per_node", "ranks_per_node", "mem_gb"):
            require(
                getattr(self, name) >= 0, f"cluster.{name} is {getattr(self, name)}; give 0 or more"
            )
        require(
            self.signal_delay_s < 60 * self.timeout_min,
            f"cluster.signal_delay_s is {self.signal_delay_s}, but a run may last {60 * self.timeout_min} s (cluster.timeout_min); "
            "leave it time to work before it is told to end",
        )
        require(
            not self.gpus_per_node or self.ranks_per_node <= self.gpus_per_node,
            f"cluster.ranks_per_node is {self.ranks_per_node} but a node has {self.gpus_per_node} GPUs "
            "(cluster.gpus_per_node), and each rank needs one; lower ranks_per_node, or leave it out",
        )
        require(
            (self.container is Container.none) == (not self.image),
            "cluster.container and cluster.image come together: container=apptainer image=evspan.sif, or "
            "container=pyxis image=evspan.sqsh",
        )
        self._check_written()

    def _check_written(self) -> None:
        """What would end a line of the batch script, or name no variable, cannot be quoted away."""
        for name in ("partition", "account", "qos", "constraint", "exclude", "image", "python"):
            require(
                getattr(self, name).isprintable(),
                f"cluster.{name} holds a line break or another control character: "
                f"{getattr(self, name)!r}; give it on one line",
            )
        for option in self.sbatch_args:
            require(
                bool(re.fullmatch(r"[a-z][a-z0-9-]*(=.*)?", option)) and option.isprintable(),
                f"cluster.sbatch_args has {option!r}; give names of sbatch's options without dashes before them, and values on "
                "one line: [mail-type=END, exclusive]",
            )
        for setting in self.environment:
            require(
                bool(re.match(r"[A-Za-z_][A-Za-z0-9_]*=", setting)),
                f"cluster.environment has {setting!r}; give NAME=VALUE, the name of letters, digits and _",
            )

    def most_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    def nodes(self, ranks: int) -> tuple[int, int]:
        """(nodes, ranks on each).

        Raises:
            ConfigError: so many ranks do not fill whole nodes.
        """
        each = self.most_ranks_per_node()
        if ranks <= each:
            return 1, ranks
        if ranks % each:
            raise ConfigError(
                f"parallel.ranks is {ranks}, which are not whole nodes of {each} ranks (cluster.ranks_per_node, or "
                f"its GPUs); set parallel.ranks={ranks // each * each} or {-(-ranks // each) * each}"
            )
        return ranks // each, each
