"""The world as data x sequence: which lanes and which of their frames a rank works on."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from evspan.conf.schema.layout import check_layout
from evspan.pipeline.parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """Rank `sequence` of the `sequence_size` that share the sequences of data group `data` of `data_size`.

    ranks: the world ranks of this sequence group, that with the first frames first. group: their process group; None when
    this rank is alone in it. device: where its collectives take tensors.
    """

    data: int
    data_size: int
    sequence: int
    sequence_size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    device: torch.device = torch.device("cpu")

    def lanes(self, batch_size: int) -> range:
        """This rank's of the world's `batch_size` lanes: those of its data group."""
        return _share(batch_size, self.data, self.data_size)

    def frames(self, sequence_length: int) -> range:
        """This rank's of a chunk's `sequence_length` frames."""
        return _share(sequence_length, self.sequence, self.sequence_size)


def _share(total: int, index: int, parts: int) -> range:
    if total % parts:
        raise ValueError(f"{total} do not divide over {parts}; check_layout tells it in time")
    each = total // parts
    return range(index * each, (index + 1) * each)


def open_mesh(world: World, *, sequence: int, timeout_s: int) -> Mesh:
    """Cut the world into groups of `sequence` ranks. Call it on every rank, once, inside `open_world`.

    Consecutive ranks share a sequence: launchers number the ranks node by node, so a group lies on one node where it fits.

    Args:
        timeout_s: a collective of the group that waits longer ends the run.
    Raises:
        ConfigError: the world is no multiple of `sequence`.
    """
    check_layout(
        ranks=world.size, sequence=sequence, sequence_length=sequence, batch_size=world.size
    )
    data, place = divmod(world.rank, sequence)
    mine: dist.ProcessGroup | None = None
    members: tuple[int, ...] = (world.rank,)
    if sequence > 1:
        for first in range(
            0, world.size, sequence
        ):  # all ranks make all groups, in one order: new_group is a collective
            ranks = tuple(range(first, first + sequence))
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s))
            if world.rank in ranks:
                mine, members = group, ranks
    return Mesh(data, world.size // sequence, place, sequence, members, mine, world.device)
