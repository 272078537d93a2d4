"""Small-object attention against its formulas restated, the identity start, and the neck that uses it."""

import pytest
import torch
import torch.nn.functional as F
from evspan.pipeline.model.attention import (
    EventTemporalAttention,
    MultiScaleSpatialAttention,
    ScaleAwareChannelAttention,
    SmallObjectAttentionModule,
)
from evspan.pipeline.model.neck import YOLOPAFPN
from support.layers import conv

N, C, H, W = 3, 12, 5, 7


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def spatial_published(block, x):
    combined = torch.cat(
        [
            conv(x, c, padding=s, dilation=s)
            for c, s in zip(block.scale_convs, (1, 2, 4), strict=True)
        ],
        1,
    )
    attention = torch.sigmoid(
        conv(F.relu(conv(combined, block.attention_conv[0])), block.attention_conv[2])
    )
    return x * attention + x


def temporal_published(block, x, previous):
    frames = torch.cat((previous, x[:, None]), 1).transpose(
        1, 2
    )  # (N, C, window, h, w), oldest first
    temporal = F.conv3d(frames, block.temporal_conv.weight, block.temporal_conv.bias)[:, :, 0]
    motion = torch.sigmoid(conv(torch.cat((x, previous[:, -1]), 1), block.motion_conv, padding=1))
    weights = torch.sigmoid(
        block.temporal_fc[2](F.relu(block.temporal_fc[0](temporal.mean((2, 3)))))
    )
    return x + temporal * motion * weights[:, :, None, None]


def channel_published(block, x):
    return x * torch.sigmoid(block.fc[2](F.relu(block.fc[0](x.mean((2, 3))))))[:, :, None, None]


def open_gates(module, value=1.0):
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] == "gate":
            torch.nn.init.constant_(parameter, value)


CASES = {
    "spatial": (lambda **k: MultiScaleSpatialAttention(C, **k), spatial_published, 0),
    "temporal": (lambda **k: EventTemporalAttention(C, 3, **k), temporal_published, 2),
    "temporal of 4 frames": (lambda **k: EventTemporalAttention(C, 4, **k), temporal_published, 3),
    "channel, fine": (lambda **k: ScaleAwareChannelAttention(C, 8, **k), channel_published, 0),
    "channel, coarse": (lambda **k: ScaleAwareChannelAttention(C, 16, **k), channel_published, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_published_form_and_identity_start(case):
    build, published, frames = CASES[case]
    x = torch.randn(N, C, H, W)
    inputs = (x, torch.randn(N, frames, C, H, W)) if frames else (x,)
    block = build(identity_init=False)
    torch.testing.assert_close(block(*inputs), published(block, *inputs))
    gated = build()
    assert torch.equal(gated(*inputs), x), "starts as the identity"
    gated(*inputs).square().sum().backward()
    assert gated.gate.grad.abs().item() > 1e-3, "and can leave it"
    open_gates(gated)
    torch.testing.assert_close(gated(*inputs), published(gated, *inputs))


def test_a_gate_that_has_opened_lets_the_block_learn():
    block, x = MultiScaleSpatialAttention(C), torch.randn(N, C, H, W)
    open_gates(block, 0.1)
    block(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters())


def test_channel_weights_of_fine_scales_start_higher():
    x = torch.randn(N, 32, H, W)
    fine, coarse = (ScaleAwareChannelAttention(32, s, identity_init=False)(x) / x for s in (8, 16))
    assert fine.mean() > coarse.mean() + 0.1
    assert ScaleAwareChannelAttention(64, 8).fc[0].out_features == 4
    assert ScaleAwareChannelAttention(64, 16).fc[0].out_features == 8


@pytest.mark.parametrize(("spatial", "temporal"), [(True, True), (True, False), (False, True)])
def test_module_is_spatial_then_temporal_then_integration(spatial, temporal):
    module = SmallObjectAttentionModule(C, spatial, temporal, identity_init=False)
    x, earlier = torch.randn(N, C, H, W), torch.randn(N, 2, C, H, W)
    expected = spatial_published(module.spatial, x) if spatial else x
    expected = temporal_published(module.temporal, expected, earlier) if temporal else expected
    expected = conv(expected, module.integration) if spatial and temporal else expected
    torch.testing.assert_close(module(x, earlier if temporal else None), expected)
    assert (module.integration is not None) == (spatial and temporal)


def test_few_channels_still_get_one_per_scale():
    assert MultiScaleSpatialAttention(2)(torch.randn(1, 2, H, W)).shape == (1, 2, H, W)


@pytest.mark.parametrize(
    ("stages", "channels"), [((2, 3, 4), (8, 16, 32)), ((1, 2, 3, 4), (4, 8, 16, 32))]
)
def test_neck_scales_and_names(stages, channels):
    features = [torch.randn(2, c, 32 >> s, 64 >> s) for s, c in zip(stages, channels, strict=True)]
    plain, attending = (
        YOLOPAFPN(stages, channels),
        YOLOPAFPN(stages, channels, enable_small_object_attention=True),
    )
    extra = attending.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= attending.state_dict().keys(), (
        "plain weights load unchanged"
    )
    assert {
        k.rsplit("scale_", 1)[0] + "scale_" + k.rsplit("scale_", 1)[1][0]
        for k in extra
        if "scale_convs" not in k
    } == {
        *(f"small_object_attention_modules.scale_{i}" for i in range(2)),
        *(f"scale_aware_attention_modules.scale_{i}" for i in range(len(stages))),
    }
    attending.load_state_dict(plain.state_dict(), strict=False)
    earlier = {i: torch.randn(2, 2, *features[i].shape[1:]) for i in range(2)}
    results = [
        neck.eval()(features, lambda xs: [(x, earlier.get(i)) for i, x in enumerate(xs)])
        for neck in (plain, attending)
    ]
    for f, a, b in zip(features, *results, strict=True):
        assert a.shape == f.shape
        assert torch.equal(a, b), "attention starts as the identity"


def test_coarse_and_fine_scales_reach_each_other():
    neck = (
        YOLOPAFPN((1, 2, 3, 4), (4, 8, 16, 32)).double().eval()
    )  # double: fresh layers pass on very little
    features = [torch.randn(1, 4 << s, 32 >> s, 64 >> s, dtype=torch.double) for s in range(4)]
    before = neck.pyramid(features)
    for s in range(4):
        poked = [f + (i == s) for i, f in enumerate(features)]
        assert all(
            (a - b).abs().max() > 1e-12 for a, b in zip(neck.pyramid(poked), before, strict=True)
        ), s
