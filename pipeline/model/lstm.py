"""The recurrence of a stage: an LSTM per feature cell, all frames of a chunk in one kernel where that can be."""

import functools

import torch
import torch.nn.functional as F
from evspan.pipeline.model.sequence_protocol import Recurrence
from evspan.pipeline.model.state import StageState
from torch import Tensor, nn

CACHE_BYTES = 2**20  # of the cells that are walked through at a time, on CPU

Near = (
    tuple[Tensor, Tensor | None] | None
)  # weight and bias of the 3x3 convolution on the hidden state


class CellLSTM(nn.Module):
    """An LSTM per feature cell (Shi et al. 2015 with 1x1 gates): order forget, input, output (sigmoid), candidate (tanh)."""

    def __init__(self, dim: int, *, dws_conv: bool, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.conv3x3_dws = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if dws_conv else None
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)
        with torch.no_grad():
            self.conv1x1.bias[:dim] += forget_bias  # type: ignore[index]  # there is one

    def forward(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """x: (T, B, h, w, C) -> hidden states of the same shape, and the state after the last frame.

        Without conv3x3_dws every cell (h, w) is on its own, so any subset of them may be handed in.
        """
        return self.recurrence()(x, state)

    def recurrence(self) -> Recurrence:
        """`forward`, its weights read here and now. Under ZeRO-3 reading is a collective, and in a scan ranks wait for each other
        in another order."""
        near = (
            None if self.conv3x3_dws is None else (self.conv3x3_dws.weight, self.conv3x3_dws.bias)
        )
        weight, bias = self.conv1x1.weight.flatten(1), self.conv1x1.bias
        return functools.partial(_cell_lstm, weight, bias, near)  # type: ignore[arg-type]  # there is a bias


def truncated(recurrence: Recurrence, frames: int) -> Recurrence:
    """The same states, but gradients flow back through `frames` frames at most: as if the chunk had been cut there."""

    def pieces(x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        out = []
        for piece in x.split(frames):
            y, state = recurrence(piece, StageState(*(t.detach() for t in state)))
            out.append(y)
        return torch.cat(out), state

    return pieces


def _cell_lstm(
    weight: Tensor, bias: Tensor, near: Near, x: Tensor, state: StageState
) -> tuple[Tensor, StageState]:
    # One layout whatever the state went through (a checkpoint, a collective): the same bits come out.
    hidden, cell = (t.permute(0, 2, 3, 1).contiguous() for t in state)
    if near is not None or torch.compiler.is_compiling():
        out, hidden, cell = _lstm_steps(weight, bias, near, x, hidden, cell)
    else:
        out, hidden, cell = _fused_lstm(weight, bias, x, hidden, cell)
    return out, StageState(hidden.permute(0, 3, 1, 2), cell.permute(0, 3, 1, 2))


def _fused_lstm(
    weight: Tensor, bias: Tensor, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's LSTM over time, a sequence per cell: oneDNN's or cuDNN's, a fixed number of kernels however long.

    On CPU some cells at a time, all their frames: what oneDNN keeps of them for backward stays in the cache.
    """
    dim = x.shape[-1]
    order = [
        slice(k * dim, (k + 1) * dim) for k in (1, 0, 3, 2)
    ]  # theirs: input, forget, candidate, output
    weight, bias = torch.cat([weight[k] for k in order]), torch.cat([bias[k] for k in order])
    weights = [
        weight[:, :dim].contiguous(),
        weight[:, dim:].contiguous(),
        bias,
        torch.zeros_like(bias),
    ]
    cells, start = x.flatten(1, -2), [t.reshape(1, -1, dim) for t in (hidden, cell)]
    at_once = (
        max(256, CACHE_BYTES // (len(x) * dim * x.element_size()))
        if x.is_cpu
        else max(1, cells.shape[1])
    )
    parts = [
        torch.lstm(
            some.contiguous(), [h, c], weights, True, 1, 0.0, torch.is_grad_enabled(), False, False
        )
        for some, h, c in zip(*(t.split(at_once, dim=1) for t in (cells, *start)), strict=True)
    ]
    out, last_hidden, last_cell = (
        t[0] if len(t) == 1 else torch.cat(t, dim=1) for t in zip(*parts, strict=True)
    )
    return out.view(x.shape), last_hidden.view(hidden.shape), last_cell.view(cell.shape)


def _lstm_steps(
    weight: Tensor, bias: Tensor, near: Near, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The input half of the gates in one product; the hidden half step by step."""
    dim, out = x.shape[-1], []
    for gates in F.linear(x, weight[:, :dim], bias).unbind(0):
        if near is not None:
            hidden = F.conv2d(hidden.permute(0, 3, 1, 2), *near, padding=1, groups=dim).permute(
                0, 2, 3, 1
            )
        forget, write, read, candidate = (gates + F.linear(hidden, weight[:, dim:])).chunk(
            4, dim=-1
        )
        cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
        hidden = read.sigmoid() * cell.tanh()
        out.append(hidden)
    return torch.stack(out), hidden, cell
