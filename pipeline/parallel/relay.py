"""RelayExchange: the state goes from rank to rank, in slices, so that ranks work in a wavefront."""

import torch
from evspan.pipeline.model.state import StageState
from evspan.pipeline.parallel.collectives import Form, Mail, receive_along, send_along
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.sequence import Recurrence, SequenceExchange
from torch import Tensor

SLICES_PER_RANK = 2  # with S ranks and K slices a scan takes (K + S - 1) / K of its time on a rank that never waits


class RelayExchange(SequenceExchange):
    """A scan of a rank's own frames, slice by slice: receive the slice's state from the rank before, scan, hand it on.

    Only states travel. A slice is some of the cells; with `whole_maps` (recurrences that look at neighbouring cells), some of
    the lanes: with one lane ranks then wait for each other's whole scan. Between chunks the last rank keeps the state; on the
    others it has no cells, (B, C, 0, 0). It moves when the next chunk begins, when nobody has to wait for it any more.
    """

    def __init__(
        self, mesh: Mesh, *, frames: int, whole_maps: bool, slices: int | None = None
    ) -> None:
        super().__init__(mesh, frames=frames)
        self.whole_maps, self.slices = whole_maps, slices or SLICES_PER_RANK * mesh.sequence_size
        self.mail = Mail(mesh.group, self.clock)

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        self._check(x)
        if self.ranks == 1:
            return recurrence(x, state)
        self.mail.settle()  # of the scan before: long since received
        if torch.is_grad_enabled() and not x.requires_grad:
            x = (
                x.detach().requires_grad_()
            )  # the messages' gradients travel along x's, on all ranks or on none
        dtypes = state.hidden.dtype, state.cell.dtype
        x, state = self._begin(x, state)
        before = (
            [StageState(*pair) for pair in zip(*map(self._slices_of_state, state), strict=True)]
            if self.first
            else []
        )
        outputs, after = [], []
        for i, part in enumerate(self._slices_of_frames(x)):
            if self.first:
                given = before[i]
            else:
                part, hidden, cell = receive_along(
                    part, _forms(part, dtypes), self.mail, self.members[self.place - 1]
                )
                given = StageState(hidden, cell)
            y, end = recurrence(part, given)
            if self.last:
                after.append(end)
            else:
                message = [t.to(dtype) for t, dtype in zip(end, dtypes, strict=True)]
                y = send_along(y, message, self.mail, self.members[self.place + 1])
            outputs.append(y)
        return self._joined(outputs, x), self._end(after, x, dtypes)

    def _begin(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """The state moves from the last rank to the first; its gradients go back where it has any, on all ranks or on none."""
        forms, wanted = (
            _forms(x, (state.hidden.dtype, state.cell.dtype)),
            state.hidden.requires_grad,
        )
        if self.last:
            if wanted:
                x = send_along(x, state, self.mail, self.members[0])
            else:
                self.mail.send(state, self.members[0])
        elif self.first:
            if wanted:
                x, *got = receive_along(x, forms, self.mail, self.members[-1])
            else:
                got = list(self.mail.receive(forms, self.members[-1], x.device))
            state = StageState(*got)
        return x, state

    def _end(
        self, after: list[StageState], x: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> StageState:
        if not self.last:  # of x, so that it requires gradients where the last rank's does; cloned, so that it keeps no storage
            nothing = x[0, :, :0, :0].permute(0, 3, 1, 2).clone()
            return StageState(nothing.to(dtypes[0]), nothing.to(dtypes[1]))
        if self.whole_maps:
            return StageState(*(torch.cat(parts) for parts in zip(*after, strict=True)))
        return StageState(
            *(
                torch.cat(parts, dim=3).unflatten(3, tuple(x.shape[2:4])).squeeze(2)
                for parts in zip(*after, strict=True)
            )
        )

    def _slices_of_frames(self, x: Tensor) -> list[Tensor]:
        """(T, B, h, w, C) -> per slice (T, B, 1, n, C), or (T, n, h, w, C) of whole maps."""
        if self.whole_maps:
            return [t.contiguous() for t in x.split(self._length(x.shape[1]), dim=1)]
        cells = x.flatten(2, 3)
        return [
            t[:, :, None].contiguous() for t in cells.split(self._length(cells.shape[2]), dim=2)
        ]

    def _slices_of_state(self, t: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) -> per slice (B, C, 1, n), or (n, C, h, w) of whole maps."""
        if self.whole_maps:
            return t.split(self._length(len(t)))
        cells = t.flatten(2)[:, :, None]
        return cells.split(self._length(cells.shape[3]), dim=3)

    def _length(self, total: int) -> int:
        return -(-total // self.slices)

    def _joined(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return (
            torch.cat(outputs, dim=1)
            if self.whole_maps
            else torch.cat(outputs, dim=3).view(x.shape)
        )

    def _part(self, whole: Tensor) -> Tensor:
        return whole.clone() if self.last else whole.new_empty(*whole.shape[:2], 0, 0)

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        return self._from(self.ranks - 1, part, shape)


def _forms(x: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Form]:
    """Of the states that belong to x (T, B, h, w, C)."""
    _, lanes, height, width, dim = x.shape
    return [(torch.Size((lanes, dim, height, width)), dtype) for dtype in dtypes]
