"""Pseudo-labels: each filter against its plain definition, reversed time, and from detector to training."""

import json
import shlex
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.compose import compose
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import (
    DatasetConfig,
    FrameConfig,
    FrameMode,
    LabelConfig,
    PrepConfig,
    TimeUnit,
)
from evspan.conf.schema.training import (
    BackboneConfig,
    EvaluationConfig,
    FpnConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.windows import window_ends
from evspan.data_prep.labels.box_files import RAW_BOX, LabelRows, read_labels, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording, open_writer
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.launch.cli.labels_pseudo import main, prep_command
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.parallel.world import open_world
from evspan.pipeline.pseudo_labels.filters import (
    FrameBoxes,
    gap_boxes,
    has_size,
    in_long_tracks,
    is_certain,
    merge_directions,
    track,
    without_overlap,
)
from evspan.pipeline.pseudo_labels.generate import (
    INDEX_FILES,
    BothDirections,
    choose_labels,
    detect_both_ways,
    label_recordings,
    output_files,
)
from evspan.pipeline.pseudo_labels.options import FilterOptions, PseudoOptions, Thresholds
from evspan.pipeline.pseudo_labels.reversed_time import FrameSpool, reversed_frame
from evspan.pipeline.weights import Weights, load_weights, save_weights
from support.plain_engine import PlainEngine

CLASSES = ["car", "pedestrian"]
WINDOW_US = 50_000
HEIGHT, WIDTH = 160, 192


# -- reversed time ---------------------------------------------------------------------------------
def write_events(path: Path, t, x, y, p) -> Path:
    with open_writer(path, HEIGHT, WIDTH) as writer:
        writer.write(
            Events(t.astype(np.int64), x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8))
        )
    return path


def some_events(seed: int, seconds: float = 0.4):
    """Sorted events, none on the edge of a bin."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(1, int(1e6 * seconds), 4000))
    t = t[t % 1000 != 0]
    x = rng.integers(0, WIDTH, t.size)
    y = rng.integers(0, HEIGHT, t.size)
    return t, x, y, rng.integers(0, 2, t.size)


def test_reversed_frames_are_those_of_the_reversed_recording(tmp_path):
    config = FrameConfig(bins=5, downsample=2)
    t, x, y, p = some_events(0)
    duration = 400_000
    write_events(tmp_path / "a.h5", t, x, y, p)
    order = np.arange(t.size)[::-1]
    write_events(tmp_path / "b.h5", duration - t[order], x[order], y[order], 1 - p[order])

    def ends(_):
        return range(WINDOW_US, 2 * duration, WINDOW_US)

    forward = [f for _, f in frames_of(open_recording(tmp_path / "a.h5"), ends, config)]
    reverse = [f for _, f in frames_of(open_recording(tmp_path / "b.h5"), ends, config)]
    assert len(forward) == len(reverse) == 8
    with FrameSpool(tmp_path) as spool:
        for frame in forward:
            spool.add(frame)
        backward = list(spool.backward())
    np.testing.assert_array_equal(np.stack(backward), np.stack(reverse))
    assert not np.array_equal(forward[-1], backward[0])
    np.testing.assert_array_equal(reversed_frame(forward[0])[0], forward[0][-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def make_weights(path: Path) -> Path:
    """Random, and strong enough that detections differ from frame to frame."""
    torch.manual_seed(1)
    model = ModelConfig(backbone=BackboneConfig(embed_dim=8, dim_head=4), fpn=FpnConfig())
    frames = FrameConfig(downsample=1, bins=2)
    model.head.num_classes = len(CLASSES)
    detector = Detector(model, frames.channels)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith(("fpn", "yolox_head")) and parameter.ndim == 4:
                parameter *= 0.2 if "reg_preds" in name else 3.5
        for predictions, bias in (
            (detector.yolox_head.obj_preds, -0.5),
            (detector.yolox_head.cls_preds, 0.5),
        ):
            for conv in predictions:
                conv.bias.fill_(bias)
    save_weights(path, Weights(detector.state_dict(), model, frames, CLASSES, 7))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options_of(tmp_path: Path, weights: Path, **values) -> PseudoOptions:
    return PseudoOptions(weights, tmp_path / "raw", tmp_path, threads=1, device="cpu", **values)


NO_LABELS = LabelRows(np.zeros(0, RAW_BOX), np.zeros(0, RAW_BOX))


def test_both_directions_are_alike_on_a_recording_that_reads_the_same_backward(tmp_path, weights):
    t, x, y, p = some_events(1, 0.2)
    half = 200_000
    order = np.arange(t.size)[::-1]
    # The first event fixes the windows: it is at 0, as its mirror image at the end.
    times = np.concatenate(([0], t, 2 * half - t[order], [2 * half - 1]))
    x, y = (np.concatenate((c[:1], c, c[order], c[:1])) for c in (x, y))
    polarity = np.concatenate((p[:1], p, 1 - p[order], 1 - p[:1]))
    path = write_events(tmp_path / "a.h5", times, x, y, polarity)
    detector = detector_from(load_weights(weights))
    found = detect_both_ways(path, NO_LABELS, detector, options_of(tmp_path, weights))
    count = len(found.end_us)
    assert count == 8
    assert sum(map(len, found.forward)) > 8
    # Reversed frame i is forward frame i here; it belongs to frame count - 2 - i.
    for i in range(count - 1):
        np.testing.assert_allclose(found.backward[count - 2 - i], found.forward[i], atol=1e-4)
    assert len(found.backward[-1]) == 0


# -- filters ---------------------------------------------------------------------------------------
def random_rows(rng, count):
    corner = rng.uniform(0, 60, (count, 2))
    size = rng.uniform(5, 50, (count, 2))
    scores = rng.uniform(0.1, 1, (count, 2))
    class_id = rng.integers(0, 2, (count, 1))
    return np.concatenate((corner, corner + size, scores, class_id), 1).astype(np.float32)


def iou_of(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("seed", range(3))
def test_merging_is_nms_over_both(seed):
    rng = np.random.default_rng(seed)
    forward, backward = random_rows(rng, 20), random_rows(rng, 15)
    candidates = sorted(
        np.concatenate((forward, backward)).astype(float).tolist(), key=lambda r: -r[4] * r[5]
    )
    expected = []
    for row in candidates:
        if all(row[6] != k[6] or iou_of(row, k) <= 0.3 for k in expected):
            expected.append(row)
    np.testing.assert_allclose(merge_directions(forward, backward, 0.3), expected, rtol=1e-6)
    assert 5 < len(expected) < 35


def test_certainty_and_size_by_their_definition():
    rows = random_rows(np.random.default_rng(0), 50)
    thresholds = ([0.5, 0.2], [0.7, 0.3])
    expected = [
        row[4] > thresholds[0][int(row[6])] and row[5] > thresholds[1][int(row[6])] for row in rows
    ]
    assert is_certain(rows, *thresholds).tolist() == expected
    assert 5 < sum(expected) < 45
    boxes = np.zeros(4, RAW_BOX)
    boxes["w"] = [5, 4.9, 90, 91]
    boxes["h"] = [5, 50, 10, 10]
    kept = has_size(boxes, 100, FilterOptions())
    assert kept.tolist() == [True, False, True, False]
    assert Thresholds().of(CLASSES) == [0.6, 0.3]


def moving(start, frames, x=0.0, step=4.0, class_id=0):
    """A box in each of these frames, RAW_BOX."""
    boxes = np.zeros(len(frames), RAW_BOX)
    boxes["t"] = [start + WINDOW_US * (f + 1) for f in frames]
    boxes["x"] = [x + step * f for f in frames]
    boxes["w"] = boxes["h"] = 20
    boxes["class_id"] = class_id
    return boxes


def tracked_boxes(parts, num_frames=40, labels=()):
    """FrameBoxes of parts; labels: which parts are labels."""
    end_us = WINDOW_US * np.arange(1, num_frames + 1)
    boxes = np.concatenate(parts)
    is_label = np.concatenate([np.full(len(p), i in labels) for i, p in enumerate(parts)])
    order = np.argsort(boxes["t"], kind="stable")
    boxes = boxes[order]
    frame = np.searchsorted(end_us, boxes["t"])
    is_label = is_label[order]
    labelled = np.isin(np.arange(num_frames), frame[is_label])
    return FrameBoxes(end_us, boxes, frame, is_label, labelled)


def test_tracks_by_length_labels_and_ends():
    parts = [
        moving(0, range(10, 16), x=0),  # six frames: long enough
        moving(0, range(10, 15), x=300),  # five: too short
        moving(0, [10, 15], x=600, step=0),  # two boxes that span six frames
        moving(0, range(37, 40), x=900, step=1),  # may go on after the end
        moving(0, range(3), x=1200, step=1),  # may have begun before: kept backward
        moving(0, [20, 21], x=1500),  # with a label at its end
        moving(0, [22], x=1500),
    ]
    given = tracked_boxes(parts, labels=(6,))
    options = FilterOptions()
    part_of = np.searchsorted([150, 450, 750, 1050, 1350], given.boxes["x"])
    kept = {}
    for backward in (False, True):
        numbers = track(given, options, backward=backward)
        for part in range(6):
            assert len(set(numbers[part_of == part])) == 1, part
        mask = in_long_tracks(given, numbers, options, WINDOW_US, backward=backward)
        kept[backward] = [bool(mask[part_of == part].all()) for part in range(6)]
        assert all(len(set(mask[part_of == part])) == 1 for part in range(6))
    assert kept[False] == [True, False, True, True, False, True]
    assert kept[True] == [True, False, True, False, True, True]
    empty = tracked_boxes([moving(0, [])])
    assert in_long_tracks(empty, track(empty, options), options, WINDOW_US).size == 0


def test_a_gap_longer_than_allowed_ends_a_track():
    for gap, number in ((6, 1), (7, 2)):
        given = tracked_boxes([moving(0, [5, 5 + gap], step=0)])
        assert len(set(track(given, FilterOptions()))) == number


def test_gaps_are_interpolated_but_at_frames_with_labels():
    boxes = moving(0, [2, 3, 7, 8], step=2.0)
    boxes["h"][2:] = 28
    given = tracked_boxes([boxes, moving(0, [5], x=500, class_id=1)], labels=(1,))
    numbers = track(given, FilterOptions())
    gaps = gap_boxes(given, numbers, np.ones(len(numbers), bool))
    assert (gaps["t"] // WINDOW_US - 1).tolist() == [4, 6]
    assert gaps["x"].tolist() == [8.0, 12.0]
    assert gaps["h"].tolist() == [22.0, 26.0]
    assert gap_boxes(given, numbers, np.zeros(len(numbers), bool)).size == 0


def test_regions_on_boxes_are_left_out():
    boxes = moving(0, [1, 2], step=0)
    regions = moving(0, [1, 2, 3], step=0)
    regions["x"] = [3, 15, 0]
    assert without_overlap(regions, boxes, 0.45)["x"].tolist() == [15, 0]


def rows_of(boxes, frame, objectness, score):
    """(k, 7) detections of RAW_BOX rows at a frame."""
    at = boxes[boxes["t"] == WINDOW_US * (frame + 1)]
    corners = [at["x"], at["y"], at["x"] + at["w"], at["y"] + at["h"]]
    scores = [np.full(len(at), objectness), np.full(len(at), score), at["class_id"]]
    return np.stack([*corners, *scores], 1).astype(np.float32)


class FakeDetector:
    """What `choose_labels` reads of a detector."""

    classes = CLASSES
    frames = FrameConfig(downsample=1)


def test_labels_are_chosen_as_worked_out_by_hand(tmp_path):
    long = moving(0, range(2, 12), x=10, step=2)  # seen forward, except in frame 5
    short = moving(0, range(10, 13), x=100, step=2)
    weak = moving(0, range(2, 12), x=10, step=2, class_id=1)
    weak["y"] = 60
    none = np.zeros((0, 7), np.float32)
    forward = []
    backward = []
    for frame in range(28):
        sure = rows_of(long, frame, 0.9, 0.9) if frame != 5 else none
        rows = [sure, rows_of(short, frame, 0.7, 0.7), rows_of(weak, frame, 0.25, 0.9)]
        forward.append(np.concatenate(rows))
        backward.append(rows_of(long, frame, 0.8, 0.8) if frame == 11 else none)
    detected = BothDirections(
        WINDOW_US * np.arange(1, 29),
        forward,
        backward,
        sensor=(HEIGHT, WIDTH),
        taken_us=np.array([WINDOW_US * 10]),
    )
    label = moving(0, [9], x=28, step=0)
    label["track_id"] = 5
    labels = LabelRows(label, moving(0, [9], x=70, step=0))
    options = options_of(tmp_path, tmp_path, label_every_ms=100)
    boxes, regions, counts = choose_labels(detected, labels, FakeDetector(), options)
    # Every second frame from the label in frame 9 on: 3, 5, 7, 11.
    assert (boxes["t"] // WINDOW_US - 1).tolist() == [3, 7, 9, 11]
    assert boxes["x"].tolist() == [16, 24, 28, 32]
    assert boxes["track_id"].tolist() == [6, 6, 5, 6]
    np.testing.assert_allclose(boxes["class_confidence"][[0, 3]], 0.81, rtol=1e-5)
    where = sorted(
        zip((regions["t"] // WINDOW_US - 1).tolist(), regions["x"].tolist(), strict=True)
    )
    weak_places = [(f, 10.0 + 2 * f) for f in (3, 5, 7, 11)]
    assert where == sorted([*weak_places, (5, 20.0), (11, 122.0), (9, 70.0)])
    car, pedestrian = counts["car"], counts["pedestrian"]
    assert (car.labels, car.pseudo_boxes, car.short_tracks, car.gaps, car.uncertain) == (
        1,
        3,
        1,
        1,
        0,
    )
    assert (pedestrian.pseudo_boxes, pedestrian.uncertain) == (0, 4)
    assert car.tracks == 1


LENGTH_US = 12_000_000


def irregular_times(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Times of labels on a recording that begins at 7,000 us."""
    if kind == "13 windows apart":
        times = 300_000 + 659_000 * np.arange(15)
    elif kind == "14 windows apart, of 51.5 ms each":
        times = 300_000 + 721_000 * np.arange(15)
    elif kind == "some of 20 Hz":
        times = np.flatnonzero(rng.random(200) < 0.15) * WINDOW_US + 23_000
    elif kind == "bursts":
        starts = rng.integers(100_000, LENGTH_US, 3)
        times = (starts[:, None] + 47_000 * np.arange(12)).ravel()
    else:
        times = rng.integers(100_000, LENGTH_US, 15)
    return np.unique(times[(times > 7_000) & (times < LENGTH_US)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("every_ms", [50, 100, 120])
@pytest.mark.parametrize(
    "kind",
    [
        "13 windows apart",
        "14 windows apart, of 51.5 ms each",
        "some of 20 Hz",
        "bursts",
        "anywhere",
    ],
)
def test_prep_takes_all_labels_that_it_takes_without_pseudo_labels(tmp_path, kind, every_ms, seed):
    rng = np.random.default_rng(seed)
    times = irregular_times(kind, rng)

    def windows_of(label_times):
        return window_ends(label_times, 7_000, window_us=WINDOW_US, label_every_us=1000 * every_ms)

    before = windows_of(times)
    end_us = np.array(list(takewhile(lambda end: end < LENGTH_US, before)))
    sure = np.array([[10, 10, 40, 40, 0.9, 0.9, 0]], np.float32)
    none = np.zeros((0, 7), np.float32)
    seen = rng.random(len(end_us)) < 0.7
    detected = BothDirections(
        end_us,
        [sure if is_seen else none for is_seen in seen],
        [none] * len(end_us),
        sensor=(HEIGHT, WIDTH),
        taken_us=before.labelled_us,
    )
    boxes = np.zeros(len(times), RAW_BOX)
    boxes["t"] = times
    boxes["x"] = boxes["y"] = 10
    boxes["w"] = boxes["h"] = 30
    options = options_of(tmp_path, tmp_path, label_every_ms=every_ms)
    options = replace(options, filters=FilterOptions(gap_regions=False, min_track_ms=0))
    labels = LabelRows(boxes, NO_LABELS.regions)
    written, _, _ = choose_labels(detected, labels, FakeDetector(), options)
    pseudo_times = np.setdiff1d(written["t"], times)
    after = windows_of(written["t"]).labelled_us
    assert np.setdiff1d(before.labelled_us, after).tolist() == []
    assert np.setdiff1d(pseudo_times, after).tolist() == []
    assert len(pseudo_times) > 0


# -- the command, prep and training ----------------------------------------------------------------
def simulated(folder: Path) -> Path:
    config = SimulatorConfig(height=HEIGHT, width=WIDTH, min_objects=2, max_objects=3)
    for i in range(2):
        simulate(folder / "train" / f"r{i}_td.raw", seconds=0.9, seed=i, config=config)
    (folder / "train" / "r1_bbox.npy").unlink()
    path = folder / "train" / "r0_bbox.npy"
    boxes = read_labels(path).boxes
    boxes = boxes[boxes["class_id"] < 2]
    # LEOD's weak supervision: labels at few times.
    write_boxes(path, boxes[np.isin(boxes["t"], np.unique(boxes["t"])[[11, 35]])])
    return folder


def test_folders_without_splits_own_labels_and_other_class_names(tmp_path, weights):
    flat = tmp_path / "flat"
    flat.mkdir()
    write_events(flat / "r_td.h5", *some_events(0))
    options = PseudoOptions(weights, flat, tmp_path / "out")
    files = [path.name for path in output_files(options)]
    assert files == ["r_bbox.npy", "classes.txt", "recordings.txt", "summary.json"]
    boxes = np.zeros(1, RAW_BOX)
    boxes["t"] = WINDOW_US
    write_boxes(flat / "r_bbox.npy", boxes)
    with pytest.raises(UserError, match="would replace it"):
        output_files(PseudoOptions(weights, flat, flat, overwrite=True))
    first, *others = CLASSES
    (flat / "classes.txt").write_text("\n".join([*others, "lorry", first]))
    class_map = ",".join([*(f"{i}:{i + 1}" for i in range(len(others))), f"{len(CLASSES)}:0"])
    with pytest.raises(UserError, match=f"--class-map {class_map} "):
        list(label_recordings(options))
    (flat / "classes.txt").write_text(first)
    assert len(list(label_recordings(options))) == 1


def test_recordings_and_labels_that_do_not_state_size_and_unit(tmp_path, weights):
    raw = tmp_path / "raw"
    raw.mkdir()
    t, x, y, p = some_events(0)
    np.savez(raw / "r.npz", t=t, x=x, y=y, p=p)
    boxes = np.zeros(1, RAW_BOX)
    boxes["t"] = 2 * WINDOW_US // 1000  # ms
    boxes["w"] = boxes["h"] = 20
    write_boxes(raw / "r_bbox.npy", boxes)
    options = PseudoOptions(
        weights,
        raw,
        tmp_path / "out",
        label_time_unit=TimeUnit.ms,
        label_offset_us=WINDOW_US,
        sensor_size=(HEIGHT, WIDTH),
        time_unit=TimeUnit.us,
    )
    (summary,) = label_recordings(options)
    labels = read_labels(summary.boxes)
    assert 3 * WINDOW_US in labels.boxes["t"]
    found = detect_both_ways(
        raw / "r.npz", NO_LABELS, detector_from(load_weights(weights)), options
    )
    assert found.sensor == (HEIGHT, WIDTH)


def test_a_frame_whose_labels_were_all_left_out_gets_no_pseudo_labels(tmp_path, weights):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_events(raw / "r_td.h5", *some_events(0))
    boxes = np.zeros(2, RAW_BOX)
    boxes["t"] = [2 * WINDOW_US, 4 * WINDOW_US]
    boxes["w"] = boxes["h"] = 20
    boxes["class_id"] = [0, 5]
    write_boxes(raw / "r_bbox.npy", boxes)
    sure = Thresholds(0.0)
    filters = FilterOptions(confidence=0.0, objectness=sure, class_score=sure, min_track_ms=0)
    options = PseudoOptions(weights, raw, tmp_path / "out", filters, class_map={0: 1})
    (summary,) = label_recordings(options)
    written = read_labels(summary.boxes)
    assert written.boxes[written.boxes["t"] == 2 * WINDOW_US]["class_id"].tolist() == [1]
    assert 4 * WINDOW_US not in written.boxes["t"]
    left_out = written.regions[written.regions["t"] == 4 * WINDOW_US]
    assert left_out[["w", "h"]].tolist() == [(0, 0)]  # labelled, without boxes
    assert summary.labelled_frames > 2  # others have pseudo-labels


def two_recordings(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    for seed in range(2):
        write_events(raw / f"r{seed}_td.h5", *some_events(seed))
    return raw


def test_replaced_labels_that_are_not_complete_have_no_list(tmp_path, weights):
    options = PseudoOptions(weights, two_recordings(tmp_path), tmp_path / "out", overwrite=True)
    assert len(list(label_recordings(options))) == 2
    assert all((options.output / name).is_file() for name in INDEX_FILES)
    next(label_recordings(options))  # and stops
    assert sorted(path.name for path in options.output.iterdir()) == ["r0_bbox.npy", "r1_bbox.npy"]


def test_a_recording_that_cannot_be_labelled_does_not_stop_the_others(tmp_path, weights, capsys):
    raw = two_recordings(tmp_path)
    write_events(raw / "a_td.h5", *np.zeros((4, 0)))
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        pseudo(weights, raw, out)
    captured = capsys.readouterr()
    assert "1 of 3 recordings could not be labelled; the others are done" in captured.err
    assert "a_td.h5 holds no events" in captured.err
    assert "next: evspan prep source=" in captured.out
    lines = (out / "recordings.txt").read_text().splitlines()
    assert [line.split(",")[-1] for line in lines] == ["r0_bbox.npy", "r1_bbox.npy"]
    summary = json.loads((out / "summary.json").read_text())["recordings"]
    assert [row["name"] for row in summary] == ["r0", "r1"]
    assert not (out / "a_bbox.npy").exists()


@pytest.mark.parametrize(
    ("frames", "every_ms"),
    [
        (FrameConfig(), 100),
        (FrameConfig(window_ms=20, bins=3, cutoff=9, downsample=1), 50),
        (FrameConfig(mode=FrameMode.rvt, downsample=4), 100),
    ],
)
def test_the_command_that_is_printed_prepares_the_detectors_frames(tmp_path, frames, every_ms):
    options = options_of(tmp_path, tmp_path, label_every_ms=every_ms, sensor_size=(240, 304))
    command = shlex.split(prep_command(tmp_path / "a b.txt", frames, options))
    assert command[:2] == ["evspan", "prep"]
    config = compose(PrepConfig, command[2:])
    assert config.source == str(tmp_path / "a b.txt")
    assert config.frames == replace(frames, mode=FrameMode.exact)
    assert config.dataset.labels.label_every_ms == every_ms
    assert config.dataset.sensor_size == [240, 304]
    assert len(prep_command(tmp_path, FrameConfig(), options_of(tmp_path, tmp_path)).split()) == 4


def test_rvts_frames_cannot_be_prepared_of_pseudo_labels(tmp_path, weights, caplog, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_events(raw / "r_td.h5", *some_events(0))
    of_rvt = tmp_path / "rvt.safetensors"
    frames = FrameConfig(mode=FrameMode.rvt, downsample=1, bins=2)
    save_weights(of_rvt, replace(load_weights(weights), frames=frames))
    pseudo(of_rvt, raw, tmp_path / "out")
    assert "Prepare them with frames.mode=exact" in caplog.text
    printed = capsys.readouterr().out
    assert "frames.bins=2 frames.downsample=1 frames.downsample_by=nearest" in printed
    assert "frames.mode" not in printed


def test_prepared_shards_are_refused(tmp_path, weights):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is a folder of prepared shards, .* Give the recordings"):
        output_files(PseudoOptions(weights, tmp_path, tmp_path / "out"))


PERMISSIVE = ["--thresholds", "0.3", "--confidence", "0.1"]


def pseudo(*arguments: object) -> None:
    main([*map(str, arguments), "--threads", "1", "--device", "cpu", *PERMISSIVE])


@pytest.mark.slow
def test_from_a_detector_to_shards_and_training(tmp_path, weights, capsys):
    raw = simulated(tmp_path / "raw")
    out = tmp_path / "pseudo"
    pseudo(weights, raw, out)
    text = capsys.readouterr().out
    assert f"evspan prep source={out / 'recordings.txt'}" in text
    summary = json.loads((out / "summary.json").read_text())["recordings"]
    assert [r["name"] for r in summary] == ["r0", "r1"]
    assert (out / "classes.txt").read_text().split() == CLASSES
    given = read_labels(raw / "train" / "r0_bbox.npy").boxes
    first, second = (read_labels(out / f"r{i}_bbox.npy") for i in range(2))
    kept = first.boxes[np.isin(first.boxes["t"], given["t"])]
    np.testing.assert_array_equal(kept, given)
    for rows, counts in ((first, summary[0]), (second, summary[1])):
        of_kind = {
            name: sum(c[name] for c in counts["per_class"].values())
            for name in counts["per_class"]["car"]
        }
        assert rows.boxes.size == of_kind["labels"] + of_kind["pseudo_boxes"]
        assert rows.regions.size == sum(
            of_kind[name] for name in ("short_tracks", "uncertain", "gaps")
        )
        assert of_kind["pseudo_boxes"] > 10
        assert rows.regions.size > 0
    config = PrepConfig(
        source=str(out / "recordings.txt"),
        output=str(tmp_path / "shards"),
        dataset=DatasetConfig(classes=CLASSES, labels=LabelConfig()),
        frames=FrameConfig(downsample=1, bins=2),
        processes=1,
    )
    prepare(config)
    entries = {entry.name: entry for entry in load_manifest(tmp_path / "shards").recordings}
    assert entries["r0"].ignore_regions > 0
    assert entries["r1"].ignore_regions > 0
    # Every pseudo-label is at the end of a window: nothing is thinned out, labels included.
    for rows, entry in ((first, entries["r0"]), (second, entries["r1"])):
        assert entry.labelled_frames == len(np.unique(rows.times))
        assert entry.dropped_boxes["boxes_off_the_windows"] == 0
        assert entry.dropped_boxes["boxes_between_labelled_frames"] == 0
    losses = trained_losses(tmp_path, weights)
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def trained_losses(tmp_path: Path, weights: Path) -> list[float]:
    """Losses of three steps on the pseudo-labels."""

    model = load_weights(weights).model
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=model,
        dataset=DatasetConfig(root=str(tmp_path / "shards")),
        training=TrainingConfig(max_steps=3, batch_size=2, sequence_length=3, num_workers=0),
        optimizer=OptimizerConfig(lr=1e-4),
        evaluation=EvaluationConfig(),
        parallel=ParallelConfig(ranks=1, threads=1),
    )
    with open_world(config.parallel) as world:
        trainer = Trainer(config, world, PlainEngine)
        batches = trainer.loader.batches(0)
        found = [trainer.micro_batch(next(batches)) for _ in range(3)]
        assert any(trainer.loader.batch(i).regions.shape[1] for i in range(3))
        trainer.close()
    return [float(result.losses[0]) for result in found]


@pytest.mark.slow
def test_thresholds_directions_and_labels_of_other_classes(tmp_path, weights, capsys):
    raw = simulated(tmp_path / "raw")
    listed = tmp_path / "list.txt"
    listed.write_text("train raw/train/r0_td.raw\nval raw/train/r1_td.raw\n")
    filters = FilterOptions(
        objectness=Thresholds(0.3), class_score=Thresholds(0.3), uncertain_regions=False
    )
    (summary,) = label_recordings(
        PseudoOptions(
            weights, listed, tmp_path / "b", filters, backward=False, threads=1, device="cpu"
        )
    )
    assert summary.name == "r0"
    assert all(counts.uncertain == 0 for counts in summary.per_class.values())
    with pytest.raises(SystemExit):
        pseudo(weights, listed, tmp_path / "b")  # files exist
    assert "--overwrite" in capsys.readouterr().err
    path = raw / "train" / "r0_bbox.npy"
    boxes = read_labels(path).boxes
    boxes["class_id"] = 7
    write_boxes(path, boxes)
    with pytest.raises(SystemExit):
        pseudo(weights, listed, tmp_path / "c")
    assert "--class-map" in capsys.readouterr().err
    pseudo(weights, listed, tmp_path / "d", "--class-map", "7:1", "--forward-only")
    kept = read_labels(tmp_path / "d" / "r0_bbox.npy").boxes
    assert (kept["class_id"][np.isin(kept["t"], boxes["t"])] == 1).all()
    pseudo(weights, listed, tmp_path / "e", "--no-labels", "--forward-only")
    without = json.loads((tmp_path / "e" / "summary.json").read_text())["recordings"][0]
    assert sum(counts["labels"] for counts in without["per_class"].values()) == 0
    for wrong in (["--thresholds", "2"], ["--thresholds", "bus=0.5"], ["--class-map", "a"]):
        with pytest.raises(SystemExit):
            main([str(weights), str(listed), str(tmp_path / "f"), *wrong])
    assert not (tmp_path / "f").exists()
