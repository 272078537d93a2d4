"""Small-object attention of the neck: spatial, temporal and channel attention.

Every block starts as the identity: what it adds is multiplied by a learnable gate that starts at
zero. With `identity_init=False` a block has the published form, which scales every feature from the
first step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _gate(identity_init: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(1)) if identity_init else None


def _gated(t: Tensor, gate: nn.Parameter | None) -> Tensor:
    return t if gate is None else t * gate


class MultiScaleSpatialAttention(nn.Module):
    """out = x * map + x; the map (N, 1, h, w) comes from dilated 3x3 convolutions.

    Args:
        channels: of the features.
        scales: dilations.
        identity_init: a gate that starts at zero multiplies the map.
    """

    def __init__(
        self, channels: int, scales: Sequence[int] = (1, 2, 4), *, identity_init: bool = True
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.scale_channels = max(1, channels // len(scales))
        self.combined_channels = self.scale_channels * len(scales)
        self.scale_convs = nn.ModuleList(
            nn.Conv2d(channels, self.scale_channels, 3, padding=s, dilation=s) for s in scales
        )
        middle = max(1, self.combined_channels // 4)
        self.attention_conv = nn.Sequential(
            nn.Conv2d(self.combined_channels, middle, 1), nn.ReLU(), nn.Conv2d(middle, 1, 1)
        )
        self.gate = _gate(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        first, rectify, last = self.attention_conv
        # The first 1x1 convolution is linear in the output of the dilated ones. Multiplied into
        # their kernels it saves a third of the work, and no map of `combined_channels` is written.
        mix = first.get_parameter("weight").flatten(1)  # (middle, combined)
        dilated = torch.stack([conv.get_parameter("weight") for conv in self.scale_convs])
        mix_by_scale = torch.unflatten(mix, 1, dilated.shape[:2]).transpose(0, 1)
        kernels = torch.unflatten(mix_by_scale @ dilated.flatten(2), 2, dilated.shape[2:])
        dilated_bias = torch.cat([conv.get_parameter("bias") for conv in self.scale_convs])
        bias = first.get_parameter("bias") + mix @ dilated_bias
        hidden = F.conv2d(x, kernels[0], bias, padding=self.scales[0], dilation=self.scales[0])
        for kernel, scale in zip(kernels[1:], self.scales[1:], strict=True):
            hidden.add_(F.conv2d(x, kernel, padding=scale, dilation=scale))
        return x * (1 + _gated(last(rectify(hidden)).sigmoid(), self.gate))


class EventTemporalAttention(nn.Module):
    """Causal attention over the last frames: out = x + temporal * motion * weights.

    temporal: a (window, 1, 1) convolution over the frames t - window + 1 .. t.
    motion: sigmoid(conv(cat(current, previous))), one map.
    weights: per channel, two linear layers on the pooled temporal features.
    """

    def __init__(
        self, channels: int, temporal_window: int = 3, *, identity_init: bool = True
    ) -> None:
        super().__init__()
        self.temporal_conv = nn.Conv3d(channels, channels, (temporal_window, 1, 1))
        self.motion_conv = nn.Conv2d(2 * channels, 1, 3, padding=1)
        middle = max(1, channels // 4)
        self.temporal_fc = nn.Sequential(
            nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, channels)
        )
        self.gate = _gate(identity_init)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """Attends to the current frames.

        Args:
            x: (N, C, h, w).
            previous: (N, window - 1, C, h, w), the frames before each of them, oldest first.

        Returns:
            (N, C, h, w).
        """
        channels = x.shape[1]
        older = previous.shape[1] - 1
        frames = torch.cat((previous.flatten(1, 2), x), dim=1)
        # The (window, 1, 1) kernel on a window's frames is a 1x1 kernel on their channels, oldest
        # first. The 3x3 kernel with one output is nine 1x1 kernels whose maps are then shifted and
        # added. One product computes both.
        over_time = self.temporal_conv.weight[..., 0, 0].transpose(1, 2).flatten(1)
        current, before = self.motion_conv.weight.view(2, channels, 9).transpose(1, 2)
        taps = F.pad(torch.cat((before, current), dim=1), (older * channels, 0))
        bias_of_motion = F.pad(self.motion_conv.get_parameter("bias"), (4, 4))  # at the middle tap
        bias = torch.cat((self.temporal_conv.get_parameter("bias"), bias_of_motion))
        kernels = torch.cat((over_time, taps))[..., None, None]
        temporal, maps = torch.split(F.conv2d(frames, kernels, bias), [channels, 9], dim=1)
        shifts = torch.eye(9, dtype=x.dtype, device=x.device).view(1, 9, 3, 3)
        motion = F.conv2d(maps, shifts, padding=1).sigmoid()
        weights = self.temporal_fc(temporal.mean((2, 3))).sigmoid()
        return torch.addcmul(x, temporal, motion * _gated(weights, self.gate)[..., None, None])


class ScaleAwareChannelAttention(nn.Module):
    """out = x * weights, per channel; small strides start with higher weights."""

    def __init__(self, channels: int, stride: int, *, identity_init: bool = True) -> None:
        super().__init__()
        middle = max(1, channels // (16 if stride <= 8 else 8))
        last = nn.Linear(middle, channels)
        nn.init.constant_(last.bias, 1.0 if stride <= 8 else 0.0)
        self.fc = nn.Sequential(nn.Linear(channels, middle), nn.ReLU(), last)
        self.gate = _gate(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        weights: Tensor = self.fc(x.mean((2, 3))).sigmoid()[..., None, None]
        if self.gate is None:
            return x * weights
        return x * (1 + self.gate * (weights - 1))


class SmallObjectAttentionModule(nn.Module):
    """Spatial, then temporal attention, then a 1x1 integration convolution if both are on.

    Temporal attention reads the features of earlier frames after spatial attention (`before_time`).
    """

    def __init__(
        self,
        channels: int,
        enable_spatial: bool = True,
        enable_temporal: bool = True,
        *,
        temporal_window: int = 3,
        identity_init: bool = True,
    ) -> None:
        super().__init__()
        self.spatial = None
        if enable_spatial:
            self.spatial = MultiScaleSpatialAttention(channels, identity_init=identity_init)
        self.temporal = None
        if enable_temporal:
            self.temporal = EventTemporalAttention(
                channels, temporal_window, identity_init=identity_init
            )
        both = enable_spatial and enable_temporal
        self.integration = nn.Conv2d(channels, channels, 1) if both else None
        self.gate = _gate(identity_init) if both else None

    def before_time(self, x: Tensor) -> Tensor:
        """The part that treats every frame alike: (N, C, h, w) -> the same shape."""
        if self.spatial is None:
            return x
        out: Tensor = self.spatial(x)
        return out

    def over_time(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """The part that reads earlier frames, and the integration.

        Args:
            x: (N, C, h, w) of `before_time`.
            previous: (N, window - 1, C, h, w) of `before_time` for the frames before, oldest first;
                None without temporal attention.

        Returns:
            (N, C, h, w).
        """
        if self.temporal is not None:
            assert previous is not None
            x = self.temporal(x, previous)
        if self.integration is None:
            return x
        if self.gate is None:
            out: Tensor = self.integration(x)
            return out
        weight = self.integration.weight * self.gate
        bias = self.integration.get_parameter("bias") * self.gate
        return x + F.conv2d(x, weight, bias)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """`before_time`, then `over_time`; for shapes see there."""
        return self.over_time(self.before_time(x), previous)
