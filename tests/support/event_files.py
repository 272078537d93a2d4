"""Sensor files for tests: random words of every format, and a slow reference decoder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.recordings.time_order import LONGEST_SPIKE, SPIKE_US

HEADERS = {
    "evt3": "% evt 3.0\n% format EVT3;height=720;width=1280\n% end\n",
    "evt2": "% evt 2.0\n% format EVT2;height=480;width=640\n% end\n",
    "evt21": "% format EVT21;height=720;width=1280;endianness=little\n% end\n",
    "evt21_legacy": "% format EVT21;endianness=legacy\n% geometry 1280x720\n% end\n",
}
SIZES = {"evt3": (720, 1280), "evt2": (480, 640), "evt21": (720, 1280), "evt21_legacy": (720, 1280)}
WORDS = {"evt3": "<u2", "evt2": "<u4", "evt21": "<u8", "evt21_legacy": "<u8"}


Event = tuple[int, int, int, int]  # t, x, y, p
DecodedEvent = tuple[int | None, int, int, int]  # t is None before the first time word


def write_raw(path: Path, kind: str, words: list[int], header: str | None = None) -> Path:
    """Writes words after `header`, by default the header of their format."""
    data = np.array(words, WORDS[kind])
    if kind == "evt21_legacy":  # each word's upper half comes first
        data = data.view("<u4").reshape(-1, 2)[:, ::-1].copy()
    text = HEADERS[kind] if header is None else header
    path.write_bytes(text.encode() + data.tobytes())
    return path


def concatenated(chunks: Iterable[Events]) -> Events:
    """All events of the chunks; none give columns of length 0."""
    columns: dict[str, list[Any]] = {"t": [], "x": [], "y": [], "p": []}
    for chunk in chunks:
        for name, column in chunk._asdict().items():
            columns[name].append(column)
    return Events(
        np.concatenate([np.zeros(0, np.int64), *columns["t"]]),
        np.concatenate([np.zeros(0, np.uint16), *columns["x"]]),
        np.concatenate([np.zeros(0, np.uint16), *columns["y"]]),
        np.concatenate([np.zeros(0, np.uint8), *columns["p"]]),
    )


def read_by(path: Path, at_once: int | None = None, **options: int) -> tuple[Events, Recording]:
    """All events and the recording, read in blocks of `at_once` bytes (events, of HDF5)."""
    recording = open_recording(path)
    if at_once:
        recording = type(recording)(path, at_once)  # type: ignore[call-arg]  # not of the base class
    return concatenated(recording.chunks(**options)), recording


def random_words(kind: str, rng: np.random.Generator, n: int) -> list[int]:
    """Words of all types, unknown ones too.

    Time advances, stands still, jumps, falls a little and wraps.
    """
    if kind == "evt3":
        return _random_evt3(rng, n)
    return _random_evt2(rng, n, vectors=kind != "evt2")


def _next_high(high: int, most: int, rng: np.random.Generator) -> int:
    choice = rng.random()
    if choice < 0.25:
        return high
    if choice < 0.9:
        return (high + int(rng.integers(1, most // 64 + 2))) % most
    if choice < 0.97:
        return max(0, high - int(rng.integers(1, 5)))
    if choice < 0.98:
        return int(rng.integers(most))
    return (most - 1) * int(rng.integers(2))


def _random_evt3(rng: np.random.Generator, n: int) -> list[int]:
    weights = np.array([8, 1, 20, 6, 10, 6, 15, 1, 15, 1, 2, 1, 1, 1, 2, 10])
    high = 4090
    words = []
    for kind in rng.choice(16, n, p=weights / weights.sum()).tolist():
        value = int(rng.integers(4096))
        if kind == 0x8:
            high = _next_high(high, 4096, rng)
            value = high
        if kind == 0x0 and rng.random() < 0.9:
            value = int(rng.integers(720))
        words.append(kind << 12 | value)
    return words


def _random_evt2(rng: np.random.Generator, n: int, vectors: bool) -> list[int]:
    weights = np.array([30, 30, 1, 1, 1, 1, 1, 1, 20, 1, 5, 1, 1, 1, 3, 2])
    high = (1 << 28) - 3
    words = []
    for kind in rng.choice(16, n, p=weights / weights.sum()).tolist():
        value = int(rng.integers(1 << 28))
        if kind == 0x8:
            high = _next_high(high, 1 << 28, rng)
            value = high
        if kind <= 1 and rng.random() < 0.9:
            low_time = int(rng.integers(64))
            x = int(rng.integers(620))
            y = int(rng.integers(480))
            value = low_time << 22 | x << 11 | y
        word = kind << 28 | value
        if vectors:
            pixels = int(rng.integers(1 << 32)) & int(rng.integers(1 << 32))
            word = word << 32 | pixels
        words.append(word)
    return words


def meaning(kind: str, words: list[int]) -> list[DecodedEvent]:
    """(t, x, y, p) of every event, by the definition of the format."""
    if kind == "evt3":
        return _meaning_of_evt3(words)
    return _meaning_of_evt2(words, vectors=kind != "evt2")


def _meaning_of_evt3(words: list[int]) -> list[DecodedEvent]:
    events: list[DecodedEvent] = []
    high: int | None = None
    low = 0
    wraps = 0
    y = 0
    base = 0
    polarity = 0
    for word in words:
        kind, value = divmod(word, 4096)
        t = None if high is None else wraps * 2**24 + high * 4096 + low
        if kind == 0:
            y = value % 2048
        elif kind == 2:
            events.append((t, value % 2048, y, value // 2048))
        elif kind == 3:
            base = value % 2048
            polarity = value // 2048
        elif kind in (4, 5):
            pixels = 12 if kind == 4 else 8
            events += [(t, base + k, y, polarity) for k in range(pixels) if value & 2**k]
            base += pixels
        elif kind == 6:
            low = value
        elif kind == 8:
            if high is not None and high - value >= 2048:
                wraps += 1
            low = low if value == high else 0
            high = value
    return events


def _meaning_of_evt2(words: list[int], vectors: bool) -> list[DecodedEvent]:
    events: list[DecodedEvent] = []
    high: int | None = None
    wraps = 0
    for word in words:
        upper = word // 2**32 if vectors else word
        pixels = [0]
        if vectors:
            pixels = [k for k in range(32) if word & 2**k]
        kind, value = divmod(upper, 2**28)
        if kind in (0, 1):
            t = None if high is None else wraps * 2**34 + high * 64 + value // 2**22
            events += [(t, value // 2**11 % 2048 + k, value % 2048, kind) for k in pixels]
        elif kind == 8:
            if high is not None and high - value > 2**27:
                wraps += 1
            high = value
    return events


def corrected_times(
    times: Sequence[int], spike_us: int = SPIKE_US, longest_spike: int = LONGEST_SPIKE
) -> tuple[list[tuple[int, int]], int, int]:
    """What `time_order` makes of times, by its definition.

    Returns:
        (index, time) of the events that are kept, and how many are spikes and how many late.
    """
    kept: list[tuple[int, int]] = []
    spikes = 0
    late = 0
    i = 0
    while i < len(times):
        now = times[i]
        latest = kept[-1][1] if kept else None
        if latest is not None and now < latest + spike_us:
            late += now < latest
            kept.append((i, max(now, latest)))
            i += 1
            continue
        following = range(i + 1, min(len(times), i + longest_spike + 1))
        back = (k for k in following if times[k] <= now - spike_us)
        end = next((k for k in back if latest is None or times[k] < latest + spike_us), None)
        if end is not None and _is_spike(times, i, end):
            spikes += end - i
            i = end
        else:
            kept.append((i, now))
            i += 1
    return kept, spikes, late


def _is_spike(times: Sequence[int], i: int, end: int) -> bool:
    run = end - i
    back = end
    while back < len(times) and times[back] < times[i]:
        back += 1
    return back - end > run


def as_read(
    events: Sequence[DecodedEvent], height: int, width: int
) -> tuple[list[Event], dict[str, int]]:
    """The events that a reader must return of these, and the counts of those dropped or raised."""
    timed = [(t, x, y, p) for t, x, y, p in events if t is not None]
    inside = [event for event in timed if event[1] < width and event[2] < height]
    kept, spikes, late = corrected_times([event[0] for event in inside])
    dropped = {
        "outside_sensor": len(timed) - len(inside),
        "before_first_time": len(events) - len(timed),
        "time_spikes": spikes,
        "late_timestamps_raised": late,
        "late_by_1_ms_or_more": sum(t - inside[i][0] >= 1000 for i, t in kept),
    }
    return [(t, *inside[i][1:]) for i, t in kept], dropped
