"""Sums and agreements over all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, on every rank; carries no gradient. All ranks must call it in one order."""
    if dist.get_world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_ranks(x: Tensor) -> Tensor:
    """(n,) -> (ranks, n), the parts of all ranks, on every rank; carries no gradient."""
    if dist.get_world_size() == 1:
        return x.detach()[None]
    parts = x.new_empty(dist.get_world_size(), *x.shape)
    dist.all_gather(list(parts.unbind(0)), x.detach().contiguous())
    return parts


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks where it is true on one."""
    value = torch.tensor([int(flag)], device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(part: Any) -> list[Any]:
    """The parts of all ranks, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box: list[Any] = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def deal(items: Sequence[Any], rank: int, size: int, *, weight: Sequence[int]) -> list[Any]:
    """This rank's share of `items`: heaviest first, each to the rank that has least; the same answer on all ranks."""
    loads, shares = [0] * size, [[] for _ in range(size)]  # type: ignore[var-annotated]
    for i in sorted(range(len(items)), key=lambda i: (-weight[i], i)):
        target = loads.index(min(loads))
        loads[target] += weight[i]
        shares[target].append(items[i])
    return shares[rank]
