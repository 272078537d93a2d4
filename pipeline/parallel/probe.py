"""Do these ranks reach each other as those of a training would, how fast, and do their clocks agree?

`evspan.launch.doctor.probe_rank` is the command.
"""

import os
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from evspan.conf.schema.training import ParallelConfig
from evspan.pipeline.parallel.rank_env import place
from evspan.pipeline.parallel.world import World, open_world

SMALL, LARGE = 1, 1 << 22  # float32 numbers of an all-reduce
ROUNDS = {SMALL: 50, LARGE: 5}
CLOCK_ROUNDS = 5


def probe(timeout_s: int) -> dict[str, Any]:
    """What torch is here, and of all ranks: seconds of an all-reduce of few and many bytes, and this rank's clock.

    timeout_s: ranks that do not come for so long are given up. clock_s: seconds ahead of rank 0's.

    Raises:
        ConfigError: rank 0's machine has no address. LostRanksError: others are gone. RuntimeError: a wrong sum, or torch's own.
    """
    with open_world(ParallelConfig(ranks=place(os.environ).size, timeout_s=timeout_s)) as world:
        _check_sum(world)
        seconds = {size: _all_reduce_s(world, size) for size in (SMALL, LARGE)}
        return {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "gpus": torch.cuda.device_count(),
            "backend": dist.get_backend(),
            "ranks": world.size,
            "latency_us": 1e6 * seconds[SMALL],
            "gb_per_s": 4 * LARGE / seconds[LARGE] / 1e9,
            "clock_s": _clock_s(world),
        }


def _check_sum(world: World) -> None:
    x = torch.full((LARGE,), world.rank + 1.0, device=world.device)
    dist.all_reduce(x)
    expected = world.size * (world.size + 1) / 2
    if wrong := int((x != expected).sum()):
        raise RuntimeError(
            f"an all-reduce over {world.size} ranks gave {wrong} of {LARGE} sums other than {expected}"
        )


def _all_reduce_s(world: World, size: int) -> float:
    x = torch.zeros(size, device=world.device)
    _meet(world)
    began = time.perf_counter()
    for _ in range(ROUNDS[size]):
        dist.all_reduce(x)
    _finish(world)
    return (time.perf_counter() - began) / ROUNDS[size]


def _clock_s(world: World) -> float:
    """As exact as ranks leave a barrier together."""
    ahead = []
    for _ in range(CLOCK_ROUNDS):
        _meet(world)
        now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        all_ = [torch.empty_like(now) for _ in range(world.size)]
        dist.all_gather(all_, now)
        ahead.append(float(now) - float(all_[0]))
    return median(ahead)


def _meet(world: World) -> None:
    dist.barrier()
    _finish(world)


def _finish(world: World) -> None:
    if world.device.type == "cuda":  # the host only queues it
        torch.cuda.synchronize()
