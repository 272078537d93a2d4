"""The tracker on sequences worked out by hand, and on simulated recordings."""

import numpy as np
import pytest
from evspan.conf.errors import ConfigError
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.pipeline.tracking import NO_TRACK, Tracker, TrackerOptions
from evspan.pipeline.tracking import tracker as tracker_module

MS = 1000


def boxes(*rows):
    """RAW_BOX of rows (x, y, side, score, class)."""
    out = np.zeros(len(rows), RAW_BOX)
    for i, (x, y, side, score, class_id) in enumerate(rows):
        out[i]["x"], out[i]["y"], out[i]["w"], out[i]["h"] = x, y, side, side
        out[i]["class_confidence"], out[i]["class_id"] = score, class_id
    return out


def test_a_sequence_worked_out_by_hand():
    tracker = Tracker()
    steps = [
        # A and B begin; the unconfident detection begins nothing.
        ([(0, 0, 20, 0.9, 0), (100, 0, 20, 0.8, 0), (200, 0, 20, 0.4, 0)], [0, 1, NO_TRACK]),
        # Both moved by 8; the order of the detections does not matter.
        ([(108, 0, 20, 0.8, 0), (8, 0, 20, 0.9, 0)], [1, 0]),
        # B is unconfident, and is continued where it is expected: at 116.
        ([(16, 0, 20, 0.9, 0), (116, 0, 20, 0.3, 0)], [0, 1]),
        # Of another class at A's place: a new track; A is not seen.
        ([(24, 0, 20, 0.9, 1), (124, 0, 20, 0.9, 0)], [2, 1]),
        # A's unconfident detection does not continue it: it was not seen in the frame before.
        ([(32, 0, 20, 0.3, 0), (132, 0, 20, 0.9, 0)], [NO_TRACK, 1]),
        # A confident one does, at its predicted place: 3 frames on from 16, at 40.
        ([(40, 0, 20, 0.9, 0), (140, 0, 20, 0.05, 0)], [0, NO_TRACK]),
    ]
    for i, (rows, expected) in enumerate(steps):
        assert tracker.update(boxes(*rows), 50 * MS * i).tolist() == expected, i
    assert tracker.tracks == 3


def test_the_best_pairs_come_first():
    tracker = Tracker()
    tracker.update(boxes((0, 0, 20, 0.9, 0), (12, 0, 20, 0.9, 0)), 0)
    # The one at 10 overlaps both tracks, more the second; the other is left for the first.
    assert tracker.update(boxes((10, 0, 20, 0.9, 0), (1, 0, 20, 0.9, 0)), 50 * MS).tolist() == [
        1,
        0,
    ]
    equal = Tracker()
    equal.update(boxes((0, 0, 20, 0.9, 0), (0, 0, 20, 0.9, 0)), 0)
    assert equal.update(boxes((0, 0, 20, 0.9, 0), (0, 0, 20, 0.9, 0)), 1).tolist() == [0, 1]


def test_a_track_ends_by_time_not_by_frames():
    for step_ms, gap in ((50, 20), (10, 100), (500, 2)):
        tracker = Tracker(TrackerOptions(buffer_ms=1000))
        tracker.update(boxes((0, 0, 20, 0.9, 0)), 0)
        for i in range(1, gap):
            assert len(tracker.update(boxes(), i * step_ms * MS)) == 0
        assert tracker.update(boxes((0, 0, 20, 0.9, 0)), gap * step_ms * MS).tolist() == [0]
        assert tracker.update(boxes((0, 0, 20, 0.9, 0)), (gap * step_ms + 1001) * MS) == [1]


def test_velocity_is_per_time_and_frames_may_be_missing():
    tracker = Tracker(TrackerOptions(match_iou=0.9))
    for time_ms in (0, 50, 80, 300, 310, 700):
        box = boxes((time_ms / 2, time_ms / 4, 20, 0.9, 0))
        # Up to the second frame there is no velocity: 25 pixels would not overlap by 0.9.
        if time_ms == 50:
            tracker = Tracker(TrackerOptions(match_iou=0.01, buffer_ms=1000))
            tracker.update(boxes((20, 10, 20, 0.9, 0)), 40 * MS)
        assert tracker.update(box, time_ms * MS).tolist() == [0]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(tracker_module, "MOST_TRACKS", 5)
    tracker = Tracker()
    for i in range(20):
        tracker.update(boxes((1000 * i, 0, 20, 0.9, 0)), i + 1)
        assert len(tracker._tracks) <= 5
    assert tracker.tracks == 20
    tracker = Tracker(TrackerOptions(buffer_ms=10))
    for i in range(50):
        tracker.update(boxes((100 * i, 0, 20, 0.9, 0)), i * MS)
        assert len(tracker._tracks) <= 11


def test_times_and_options_are_checked():
    tracker = Tracker()
    tracker.update(boxes(), 5)
    with pytest.raises(ConfigError, match="order of their times"):
        tracker.update(boxes(), 5)
    for options in ({"match_iou": 2}, {"low_confidence": 0.7}, {"buffer_ms": -1}):
        with pytest.raises(ConfigError):
            TrackerOptions(**options)


def switches(truth, numbers):
    """How often an object's number differs from the one that it had when last seen."""
    last = {}
    count = 0
    for track, number in zip(truth.tolist(), numbers.tolist(), strict=True):
        count += last.setdefault(track, number) != number
        last[track] = number
    return count


@pytest.mark.parametrize("seed", range(2))
def test_simulated_objects_keep_their_numbers(tmp_path, seed):
    config = SimulatorConfig(height=240, width=320, min_objects=4, max_objects=6)
    simulate(tmp_path / "a_td.raw", seconds=2.0, seed=seed, config=config)
    truth = read_boxes(tmp_path / "a_bbox.npy")
    rng = np.random.default_rng(seed)
    truth = truth[np.isin(truth["t"], np.unique(truth["t"])[::2])]  # 30 Hz
    noisy = truth[rng.random(truth.size) < 0.9]  # a tenth is not detected
    for side in "xywh":
        noisy[side] += rng.normal(0, 0.04, noisy.size) * np.sqrt(noisy["w"] * noisy["h"])
    noisy["class_confidence"] = rng.uniform(0.3, 1.0, noisy.size)
    runs = []
    for _ in range(2):
        tracker = Tracker()
        numbers = [tracker.update(noisy[noisy["t"] == t], int(t)) for t in np.unique(noisy["t"])]
        runs.append(np.concatenate(numbers))
    np.testing.assert_array_equal(*runs)
    tracked = runs[0] != NO_TRACK
    assert tracked.mean() > 0.9
    assert switches(noisy["track_id"][tracked], runs[0][tracked]) <= 0.02 * tracked.sum()
    per_number = [set(noisy["track_id"][runs[0] == n]) for n in np.unique(runs[0][tracked])]
    assert np.mean([len(objects) == 1 for objects in per_number]) > 0.9
