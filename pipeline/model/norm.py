"""BatchNorm whose training statistics can be taken over all ranks, and over batches of no samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOMENTUM, EPS = 0.1, 1e-5


class RankReductions(NamedTuple):
    """How a BatchNorm speaks with those of the other ranks. All ranks call them in one order, forward and backward.

    gather: (n,) -> (ranks, n), alike on every rank. sum: (n,) -> (n,), the sum over ranks. Neither carries gradients.
    """

    gather: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]


ALONE = RankReductions(gather=lambda t: t[None], sum=lambda t: t)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d; with `ranks` its batch is that of all ranks."""

    ranks: RankReductions | None = None

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (self.ranks is None and x.numel()):
            return super().forward(x)
        y, mean, unbiased, count = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.ranks or ALONE)
        self._track(mean, unbiased, count > 0)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor, any_samples: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        share = any_samples * MOMENTUM  # no `if`: asking a GPU whether there were samples would wait for it
        self.running_mean.lerp_(mean.to(self.running_mean), share.to(self.running_mean))
        self.running_var.lerp_(unbiased.to(self.running_var), share.to(self.running_var))
        self.num_batches_tracked += any_samples


class _GlobalBatchNorm(torch.autograd.Function):
    """One exchange forward (count, mean and squared deviations of every rank) and one backward (two sums per channel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor,
                ranks: RankReductions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        here = wide.new_tensor([x.numel() // x.shape[1]])
        local = wide.sum((0, 2, 3)) / here.clamp(min=1)
        spread = (wide - _channel(local)).square().sum((0, 2, 3))
        counts, means, spreads = ranks.gather(torch.cat((here, local, spread))).split([1, x.shape[1], x.shape[1]], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count.clamp(min=1)
        # Chan et al. 1979: exact whatever the ranks' means, where a sum of squares would cancel.
        total = (spreads + counts * (means - mean).square()).sum(0)
        rstd = torch.rsqrt(total / count.clamp(min=1) + EPS)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.ranks = ranks
        scale = rstd * weight
        y = torch.addcmul(_channel(bias - mean * scale), wide, _channel(scale)).to(x.dtype)
        unbiased = total / (count - 1).clamp(min=1)
        ctx.mark_non_differentiable(mean, unbiased, count)
        return y, mean, unbiased, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        dy, wide = gradient.to(mean.dtype), x.to(mean.dtype)
        sums = torch.stack((dy.sum((0, 2, 3)), (dy * (wide - _channel(mean))).sum((0, 2, 3))))
        over_ranks = ctx.ranks.sum(sums.flatten()).view_as(sums) / count.clamp(min=1)
        slope = -over_ranks[1] * rstd.square()
        shift = -over_ranks[0] - slope * mean
        scale = _channel(rstd * weight)
        dx = (dy + torch.addcmul(_channel(shift), wide, _channel(slope))) * scale
        return dx.to(x.dtype), (sums[1] * rstd).to(weight.dtype), sums[0].to(weight.dtype), None


def _channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def global_batch_norms(module: nn.Module, ranks: RankReductions | None) -> None:
    """Let every BatchNorm2d below `module` take its statistics over all ranks."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.ranks = ranks
