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
        gradient. It may change its argument and return it.
    """

    sum: Sum


class NormCall(NamedTuple):
    """What the running statistics need of norms that ran together.

    norms: k layers. cells: h * w of each one's maps.
    sums: (2 * C + 1,) float64 over ranks, C channels of all norms together: N * mean; N * (variance
        + eps + mean^2); N, the number of frames.
    """

    norms: list[nn.BatchNorm2d]
    cells: list[int]
    sums: Tensor


def rank_norms(
    norms: Sequence[nn.BatchNorm2d],
    xs: Sequence[Tensor],
    scales: Sequence[tuple[Tensor, Tensor]],
    ranks: RankReductions,
) -> tuple[list[Tensor], NormCall]:
    """Normalises in training mode. A collective, and so is its backward.

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
    inputs: list[Tensor] = []
    for x, scale in zip(xs, scales, strict=True):
        inputs += [x, *scale]
    *outputs, sums = run_function(_RankNorms, ranks.sum, norms[0].eps, *inputs)
    cells = [_cells(x) for x in xs]
    return outputs, NormCall(list(norms), cells, sums)


class _RankNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Sum, eps: float, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Normalises.

        Args:
            inputs: x (N, C, h, w), weight (C,) and bias (C,) of every norm.

        Returns:
            The outputs, then the sums of `NormCall`.
        """
        xs = inputs[::3]
        weights = inputs[1::3]
        biases = inputs[2::3]
        sizes = [len(weight) for weight in weights]
        sums = total(_local_sums(xs, weights, biases, eps))
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
        ctx.mark_non_differentiable(sums)
        return (*outputs, sums)

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
        by_weight = []
        by_bias = []
        for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
            dweight, dbias = _local_gradients(gradients[i], x, weight, means[i], variances[i])
            by_weight.append(dweight)
            by_bias.append(dbias)
        over_ranks = ctx.total(torch.cat((*by_weight, *by_bias))).view(2, -1)
        # With x' the normalised x, dx = slope * (dy - mean(dy) - x' * mean(dy * x')).
        slope = moments[1].rsqrt() * (weights[0] if len(weights) == 1 else torch.cat(weights))
        # Negative, since the corrections are subtracted.
        layout = tuple((len(weight), -_cells(x)) for x, weight in zip(xs, weights, strict=True))
        samples = _cells_by_channel(layout, sums.device) * sums[-1]
        corrections = (over_ranks * slope).div_(samples)
        slopes = slope.split(sizes)
        factors, shifts = (row.split(sizes) for row in corrections)
        results: list[Tensor | None] = [None, None]
        for i, x in enumerate(xs):
            dx = _affine(x, factors[i], shifts[i], means[i], variances[i])
            dx.addcmul_(gradients[i], _per_channel(slopes[i]))
            results += [dx, by_weight[i], by_bias[i]]
        return tuple(results)


def _local_sums(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float
) -> Tensor:
    """The sums of `NormCall` of this rank's samples."""
    frames = len(xs[0])
    channels = sum(len(weight) for weight in weights)
    device = xs[0].device
    if not frames:
        return torch.full((2 * channels + 1,), NO_SAMPLES, dtype=torch.float64, device=device)
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
    one = _one(weights[0].dtype, device)
    sums = torch.cat((*means, *inverse_deviations, one)).double()
    mean = sums[:channels]
    sums[channels:-1].pow_(-2).addcmul_(mean, mean)
    return sums.mul_(frames)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """weight * (x - mean) / sqrt(variance) + bias per channel, in one kernel, in the dtype of x."""
    if not len(x):
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0)[0]


def _local_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """(C,) sums over this rank's samples of dy * normalised x, and of dy."""
    if not len(x):
        return torch.zeros_like(weight), torch.zeros_like(weight)
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, variance, None, None, False, 0.0, [False, True, True]
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
    """Where the statistics of C channels lie in the joined sums of calls.

    moments: (2 * C,) int64, of the means and of the mean squares. frames: (C,) int64, of N.
    first: (norms,) int64, the first channel of each norm. cells: (C,) float64.
    """

    moments: Tensor
    frames: Tensor
    first: Tensor
    cells: Tensor


@functools.lru_cache(maxsize=64)
def _layout(calls: tuple[tuple[tuple[int, int], ...], ...], device: torch.device) -> _Layout:
    """The layout of calls of norms with (channels, cells)."""
    means: list[int] = []
    squares: list[int] = []
    frames: list[int] = []
    first: list[int] = []
    start = 0
    channel = 0
    for norms in calls:
        channels = sum(size for size, _ in norms)
        means += range(start, start + channels)
        squares += range(start + channels, start + 2 * channels)
        frames += [start + 2 * channels] * channels
        start += 2 * channels + 1
        for size, _ in norms:
            first.append(channel)
            channel += size
    flat = tuple(itertools.chain.from_iterable(calls))
    with torch.inference_mode(False):
        return _Layout(
            torch.tensor(means + squares, device=device),
            torch.tensor(frames, device=device),
            torch.tensor(first, device=device),
            _cells_by_channel(flat, device),
        )


class RunningStatistics:
    """Updates the running statistics of all norms after a forward, in a few operators.

    Args:
        momentum: weight of the new statistics.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.calls: list[NormCall] = []

    def add(self, call: NormCall) -> None:
        """Keeps the statistics of norms until `update`."""
        self.calls.append(call)

    @torch.no_grad()
    def update(self) -> None:
        """Applies what was added. Norms that no rank gave a sample stay as they are."""
        if not self.calls:
            return
        norms = list(itertools.chain.from_iterable(call.norms for call in self.calls))
        sums = torch.cat([call.sums for call in self.calls])
        layout = _layout(tuple(_layout_of(call) for call in self.calls), sums.device)
        self.calls.clear()
        frames = sums[layout.frames]
        mean, square = sums[layout.moments].view(2, -1) / frames
        variance = torch.addcmul(square, mean, mean, value=-1).sub_(norms[0].eps)
        samples = frames * layout.cells
        unbiased = variance * (samples / (samples - 1).clamp_(min=1))
        buffers = [norm.get_buffer("running_mean") for norm in norms]
        buffers += [norm.get_buffer("running_var") for norm in norms]
        running = torch.cat(buffers).view(2, -1)
        batch = torch.stack((mean, unbiased)).to(running.dtype)
        has_samples = frames > 0.5
        updated = torch.where(has_samples, running.lerp(batch, self.momentum), running)
        sizes = [len(buffer) for buffer in buffers]
        torch._foreach_copy_(buffers, list(torch.split(updated.flatten(), sizes)))
        counters = [norm.get_buffer("num_batches_tracked") for norm in norms]
        counts = has_samples[layout.first].to(counters[0].dtype)
        torch._foreach_add_(counters, list(counts.unbind()))


def _layout_of(call: NormCall) -> tuple[tuple[int, int], ...]:
    sizes = [norm.num_features for norm in call.norms]
    return tuple(zip(sizes, call.cells, strict=True))
