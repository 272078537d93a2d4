"""TransposeExchange: my frames of all cells <-> all frames of my cells."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from evspan.pipeline.model.state import StageState
from evspan.pipeline.parallel.collectives import all_to_all
from evspan.pipeline.parallel.sequence import Recurrence, SequenceExchange
from torch import Tensor


class TransposeExchange(SequenceExchange):
    """Two all-to-alls around a scan of the whole chunk: no rank waits for another's frames, and the carry never moves.

    For recurrences that treat every feature cell by itself. A rank's part of a state is that of its own cells,
    (B, C, 1, n): n = cells / ranks, rounded up; the last ranks' may be padding, which nothing reads.
    """

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        self._check(x)
        frames, lanes, height, width, dim = x.shape
        cells, mine = height * width, self._mine(height * width)
        if state.hidden.shape != (lanes, dim, 1, mine):
            raise ValueError(
                f"a state of shape {tuple(state.hidden.shape)} where this rank's cells have "
                f"{(lanes, dim, 1, mine)}; make it with TransposeExchange.scatter"
            )
        blocks = _padded(x.flatten(2, 3), self.ranks * mine, dim=2).view(
            frames, lanes, self.ranks, mine, dim
        )
        own = all_to_all(blocks.permute(2, 0, 1, 3, 4), self.group, self.clock)
        y, state = recurrence(own.reshape(self.ranks * frames, lanes, 1, mine, dim), state)
        back = all_to_all(
            y.reshape(self.ranks, frames, lanes, mine, dim), self.group, self.clock
        ).permute(1, 2, 0, 3, 4)
        return back.flatten(2, 3)[:, :, :cells].unflatten(2, (height, width)), state

    def _mine(self, cells: int) -> int:
        return -(-cells // self.ranks)

    def _part(self, whole: Tensor) -> Tensor:
        cells = whole.flatten(2)
        mine = self._mine(cells.shape[2])
        padded = _padded(cells, self.ranks * mine, dim=2)
        return padded[:, :, None, self.place * mine : (self.place + 1) * mine].clone(
            memory_format=torch.contiguous_format
        )

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        parts = [part]
        if self.group is not None:
            parts = [
                torch.empty_like(part, memory_format=torch.contiguous_format)
                for _ in range(self.ranks)
            ]
            dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=3)[..., : shape[2] * shape[3]].reshape(shape)


def _padded(t: Tensor, size: int, *, dim: int) -> Tensor:
    """`t` with zeros behind it along `dim`."""
    missing = size - t.shape[dim]
    return F.pad(t, (0, 0) * (t.dim() - 1 - dim) + (0, missing)) if missing else t
