"""BatchNorm whose training statistics can be taken over all ranks, and over batches of no samples."""

from collections.abc import Callable, Sequence
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
        return super().forward(x) if self.is_plain(x) else batch_norms((self,), (x,))[0]

    def is_plain(self, x: Tensor) -> bool:
        """torch's own does it. In training it wants samples, and statistics (float32 under DeepSpeed) in the weight's dtype."""
        assert self.running_mean is not None
        return not self.training or (
            self.ranks is None and x.numel() > 0 and self.weight.dtype == self.running_mean.dtype
        )

    @torch.no_grad()
    def track(self, mean: Tensor, unbiased: Tensor, any_samples: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share = (
            any_samples * MOMENTUM
        )  # no `if`: asking a GPU whether there were samples would wait for it
        self.running_mean.lerp_(mean.to(self.running_mean), share.to(self.running_mean))
        self.running_var.lerp_(unbiased.to(self.running_var), share.to(self.running_var))
        self.num_batches_tracked += any_samples


def batch_norms(norms: Sequence[BatchNorm2d], xs: Sequence[Tensor]) -> list[Tensor]:
    """[norm(x), ...] of layers that do not wait for each other: over ranks, they share one exchange each way."""
    if all(norm.is_plain(x) for norm, x in zip(norms, xs, strict=True)):
        return [norm(x) for norm, x in zip(norms, xs, strict=True)]
    given = [t for norm, x in zip(norms, xs, strict=True) for t in (x, norm.weight, norm.bias)]
    out = _GlobalBatchNorms.apply(norms[0].ranks or ALONE, *given)
    for i, norm in enumerate(norms):
        mean, unbiased, count = out[len(norms) + 3 * i : len(norms) + 3 * i + 3]
        norm.track(mean, unbiased, count > 0)
    return list(out[: len(norms)])


class _GlobalBatchNorms(torch.autograd.Function):
    """One exchange forward (count, mean and squared deviations of every rank) and one backward (two sums per channel)."""

    @staticmethod
    def forward(ctx: Any, ranks: RankReductions, *given: Tensor) -> tuple[Tensor, ...]:
        """given: x, weight, bias of every norm. Returns the outputs, then mean, unbiased variance and count of every norm."""
        groups = [given[i : i + 3] for i in range(0, len(given), 3)]
        everyone = ranks.gather(torch.cat([_local_moments(_wide(x)) for x, _, _ in groups]))
        outputs, moments, kept, at = [], [], [], 0
        for x, weight, bias in groups:
            channels = x.shape[1]
            counts, means, spreads = everyone[:, at : at + 1 + 2 * channels].split(
                [1, channels, channels], dim=1
            )
            at += 1 + 2 * channels
            count = counts.sum()
            mean = (counts * means).sum(0) / count.clamp(min=1)
            # Chan et al. 1979: exact whatever the ranks' means, where a sum of squares would cancel.
            total = (spreads + counts * (means - mean).square()).sum(0)
            rstd = torch.rsqrt(total / count.clamp(min=1) + EPS)
            scale = rstd * weight
            outputs.append(
                torch.addcmul(_channel(bias - mean * scale), _wide(x), _channel(scale)).to(x.dtype)
            )
            moments += [mean, total / (count - 1).clamp(min=1), count]
            kept += [x, weight, mean, rstd, count]
        ctx.ranks = ranks
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*moments)
        return (*outputs, *moments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        groups = [ctx.saved_tensors[i : i + 5] for i in range(0, len(ctx.saved_tensors), 5)]
        sums = []
        for gradient, (x, _, mean, _, _) in zip(gradients, groups, strict=False):
            dy = _wide(gradient)
            sums += [dy.sum((0, 2, 3)), (dy * (_wide(x) - _channel(mean))).sum((0, 2, 3))]
        over_ranks = ctx.ranks.sum(torch.cat(sums)).split([len(s) for s in sums])
        out: list[Tensor | None] = [None]
        for i, (gradient, (x, weight, mean, rstd, count)) in enumerate(
            zip(gradients, groups, strict=False)
        ):
            bare, moved = (over_ranks[2 * i + k] / count.clamp(min=1) for k in (0, 1))
            slope = -moved * rstd.square()
            shift = -bare - slope * mean
            dx = (
                _wide(gradient) + torch.addcmul(_channel(shift), _wide(x), _channel(slope))
            ) * _channel(rstd * weight)
            out += [
                dx.to(x.dtype),
                (sums[2 * i + 1] * rstd).to(weight.dtype),
                sums[2 * i].to(weight.dtype),
            ]
        return tuple(out)


def _local_moments(x: Tensor) -> Tensor:
    """(1 + 2 * channels,): count, mean, sum of squared deviations from it."""
    count = x.new_tensor([x.numel() // x.shape[1]])
    mean = x.sum((0, 2, 3)) / count.clamp(min=1)
    return torch.cat((count, mean, (x - _channel(mean)).square().sum((0, 2, 3))))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def global_batch_norms(module: nn.Module, ranks: RankReductions | None) -> None:
    """Let every BatchNorm2d below `module` take its statistics over all ranks."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.ranks = ranks
