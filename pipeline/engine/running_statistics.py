"""Running statistics of norms, restored after a micro-batch that does not count."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class NamedParts(NamedTuple):
    """Names and shapes of the tensors that one flat tensor contains, in order."""

    names: list[str]
    shapes: list[torch.Size]

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Views in their shapes. flat: (n,)."""
        parts = flat.split([shape.numel() for shape in self.shapes])  # type: ignore[no-untyped-call]  # torch's
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `by_name`: (n,) float32."""
        return torch.cat([tensors[name].reshape(-1).float() for name in self.names])


class RunningStatistics:
    """All buffers of a model, which a forward pass in training updates.

    They become views of one tensor per dtype, so that saving and restoring takes two operators for
    each. Build it after the model is on its device.

    Attributes:
        floating: the flat tensors of floating dtypes. names: what each of them contains.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = defaultdict(list)
        names: dict[torch.dtype, list[str]] = defaultdict(list)
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                buffers[buffer.dtype].append((module, name, buffer))
                names[buffer.dtype].append(f"{prefix}.{name}" if prefix else name)
        self.flat: list[Tensor] = []
        self.floating: list[Tensor] = []
        self.names: list[NamedParts] = []
        self.saved: list[Tensor] = []
        for dtype, owned in buffers.items():
            flat = torch.cat([buffer.reshape(-1) for _, _, buffer in owned])
            parts = flat.split([buffer.numel() for _, _, buffer in owned])  # type: ignore[no-untyped-call]
            for (module, name, buffer), part in zip(owned, parts, strict=True):
                # Not the view itself: autograd would see a change of one as a change of all.
                module._buffers[name] = part.view(buffer.shape).data
            self.flat.append(flat)
            if dtype.is_floating_point:
                shapes = [buffer.shape for _, _, buffer in owned]
                self.floating.append(flat)
                self.names.append(NamedParts(names[dtype], shapes))

    def save(self) -> None:
        """Before the forward pass of a micro-batch."""
        self.saved = [flat.clone() for flat in self.flat]

    def restore_unless(self, counts: Tensor) -> None:
        """After the backward pass. counts: () bool; False restores what was saved."""
        for flat, saved in zip(self.flat, self.saved, strict=True):
            flat.copy_(torch.where(counts, flat, saved))
