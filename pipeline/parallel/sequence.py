"""A sequence over the ranks of a group, exactly: what the model's exchanges have in common, and the choice of one.

Rank s of S holds frames [s * T/S, (s+1) * T/S) of every chunk of T. A canonical state is that of `Detector.initial_state`, as
one rank would hold it; between chunks a rank keeps only its part of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from evspan.pipeline.model.state import DetectorState, StageState, map_state
from evspan.pipeline.parallel.collectives import Clock, all_to_all
from evspan.pipeline.parallel.mesh import Mesh
from torch import Tensor

Recurrence = Callable[[Tensor, StageState], tuple[Tensor, StageState]]


class SequenceExchange(ABC):
    """What the detector calls (evspan.pipeline.model.sequence_protocol says what each call means), and its state between chunks.

    All ranks of the group make the same calls in one order. Gradients flow through all of them.

    Args:
        frames: of a chunk, on every rank.
    """

    def __init__(self, mesh: Mesh, *, frames: int) -> None:
        self.ranks, self.place, self.members, self.group = (
            mesh.sequence_size,
            mesh.sequence,
            mesh.ranks,
            mesh.group,
        )
        self.device, self.frames, self.clock = mesh.device, frames, Clock()

    @property
    def first(self) -> bool:
        return self.place == 0

    @property
    def last(self) -> bool:
        return self.place == self.ranks - 1

    # -- what the model calls ------------------------------------------------------------------------------------
    @abstractmethod
    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]: ...

    def previous(self, tail: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """Only the first rank's carry means anything. A rank may hold fewer frames than are looked back at: they then come
        from several ranks, or from the carry."""
        back = len(tail)
        mine = range(self.place * self.frames, (self.place + 1) * self.frames)[-back:]
        held, rows = [*range(-back, 0), *mine] if self.first else [*mine], tail[back - len(mine) :]
        if self.first:
            rows = torch.cat((carry, rows))
        wanted = [self._wanted(rank, back) for rank in range(self.ranks)]
        sends = [
            [held.index(p) for p in frames if self._holder(p) == self.place] for frames in wanted
        ]
        comes = [
            sum(self._holder(p) == rank for p in wanted[self.place]) for rank in range(self.ranks)
        ]
        each = rows.unbind(0)
        packed = torch.stack([each[row] for to in sends for row in to])
        got = all_to_all(
            packed, self.group, self.clock, send=[len(to) for to in sends], receive=comes
        )
        return got[:back], got[back:] if self.first else carry

    def _wanted(self, rank: int, back: int) -> list[int]:
        """Places in the chunk, the carry's frames being -back .. -1: those before the rank's first frame; then the next carry,
        which the first rank keeps. Their holders' order is theirs, so they arrive in it."""
        start, end = rank * self.frames, self.ranks * self.frames
        return [*range(start - back, start), *(range(end - back, end) if rank == 0 else ())]

    def _holder(self, place: int) -> int:
        return max(place, 0) // self.frames

    def following(self, labelled: Tensor, frames: int) -> Tensor:
        """Which of the `frames` frames after this rank's last one predictions are wanted of; of the next chunk's, maybe all.

        Args:
            labelled: (T, B) bool, this rank's.
        Returns:
            (frames, B) bool.
        """
        whole = [labelled]
        if self.group is not None:
            mine = labelled.to(self.device).contiguous()
            whole = [torch.empty_like(mine) for _ in range(self.ranks)]
            dist.all_gather(whole, mine, group=self.group)
        later = [part.to(labelled.device) for part in whole[self.place + 1 :]]
        after = torch.cat((*later, labelled.new_ones(frames, labelled.shape[1])))
        return after[:frames]

    # -- the state between chunks --------------------------------------------------------------------------------
    def scatter(self, state: DetectorState) -> DetectorState:
        """This rank's part of a canonical state. Not a collective: every rank has the whole."""
        stages = tuple(StageState(self._part(s.hidden), self._part(s.cell)) for s in state.stages)
        return DetectorState(
            stages, tuple(t.clone() if self.first else torch.zeros_like(t) for t in state.previous)
        )

    def gather(self, state: DetectorState, like: DetectorState) -> DetectorState:
        """The canonical state, on every rank of the group; carries no gradient. A collective.

        Args:
            state: this rank's part. like: a canonical state; only its shapes count (it may lie on the meta device).
        """
        state = map_state(Tensor.detach, state)
        stages = tuple(
            StageState(
                self._whole(s.hidden, shape.hidden.shape), self._whole(s.cell, shape.cell.shape)
            )
            for s, shape in zip(state.stages, like.stages, strict=True)
        )
        return DetectorState(stages, tuple(self._from(0, t, t.shape) for t in state.previous))

    @abstractmethod
    def _part(self, whole: Tensor) -> Tensor:
        """Of a stage's hidden or cell (B, C, h, w)."""

    @abstractmethod
    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_part`."""

    def _from(self, place: int, t: Tensor, shape: torch.Size) -> Tensor:
        """t of the group's rank `place`."""
        t = (
            t.clone(memory_format=torch.contiguous_format)
            if self.place == place
            else t.new_empty(shape)
        )
        if self.group is not None:
            dist.broadcast(t, self.members[place], group=self.group)
        return t

    def _check(self, x: Tensor) -> None:
        if len(x) != self.frames:
            raise ValueError(
                f"this rank was handed {len(x)} frames, but every rank of its sequence holds {self.frames}"
            )
