"""RelayExchange: the state goes from rank to rank in slices, so that ranks work in a wavefront."""

import torch
from evspan.pipeline.model.state import StageState
from evspan.pipeline.parallel.collectives import (
    P2PChannel,
    TensorSpec,
    receive_along,
    send_along,
)
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.sequence import LSTM, Recurrence, SequenceExchange
from torch import Tensor

# With S ranks and K slices, a scan takes (K + S - 1) / K of the time that a rank spends computing.
SLICES_PER_RANK = 2

StateDtypes = tuple[torch.dtype, torch.dtype]  # of hidden and cell


class RelayExchange(SequenceExchange):
    """A scan of a rank's own frames, slice by slice.

    For each slice a rank receives the state from the previous rank, scans, and sends the state on.
    Only states are sent. A slice is some of the cells. With `whole_maps`, for recurrences that read
    neighbouring cells, it is some of the lanes; with one lane, ranks then wait for each other's
    whole scan.

    Between chunks the last rank holds the state; on the others it has no cells, (B, C, 0, 0). It
    moves when the next chunk begins, when nobody has to wait for it.

    Args:
        frames: of a chunk, on every rank.
        whole_maps: slices are lanes instead of cells.
        slices: number of slices; None: SLICES_PER_RANK per rank.
    """

    def __init__(
        self, mesh: Mesh, *, frames: int, whole_maps: bool, slices: int | None = None
    ) -> None:
        super().__init__(mesh, frames=frames)
        self.whole_maps = whole_maps
        self.slices = slices or SLICES_PER_RANK * mesh.sequence_size
        self.channel = P2PChannel(mesh.group, self.clock, name=LSTM)

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        """See `Exchange.scan`.

        Args:
            x: (T, B, h, w, C), this rank's frames.
            state: hidden and cell (B, C, h, w) on the last rank, (B, C, 0, 0) on the others.
        """
        self._check(x)
        if self.ranks == 1:
            return recurrence(x, state)
        self.channel.wait()  # messages of the previous scan, received long ago
        if torch.is_grad_enabled() and not x.requires_grad:
            # The messages' gradients travel along those of x, on all ranks or on none.
            x = x.detach().requires_grad_()
        dtypes = (state.hidden.dtype, state.cell.dtype)
        x, state = self._move_state(x, state)
        first_states = self._slices_of_state(state) if self.first else []
        outputs = []
        ends = []
        for i, part in enumerate(self._slices_of_frames(x)):
            if self.first:
                start = first_states[i]
            else:
                previous = self.members[self.position - 1]
                specs = _state_specs(part, dtypes)
                part, hidden, cell = receive_along(part, specs, self.channel, previous)
                start = StageState(hidden, cell)
            y, end = recurrence(part, start)
            if self.last:
                ends.append(end)
            else:
                message = [t.to(dtype) for t, dtype in zip(end, dtypes, strict=True)]
                y = send_along(y, message, self.channel, self.members[self.position + 1])
            outputs.append(y)
        return self._joined(outputs, x), self._end_state(ends, x, dtypes)

    def _move_state(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """Moves the state from the last rank to the first.

        Its gradients go back if it has any, on all ranks or on none.
        """
        specs = _state_specs(x, (state.hidden.dtype, state.cell.dtype))
        with_gradients = state.hidden.requires_grad
        first, last = self.members[0], self.members[-1]
        if self.last:
            if with_gradients:
                x = send_along(x, state, self.channel, first)
            else:
                self.channel.send(state, first)
        elif self.first:
            if with_gradients:
                x, hidden, cell = receive_along(x, specs, self.channel, last)
            else:
                hidden, cell = self.channel.receive(specs, last, x.device)
            state = StageState(hidden, cell)
        return x, state

    def _end_state(self, ends: list[StageState], x: Tensor, dtypes: StateDtypes) -> StageState:
        """The state after the chunk from those of the slices."""
        if not self.last:
            # Made of x, so that it requires gradients where the last rank's does; cloned, so that
            # it keeps no storage alive.
            empty = x[0, :, :0, :0].permute(0, 3, 1, 2).clone()
            return StageState(empty.to(dtypes[0]), empty.to(dtypes[1]))
        hidden = [end.hidden for end in ends]
        cell = [end.cell for end in ends]
        return StageState(self._joined_maps(hidden, x), self._joined_maps(cell, x))

    def _joined_maps(self, parts: list[Tensor], x: Tensor) -> Tensor:
        """The inverse of `_slices_of_map`, for maps of the size of x (T, B, h, w, C)."""
        if self.whole_maps:
            return torch.cat(parts)
        cells = torch.cat(parts, dim=3)
        return torch.unflatten(cells, 3, tuple(x.shape[2:4])).squeeze(2)

    def _slices_of_frames(self, x: Tensor) -> list[Tensor]:
        """(T, B, h, w, C) -> per slice (T, B, 1, n, C), or (T, n, h, w, C) of whole maps."""
        if self.whole_maps:
            lanes = torch.split(x, self._slice_length(x.shape[1]), dim=1)
            return [t.contiguous() for t in lanes]
        cells = x.flatten(2, 3)
        parts = torch.split(cells, self._slice_length(cells.shape[2]), dim=2)
        return [t[:, :, None].contiguous() for t in parts]

    def _slices_of_state(self, state: StageState) -> list[StageState]:
        """The state of each slice."""
        hidden = self._slices_of_map(state.hidden)
        cell = self._slices_of_map(state.cell)
        return [StageState(h, c) for h, c in zip(hidden, cell, strict=True)]

    def _slices_of_map(self, t: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) -> per slice (B, C, 1, n), or (n, C, h, w) of whole maps."""
        if self.whole_maps:
            return torch.split(t, self._slice_length(len(t)))
        cells = t.flatten(2)[:, :, None]
        return torch.split(cells, self._slice_length(cells.shape[3]), dim=3)

    def _slice_length(self, total: int) -> int:
        return -(-total // self.slices)

    def _joined(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        """The inverse of `_slices_of_frames`."""
        if self.whole_maps:
            return torch.cat(outputs, dim=1)
        return torch.cat(outputs, dim=3).view(x.shape)

    def _part(self, whole: Tensor) -> Tensor:
        return whole.clone() if self.last else whole.new_empty(*whole.shape[:2], 0, 0)

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        return self._broadcast(self.ranks - 1, part, shape)


def _state_specs(x: Tensor, dtypes: StateDtypes) -> list[TensorSpec]:
    """Shape and dtype of hidden and cell that belong to x (T, B, h, w, C)."""
    _, lanes, height, width, dim = x.shape
    return [(torch.Size((lanes, dim, height, width)), dtype) for dtype in dtypes]
