"""Sensor files for tests: words of every format, and what they mean, word by word in plain Python."""

from pathlib import Path

import numpy as np
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording

HEADERS = {
    "evt3": "% evt 3.0\n% format EVT3;height=720;width=1280\n% end\n",
    "evt2": "% evt 2.0\n% format EVT2;height=480;width=640\n% end\n",
    "evt21": "% format EVT21;height=720;width=1280;endianness=little\n% end\n",
    "evt21_legacy": "% format EVT21;endianness=legacy\n% geometry 1280x720\n% end\n",
}
SIZES = {"evt3": (720, 1280), "evt2": (480, 640), "evt21": (720, 1280), "evt21_legacy": (720, 1280)}
WORDS = {"evt3": "<u2", "evt2": "<u4", "evt21": "<u8", "evt21_legacy": "<u8"}


def write_raw(path: Path, kind: str, words: list[int], header: str | None = None) -> Path:
    data = np.array(words, WORDS[kind])
    if kind == "evt21_legacy":  # each word's upper half comes first
        data = data.view("<u4").reshape(-1, 2)[:, ::-1].copy()
    path.write_bytes((HEADERS[kind] if header is None else header).encode() + data.tobytes())
    return path


def together(chunks) -> Events:
    chunks = list(chunks)
    return Events(
        *(
            np.concatenate([np.zeros(0, kind), *(getattr(c, name) for c in chunks)])
            for name, kind in zip(Events._fields, ("i8", "u2", "u2", "u1"), strict=True)
        )
    )


def read_by(path: Path, at_once: int | None = None, **how):
    """(all events, the recording), read in blocks of `at_once` bytes (events, of HDF5)."""
    recording = open_recording(path)
    if at_once:
        recording = type(recording)(path, at_once)
    return together(recording.chunks(**how)), recording


def random_words(kind: str, rng: np.random.Generator, n: int) -> list[int]:
    """Words of all types, unknown ones too; time runs on, stands, jumps, falls a little and wraps."""
    return _random_evt3(rng, n) if kind == "evt3" else _random_evt2(rng, n, vectors=kind != "evt2")


def _next_high(high: int, most: int, rng: np.random.Generator) -> int:
    way = rng.random()
    if way < 0.25:
        return high
    if way < 0.9:
        return (high + int(rng.integers(1, most // 64 + 2))) % most
    if way < 0.97:
        return max(0, high - int(rng.integers(1, 5)))
    return int(rng.integers(most)) if way < 0.98 else (most - 1) * int(rng.integers(2))


def _random_evt3(rng: np.random.Generator, n: int) -> list[int]:
    shares = np.array([8, 1, 20, 6, 10, 6, 15, 1, 15, 1, 2, 1, 1, 1, 2, 10])
    high, words = 4090, []
    for kind in rng.choice(16, n, p=shares / shares.sum()).tolist():
        value = int(rng.integers(4096))
        if kind == 0x8:
            value = high = _next_high(high, 4096, rng)
        if kind == 0x0 and rng.random() < 0.9:
            value = int(rng.integers(720))
        words.append(kind << 12 | value)
    return words


def _random_evt2(rng: np.random.Generator, n: int, vectors: bool) -> list[int]:
    shares = np.array([30, 30, 1, 1, 1, 1, 1, 1, 20, 1, 5, 1, 1, 1, 3, 2])
    high, words = (1 << 28) - 3, []
    for kind in rng.choice(16, n, p=shares / shares.sum()).tolist():
        value = int(rng.integers(1 << 28))
        if kind == 0x8:
            value = high = _next_high(high, 1 << 28, rng)
        if kind <= 1 and rng.random() < 0.9:
            value = (
                int(rng.integers(64)) << 22 | int(rng.integers(620)) << 11 | int(rng.integers(480))
            )
        word = kind << 28 | value
        words.append(
            word << 32 | int(rng.integers(1 << 32)) & int(rng.integers(1 << 32))
            if vectors
            else word
        )
    return words


def meaning(kind: str, words: list[int]) -> list[tuple]:
    """(t, x, y, p) of every event, by the format's definition; t is None as long as no time is known."""
    return (
        _meaning_of_evt3(words)
        if kind == "evt3"
        else _meaning_of_evt2(words, vectors=kind != "evt2")
    )


def _meaning_of_evt3(words: list[int]) -> list[tuple]:
    events: list[tuple] = []
    high, low, loops, y, base, polarity = None, 0, 0, 0, 0, 0
    for word in words:
        kind, value = divmod(word, 4096)
        t = None if high is None else loops * 2**24 + high * 4096 + low
        if kind == 0:
            y = value % 2048
        elif kind == 2:
            events.append((t, value % 2048, y, value // 2048))
        elif kind == 3:
            base, polarity = value % 2048, value // 2048
        elif kind in (4, 5):
            pixels = 12 if kind == 4 else 8
            events += [(t, base + k, y, polarity) for k in range(pixels) if value & 2**k]
            base += pixels
        elif kind == 6:
            low = value
        elif kind == 8:
            if high is not None and high - value >= 2048:
                loops += 1
            if value != high:
                low = 0
            high = value
    return events


def _meaning_of_evt2(words: list[int], vectors: bool) -> list[tuple]:
    events: list[tuple] = []
    high, loops = None, 0
    for word in words:
        pixels = [k for k in range(32) if word & 2**k] if vectors else [0]
        kind, value = divmod(word // 2**32 if vectors else word, 2**28)
        if kind in (0, 1):
            t = None if high is None else loops * 2**34 + high * 64 + value // 2**22
            events += [(t, value // 2**11 % 2048 + k, value % 2048, kind) for k in pixels]
        elif kind == 8:
            if high is not None and high - value > 2**27:
                loops += 1
            high = value
    return events


def as_read(events: list[tuple], height: int, width: int) -> tuple[list[tuple], dict[str, int]]:
    """What a reader should hand on of these, and what it should say that it left out or mended."""
    dropped = {"outside_sensor": 0, "before_first_time": 0, "late_timestamps_raised": 0}
    out: list[tuple] = []
    for t, x, y, p in events:
        if t is None:
            dropped["before_first_time"] += 1
        elif x >= width or y >= height:
            dropped["outside_sensor"] += 1
        else:
            if out and t < out[-1][0]:
                t = out[-1][0]
                dropped["late_timestamps_raised"] += 1
            out.append((t, x, y, p))
    return out, dropped
