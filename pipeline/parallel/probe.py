"""Measures the connection between ranks as training uses it, and the difference of their clocks.

`evspan.launch.doctor.probe_rank` is the command.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from evspan.conf.schema.training import ParallelConfig
from evspan.pipeline.parallel.probe_names import BETWEEN_NODES, IN_NODE
from evspan.pipeline.parallel.rank_env import rank_info
from evspan.pipeline.parallel.reductions import gather_over_ranks
from evspan.pipeline.parallel.world import World, open_world

# Sizes of the collectives (float32 numbers of a rank), and how often each is repeated.
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
        rank 0's. links: IN_NODE, BETWEEN_NODES -> `_measure_link` of the ranks of this rank's node
        and of the first ranks of all nodes; only where this rank has others there.

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
            "links": _links(world, timeout_s),
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
    return _seconds(world, None, lambda: dist.all_reduce(x), ROUNDS[size])


def _seconds(
    world: World, group: dist.ProcessGroup | None, run: Callable[[], object], rounds: int
) -> float:
    """Mean seconds of a collective that `run` starts. group: None for all ranks."""
    dist.barrier(group)
    _synchronize(world)
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    _synchronize(world)
    return (time.perf_counter() - start) / rounds


# -- links -----------------------------------------------------------------------------------------
def _links(world: World, timeout_s: int) -> dict[str, dict[str, float]]:
    """Measures the ranks of each node, all nodes at once, then the first ranks of the nodes."""
    measured = {}
    for name, groups in _link_ranks(world).items():
        for ranks in groups:
            # All ranks create all groups in one order: new_group is a collective.
            group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
            if world.rank in ranks:
                measured[name] = _measure_link(world, group, len(ranks))
        dist.barrier()
    return measured


def _link_ranks(world: World) -> dict[str, list[list[int]]]:
    """The groups of each link, equal on all ranks: those of two or more ranks."""
    own = torch.tensor([rank_info(os.environ).local], device=world.device)
    nodes: list[list[int]] = []
    everywhere = gather_over_ranks(own, name="local numbers of the ranks")
    for rank, local in enumerate(everywhere.flatten().tolist()):
        if local == 0 or not nodes:  # ranks of a node are consecutive
            nodes.append([])
        nodes[-1].append(rank)
    groups = {IN_NODE: nodes, BETWEEN_NODES: [[ranks[0] for ranks in nodes]]}
    return {name: [ranks for ranks in many if len(ranks) > 1] for name, many in groups.items()}


def _measure_link(world: World, group: dist.ProcessGroup, size: int) -> dict[str, float]:
    """An all-reduce and an all-to-all of a group.

    Returns:
        all_reduce_gb_per_s, all_to_all_gb_per_s: bytes that a rank sends, per second. An all-reduce
        over n ranks of x bytes sends 2 (n - 1) / n * x (a ring), an all-to-all (n - 1) / n * x.
        all_reduce_us, all_to_all_us: time of a small one.
    """
    share = (size - 1) / size
    result = {}
    for name, sent_share in (("all_reduce", 2 * share), ("all_to_all", share)):
        large = LARGE // size * size
        seconds = {
            numbers: _seconds(world, group, _collective(name, world, group, numbers), rounds)
            for numbers, rounds in ((size, ROUNDS[SMALL]), (large, ROUNDS[LARGE]))
        }
        result[f"{name}_us"] = round(1e6 * seconds[size], 1)
        result[f"{name}_gb_per_s"] = round(sent_share * 4 * large / seconds[large] / 1e9, 4)
    return result


def _collective(
    name: str, world: World, group: dist.ProcessGroup, numbers: int
) -> Callable[[], object]:
    """Starts the named collective of `numbers` float32 numbers of each rank."""
    x = torch.zeros(numbers, device=world.device)
    if name == "all_reduce":
        return lambda: dist.all_reduce(x, group=group)
    received = torch.empty_like(x)
    return lambda: dist.all_to_all_single(received, x, group=group)


def _clock_s(world: World) -> float:
    """Seconds ahead of rank 0's clock; as exact as ranks leave a barrier together."""
    differences = []
    for _ in range(CLOCK_ROUNDS):
        _barrier(world)
        now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        times = gather_over_ranks(now, name="clocks of the ranks")
        differences.append(float(now) - float(times[0]))
    return median(differences)


def _barrier(world: World) -> None:
    dist.barrier()
    _synchronize(world)


def _synchronize(world: World) -> None:
    """Waits for the device, to which the host only queues collectives."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
