"""Measures the connection between ranks as training uses it, and the difference of their clocks.

`evspan.launch.doctor.probe_rank` is the command.
"""

import os
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from evspan.conf.schema.training import ParallelConfig
from evspan.pipeline.parallel.rank_env import rank_info
from evspan.pipeline.parallel.reductions import gather_over_ranks
from evspan.pipeline.parallel.world import World, open_world

# Sizes of the all-reduces (float32 numbers), and how often each is repeated.
SMALL = 1
LARGE = 1 << 22
ROUNDS = {SMALL: 50, LARGE: 5}
CLOCK_ROUNDS = 5


def probe(timeout_s: int) -> dict[str, Any]:
    """Joins the ranks and measures them.

    Args:
        timeout_s: the probe fails if ranks have not joined within this time.

    Returns:
        JSON values: `versions`, and backend: of this rank. ranks: number. latency_us: of a small
        all-reduce. gb_per_s: of a large one. clock_s: seconds that this rank's clock is ahead of
        rank 0's.

    Raises:
        DeviceError: torch cannot use the GPUs, or ranks would share one.
        ConfigError: the name of rank 0's machine cannot be resolved.
        LostRanksError: other ranks are gone.
        RuntimeError: a wrong sum, or an error of torch.
    """
    ranks = rank_info(os.environ).size
    with open_world(ParallelConfig(ranks=ranks, timeout_s=timeout_s)) as world:
        _check_sum(world)
        seconds = {size: _all_reduce_s(world, size) for size in (SMALL, LARGE)}
        return {
            **versions(),
            "backend": dist.get_backend(),
            "ranks": world.size,
            "latency_us": 1e6 * seconds[SMALL],
            "gb_per_s": 4 * LARGE / seconds[LARGE] / 1e9,
            "clock_s": _clock_s(world),
        }


def versions() -> dict[str, Any]:
    """JSON values: versions of torch, CUDA and NCCL (None: not in this build), number of GPUs."""
    nccl = None
    if dist.is_nccl_available():
        release = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # without annotation
        nccl = ".".join(str(number) for number in release)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "gpus": torch.cuda.device_count(),
    }


def _check_sum(world: World) -> None:
    x = torch.full((LARGE,), world.rank + 1.0, device=world.device)
    dist.all_reduce(x)
    expected = world.size * (world.size + 1) / 2
    wrong = int((x != expected).sum())
    if wrong:
        raise RuntimeError(
            f"an all-reduce over {world.size} ranks gave {wrong} of {LARGE} sums other than "
            f"{expected}"
        )


def _all_reduce_s(world: World, size: int) -> float:
    """Seconds of an all-reduce of `size` float32 numbers."""
    x = torch.zeros(size, device=world.device)
    _barrier(world)
    start = time.perf_counter()
    for _ in range(ROUNDS[size]):
        dist.all_reduce(x)
    _synchronize(world)
    return (time.perf_counter() - start) / ROUNDS[size]


def _clock_s(world: World) -> float:
    """Seconds ahead of rank 0's clock; as exact as ranks leave a barrier together."""
    differences = []
    for _ in range(CLOCK_ROUNDS):
        _barrier(world)
        now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        times = gather_over_ranks(now)
        differences.append(float(now) - float(times[0]))
    return median(differences)


def _barrier(world: World) -> None:
    dist.barrier()
    _synchronize(world)


def _synchronize(world: World) -> None:
    """Waits for the device, to which the host only queues collectives."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
