"""The world as data x sequence: which lanes and which of their frames a rank works on."""

from dataclasses import dataclass, field
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from evspan.conf.schema.layout import check_layout
from evspan.pipeline.parallel.flight_recorder import recorded
from evspan.pipeline.parallel.world import World

# Of a world: (ranks per sequence, timeout in s) -> this rank's sequence group and its ranks.
_Groups = dict[tuple[int, int], tuple[dist.ProcessGroup, tuple[int, ...]]]
_groups: WeakKeyDictionary[dist.ProcessGroup, _Groups] = WeakKeyDictionary()


def _cpu() -> torch.device:
    return torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """This rank's position among the data and sequence groups.

    Attributes:
        data, data_size: index and number of the data groups.
        sequence, sequence_size: index of this rank in its sequence group, and the group's size.
        ranks: the world ranks of the sequence group, the one with the first frames first.
        group: their process group; None when this rank is alone in it.
        device: where its collectives take tensors.
    """

    data: int
    data_size: int
    sequence: int
    sequence_size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    device: torch.device = field(default_factory=_cpu)

    def lanes(self, batch_size: int) -> range:
        """This rank's lanes, those of its data group, of the world's `batch_size`."""
        return _equal_part(batch_size, self.data, self.data_size)

    def frames(self, sequence_length: int) -> range:
        """This rank's frames of a chunk's `sequence_length`."""
        return _equal_part(sequence_length, self.sequence, self.sequence_size)


def _equal_part(total: int, index: int, parts: int) -> range:
    if total % parts:
        raise ValueError(f"{total} do not divide over {parts}; check_layout refuses this earlier")
    length = total // parts
    return range(index * length, (index + 1) * length)


def _sequence_group(
    world: World, sequence: int, timeout_s: int
) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
    """The process group of this rank's sequence, and its members. A collective.

    A later mesh of the same world gets the same group: torch does not free one before its world.
    """
    assert dist.group.WORLD is not None
    existing = _groups.setdefault(dist.group.WORLD, {})
    key = (sequence, timeout_s)
    if key not in existing:
        # All ranks create all groups in one order: new_group is a collective.
        for first in range(0, world.size, sequence):
            ranks = tuple(range(first, first + sequence))
            with recorded("start of the sequence groups", "new group"):
                created = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s))
            if world.rank in ranks:
                existing[key] = (created, ranks)
    return existing[key]


def open_mesh(world: World, *, sequence: int, timeout_s: int) -> Mesh:
    """Cuts the world into sequence groups. Call it on every rank, inside `open_world`.

    Consecutive ranks share a sequence: launchers number the ranks node by node, so a group is on
    one node where it fits.

    Args:
        sequence: ranks per sequence.
        timeout_s: a collective of the group that waits longer ends the run.

    Raises:
        ConfigError: the world's size is not a multiple of `sequence`.
    """
    check_layout(
        ranks=world.size, sequence=sequence, sequence_length=sequence, batch_size=world.size
    )
    group: dist.ProcessGroup | None = None
    members: tuple[int, ...] = (world.rank,)
    if sequence > 1:
        group, members = _sequence_group(world, sequence, timeout_s)
    return Mesh(
        data=world.rank // sequence,
        data_size=world.size // sequence,
        sequence=world.rank % sequence,
        sequence_size=sequence,
        ranks=members,
        group=group,
        device=world.device,
    )
