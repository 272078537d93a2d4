"""Precision and recall at each threshold against their definition: the detections above it, matched again."""

import numpy as np
import pytest
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.evaluation import bootstrap
from evspan.pipeline.evaluation.coco import Scorer
from evspan.pipeline.evaluation.pr_curves import THRESHOLDS, pr_curves
from support.evaluated_frames import flat, some_boxes, some_frames

CLASSES = ["ball", "box", "bar"]


def iou(a, b):
    """Of x1, y1, x2, y2."""
    w, h = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return w * h / (area - w * h)


def counted_one_by_one(boxes, found, kind, threshold):
    """(right, wrong, missed): the surest chooses first, the box that it covers best of those left."""
    right = wrong = missed = 0
    for truth, rows in zip(boxes, found, strict=True):
        left = [
            (b["x"], b["y"], b["x"] + b["w"], b["y"] + b["h"])
            for b in truth
            if b["class_id"] == kind
        ]
        rows = [row for row in rows.astype(np.float64) if row[6] == kind]
        rows = sorted(rows, key=lambda row: -row[4] * row[5])
        for row in rows[:100]:
            if row[4] * row[5] < threshold:
                continue
            overlaps = [iou(row, box) for box in left]
            if overlaps and max(overlaps) >= 0.5:
                right += 1
                left.pop(int(np.argmax(overlaps)))
            else:
                wrong += 1
        missed += len(left)
    return right, wrong, missed


@pytest.mark.parametrize("seed", [0, 1])
def test_curves_count_what_is_at_least_as_sure(seed):
    boxes, found = some_frames(seed)
    curves = pr_curves(flat(boxes, found), CLASSES)
    assert [*curves] == CLASSES
    assert THRESHOLDS[1] == 0.01
    assert len(THRESHOLDS) == 101
    for kind, name in enumerate(CLASSES):
        curve = curves[name]
        for i in (0, 1, 7, 20, 50, 80, 99, 100):
            right, wrong, missed = counted_one_by_one(boxes, found, kind, THRESHOLDS[i])
            assert (curve.true_positives[i], curve.false_positives[i], curve.missed[i]) == (
                right,
                wrong,
                missed,
            ), (name, i)
            assert curve.recall[i] == pytest.approx(right / (right + missed))
            assert curve.precision[i] == pytest.approx(
                right / (right + wrong) if right + wrong else 1
            )
        assert curve.true_positives[0] > curve.true_positives[30] > 0 < curve.false_positives[0]


def test_frames_are_matched_in_portions_with_the_same_curves(monkeypatch):
    boxes, found = some_frames(2)
    boxes[6:12] = [b[:0] for b in boxes[6:12]]  # portions without a box
    found[9:12] = [rows[:0] for rows in found[9:12]]  # and without detections
    frames = flat(boxes, found)
    whole = pr_curves(frames, CLASSES)
    sizes = []
    matched = Scorer.matched

    def noted(self, *args, **kwargs):
        sizes.append(len(self.frames))
        return matched(self, *args, **kwargs)

    monkeypatch.setattr(Scorer, "matched", noted)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 3)
    curves = pr_curves(frames, CLASSES)
    assert sizes == [3] * 13 + [1]
    assert curves.keys() == whole.keys()
    for name, curve in curves.items():
        for counts in ("true_positives", "false_positives", "missed"):
            np.testing.assert_array_equal(getattr(curve, counts), getattr(whole[name], counts))


def test_frames_crowded_beyond_what_counts_and_a_class_without_boxes():
    rng = np.random.default_rng(3)
    boxes = [np.zeros(0, BOX), some_boxes(rng, 3)]
    boxes[1]["class_id"] = 0
    rows = np.zeros((150, 7), np.float32)
    rows[:, 2:4], rows[:, 4], rows[:, 5] = 5, 1, rng.uniform(0.1, 1, 150)
    curves = pr_curves(flat(boxes, [rows, np.zeros((0, 7), np.float32)]), CLASSES)
    assert [*curves] == ["ball"]
    assert curves["ball"].false_positives[0] == 100
    assert curves["ball"].missed.tolist() == [3] * 101
    assert curves["ball"].precision[-1] == 1


def test_nothing_to_find_gives_no_curves():
    assert pr_curves(flat([np.zeros(0, BOX)], [np.zeros((0, 7), np.float32)]), CLASSES) == {}
