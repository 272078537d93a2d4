"""Motion of boxes against the definition and the simulator's own tracks; each part of a breakdown against scores of it alone."""

import numpy as np
import pytest
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import EvaluationConfig
from evspan.data_prep.shards.format import BOX
from evspan.data_prep.simulator import SimulatorConfig, simulated_boxes
from evspan.data_prep.simulator.recording import simulated_scene
from evspan.pipeline.evaluation.breakdown import breakdown
from evspan.pipeline.evaluation.coco import Scorer, coco_metrics
from evspan.pipeline.evaluation.frames import labelled_frames, scored
from evspan.pipeline.evaluation.motion import motion
from support.evaluated_frames import as_detections, some_frames
from support.small_shards import CLASSES

NOTHING = np.zeros((0, 7), np.float32)


def of_tracks(ends, *tracks):
    """Frames of one recording; a track is {frame: (x, y)} of boxes 10 x 20."""
    boxes = [
        np.array(
            [
                (t, *track[i], 10, 20, 0, number)
                for number, track in enumerate(tracks)
                if i in track
            ],
            BOX,
        )
        for i, t in enumerate(ends)
    ]
    return labelled_frames(["a"], [np.array(ends)], [boxes], [[NOTHING] * len(ends)])


# -- motion ------------------------------------------------------------------------------------------------------
def test_speed_and_rest_of_a_stop():
    ends = [100_000 * (i + 1) for i in range(30)]
    goes = {
        i: (4.0 * min(i, 10) + 4.0 * max(i - 20, 0), 3.0) for i in range(30)
    }  # 40 px/s, at rest from frame 10 to 20
    moved = motion(of_tracks(ends, goes), still_speed=5)
    assert moved.speed == pytest.approx([40] * 10 + [20] + [0] * 9 + [20] + [40] * 9)
    assert moved.rest_s == pytest.approx([0] * 11 + [0.1 * k for k in range(9)] + [0] * 10)
    assert np.flatnonzero(moved.still(0.5)).tolist() == [16, 17, 18, 19]
    np.testing.assert_array_equal(moved.still(0.5), ~moved.moving(0.5))


def test_what_tracks_do_not_tell_is_nan():
    ends = [100_000 * (i + 1) for i in range(30)]
    once, gap = {3: (1.0, 1.0)}, {i: (5.0, 5.0) for i in (0, 1, 2, 20, 21, 22)}
    moved = motion(of_tracks(ends, {i: (9.0, 9.0) for i in range(30)}, once, gap), still_speed=5)
    assert np.isnan(moved.speed).sum() == np.isnan(moved.rest_s).sum() == 1
    assert not (moved.still(0) | moved.moving(0))[np.isnan(moved.speed)].any()
    boxes = of_tracks(ends, {}, {}, gap)
    assert motion(boxes, 5).rest_s == pytest.approx(
        [0, 0.1, 0.2] * 2
    )  # 1.8 s without a box: nobody knows
    twice = of_tracks(
        ends, {i: (9.0, 9.0) for i in range(3)}, {2: (50.0, 9.0)}, {i: (i, 1.0) for i in range(3)}
    )
    twice.boxes["track_id"][twice.boxes["track_id"] == 1] = 0
    assert np.isnan(motion(twice, 5).speed).tolist() == [
        True,
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    assert len(motion(of_tracks([]), 5).speed) == 0


def one_by_one(frames, still_speed):
    """(speed, rest) of each box by its definition: no sorting, a search for each."""
    rows = [
        (
            int(frames.recording[f]),
            int(b["track_id"]),
            int(frames.end_us[f]),
            float(b["x"] + b["w"] / 2),
            float(b["y"] + b["h"] / 2),
        )
        for f, b in zip(frames.box_frame, frames.boxes, strict=True)
    ]

    def track(row):
        return sorted(r for r in rows if r[:2] == row[:2])

    def speed(row):
        own = track(row)
        i = own.index(row)
        a = own[i - 1] if i and row[2] - own[i - 1][2] <= 1e6 else row
        b = own[i + 1] if i + 1 < len(own) and own[i + 1][2] - row[2] <= 1e6 else row
        return np.hypot(b[3] - a[3], b[4] - a[4]) / ((b[2] - a[2]) / 1e6) if a is not b else np.nan

    def rest(row):
        if not speed(row) < still_speed:
            return np.nan if np.isnan(speed(row)) else 0.0
        own, first = track(row), row
        for earlier in reversed(own[: own.index(row)]):
            if not speed(earlier) < still_speed or first[2] - earlier[2] > 1e6:
                break
            first = earlier
        return (row[2] - first[2]) / 1e6

    return [speed(r) for r in rows], [rest(r) for r in rows]


@pytest.mark.parametrize("seed", range(3))
def test_motion_agrees_with_the_definition(seed):
    rng = np.random.default_rng(seed)
    ends, boxes = [], []
    for _ in range(2):
        t = np.cumsum(rng.choice([50_000, 100_000, 1_200_000], 25, p=[0.5, 0.45, 0.05]))
        steps = rng.choice([0.0, 3.0], (25, 4, 2), p=[0.9, 0.1]).cumsum(0)
        ends.append(t)
        boxes.append(
            [
                np.array(
                    [(t[i], *steps[i, k], 8, 8, 0, k) for k in range(4) if rng.random() < 0.8], BOX
                )
                for i in range(25)
            ]
        )
    frames = labelled_frames(["a", "b"], ends, boxes, [[NOTHING] * 25] * 2)
    ours = motion(frames, still_speed=20)
    speed, rest = one_by_one(frames, 20)
    np.testing.assert_allclose(ours.speed, speed)
    np.testing.assert_allclose(ours.rest_s, rest)
    assert (ours.rest_s > 0.5).any()
    assert (ours.speed > 20).any()


def test_objects_that_the_simulator_stops_are_still():
    config = SimulatorConfig(height=180, width=240, min_objects=2, max_objects=3, stop_fraction=1.0)
    raw = simulated_boxes(8, 5, config)
    tracks = {t.track_id: t for t in simulated_scene(8, 5, config).tracks}
    ends = np.unique(raw["t"])[::3]  # 20 Hz
    boxes = [
        np.array(
            [
                (t, *(b[k] for k in "xywh"), b["class_id"], b["track_id"])
                for b in raw[raw["t"] == t]
            ],
            BOX,
        )
        for t in ends
    ]
    frames = labelled_frames(["a"], [ends], [boxes], [[NOTHING] * len(ends)])
    still = motion(frames, still_speed=5).still(0.5)
    rested = []  # s that the object has rested, by its own track
    for f, box in zip(frames.box_frame, frames.boxes, strict=True):
        track = tracks[int(box["track_id"])]
        since = (
            frames.end_us[f] - (track.born_us + track.stop_at_us + 300_000)
            if track.stopped_us
            else -1
        )
        rested.append(since / 1e6 if since < track.stopped_us else -1)
    rested = np.array(rested)
    assert still.sum() > 20
    assert (rested[still] > 0.4).all()
    assert (
        still[rested > 0.7].mean() > 0.8
    )  # others are hidden by something that passes, which changes their boxes


# -- breakdown ---------------------------------------------------------------------------------------------------
def two_recordings(seed=0):
    """Frames with four classes of motion: every second box stands still, of track 100 + its place; the others jump about."""
    rng, ends, boxes, found = np.random.default_rng(seed), [], [], []
    for r in range(2):
        stands = np.zeros(5, BOX)
        stands["w"], stands["h"], stands["x"], stands["y"] = (
            rng.uniform(10, 60, 5),
            30,
            100 * np.arange(5),
            300,
        )
        stands["class_id"], stands["track_id"] = rng.integers(0, 3, 5), 100 + np.arange(5)
        truth, rows = [], []
        for other in some_frames(seed + r)[0]:
            other = other[:6]
            other["track_id"] = np.arange(len(other))
            both = np.concatenate((stands, other))
            truth.append(both)
            rows.append(
                as_detections(
                    rng,
                    both[rng.random(len(both)) < np.where(both["track_id"] < 100, 0.9, 0.4)],
                    0.03,
                )
            )
        ends.append(50_000 * np.arange(1, 41))
        boxes.append(truth)
        found.append(rows)
    return labelled_frames(["a", "b"], ends, boxes, found)


def test_a_breakdown_scores_each_part():
    frames = two_recordings()
    config = EvaluationConfig(time_bins_s=[1.0, 1.5], still_speed=5, still_s=1.0, min_side=8)
    result = breakdown(frames, CLASSES, config)
    chosen, kept = scored(frames, config)
    every = np.ones(len(chosen.boxes), bool), np.ones(len(chosen.detections), bool)
    for i, name in enumerate("ab"):
        alone = coco_metrics(chosen.only(chosen.recording == i, *every), CLASSES)
        of_it = result.per_recording[name]
        assert (of_it["ap"], of_it["ap_small"]) == pytest.approx((alone.ap, alone.ap_small))
        assert of_it["frames"] == alone.frames == 30
    assert [(b["from"], b["to"], b["frames"]) for b in result.by_time] == [
        (0, 1, 18),
        (1, 1.5, 20),
        (1.5, None, 22),
    ]
    late = coco_metrics(chosen.only(chosen.end_us >= 1_500_000, *every), CLASSES)
    assert result.by_time[2]["ap50"] == pytest.approx(late.ap50)

    still, moving = result.stillness["still"], result.stillness["moving"]
    stands = frames.boxes["track_id"][kept] >= 100
    # At rest for 1 s since the first frame, which ends at 0.05 s.
    late = chosen.end_us[chosen.box_frame] >= 1_050_000
    known = ~np.isnan(motion(frames, 5).speed[kept])
    assert still["boxes"] == (stands & late).sum() == 2 * 20 * 5
    assert still == Scorer(chosen, CLASSES).of_group(stands & late)
    assert moving == Scorer(chosen, CLASSES).of_group(known & ~(stands & late))
    assert still["recall50"] == pytest.approx(0.4, abs=0.08)
    assert moving["recall50"] > still["recall50"] + 0.2
    assert sum(b["boxes"] for b in result.by_speed) == still["boxes"] + moving["boxes"]
    slow = scored(frames, config)[1] & (motion(frames, 5).speed < 5)
    assert (
        sum(b["boxes"] for b in result.by_rest)
        == slow.sum()
        == result.by_speed[0]["boxes"]
        < still["boxes"] + moving["boxes"]
    )
    assert [b["from"] for b in result.by_rest] == [0, 0.5, 1, 2]
    assert result.by_rest[1]["boxes"] == 2 * 5 * 10
    by_class = Scorer(chosen, CLASSES, scores=chosen.detections[:, 5].astype(float)).metrics()
    assert result.ranked_by_class_score["ap"] == by_class.ap != coco_metrics(chosen, CLASSES).ap
    assert np.array(result.confusion["matrix"]).shape == (4, 4)
    assert result.confusion["score_threshold"] == 0.3
    table = result.table()
    assert "still" in table
    assert "1.5+ s" in table
    assert "at rest 0.5-1 s" in table
    assert "nothing" in table


def test_a_breakdown_of_nothing():
    none = labelled_frames(["a"], [np.array([900_000])], [[np.zeros(0, BOX)]], [[NOTHING]])
    for config in (EvaluationConfig(), EvaluationConfig(skip_empty_frames=False)):
        result = breakdown(none, CLASSES, config)
        assert result.per_recording["a"]["ap"] is None
        assert result.stillness["still"]["boxes"] == 0
        assert "object: no boxes whose tracks show" in result.table()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"time_bins_s": [2.0, 1.0]}, "time_bins_s is [2.0, 1.0]"),
        ({"speed_bins": [0.0, 5.0]}, "edges above 0"),
        ({"still_speed": 0.0}, "still_speed 0.0 must be above 0"),
        ({"confusion_threshold": 1.0}, "give 0 to below 1"),
    ],
)
def test_bins_and_thresholds_that_cannot_be(values, part):
    with pytest.raises(ConfigError) as raised:
        EvaluationConfig(**values)
    assert part in str(raised.value)
