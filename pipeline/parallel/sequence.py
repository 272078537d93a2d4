"""A sequence over the ranks of a group: what the two exchanges have in common. Results are exact.

Rank s of S holds frames [s * T / S, (s + 1) * T / S) of every chunk of T frames. A canonical state
is that of `Detector.initial_state`, as one rank would hold it; between chunks a rank holds only its
part of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from evspan.pipeline.model.sequence_protocol import Recurrence
from evspan.pipeline.model.state import DetectorState, StageState, map_state
from evspan.pipeline.parallel.collectives import Clock, all_to_all
from evspan.pipeline.parallel.flight_recorder import recorded
from evspan.pipeline.parallel.mesh import Mesh
from torch import Tensor

__all__ = ["LSTM", "STATE", "Recurrence", "SequenceExchange"]

# Names of the collectives of both exchanges.
LSTM = "exchange of the LSTMs"
ATTENTION = "earlier frames of the attention"
STATE = "state between chunks"


class SequenceExchange(ABC):
    """What the detector calls (`evspan.pipeline.model.sequence_protocol.Exchange`), and its state.

    All ranks of the group make the same calls in one order. Gradients flow through all of them.

    Args:
        mesh: this rank's position.
        frames: of a chunk, on every rank.
    """

    def __init__(self, mesh: Mesh, *, frames: int) -> None:
        self.ranks = mesh.sequence_size
        self.position = mesh.sequence  # of this rank in the sequence
        self.members = mesh.ranks
        self.group = mesh.group
        self.device = mesh.device
        self.frames = frames
        self.clock = Clock()

    @property
    def first(self) -> bool:
        """Whether this rank holds the chunk's first frames."""
        return self.position == 0

    @property
    def last(self) -> bool:
        """Whether this rank holds the chunk's last frames."""
        return self.position == self.ranks - 1

    # -- called by the model -----------------------------------------------------------------------
    @abstractmethod
    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        """See `Exchange.scan`; `state` is this rank's part."""

    def previous(
        self, tails: Sequence[Tensor], carries: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `Exchange.previous`. Only the first rank's carries have a meaning.

        A rank may hold fewer frames than attention reads: they then come from several ranks, or
        from the carry. The frames of all scales travel in one message.

        Args:
            tails: per scale (looks_back, B, C, h, w), this rank's last frames.
            carries: the same shapes.
        """
        frames_back = len(tails[0])
        start = self.position * self.frames
        own = range(start, start + self.frames)[-frames_back:]
        held = [*own]
        rows = _frames_as_rows([tail[frames_back - len(own) :] for tail in tails])
        if self.first:
            held = [*range(-frames_back, 0), *own]
            rows = torch.cat((_frames_as_rows(carries), rows))
        expected = [self._expected_frames(rank, frames_back) for rank in range(self.ranks)]
        sent_rows: list[int] = []
        num_sent = []
        for frames in expected:
            to_rank = [held.index(f) for f in frames if self._holder(f) == self.position]
            sent_rows += to_rank
            num_sent.append(len(to_rank))
        holders = [self._holder(f) for f in expected[self.position]]
        num_received = [holders.count(rank) for rank in range(self.ranks)]
        row_list = rows.unbind(0)
        packed = torch.stack([row_list[row] for row in sent_rows])
        received = all_to_all(
            packed,
            self.group,
            self.clock,
            name=ATTENTION,
            send=num_sent,
            receive=num_received,
        )
        befores = _rows_as_frames(received[:frames_back], tails)
        if self.first:
            carries = _rows_as_frames(received[frames_back:], tails)
        return befores, list(carries)

    def _expected_frames(self, rank: int, frames_back: int) -> list[int]:
        """Frames that `rank` receives, counted from the chunk's first one; -1 is the carry's last.

        Those before the rank's first frame; then, on the first rank, the next carry. Their holders
        are in the same order, so they arrive in it.
        """
        start = rank * self.frames
        end = self.ranks * self.frames
        frames = [*range(start - frames_back, start)]
        if rank == 0:
            frames += range(end - frames_back, end)
        return frames

    def _holder(self, frame: int) -> int:
        """The rank that holds a frame of the chunk, or of the carry (negative)."""
        return max(frame, 0) // self.frames

    # -- the state between chunks ------------------------------------------------------------------
    def scatter(self, state: DetectorState) -> DetectorState:
        """This rank's part of a canonical state. Not a collective: every rank has the whole."""
        stages = tuple(StageState(self._part(s.hidden), self._part(s.cell)) for s in state.stages)
        if self.first:
            previous = tuple(t.clone() for t in state.previous)
        else:
            previous = tuple(torch.zeros_like(t) for t in state.previous)
        return DetectorState(stages, previous)

    def gather(self, state: DetectorState, like: DetectorState) -> DetectorState:
        """The canonical state, on every rank of the group; carries no gradient. A collective.

        Args:
            state: this rank's part.
            like: a canonical state; only its shapes are read (it may be on the meta device).
        """
        state = map_state(Tensor.detach, state)
        stages = []
        for part, shape in zip(state.stages, like.stages, strict=True):
            hidden = self._whole(part.hidden, shape.hidden.shape)
            cell = self._whole(part.cell, shape.cell.shape)
            stages.append(StageState(hidden, cell))
        previous = tuple(self._broadcast(0, t, t.shape) for t in state.previous)
        return DetectorState(tuple(stages), previous)

    @abstractmethod
    def _part(self, whole: Tensor) -> Tensor:
        """This rank's part of a stage's hidden or cell (B, C, h, w)."""

    @abstractmethod
    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_part`; `shape` is the whole's."""

    def _broadcast(self, position: int, t: Tensor, shape: torch.Size) -> Tensor:
        """`t` of the rank at `position` of the sequence."""
        if self.position == position:
            t = t.clone(memory_format=torch.contiguous_format)
        else:
            t = t.new_empty(shape)
        if self.group is not None:
            with recorded(STATE, "broadcast", t, group=self.group):
                dist.broadcast(t, self.members[position], group=self.group)
        return t

    def _check(self, x: Tensor) -> None:
        if len(x) != self.frames:
            raise ValueError(
                f"this rank received {len(x)} frames, but every rank of its sequence holds "
                f"{self.frames}"
            )


def _frames_as_rows(maps: Sequence[Tensor]) -> Tensor:
    """Per scale (n, B, C, h, w) -> (n, values of a frame at all scales)."""
    return torch.cat([t.flatten(1) for t in maps], dim=1)


def _rows_as_frames(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_frames_as_rows`; per scale shaped as `like`."""
    parts = torch.split(rows, [t[0].numel() for t in like], dim=1)
    return [torch.unflatten(part, 1, t.shape[1:]) for part, t in zip(parts, like, strict=True)]
