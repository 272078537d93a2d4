"""PAFPN over 3 or 4 scales, with small-object attention where enabled."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from evspan.pipeline.model.attention import ScaleAwareChannelAttention, SmallObjectAttentionModule
from evspan.pipeline.model.layers import BaseConv, CSPLayer
from torch import Tensor, nn

ATTENDED_SCALES = 2  # the finest ones get spatial and temporal attention; all get channel attention

# Given an attended scale and its features of all frames handed in, the features of the frames that predictions are
# wanted of, and those of the frames before each of them.
LookBack = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]


class YOLOPAFPN(nn.Module):
    """Path-aggregation feature pyramid (YOLOX's, as RVT uses it).

    `in_channels` are the channels of `in_stages`, finest first; the outputs have the same channels. Disabled, attention
    has no parameters and the weights are the plain PAFPN's.
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
        self.in_stages, blocks = tuple(in_stages), round(3 * depth)
        channels = dict(zip(in_stages, in_channels, strict=True))
        top = self.in_stages[-1]
        # The published names count from the coarsest scale; p and n name a pyramid level (stage + 1 there, kept here).
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
        if enable_small_object_attention:
            spatial_or_temporal = attention_spatial or attention_temporal
            self.small_object_attention_modules = nn.ModuleDict(
                {
                    f"scale_{i}": SmallObjectAttentionModule(
                        in_channels[i],
                        attention_spatial,
                        attention_temporal,
                        temporal_window=temporal_window,
                        identity_init=identity_init,
                    )
                    for i in range(ATTENDED_SCALES)
                    if spatial_or_temporal
                }
            )
            self.scale_aware_attention_modules = nn.ModuleDict(
                {
                    f"scale_{i}": ScaleAwareChannelAttention(
                        c, 2 ** (stage + 1), identity_init=identity_init
                    )
                    for i, (stage, c) in enumerate(channels.items())
                }
            )

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(N, C, h, w) per scale, finest first -> the same shapes; no attention."""
        features = list(features)
        lateral: dict[int, Tensor] = {}
        x, last = features[-1], len(features) - 1
        for i in range(last):  # coarse to fine
            level = last - i
            lateral[level] = x = self.get_submodule(
                "lateral_conv0" if i == 0 else f"reduce_conv{i}"
            )(x)
            up = F.interpolate(x, scale_factor=2, mode="nearest")
            x = self.get_submodule(f"C3_p{self.in_stages[level - 1] + 1}")(
                torch.cat((up, features[level - 1]), dim=1)
            )
        out = [x]
        for level in range(1, last + 1):  # fine to coarse
            stage = self.in_stages[level - 1]
            down = self.get_submodule(f"bu_conv{self.in_stages[-1] - stage}")(x)
            x = self.get_submodule(f"C3_n{stage + 1}")(torch.cat((down, lateral[level]), dim=1))
            out.append(x)
        return out

    def forward(self, features: Sequence[Tensor], look_back: LookBack) -> list[Tensor]:
        """features: per scale (N, C, h, w) of all frames handed in -> per scale (n, C, h, w) of those `look_back` picks."""
        outputs = []
        for i, x in enumerate(self.pyramid(features)):
            attention = self._attention(i)
            x, previous = look_back(i, x if attention is None else attention.before_time(x))
            if attention is not None:
                x = attention.over_time(x, previous)
            if self.enable_small_object_attention:
                x = self.scale_aware_attention_modules[f"scale_{i}"](x)
            outputs.append(x)
        return outputs

    def _attention(self, scale: int) -> SmallObjectAttentionModule | None:
        if (
            not self.enable_small_object_attention
            or f"scale_{scale}" not in self.small_object_attention_modules
        ):
            return None
        module = self.small_object_attention_modules[f"scale_{scale}"]
        assert isinstance(module, SmallObjectAttentionModule)
        return module
