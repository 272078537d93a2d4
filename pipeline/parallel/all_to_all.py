"""TransposeExchange: turns "my frames of all cells" into "all frames of my cells" and back."""

import torch
import torch.nn.functional as F
from evspan.pipeline.model.state import StageState
from evspan.pipeline.parallel.collectives import all_to_all
from evspan.pipeline.parallel.reductions import gather_over_ranks
from evspan.pipeline.parallel.sequence import LSTM, STATE, Recurrence, SequenceExchange
from torch import Tensor


class TransposeExchange(SequenceExchange):
    """Two all-to-alls around a scan of the whole chunk.

    No rank waits for another one's scan, and the carry stays where it is. For recurrences that
    treat every feature cell by itself. A rank's part of a state is that of its own cells, (B, C, 1,
    n), with n = cells / ranks, rounded up; the last ranks' cells may be padding, which nothing
    reads.
    """

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        """See `Exchange.scan`.

        Args:
            x: (T, B, h, w, C), this rank's frames.
            state: this rank's part, hidden and cell (B, C, 1, n).
        """
        self._check(x)
        frames, lanes, height, width, dim = x.shape
        cells = height * width
        own_cells = self._cells_per_rank(cells)
        expected = (lanes, dim, 1, own_cells)
        if state.hidden.shape != expected:
            raise ValueError(
                f"a state of shape {tuple(state.hidden.shape)} where this rank's cells have "
                f"{expected}; make it with TransposeExchange.scatter"
            )
        padded = _padded(x.flatten(2, 3), self.ranks * own_cells, dim=2)
        blocks = padded.view(frames, lanes, self.ranks, own_cells, dim).permute(2, 0, 1, 3, 4)
        own = all_to_all(blocks, self.group, self.clock, name=LSTM)
        own = own.reshape(self.ranks * frames, lanes, 1, own_cells, dim)
        y, state = recurrence(own, state)
        y = y.reshape(self.ranks, frames, lanes, own_cells, dim)
        returned = all_to_all(y, self.group, self.clock, name=LSTM).permute(1, 2, 0, 3, 4)
        out = returned.flatten(2, 3)[:, :, :cells]
        return torch.unflatten(out, 2, (height, width)), state

    def _cells_per_rank(self, cells: int) -> int:
        return -(-cells // self.ranks)

    def _part(self, whole: Tensor) -> Tensor:
        cells = whole.flatten(2)
        own_cells = self._cells_per_rank(cells.shape[2])
        padded = _padded(cells, self.ranks * own_cells, dim=2)
        own = padded[:, :, None, self.position * own_cells : (self.position + 1) * own_cells]
        return own.clone(memory_format=torch.contiguous_format)

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        if self.group is None:
            parts = part[None]
        else:
            parts = gather_over_ranks(part, self.group, name=STATE)
        cells = torch.cat(parts.unbind(), dim=3)
        return cells[..., : shape[2] * shape[3]].reshape(shape)


def _padded(t: Tensor, size: int, *, dim: int) -> Tensor:
    """`t` with zeros appended along `dim` up to `size`."""
    missing = size - t.shape[dim]
    if not missing:
        return t
    dims_after = t.dim() - 1 - dim
    return F.pad(t, (0, 0) * dims_after + (0, missing))
