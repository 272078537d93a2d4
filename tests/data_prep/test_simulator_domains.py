"""Domains of the simulator: what each value does to the events, and that the default is unchanged."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from evspan.conf.errors import ConfigError, UserError
from evspan.data_prep.simulator import SimulatorConfig, simulated_boxes, simulated_events
from evspan.data_prep.simulator.config import RANGES
from evspan.data_prep.simulator.domains import DOMAINS, Domain, domain_of
from evspan.data_prep.simulator.recording import simulated_scene
from evspan.data_prep.simulator.recording_set import LATER_PARAMETERS, SimulatedSet, is_complete
from evspan.data_prep.simulator.sensor import move_background
from evspan.launch.cli.simulate import main
from support.event_files import concatenated

SMALL = SimulatorConfig(height=240, width=320)
BOXES = 154
EVENT_SUMS = [355_539, 177_276, 49_997_847, 33_724_987]  # number, and sums of p, x and y
BOX_SUMS = [25_852, 3967]  # of x and w
QUIET = SimulatorConfig(height=160, width=160, min_objects=0, max_objects=0, noise_hz=0)


def test_the_default_is_that_of_the_version_without_domains():
    """Numbers of that version. A last digit of exp or log may differ between processors."""
    events = concatenated(simulated_events(0.5, 3, SMALL))
    boxes = simulated_boxes(0.5, 3, SMALL)
    assert len(boxes) == BOXES
    sums = [events.t.size, *(int(c.astype(np.int64).sum()) for c in (events.p, events.x, events.y))]
    np.testing.assert_allclose(sums, EVENT_SUMS, rtol=1e-5)
    np.testing.assert_allclose([boxes["x"].sum(), boxes["w"].sum()], BOX_SUMS, rtol=1e-3)
    assert domain_of("default", SMALL, {}).config(seed=5) == SMALL


@pytest.mark.parametrize(
    "values",
    [
        {"hot_pixels": 5},
        {"background_texture": 0.2, "clutter": 9},
        {"noise_hz": 3, "threshold_mismatch": 0.1},
        {"object_contrast": 0.5, "ego_speed": 100},
    ],
)
def test_what_leaves_the_objects_alone_leaves_the_boxes_alone(values):
    expected = simulated_boxes(0.5, 3, SMALL)
    assert np.array_equal(simulated_boxes(0.5, 3, replace(SMALL, **values)), expected)


def test_faster_objects_cross_in_less_time():
    def tracks(speed):
        config = replace(SMALL, speed=speed, min_objects=1, max_objects=1)
        return {track.track_id: track for track in simulated_scene(9, 7, config).tracks}

    slow, fast = tracks(1.0), tracks(2.0)
    both = slow.keys() & fast.keys()
    assert both
    for number in both:
        assert np.array_equal(slow[number].points, fast[number].points)
        assert fast[number].crossing_us == pytest.approx(slow[number].crossing_us / 2)


def test_hot_pixels_alone_fire_at_their_mean_rate():
    config = replace(QUIET, hot_pixels=40, hot_pixel_hz=500, refractory_us=0)
    events = concatenated(simulated_events(2.0, 3, config))
    places = set(zip(events.x.tolist(), events.y.tolist(), strict=True))
    assert 30 <= len(places) <= 40
    assert 0.4 < events.t.size / (2.0 * 40 * 500) < 2
    assert 0.45 < events.p.mean() < 0.55
    assert (np.diff(events.t) >= 0).all()


def test_the_background_moves_as_interpolation_says():
    world = np.random.default_rng(0).normal(size=(12, 15)).astype(np.float32)
    seen = np.empty((6, 8), np.float32)
    x, y = np.float32(3.25), np.float32(2.5)
    move_background(world, x, y, seen)
    expected = np.zeros((6, 8))
    for dy, wy in ((0, 0.5), (1, 0.5)):
        for dx, wx in ((0, 0.75), (1, 0.25)):
            expected += wy * wx * world[2 + dy : 8 + dy, 3 + dx : 11 + dx]
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)


def test_ego_motion_stays_on_the_background_at_its_speed_and_fires():
    config = replace(QUIET, ego_speed=150, background_texture=0.5)
    scene = simulated_scene(20, 5, config)
    times = np.arange(0, 20_000_000, 1000)
    offsets = scene.sway.offsets(times)
    size = np.array(scene.background.shape[::-1]) - (160, 160)
    assert offsets.min() >= 0
    assert (offsets.max(0) <= size - 1).all()
    speed = np.hypot(*np.diff(offsets.astype(float), axis=0).T) / 1e-3
    assert 60 < speed.max() <= 151
    moving = sum(e.t.size for e in simulated_events(0.3, 5, config))
    still = sum(e.t.size for e in simulated_events(0.3, 5, replace(config, ego_speed=0)))
    assert still == 0
    assert moving > 5000


@pytest.mark.parametrize("name", DOMAINS)
def test_recordings_draw_their_values_inside_the_ranges_by_seed(name, tmp_path):
    domain = domain_of(name, SMALL, {"noise_hz": (0.5, 8.0)})
    recordings = SimulatedSet(tmp_path, {"train": 6}, domain=domain).recordings()
    configs = [recording.config for recording in recordings]
    for key, (low, high) in domain.ranges.items():
        values = {getattr(config, key) for config in configs}
        assert all(low <= value <= high for value in values)
        assert (len(values) > 1) == (low < high)
    others = [{k: v for k, v in asdict(c).items() if k not in domain.ranges} for c in configs]
    assert all(other == others[0] for other in others)
    again = SimulatedSet(tmp_path, {"train": 6}, domain=domain).recordings()
    assert [recording.config for recording in again] == configs
    wider = domain_of(name, SMALL, {"noise_hz": (0.5, 9.0)}).config(recordings[0].seed)
    assert replace(wider, noise_hz=configs[0].noise_hz) == configs[0]


def test_the_command_writes_the_domain_and_continues_it(tmp_path, capsys):
    size = ["--recordings", "val=1", "--seconds", "0.1", "--width", "200", "--height", "160"]
    night = [str(tmp_path), *size, "--domain", "night", "--hot-pixels", "3", "--speed", "0.5,2"]
    main([*night, "--processes", "1"])
    written = json.loads((tmp_path / "domain.json").read_text())
    assert written["domain"] == "night"
    assert written["ranges"]["hot_pixels"] == [3, 3]
    assert written["ranges"]["speed"] == [0.5, 2]
    assert written["values"]["width"] == 200
    stored = json.loads((tmp_path / "val" / "val_000_simulation.json").read_text())["parameters"]
    assert stored["hot_pixels"] == 3
    assert 0.5 <= stored["speed"] <= 2
    assert "clutter" not in stored  # it has its default
    main(night)
    assert "1 of 1 recordings are there already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path), *size])
    error = capsys.readouterr().err
    assert "hot_pixels 3 instead of 0" in error


SHORT = ["--seconds", "0.1", "--width", "200", "--height", "160", "--processes", "1"]


def simulate_into(folder, recordings, *options):
    main([str(folder), "--recordings", recordings, *SHORT, *options])


def refusal_of(capsys, folder, recordings, *options) -> str:
    """The error of a command that changes nothing in the folder."""
    before = contents_of(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        simulate_into(folder, recordings, *options)
    assert end.value.code == 2
    assert contents_of(folder) == before
    return capsys.readouterr().err


def contents_of(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def recordings_of(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*_td.*"))


def test_recordings_outside_the_set_are_refused_and_deleted_with_overwrite(tmp_path, capsys):
    simulate_into(tmp_path, "train=3,val=1")
    (tmp_path / "train" / "drive_td.raw").write_bytes(b"not simulated")
    error = refusal_of(capsys, tmp_path, "train=1")
    assert f"2 recordings outside this set, the first is {tmp_path}/train/train_001_td.raw" in error
    assert "a larger number in --recordings to keep them, or --overwrite to delete them" in error
    simulate_into(tmp_path, "train=1", "--seed", "5", "--overwrite")
    assert f"{tmp_path}: deleted 2 recordings outside this set\n" in capsys.readouterr().out
    assert recordings_of(tmp_path) == ["drive_td.raw", "train_000_td.raw", "val_000_td.raw"]
    simulated = [path.name for path in (tmp_path / "train").glob("train_*")]
    assert len(simulated) == 3  # events, boxes and parameters of train_000


def test_a_recording_without_parameters_is_not_deleted(tmp_path, capsys):
    simulate_into(tmp_path, "train=3")
    (tmp_path / "train" / "train_002_simulation.json").unlink()
    error = refusal_of(capsys, tmp_path, "train=1", "--overwrite")
    assert "--overwrite does not delete it. Delete or move it" in error
    assert "train_002_td.raw" in error


def test_splits_of_one_domain_are_added_and_those_of_another_refused(tmp_path, capsys):
    simulate_into(tmp_path, "train=1", "--noise-hz", "1")
    simulate_into(tmp_path, "val=1", "--noise-hz", "1", "--seed", "3", "--format", "dat")
    assert recordings_of(tmp_path) == ["train_000_td.raw", "val_000_td.dat"]
    error = refusal_of(capsys, tmp_path, "test=1", "--domain", "night")
    assert "2 recordings outside this set" in error
    assert "the options of its domain.json, which has another domain" in error
    simulate_into(tmp_path, "test=1", "--domain", "night", "--overwrite")
    assert recordings_of(tmp_path) == ["test_000_td.raw"]
    assert json.loads((tmp_path / "domain.json").read_text())["domain"] == "night"


def test_a_domain_file_without_the_later_values_has_their_defaults(tmp_path):
    simulated = SimulatedSet(tmp_path, {"val": 1}, domain=domain_of("night", SMALL, {}))
    assert not simulated.has_other_domain()
    simulated.write_domain()
    stored = json.loads((tmp_path / "domain.json").read_text())
    del stored["values"]["clutter"]
    (tmp_path / "domain.json").write_text(json.dumps(stored))
    assert not simulated.has_other_domain()
    stored["values"]["clutter"] = 3
    (tmp_path / "domain.json").write_text(json.dumps(stored))
    assert simulated.has_other_domain()
    (tmp_path / "domain.json").write_text("[]")
    assert simulated.has_other_domain()


def test_recordings_without_the_later_parameters_are_complete(tmp_path):
    (planned,) = SimulatedSet(tmp_path, {"val": 1}, config=SMALL).recordings()
    assert set(planned.parameters()) - set(planned.written_parameters()) == set(LATER_PARAMETERS)
    planned.path.parent.mkdir()
    planned.path.touch()
    planned.boxes_path.touch()
    planned.parameters_path.write_text(json.dumps({"parameters": planned.written_parameters()}))
    assert is_complete(planned)


@pytest.mark.parametrize("name", RANGES)
def test_values_outside_their_limits_are_refused(name):
    low, high = RANGES[name]
    with pytest.raises(ConfigError, match=f"{name} is .*; give "):
        SimulatorConfig(**{name: high + 1})
    with pytest.raises(ConfigError, match=f"{name} is "):
        domain_of("default", SMALL, {name: (low - 1, high)})


def test_unknown_domains_and_reversed_ranges_are_refused():
    with pytest.raises(UserError, match="there is no domain 'noon'. There are: default, night"):
        domain_of("noon", SMALL, {})
    with pytest.raises(UserError, match="noise_hz 3,1: give the smaller value first"):
        domain_of("night", SMALL, {"noise_hz": (3, 1)})
    assert Domain().to_json()["domain"] == "default"
