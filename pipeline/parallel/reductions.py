"""Sums, gathers and broadcasts over all ranks, without gradients."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# all_gather_into_tensor is deprecated where torch has all_gather_single.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, on every rank; shape and dtype of x. All ranks call it in one order."""
    if dist.get_world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def add_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`sum_over_ranks` into x itself. group: None: all ranks."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def gather_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(...) -> (ranks, ...), the parts of all ranks of `group`, on every rank.

    Args:
        group: None: all ranks.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return x.detach()[None]
    # One tensor: a list of parts would be filled by a copy per rank.
    parts = x.new_empty(ranks * x.numel())
    _all_gather(parts, x.detach().contiguous().view(-1), group=group)
    return parts.view(ranks, *x.shape)


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
