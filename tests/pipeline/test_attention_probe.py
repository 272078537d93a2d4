"""Recorded attention against its formulas; the choice of probe frames; positions in the image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evspan.conf.schema.prep import DatasetConfig, DatasetRoot, frame_config
from evspan.conf.schema.training import (
    BackboneConfig,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    Precision,
)
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.inference.streaming import evaluate_split
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.tensorboard import images
from evspan.pipeline.tensorboard.attention_probe import (
    ProbeFrame,
    ProbeResult,
    choose_frames,
    probe,
    record_attention,
)
from evspan.pipeline.tensorboard.images import GREEN, ORANGE, heat_map, probe_image
from evspan.pipeline.weights import Weights
from support.layers import conv
from support.small_shards import CLASSES, FRAMES, HEIGHT, WIDTH, write_small_shards

EVERYTHING = EvaluationConfig(skip_first_ms=0, sequence_length=4)
CPU = torch.device("cpu")


def model(**fpn):
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=8, ls_init_value=1.0),
        fpn=FpnConfig(**fpn),
        head=HeadConfig(num_classes=3),
    )


def weights_of(config, opened=0.5):
    """Random weights with open gates, and scores so far apart that rounding changes no box."""
    torch.manual_seed(0)
    detector = Detector(config, 4)
    for layer in (*detector.yolox_head.obj_preds, *detector.yolox_head.cls_preds):
        torch.nn.init.normal_(layer.weight, std=20)
        torch.nn.init.zeros_(layer.bias)
    for i, (name, p) in enumerate(detector.named_parameters()):
        if name.endswith(".gate"):
            p.data.fill_(opened + 0.01 * i)
    return Weights(detector.state_dict(), config, frame_config(FRAMES), CLASSES, 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_small_shards(tmp_path_factory.mktemp("data") / "shards", {"val": [12, 7, 5]})


@pytest.fixture(scope="module")
def data(root):
    return open_dataset(DatasetConfig(root=str(root)), "val")


def mapped(root, **class_map):
    """The split with other classes."""
    source = DatasetRoot(root=str(root), class_map=class_map)
    return open_dataset(DatasetConfig(roots=[source]), "val")


def test_hooks_record_what_features_are_multiplied_with():
    config = model(enable_small_object_attention=True)
    detector = Detector(config, 4).eval()
    detector.load_state_dict(weights_of(config).tensors)
    block, scale = (
        detector.fpn.small_object_attention_modules["scale_1"],
        detector.fpn.scale_aware_attention_modules["scale_1"],
    )
    given = {}
    handles = [
        part.register_forward_pre_hook(
            lambda module, args, name=name: given.__setitem__(name, args)
        )
        for name, part in (
            ("spatial", block.spatial),
            ("temporal", block.temporal),
            ("channel", scale),
        )
    ]
    frames = torch.from_numpy(
        np.random.default_rng(0).poisson(0.3, (3, 2, 4, HEIGHT, WIDTH)).astype(np.uint8)
    )
    state = detector.initial_state(2, HEIGHT, WIDTH)
    with torch.no_grad():
        with record_attention(detector) as multipliers:
            during, _ = detector(frames, state)
        multipliers = dict(multipliers)
        listeners = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in detector.modules()
        )
        after, _ = detector(frames, state)
    assert listeners == len(handles)  # ours are gone
    assert torch.equal(during, after)
    (x,) = given["spatial"]
    scales, (first, _, last) = (
        zip(block.spatial.scale_convs, (1, 2, 4), strict=True),
        block.spatial.attention_conv,
    )
    combined = torch.cat([conv(x, c, padding=s, dilation=s) for c, s in scales], 1)
    torch.testing.assert_close(
        multipliers["scale_1/spatial"], torch.sigmoid(conv(F.relu(conv(combined, first)), last))
    )
    x, previous = given["temporal"]
    block = block.temporal
    motion = torch.sigmoid(conv(torch.cat((x, previous[:, -1]), 1), block.motion_conv, padding=1))
    torch.testing.assert_close(multipliers["scale_1/motion"], motion)
    window, over_time = torch.cat((previous, x[:, None]), 1).transpose(1, 2), block.temporal_conv
    temporal = F.conv3d(window, over_time.weight, over_time.bias)[:, :, 0]
    weights = torch.sigmoid(block.temporal_fc(temporal.mean((2, 3))))
    torch.testing.assert_close(multipliers["scale_1/temporal"], weights)
    with torch.no_grad():
        effect = block(x, previous) - x
    torch.testing.assert_close(effect, temporal * motion * weights[..., None, None] * block.gate)
    (x,) = given["channel"]
    torch.testing.assert_close(
        multipliers["scale_1/channel"], torch.sigmoid(scale.fc(x.mean((2, 3))))
    )
    assert {name: tuple(v.shape) for name, v in multipliers.items() if "_0" in name} == {
        "scale_0/spatial": (6, 1, 8, 16),
        "scale_0/motion": (6, 1, 8, 16),
        "scale_0/temporal": (6, 32),
        "scale_0/channel": (6, 32),
    }
    assert "scale_2/channel" in multipliers
    assert len(multipliers) == 2 * 4 + 1


def test_probe_frames_are_labelled_ones_with_boxes_spread_over_recordings(data):
    chosen = choose_frames(data, EVERYTHING)
    assert chosen == choose_frames(data, EVERYTHING)
    assert len(chosen) == 4
    assert {r.name for r, _ in chosen} == {"val_000", "val_001", "val_002"}
    assert all(r.labelled[f] and len(r.boxes(f)) for r, f in chosen)
    assert [(r.name, f) for r, f in choose_frames(data, EvaluationConfig(skip_first_ms=550))] == [
        ("val_000", 11)
    ]
    assert choose_frames(data, EvaluationConfig(skip_first_ms=5000)) == []


def test_probe_frames_have_boxes_that_the_class_map_and_the_filter_of_sizes_leave(root, data):
    balls = mapped(root, box=None, bar="ignore")
    expected = []
    for recording in balls.recordings:
        with_boxes = [f for f in range(recording.frames) if len(recording.boxes(f))]
        expected += [(recording.name, f) for f in with_boxes]
    stored = sum(int((np.diff(r.box_start) > 0).sum()) for r in balls.recordings)
    assert 0 < len(expected) < stored
    every = [(r.name, f) for r, f in choose_frames(balls, EVERYTHING, count=100)]
    assert every == expected
    sides = np.concatenate([r.all_boxes()[0]["w"] for r in data.recordings])
    config = replace(EVERYTHING, min_side=float(np.median(sides)))
    large = choose_frames(data, config, count=100)
    assert 0 < len(large) < len(choose_frames(data, EVERYTHING, count=100))
    for r, f in large:
        boxes = r.boxes(f)
        assert (np.minimum(boxes["w"], boxes["h"]) >= config.min_side).any()


def test_detections_of_classes_without_a_name_are_neither_kept_nor_drawn(root, data, monkeypatch):
    monkeypatch.setattr(images, "SHOWN_CONFIDENCE", 0.2)
    weights = weights_of(model())
    every = probe(weights, data, EVERYTHING, CPU)
    unnamed = np.concatenate([frame.detections for frame in every.frames])
    unnamed = unnamed[unnamed[:, 6] > 0]
    assert (unnamed[:, 4] * unnamed[:, 5]).max() > 0.2  # would be drawn
    one_class = mapped(root, box="ball", bar="ball")
    weights = replace(weights, classes=one_class.classes)
    result = probe(weights, one_class, EVERYTHING, CPU)
    for frame, with_all in zip(result.frames, every.frames, strict=True):
        named = with_all.detections[with_all.detections[:, 6] == 0]
        np.testing.assert_array_equal(frame.detections, named)
    assert sum(len(frame.detections) for frame in result.frames)
    assert probe_image(result, ["ball"]) is not None


def test_the_probe_detects_what_evaluation_detects_and_leaves_no_trace(data):
    weights = weights_of(model(enable_small_object_attention=True))
    before = torch.get_rng_state()
    config = EvaluationConfig(
        skip_first_ms=0, sequence_length=12
    )  # from each recording's beginning on, as evaluation
    seen = probe(weights, data, config, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    detector = Detector(weights.model, 4).eval()
    detector.load_state_dict(weights.tensors)
    results = {
        r.name: r
        for r in evaluate_split(detector, data, config, device=CPU, recordings=data.recordings)
    }
    for (recording, number), frame in zip(choose_frames(data, config), seen.frames, strict=True):
        result = results[recording.name]
        place = result.frames.index(number)
        np.testing.assert_array_equal(frame.frame, recording.read(number, number + 1)[0])
        np.testing.assert_array_equal(frame.boxes, result.boxes[place])
        assert len(frame.detections) == len(result.detections[place]) > 0
        np.testing.assert_allclose(frame.detections, result.detections[place], rtol=1e-3, atol=1e-3)
        assert {name: m.shape for name, m in frame.maps.items()} == {
            "scale_0/spatial": (8, 16),
            "scale_0/motion": (8, 16),
            "scale_1/spatial": (4, 8),
            "scale_1/motion": (4, 8),
        }
        assert frame.strides == {
            "scale_0/spatial": 8,
            "scale_0/motion": 8,
            "scale_1/spatial": 16,
            "scale_1/motion": 16,
        }
    assert {name: v.shape for name, v in seen.multipliers.items()} == {
        "scale_0/spatial": (4 * 128,),
        "scale_0/motion": (4 * 128,),
        "scale_0/temporal": (4 * 32,),
        "scale_0/channel": (4 * 32,),
        "scale_1/spatial": (4 * 32,),
        "scale_1/motion": (4 * 32,),
        "scale_1/temporal": (4 * 64,),
        "scale_1/channel": (4 * 64,),
        "scale_2/channel": (4 * 128,),
    }
    third = seen.multipliers["scale_0/spatial"].reshape(4, 8, 16)[2]
    np.testing.assert_array_equal(third, seen.frames[2].maps["scale_0/spatial"])
    assert sorted(seen.gates) == sorted(
        [f"scale_{i}/{part}" for i in (0, 1) for part in ("spatial", "temporal", "integration")]
        + [f"scale_{i}/channel" for i in range(3)]
    )
    assert seen.gates["scale_1/integration"] == float(
        weights.tensors["fpn.small_object_attention_modules.scale_1.gate"]
    )


def test_a_detector_of_bfloat16_is_probed(data):
    """As on a GPU, whose detectors run in the precision of their training."""
    weights = weights_of(model(enable_small_object_attention=True))
    exact = probe(weights, data, EVERYTHING, CPU)
    seen = probe(weights, data, replace(EVERYTHING, precision=Precision.bf16), CPU)
    assert seen.multipliers.keys() == exact.multipliers.keys()
    for name, values in seen.multipliers.items():
        assert values.dtype == np.float32
        assert np.abs(values - exact.multipliers[name]).mean() < 0.02, name
    assert [frame.maps.keys() for frame in seen.frames] == [f.maps.keys() for f in exact.frames]


@pytest.mark.parametrize(
    ("fpn", "maps", "gates"),
    [
        ({}, set(), 0),
        (
            {"enable_small_object_attention": True, "attention_temporal": False},
            {"scale_0/spatial", "scale_1/spatial"},
            5,
        ),
        (
            {"enable_small_object_attention": True, "identity_init": False},
            {f"scale_{i}/{part}" for i in (0, 1) for part in ("spatial", "motion")},
            0,
        ),
    ],
)
def test_every_kind_of_neck_can_be_probed(data, fpn, maps, gates):
    seen = probe(weights_of(model(**fpn)), data, EVERYTHING, CPU)
    assert all(set(frame.maps) == maps for frame in seen.frames)
    assert len(seen.gates) == gates
    columns = 2 + sum(name.startswith("scale_0") for name in maps)
    assert probe_image(seen, CLASSES).shape == (
        4 * (3 * HEIGHT + 2) - 2,
        columns * (3 * WIDTH + 2) - 2,
        3,
    )


def test_boxes_detections_and_maps_are_where_they_should_be():
    box = np.array([(0, 20, 10, 30, 25, 1, 0)], BOX)
    found = np.array([[50, 30, 70, 50, 0.9, 0.9, 2], [5, 35, 15, 45, 0.5, 0.5, 0]], np.float32)
    values = np.full((8, 16), 0.25, np.float32)
    values[4, 6:9] = 0.75  # rows 32 to 39, columns 48 to 71
    frame = ProbeFrame(
        "val_000",
        1_000_000,
        np.zeros((4, HEIGHT, WIDTH), np.uint8),
        box,
        found,
        {"scale_0/spatial": values},
        {"scale_0/spatial": 8},
    )
    rgb = probe_image(ProbeResult([frame], {}, {"scale_0/spatial": 0.125}), CLASSES)
    assert rgb.shape == (180, 3 * 302 - 2, 3)
    boxes, detections, attention = (rgb[:, x : x + 300].astype(int) for x in (0, 302, 604))

    def outlined(tile, colour, x1, y1, x2, y2):
        """Corners and middles of the sides, three times enlarged."""
        xs, ys = (3 * x1, 3 * (x1 + x2) // 2, 3 * x2 - 1), (3 * y1, 3 * (y1 + y2) // 2, 3 * y2 - 1)
        return all(tuple(tile[y, x]) == colour for x in xs for y in ys if (x, y) != (xs[1], ys[1]))

    assert outlined(boxes, GREEN, 20, 10, 50, 35)
    assert outlined(attention, GREEN, 20, 10, 50, 35)
    assert not outlined(detections, GREEN, 20, 10, 50, 35)
    assert outlined(detections, ORANGE, 50, 30, 70, 50)
    assert not outlined(detections, ORANGE, 5, 35, 15, 45)  # not sure enough
    assert tuple(boxes[3 * 25, 3 * 60]) == (255, 255, 255)  # no events: white
    bright, dark = attention[3 * 36, 3 * 60], attention[3 * 50, 3 * 60]
    assert bright.sum() > dark.sum() + 200
    assert (rgb[:, 300:302] == 120).all()  # between tiles


def test_a_heat_map_is_cut_to_the_frame_and_lighter_where_events_are():
    frame = np.zeros((4, HEIGHT, WIDTH), np.uint8)
    frame[2, 50, 90] = 1
    values = np.linspace(0, 1, 8 * 16, dtype=np.float32).reshape(8, 16)
    rgb = heat_map(values, 8, frame).astype(int)
    assert rgb.shape == (HEIGHT, WIDTH, 3)
    assert (rgb[0:8, 0:8] == rgb[0, 0]).all()
    assert rgb[0, 0].tolist() != rgb[59, 99].tolist()
    assert (rgb[50, 90] > rgb[50, 91]).all()
    assert (
        heat_map(np.full((8, 16), 0.5, np.float32), 8, frame).std(axis=(0, 1)).max() < 5
    )  # a flat map is flat
