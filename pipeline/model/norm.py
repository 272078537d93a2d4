"""BatchNorm whose statistics can be taken over all ranks, and over batches without samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from evspan.pipeline.model.autograd import run_function
from torch import Tensor, nn

MOMENTUM = 0.1
EPS = 1e-5


class RankReductions(NamedTuple):
    """Reductions over the ranks. All ranks call them in one order, forward and backward.

    gather: (n,) -> (ranks, n), the same on every rank. sum: (n,) -> (n,), the sum over ranks.
    Neither carries gradients.
    """

    gather: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]


ONE_RANK = RankReductions(gather=lambda t: t[None], sum=lambda t: t)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d; with `ranks` its statistics are those of all ranks' samples.

    The maps, the parameters and the statistics may each have their own dtype.

    Attributes:
        ranks: the reductions; None: this rank alone.
        shared: inside `shared_norm_work`, which also counts the batch, `scale_and_shift`; else
            None.
    """

    ranks: RankReductions | None = None
    shared: tuple[Tensor, Tensor] | None = None

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape and dtype; N may be 0 in training."""
        return self.of_one_rank(x) if self.is_plain else batch_norms((self,), (x,))[0]

    @property
    def is_plain(self) -> bool:
        """Whether no other rank's samples count: torch's own kernel runs."""
        return self.ranks is None or not self.training

    def of_one_rank(self, x: Tensor) -> Tensor:
        """`forward` with the statistics of x alone, in one kernel."""
        weight, bias = self.shared or self.scale_and_shift()
        if self.training and x.numel() == 0:
            # The gradients of weight and bias are zeros. No sample, no change of the statistics.
            return (x * _per_channel(weight) + _per_channel(bias)).to(x.dtype)
        if self.training and not self.shared:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, weight, bias, self.training, MOMENTUM, EPS)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in the dtype of the statistics, as torch's kernels need them.

        DeepSpeed casts the parameters to half precision, and leaves the statistics in float32.
        """
        dtype = _statistics_dtype(self)
        return self.weight.to(dtype), self.bias.to(dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, unbiased: Tensor, any_samples: Tensor) -> None:
        """Updates the running statistics.

        Args:
            mean, unbiased: (C,) mean and unbiased variance of the batch.
            any_samples: () bool; False changes nothing.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # A product instead of `if`: reading the flag from a GPU would block.
        weight = any_samples * MOMENTUM
        self.running_mean.lerp_(mean.to(self.running_mean), weight.to(self.running_mean))
        self.running_var.lerp_(unbiased.to(self.running_var), weight.to(self.running_var))
        self.num_batches_tracked += any_samples


@contextmanager
def shared_norm_work(norms: Sequence[BatchNorm2d], *, num_samples: int) -> Iterator[None]:
    """While open, each of the norms runs once, on `num_samples` frames.

    A training step of one rank casts the parameters of all norms and counts the batch in three
    operators instead of five per norm.
    """
    alone = [norm for norm in norms if norm.training and norm.ranks is None]
    if not alone:
        yield
        return
    if num_samples:
        torch._foreach_add_([_counter(norm) for norm in alone], 1)
    for norm, pair in zip(alone, _scales_and_shifts(alone), strict=True):
        norm.shared = pair
    try:
        yield
    finally:
        for norm in alone:
            norm.shared = None


def _counter(norm: BatchNorm2d) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked


def _statistics_dtype(norm: BatchNorm2d) -> torch.dtype:
    assert norm.running_mean is not None
    return norm.running_mean.dtype


def _scales_and_shifts(norms: Sequence[BatchNorm2d]) -> list[tuple[Tensor, Tensor]]:
    """`scale_and_shift` of every norm, with one cast for all."""
    parameters: list[Tensor] = []
    for norm in norms:
        parameters += [norm.weight, norm.bias]
    dtype = _statistics_dtype(norms[0])
    if any(parameter.dtype != dtype for parameter in parameters):
        sizes = [parameter.numel() for parameter in parameters]
        parameters = [*torch.cat(parameters).to(dtype).split(sizes)]
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def batch_norms(norms: Sequence[BatchNorm2d], xs: Sequence[Tensor]) -> list[Tensor]:
    """[norm(x), ...] of layers that do not depend on each other.

    Over ranks they share one exchange in forward and one in backward.

    Args:
        xs: (N, C, h, w), one for each layer; sizes may differ.

    Returns:
        The same shapes and dtypes.
    """
    pairs = list(zip(norms, xs, strict=True))
    if all(norm.is_plain for norm in norms):
        return [norm(x) for norm, x in pairs]
    inputs: list[Tensor] = []
    for norm, x in pairs:
        inputs += [x, norm.weight, norm.bias]
    results = run_function(_GlobalBatchNorms, norms[0].ranks or ONE_RANK, *inputs)
    for i, norm in enumerate(norms):
        first = len(norms) + 3 * i
        mean, unbiased, count = results[first : first + 3]
        norm.track(mean, unbiased, count > 0)
    return list(results[: len(norms)])


class _GlobalBatchNorms(torch.autograd.Function):
    """Several BatchNorms with one exchange in forward and one in backward.

    Forward gathers count, mean and squared deviations of every rank; backward sums two values per
    channel.
    """

    @staticmethod
    def forward(ctx: Any, ranks: RankReductions, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Normalises.

        Args:
            inputs: x (N, C, h, w), weight (C,) and bias (C,) of every norm.

        Returns:
            The outputs, then mean (C,), unbiased variance (C,) and sample count () of every norm.
        """
        groups = [inputs[i : i + 3] for i in range(0, len(inputs), 3)]
        local_moments = torch.cat([_local_moments(_wide(x)) for x, _, _ in groups])
        moments_of_ranks = ranks.gather(local_moments)
        outputs = []
        moments = []
        saved = []
        start = 0
        for x, weight, bias in groups:
            channels = x.shape[1]
            end = start + 1 + 2 * channels
            sizes = [1, channels, channels]
            counts, means, spreads = torch.split(moments_of_ranks[:, start:end], sizes, dim=1)
            start = end
            count = counts.sum()
            mean = (counts * means).sum(0) / count.clamp(min=1)
            # Chan et al. 1979: exact for any means of the ranks; a sum of squares would cancel.
            total = (spreads + counts * (means - mean).square()).sum(0)
            rstd = torch.rsqrt(total / count.clamp(min=1) + EPS)
            scale = rstd * weight
            shift = bias - mean * scale
            out = torch.addcmul(_per_channel(shift), _wide(x), _per_channel(scale))
            outputs.append(out.to(x.dtype))
            moments += [mean, total / (count - 1).clamp(min=1), count]
            saved += [x, weight, mean, rstd, count]
        ctx.ranks = ranks
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*moments)
        return (*outputs, *moments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        groups = [saved[i : i + 5] for i in range(0, len(saved), 5)]
        sums = []
        for gradient, (x, _, mean, _, _) in zip(gradients, groups, strict=False):
            dy = _wide(gradient)
            sums += [dy.sum((0, 2, 3)), (dy * (_wide(x) - _per_channel(mean))).sum((0, 2, 3))]
        over_ranks = torch.split(ctx.ranks.sum(torch.cat(sums)), [len(s) for s in sums])
        results: list[Tensor | None] = [None]
        for i, (gradient, group) in enumerate(zip(gradients, groups, strict=False)):
            x, weight, mean, rstd, count = group
            mean_dy = over_ranks[2 * i] / count.clamp(min=1)
            mean_dy_x = over_ranks[2 * i + 1] / count.clamp(min=1)
            slope = -mean_dy_x * rstd.square()
            shift = -mean_dy - slope * mean
            change = torch.addcmul(_per_channel(shift), _wide(x), _per_channel(slope))
            dx = (_wide(gradient) + change) * _per_channel(rstd * weight)
            dweight = sums[2 * i + 1] * rstd
            dbias = sums[2 * i]
            results += [dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)]
        return tuple(results)


def _local_moments(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (1 + 2 * C,): count, mean, sum of squared deviations from it."""
    count = x.new_tensor([x.numel() // x.shape[1]])
    mean = x.sum((0, 2, 3)) / count.clamp(min=1)
    return torch.cat((count, mean, (x - _per_channel(mean)).square().sum((0, 2, 3))))


def _wide(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _per_channel(t: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return t.view(1, -1, 1, 1)


def global_batch_norms(module: nn.Module, ranks: RankReductions | None) -> None:
    """Makes every BatchNorm2d below `module` take its statistics over all ranks.

    Args:
        ranks: the reductions; None: this rank alone.
    """
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.ranks = ranks
