"""Our decoders against independent libraries, on real and on simulated recordings.

They are compared on streams that cameras send. Where the libraries differ among themselves
(TIME_HIGH without TIME_LOW, a counter that falls by half its range) `test_formats.py` compares ours
with the vendor's decoder.
"""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.simulator import SimulatorConfig, simulate
from support.event_files import read_by, write_raw


def library(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install evspan[test]")


def by_evt3(path: Path) -> Events:
    events = library("evt3").decode_file(str(path))
    return Events(
        np.asarray(events.timestamp).astype(np.int64),
        np.asarray(events.x).astype(np.uint16),
        np.asarray(events.y).astype(np.uint16),
        np.asarray(events.polarity).astype(np.uint8),
    )


def by_eventcv(path: Path) -> Events:
    events = library("eventcv").load(str(path), sensor_size=(1280, 720))
    x, y, t, p = events.numpy().astype(np.int64).T
    return Events(t, x, y, p)


def require_equal(path: Path, other: Events) -> int:
    """Compares our events with another decoder's; returns how many they are."""
    events, recording = read_by(path)
    assert recording.events == other.t.size
    assert not any(recording.dropped.values())
    for name, ours, theirs in zip(Events._fields, events, other, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    return recording.events


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("gen4_evt3_triggers.raw", by_evt3),
        ("gen4_evt3_dense.raw", by_evt3),
        ("gen4_evt3_triggers.raw", by_eventcv),
        ("gen4_evt3_dense.raw", by_eventcv),
        ("gen3_evt2.raw", by_eventcv),
        ("atis_ncars.dat", by_eventcv),
    ],
)
def test_real_recordings(samples_dir, name, decoder):
    assert require_equal(samples_dir / name, decoder(samples_dir / name)) > 4000


@pytest.mark.parametrize(
    ("suffix", "decoder"), [("raw", by_evt3), ("raw", by_eventcv), ("dat", by_eventcv)]
)
def test_simulated_recordings(tmp_path, suffix, decoder):
    path = tmp_path / f"a_td.{suffix}"
    report = simulate(path, seconds=0.5, seed=3, config=SimulatorConfig(height=240, width=320))
    assert require_equal(path, decoder(path)) == report.events > 1000


def camera_words(rng: np.random.Generator, n: int) -> list[int]:
    """EVT3 as a camera sends it.

    Each TIME_HIGH has its TIME_LOW, time advances and wraps, and there are vectors, triggers and
    unknown words.
    """
    now = 4000 << 12
    words = [0x8000 | 4000, 0x6000, 0x0000, 0x3000]
    percents = {
        0x0: 10,
        0x2: 30,
        0x3: 5,
        0x4: 10,
        0x5: 5,
        0x6: 25,
        0xA: 5,
        0x1: 2,
        0x7: 2,
        0x9: 2,
        0xE: 2,
        0xF: 2,
    }
    probabilities = np.array(list(percents.values())) / 100
    for kind in rng.choice(list(percents), n, p=probabilities).tolist():
        value = int(rng.integers(720 if kind == 0x0 else 4096))
        if kind == 0x6:
            before = now
            now += int(rng.integers(900))
            value = now % 4096
            if now >> 12 != before >> 12:
                words.append(0x8000 | (now >> 12) % 4096)
        words.append(kind << 12 | value)
    return words


@pytest.mark.parametrize("decoder", [by_evt3, by_eventcv])
def test_random_camera_streams(tmp_path, decoder):
    for seed in range(10):
        path = write_raw(
            tmp_path / "a.raw", "evt3", camera_words(np.random.default_rng(seed), 5000)
        )
        other = decoder(path)
        inside = (other.x < 1280) & (other.y < 720)  # the libraries do not drop the others
        events, recording = read_by(path)
        assert recording.events > 2000
        assert recording.last_us > 2**24
        assert not recording.dropped["late_timestamps_raised"]
        for name, ours, theirs in zip(Events._fields, events, other, strict=True):
            np.testing.assert_array_equal(ours, theirs[inside], err_msg=f"{name}, seed {seed}")


def test_random_evt2_streams(tmp_path):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        words = [0x8 << 28 | 1000]
        for kind in rng.choice([0, 1, 8, 10, 14, 15], 3000, p=[0.4, 0.4, 0.1, 0.05, 0.03, 0.02]):
            if kind == 8:
                words.append(0x8 << 28 | 1000 + len(words) // 50)
            else:
                low = len(words) % 50
                x = int(rng.integers(640))
                y = int(rng.integers(480))
                words.append(int(kind) << 28 | low << 22 | x << 11 | y)
        path = write_raw(tmp_path / "a.raw", "evt2", words)
        other = by_eventcv(path)
        other = other._replace(t=np.maximum.accumulate(other.t))
        for name, ours, theirs in zip(Events._fields, read_by(path)[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name}, seed {seed}")
