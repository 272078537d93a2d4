"""Decoded predictions -> detections, against greedy suppression as it is defined: one box after the other."""

import pytest
import torch
from evspan.pipeline.model.postprocess import BLOCK, CANDIDATES, detections, nms

pytestmark = pytest.mark.timeout(60)


def iou(a, b):
    x = min(a[2], b[2]) - max(a[0], b[0])
    y = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(x, 0) * max(y, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def greedy(boxes, scores, kinds, threshold):
    """Of equal scores the earlier one goes first."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(kinds[i] != kinds[k] or iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def frame_by_definition(frame, *, confidence_threshold, nms_threshold, max_detections=300):
    """frame: (cells, 5 + classes) as lists -> rows x1, y1, x2, y2, objectness, class score, class id."""
    rows, scores = [], []
    for cx, cy, w, h, objectness, *classes in frame:
        best = max(classes)
        if objectness * best >= confidence_threshold:
            rows.append(
                [
                    cx - w / 2,
                    cy - h / 2,
                    cx + w / 2,
                    cy + h / 2,
                    objectness,
                    best,
                    classes.index(best),
                ]
            )
            scores.append(objectness * best)
    kept = greedy([r[:4] for r in rows], scores, [r[6] for r in rows], nms_threshold)
    return [rows[i] for i in kept[:max_detections]]


def random_frames(count, cells, classes, seed, levels=None):
    """Double precision, so that the definition computes the same numbers. levels: scores and sizes are multiples of 1/levels of
    their range, so that many are equal and boxes repeat."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(count, cells, 5 + classes, generator=g, dtype=torch.float64)
    if levels:
        values = (values * levels).round() / levels
    values[..., :2] *= 100
    values[..., 2:4] = 4 + 28 * values[..., 2:4]
    return values


def assert_agrees(decoded, **limits):
    actual = detections(decoded, **limits)
    assert len(actual) == len(decoded)
    for rows, frame in zip(actual, decoded.tolist(), strict=True):
        expected = torch.tensor(frame_by_definition(frame, **limits), dtype=torch.float64).view(
            -1, 7
        )
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    return actual


@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize(
    ("seed", "cells", "classes"), [(0, 1, 1), (1, 40, 1), (2, 400, 3), (3, 3 * BLOCK, 2)]
)
def test_detections_agree_with_the_definition(seed, cells, classes, levels):
    decoded = random_frames(2, cells, classes, seed, levels)
    for confidence, threshold in ((0.0, 0.45), (0.125, 0.1), (0.5, 1.0)):
        assert_agrees(decoded, confidence_threshold=confidence, nms_threshold=threshold)


def test_equal_boxes_and_scores_keep_the_first_of_each_class():
    frame = torch.tensor(
        [
            [50, 50, 20, 20, 1, 0.5, 0.25],
            [50, 50, 20, 20, 1, 0.5, 0.25],
            [50, 50, 20, 20, 1, 0.25, 0.5],
            [50, 50, 20, 20, 1, 0.5, 0.5],
        ],
        dtype=torch.float64,
    )[None]
    (rows,) = assert_agrees(frame, confidence_threshold=0.1, nms_threshold=0.45)
    assert rows[:, 6].tolist() == [0, 1]  # of equal class scores the first class


def test_thresholds_are_inclusive():
    """A score at the threshold stays; an overlap at the threshold does not suppress."""
    frame = torch.tensor([[10, 10, 16, 8, 1, 0.5], [10, 14, 16, 8, 1, 0.25]], dtype=torch.float64)[
        None
    ]  # IoU 1/3
    third = iou([2, 6, 18, 14], [2, 10, 18, 18])
    assert third == 1 / 3
    for confidence, overlap, left in (
        (0.25, third, 2),
        (0.25, 0.333, 1),
        (0.2501, third, 1),
        (0.5, 0.1, 1),
        (0.5001, third, 0),
    ):
        assert (
            len(assert_agrees(frame, confidence_threshold=confidence, nms_threshold=overlap)[0])
            == left
        )


def test_no_frames_no_cells_nothing_sure_enough():
    limits = {"confidence_threshold": 0.1, "nms_threshold": 0.45}
    assert detections(torch.zeros(0, 5, 8), **limits) == []
    assert [r.shape for r in detections(torch.zeros(2, 7, 8), **limits)] == [(0, 7), (0, 7)]
    mixed = random_frames(3, 30, 2, 4)
    mixed[1, :, 4] = 0
    assert [len(r) > 0 for r in assert_agrees(mixed, **limits)] == [True, False, True]
    assert nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5).tolist() == []


def test_values_that_are_not_numbers_are_never_detections():
    frames = random_frames(1, 20, 2, 5)
    frames[0, 3, 4], frames[0, 7, 5:] = float("nan"), float("nan")
    (rows,) = detections(frames, confidence_threshold=0.0, nms_threshold=1.0)
    assert len(rows) == 18
    assert rows.isfinite().all()


@pytest.mark.parametrize("limit", [1, 5, BLOCK, BLOCK + 1])
def test_at_most_so_many_the_surest(limit):
    decoded = random_frames(1, 3 * BLOCK, 3, 6, levels=16)
    (rows,) = assert_agrees(
        decoded, confidence_threshold=0.0, nms_threshold=0.45, max_detections=limit
    )
    assert len(rows) == min(
        limit,
        len(
            detections(decoded, confidence_threshold=0.0, nms_threshold=0.45, max_detections=9999)[
                0
            ]
        ),
    )


def test_of_too_many_candidates_the_surest_are_compared_and_of_equal_ones_the_first():
    cells = CANDIDATES + 500
    frame = torch.zeros(1, cells, 6, dtype=torch.float64)
    frame[0, :, :2] = 100 * torch.arange(cells)[:, None]  # apart
    frame[0, :, 2:4], frame[0, :, 4], frame[0, :, 5] = 10, 1, 0.5
    frame[0, -3:, 5] = 0.75
    (rows,) = detections(frame, confidence_threshold=0.1, nms_threshold=0.45, max_detections=cells)
    expected = [*range(cells - 3, cells), *range(CANDIDATES - 3)]
    assert ((rows[:, 0] + 5) / 100).round().long().tolist() == expected


def test_suppression_is_per_class_and_leaves_the_order_of_scores():
    g = torch.Generator().manual_seed(9)
    corner, side = (
        80 * torch.rand(500, 2, generator=g).double(),
        5 + 30 * torch.rand(500, 2, generator=g).double(),
    )
    boxes, scores = torch.cat((corner, corner + side), 1), torch.rand(500, generator=g)
    kinds = torch.randint(0, 4, (500,), generator=g)
    kept = nms(boxes, scores, kinds, 0.3)
    assert kept.tolist() == greedy(boxes.tolist(), scores.tolist(), kinds.tolist(), 0.3)
    assert (scores[kept].diff() <= 0).all()
    assert nms(boxes, scores, kinds, 0.3, limit=7).tolist() == kept[:7].tolist()
    apart = []
    for kind in range(4):
        own = (kinds == kind).nonzero()[:, 0]
        apart += own[nms(boxes[own], scores[own], kinds[own], 0.3)].tolist()
    assert sorted(apart) == sorted(kept.tolist())
