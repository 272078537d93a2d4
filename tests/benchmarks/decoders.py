"""Whole files to arrays, against the libraries that can be installed: evt3 and eventcv, in the same run, on one core.

    .venv/bin/python tests/benchmarks/decoders.py [--events 40000000] [--repeats 3] [--folder /scratch]

The events are the dense recording of `prep_speed.py`, written as EVT3 (single events, no vectors), EVT2 and `.dat`; `vectors` is
a real Gen4 burst, its words repeated, as cameras send dense scenes. All count the same events, or the run ends.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import eventcv
import evt3
import numpy as np
from common import HEIGHT, WIDTH, Table, cores, machine, piece, race
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import read_header
from evspan.data_prep.recordings.open import open_recording, open_writer

SAMPLES = Path(os.environ.get("EVSPAN_SAMPLES", Path(__file__).parents[3] / "shared" / "data"))


def by_us(path: Path) -> int:
    """To four arrays, as the libraries give them: room for an event a word, more where vectors need it."""
    recording, n = open_recording(path), 0
    room = path.stat().st_size // (
        8 if path.suffix == ".dat" else 4 if recording.format == "evt2" else 2
    )
    columns = [np.empty(room, kind) for kind in ("i8", "u2", "u2", "u1")]
    for events in recording.chunks():
        if n + events.t.size > room:
            room *= 2
            columns = [np.concatenate((c[:n], np.empty(room - n, c.dtype))) for c in columns]
        for column, new in zip(columns, events, strict=True):
            column[n : n + new.size] = new  # type: ignore[attr-defined]
        n += events.t.size
    return Events(*(c[:n] for c in columns)).t.size


def by_evt3(path: Path) -> int:
    return len(evt3.decode_file(str(path)).timestamp)


def by_eventcv(path: Path) -> int:
    return len(
        eventcv.load(str(path), sensor_size=(WIDTH, HEIGHT)).numpy()
    )  # (N, 4) uint64, the only arrays that it gives


def eventcv_loads(path: Path) -> int:
    """To its own structure, which Python cannot look into."""
    return len(eventcv.load(str(path), sensor_size=(WIDTH, HEIGHT)))


def evt2_words(events: Events) -> np.ndarray:
    """Every event's word, and a TIME_HIGH wherever the 64 us change."""
    words = (
        (events.p.astype(np.uint32) << 28)
        | ((events.t & 63).astype(np.uint32) << 22)
        | (events.x.astype(np.uint32) << 11)
        | events.y
    )
    high = events.t >> 6
    new = np.flatnonzero(np.diff(high, prepend=-1))
    return np.insert(words, new, 0x8 << 28 | (high[new] & 0xFFFFFFF).astype(np.uint32)).astype(
        "<u4"
    )


def write_files(folder: Path, most: int) -> dict[str, Path]:
    paths = {"EVT3": folder / "a.raw", "EVT2": folder / "b.raw", ".dat": folder / "c.dat"}
    dense = piece(dense=True)
    seconds = most / dense.events.t.size * dense.period_us / 1e6
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
    if (sample := SAMPLES / "gen4_evt3_dense.raw").is_file():
        paths["EVT3, vectors"] = folder / "d.raw"
        write_bursts(paths["EVT3, vectors"], sample, most)
    return paths


def write_bursts(path: Path, sample: Path, most: int) -> None:
    """The sample's words again and again, its TIME_HIGH running on."""
    start, content = read_header(sample)[1], sample.read_bytes()
    words, recording = np.frombuffer(content[start:], "<u2").copy(), open_recording(sample)
    count = sum(events.t.size for events in recording.chunks())
    high = np.flatnonzero(words >> 12 == 8)
    step = ((recording.last_us - recording.first_us) >> 12) + 1
    with path.open("wb") as file:
        file.write(content[:start])
        for _ in range(max(1, most // count)):
            file.write(words.tobytes())
            words[high] = 0x8000 | (words[high] + step) & 0xFFF


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=8_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--folder", type=Path, help="for 1 GB of files (default: the system's temporary folder)"
    )
    given = parser.parse_args()
    of_eventcv = {"eventcv": (by_eventcv, 4), "eventcv.load": (eventcv_loads, 0)}
    of_evt3 = {"evt3": (by_evt3, 1.5), "eventcv": (by_eventcv, 0)}
    others: dict[str, dict[str, tuple[Callable[[Path], int], float]]] = {
        "EVT3": of_evt3,
        "EVT3, vectors": of_evt3,
        "EVT2": of_eventcv,
        ".dat": of_eventcv,
    }
    table = Table()
    with TemporaryDirectory(dir=given.folder) as folder, cores(1):
        machine()
        paths = write_files(Path(folder), given.events)
        table.head()
        for kind, path in ((kind, paths[kind]) for kind in others if kind in paths):
            n, size = by_us(path), path.stat().st_size
            decoders = {
                "ours": by_us,
                **{name: decoder for name, (decoder, _) in others[kind].items()},
            }
            for name, decoder in decoders.items():
                if (theirs := decoder(path)) != n:
                    raise SystemExit(f"error: {kind}: {name} counts {theirs} events, we {n}")
            took = race(
                given.repeats,
                **{name: lambda d=d, path=path: d(path) for name, d in decoders.items()},
            )
            copy = np.empty(13 * n, np.uint8)
            bound = race(
                2, move=lambda copy=copy, path=path: (np.fromfile(path, np.uint8), copy.fill(1))
            )["move"]
            for name, (_, least) in others[kind].items():
                table.row(
                    f"{kind} against {name}, {size / n:.1f} bytes an event",
                    n / took["ours"] / 1e6,
                    n / took[name] / 1e6,
                    unit=" Mev/s",
                    least_ratio=least,
                    limit=f"reading the bytes and filling 13 an event {n / bound / 1e6:.0f}",
                )
    raise SystemExit(table.missed > 0)


if __name__ == "__main__":
    main()
