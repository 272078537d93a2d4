"""BatchNorm whose statistics can be taken over all ranks, and over batches without samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from evspan.pipeline.model.rank_norm import PendingStatistics, RankReductions, rank_norms
from torch import Tensor, nn

__all__ = [
    "ONE_RANK",
    "BatchNorm2d",
    "RankReductions",
    "batch_norms",
    "global_batch_norms",
    "shared_norm_work",
]

MOMENTUM = 0.1
EPS = 1e-5


ONE_RANK = RankReductions(sum=lambda t: t)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d; with `ranks` its statistics are those of all ranks' samples.

    The maps, the parameters and the statistics may each have their own dtype.

    Attributes:
        ranks: the reductions; None: this rank alone.
        statistics: with `ranks`, updates the running statistics.
        shared: `scale_and_shift`, computed once by `shared_norm_work`, which then also counts the
            batch; None outside of it.
    """

    ranks: RankReductions | None = None
    statistics: PendingStatistics | None = None
    shared: tuple[Tensor, Tensor] | None = None

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS, momentum=MOMENTUM)
        self.is_frozen = False

    def freeze(self) -> None:
        """Stays in eval mode from now on: the running statistics normalise, and do not change."""
        self.is_frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "BatchNorm2d":
        """Sets training or eval mode; a frozen norm stays in eval mode."""
        super().train(mode and not self.is_frozen)
        return self

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


@contextmanager
def shared_norm_work(norms: Sequence[BatchNorm2d], *, num_samples: int) -> Iterator[None]:
    """While open, each of the norms runs once, on `num_samples` frames.

    A training step casts the parameters of all norms and counts the batch in three operators
    instead of five per norm. Over ranks, it updates the running statistics of all norms at the end.
    """
    trained = [norm for norm in norms if norm.training]
    if not trained:
        yield
        return
    alone = [norm for norm in trained if norm.ranks is None]
    if num_samples and alone:
        torch._foreach_add_([_counter(norm) for norm in alone], 1)
    for norm, pair in zip(trained, _scales_and_shifts(trained), strict=True):
        norm.shared = pair
    try:
        yield
    finally:
        for norm in trained:
            norm.shared = None
    for statistics in dict.fromkeys(norm.statistics for norm in trained):
        if statistics is not None:
            statistics.update()


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
        parameters = [*torch.split(torch.cat(parameters).to(dtype), sizes)]
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def batch_norms(norms: Sequence[BatchNorm2d], xs: Sequence[Tensor]) -> list[Tensor]:
    """[norm(x), ...] of layers that do not depend on each other.

    Over ranks they share one exchange in forward and one in backward.

    Args:
        xs: (N, C, h, w), one for each layer, with one N; sizes may differ.

    Returns:
        The same shapes and dtypes.
    """
    pairs = list(zip(norms, xs, strict=True))
    if all(norm.is_plain for norm in norms):
        return [norm(x) for norm, x in pairs]
    if any(norm.is_plain for norm in norms):  # some are frozen
        trained = [(norm, x) for norm, x in pairs if not norm.is_plain]
        results = iter(batch_norms([norm for norm, _ in trained], [x for _, x in trained]))
        return [norm(x) if norm.is_plain else next(results) for norm, x in pairs]
    ranks = norms[0].ranks
    statistics = norms[0].statistics
    assert ranks is not None
    assert statistics is not None
    scales = [norm.shared or norm.scale_and_shift() for norm in norms]
    outputs, call = rank_norms(norms, xs, scales, ranks)
    statistics.add(call)
    if norms[0].shared is None:
        statistics.update()
    return outputs


def _per_channel(t: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return t.view(1, -1, 1, 1)


def global_batch_norms(module: nn.Module, ranks: RankReductions | None) -> None:
    """Makes every BatchNorm2d below `module` take its statistics over all ranks.

    Args:
        ranks: the reductions; None: this rank alone.
    """
    statistics: PendingStatistics | None = None
    if ranks is not None:
        statistics = PendingStatistics(MOMENTUM, ranks.sum_over_all)
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.ranks = ranks
            norm.statistics = statistics
