"""PAFPN over 3 or 4 scales, with small-object attention where enabled."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from evspan.pipeline.model.attention import ScaleAwareChannelAttention, SmallObjectAttentionModule
from evspan.pipeline.model.layers import BaseConv, CSPLayer
from torch import Tensor, nn

# The finest scales have spatial and temporal attention; all have channel attention.
ATTENDED_SCALES = 2


class LookBack(Protocol):
    """Selects the labelled frames and finds the frames before each of them."""

    def __call__(self, packed: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Called once.

        Args:
            packed: per scale, finest first, (N, C, h, w) features of the frames that the neck runs
                on.

        Returns:
            Per scale (n, C, h, w) features of the labelled frames; and (n, window - 1, C, h, w)
            those of the frames before each of them, oldest first, or None where the scale has no
            temporal attention.
        """
        ...


class YOLOPAFPN(nn.Module):
    """Path-aggregation feature pyramid (YOLOX's, as RVT uses it).

    Args:
        in_stages: backbone stages that feed it, finest first.
        in_channels: channels of each; the outputs have the same channels.
        depth: number of bottlenecks per CSP layer, in units of 3.
        enable_small_object_attention: False: the plain PAFPN with its weights, no other parameters.
        attention_spatial, attention_temporal: parts of the attention on the finest scales.
        temporal_window: frames of the temporal attention, the current one included.
        identity_init: attention starts as the identity.
    """

    def __init__(
        self,
        in_stages: Sequence[int] = (2, 3, 4),
        in_channels: Sequence[int] = (64, 128, 256),
        depth: float = 0.33,
        enable_small_object_attention: bool = False,
        attention_spatial: bool = True,
        attention_temporal: bool = True,
        *,
        temporal_window: int = 3,
        identity_init: bool = True,
    ) -> None:
        super().__init__()
        self.in_stages = tuple(in_stages)
        blocks = round(3 * depth)
        channels = dict(zip(in_stages, in_channels, strict=True))
        top = self.in_stages[-1]
        # The published names count from the coarsest scale; p and n are followed by a pyramid
        # level, which is stage + 1.
        for i, stage in enumerate(reversed(self.in_stages[:-1])):
            name = "lateral_conv0" if i == 0 else f"reduce_conv{i}"
            self.add_module(name, BaseConv(channels[stage + 1], channels[stage], 1))
            self.add_module(
                f"C3_p{stage + 1}", CSPLayer(2 * channels[stage], channels[stage], blocks)
            )
        for stage in self.in_stages[:-1]:
            self.add_module(
                f"bu_conv{top - stage}", BaseConv(channels[stage], channels[stage], 3, 2)
            )
            self.add_module(
                f"C3_n{stage + 1}", CSPLayer(2 * channels[stage], channels[stage + 1], blocks)
            )
        self.enable_small_object_attention = enable_small_object_attention
        if not enable_small_object_attention:
            return
        self.small_object_attention_modules = nn.ModuleDict()
        if attention_spatial or attention_temporal:
            for i in range(ATTENDED_SCALES):
                self.small_object_attention_modules[f"scale_{i}"] = SmallObjectAttentionModule(
                    in_channels[i],
                    attention_spatial,
                    attention_temporal,
                    temporal_window=temporal_window,
                    identity_init=identity_init,
                )
        self.scale_aware_attention_modules = nn.ModuleDict()
        for i, stage in enumerate(self.in_stages):
            self.scale_aware_attention_modules[f"scale_{i}"] = ScaleAwareChannelAttention(
                channels[stage], 2 ** (stage + 1), identity_init=identity_init
            )

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The PAFPN without attention.

        Args:
            features: (N, C, h, w) per scale, finest first.

        Returns:
            The same shapes.
        """
        lateral: dict[int, Tensor] = {}
        x = features[-1]
        last = len(features) - 1
        for i in range(last):  # coarse to fine
            level = last - i
            x = self.get_submodule("lateral_conv0" if i == 0 else f"reduce_conv{i}")(x)
            lateral[level] = x
            up = F.interpolate(x, scale_factor=2, mode="nearest")
            csp = self.get_submodule(f"C3_p{self.in_stages[level - 1] + 1}")
            x = csp(torch.cat((up, features[level - 1]), dim=1))
        out = [x]
        for level in range(1, last + 1):  # fine to coarse
            stage = self.in_stages[level - 1]
            down = self.get_submodule(f"bu_conv{self.in_stages[-1] - stage}")(x)
            x = self.get_submodule(f"C3_n{stage + 1}")(torch.cat((down, lateral[level]), dim=1))
            out.append(x)
        return out

    def forward(self, features: Sequence[Tensor], look_back: LookBack) -> list[Tensor]:
        """The PAFPN with attention.

        Args:
            features: (N, C, h, w) per scale, finest first, of all needed frames.
            look_back: selects the labelled frames and returns those before them.

        Returns:
            (n, C, h, w) per scale, of the labelled frames.
        """
        return self.attended(self.pyramid(features), look_back)

    def attended(self, features: Sequence[Tensor], look_back: LookBack) -> list[Tensor]:
        """The attention alone; arguments and result as of `forward`."""
        packed = []
        for i, x in enumerate(features):
            attention = self._attention(i)
            packed.append(x if attention is None else attention.before_time(x))
        outputs = []
        for i, (x, previous) in enumerate(look_back(packed)):
            attention = self._attention(i)
            if attention is not None:
                x = attention.over_time(x, previous)
            if self.enable_small_object_attention:
                x = self.scale_aware_attention_modules[f"scale_{i}"](x)
            outputs.append(x)
        return outputs

    def _attention(self, scale: int) -> SmallObjectAttentionModule | None:
        name = f"scale_{scale}"
        if not self.enable_small_object_attention:
            return None
        if name not in self.small_object_attention_modules:
            return None
        module = self.small_object_attention_modules[name]
        assert isinstance(module, SmallObjectAttentionModule)
        return module
