"""The recurrence of a stage: an LSTM per feature cell, in one kernel per chunk where possible."""

import functools

import torch
import torch.nn.functional as F
from evspan.pipeline.model.sequence_protocol import Recurrence
from evspan.pipeline.model.state import StageState
from torch import Tensor, nn

CACHE_BYTES = 2**20  # of the cells that are processed at a time, on CPU
# Sequences per call on a GPU. cuDNN documents no limit of their number. It refuses more than
# 2**16 - 1 frames (pytorch issue 133751), the size of a grid dimension, which is safe here too.
MOST_SEQUENCES = 2**16 - 1
# Values of a tensor per call on a GPU: cuDNN indexes with 32 bits. The largest one is the gates.
MOST_VALUES = 2**31 - 1

# Weight and bias of the 3x3 depthwise convolution on the hidden state.
Depthwise = tuple[Tensor, Tensor | None]


class CellLSTM(nn.Module):
    """An LSTM per feature cell (Shi et al. 2015 with 1x1 gates).

    The order of the gates is forget, input, output (sigmoid), candidate (tanh).
    """

    def __init__(self, dim: int, *, dws_conv: bool, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.conv3x3_dws = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if dws_conv else None
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)
        with torch.no_grad():
            self.conv1x1.get_parameter("bias")[:dim] += forget_bias

    def forward(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """Runs all frames of a chunk.

        Without conv3x3_dws the cells (h, w) do not depend on each other, so x may hold any subset
        of them.

        Args:
            x: (T, B, h, w, C).
            state: hidden and cell, (B, C, h, w).

        Returns:
            The hidden states, shaped as x, and the state after the last frame.
        """
        return self.recurrence()(x, state)

    def recurrence(self) -> Recurrence:
        """`forward` as a function, with the weights read now.

        Under ZeRO-3 reading them is a collective, and inside a scan ranks wait for each other in
        another order.
        """
        depthwise = None
        if self.conv3x3_dws is not None:
            depthwise = (self.conv3x3_dws.weight, self.conv3x3_dws.bias)
        weight = self.conv1x1.weight.flatten(1)
        bias = self.conv1x1.get_parameter("bias")
        return functools.partial(_cell_lstm, weight, bias, depthwise)


def truncated(recurrence: Recurrence, frames: int) -> Recurrence:
    """Limits how far gradients of `recurrence` flow back; the states stay the same.

    Gradients are those of a chunk that is cut into chunks of `frames` frames.
    """

    def run(x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        outputs = []
        for piece in torch.split(x, frames):
            state = StageState(state.hidden.detach(), state.cell.detach())
            y, state = recurrence(piece, state)
            outputs.append(y)
        return torch.cat(outputs), state

    return run


def _cell_lstm(
    weight: Tensor, bias: Tensor, depthwise: Depthwise | None, x: Tensor, state: StageState
) -> tuple[Tensor, StageState]:
    """`CellLSTM.forward`. weight: (4 * C, 2 * C), bias: (4 * C,) of the gates on [x, hidden]."""
    check_recurrence(x, state)
    # One memory layout, whatever layout a checkpoint or a collective left the state in: results are
    # bit-identical.
    hidden = state.hidden.permute(0, 2, 3, 1).contiguous()
    cell = state.cell.permute(0, 2, 3, 1).contiguous()
    if depthwise is not None or torch.compiler.is_compiling():
        out, hidden, cell = _lstm_steps(weight, bias, depthwise, x, hidden, cell)
    else:
        out, hidden, cell = _fused_lstm(weight, bias, x, hidden, cell)
    return out, StageState(hidden.permute(0, 3, 1, 2), cell.permute(0, 3, 1, 2))


def check_recurrence(x: Tensor, state: StageState) -> None:
    """Checks the state against x (T, B, h, w, C): oneDNN reads beyond a state that is too small.

    Raises:
        ValueError: another shape or dtype.
    """
    _, lanes, height, width, dim = x.shape
    for name, tensor in state._asdict().items():
        if tensor.shape != (lanes, dim, height, width) or tensor.dtype != x.dtype:
            raise ValueError(
                f"the {name} state is {tuple(tensor.shape)} {tensor.dtype} for inputs of "
                f"{tuple(x.shape)} {x.dtype}; it must be {(lanes, dim, height, width)} {x.dtype}"
            )


def _fused_lstm(
    weight: Tensor, bias: Tensor, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's LSTM (oneDNN, cuDNN) over time, one sequence per cell: a fixed number of kernels.

    In bfloat16 that needs torch 2.10 and cuDNN 9.13; torch steps through the frames otherwise.
    It runs on some cells at a time, all their frames: on CPU so that what oneDNN stores of them for
    backward stays in the cache, on a GPU no more than cuDNN takes.

    Args:
        x: (T, B, h, w, C).
        hidden, cell: (B, h, w, C).

    Returns:
        The hidden states, shaped as x, and the last hidden and cell.
    """
    dim = x.shape[-1]
    weights = _torch_weights(weight, bias)
    cells = x.flatten(1, -2)  # (T, n, C)
    values_per_cell = max(1, len(x)) * dim
    if x.is_cpu:
        at_once = max(256, CACHE_BYTES // (values_per_cell * x.element_size()))
    else:
        most = min(MOST_SEQUENCES, MOST_VALUES // (4 * values_per_cell))
        at_once = even_part(cells.shape[1], most)
    parts = zip(
        parts_of(cells, at_once, dim=1),
        parts_of(hidden.reshape(1, -1, dim), at_once, dim=1),
        parts_of(cell.reshape(1, -1, dim), at_once, dim=1),
        strict=True,
    )
    outputs = []
    last_hidden = []
    last_cell = []
    keep = torch.is_grad_enabled()
    for part, h, c in parts:
        # has_biases, num_layers, dropout, train, bidirectional, batch_first
        y, h, c = torch.lstm(part.contiguous(), [h, c], weights, True, 1, 0.0, keep, False, False)
        outputs.append(y)
        last_hidden.append(h)
        last_cell.append(c)
    return (
        _joined(outputs).view(x.shape),
        _joined(last_hidden).view(hidden.shape),
        _joined(last_cell).view(cell.shape),
    )


def even_part(total: int, most: int) -> int:
    """Size of the fewest parts of `total` that hold at most `most` each; they differ little."""
    parts = -(-max(1, total) // max(1, most))
    return -(-max(1, total) // parts)


def parts_of(t: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """torch.split, but `t` itself if it is one part: the backward of a split copies."""
    return (t,) if t.shape[dim] <= size else torch.split(t, size, dim)


def _torch_weights(weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Weights of torch's LSTM: input and hidden state (4 * C, C) each, two biases (4 * C,).

    Args:
        weight, bias: (4 * C, 2 * C) and (4 * C,), in our order of the gates.
    """
    dim = weight.shape[1] // 2
    # torch's order is input, forget, candidate, output: each pair of ours the other way round.
    rows = weight.view(2, 2, dim, 2, dim).flip(1)
    of_input, of_hidden = rows.permute(3, 0, 1, 2, 4).contiguous().view(2, 4 * dim, dim).unbind()
    bias = bias.view(2, 2, dim).flip(1).flatten()
    return [of_input, of_hidden, bias, torch.zeros_like(bias)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _lstm_steps(
    weight: Tensor,
    bias: Tensor,
    depthwise: Depthwise | None,
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_fused_lstm` with the input half of the gates in one product, the hidden half by step."""
    dim = x.shape[-1]
    outputs = []
    for gates in F.linear(x, weight[:, :dim], bias).unbind(0):
        if depthwise is not None:
            maps = hidden.permute(0, 3, 1, 2)
            mixed = F.conv2d(maps, *depthwise, padding=1, groups=dim)
            hidden = mixed.permute(0, 2, 3, 1)
        gates = gates + F.linear(hidden, weight[:, dim:])
        forget, write, read, candidate = gates.chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
        hidden = read.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs), hidden, cell
