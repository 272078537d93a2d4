"""Ignore regions in batches, the loss and the evaluation, against plain definitions."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import EvaluationConfig, HeadConfig, Sampling, TrainingConfig
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.data.augment import augment_boxes, draw_augmentation
from evspan.pipeline.data.batch import Batch, pad_rows
from evspan.pipeline.data.boxes import to_center
from evspan.pipeline.data.datasets import StoredRegions, open_dataset
from evspan.pipeline.data.device_batches import device_batches
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.evaluation.breakdown import breakdown
from evspan.pipeline.evaluation.coco import Scorer, coco_metrics
from evspan.pipeline.evaluation.frames import (
    LabelledFrames,
    labelled_frames,
    load_frames,
    save_frames,
    scored,
)
from evspan.pipeline.evaluation.ignored import only_in_regions
from evspan.pipeline.evaluation.pr_curves import THRESHOLDS, pr_curves
from evspan.pipeline.model.assignment import assign
from evspan.pipeline.model.head import cells
from evspan.pipeline.model.loss import detection_loss, inside_regions
from support.coco_reference import coco_evaluation
from support.evaluated_frames import flat, some_boxes, some_frames
from support.small_shards import CLASSES, HEIGHT, WIDTH, write_small_shards

GEOMETRY = ((8, 12, 8), (4, 6, 16), (2, 3, 32))
CELLS = sum(h * w for h, w, _ in GEOMETRY)
NUM_CLASSES = 3


# -- batches ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shards"
    return write_small_shards(root, {"train": [9, 12, 5]}, regions=True)


@pytest.fixture(scope="module")
def data(shards):
    return open_dataset(DatasetConfig(root=str(shards)), "train")


def loader_of(data, *, lanes=range(4), frames=range(4), hflip=0.5):
    config = TrainingConfig(batch_size=4, sequence_length=4, num_workers=0)
    config.augmentation.hflip_prob = hflip
    plan = SamplingPlan(
        [r.frames for r in data.recordings],
        [r.labelled for r in data.recordings],
        lanes=4,
        sequence_length=4,
        sampling=Sampling.mixed,
        seed=3,
    )
    return Loader(data, plan, lanes, frames, config, seed=3)


def test_rows_of_a_recording_are_its_boxes_then_its_regions(data):
    for recording in data.recordings:
        rows, counts = recording.box_rows(1, recording.frames)
        split = np.split(rows, np.cumsum(counts)[:-1])
        for frame, of_frame in enumerate(split, 1):
            first, last = recording.box_start[frame : frame + 2]
            boxes = recording.read_boxes(slice(int(first), int(last)))
            first, last = recording.regions.start[frame : frame + 2]
            expected = np.concatenate((boxes, recording.regions.rows[first:last]))
            np.testing.assert_array_equal(of_frame, expected)
            np.testing.assert_array_equal(recording.boxes(frame), boxes)
    assert any((r.regions.rows["class_id"] == -1).any() for r in data.recordings)


def test_frames_without_regions_are_not_copied(data):
    recording = data.recordings[0]
    none = StoredRegions(recording.regions.rows[:0], np.zeros(recording.frames + 1, np.int64))
    rows, counts = replace(recording, regions=None).box_rows(0, recording.frames)
    again, same_counts = none.added_to(rows, counts, 0)
    assert again is rows
    assert same_counts is counts


def test_padding_separates_regions_from_boxes():
    rows = [
        np.array([[1, 2, 3, 4, 5], [-1, 6, 7, 8, 9]], np.float32),
        np.zeros((0, 5), np.float32),
        np.array([[-1, 1, 1, 2, 2], [-1, 3, 3, 4, 4]], np.float32),
    ]
    padded = pad_rows(rows)
    assert padded.counts.tolist() == [1, 0, 0]
    assert padded.boxes.tolist() == [[[1, 2, 3, 4, 5]], [[0] * 5], [[0] * 5]]
    assert padded.regions.tolist() == [
        [[6, 7, 8, 9], [0] * 4],
        [[0] * 4] * 2,
        [[1, 1, 2, 2], [3, 3, 4, 4]],
    ]
    assert pad_rows(rows[:1] * 0).regions.shape == (0, 0, 4)
    assert pad_rows([rows[0][:1]] * 2).regions.shape == (2, 0, 4)


def test_batches_contain_the_augmented_regions_of_their_frames(data):
    loader = loader_of(data)
    num_regions = 0
    for index in range(6):
        batch = loader.batch(index)
        row = 0
        for t in range(4):
            for b in range(4):
                if not batch.labelled[t, b]:
                    continue
                chunk = loader.plan.chunk(b, index)
                regions = data.recordings[chunk.recording].regions
                first, last = regions.start[chunk.first + t : chunk.first + t + 2]
                expected = augment_boxes(
                    to_center(regions.rows[first:last]),
                    draw_augmentation(
                        loader.config.augmentation, chunk, seed=3, height=HEIGHT, width=WIDTH
                    ),
                    height=HEIGHT,
                    width=WIDTH,
                )
                actual = batch.regions[row]
                actual = actual[actual[:, 2] > 0]
                np.testing.assert_array_equal(actual.numpy(), expected[:, 1:])
                assert (batch.boxes[row, : batch.counts[row], 0] >= 0).all()
                num_regions += len(expected)
                row += 1
        assert row == len(batch.regions)
    assert num_regions > 20


def test_encoded_batches_and_ranks_have_the_same_regions(data):
    whole = loader_of(data).batch(2)
    (encoded,) = islice(
        device_batches(loader_of(data).batches(2, encoded=True), torch.device("cpu")), 1
    )
    assert torch.equal(whole.regions, encoded.regions)
    by_place = {}
    for frames in (range(0, 2), range(2, 4)):
        for lanes in (range(0, 1), range(1, 4)):
            part = loader_of(data, lanes=lanes, frames=frames).batch(2)
            for row, (t, b) in enumerate(part.labelled.nonzero().tolist()):
                regions = part.regions[row]
                by_place[frames.start + t, lanes.start + b] = regions[regions[:, 2] > 0].tolist()
    for row, (t, b) in enumerate(whole.labelled.nonzero().tolist()):
        regions = whole.regions[row]
        assert by_place[t, b] == regions[regions[:, 2] > 0].tolist()
    assert isinstance(whole, Batch)


# -- loss ------------------------------------------------------------------------------------------
def some_batch(frames=4, most=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(frames, CELLS, 5 + NUM_CLASSES, generator=g)
    counts = torch.randint(0, most + 1, (frames,), generator=g)
    counts[3] = most
    scale = torch.tensor([0, 96, 64, 50, 50])
    boxes = torch.rand(frames, most, 5, generator=g) * scale + torch.tensor([0, 0, 0, 4.0, 4.0])
    boxes[..., 0] = torch.randint(0, NUM_CLASSES, (frames, most), generator=g)
    regions = torch.rand(frames, 3, 4, generator=g) * torch.tensor([96, 64, 40, 40])
    regions[0] = 0.0
    regions[1, 1:] = 0.0
    regions[3, 0] = torch.tensor([48.0, 32.0, 80.0, 50.0])
    return raw, boxes, counts, regions


def inside_one_by_one(regions):
    inside = torch.zeros(len(regions), CELLS, dtype=torch.bool)
    for i, of_frame in enumerate(regions.tolist()):
        cell = 0
        for h, w, stride in GEOMETRY:
            for row in range(h):
                for column in range(w):
                    x = (column + 0.5) * stride
                    y = (row + 0.5) * stride
                    for cx, cy, width, height in of_frame:
                        if cx - width / 2 < x < cx + width / 2:
                            inside[i, cell] |= cy - height / 2 < y < cy + height / 2
                    cell += 1
    return inside


def test_cells_inside_regions_agree_with_the_definition():
    *_, regions = some_batch()
    expected = inside_one_by_one(regions)
    assert torch.equal(inside_regions(regions, GEOMETRY), expected)
    assert expected.any()
    assert not expected[0].any()
    at = cells(GEOMETRY, regions.device)[0, 3:]
    on_the_border = torch.tensor([[[at[0] + 2, at[1], 4.0, 4.0]]])
    assert not inside_regions(on_the_border, GEOMETRY)[0, 0]


def test_only_the_objectness_of_background_cells_inside_is_left_out():
    raw, boxes, counts, regions = some_batch()
    raw.requires_grad_()
    config = HeadConfig()
    without = detection_loss(raw, boxes, counts, GEOMETRY, config)
    actual = detection_loss(raw, boxes, counts, GEOMETRY, config, regions=regions)
    foreground = assign(raw, boxes, counts, GEOMETRY, config).foreground
    left_out = inside_one_by_one(regions) & ~foreground
    assert (inside_one_by_one(regions) & foreground).any()
    expected = 0.0
    for value, positive, skipped in zip(
        raw[..., 4].flatten(), foreground.flatten(), left_out.flatten(), strict=True
    ):
        if not skipped:
            expected += F.binary_cross_entropy_with_logits(value, positive.float()).item()
    assert actual.objectness.item() == pytest.approx(expected / without.positives.item(), rel=1e-5)
    for name in ("iou", "classes", "positives", "boxes"):
        assert torch.equal(getattr(actual, name), getattr(without, name)), name
    gradient = torch.autograd.grad(actual.total, raw)[0]
    ordinary = torch.autograd.grad(without.total, raw)[0]
    assert (gradient[left_out] == 0).all()
    assert torch.equal(gradient[~left_out], ordinary[~left_out])


@pytest.mark.parametrize("regions", ["none", "no rows", "padding"])
def test_nothing_changes_by_a_bit_without_regions(regions):
    raw, boxes, counts, some = some_batch()
    raw.requires_grad_()
    given = {"none": None, "no rows": some[:, :0], "padding": torch.zeros_like(some)}[regions]
    before = detection_loss(raw, boxes, counts, GEOMETRY, HeadConfig())
    after = detection_loss(raw, boxes, counts, GEOMETRY, HeadConfig(), regions=given)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(losses.total, raw)[0] for losses in (before, after)]
    assert torch.equal(*gradients)


def test_a_frame_of_regions_alone_has_no_positives_and_a_finite_gradient():
    raw, boxes, counts, _ = some_batch()
    raw.requires_grad_()
    everywhere = torch.tensor([48.0, 32.0, 1000.0, 1000.0]).expand(4, 1, 4)
    losses = detection_loss(
        raw, boxes, torch.zeros_like(counts), GEOMETRY, HeadConfig(), regions=everywhere
    )
    assert losses.positives == 0
    assert losses.total == 0
    assert (torch.autograd.grad(losses.total, raw)[0] == 0).all()


def test_losses_of_two_ranks_add_up_to_those_of_one():
    raw, boxes, counts, regions = some_batch(6)
    whole = detection_loss(raw, boxes, counts, GEOMETRY, HeadConfig(), regions=regions)
    ranks = (slice(0, 1), slice(1, 6))
    local_values = []

    def losses(rank, reduction):
        of_rank = regions[rank]
        width = int((of_rank[..., 2] > 0).sum(1).max())  # a rank pads to its own longest
        return detection_loss(
            raw[rank],
            boxes[rank],
            counts[rank],
            GEOMETRY,
            HeadConfig(),
            sum_over_ranks=reduction,
            regions=of_rank[:, :width],
        )

    for rank in ranks:
        losses(rank, lambda values: local_values.append(values) or values)
    parts = [losses(rank, lambda _: sum(local_values)) for rank in ranks]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    torch.testing.assert_close(parts[1].objectness, whole.objectness)


# -- evaluation ------------------------------------------------------------------------------------
def frames_with_regions(seed):
    """Boxes, ignore regions and detections of each frame."""
    rng = np.random.default_rng(seed)
    boxes, detections = some_frames(seed)
    regions = []
    for i in range(len(boxes)):
        rows = some_boxes(rng, rng.integers(0, 3))
        rows["class_id"] = -1
        regions.append(rows if i % 3 else rows[:0])
    return boxes, regions, detections


def flat_frames(seed):
    boxes, regions, detections = frames_with_regions(seed)
    rows = [np.concatenate(pair) for pair in zip(boxes, regions, strict=True)]
    return flat(rows, detections)


def crowds_by_pycocotools(seed):
    """pycocotools with each region as a crowd of every class."""
    boxes, regions, detections = frames_with_regions(seed)
    annotations = []
    results = []
    for image, rows in enumerate(detections, 1):
        of_frame = [(box, int(box["class_id"]), 0) for box in boxes[image - 1]]
        of_frame += [(r, k, 1) for r in regions[image - 1] for k in range(len(CLASSES))]
        for box, class_id, is_crowd in of_frame:
            x, y, w, h = (float(box[name]) for name in "xywh")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": class_id + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": is_crowd,
                }
            )
        for x1, y1, x2, y2, objectness, confidence, class_id in rows.astype(np.float64).tolist():
            results.append(
                {
                    "image_id": image,
                    "category_id": int(class_id) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": objectness * confidence,
                }
            )
    return coco_evaluation(len(boxes), annotations, results, CLASSES)


@pytest.mark.parametrize("seed", range(3))
def test_regions_are_crowds_as_in_pycocotools(seed):
    frames = flat_frames(seed)
    metrics = coco_metrics(frames, CLASSES)
    stats = crowds_by_pycocotools(seed).stats
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    for name, expected in zip(names, stats, strict=False):
        assert getattr(metrics, name) == pytest.approx(expected, abs=1e-9), name
    boxes, _, detections = frames_with_regions(seed)
    plain = coco_metrics(flat(boxes, detections), CLASSES)
    assert plain.ap < metrics.ap
    assert plain.boxes == metrics.boxes


def iou_and_cover(a, b):
    """IoU of corners, and the fraction of a that b covers."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    area = (a[2] - a[0]) * (a[3] - a[1])
    other = (b[2] - b[0]) * (b[3] - b[1])
    return shared / (area + other - shared), shared / area


def confusion_one_by_one(seed, threshold):
    """Matrix where the detections without a box in a region are left out."""
    boxes, regions, detections = frames_with_regions(seed)
    matrix = np.zeros((NUM_CLASSES + 1, NUM_CLASSES + 1), int)
    for of_frame, ignored, rows in zip(boxes, regions, detections, strict=True):
        left = [(b["x"], b["y"], b["x"] + b["w"], b["y"] + b["h"], b["class_id"]) for b in of_frame]
        others = [(r["x"], r["y"], r["x"] + r["w"], r["y"] + r["h"]) for r in ignored]
        scores = rows[:, 4].astype(float) * rows[:, 5]
        for i in np.argsort(-scores, kind="stable"):
            if scores[i] < threshold:
                continue
            corners = rows[i, :4].astype(float).tolist()
            overlaps = [iou_and_cover(corners, box)[0] for box in left]
            if overlaps and max(overlaps) >= 0.5:
                box = left.pop(int(np.argmax(overlaps)))
                matrix[int(box[4]), int(rows[i, 6])] += 1
            elif not any(iou_and_cover(corners, r)[1] >= 0.5 for r in others):
                matrix[NUM_CLASSES, int(rows[i, 6])] += 1
        for box in left:
            matrix[int(box[4]), NUM_CLASSES] += 1
    return matrix


@pytest.mark.parametrize("seed", range(3))
def test_confusion_leaves_out_what_lies_in_regions(seed):
    frames = flat_frames(seed)
    expected = confusion_one_by_one(seed, 0.1)
    np.testing.assert_array_equal(Scorer(frames, CLASSES).confusion(0.5, 0.1), expected)
    assert only_in_regions(frames, 0.5, 0.1, most=100).any()


def only_in_regions_frame_by_frame(frames, iou, threshold, most):
    """The rows of a frame are those that name it."""
    result = np.zeros(len(frames.detections), bool)
    for frame in range(len(frames)):
        boxes = [corners(box) for box in frames.boxes[frames.box_frame == frame]]
        regions = [corners(r) for r in frames.regions[frames.region_frame == frame]]
        rows = np.flatnonzero(frames.detection_frame == frame)
        scores = frames.scores[rows]
        order = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= threshold]
        for row in rows[order[:most]]:
            own = frames.detections[row, :4].astype(float).tolist()
            overlaps = [iou_and_cover(own, box)[0] for box in boxes]
            if overlaps and max(overlaps) >= iou:
                boxes.pop(int(np.argmax(overlaps)))
            else:
                result[row] = any(iou_and_cover(own, r)[1] >= iou for r in regions)
    return result


def corners(box):
    return (box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])


@pytest.mark.parametrize("most", [3, 100])
@pytest.mark.parametrize("seed", range(3))
def test_detections_in_regions_are_those_frame_by_frame_with_scores_computed_once(
    seed, most, monkeypatch
):
    frames = flat_frames(seed)
    expected = only_in_regions_frame_by_frame(frames, 0.5, 0.1, most)
    calls = []
    scores = vars(LabelledFrames)["scores"].fget
    counted = property(lambda self: calls.append(len(self)) or scores(self))
    monkeypatch.setattr(LabelledFrames, "scores", counted)
    np.testing.assert_array_equal(only_in_regions(frames, 0.5, 0.1, most), expected)
    assert expected.any()
    assert calls == [len(frames)]


def test_pr_curves_count_no_detections_in_regions():
    frames = flat_frames(1)
    curves = pr_curves(frames, CLASSES)
    matched = Scorer(frames, CLASSES).matched(areas=[(0.0, 1e10)]).eval_imgs
    num_ignored = 0
    for k, name in enumerate(CLASSES):
        of_class = [m for m in matched if m is not None and m["category_id"] == k + 1]
        scores = np.concatenate([m["dtScores"] for m in of_class])
        hit = np.concatenate([np.array(m["dtMatched"][0], bool) for m in of_class])
        ignored = np.concatenate([np.array(m["dtIgnore"][0], bool) for m in of_class])
        num_ignored += int(ignored.sum())
        for i in (0, 20, 60):
            above = (scores >= THRESHOLDS[i]) & ~ignored
            assert curves[name].true_positives[i] == (above & hit).sum()
            assert curves[name].false_positives[i] == (above & ~hit).sum()
        boxes = int((frames.boxes["class_id"] == k).sum())
        assert curves[name].true_positives[0] + curves[name].missed[0] == boxes
    assert num_ignored > 0


def test_filters_keep_regions_of_all_sizes_and_frames_of_regions_alone_are_empty():
    region = np.zeros(1, BOX)
    region["w"] = region["h"] = 2
    region["class_id"] = -1
    box = some_boxes(np.random.default_rng(0), 1)
    box["w"] = box["h"] = 50
    rows = [np.concatenate((box, region)), region, box[:0]]
    frames = flat(rows, [np.zeros((0, 7), np.float32)] * 3)
    config = EvaluationConfig(skip_first_ms=0, min_side=10, min_diagonal=30, skip_empty_frames=True)
    chosen, kept = scored(frames, config)
    assert len(chosen) == 1
    assert len(chosen.regions) == 1
    assert kept.tolist() == [True]
    every, _ = scored(frames, replace(config, skip_empty_frames=False))
    assert len(every) == 3
    assert every.region_frame.tolist() == [0, 1]


def test_breakdown_and_files_with_regions(tmp_path):
    frames = flat_frames(2)
    table = breakdown(frames, CLASSES, EvaluationConfig(skip_first_ms=0)).table()
    assert "recording" in table
    save_frames(tmp_path / "frames.npz", frames)
    again = load_frames(tmp_path / "frames.npz")
    np.testing.assert_array_equal(again.regions, frames.regions)
    np.testing.assert_array_equal(again.region_frame, frames.region_frame)
    with np.load(tmp_path / "frames.npz") as stored:
        older = {name: stored[name] for name in stored if not name.startswith("region")}
    np.savez(tmp_path / "older.npz", **older)
    assert len(load_frames(tmp_path / "older.npz").regions) == 0
    assert len(labelled_frames([], [], [], []).regions) == 0
