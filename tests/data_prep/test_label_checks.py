"""Doubtful labels are reported with their numbers, the likely cause and a remedy that works."""

import re

import numpy as np
import pytest
from evspan.conf.errors import ShardError
from evspan.conf.schema.prep import DatasetConfig, FrameMode, LabelConfig, TimeUnit
from evspan.data_prep.labels.box_files import RAW_BOX, write_boxes
from evspan.data_prep.labels.checks import grouped, label_warnings
from evspan.data_prep.labels.clock import Span, clock_problem
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_writer
from evspan.data_prep.report.findings import findings
from evspan.data_prep.report.survey import survey
from evspan.data_prep.shards.verify import verify
from evspan.pipeline.data.datasets import open_dataset
from support.prepared import entries, prep_config

LABEL_TIMES = np.arange(1, 12) * 100_000  # 0.1 to 1.1 s


def problem(t, first, last, **labels) -> str:
    times = np.sort(np.asarray(t, dtype=np.int64))
    return clock_problem(times, Span(first, last), LabelConfig(**labels))


# -- clocks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("t", "first", "last"),
    [
        (LABEL_TIMES, 0, 1_200_000),
        (LABEL_TIMES, 90_000, 1_090_000),  # one of 11 labels, 9 %, would be too many: see below
        (np.arange(1, 600) * 16_667, 0, 10_000_000),
        (np.arange(1, 6000) * 100_000, 400_000, 600_000_000),
        ([500_000], 0, 60_000_000),
        (np.arange(1, 20) * 1_000, 0, 20_000),
        (np.arange(0, 3600, 30) * 1_000_000, 0, 3_600_000_000),
        ([], 0, 1),
    ],
)
def test_labels_that_fit_have_no_problem(t, first, last):
    if last == 1_090_000:
        assert "1 of 11 boxes (9%) lie outside" in problem(t, first, last)
    else:
        assert problem(t, first, last) == ""


@pytest.mark.parametrize(
    ("unit", "per_us"), [(TimeUnit.ms, 1e3), (TimeUnit.s, 1e6), (TimeUnit.ns, 1e-3)]
)
def test_a_wrong_unit_is_named(unit, per_us):
    times = np.arange(1, 60) * 1_000_000  # a label per second for a minute
    message = problem((times / per_us).astype(np.int64), 0, 60_000_000)
    assert f"likely in {unit.name}, not in us: set dataset.labels.time_unit={unit.name}" in message
    assert "Do they belong together, and to one clock?" in message


def test_events_in_nanoseconds_are_told_from_labels_in_milliseconds():
    assert "labels span 0.08% of the recording. " in problem(LABEL_TIMES, 0, 1_200_000_000)
    assert "The recording's times are likely in ns" in problem(LABEL_TIMES, 0, 1_200_000_000)
    message = problem(LABEL_TIMES // 1000, 0, 1_200_000)
    assert "there is a label every 100 us" in message
    assert "time_unit=ms" in message


@pytest.mark.parametrize("shift", [700_000, 2_500_000, 16_000_000])
def test_a_small_shift_of_a_long_recording_is_reported(shift):
    """EVT3's clock starts anywhere below 16.8 s, and labels of tools that subtract it at 0."""
    every_100_ms = np.arange(1, 6000) * 100_000
    message = problem(every_100_ms, shift, 600_000_000 + shift)
    assert f"lie outside, by up to {(shift - 100_000) / 1e6:.3g} s" in message
    assert f"set dataset.labels.offset_us={shift}," in message
    later = problem(every_100_ms + shift, 0, 600_000_000)
    assert "The two clocks are likely shifted: dataset.labels.offset_us from -" in later


def test_a_start_time_that_labels_lack_is_the_suggested_offset():
    message = problem(LABEL_TIMES, 700_000, 1_900_000)
    assert "labels from 100000 to 1100000 us, events from 700000 to 1900000 us: 6 of 11" in message
    assert "set dataset.labels.offset_us=700000," in message


@pytest.mark.parametrize("offset", [0, 5_000_000])
@pytest.mark.parametrize("shift", [40_000_000, -900_000, 1_700_000_000_000_000])
def test_any_offset_of_the_suggested_range_brings_all_labels_inside(shift, offset):
    message = problem(LABEL_TIMES + shift + offset, 2_000, 1_202_000, offset_us=offset)
    lowest, highest = map(int, re.findall(r"offset_us from (-?\d+) to (-?\d+) ", message)[0])
    assert lowest <= -shift <= highest
    for suggested in (lowest, highest):
        assert problem(LABEL_TIMES + shift + suggested, 2_000, 1_202_000) == ""


def test_a_unit_that_is_set_wrong_is_named():
    message = problem(LABEL_TIMES * 1000, 0, 1_200_000, time_unit=TimeUnit.ms)
    assert "dataset.labels.time_unit=ms is likely wrong" in message


def test_labels_of_a_part_of_a_long_recording_have_no_known_cause():
    message = problem(LABEL_TIMES + 1_800_000_000, 0, 3_600_000_000)
    assert message.endswith("evspan prep preview shows them on the events")


# -- boxes ----------------------------------------------------------------------------------------
def boxes_at(times, **columns) -> np.ndarray:
    """Two boxes of 30 x 20 pixels at each time, of class and track 0 and 1."""
    boxes = np.zeros(2 * len(times), RAW_BOX)
    boxes["t"] = np.repeat(times, 2)
    boxes["x"] = np.tile([10, 60], len(times))
    boxes["y"] = 5
    boxes["w"], boxes["h"] = 30, 20
    boxes["class_id"] = boxes["track_id"] = np.tile([0, 1], len(times))
    for name, values in columns.items():
        boxes[name] = values
    return boxes


def warned(boxes) -> dict[str, str]:
    return label_warnings("a_bbox.npy", boxes, Span(0, 1_200_000), LabelConfig())


def test_sound_boxes_have_no_warning():
    assert warned(boxes_at(LABEL_TIMES)) == {}
    assert warned(boxes_at(LABEL_TIMES, track_id=0)) == {}
    assert warned(np.zeros(0, RAW_BOX)) == {}


def test_boxes_that_are_there_twice_are_counted():
    boxes = boxes_at(LABEL_TIMES)
    moved = boxes.copy()
    moved["x"] += 1
    for twice in (np.append(boxes, boxes), np.append(boxes, moved)):
        assert warned(np.sort(twice, order="t"))["duplicates"].startswith(
            "a_bbox.npy: 22 of 44 boxes are duplicates"
        )
    same_place = np.append(boxes, boxes[:3])
    same_place["track_id"] = 0
    assert "3 of 25 boxes are duplicates" in warned(same_place)["duplicates"]
    moved["class_id"] = 1 - moved["class_id"]
    assert warned(np.append(boxes, moved)) == {}


def test_coordinates_from_0_to_1_are_named():
    boxes = boxes_at(LABEL_TIMES)
    for name, side in (("x", 100), ("y", 50), ("w", 100), ("h", 50)):
        boxes[name] /= side
    assert "all 22 boxes lie within 0 to 1" in warned(boxes)["normalised"]
    boxes["w"][0] = 30
    assert warned(boxes) == {}


def test_a_kind_of_warning_has_one_line_however_many_recordings_it_is_about():
    lines = [(f"train/{i}", {"clock": f"c{i}"}) for i in range(6)]
    lines[1] = ("train/1", {"clock": "c1", "duplicates": "d1"})
    assert list(grouped(lines)) == [
        "train/0: c0. The same in 5 more: train/1, train/2, train/3, ...",
        "train/1: d1",
    ]


# -- from prep to the report ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """A recording of 1.2 s that begins at 0.7 s; its labels count from 0."""
    folder = tmp_path_factory.mktemp("late") / "train"
    folder.mkdir()
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(700_000, 1_900_000, 5_000))
    t[0], t[-1] = 700_000, 1_900_000
    x = rng.integers(0, 100, t.size).astype(np.uint16)
    y = rng.integers(0, 50, t.size).astype(np.uint16)
    with open_writer(folder / "a_td.h5", 50, 100) as writer:
        writer.write(Events(t, x, y, (x % 2).astype(np.uint8)))
    write_boxes(folder / "a_bbox.npy", boxes_at(LABEL_TIMES))
    return folder.parent


def test_a_shift_is_reported_and_corrected_by_the_offset_without_reading_frames_again(
    late, tmp_path, caplog
):
    output = tmp_path / "out"
    labels = {"class_map": {}}
    prepare(prep_config(late, output, labels=labels))
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith("train/a: a_bbox.npy: labels from 100000 to 1100000 us, events fro")
    assert entries(output)["train/a"]["label_warnings"].keys() == {"clock"}
    assert any("offset_us=700000" in finding for finding in findings(survey(output)))
    caplog.clear()
    labels["offset_us"] = 700_000
    report = prepare(prep_config(late, output, labels=labels))
    assert report.prepared == {"train/a": "the config has changed"}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    entry = entries(output)["train/a"]
    assert (entry["labelled_frames"], entry["boxes"], entry["label_warnings"]) == (11, 22, {})
    assert not any("clock" in finding for finding in findings(survey(output)))
    assert not verify(output, late, sample=None, processes=1).damaged
    assert prepare(prep_config(late, output, labels=labels)).prepared == {}


def test_a_label_at_the_end_of_the_last_window_is_inside(tmp_path, caplog):
    """Labels per window, as of `labels import`: the last one is after the last event."""
    train = tmp_path / "in" / "train"
    train.mkdir(parents=True)
    t = np.arange(0, 400_000, 100)
    x = (t // 100 % 100).astype(np.uint16)
    with open_writer(train / "a_td.h5", 50, 100) as writer:
        writer.write(Events(t, x, x // 2, (x % 2).astype(np.uint8)))
    ends = np.arange(1, 5) * 100_000  # the last event is at 399,900
    write_boxes(train / "a_bbox.npy", boxes_at(ends))
    labels = {"class_map": {}}
    prepare(prep_config(tmp_path / "in", tmp_path / "out", labels=labels))
    assert entries(tmp_path / "out")["train/a"]["labelled_frames"] == 4
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    write_boxes(train / "a_bbox.npy", boxes_at(ends + 100_000))
    prepare(prep_config(tmp_path / "in", tmp_path / "out", labels=labels))
    assert "clock" in entries(tmp_path / "out")["train/a"]["label_warnings"]


def test_labels_after_the_last_window_with_events_are_outside_in_rvts_frames(
    late, tmp_path, caplog
):
    """RVT's frames go on to the last label, which says nothing about the recording's end."""
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    recording = late / "train" / "a_td.h5"
    (source / "train" / "a_td.h5").write_bytes(recording.read_bytes())
    frames = {"mode": FrameMode.rvt}
    labels = {"class_map": {}}
    for last, expected in ((1_950_000, set()), (2_250_000, {"clock"})):  # last event: 1.9 s
        times = last - np.arange(0, 1_200_000, 33_333)[::-1]
        write_boxes(source / "train" / "a_bbox.npy", boxes_at(times))
        prepare(prep_config(source, tmp_path / "out", labels=labels, frames=frames))
        entry = entries(tmp_path / "out")["train/a"]
        assert entry["label_warnings"].keys() == expected
        assert entry["dropped_boxes"]["boxes_outside_the_recording"] == 0


def test_the_keys_of_the_clock_leave_datasets_of_before_as_they_are(late, tmp_path):
    prepare(prep_config(late, tmp_path / "out"))
    stored = entries(tmp_path / "out")
    assert stored["train/a"]["label_warnings"]
    labels = {"offset_us": 0, "time_unit": TimeUnit.us}
    assert prepare(prep_config(late, tmp_path / "out", labels=labels)).prepared == {}


def test_a_split_without_labelled_frames_is_warned_of(late, tmp_path, caplog):
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    (source / "train" / "a_td.h5").write_bytes((late / "train" / "a_td.h5").read_bytes())
    prepare(prep_config(source, tmp_path / "out"))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    missing = warnings.pop(0)
    assert missing.startswith(
        "train: 1 recording without a box file (a_bbox.npy next to a_td.h5): a; nothing is learned"
    )
    assert warnings == [
        "train has no labelled frame in 1 recording: training and evaluation refuse it",
    ]


def test_a_split_with_recordings_of_two_sizes_is_warned_of(late, tmp_path, caplog):
    """Training and evaluation refuse it."""
    source = tmp_path / "source"
    for split in ("train", "val"):
        (source / split).mkdir(parents=True)
        for name in ("a_td.h5", "a_bbox.npy"):
            (source / split / name).write_bytes((late / "train" / name).read_bytes())
    t = np.arange(0, 1_200_000, 100)
    pixel = (t // 100 % 40).astype(np.uint16)
    with open_writer(source / "train" / "b_td.h5", 40, 60) as writer:
        writer.write(Events(t, pixel, pixel, (pixel % 2).astype(np.uint8)))
    write_boxes(source / "train" / "b_bbox.npy", boxes_at(LABEL_TIMES))
    prepare(prep_config(source, tmp_path / "out", labels={"class_map": {}}))
    warnings = [record.message for record in caplog.records if "sizes" in record.message]
    assert warnings == [
        "train has frames of several sizes (25 x 50 in 1 recording, 20 x 30 in 1 recording): "
        "training and evaluation refuse it. Prepare the recordings of each sensor size into a "
        "folder of their own"
    ]
    config = DatasetConfig(root=str(tmp_path / "out"))
    with pytest.raises(ShardError, match="frames of several sizes"):
        open_dataset(config, "train")
    open_dataset(config, "val")
