"""Sums, gathers and broadcasts over all ranks, without gradients."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from evspan.conf.errors import LostRanksError
from evspan.pipeline.parallel.collective_time import collective
from evspan.pipeline.parallel.flight_recorder import recorded
from torch import Tensor

T = TypeVar("T")

MOST_BYTES = 1 << 26  # of the JSON text that a rank sends
FOREIGN = (
    "A process that is no rank of this run may use its ports; run the same command again, "
    "on nodes that no one else uses"
)

# all_gather_into_tensor is deprecated where torch has all_gather_single.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_over_ranks(x: Tensor, *, name: str = "") -> Tensor:
    """The sum over ranks, on every rank; shape and dtype of x. All ranks call it in one order.

    Args:
        name: what it is for, in the diagnosis of a run that hangs.
    """
    if dist.get_world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    with collective(), recorded(name, "all-reduce", total):
        dist.all_reduce(total)
    return total


def add_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None, *, name: str = "") -> Tensor:
    """`sum_over_ranks` into x itself. group: None: all ranks."""
    if dist.get_world_size(group) > 1:
        with collective(), recorded(name, "all-reduce", x, group=group):
            dist.all_reduce(x, group=group)
    return x


def gather_over_ranks(
    x: Tensor, group: dist.ProcessGroup | None = None, *, name: str = ""
) -> Tensor:
    """(...) -> (ranks, ...), the parts of all ranks of `group`, on every rank.

    Args:
        group: None: all ranks.
        name: as of `sum_over_ranks`.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return x.detach()[None]
    # One tensor: a list of parts would be filled by a copy per rank.
    parts = x.new_empty(ranks * x.numel())
    with collective(), recorded(name, "all-gather", x, group=group):
        _all_gather(parts, x.detach().contiguous().view(-1), group=group)
    return parts.view(ranks, *x.shape)


def gather_json(part: T, *, name: str = "", most_bytes: int = MOST_BYTES) -> list[T]:
    """The parts of all ranks, in rank order, on every rank. Two collectives, as many with any size.

    Nothing is unpickled: whoever reaches the ranks' ports could run code otherwise.

    Args:
        part: JSON values; tuples arrive as lists. A world of one rank returns it as it is.
        name: as of `sum_over_ranks`.
        most_bytes: of the text of one part.

    Raises:
        LostRanksError: a part is too large, or no JSON: it is not from a rank of this run.
    """
    if dist.get_world_size() == 1:
        return [part]
    parts = gather_bytes(json.dumps(part).encode(), name=name, most_bytes=most_bytes)
    return [_parsed(text, rank) for rank, text in enumerate(parts)]


def broadcast_json(value: T, *, name: str = "") -> T:
    """Rank 0's value, on every rank. Two collectives.

    Args:
        value: JSON values; read on rank 0 only. Tuples arrive as lists on the other ranks.
        name: as of `sum_over_ranks`.

    Raises:
        LostRanksError: the value is too large, or no JSON: it is not from rank 0 of this run.
    """
    if dist.get_world_size() == 1:
        return value
    device = _collective_device()
    is_source = dist.get_rank() == 0
    text = json.dumps(value).encode() if is_source else b""
    size = torch.tensor([len(text)], dtype=torch.int64, device=device)
    with recorded(f"size of {name}", "broadcast", size):
        dist.broadcast(size, src=0)
    num_bytes = _checked_size(int(size), 0, MOST_BYTES)
    packed = _as_tensor(text, num_bytes).to(device)
    with recorded(name, "broadcast", packed):
        dist.broadcast(packed, src=0)
    received: T = value if is_source else _parsed(_as_bytes(packed.cpu()), 0)
    return received


def gather_bytes(part: bytes, *, most_bytes: int, name: str = "") -> list[bytes]:
    """The parts of all ranks, in rank order, on every rank. Two collectives.

    Args:
        part: of any length up to most_bytes; the ranks' lengths may differ.
        name: as of `sum_over_ranks`.

    Raises:
        LostRanksError: a part is too large.
    """
    if dist.get_world_size() == 1:
        return [part]
    device = _collective_device()
    size = torch.tensor([len(part)], dtype=torch.int64, device=device)
    sizes = [
        _checked_size(size, rank, most_bytes)
        for rank, size in enumerate(
            gather_over_ranks(size, name=f"sizes of {name}").flatten().tolist()
        )
    ]
    rows = gather_over_ranks(_as_tensor(part, max(sizes)).to(device), name=name).cpu()
    return [_as_bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def _collective_device() -> torch.device:
    """Where the process group takes tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _as_tensor(data: bytes, size: int) -> Tensor:
    """(size,) uint8, filled up with zeros."""
    padded = bytearray(data.ljust(size, b"\0"))
    return torch.frombuffer(padded, dtype=torch.uint8) if padded else torch.empty(0).byte()


def _as_bytes(x: Tensor) -> bytes:
    return x.numpy().tobytes()


def _checked_size(size: int, rank: int, most_bytes: int) -> int:
    if not 0 <= size <= most_bytes:
        raise LostRanksError(
            f"rank {rank} announces {size} bytes, and {most_bytes} is the most that this run "
            f"sends. {FOREIGN}"
        )
    return size


def _parsed(text: bytes, rank: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LostRanksError(
            f"rank {rank} sent {len(text)} bytes that are no JSON ({error}). {FOREIGN}"
        ) from error


def barrier(name: str = "") -> None:
    """Waits for all ranks. name: as of `sum_over_ranks`."""
    if dist.get_world_size() > 1:
        with recorded(name, "barrier"):
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
