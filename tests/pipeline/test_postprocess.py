"""Decoded predictions -> detections, against greedy suppression as it is defined: one box after the other.

Both ways are tested: frame by frame, as on a CPU, and `select`, as on a GPU, here on CPU tensors.
"""

import pytest
import torch
from evspan.pipeline.benchmark.operations import OperatorCounter
from evspan.pipeline.model import postprocess
from evspan.pipeline.model.postprocess import (
    BLOCK,
    CANDIDATES,
    ROUNDS,
    DetectionLimits,
    PendingDetections,
    detections,
    nms,
    select,
)
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(240)


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


def selected(decoded, **limits):
    """The detections as a GPU selects them."""
    chosen = DetectionLimits(**limits)
    return PendingDetections(decoded, chosen, packed=select(decoded, chosen)).read()


def assert_agrees(decoded, **limits):
    actual = detections(decoded, **limits)
    assert len(actual) == len(decoded)
    for rows, other in zip(actual, selected(decoded, **limits), strict=True):
        torch.testing.assert_close(other, rows, rtol=0, atol=0)
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
    for way in (detections, selected):
        assert [r.shape for r in way(torch.zeros(2, 7, 8), **limits)] == [(0, 7), (0, 7)]
        assert [r.shape for r in way(torch.zeros(2, 0, 8), **limits)] == [(0, 7), (0, 7)]
    mixed = random_frames(3, 30, 2, 4)
    mixed[1, :, 4] = 0
    assert [len(r) > 0 for r in assert_agrees(mixed, **limits)] == [True, False, True]
    assert nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5).tolist() == []


def test_values_that_are_not_numbers_are_never_detections():
    frames = random_frames(1, 20, 2, 5)
    frames[0, 3, 4], frames[0, 7, 5:] = float("nan"), float("nan")
    frames[0, 5, 0] = frames[0, 9, 3] = float("nan")  # a box that overlaps no other
    for threshold, least in ((1.0, 18), (0.01, 2)):
        limits = {"confidence_threshold": 0.0, "nms_threshold": threshold}
        (rows,) = detections(frames, **limits)
        assert least <= len(rows) <= 18
        assert rows[:, 4:].isfinite().all()
        (other,) = selected(frames, **limits)
        torch.testing.assert_close(other, rows, rtol=0, atol=0, equal_nan=True)


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
    expected = [*range(cells - 3, cells), *range(CANDIDATES - 3)]
    for way in (detections, selected):
        (rows,) = way(frame, confidence_threshold=0.1, nms_threshold=0.45, max_detections=cells)
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


def chain(length):
    """Boxes in a row, by falling score; each overlaps the next one by an IoU of 1/3, and no other."""
    frame = torch.zeros(length, 6, dtype=torch.float64)
    frame[:, 0] = 4 * torch.arange(length)
    frame[:, 2:4], frame[:, 5] = 8, 1
    frame[:, 4] = torch.linspace(1, 0.5, length, dtype=torch.float64)
    return frame


@pytest.mark.parametrize("limit", [300, 5])
def test_every_other_box_of_a_chain_stays_however_long_it_is(limit):
    """A candidate depends on all before it, so the rounds of a device do not suffice at first."""
    limits = {"confidence_threshold": 0.1, "nms_threshold": 0.3, "max_detections": limit}
    for length in (2, ROUNDS, ROUNDS + 1, BLOCK + 3):
        frames = torch.stack((chain(length), chain(length).flip(0)))
        is_final = select(frames, DetectionLimits(**limits))[:, -1, 1]
        assert bool(is_final.all()) is (length <= ROUNDS)
        expected = [8 * i - 4 for i in range(min(limit, (length + 1) // 2))]
        for rows in (*detections(frames, **limits), *selected(frames, **limits)):
            assert rows[:, 0].tolist() == expected


@pytest.mark.parametrize("matrix_bytes", [1, 3 * 40 * 40 * 4])
def test_frames_that_are_selected_together_do_not_mix(monkeypatch, matrix_bytes):
    monkeypatch.setattr(postprocess, "MATRIX_BYTES", matrix_bytes)
    assert_agrees(
        random_frames(7, 40, 2, 11, levels=4), confidence_threshold=0.1, nms_threshold=0.3
    )


def test_selection_makes_the_host_wait_for_nothing_and_its_sizes_do_not_depend_on_values():
    limits = DetectionLimits(0.3, 0.45)
    shapes, operators = set(), []
    for frames in (random_frames(2, 50, 3, 1), torch.zeros(2, 50, 8).double()):
        with OperatorCounter() as counted:
            shapes.add(select(frames, limits).shape)
        assert not counted.waits
        operators.append(counted.operators)
    assert shapes == {(2, 51, 7)}
    assert operators[0] == operators[1]
    assert operators[0].total() <= 90  # whatever the number of frames


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_frames_agree_with_the_definition(data):
    """Values from a few levels: equal scores, equal boxes, boxes in boxes, empty frames."""
    frames = data.draw(st.integers(1, 3))
    cells = data.draw(st.integers(1, 24))
    classes = data.draw(st.integers(1, 3))
    values = [data.draw(st.integers(0, 4)) for _ in range(frames * cells * (5 + classes))]
    decoded = torch.tensor(values, dtype=torch.float64).view(frames, cells, -1)
    decoded[..., 2:4] *= 2
    decoded[..., 4:] /= 4
    assert_agrees(
        decoded,
        confidence_threshold=data.draw(st.sampled_from([0.0, 0.0625, 0.25, 1.0])),
        nms_threshold=data.draw(st.sampled_from([0.01, 1 / 3, 0.45, 1.0])),
        max_detections=data.draw(st.sampled_from([1, 3, 300])),
    )
