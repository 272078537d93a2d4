"""COCO metrics against pycocotools; groups of boxes; the protocol's filters; streaming over recordings against frame by frame."""

import numpy as np
import pytest
import torch
from evspan.conf.schema.prep import DatasetConfig, DatasetRoot, FrameConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
)
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.data.datasets import Dataset, RecordingData, open_dataset
from evspan.pipeline.evaluation.coco import Scorer, coco_metrics
from evspan.pipeline.inference.streaming import RecordingResult, evaluate_split, score
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.postprocess import detections
from evspan.pipeline.tensorboard import images
from support.evaluated_frames import as_detections, by_pycocotools, flat, some_frames
from support.small_shards import BINS, CLASSES, HEIGHT, WIDTH, write_small_shards


@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_pycocotools(seed):
    boxes, found = some_frames(seed)
    if seed == 3:  # a class without boxes, and no large ones
        boxes = [b[(b["class_id"] != 1) & (b["w"] * b["h"] < 96**2)] for b in boxes]
    metrics, theirs = (
        coco_metrics(flat(boxes, found), CLASSES),
        by_pycocotools(boxes, found, CLASSES),
    )
    names = (
        "ap",
        "ap50",
        "ap75",
        "ap_small",
        "ap_medium",
        "ap_large",
        "ar1",
        "ar10",
        "ar100",
        "ar_small",
        "ar_medium",
        "ar_large",
    )
    ours = [-1.0 if getattr(metrics, n) is None else getattr(metrics, n) for n in names]
    np.testing.assert_allclose(ours, theirs.stats, atol=1e-9)
    assert 0.05 < metrics.ap < 0.9
    assert metrics.boxes == sum(map(len, boxes))
    assert metrics.frames == 40
    for k, name in enumerate(CLASSES):
        precision = theirs.eval["precision"][:, :, k, 0, 2]
        expected = precision[precision > -1].mean() if (precision > -1).any() else None
        assert metrics.per_class[name] == (
            None if expected is None else pytest.approx(expected, abs=1e-9)
        )
    assert metrics.per_class["box"] is None or seed != 3
    assert "AP large" in metrics.table()
    assert "ap_class/ball" in metrics.scalars()


def test_boxes_against_themselves_give_100():
    boxes, _ = some_frames(0)
    rng = np.random.default_rng(1)
    metrics = coco_metrics(flat(boxes, [as_detections(rng, b, 0) for b in boxes]), CLASSES)
    fractions = [
        metrics.ap,
        metrics.ap50,
        metrics.ap75,
        metrics.ap_small,
        metrics.ap_medium,
        metrics.ap_large,
    ]
    assert fractions == pytest.approx([1.0] * 6)
    assert metrics.ar100 == 1
    assert set(metrics.per_class.values()) == {1.0}


def test_nothing_found_and_nothing_there():
    boxes, _ = some_frames(0)
    nothing = [np.zeros((0, 7), np.float32)] * len(boxes)
    assert coco_metrics(flat(boxes, nothing), CLASSES).ap == 0
    empty = coco_metrics(flat([b[:0] for b in boxes], nothing), CLASSES)
    assert empty.ap is None
    assert empty.frames == 40
    assert "-" in empty.table()
    assert empty.scalars() == {}
    assert coco_metrics(flat([], []), CLASSES).frames == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_group_ignores_the_others_as_coco_ignores_sizes(seed):
    boxes, found = some_frames(seed)
    rng = np.random.default_rng(seed)
    group = [rng.random(len(b)) < 0.3 for b in boxes]
    theirs = by_pycocotools(boxes, found, CLASSES, counts=group)
    scorer = Scorer(flat(boxes, found), CLASSES)
    ours = scorer.of_group(np.concatenate(group))
    recall = theirs.eval["recall"][:, :, 0, 2]
    assert [ours[k] for k in ("ap", "ap50", "recall")] == pytest.approx(
        theirs.stats[[0, 1, 8]].tolist(), abs=1e-9
    )
    assert ours["recall50"] == pytest.approx(recall[0].mean(), abs=1e-9)
    assert ours["boxes"] == sum(map(sum, group))
    every, metrics = scorer.of_group(np.ones(sum(map(len, boxes)), bool)), scorer.metrics()
    assert (
        (every["ap"], every["ap50"], every["recall"])
        == (metrics.ap, metrics.ap50, metrics.ar100)
        != (ours["ap"],) * 3
    )
    assert scorer.of_group(np.zeros(sum(map(len, boxes)), bool))["ap"] is None


def test_what_is_found_of_another_group_is_no_mistake():
    """Two boxes, both found, and a detection of nothing that is surer than one of them."""
    boxes = np.array([(0, 0, 0, 20, 20, 0, 0), (0, 100, 100, 20, 20, 0, 1)], BOX)
    rows = np.array(
        [
            (0, 0, 20, 20, 1, 0.9, 0),
            (200, 200, 220, 220, 1, 0.8, 0),
            (100, 100, 120, 120, 1, 0.7, 0),
        ],
        np.float32,
    )
    scorer = Scorer(flat([boxes], [rows]), CLASSES)
    assert scorer.of_group(np.array([True, False]))["ap50"] == pytest.approx(1.0)
    assert scorer.of_group(np.array([False, True]))["ap50"] == pytest.approx(
        0.5
    )  # 0.9 is ignored, 0.8 is not
    assert scorer.metrics().ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize("seed", range(3))
def test_parts_score_as_they_do_alone(seed):
    boxes, found = some_frames(seed)
    frames = flat(boxes, found)
    parts = {"early": np.arange(40) < 15, "late": np.arange(40) >= 15, "none": np.zeros(40, bool)}
    result = Scorer(frames, CLASSES).of_frames(parts)
    for name, part in parts.items():
        alone = coco_metrics(
            flat([b for b, p in zip(boxes, part) if p], [f for f, p in zip(found, part) if p]),
            CLASSES,
        )
        for key, value in result[name].items():
            expected = getattr(alone, key)
            assert value == (None if expected is None else pytest.approx(expected, abs=1e-9)), (
                name,
                key,
            )


def confused(boxes, found, classes, iou, threshold):
    """The definition, box by box."""
    matrix = np.zeros((classes + 1, classes + 1), int)
    for truth, rows in zip(boxes, found, strict=True):
        left = [
            (float(b["x"]), float(b["y"]), float(b["w"]), float(b["h"]), int(b["class_id"]))
            for b in truth
        ]
        sure = sorted(
            (r for r in rows.astype(np.float64).tolist() if r[4] * r[5] >= threshold),
            key=lambda r: -r[4] * r[5],
        )
        for x1, y1, x2, y2, _, _, kind in sure:
            overlaps = []
            for x, y, w, h, _ in left:
                inside = max(0, min(x2, x + w) - max(x1, x)) * max(0, min(y2, y + h) - max(y1, y))
                overlaps.append(inside / ((x2 - x1) * (y2 - y1) + w * h - inside))
            if overlaps and max(overlaps) >= iou:
                matrix[left.pop(int(np.argmax(overlaps)))[4], int(kind)] += 1
            else:
                matrix[classes, int(kind)] += 1
        for *_, kind in left:
            matrix[kind, classes] += 1
    return matrix


@pytest.mark.parametrize("seed", range(3))
def test_confusion_is_what_its_definition_says(seed):
    boxes, found = some_frames(seed)
    rng = np.random.default_rng(seed)
    boxes = [np.repeat(b, 2) for b in boxes]  # crowds, in which several boxes would do
    for b in boxes:
        b["x"] += rng.uniform(-6, 6, len(b))
    for rows in found:
        wrong = rng.random(len(rows)) < 0.4
        rows[wrong, 6] = rng.integers(0, 3, wrong.sum())
    ours = Scorer(flat(boxes, found), CLASSES).confusion(0.5, 0.2)
    np.testing.assert_array_equal(ours, confused(boxes, found, 3, 0.5, 0.2))
    assert ours[:3].sum() == sum(map(len, boxes))
    assert ours[0, 1] > 0
    assert ours[3, :3].sum() > 0


# -- protocol ----------------------------------------------------------------------------------------------------
def recording_of(boxes, name="a"):
    ends = 50_000 * np.arange(1, len(boxes) + 1)
    start = np.concatenate(([0], np.cumsum([len(b) for b in boxes])))
    every = np.concatenate(boxes)
    return RecordingData(
        name,
        7_000,
        ends,
        np.ones(len(boxes), bool),
        start,
        lambda which: np.zeros(0),
        lambda which: every[which],
    )


def scored(boxes, found, **config):
    data = Dataset([recording_of(boxes)], FrameConfig(downsample=4), HEIGHT, WIDTH, CLASSES)
    result = RecordingResult("a", list(range(len(boxes))), list(boxes), list(found))
    return score([result], data, EvaluationConfig(**config)), result, data


def test_filters_hold_for_boxes_and_detections_alike():
    boxes, found = some_frames(5)
    wide = [b[(np.minimum(b["w"], b["h"]) >= 20) & (np.hypot(b["w"], b["h"]) >= 60)] for b in boxes]
    sure = []
    for rows in found:
        w, h = rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1]
        sure.append(rows[(np.minimum(w, h) >= 20) & (np.hypot(w, h) >= 60)])
    metrics, _, _ = scored(
        boxes, found, skip_first_ms=500, min_side=20, min_diagonal=60, skip_empty_frames=False
    )
    expected = coco_metrics(
        flat(wide[10:], sure[10:]), CLASSES
    )  # ten windows end within the first 500 ms
    assert metrics == expected
    assert metrics.frames == 30
    metrics, _, _ = scored(boxes, found, skip_first_ms=500, min_side=20, min_diagonal=60)
    kept = [i for i in range(10, 40) if len(wide[i])]
    assert metrics == coco_metrics(flat([wide[i] for i in kept], [sure[i] for i in kept]), CLASSES)
    assert metrics.frames == len(kept) < 30


def test_detections_in_prophesees_form_are_in_pixels_and_time_of_the_sensor():
    boxes, found = some_frames(6, frames=3)
    _, result, data = scored(boxes, found)
    raw = result.as_raw_boxes(data)
    rows = np.concatenate(found)
    assert raw["t"].tolist() == [57_000] * len(found[0]) + [107_000] * len(found[1]) + [
        157_000
    ] * len(found[2])
    np.testing.assert_allclose(raw["x"], 4 * rows[:, 0])
    np.testing.assert_allclose(raw["h"], 4 * (rows[:, 3] - rows[:, 1]), rtol=1e-5)
    np.testing.assert_allclose(raw["class_confidence"], rows[:, 4] * rows[:, 5])


# -- streaming ---------------------------------------------------------------------------------------------------
def some_detector(channels):
    """Random, with open gates, and scores so far apart that rounding does not change their order."""
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5),
        fpn=FpnConfig(enable_small_object_attention=True),
        head=HeadConfig(num_classes=3),
    )
    detector = Detector(model, channels).eval()
    for name, parameter in detector.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.7)
        elif "preds" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=2.0)
        elif "obj_preds" in name or "cls_preds" in name:
            torch.nn.init.zeros_(parameter)
    return detector


def test_detections_of_classes_that_the_dataset_lacks_are_left_out(tmp_path, monkeypatch):
    """A head of three classes on a dataset of one."""
    root = write_small_shards(tmp_path / "shards", {"val": [6, 4]})
    source = DatasetRoot(root=str(root), class_map={"box": "ball", "bar": "ball"})
    data = open_dataset(DatasetConfig(root=str(root)), "val")
    one_class = open_dataset(DatasetConfig(roots=[source]), "val")
    detector = some_detector(data.channels)
    config = EvaluationConfig(confidence_threshold=0.2, skip_first_ms=0)
    device = torch.device("cpu")
    every = evaluate_split(detector, data, config, device=device, recordings=data.recordings)
    results = evaluate_split(
        detector, one_class, config, device=device, recordings=one_class.recordings
    )
    num_left_out = 0
    for result, with_all in zip(results, every, strict=True):
        for rows, all_rows in zip(result.detections, with_all.detections, strict=True):
            np.testing.assert_array_equal(rows, all_rows[all_rows[:, 6] == 0])
            num_left_out += len(all_rows) - len(rows)
        assert not result.as_raw_boxes(one_class)["class_id"].any()
    assert num_left_out > 0
    monkeypatch.setattr(images, "SHOWN_CONFIDENCE", 0.2)
    assert images.evaluation_image(results, one_class) is not None
    assert score(results, one_class, config).detections > 0


@pytest.mark.parametrize(
    ("lanes", "length", "nms_threshold"), [(1, 4, 0.45), (2, 3, 0.1), (4, 10, 0.45)]
)
@pytest.mark.slow
def test_streaming_is_one_recording_after_the_other_frame_by_frame(
    tmp_path, lanes, length, nms_threshold
):
    root = write_small_shards(tmp_path / "shards", {"val": [7, 12, 1, 5]})
    data = open_dataset(DatasetConfig(root=str(root)), "val")
    detector = some_detector(data.channels)
    config = EvaluationConfig(
        batch_size=lanes,
        sequence_length=length,
        confidence_threshold=0.2,
        nms_threshold=nms_threshold,
    )
    results = evaluate_split(
        detector, data, config, device=torch.device("cpu"), recordings=data.recordings
    )
    assert [r.name for r in results] == [r.name for r in data.recordings]
    for recording, result in zip(data.recordings, results, strict=True):
        assert result.frames == np.flatnonzero(recording.labelled).tolist()
        state, at = detector.initial_state(1, HEIGHT, WIDTH), 0
        for i in range(recording.frames):
            with torch.no_grad():
                frame = torch.from_numpy(recording.read(i, i + 1))[:, None]
                raw, state = detector(
                    frame,
                    state,
                    starts=torch.zeros(1, dtype=torch.bool),
                    labelled=torch.ones(1, 1, dtype=torch.bool),
                )
            if not recording.labelled[i]:
                continue
            (expected,) = detections(
                detector.decode(raw, HEIGHT, WIDTH),
                confidence_threshold=0.2,
                nms_threshold=nms_threshold,
            )
            np.testing.assert_allclose(result.detections[at], expected, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(result.boxes[at], recording.boxes(i))
            at += 1
    assert sum(len(d) for r in results for d in r.detections) > 20
    assert evaluate_split(detector, data, config, device=torch.device("cpu"), recordings=[]) == []
    assert data.channels == 2 * BINS
