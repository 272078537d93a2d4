"""Sums, gathers and broadcasts over all ranks, without gradients."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, on every rank; shape and dtype of x. All ranks call it in one order."""
    if dist.get_world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def add_over_ranks(x: Tensor) -> Tensor:
    """`sum_over_ranks` into x itself."""
    if dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_over_ranks(x: Tensor) -> Tensor:
    """(n,) -> (ranks, n), the parts of all ranks, on every rank."""
    if dist.get_world_size() == 1:
        return x.detach()[None]
    parts = x.new_empty(dist.get_world_size(), *x.shape)
    dist.all_gather(list(parts.unbind(0)), x.detach().contiguous())
    return parts


def gather_objects(part: T) -> list[T]:
    """The (pickled) parts of all ranks, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [part]
    parts = [part] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def broadcast_object(value: T) -> T:
    """Rank 0's (pickled) value, on every rank."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Waits for all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()


def deal(items: Sequence[T], rank: int, size: int, *, weight: Sequence[int]) -> list[T]:
    """This rank's part of `items`; every rank computes the same distribution.

    Heaviest first, each item goes to the rank with the smallest sum of weights.
    """
    loads = [0] * size
    parts: list[list[T]] = [[] for _ in range(size)]
    for i in sorted(range(len(items)), key=lambda i: (-weight[i], i)):
        target = loads.index(min(loads))
        loads[target] += weight[i]
        parts[target].append(items[i])
    return parts[rank]
