"""Which resource limits a training step, and what to change."""

from dataclasses import dataclass
from enum import Enum

DATA_WAIT_LIMIT = 0.10  # fraction of a step from which on the loader limits it
EXCHANGE_LIMIT = 0.25
COPY_LIMIT = 0.15
BUSY_LIMIT = 0.75  # a GPU that computes for less of a step waits for its host
PRODUCT_LIMIT = 0.50  # of the device's time, from which on it is limited by its products
FREE_MEMORY = 0.5  # used fraction below which a larger batch is advised


class Resource(Enum):
    """What a step waits for."""

    loader = "loader"
    exchange = "exchange"
    copy = "copies to the device"
    host = "host launches"
    compute = "device compute"
    memory = "memory bandwidth"


@dataclass(frozen=True)
class StepBalance:
    """What a step spends its time on.

    Attributes:
        step_ms: the whole step.
        data_wait_ms, to_device_ms, exchange_ms: parts of it.
        busy_ms: a GPU computes; None: a CPU, which always does.
        product_fraction: of the time that the device computes, in matrix products.
        launches: kernels of a step.
        waits: of the host for the device.
        memory_fraction: of a GPU's memory that is used; None: a CPU.
        threads: of the loader, in training.
        threads_needed: of the loader; None: more than there are cores.
        loader_frames_per_s: with all cores.
        frames_per_s_needed: by a step that does not wait for data.
    """

    step_ms: float
    data_wait_ms: float
    to_device_ms: float
    exchange_ms: float
    busy_ms: float | None
    product_fraction: float
    launches: int
    waits: int
    memory_fraction: float | None
    threads: int
    threads_needed: int | None
    loader_frames_per_s: float
    frames_per_s_needed: float

    def fraction(self, part_ms: float) -> float:
        """Of the step."""
        return part_ms / self.step_ms


@dataclass(frozen=True)
class Limit:
    """The limiting resource. reason and remedy: a sentence without a full stop, each."""

    resource: Resource
    reason: str
    remedy: str


def limiting_resource(balance: StepBalance) -> Limit:
    """The resource that limits a step: the first one in the way of the frames that is exhausted."""
    if balance.fraction(balance.data_wait_ms) >= DATA_WAIT_LIMIT:
        return _loader_limit(balance)
    if balance.fraction(balance.exchange_ms) >= EXCHANGE_LIMIT:
        return Limit(
            Resource.exchange,
            f"ranks exchange data for {balance.fraction(balance.exchange_ms):.0%} of a step",
            "use fewer ranks per sequence (parallel.sequence), longer chunks "
            "(training.sequence_length), or ranks of one node",
        )
    if balance.fraction(balance.to_device_ms) >= COPY_LIMIT:
        return Limit(
            Resource.copy,
            f"frames are on their way to the device for "
            f"{balance.fraction(balance.to_device_ms):.0%} of a step",
            "use frames of lower resolution (evspan prep frames.downsample=4)",
        )
    if balance.busy_ms is not None and balance.fraction(balance.busy_ms) < BUSY_LIMIT:
        return _host_limit(balance, balance.fraction(balance.busy_ms))
    if balance.product_fraction >= PRODUCT_LIMIT:
        return Limit(
            Resource.compute,
            f"matrix products take {balance.product_fraction:.0%} of the device's time",
            _compute_remedy(balance),
        )
    return Limit(
        Resource.memory,
        f"{1 - balance.product_fraction:.0%} of the device's time is not in matrix products but in "
        "operators that read and write memory",
        "fuse them with training.compile=true, or halve their bytes with training.precision=bf16 "
        "(on a GPU)",
    )


def _loader_limit(balance: StepBalance) -> Limit:
    reason = (
        f"a step waits for data {balance.fraction(balance.data_wait_ms):.0%} of its time; it could "
        f"take {balance.frames_per_s_needed:.0f} frames/s"
    )
    if balance.threads_needed is None:
        remedy = (
            f"all cores read {balance.loader_frames_per_s:.0f} frames/s: use more cores per rank, "
            "frames of lower resolution, or training.augmentation.zoom_prob=0"
        )
    elif balance.threads_needed > balance.threads:
        remedy = f"set training.num_workers={balance.threads_needed} instead of {balance.threads}"
    else:
        remedy = (
            "threads of the loader and of the step share the cores: use more cores per rank, or "
            "fewer threads of the step (parallel.threads)"
        )
    return Limit(Resource.loader, reason, remedy)


def _host_limit(balance: StepBalance, busy: float) -> Limit:
    reason = (
        f"the device computes for {busy:.0%} of a step and otherwise waits for the host, which "
        f"launches {balance.launches:,} kernels"
    )
    if balance.waits > 0:
        reason += f" and itself waits {balance.waits} times for the device"
    remedies = []
    if balance.memory_fraction is not None and balance.memory_fraction < FREE_MEMORY:
        remedies.append(f"raise training.batch_size (memory is {balance.memory_fraction:.0%} used)")
    remedies.append(
        "launch less with training.cuda_graphs=true (equal results) or training.compile=true"
    )
    return Limit(Resource.host, reason, "; ".join(remedies))


def _compute_remedy(balance: StepBalance) -> str:
    if balance.busy_ms is None:
        return "use a GPU, more cores (parallel.threads), or a smaller model (size=...)"
    return "use more GPUs, training.precision=bf16 if it is not set, or a smaller model (size=...)"
