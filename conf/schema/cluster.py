"""Config of where a command works: this machine or SLURM. Keys as in Submitit and sbatch.

`SlurmConfig` holds the keys that every command on a cluster reads. `ClusterConfig` adds those of
`evspan submit` and `evspan sweep`, `PrepClusterConfig` those of `evspan prep`. A command refuses
the keys that it does not read.
"""

import re
from dataclasses import dataclass, field, fields
from enum import Enum

from evspan.conf.errors import ConfigError, require

_MAIL_EVENTS = (
    "NONE|BEGIN|END|FAIL|REQUEUE|ALL|INVALID_DEPEND|STAGE_OUT|TIME_LIMIT(_90|_80|_50)?|ARRAY_TASKS"
)
_NAME = "[A-Za-z0-9_.-]+"
_GRES = rf"{_NAME}(:{_NAME})?:[1-9][0-9]*"
_BIND = "[A-Za-z0-9_:,=*+.]+"
# What sbatch and srun accept, by key, and an example for the error message.
PATTERNS = {
    "partition": (r"[^\s,]+(,[^\s,]+)*", "a name, or several with commas between them: gpu,long"),
    "gres": (f"{_GRES}(,{_GRES})*", "NAME:COUNT or NAME:TYPE:COUNT, per node: gpu:a100:4,nvme:1"),
    "mail_type": (
        f"({_MAIL_EVENTS})(,({_MAIL_EVENTS}))*",
        "events with commas between them: END,FAIL,TIME_LIMIT",
    ),
    "mail_user": (r"[^\s,;'\"`$\\]+", "one address or user name"),
    "cpu_bind": (_BIND, "a value of srun --cpu-bind: cores, ldoms, none, map_cpu:0,8"),
    "mem_bind": (_BIND, "a value of srun --mem-bind: local, none, map_mem:0,1"),
    "gpu_bind": (_BIND, "a value of srun --gpu-bind: closest, single:1, none"),
}
MOST_NICE = 2_147_483_645


class Scheduler(Enum):
    """What starts the work."""

    local = "local"  # this machine
    slurm = "slurm"


class Container(Enum):
    """How ranks run in a container."""

    none = "none"
    apptainer = "apptainer"  # image: a .sif file, or an address that apptainer can pull
    pyxis = "pyxis"  # image: a .sqsh file, or a name of a registry that enroot imports


class CodeSource(Enum):
    """Whose code a job imports."""

    archive = "archive"  # a copy in the run or sweep, written at submission
    live = "live"  # what Python has installed on the nodes, or in the image, when an attempt starts


@dataclass(kw_only=True)
class SlurmConfig:
    """Options of sbatch that all commands share. An empty value leaves the cluster's default."""

    scheduler: Scheduler = Scheduler.local
    partition: str = ""  # several, 'gpu,gpu-long': the one that starts the job first
    account: str = ""
    qos: str = ""
    constraint: str = ""  # features of nodes: 'a100&nvlink', 'a100|h100'
    exclude: str = ""  # nodes: 'n07,n[12-14]'
    # Generic resources of a node, NAME:COUNT or NAME:TYPE:COUNT: 'gpu:a100:4,nvme:1'. Its GPUs are
    # requested instead of gpus_per_node, which is still the number of ranks.
    gres: str = ""
    exclusive: bool = False  # nodes that no other job uses meanwhile
    nice: int = 0  # subtracted from the job's priority
    mail_type: str = ""  # events, such as 'END,FAIL' or 'ALL'
    mail_user: str = ""  # empty: the submitting user
    # Options of srun. The threads and worker processes of a rank stay on the cores that it gets.
    cpu_bind: str = ""  # none, cores, threads, sockets, ldoms (NUMA nodes), map_cpu:0,8, ...
    mem_bind: str = ""  # memory of NUMA nodes: none, local, map_mem:0,1, ...
    gpu_bind: str = ""  # GPUs that a rank sees: closest, single:1, map_gpu:0,1, none, ...
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
    code: CodeSource = CodeSource.archive
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
        for name, (pattern, example) in PATTERNS.items():
            value = getattr(self, name)
            require(
                not value or bool(re.fullmatch(pattern, value)),
                f"cluster.{name} is {value!r}; give {example}",
            )
        require(
            not self.mail_user or bool(self.mail_type),
            "cluster.mail_user gets no mail without cluster.mail_type; add mail_type=END,FAIL",
        )
        require(
            abs(self.nice) <= MOST_NICE,
            f"cluster.nice is {self.nice}; give a number from -{MOST_NICE} to {MOST_NICE}",
        )
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
    fail_fast: bool = False  # end a sweep when its first runs fail with the same error
    container: Container = Container.none
    image: str = ""
    # PATH or PATH:INSIDE; the working folder is always mounted.
    mounts: list[str] = field(default_factory=list)
    detach: bool = False  # return when SLURM has accepted the runs, do not wait for their end
    # Each run has a second job that starts when its first one has ended (afterany) and continues
    # the run if it is not done; that one has a next one, and so on. Jobs are not requeued. For
    # partitions with PreemptMode=CANCEL and sites without requeue; evspan doctor reports them.
    successor: bool = False
    # Folders of runs, sweeps or prepared shards. The jobs start when all that was submitted for
    # them is done. `after=FOLDER` of evspan submit and sweep adds one.
    after: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mounts = list(self.mounts)
        self.after = list(self.after)
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
            "image=/shared/evspan.sif, or container=pyxis image=/shared/evspan.sqsh",
        )
        _require_printable("image", self.image)
        for folder in self.after:
            _require_printable("after", folder)
        gpus = self.gpus_in_gres()
        require(
            not gpus or (gpus >= self.most_ranks_per_node() and self.gpus_per_node > 0),
            f"cluster.gres requests {gpus} GPUs, for {self.most_ranks_per_node()} ranks per node "
            f"(cluster.gpus_per_node={self.gpus_per_node}); set gpus_per_node={gpus}, and "
            "ranks_per_node for fewer ranks",
        )

    def gpus_in_gres(self) -> int:
        """GPUs of a node that `gres` requests."""
        counts = [re.fullmatch("gpu(?::.+)?:([0-9]+)", item) for item in self.gres.split(",")]
        return sum(int(count[1]) for count in counts if count)

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
