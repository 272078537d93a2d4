"""Decodes whole files to arrays, compared with evt3 and eventcv in the same run, on one core.

    .venv/bin/python tests/benchmarks/decoders.py [--events 40000000] [--repeats 3] [--folder DIR]

The events are those of the dense recording of `prep_speed.py`, written as EVT3 (single events, no
vectors), EVT2 and `.dat`. `vectors` is a real Gen4 burst with its words repeated, as cameras encode
dense scenes. The run fails if two decoders count different numbers of events.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import eventcv
import evt3
import numpy as np
from common import HEIGHT, WIDTH, Table, cores, piece, print_machine, race
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import read_header
from evspan.data_prep.recordings.open import open_recording, open_writer

SAMPLES = Path(os.environ.get("EVSPAN_SAMPLES", Path(__file__).parents[3] / "shared" / "data"))


def by_us(path: Path) -> int:
    """Decodes to four arrays, as the libraries do. Returns the number of events."""
    recording = open_recording(path)
    bytes_per_event = {"dat": 8, "evt2": 4}.get(recording.format, 2)  # without vectors
    capacity = path.stat().st_size // bytes_per_event
    columns = [np.empty(capacity, dtype) for dtype in ("i8", "u2", "u2", "u1")]
    n = 0
    for events in recording.chunks():
        size = events.t.size
        if n + size > capacity:
            capacity *= 2
            columns = [np.concatenate((c[:n], np.empty(capacity - n, c.dtype))) for c in columns]
        for column, values in zip(columns, events, strict=True):
            column[n : n + size] = values  # type: ignore[attr-defined]
        n += size
    return Events(*(column[:n] for column in columns)).t.size


def by_evt3(path: Path) -> int:
    """Decodes by evt3."""
    return len(evt3.decode_file(str(path)).timestamp)


def by_eventcv(path: Path) -> int:
    """Decodes by eventcv to (N, 4) uint64, the only array type that it offers."""
    return len(eventcv.load(str(path), sensor_size=(WIDTH, HEIGHT)).numpy())


def eventcv_loads(path: Path) -> int:
    """Decodes by eventcv to its own structure, which is opaque to Python."""
    return len(eventcv.load(str(path), sensor_size=(WIDTH, HEIGHT)))


def evt2_words(events: Events) -> np.ndarray:
    """One word per event, and a TIME_HIGH word where the upper bits of the time change."""
    words = (
        (events.p.astype(np.uint32) << 28)
        | ((events.t & 63).astype(np.uint32) << 22)
        | (events.x.astype(np.uint32) << 11)
        | events.y
    )
    high = events.t >> 6
    changes = np.flatnonzero(np.diff(high, prepend=-1))
    time_words = 0x8 << 28 | (high[changes] & 0xFFFFFFF).astype(np.uint32)
    return np.insert(words, changes, time_words).astype("<u4")


def write_files(folder: Path, num_events: int) -> dict[str, Path]:
    """Writes about `num_events` events in each format. Returns the path by name of the format."""
    paths = {"EVT3": folder / "a.raw", "EVT2": folder / "b.raw", ".dat": folder / "c.dat"}
    dense = piece(dense=True)
    seconds = num_events / dense.events.t.size * dense.period_us / 1e6
    header = f"% evt 2.0\n% format EVT2;height={HEIGHT};width={WIDTH}\n% end\n".encode()
    with (
        open_writer(paths["EVT3"], HEIGHT, WIDTH) as raw,
        open_writer(paths[".dat"], HEIGHT, WIDTH) as dat,
        paths["EVT2"].open("wb") as evt2,
    ):
        evt2.write(header)
        for events, _ in dense.repeated(seconds):
            events = events._replace(t=np.maximum.accumulate(events.t))
            raw.write(events)
            dat.write(events)
            evt2.write(evt2_words(events).tobytes())
    sample = SAMPLES / "gen4_evt3_dense.raw"
    if sample.is_file():
        paths["EVT3, vectors"] = folder / "d.raw"
        write_bursts(paths["EVT3, vectors"], sample, num_events)
    return paths


def write_bursts(path: Path, sample: Path, num_events: int) -> None:
    """Repeats the words of the sample with TIME_HIGH words that continue."""
    start = read_header(sample)[1]
    content = sample.read_bytes()
    words = np.frombuffer(content[start:], "<u2").copy()
    recording = open_recording(sample)
    count = sum(events.t.size for events in recording.chunks())
    high = np.flatnonzero(words >> 12 == 8)
    step = ((recording.last_us - recording.first_us) >> 12) + 1
    with path.open("wb") as file:
        file.write(content[:start])
        for _ in range(max(1, num_events // count)):
            file.write(words.tobytes())
            words[high] = 0x8000 | (words[high] + step) & 0xFFF


class Other(NamedTuple):
    """Another library's decoder. least_ratio: target of our speed / its speed; 0: none."""

    decode: Callable[[Path], int]
    least_ratio: float


EVT3_LIBRARIES = {"evt3": Other(by_evt3, 1.5), "eventcv": Other(by_eventcv, 0)}
OTHER_LIBRARIES = {"eventcv": Other(by_eventcv, 4), "eventcv.load": Other(eventcv_loads, 0)}
LIBRARIES = {
    "EVT3": EVT3_LIBRARIES,
    "EVT3, vectors": EVT3_LIBRARIES,
    "EVT2": OTHER_LIBRARIES,
    ".dat": OTHER_LIBRARIES,
}


def compare(table: Table, name: str, path: Path, repeats: int) -> None:
    """Adds a row for each library that reads the format."""
    libraries = LIBRARIES[name]
    n = by_us(path)
    decoders = {"ours": by_us}
    for library, other in libraries.items():
        decoders[library] = other.decode
        count = other.decode(path)
        if count != n:
            raise SystemExit(f"error: {name}: {library} counts {count} events, we {n}")
    contenders = {key: partial(decode, path) for key, decode in decoders.items()}
    seconds = race(repeats, **contenders)
    copy = np.empty(13 * n, np.uint8)
    bound = race(2, move=lambda: (np.fromfile(path, np.uint8), copy.fill(1)))["move"]
    for library, other in libraries.items():
        table.row(
            f"{name} against {library}, {path.stat().st_size / n:.1f} bytes an event",
            n / seconds["ours"] / 1e6,
            n / seconds[library] / 1e6,
            unit=" Mev/s",
            least_ratio=other.least_ratio,
            limit=f"reading the bytes and filling 13 an event {n / bound / 1e6:.0f}",
        )


def main() -> None:
    """Writes the files, prints the table; exit code 1 if a target is not reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=8_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--folder", type=Path, help="for 1 GB of files (default: the system's temporary folder)"
    )
    args = parser.parse_args()
    table = Table()
    with TemporaryDirectory(dir=args.folder) as folder, cores(1):
        print_machine()
        paths = write_files(Path(folder), args.events)
        table.head()
        for name in LIBRARIES:
            if name in paths:
                compare(table, name, paths[name], args.repeats)
    raise SystemExit(table.missed > 0)


if __name__ == "__main__":
    main()
