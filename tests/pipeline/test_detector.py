"""The detector whole: cutting, permuting and starting lanes, frames that the neck sees, empty chunks, every experiment."""

import pytest
import torch
from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig
from evspan.pipeline.benchmark.operations import OperatorCounter
from evspan.pipeline.model.detector import Detector, look_back_rows
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.state import (
    DetectorState,
    detach,
    forget_lanes,
    map_state,
    state_from_tensors,
    state_tensors,
)
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow

CHANNELS, H, W, LANES = 4, 60, 120, 3  # padded to 64 x 128
KINDS = {
    "plain": {},
    "attention": {"enable_small_object_attention": True},
    "4 scales": {
        "enable_small_object_attention": True,
        "in_stages": [1, 2, 3, 4],
        "temporal_window": 4,
    },
    "spatial only": {"enable_small_object_attention": True, "attention_temporal": False},
}


def micro(kind="attention", *, dws_conv=False, open_gates=True):
    """A small detector whose every part matters: LayerScale at 0.5, attention gates open."""
    torch.manual_seed(0)
    backbone = BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5, dws_conv=dws_conv)
    detector = Detector(
        ModelConfig(
            backbone=backbone, fpn=FpnConfig(**KINDS[kind]), head=HeadConfig(num_classes=2)
        ),
        CHANNELS,
    )
    for name, parameter in detector.named_parameters():
        if open_gates and name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return detector


def some_frames(steps, lanes=LANES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (steps, lanes, CHANNELS, H, W), dtype=torch.uint8, generator=g)


def no(lanes=LANES):
    return torch.zeros(lanes, dtype=torch.bool)


def run(detector, frames, state=None, starts=None, labelled=None):
    steps, lanes = frames.shape[:2]
    state = detector.initial_state(lanes, H, W) if state is None else state
    labelled = torch.ones(steps, lanes, dtype=torch.bool) if labelled is None else labelled
    with torch.no_grad():
        return detector(
            frames, state, starts=no(lanes) if starts is None else starts, labelled=labelled
        )


def assert_states_close(a, b, **tolerance):
    for x, y in zip(state_tensors(a), state_tensors(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("dws_conv", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cutting_a_sequence_changes_nothing(kind, dws_conv):
    detector, frames = micro(kind, dws_conv=dws_conv).eval(), some_frames(6)
    labelled = torch.rand(6, LANES, generator=torch.Generator().manual_seed(1)) < 0.5
    expected, end = run(detector, frames, labelled=labelled)
    for cuts in ([1, 5], [2, 4], [3, 3], [1] * 6):
        state, parts, at = None, [], 0
        for steps in cuts:
            part, state = run(
                detector, frames[at : at + steps], state, labelled=labelled[at : at + steps]
            )
            parts.append(part)
            at += steps
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-5)
        assert_states_close(state, end, rtol=1e-4, atol=1e-5)


def test_temporal_attention_looks_at_the_frames_before_not_the_samples_before():
    """The prediction of the last frame is the same whether the frames before it are labelled or not, and depends on them."""
    detector, frames = micro().eval(), some_frames(5)
    only_last = torch.zeros(5, LANES, dtype=torch.bool)
    only_last[-1] = True
    every, _ = run(detector, frames)
    last, state = run(detector, frames, labelled=only_last)
    torch.testing.assert_close(last, every[-LANES:], rtol=1e-4, atol=1e-5)
    assert [tuple(p.shape) for p in state.previous] == [(2, LANES, 16, 8, 16), (2, LANES, 32, 4, 8)]
    one_frame, shifted = frames[:1], detector.initial_state(LANES, H, W)
    shifted = DetectorState(shifted.stages, tuple(p + 1 for p in shifted.previous))
    assert (run(detector, one_frame)[0] - run(detector, one_frame, shifted)[0]).abs().max() > 1e-4


def test_permuting_lanes_permutes_outputs():
    detector, frames = micro().eval(), some_frames(3)
    order = torch.tensor([2, 0, 1])
    out, state = run(detector, frames)
    permuted, after = run(detector, frames[:, order])
    torch.testing.assert_close(
        permuted.unflatten(0, (3, LANES)),
        out.unflatten(0, (3, LANES))[:, order],
        rtol=1e-4,
        atol=1e-5,
    )
    assert_states_close(
        after, map_state(lambda t: t.index_select(t.dim() - 4, order), state), rtol=1e-4, atol=1e-5
    )


def test_a_start_forgets_its_lane_and_no_other():
    detector, frames = micro().eval(), some_frames(4)
    _, state = run(detector, frames[:2])
    starts = torch.tensor([False, True, False])
    out, _ = run(detector, frames[2:], state, starts)
    kept, _ = run(detector, frames[2:], state)
    fresh, _ = run(detector, frames[2:])
    out, kept, fresh = (t.unflatten(0, (2, LANES)) for t in (out, kept, fresh))
    for lane, expected in ((0, kept), (1, fresh), (2, kept)):
        assert torch.equal(out[:, lane], expected[:, lane])
    assert not torch.allclose(out[:, 1], kept[:, 1], atol=1e-4)


def test_a_start_heals_a_lane_of_nan():
    detector, frames = micro().eval(), some_frames(2)
    state = detector.initial_state(LANES, H, W)
    bad = map_state(lambda t: t.index_fill(t.dim() - 4, torch.tensor([1]), float("nan")), state)
    out, after = run(detector, frames, bad, torch.tensor([False, True, False]))
    assert out.isfinite().all()
    assert all(t.isfinite().all() for t in state_tensors(after))


def test_state_is_the_same_to_the_bit_after_a_checkpoint():
    """The carry comes back in another memory layout; the outputs must not notice."""
    detector, frames = micro().eval(), some_frames(4)
    _, state = run(detector, frames[:2])
    saved = [
        t.contiguous().clone(memory_format=torch.contiguous_format) for t in state_tensors(state)
    ]
    back = state_from_tensors(saved, detector.initial_state(LANES, H, W))
    assert any(a.stride() != b.stride() for a, b in zip(state_tensors(state), saved, strict=True))
    assert torch.equal(run(detector, frames[2:], state)[0], run(detector, frames[2:], back)[0])
    with pytest.raises(ValueError, match="state of shapes"):
        state_from_tensors(saved, detector.initial_state(LANES + 1, H, W))


def test_gradients_flow_through_the_chunk_and_stop_at_detach():
    detector, state = micro(), None
    state = map_state(lambda t: t.requires_grad_(), detector.initial_state(LANES, H, W))
    labelled = torch.zeros(3, LANES, dtype=torch.bool)
    labelled[-1] = True
    raw, after = detector(
        some_frames(3), state, starts=torch.tensor([False, True, False]), labelled=labelled
    )
    gradients = torch.autograd.grad(raw.sum(), [s.hidden for s in state.stages])
    for g in gradients:
        assert g[0].abs().max() > 0 and (g[1] == 0).all(), (
            "to the first frame, and not into a lane that starts"
        )
    assert all(t.requires_grad for t in state_tensors(after))
    assert not any(t.requires_grad for t in state_tensors(detach(after)))
    assert torch.equal(
        forget_lanes(after, ~no()).stages[0].cell, torch.zeros_like(after.stages[0].cell)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_without_labels_trains_in_step(kind):
    """Every parameter gets a gradient, zero, so that a rank without labels can take part in the reduction."""
    detector = micro(kind).train()
    before = {k: v.clone() for k, v in detector.state_dict().items() if "running" in k}
    raw, state = detector(
        some_frames(3),
        detector.initial_state(LANES, H, W),
        starts=no(),
        labelled=torch.zeros(3, LANES, dtype=torch.bool),
    )
    geometry = detector.geometry(H, W)
    assert raw.shape == (0, sum(h * w for h, w, _ in geometry), 7)
    loss = detection_loss(
        raw, torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.long), geometry, detector.config.head
    )
    assert loss.total == 0
    loss.total.backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name
    after = {k: v for k, v in detector.state_dict().items() if k in before}
    unseen = [k for k in before if k.startswith("yolox_head") or not state.previous]
    assert unseen
    assert all(torch.equal(before[k], after[k]) for k in unseen)
    assert all(v.isfinite().all() for v in after.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_for_the_labelled_frames_alone(kind):
    """In a whole training step: which frames are labelled decides the size of the neck's and the head's batch."""
    detector, labelled = (
        micro(kind).train(),
        torch.tensor([[False, True, False], [True, False, True], [False, False, True]]),
    )
    with OperatorCounter() as seen:
        raw, _ = detector(
            some_frames(3), detector.initial_state(LANES, H, W), starts=no(), labelled=labelled
        )
        boxes, counts = (
            torch.rand(4, 9, 5) * torch.tensor([2, W, H, 30, 30]),
            torch.tensor([0, 9, 3, 1]),
        )
        detection_loss(
            raw, boxes, counts, detector.geometry(H, W), detector.config.head
        ).total.backward()
    assert set(seen.waits) <= {"aten::nonzero"}
    assert seen.waits.total() <= 2


@pytest.mark.parametrize("frames", [0, 2])
def test_rows_move_to_a_device_as_they_are(frames):
    labelled = torch.rand(4, LANES, generator=torch.Generator().manual_seed(0)) < 0.5
    following = torch.ones(frames, LANES, dtype=torch.bool)
    rows = look_back_rows(labelled, following, frames)
    moved = rows.to(torch.device("meta"))
    for here, there in zip(rows, moved, strict=True):
        assert (there is None) == (here is None)
        if here is not None:
            assert there.is_meta
            assert (there.shape, there.dtype) == (here.shape, here.dtype)
    assert rows.to(torch.device("cpu")) is rows


def test_turning_attention_on_changes_nothing_before_the_first_update():
    plain, frames = micro("plain").eval(), some_frames(4)
    attending = micro("attention", open_gates=False).eval()
    missing, unexpected = attending.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    torch.testing.assert_close(
        run(attending, frames)[0], run(plain, frames)[0], rtol=1e-5, atol=1e-6
    )


def test_padding_is_zero_pixels_right_and_below():
    detector, frames = micro().eval(), some_frames(2)
    assert detector.input_size(H, W) == (64, 128)
    assert detector.input_size(64, 128) == (64, 128)
    padded = torch.zeros(2, LANES, CHANNELS, 64, 128, dtype=torch.uint8)
    padded[..., :H, :W] = frames
    assert torch.equal(run(detector, padded)[0], run(detector, frames)[0])


EXPERIMENTS = {
    "small": 9_870_456,
    "base": 18_536_856,
    "3scale_baseline": 4_405_336,
    "3scale_sizeaware": 0,
    "3scale_sizeaware_attention": 0,
    "4scale_sizeaware_attention": 0,
}


def composed(*overrides):
    from evspan.conf.schema.training import ModelConfig as Schema

    with initialize_config_module("evspan.conf", version_base="1.3"):
        raw = compose("train", overrides=list(overrides)).model
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Schema), raw))


@pytest.fixture(scope="module", autouse=True)
def schemas():
    """What the command-line file registers."""
    from evspan.conf.schema.training import TrainConfig
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_build_on_the_meta_device(experiment):
    config = composed(f"experiment=gen4/{experiment}")
    assert config.head.num_classes == 8
    with torch.device("meta"):
        detector = Detector(config, 20)
    assert all(p.is_meta for p in detector.parameters())
    assert detector.strides == ((4, 8, 16, 32) if "4scale" in experiment else (8, 16, 32))
    if expected := EXPERIMENTS[experiment]:
        config.head.num_classes = 3  # the published numbers are for 3 classes
        with torch.device("meta"):
            assert sum(p.numel() for p in Detector(config, 20).parameters()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_take_a_training_step_at_reduced_size(experiment):
    torch.manual_seed(0)
    config = composed(f"experiment=gen4/{experiment}", "size=micro")
    detector = Detector(config, CHANNELS).train()
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3)
    boxes, counts = (
        torch.tensor([[[1, 50.0, 30, 20, 20]]]).repeat(4, 1, 1),
        torch.ones(4, dtype=torch.long),
    )
    losses, frames = [], some_frames(2, 2)
    for _ in range(30):  # a few: assignment changes make the first ones go up and down
        raw, _ = detector(
            frames,
            detector.initial_state(2, H, W),
            starts=no(2),
            labelled=torch.ones(2, 2, dtype=torch.bool),
        )
        loss = detection_loss(raw, boxes, counts, detector.geometry(H, W), config.head)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.85 * losses[0]
