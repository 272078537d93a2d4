"""BatchNorms with the statistics of several ranks: one all-reduce in forward, one in backward.

The statistics of all norms of a call are one vector, so that the number of operators hardly depends
on the number of norms. torch's kernels do the work on the maps, on every device.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from evspan.pipeline.model.autograd import run_function
from torch import Tensor, nn

# What a rank without samples adds to the sums: nothing to those of other ranks, and if no rank has
# any, tiny / tiny is no NaN.
NO_SAMPLES = 1e-300

Sum = Callable[[Tensor], Tensor]


class RankReductions(NamedTuple):
    """Reductions over ranks. All ranks call them in one order, forward and backward.

    sum: (n,) -> (n,), the sum over the ranks whose samples are normalised together, without
        gradient; None: every rank's samples are normalised alone.
    sum_over_all: the sum over all ranks, where `sum` is over fewer; None: `sum` is over all. The
        running statistics are those of all ranks' samples in any case.
    """

    sum: Sum | None
    sum_over_all: Sum | None = None


class NormCall(NamedTuple):
    """What the running statistics need of norms that ran together.

    norms: k layers. cells: h * w of each one's maps.
    means, squares: (C,) float64, C channels of all norms together, N * mean and N * (variance + eps
        + mean^2).
    frames: (1,) float64, N.
    """

    norms: list[nn.BatchNorm2d]
    cells: list[int]
    means: Tensor
    squares: Tensor
    frames: Tensor


class LocalNormCall(NamedTuple):
    """The same of norms that were normalised with this rank's samples alone.

    means, inverse_deviations: (C,) of each norm, in the dtype of its statistics. frames: N.
    """

    norms: list[nn.BatchNorm2d]
    cells: list[int]
    means: list[Tensor]
    inverse_deviations: list[Tensor]
    frames: int


def rank_norms(
    norms: Sequence[nn.BatchNorm2d],
    xs: Sequence[Tensor],
    scales: Sequence[tuple[Tensor, Tensor]],
    ranks: RankReductions,
) -> tuple[list[Tensor], NormCall | LocalNormCall]:
    """Normalises in training mode. A collective, and so is its backward, unless `sum` is None.

    Args:
        norms: layers that do not depend on each other.
        xs: (N, C, h, w), one for each layer. N is the same for all, and may be 0.
        scales: weight (C,) and bias (C,) of each layer, float32 or float64.

    Returns:
        The outputs, with shapes and dtypes of xs; and what the running statistics need.

    Raises:
        ValueError: the numbers of frames differ.
    """
    frames = {len(x) for x in xs}
    if len(frames) != 1:
        raise ValueError(f"norms that run together received {sorted(frames)} frames; give one N")
    cells = [_cells(x) for x in xs]
    if ranks.sum is None:
        return _local_norms(norms, xs, scales, cells)
    inputs: list[Tensor] = []
    for x, scale in zip(xs, scales, strict=True):
        inputs += [x, *scale]
    only_own = ranks.sum_over_all is not None
    *outputs, sums = run_function(_RankNorms, ranks.sum, only_own, norms[0].eps, *inputs)
    channels = len(sums) // 2
    return outputs, NormCall(list(norms), cells, sums[:channels], sums[channels:-1], sums[-1:])


def _local_norms(
    norms: Sequence[nn.BatchNorm2d],
    xs: Sequence[Tensor],
    scales: Sequence[tuple[Tensor, Tensor]],
    cells: list[int],
) -> tuple[list[Tensor], LocalNormCall]:
    """`rank_norms` with this rank's samples alone."""
    call = LocalNormCall(list(norms), cells, [], [], len(xs[0]))
    outputs = []
    for x, (weight, bias), norm in zip(xs, scales, norms, strict=True):
        if not len(x):
            # The gradients of weight and bias are zeros.
            outputs.append((x * _per_channel(weight) + _per_channel(bias)).to(x.dtype))
            continue
        y, mean, inverse_deviation = torch.native_batch_norm(
            x, weight, bias, None, None, True, 0.0, norm.eps
        )
        outputs.append(y)
        call.means.append(mean.detach())
        call.inverse_deviations.append(inverse_deviation.detach())
    return outputs, call


class _RankNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, total: Sum, only_own: bool, eps: float, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Normalises.

        Args:
            total: the sum over ranks; may change its argument and return it.
            only_own: the sums to return are those of this rank.
            inputs: x (N, C, h, w), weight (C,) and bias (C,) of every norm.

        Returns:
            The outputs, then means, squares and frames of `NormCall`, joined.
        """
        xs = inputs[::3]
        weights = inputs[1::3]
        biases = inputs[2::3]
        sizes = [len(weight) for weight in weights]
        own = _local_sums(xs, weights, biases, eps)
        sums = total(own.clone() if only_own else own)
        # (2, C): mean, variance + eps. The difference of two squares is exact enough in float64,
        # whatever the mean is.
        moments = (sums[:-1] / sums[-1]).view(2, -1)
        moments[1].addcmul_(moments[0], moments[0], value=-1)
        moments = moments.to(weights[0].dtype)
        means, variances = (row.split(sizes) for row in moments)
        outputs = [
            _affine(x, weight, bias, mean, variance)
            for x, weight, bias, mean, variance in zip(
                xs, weights, biases, means, variances, strict=True
            )
        ]
        ctx.total = total
        ctx.save_for_backward(*xs, *weights, moments, sums)
        ctx.mark_non_differentiable(own)
        return (*outputs, own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias.

        Those of weight and bias are of this rank's samples alone, as everywhere in the model.
        """
        *saved, moments, sums = ctx.saved_tensors
        xs = saved[: len(saved) // 2]
        weights = saved[len(saved) // 2 :]
        sizes = [len(weight) for weight in weights]
        means, variances = (row.split(sizes) for row in moments)
        inverse_deviation = moments[1].rsqrt()
        inverse_deviations = inverse_deviation.split(sizes)
        by_weight = []
        by_bias = []
        for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
            dweight, dbias = _local_gradients(
                gradients[i], x, weight, means[i], inverse_deviations[i]
            )
            by_weight.append(dweight)
            by_bias.append(dbias)
        over_ranks = ctx.total(torch.cat((*by_weight, *by_bias))).view(2, -1)
        # With x' the normalised x, dx = slope * (dy - mean(dy) - x' * mean(dy * x')).
        slope = inverse_deviation * (weights[0] if len(weights) == 1 else torch.cat(weights))
        # Negative, since the corrections are subtracted.
        layout = tuple((len(weight), -_cells(x)) for x, weight in zip(xs, weights, strict=True))
        samples = _cells_by_channel(layout, sums.device) * sums[-1]
        corrections = (over_ranks * slope).div_(samples)
        slopes = slope.split(sizes)
        factors, shifts = (row.split(sizes) for row in corrections)
        results: list[Tensor | None] = [None, None, None]
        for i, x in enumerate(xs):
            dx = _affine(x, factors[i], shifts[i], means[i], variances[i])
            dx.addcmul_(gradients[i], _per_channel(slopes[i]))
            results += [dx, by_weight[i], by_bias[i]]
        return tuple(results)


def _local_sums(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float
) -> Tensor:
    """Means, squares and frames of `NormCall`, joined, of this rank's samples."""
    frames = len(xs[0])
    if not frames:
        channels = sum(len(weight) for weight in weights)
        return _no_sums(channels, xs[0].device)
    means = []
    inverse_deviations = []
    for x, weight, bias in zip(xs, weights, biases, strict=True):
        # Of the kernels that give float32 statistics of maps in half precision, it is the only one
        # on every device. Its output is not used.
        _, mean, inverse_deviation = torch.native_batch_norm(
            x, weight, bias, None, None, True, 0.0, eps
        )
        means.append(mean)
        inverse_deviations.append(inverse_deviation)
    return _weighted_sums(means, inverse_deviations, frames)


def _weighted_sums(
    means: Sequence[Tensor], inverse_deviations: Sequence[Tensor], frames: int
) -> Tensor:
    """Means, squares and frames of `NormCall`, joined."""
    one = _one(means[0].dtype, means[0].device)
    sums = torch.cat((*means, *inverse_deviations, one)).double()
    channels = len(sums) // 2
    mean = sums[:channels]
    sums[channels:-1].pow_(-2).addcmul_(mean, mean)
    return sums.mul_(frames)


def _no_sums(channels: int, device: torch.device) -> Tensor:
    """`_weighted_sums` without samples."""
    return torch.full((2 * channels + 1,), NO_SAMPLES, dtype=torch.float64, device=device)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """weight * (x - mean) / sqrt(variance) + bias per channel, in one kernel, in the dtype of x."""
    if not len(x):
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0)[0]


def _local_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """(C,) sums over this rank's samples of dy * normalised x, and of dy."""
    if not len(x):
        return torch.zeros_like(weight), torch.zeros_like(weight)
    # As in training, with the saved statistics: CUDA's kernel does not take them as missing.
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mean, inverse_deviation, True, 0.0, [False, True, True]
    )
    return dweight, dbias


def _cells(x: Tensor) -> int:
    """h * w of maps (N, C, h, w)."""
    return x.shape[2] * x.shape[3]


def _per_channel(t: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return t.view(1, -1, 1, 1)


# -- constants, made once on the device ------------------------------------------------------------
@functools.lru_cache(maxsize=16)
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def _cells_by_channel(layout: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(C,) float64: cells of the maps, for every channel of norms with (channels, cells)."""
    with torch.inference_mode(False):
        parts = [
            torch.full((channels,), float(cells), dtype=torch.float64, device=device)
            for channels, cells in layout
        ]
        return torch.cat(parts)


# -- running statistics ----------------------------------------------------------------------------
class _Layout(NamedTuple):
    """Maps channels and norms to their calls; C channels in total.

    call_of_channel: (C,) int64. call_of_norm: (norms,) int64. cells: (C,) float64, of the maps.
    """

    call_of_channel: Tensor
    call_of_norm: Tensor
    cells: Tensor


@functools.lru_cache(maxsize=64)
def _layout(calls: tuple[tuple[tuple[int, int], ...], ...], device: torch.device) -> _Layout:
    """The layout of calls of norms with (channels, cells)."""
    call_of_channel: list[int] = []
    call_of_norm: list[int] = []
    for i, norms in enumerate(calls):
        call_of_norm += [i] * len(norms)
        call_of_channel += [i] * sum(channels for channels, _ in norms)
    with torch.inference_mode(False):
        return _Layout(
            torch.tensor(call_of_channel, device=device),
            torch.tensor(call_of_norm, device=device),
            _cells_by_channel(tuple(itertools.chain.from_iterable(calls)), device),
        )


class PendingStatistics:
    """Updates the running statistics of all norms after a forward, in a few operators.

    Args:
        momentum: weight of the new statistics.
        sum_over_all: see `RankReductions`.
    """

    def __init__(self, momentum: float, sum_over_all: Sum | None) -> None:
        self.momentum = momentum
        self.sum_over_all = sum_over_all
        self.calls: list[NormCall | LocalNormCall] = []

    def add(self, call: NormCall | LocalNormCall) -> None:
        """Keeps the statistics of norms until `update`."""
        self.calls.append(call)

    @torch.no_grad()
    def update(self) -> None:
        """Applies what was added. Norms that no rank gave a sample stay as they are.

        A collective if there is `sum_over_all`.
        """
        if not self.calls:
            return
        calls = self.calls
        self.calls = []
        norms = list(itertools.chain.from_iterable(call.norms for call in calls))
        sums = _joined(calls)
        if self.sum_over_all is not None:
            sums = self.sum_over_all(sums)
        layout = _layout(tuple(_sizes(call) for call in calls), sums.device)
        frames_of_calls = sums[-len(calls) :]
        frames = frames_of_calls[layout.call_of_channel]
        mean, square = sums[: -len(calls)].view(2, -1) / frames
        variance = torch.addcmul(square, mean, mean, value=-1).sub_(norms[0].eps)
        samples = frames * layout.cells
        unbiased = variance * (samples / (samples - 1).clamp_(min=1))
        buffers = [norm.get_buffer("running_mean") for norm in norms]
        buffers += [norm.get_buffer("running_var") for norm in norms]
        running = torch.cat(buffers).view(2, -1)
        batch = torch.stack((mean, unbiased)).to(running.dtype)
        updated = torch.where(frames > 0.5, running.lerp(batch, self.momentum), running)
        parts = torch.split(updated.flatten(), [len(buffer) for buffer in buffers])
        torch._foreach_copy_(buffers, list(parts))
        counters = [norm.get_buffer("num_batches_tracked") for norm in norms]
        counts = (frames_of_calls > 0.5).to(counters[0].dtype)[layout.call_of_norm]
        torch._foreach_add_(counters, list(counts.unbind()))


def _joined(calls: Sequence[NormCall | LocalNormCall]) -> Tensor:
    """Means and squares of all channels, then the frames of every call.

    The order is the same on every rank, however many frames it has.
    """
    means: list[Tensor] = []
    squares: list[Tensor] = []
    frames: list[Tensor] = []
    device = calls[0].norms[0].get_buffer("running_mean").device
    for number, equal_calls in itertools.groupby(calls, _local_frames):
        if number is None:
            for call in equal_calls:
                assert isinstance(call, NormCall)
                means.append(call.means)
                squares.append(call.squares)
                frames.append(call.frames)
            continue
        local = [call for call in equal_calls if isinstance(call, LocalNormCall)]
        sums = _sums_of_local(local, number, device)
        channels = len(sums) // 2
        means.append(sums[:channels])
        squares.append(sums[channels:-1])
        frames.append(sums[-1:].expand(len(local)))
    return torch.cat((*means, *squares, *frames))


def _local_frames(call: NormCall | LocalNormCall) -> int | None:
    return call.frames if isinstance(call, LocalNormCall) else None


def _sums_of_local(calls: Sequence[LocalNormCall], frames: int, device: torch.device) -> Tensor:
    """Means, squares and frames of `NormCall`, joined, of calls with equally many frames."""
    if not frames:
        norms = itertools.chain.from_iterable(call.norms for call in calls)
        return _no_sums(sum(norm.num_features for norm in norms), device)
    means = itertools.chain.from_iterable(call.means for call in calls)
    deviations = itertools.chain.from_iterable(call.inverse_deviations for call in calls)
    return _weighted_sums(list(means), list(deviations), frames)


def _sizes(call: NormCall | LocalNormCall) -> tuple[tuple[int, int], ...]:
    """(channels, cells) of every norm."""
    channels = [norm.num_features for norm in call.norms]
    return tuple(zip(channels, call.cells, strict=True))
