"""The simulator: its events, boxes and files against their definitions."""

import json
from itertools import islice

import numpy as np
import pytest
from evspan.conf.errors import ConfigError, RecordingError
from evspan.data_prep.labels.box_files import find_boxes, read_boxes
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.simulator import (
    CLASSES,
    SimulatorConfig,
    simulate,
    simulated_boxes,
    simulated_events,
)
from evspan.data_prep.simulator.scene import BAR, SHAPE_COLUMNS, make_scene, shapes_and_centres
from evspan.data_prep.simulator.sensor import Sensor, render
from evspan.launch.cli.simulate import main
from support.event_files import concatenated

SMALL = SimulatorConfig(height=240, width=320)


def disc(radius, *, swing=0.0, mean=1.0):
    row = (0, radius, radius, 1, 0, radius, radius, 10, 0, mean, swing)
    assert len(row) == len(SHAPE_COLUMNS)
    return np.array([row], np.float32)


def test_same_seed_same_events_another_seed_others():
    first, again, other = (concatenated(simulated_events(0.3, seed, SMALL)) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.t.size != other.t.size or (first.x != other.x).any()
    np.testing.assert_array_equal(simulated_boxes(0.3, 3, SMALL), simulated_boxes(0.3, 3, SMALL))


def test_events_are_sorted_and_inside():
    events = concatenated(simulated_events(0.21, 0, SMALL))  # not a whole number of blocks
    assert events.t.size > 1000
    assert (np.diff(events.t) >= 0).all()
    assert events.t[0] >= 0
    assert 205_000 < events.t[-1] < 210_000
    assert events.x.max() < 320
    assert events.y.max() < 240
    assert set(np.unique(events.p)) == {0, 1}


@pytest.mark.slow
def test_gen4_rate_is_two_to_five_million_a_second():
    counts = [sum(e.t.size for e in simulated_events(1.0, seed)) for seed in range(3)]
    assert 2e6 < np.mean(counts) < 5e6


def test_no_pixel_fires_within_its_refractory_period():
    config = SimulatorConfig(height=200, width=200, refractory_us=1500, noise_hz=20)
    events = concatenated(simulated_events(0.4, 1, config))
    order = np.lexsort((events.t, events.x, events.y))
    same = (np.diff(events.x[order].astype(int)) == 0) & (np.diff(events.y[order].astype(int)) == 0)
    gaps = np.diff(events.t[order])[same]
    assert gaps.size > 1000
    assert gaps.min() >= 1500


def test_noise_alone_is_poisson_in_space_and_time():
    config = SimulatorConfig(
        height=200, width=300, min_objects=0, max_objects=0, noise_hz=5, refractory_us=0
    )
    events = concatenated(simulated_events(2.0, 5, config))
    mean = 5 * 200 * 300 * 2
    assert abs(events.t.size - mean) < 5 * mean**0.5
    assert abs(events.p.mean() - 0.5) < 0.01
    per_pixel = np.bincount(events.y.astype(int) * 300 + events.x, minlength=60_000)
    assert per_pixel.var() / per_pixel.mean() == pytest.approx(
        1, abs=0.03
    )  # of a Poisson count; 0.006 standard deviation
    assert np.bincount(events.t // 100_000).std() < 2 * (mean / 20) ** 0.5
    assert simulated_boxes(2.0, 5, config).size == 0


def test_a_pixel_counts_thresholds_and_interpolates_times():
    """A bright disc moves over single pixels: number, polarity and time of events by definition."""
    config = SimulatorConfig(
        height=200, width=200, threshold_mismatch=0, noise_hz=0, refractory_us=0, step_us=500
    )
    shapes = disc(20)
    times = np.arange(0, 400_001, 500)
    centres = np.stack([-22 + 100e-6 * times, np.full(times.size, 100)], 1)  # 100 px/s
    centres = centres[:, None].astype(np.float32)
    sensor = Sensor(
        np.zeros((200, 200), np.float32), shapes, centres[0], np.random.default_rng(0), config
    )
    reference = sensor.reference.copy()
    events = sensor.events(times, shapes, centres)
    for y, x in ((100, 10), (95, 3), (81, 12)):
        own = (events.x == x) & (events.y == y)
        levels = []
        for cx, cy in centres[:, 0].astype(float):
            alpha = min(1.0, max(0.0, 20.5 - np.hypot(x + 0.5 - cx, y + 0.5 - cy)))
            levels.append(alpha * 1.0)
        expected = []
        level = float(reference[y, x])
        for i in range(1, len(levels)):
            old = levels[i - 1]
            new = levels[i]
            while abs(new - level) >= 0.2 and (new - level) * (new - old) > 0:
                level += 0.2 * np.sign(new - old)
                time = times[i - 1] + (level - old) / (new - old) * 500
                expected.append((time, int(new > old)))
        assert [p for _, p in expected] == events.p[own].tolist()
        assert len(expected) >= 4
        np.testing.assert_allclose(events.t[own], [t for t, _ in expected], atol=3)


def test_a_still_scene_is_silent_and_a_block_boundary_does_not_matter():
    config = SimulatorConfig(height=200, width=200, noise_hz=0)
    shapes = disc(30, swing=0.5)
    times = np.arange(0, 200_001, 2000)
    x = 50 + 100e-6 * np.minimum(times, 100_000)
    path = np.stack([x, np.full(times.size, 90)], 1)[:, None].astype(np.float32)

    def sensor():
        return Sensor(
            np.zeros((200, 200), np.float32), shapes, path[0], np.random.default_rng(0), config
        )

    whole = sensor().events(times, shapes, path)
    assert whole.t.size > 1000
    assert whole.t.max() < 100_000
    parts = sensor()
    pieces = concatenated(
        [
            parts.events(times[a : b + 1], shapes, path[a : b + 1])
            for a, b in ((0, 7), (7, 40), (40, 100))
        ]
    )
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)


def mask_of(track, t, height, width):
    """Definition, without the kernels: pixel centres inside the shape."""
    shape = dict(zip(SHAPE_COLUMNS, track.shape.astype(float), strict=True))
    cx, cy = track.centre(np.array([t]))[0].astype(float)
    dy, dx = np.mgrid[:height, :width] + 0.5 - np.array([cy, cx])[:, None, None]
    u = shape["cos"] * dx + shape["sin"] * dy
    v = shape["cos"] * dy - shape["sin"] * dx
    if track.class_id == 0:
        return u**2 + v**2 <= shape["half_u"] ** 2
    return (abs(u) <= shape["half_u"]) & (abs(v) <= shape["half_v"])


def test_boxes_are_the_extents_of_what_is_visible():
    config = SimulatorConfig(height=300, width=400, min_objects=4, max_objects=8)
    scene_rng = np.random.default_rng(np.random.SeedSequence(2).spawn(2)[0])
    scene = make_scene(3_000_000, scene_rng, config)
    boxes = simulated_boxes(3.0, 2, config)
    cropped = hidden = 0
    for t in np.unique(boxes["t"])[::9].tolist():
        expected = {}
        tracks = scene.alive(t, t)
        masks = [mask_of(track, t, 300, 400) for track in tracks]
        for i, track in enumerate(tracks):
            visible = masks[i] & ~np.any(masks[i + 1 :], 0) if masks[i + 1 :] else masks[i]
            hidden += visible.sum() < masks[i].sum()
            if visible.sum() < 0.3 * track.area:
                cropped += masks[i].any()
                continue
            rows = np.flatnonzero(visible.any(1))
            columns = np.flatnonzero(visible.any(0))
            expected[track.track_id] = [
                int(columns[0]),
                int(rows[0]),
                int(np.ptp(columns)) + 1,
                int(np.ptp(rows)) + 1,
                track.class_id,
            ]
        at_t = boxes[boxes["t"] == t]
        assert set(at_t["track_id"]) == expected.keys()
        # float32 against float64: a centre exactly on the outline may fall either way.
        for box in at_t:
            values = [int(box[k]) for k in ("x", "y", "w", "h", "class_id")]
            np.testing.assert_allclose(values, expected[int(box["track_id"])], atol=1)
    assert cropped
    assert hidden


def test_boxes_are_where_the_rendering_differs_from_the_background():
    config = SimulatorConfig(height=300, width=400, min_objects=1, max_objects=1, stop_fraction=0)
    scene_rng = np.random.default_rng(np.random.SeedSequence(8).spawn(2)[0])
    scene = make_scene(4_000_000, scene_rng, config)
    boxes = simulated_boxes(4.0, 8, config)
    checked = 0
    for box in boxes[::20]:
        t = int(box["t"])
        shapes, centres = shapes_and_centres(scene.alive(t, t), np.array([t]))
        canvas = np.zeros_like(scene.background)
        render(canvas, scene.background, shapes, centres[0], 0, 300, 0, 400)
        rows, columns = np.nonzero(abs(canvas - scene.background) > 1e-3)
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        expected = [box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]]
        np.testing.assert_allclose(edges, expected, atol=1.01)
        checked += 1
    assert checked >= 3


@pytest.mark.slow
def test_gen4_boxes_have_all_classes_sizes_and_stops():
    boxes = np.concatenate([simulated_boxes(10.0, seed) for seed in range(3)])
    recording = np.repeat(np.arange(3), [simulated_boxes(10.0, seed).size for seed in range(3)])
    longest = np.maximum(boxes["w"], boxes["h"])
    assert set(np.unique(boxes["class_id"])) == set(range(len(CLASSES)))
    assert 0.15 < (longest <= 44).mean() < 0.6
    # Each class has its own sizes and shape.
    for class_id, (low, high) in enumerate(((19, 45), (39, 125), (69, 165))):
        own = boxes[boxes["class_id"] == class_id]
        # The smallest are cropped by the border or hidden by another object.
        sides = np.quantile(np.maximum(own["w"], own["h"]), (0.2, 1))
        assert low < sides[0]
        assert sides[1] <= high
    bars = boxes[boxes["class_id"] == BAR]
    assert np.minimum(bars["w"], bars["h"]).min() >= 3
    assert np.quantile(bars["h"] / bars["w"], 0.25) > 2
    assert (boxes["x"] >= 0).all()
    assert (boxes["x"] + boxes["w"] <= 1280).all()
    assert (boxes["y"] + boxes["h"] <= 720).all()
    at_once = np.unique(np.stack((recording, boxes["t"])), axis=1, return_counts=True)[1]
    assert at_once.max() <= 8
    assert 3 < at_once.mean() < 7
    assert set(np.unique(np.diff(np.unique(boxes["t"])))) <= {16_666, 16_667}
    still = 0
    lifetimes = 0
    for key in np.unique(np.stack((recording, boxes["track_id"])), axis=1).T:
        track = boxes[(recording == key[0]) & (boxes["track_id"] == key[1])]
        moved = np.zeros(track.size - 1, bool)
        for name in ("x", "y", "w"):
            moved |= np.diff(track[name]) != 0
        runs = np.diff(np.flatnonzero(np.concatenate(([True], moved, [True]))))
        still += sum(run for run in runs.tolist() if run >= 55)  # about a second
        lifetimes += track.size
    assert 0.02 < still / lifetimes < 0.25


def test_a_stop_is_at_rest_for_its_time_and_speeds_are_in_their_range():
    scene = make_scene(60_000_000, np.random.default_rng(0), SimulatorConfig())
    stops = [t for t in scene.tracks if t.stopped_us]
    assert 0.15 < len(stops) / len(scene.tracks) < 0.4
    for track in scene.tracks[:60]:
        times = track.born_us + np.arange(0, track.dies_us - track.born_us, 5000.0)
        way = track.centre(times)
        speed = np.hypot(*np.diff(way, axis=0).T) / 0.005
        assert speed.max() < 1600
        inside = np.all((way >= 0) & (way < np.array((1280, 720))), axis=1)
        assert inside.any()
        assert not inside[0]
        assert not inside[-1]
        if track.stopped_us:
            assert (speed == 0).sum() * 5000 == pytest.approx(track.stopped_us, abs=20_000)


@pytest.mark.parametrize("suffix", ["raw", "dat", "h5"])
def test_reading_back_gives_the_simulated_events(tmp_path, suffix):
    path = tmp_path / f"a_td.{suffix}"
    report = simulate(path, seconds=0.3, seed=6, config=SMALL)
    recording = open_recording(path)
    assert (recording.height, recording.width) == (240, 320)
    simulated = concatenated(simulated_events(0.3, 6, SMALL))
    read = concatenated(recording.chunks())
    assert report.events == simulated.t.size > 1000
    for name, a, b in zip(Events._fields, simulated, read, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    boxes_path = find_boxes(path)
    assert boxes_path is not None
    boxes = read_boxes(boxes_path)
    assert boxes.size == report.boxes > 0
    assert (boxes["class_confidence"] == 1).all()
    np.testing.assert_array_equal(boxes, simulated_boxes(0.3, 6, SMALL))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_bbox.npy", f"a_td.{suffix}"]


def test_a_long_recording_comes_in_blocks_of_bounded_size():
    sizes = [events.t.size for events in islice(simulated_events(1000.0, 0, SMALL), 5)]
    assert len(sizes) == 5
    assert max(sizes) < 1e6


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RecordingError):
        simulate(tmp_path / "a_td.mov", seconds=0.1, seed=0, config=SMALL)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="contrast_threshold"):
        SimulatorConfig(contrast_threshold=0)
    with pytest.raises(ConfigError, match="seconds"):
        simulated_boxes(-1, 0, SMALL)


COMMAND = ["--recordings", "train=2,val=1", "--seconds", "0.2", "--width", "320", "--height", "240"]


@pytest.mark.slow
def test_command_writes_the_same_bytes_with_any_number_of_processes_and_keeps_what_is_there(
    tmp_path, capsys
):
    main([str(tmp_path / "a"), *COMMAND, "--processes", "1"])
    main([str(tmp_path / "b"), *COMMAND, "--processes", "2"])
    names = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*"))
    assert names == [
        "classes.txt",
        "domain.json",
        *(
            f"{s}/{s}_{i:03d}_{end}"
            for s, n in (("train", 2), ("val", 1))
            for i in range(n)
            for end in ("bbox.npy", "simulation.json", "td.raw")
        ),
    ]
    contents = [(tmp_path / "a" / n).read_bytes() for n in names]
    assert contents == [(tmp_path / "b" / n).read_bytes() for n in names]
    assert len({c for n, c in zip(names, contents, strict=True) if n.endswith("raw")}) == 3
    before = (tmp_path / "a/train/train_000_td.raw").stat().st_mtime_ns
    main([str(tmp_path / "a"), *COMMAND])
    assert "3 of 3 recordings are there already" in capsys.readouterr().out
    assert (tmp_path / "a/train/train_000_td.raw").stat().st_mtime_ns == before


def test_command_refuses_other_parameters_and_replaces_with_overwrite(tmp_path, capsys):
    one = [
        str(tmp_path),
        "--recordings",
        "val=1",
        "--width",
        "320",
        "--height",
        "240",
        "--seconds",
        "0.2",
    ]
    main([*one, "--processes", "1"])
    with pytest.raises(SystemExit) as exit_:
        main([*one, "--seed", "9"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "--overwrite" in err
    assert len(err.splitlines()) == 1
    main([*one, "--noise-hz", "3", "--format", "dat", "--overwrite", "--processes", "1"])
    names = sorted(p.name for p in (tmp_path / "val").iterdir())
    assert names == ["val_000_bbox.npy", "val_000_simulation.json", "val_000_td.dat"]
    assert (
        json.loads((tmp_path / "val/val_000_simulation.json").read_text())["parameters"]["noise_hz"]
        == 3
    )


@pytest.mark.parametrize(
    "wrong",
    [["--recordings", "valid=3"], ["--objects", "5"], ["--seconds", "0"], ["--noise-hz", "-1"]],
)
def test_command_refuses_nonsense_with_exit_code_2(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), *wrong])
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err
