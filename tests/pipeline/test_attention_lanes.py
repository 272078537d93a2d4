"""Small-object attention inside the detector: nothing of another lane, recording, labelled frame or evaluation gets in.

Per part and number of scales; gates are open and the published form is tried too, so that every part matters.
"""

import copy

import pytest
import torch
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    PostprocessConfig,
)
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.postprocess import detections
from evspan.pipeline.model.state import DetectorState, detach, map_state, state_tensors
from learning.mixed_lanes import MixedLanesDetector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHANNELS, H, W, LANES, STEPS = 4, 32, 64, 3, 6
PARTS = {
    "spatial": (True, False),
    "temporal": (False, True),
    "channel": (False, False),
    "all": (True, True),
}
ATTENDING = [*((part, 3) for part in PARTS), ("temporal", 4), ("all", 4)]
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def micro(
    part="all", scales=3, *, window=3, dws_conv=False, published=False, gates=0.7, kind=Detector
):
    """part None: no attention. Alike but for what is asked for: parameters of one name are the same."""
    torch.manual_seed(0)
    spatial, temporal = PARTS[part or "all"]
    fpn = FpnConfig(
        in_stages=[1, 2, 3, 4][-scales:],
        enable_small_object_attention=part is not None,
        attention_spatial=spatial,
        attention_temporal=temporal,
        temporal_window=window,
        identity_init=not published,
    )
    backbone = BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5, dws_conv=dws_conv)
    config = ModelConfig(backbone=backbone, fpn=fpn, head=HeadConfig(num_classes=2))
    detector = kind(config, CHANNELS)
    for name, parameter in detector.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            if name.endswith("gate"):
                parameter.fill_(gates)
            elif "_preds" in name and name.endswith("bias"):
                parameter.zero_()  # sure enough of some cells for detections
            elif (
                parameter.dim() > 1
            ):  # large enough for every frame and part to show in the outputs
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator)
                    * (2 / parameter[0].numel()) ** 0.5
                )
    return detector


def some_frames(steps=STEPS, lanes=LANES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (steps, lanes, CHANNELS, H, W), dtype=torch.uint8, generator=g)


def run(detector, frames, state=None, **options):
    state = detector.initial_state(frames.shape[1], H, W) if state is None else state
    with torch.no_grad():
        return detector(frames, state, **options)


def by_frame(raw, steps=STEPS):
    return raw.unflatten(0, (steps, -1))


def assert_states_close(a, b):
    for x, y in zip(state_tensors(a), state_tensors(b), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


# -- lanes and recordings --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("part", "scales"), ATTENDING)
def test_a_lane_sees_itself_alone(part, scales):
    """A lane gives the same in another order, alone, or with other lanes."""
    detector, frames = micro(part, scales).eval(), some_frames()
    out, state = run(detector, frames)
    order = torch.tensor([2, 0, 1])
    permuted, after = run(detector, frames[:, order])
    torch.testing.assert_close(by_frame(permuted), by_frame(out)[:, order], **EXACT)
    assert_states_close(after, map_state(lambda t: t.index_select(t.dim() - 4, order), state))
    alone, _ = run(detector, frames[:, 1:2])
    torch.testing.assert_close(by_frame(alone)[:, 0], by_frame(out)[:, 1], **EXACT)


@pytest.mark.parametrize(("part", "scales"), ATTENDING)
def test_a_start_is_of_one_lane(part, scales):
    detector, frames = micro(part, scales).eval(), some_frames(4)
    _, state = run(detector, frames[:2])
    starts = torch.tensor([False, True, False])
    results = (
        run(detector, frames[2:], state, starts=starts),
        run(detector, frames[2:], state),
        run(detector, frames[2:]),
    )
    out, kept, fresh = (by_frame(raw, 2) for raw, _ in results)
    for lane, expected in enumerate((kept, fresh, kept)):
        assert torch.equal(out[:, lane], expected[:, lane])
    assert not torch.allclose(out[:, 1], kept[:, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("part", "scales", "window"),
    [(*case, 3) for case in ATTENDING] + [("temporal", 3, 2), ("all", 4, 5)],
)
def test_cutting_anywhere_changes_nothing(part, scales, window):
    detector, frames = micro(part, scales, window=window).eval(), some_frames()
    labelled = torch.rand(STEPS, LANES, generator=torch.Generator().manual_seed(1)) < 0.6
    expected, end = run(detector, frames, labelled=labelled)
    for cuts in [(t, STEPS - t) for t in range(1, STEPS)] + [(1,) * STEPS, (1, 2, 1, 2)]:
        state, parts = None, []
        for part_frames, part_labelled in zip(
            frames.split(cuts), labelled.split(cuts), strict=True
        ):
            raw, state = run(detector, part_frames, state, labelled=part_labelled)
            parts.append(raw)
        torch.testing.assert_close(torch.cat(parts), expected, **EXACT)
        assert_states_close(state, end)


@pytest.mark.parametrize("window", [2, 4])
def test_mixed_lanes_look_back_at_their_neighbours_frames_alone(window):
    """The ablation of the learning study: each lane reads the frames before of the next lane.

    For all frames or some labelled ones, in one chunk or two.
    """
    mixed = micro("temporal", window=window, kind=MixedLanesDetector).eval()
    frames = some_frames()
    plain = micro("temporal", window=window).eval()
    out, end = run(mixed, frames)
    stages, before = plain.initial_state(LANES, H, W)
    for t in range(STEPS):
        handed = DetectorState(stages, tuple(frames_before.roll(-1, 1) for frames_before in before))
        raw, (stages, after) = run(plain, frames[t : t + 1], handed)
        before = tuple(
            torch.cat((old[1:], new[-1:])) for old, new in zip(before, after, strict=True)
        )
        torch.testing.assert_close(raw, by_frame(out)[t], **EXACT)
    labelled = torch.rand(STEPS, LANES, generator=torch.Generator().manual_seed(1)) < 0.4
    torch.testing.assert_close(
        run(mixed, frames, labelled=labelled)[0], out[labelled.flatten()], **EXACT
    )
    _first, state = run(mixed, frames[:2])
    assert_states_close(run(mixed, frames[2:], state)[1], end)


# -- labelled frames -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("part", "scales"), ATTENDING)
def test_other_labelled_frames_change_no_prediction(part, scales):
    detector, frames = micro(part, scales).eval(), some_frames()
    every, end = run(detector, frames)
    g = torch.Generator().manual_seed(2)
    masks = [torch.rand(STEPS, LANES, generator=g) < fraction for fraction in (0.1, 0.3, 0.7)] + [
        torch.zeros(STEPS, LANES) > 0
    ]
    for frame in (0, STEPS - 1):
        masks.append(torch.zeros(STEPS, LANES, dtype=torch.bool))
        masks[-1][frame, 1] = True
    for labelled in masks:
        raw, state = run(detector, frames, labelled=labelled)
        torch.testing.assert_close(raw, every[labelled.flatten()], **EXACT)
        assert_states_close(state, end)


def needed_by_definition(labelled, looks_back):
    """Rows (t, b): labelled ones, those that a labelled one looks back at, and those that the next chunk looks back at."""
    steps, lanes = labelled.shape
    rows = []
    for t in range(steps):
        for b in range(lanes):
            later = any(labelled[s, b] for s in range(t, min(t + looks_back + 1, steps)))
            rows += [t * lanes + b] * bool(later or t >= steps - looks_back)
    return rows


@pytest.mark.parametrize(
    ("part", "window"),
    [("all", 2), ("temporal", 3), ("all", 4), ("spatial", 3), ("channel", 3), (None, 3)],
)
def test_neck_and_head_run_on_the_frames_that_labelled_ones_need(part, window):
    detector, frames, seen = micro(part, window=window).eval(), some_frames(), {}
    detector.backbone.register_forward_hook(
        lambda _, __, out: seen.update(backbone=[f.flatten(0, 1) for f in out[0][1:]])
    )
    detector.fpn.register_forward_pre_hook(lambda _, args: seen.update(neck=args[0]))
    detector.yolox_head.register_forward_pre_hook(lambda _, args: seen.update(head=args[0]))
    none = torch.zeros(STEPS, LANES, dtype=torch.bool)
    masks = [none, ~none] + [none.clone() for _ in range(STEPS)]
    for t, mask in enumerate(masks[2:]):
        mask[t, t % LANES] = True
    masks += [
        torch.rand(STEPS, LANES, generator=torch.Generator().manual_seed(s)) < 0.3 for s in range(3)
    ]
    for labelled in masks:
        run(detector, frames, labelled=labelled)
        rows = needed_by_definition(labelled, window - 1 if part in ("all", "temporal") else 0)
        for given, features in zip(seen["neck"], seen["backbone"], strict=True):
            assert torch.equal(given, features[rows])
        assert [len(f) for f in seen["head"]] == [labelled.sum()] * 3


# -- training --------------------------------------------------------------------------------------------------------
def losses_and_gradients(detector, evaluate):
    """Of two chunks with one update between; between the chunks, perhaps, an evaluation of other recordings."""
    boxes = torch.tensor([[[1, 30.0, 16, 20, 20]]]).repeat(2 * LANES, 1, 1)
    optimizer, state, out = (
        torch.optim.SGD(detector.parameters(), 0.01),
        detector.initial_state(LANES, H, W),
        [],
    )
    for seed in (0, 1):
        if evaluate:
            detector.eval()
            run(detector, some_frames(3, 2, seed=7), labelled=torch.tensor([[True, False]] * 3))
            detector.step(some_frames(1, 1, seed=8)[0], detector.initial_state(1, H, W))
        detector.train()
        optimizer.zero_grad()
        labelled = torch.tensor([[False] * LANES, [True] * LANES, [True] * LANES])
        raw, state = detector(some_frames(3, seed=seed), detach(state), labelled=labelled)
        loss = detection_loss(
            raw,
            boxes,
            torch.ones(2 * LANES, dtype=torch.long),
            detector.geometry(H, W),
            detector.config.head,
        )
        loss.total.backward()
        out += [loss.total.detach(), *(p.grad.clone() for p in detector.parameters())]
        optimizer.step()
    return [*out, *state_tensors(state), *detector.state_dict().values()]


@pytest.mark.parametrize(("part", "scales"), ATTENDING)
def test_evaluation_leaves_no_trace_in_training(part, scales):
    detector = micro(part, scales)
    for a, b in zip(
        losses_and_gradients(copy.deepcopy(detector), False),
        losses_and_gradients(detector, True),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("part", "scales"), ATTENDING)
def test_gradients_reach_the_frames_looked_back_at(part, scales):
    """Through temporal attention, besides the recurrence: what the neck was given of t-2 and t-1, and the carried frames."""
    detector, given = micro(part, scales).eval(), {}
    detector.fpn.register_forward_pre_hook(lambda _, args: given.update(features=args[0]))
    labelled = torch.zeros(4, LANES, dtype=torch.bool)
    labelled[3, 1] = True
    raw, _ = detector(some_frames(4), detector.initial_state(LANES, H, W), labelled=labelled)
    features = given["features"]
    if not PARTS[part][1]:
        assert all(len(f) == 1 for f in features)
        return
    for gradient in torch.autograd.grad(
        raw.square().sum(), features
    ):  # given are frame 1 of lane 1, and frames 2 and 3 of all
        reached = gradient.flatten(1).abs().sum(1) > 1e-6
        assert reached.tolist() == [True, False, True, False, False, True, False]
    state = detector.initial_state(LANES, H, W)
    state = DetectorState(
        state.stages, tuple(torch.ones_like(p).requires_grad_() for p in state.previous)
    )
    raw, _ = detector(some_frames(1), state, labelled=torch.tensor([[False, True, False]]))
    for carried in torch.autograd.grad(raw.square().sum(), state.previous):
        assert (
            (carried.flatten(2).abs().sum(2) > 0) == torch.tensor([[False, True, False]] * 2)
        ).all()


# -- the identity, and the published form ------------------------------------------------------------------------------
@pytest.mark.parametrize(("part", "scales"), ATTENDING)
def test_attention_starts_as_the_identity_and_the_published_form_does_not(part, scales):
    plain, frames = micro(None, scales).eval(), some_frames(3, 2)
    expected, _ = run(plain, frames)
    for attending, alike in (
        (micro(part, scales, gates=0.0), True),
        (micro(part, scales), False),
        (micro(part, scales, published=True), False),
    ):
        missing, unexpected = attending.load_state_dict(plain.state_dict(), strict=False)
        assert missing
        assert not unexpected
        error = (run(attending.eval(), frames)[0] - expected).abs().max()
        assert error < 1e-6 if alike else error > 1e-2
        assert (
            not any(name.endswith("gate") for name, _ in attending.named_parameters())
            or attending.config.fpn.identity_init
        )


# -- streaming -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("part", "scales", "dws_conv", "lanes"),
    [
        (None, 3, False, 1),
        (None, 3, True, 3),
        (None, 4, False, 3),
        (None, 4, True, 1),
        ("all", 3, False, 3),
        ("all", 3, True, 1),
        ("all", 4, False, 1),
        ("all", 4, True, 3),
        ("temporal", 3, False, 3),
        ("spatial", 4, False, 3),
    ],
)
def test_one_frame_at_a_time_is_the_batched_path(part, scales, dws_conv, lanes):
    detector, frames = micro(part, scales, dws_conv=dws_conv).eval(), some_frames(4, lanes)
    raw, end = run(detector, frames)
    expected, state = by_frame(detector.decode(raw, H, W), 4), detector.initial_state(lanes, H, W)
    for t in range(4):
        with torch.no_grad():
            decoded, state = detector.step(frames[t], state)
        torch.testing.assert_close(decoded, expected[t], rtol=1e-5, atol=1e-5)
    assert_states_close(state, end)


@pytest.mark.parametrize(("part", "scales"), [(None, 3), ("all", 4)])
def test_detect_is_a_step_then_thresholds_and_suppression(part, scales):
    detector, frames = micro(part, scales).eval(), some_frames(2)
    state, sizes = detector.initial_state(LANES, H, W), []
    with torch.no_grad():
        scores = detector.step(frames[0], state)[0][..., 4:]
    middle = (scores[..., 0] * scores[..., 1:].amax(-1)).median().item()
    detector.config.postprocess = PostprocessConfig(confidence_threshold=middle, nms_threshold=0.6)
    for options in ({"nms_threshold": 0.05}, {}, {"confidence_threshold": 0.0}):
        limits = {"confidence_threshold": middle, "nms_threshold": 0.6} | options
        with torch.no_grad():
            found, after = detector.detect(frames[0], state, **options)
            decoded, wanted_after = detector.step(frames[0], state)
        for rows, expected in zip(found, detections(decoded, **limits), strict=True):
            assert torch.equal(rows, expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip(state_tensors(after), state_tensors(wanted_after), strict=True)
        )
        sizes.append(sum(map(len, found)))
    assert 0 < sizes[0] < sizes[1] < sizes[2], sizes


# -- gates -----------------------------------------------------------------------------------------------------------
def test_gates_learn_at_a_rate_of_their_own():
    """As the engine has it: every parameter once, gates and no others at gate_lr_multiplier times the rate, without weight decay."""
    from evspan.pipeline.engine.adam import parameter_groups

    detector = micro("all")
    everything = {id(p) for p in detector.parameters()}
    gates = {id(p) for name, p in detector.named_parameters() if name.endswith(".gate")}
    matrices = {id(p) for p in detector.parameters() if p.dim() >= 2}
    decayed, plain, fast = parameter_groups(
        detector, OptimizerConfig(lr=0.1, weight_decay=0.3, gate_lr_multiplier=5)
    )
    results = [{id(p) for p in group["params"]} for group in (decayed, plain, fast)]
    assert results == [matrices, everything - matrices - gates, gates]
    assert len(gates) == 9
    assert (decayed["weight_decay"], plain["weight_decay"], fast["weight_decay"], fast["lr"]) == (
        0.3,
        0.0,
        0.0,
        0.5,
    )
    assert decayed.get("lr", 0.1) == plain.get("lr", 0.1) == 0.1
    same = parameter_groups(detector, OptimizerConfig())
    assert len(same) == 2
    assert gates < {id(p) for p in same[1]["params"]}
