"""Running statistics of norms, restored after a micro-batch that does not count."""

from collections import defaultdict

import torch
from torch import Tensor, nn


class RunningStatistics:
    """All buffers of a model, which a forward pass in training updates.

    They become views of one tensor per dtype, so that saving and restoring takes two operators for
    each. Build it after the model is on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = defaultdict(list)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                buffers[buffer.dtype].append((module, name, buffer))
        self.flat: list[Tensor] = []
        self.saved: list[Tensor] = []
        for owned in buffers.values():
            flat = torch.cat([buffer.reshape(-1) for _, _, buffer in owned])
            parts = flat.split([buffer.numel() for _, _, buffer in owned])  # type: ignore[no-untyped-call]
            for (module, name, buffer), part in zip(owned, parts, strict=True):
                # Not the view itself: autograd would see a change of one as a change of all.
                module._buffers[name] = part.view(buffer.shape).data
            self.flat.append(flat)

    def save(self) -> None:
        """Before the forward pass of a micro-batch."""
        self.saved = [flat.clone() for flat in self.flat]

    def restore_unless(self, counts: Tensor) -> None:
        """After the backward pass. counts: () bool; False restores what was saved."""
        for flat, saved in zip(self.flat, self.saved, strict=True):
            flat.copy_(torch.where(counts, flat, saved))
