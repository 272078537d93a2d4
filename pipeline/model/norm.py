"""BatchNorm whose training statistics can be taken over all ranks, and over batches of no samples."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MOMENTUM = 0.1


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d; with `sum_over_ranks` (a differentiable all-reduce) its batch is that of all ranks."""

    sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (self.sum_over_ranks is None and x.numel()):
            return super().forward(x)
        return self._global(x, self.sum_over_ranks or (lambda t: t))

    def _global(self, x: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = wide.new_full((1,), x.numel() // self.num_features)
        sums = sum_over_ranks(torch.cat((wide.sum((0, 2, 3)), count)))
        total = sums[-1].detach()
        mean = sums[:-1] / total.clamp(min=1)
        centred = wide - mean.view(1, -1, 1, 1)
        var = sum_over_ranks(centred.square().sum((0, 2, 3))) / total.clamp(min=1)  # a second round: no cancellation
        self._track(mean.detach(), var.detach() * total / (total - 1).clamp(min=1), total > 0)
        scale = (self.weight * torch.rsqrt(var + self.eps)).view(1, -1, 1, 1)
        return (centred * scale + self.bias.view(1, -1, 1, 1)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor, any_samples: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        share = any_samples * MOMENTUM  # no `if`: asking a GPU whether there were samples would wait for it
        self.running_mean.lerp_(mean.to(self.running_mean), share.to(self.running_mean))
        self.running_var.lerp_(unbiased.to(self.running_var), share.to(self.running_var))
        self.num_batches_tracked += any_samples


def global_batch_norms(module: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor] | None) -> None:
    """Give every BatchNorm2d below `module` the all-reduce to take its statistics with."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.sum_over_ranks = sum_over_ranks
