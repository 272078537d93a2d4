"""Frames of mode rvt: those that RVT's own preprocessing made, and those of its rules written out one event at a time."""

import math
from itertools import pairwise

import h5py
import numpy as np
import pytest
from evspan.conf.errors import BoxesError, ConfigError, RecordingError
from evspan.conf.schema.prep import (
    DatasetConfig,
    DownsampleBy,
    FrameConfig,
    FrameMode,
    LabelConfig,
    PrepConfig,
)
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.rvt import RvtEnds
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_writer
from evspan.data_prep.simulator import SimulatorConfig, simulate
from support.prepared import contents, entries, prep_config
from support.slow_frames import GivenRecording

RVT_LABELS = LabelConfig(class_map={0: 0, 1: 1, 2: 2}, min_side=5, max_width_fraction=0.9)


@pytest.mark.slow
def test_prep_equals_the_published_preprocessing_to_the_last_bit(parity_dir, tmp_path):
    fixture = parity_dir / "prep_fixture"
    dataset = DatasetConfig(
        name="gen4_rvt", classes=["pedestrian", "two_wheeler", "car"], labels=RVT_LABELS
    )
    prepare(
        PrepConfig(
            source=str(fixture / "input"),
            output=str(tmp_path),
            processes=1,
            dataset=dataset,
            frames=FrameConfig(mode=FrameMode.rvt),
        )
    )
    stored, compared = contents(tmp_path), 0
    for key, columns in stored.items():
        theirs = fixture / "output" / key
        if (
            not theirs.is_dir()
        ):  # RVT drops a recording without a label that is left; here it has no frames
            assert len(columns["frames"]) == 0
            assert len(columns["boxes"]) == 0
            continue
        frames = theirs / "event_representations_v2" / "stacked_histogram_dt=50_nbins=10"
        with h5py.File(frames / "event_representations_ds2_nearest.h5") as file:
            np.testing.assert_array_equal(columns["frames"], file["data"][:])
        np.testing.assert_array_equal(columns["end_us"], np.load(frames / "timestamps_us.npy"))
        labelled = np.load(frames / "objframe_idx_2_repr_idx.npy")
        np.testing.assert_array_equal(np.flatnonzero(columns["labelled"]), labelled)
        with np.load(theirs / "labels_v2" / "labels.npz") as labels:
            np.testing.assert_array_equal(
                columns["box_start"][labelled], labels["objframe_idx_2_label_idx"]
            )
            for ours, name, scale in (
                ("t_us", "t", 1),
                *((s, s, 2) for s in "xywh"),
                ("class_id", "class_id", 1),
                ("track_id", "track_id", 1),
            ):
                np.testing.assert_array_equal(
                    scale * columns["boxes"][ours], labels["labels"][name], err_msg=name
                )
        compared += 1
    assert compared == 3
    assert len(stored) == 4


# -- the rules, one event at a time ------------------------------------------------------------------------------
def slow_frame(events, end, *, height, width, cutoff, downsample):
    inside = [
        (t, x, y, p)
        for t, x, y, p in zip(*(c.tolist() for c in events), strict=True)
        if end - 50_000 <= t <= end
    ]
    counts = np.zeros((2, 10, height, width), int)
    for t, x, y, p in inside:
        fraction = np.float32(t - inside[0][0]) / np.float32(max(inside[-1][0] - inside[0][0], 1))
        counts[p, min(9, math.floor(fraction * np.float32(10))), y, x] += 1
    frame = np.minimum(counts % 256, cutoff).astype(np.uint8).reshape(20, height, width)
    middle = downsample // 2
    return frame[:, middle::downsample, middle::downsample]


@pytest.mark.parametrize("downsample", [1, 2, 4])
@pytest.mark.parametrize("cuts", [[], [1, 40, 41, 900], list(range(10, 3000, 97))], ids=len)
def test_frames_are_those_of_the_rules(cuts, downsample):
    rng = np.random.default_rng(len(cuts))
    t = np.sort(
        np.concatenate(
            (rng.integers(60_000, 470_000, 2500), [150_000] * 20, [200_000] * 300, [470_000] * 3)
        )
    )
    events = Events(
        t,
        rng.integers(0, 32, t.size).astype(np.uint16),
        rng.integers(0, 24, t.size).astype(np.uint16),
        rng.integers(0, 2, t.size).astype(np.uint8),
    )
    hot = slice(600, 900)  # one pixel so often that a byte wraps
    events.x[hot], events.y[hot], events.p[hot] = 7 | downsample // 2, 2 | downsample // 2, 1
    ends = [100_000, 150_000, 200_000, 250_003, 299_998, 400_000, 470_000]
    config = FrameConfig(mode=FrameMode.rvt, downsample=downsample)
    made = list(frames_of(GivenRecording(events, 24, 32, cuts), lambda _: ends, config))
    assert [end for end, _ in made] == ends
    for end, frame in made:
        np.testing.assert_array_equal(
            frame, slow_frame(events, end, height=24, width=32, cutoff=10, downsample=downsample)
        )


def test_windows_without_end_stop_with_the_events():
    events = Events(
        np.array([10, 70_000, 170_000]), *(np.zeros(3, k) for k in (np.uint16, np.uint16, np.uint8))
    )
    made = list(
        frames_of(
            GivenRecording(events, 24, 32),
            lambda first: iter(range(first + 50_000, 10**9, 50_000)),
            FrameConfig(mode=FrameMode.rvt, downsample=1),
        )
    )
    assert [(end, int(frame.sum())) for end, frame in made] == [
        (50_010, 1),
        (100_010, 1),
        (150_010, 0),
        (200_010, 1),
    ]


@pytest.mark.parametrize(("hertz", "first"), [(60, 0), (30, 0), (60, 7_000), (30, 91_000)])
def test_ends_are_labels_about_100_ms_apart_and_windows_between(hertz, first):
    times = first + np.round(1e6 / hertz * np.arange(1, 61)).astype(np.int64)
    times = np.delete(times, slice(20, 26))  # a gap
    ends = RvtEnds(times, 50_000)
    labelled = ends.labelled_us
    assert labelled[0] == times[times >= 100_000][0]
    assert set(labelled) <= set(times.tolist())
    assert (abs(np.diff(labelled) - np.round(np.diff(labelled) / 1e5) * 1e5) <= 2000).all()
    every = np.array(list(ends))
    assert every[-1] == labelled[-1]
    assert set(labelled) <= set(every.tolist())
    assert 50_000 < every[0] <= 100_000
    assert (abs(np.diff(every) - 50_000) <= 1000).all()


def test_labels_that_rvt_cannot_take_are_refused(tmp_path):
    with pytest.raises(
        BoxesError, match="labels come at 10 Hz; RVT's preparation supports 30 and 60 Hz"
    ):
        RvtEnds(np.arange(1, 20) * 100_000, 50_000)
    assert (
        list(RvtEnds(np.array([50_000]), 50_000))
        == list(RvtEnds(np.zeros(0, np.int64), 50_000))
        == []
    )
    assert FrameConfig(mode=FrameMode.rvt).downsample_by is DownsampleBy.nearest
    with pytest.raises(ConfigError, match=r"frames.mode is 'rvt'; give one of .*FrameMode.rvt"):
        FrameConfig(mode="rvt")
    with pytest.raises(ConfigError, match="span 50 ms"):
        FrameConfig(mode=FrameMode.rvt, window_ms=20)
    with pytest.raises(ConfigError, match="takes a label every 100 ms"):
        prep_config(
            tmp_path, tmp_path, labels={"label_every_ms": 50}, frames={"mode": FrameMode.rvt}
        )


def test_a_recording_on_an_absolute_clock_is_refused(tmp_path):
    """RVT's windows begin at 0: a day later, two million empty frames would come first."""
    t = 86_400_000_000 + np.arange(0, 400_000, 100)
    pixel = np.full(t.size, 5, np.uint16)
    source = tmp_path / "source"
    source.mkdir()
    with open_writer(source / "a.h5", 50, 100) as writer:
        writer.write(Events(t, pixel, pixel, np.ones(t.size, np.uint8)))
    boxes = np.zeros(4, RAW_BOX)
    boxes["t"] = t[0] + 100_000 * np.arange(1, 5)
    np.save(source / "a_bbox.npy", boxes)
    message = r"first event is at 86,400 s.* 1,728,000 empty frames .*frames.mode=exact"
    with pytest.raises(RecordingError, match=message):
        prepare(prep_config(source, tmp_path / "out", frames={"mode": FrameMode.rvt}))


def at_30_hz(path, first_us: int, count: int) -> None:
    """Writes a box file with a box every thirtieth of a second."""
    boxes = np.zeros(count, RAW_BOX)
    boxes["t"] = first_us + 33_333 * np.arange(count)
    boxes["x"], boxes["y"], boxes["w"], boxes["h"] = 10, 5, 20, 15
    np.save(path, boxes)


@pytest.fixture
def two_seconds(tmp_path):
    """A source with one recording of 2 s, without boxes."""
    source = tmp_path / "source"
    source.mkdir()
    t = np.arange(0, 2_000_000, 100)
    pixel = np.full(t.size, 5, np.uint16)
    with open_writer(source / "a.h5", 50, 100) as writer:
        writer.write(Events(t, pixel, pixel, np.ones(t.size, np.uint8)))
    return source


@pytest.mark.parametrize("first", [20_000_000, 1_700_000_000_000_000])
def test_labels_on_another_clock_are_refused(two_seconds, tmp_path, first):
    """Their windows would go on over 20 s, or decades, without an event."""
    at_30_hz(two_seconds / "a_bbox.npy", first, 60)
    config = prep_config(two_seconds, tmp_path / "out", frames={"mode": FrameMode.rvt})
    with pytest.raises(RecordingError, match="all 60 boxes lie outside the recording a: .*clock"):
        prepare(config)


def test_labels_long_after_the_last_event_end_no_frames(two_seconds, tmp_path):
    at_30_hz(two_seconds / "a_bbox.npy", 100_000, 900)  # 30 s
    config = prep_config(two_seconds, tmp_path / "out", frames={"mode": FrameMode.rvt})
    prepare(config)
    entry = entries(tmp_path / "out")["test/a"]
    columns = contents(tmp_path / "out")["test/a"]
    assert 2_400_000 < columns["end_us"][-1] <= 2_500_000  # as far as a label may be late
    assert entry["labelled_frames"] == entry["boxes"] == columns["labelled"].sum() == 24
    assert entry["dropped_boxes"]["boxes_outside_the_recording"] > 800
    assert "labels from 100000 to" in entry["label_warnings"]["clock"]
    # Other boxes at the same times leave the frames as they are.
    boxes = np.load(two_seconds / "a_bbox.npy")
    boxes["x"] += 1
    np.save(two_seconds / "a_bbox.npy", boxes)
    prepare(config)
    assert entries(tmp_path / "out")["test/a"]["frames_xxh3"] == entry["frames_xxh3"]
    after = contents(tmp_path / "out")["test/a"]
    np.testing.assert_array_equal(after["end_us"], columns["end_us"])


def test_events_that_stop_for_an_hour_are_refused(tmp_path):
    """Their frames would be 50 ms apart up to a damaged time."""
    t = np.array([100, 150_000, 250_000, 3_700_000_000, 3_700_000_010])
    events = Events(t, *(np.zeros(t.size, k) for k in (np.uint16, np.uint16, np.uint8)))
    ends = RvtEnds(np.append(100_000 + 33_333 * np.arange(30), 3_700_000_000), 50_000)
    config = FrameConfig(mode=FrameMode.rvt, downsample=1)
    with pytest.raises(RecordingError, match=r"no events for 1\.0 hours"):
        list(frames_of(GivenRecording(events, 24, 32), lambda _: ends, config))


def test_ends_are_those_of_numpy_and_cost_no_memory():
    rng = np.random.default_rng(0)
    times = 123_456 + np.cumsum(rng.integers(33_200, 33_467, 300))
    ends = RvtEnds(times, 50_000)
    expected = [int(times[0])]
    while expected[0] > 100_000:
        expected.insert(0, expected[0] - 50_000)
    for label, following in pairwise(ends.labelled_us.tolist()):
        windows = 2 * round((following - label) / 100_000)
        steps = np.linspace(label, following, windows + 1)
        expected += steps[1:].astype(np.int64).tolist()
    assert list(ends) == expected
    assert len(ends) == len(expected)
    unix = RvtEnds(1_700_000_000_000_000 + times, 50_000)
    assert len(unix) > 3e10
    assert 50_000 < next(iter(unix)) <= 100_000


def test_other_labels_move_windows_and_a_recording_without_any_is_refused(tmp_path):
    source, path = tmp_path / "raw", tmp_path / "raw" / "train" / "a_td.raw"
    simulate(
        path,
        seconds=0.5,
        seed=2,
        config=SimulatorConfig(height=160, width=200, min_objects=1, max_objects=3),
    )

    def prepared():
        prepare(prep_config(source, tmp_path / "out", frames={"mode": FrameMode.rvt, "bins": 10}))
        return contents(tmp_path / "out")["train/a"]

    before = prepared()
    boxes_path = path.with_name("a_bbox.npy")
    boxes = np.load(boxes_path)
    np.save(boxes_path, boxes[boxes["t"] > 150_000])
    after = prepared()
    assert after["end_us"][-1] != before["end_us"][-1] or after["end_us"][0] != before["end_us"][0]
    assert entries(tmp_path / "out")["train/a"]["frames"] == len(after["frames"]) > 2
    np.save(boxes_path, np.zeros(0, RAW_BOX))
    assert len(prepared()["frames"]) == 0
    boxes_path.unlink()
    with pytest.raises(RecordingError, match="it has no box file, and RVT's frames"):
        prepared()
