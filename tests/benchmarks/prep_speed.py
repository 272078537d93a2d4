"""Preparation against RVT's own way (`rvt_way.py`), row by row with what is to be reached and what the hardware would allow.

    .venv/bin/python tests/benchmarks/prep_speed.py [--seconds 10] [--repeats 3] [--folder /scratch]

Recordings of 1280 x 720 are the preprocessing fixture repeated (178 k events a window of 50 ms; 38 k in the sparse one), or,
where that is absent, events at random places; their .h5 are compressed as the fixture's (Blosc zstd 5), or not: `plain`.
Each row is the best of the repeats, ours and theirs in turn, in one process on one core, inputs in the page cache, the compiled
parts warm; rows that say `command` are whole commands, their start included.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import rvt_way
import torch
from common import (
    HEIGHT,
    PARITY,
    WIDTH,
    WINDOW_US,
    ZSTD,
    Table,
    cores,
    events_in,
    linked,
    machine,
    peak_mb,
    piece,
    race,
    write_h5,
    write_raw,
)
from evspan.conf.schema.prep import (
    Codec,
    DatasetConfig,
    FrameConfig,
    FrameMode,
    LabelConfig,
    PrepConfig,
)
from evspan.data_prep.frames.histogram import each_window
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.sources import find_sources
from evspan.data_prep.shards.format import read_frames
from evspan.data_prep.shards.write import prepare_recording

LABELS = {
    "class_map": {0: 0, 1: 1, 2: 2},
    "min_side": 5,
    "max_width_fraction": 0.9,
    "label_every_ms": 100,
}
CLASSES = ["pedestrian", "two_wheeler", "car"]
FRAMES_AT_ONCE = 5  # a chunk of training


# -- both sides ----------------------------------------------------------------------------------------------------
def config(mode: str, codec: str = "fast") -> PrepConfig:
    return PrepConfig(
        processes=1,
        frames=FrameConfig(mode=FrameMode[mode]),
        codec=Codec[codec],
        dataset=DatasetConfig(name="gen4_rvt", classes=CLASSES, labels=LabelConfig(**LABELS)),
    )


class InMemory(Recording):
    """Events that are decoded already."""

    def __init__(self, events: Events) -> None:
        super().__init__(Path("memory"), HEIGHT, WIDTH)
        self.given = events

    def _decoded(self) -> Iterator[Events]:
        yield self.given


class Bench:
    """Inputs, made once, and where outputs go."""

    def __init__(self, folder: Path, seconds: float, repeats: int) -> None:
        self.folder, self.seconds, self.repeats, self.fresh = folder, seconds, repeats, count()
        self.dense_piece, self.sparse_piece = piece(dense=True), piece(dense=False)

    @cached_property
    def dense(self) -> Path:
        return write_h5(
            self.folder / "dense" / "train" / "a_td.h5", self.dense_piece, self.seconds, ZSTD
        )

    @cached_property
    def sparse(self) -> Path:
        return write_h5(
            self.folder / "sparse" / "train" / "a_td.h5", self.sparse_piece, self.seconds, ZSTD
        )

    def ours(self, path: Path, mode: str, codec: str = "fast", keep: bool = False) -> Path:
        part = self.folder / f"part{next(self.fresh)}.h5"
        (source,) = (s for s in find_sources(path.parent.parent) if s.path == path)
        prepare_recording(source, part, config(mode, codec))
        if not keep:
            part.unlink()
        return part

    def theirs(self, path: Path, keep: bool = False) -> Path:
        out = self.folder / f"tree{next(self.fresh)}"
        rvt_way.prepare_recording(path, out)
        if not keep:
            rmtree(out)
        return out / rvt_way.REPRESENTATION / "event_representations_ds2_nearest.h5"

    def command(
        self, recordings: int, processes: int, *, theirs: bool = False, path: Path | None = None
    ) -> tuple[float, float]:
        """(seconds, peak MB of its first process) of a whole command over so many copies of a recording."""
        number = next(self.fresh)
        source = linked(self.folder / f"source{number}", path or self.dense, recordings)
        out = self.folder / f"out{number}"
        ours = [
            "-m",
            "evspan.launch",
            "prep",
            f"source={source}",
            f"output={out}",
            f"processes={processes}",
            f"dataset.classes=[{','.join(CLASSES)}]",
        ]
        arguments = (
            [str(Path(rvt_way.__file__)), str(source), str(out), "--processes", str(processes)]
            if theirs
            else ours
        )
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL
        )
        peak = 0.0
        while process.poll() is None:  # not its rusage, which begins with what this process has
            peak = max(peak, peak_mb(process.pid))
            time.sleep(0.02)
        took = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"error: {arguments} ended with {process.returncode}")
        rmtree(out)
        rmtree(source)
        return took, peak


def read_columns(path: Path) -> None:
    """All that has to be decompressed, block by block, and nothing done with it."""
    with h5py.File(path) as file:
        n = len(file["events/t"])
        for i in range(0, n, 1 << 20):
            for name in "txyp":
                file["events"][name][i : i + (1 << 20)]


# -- rows ----------------------------------------------------------------------------------------------------------
def speed(bench: Bench, table: Table) -> None:
    plain = write_h5(
        bench.folder / "plain" / "train" / "a_td.h5", bench.dense_piece, bench.seconds, {}
    )
    raw = write_raw(bench.folder / "raw" / "train" / "a_td.raw", bench.dense)
    n = events_in(bench.dense) / 1e6
    took = race(
        bench.repeats,
        exact=lambda: bench.ours(bench.dense, "exact"),
        rvt=lambda: bench.ours(bench.dense, "rvt"),
        theirs=lambda: bench.theirs(bench.dense),
        read=lambda: read_columns(bench.dense),
        exact_raw=lambda: bench.ours(raw, "exact"),
        rvt_raw=lambda: bench.ours(raw, "rvt"),
        exact_plain=lambda: bench.ours(plain, "exact"),
        rvt_plain=lambda: bench.ours(plain, "rvt"),
        theirs_plain=lambda: bench.theirs(plain),
        small=lambda: bench.ours(bench.dense, "exact", "small"),
    )
    unit = " Mev/s"
    for mode in ("exact", "rvt"):
        table.row(
            f"dense .h5, {mode}, 1 core",
            n / took[mode],
            n / took["theirs"],
            unit=unit,
            least=30,
            limit=f"reading the .h5 alone {n / took['read']:.0f}",
        )
        table.row(
            f"dense .h5 plain, {mode}, 1 core",
            n / took[f"{mode}_plain"],
            n / took["theirs_plain"],
            unit=unit,
            least=30,
        )
        table.row(
            f"dense EVT3 .raw against .h5, {mode}, 1 core",
            n / took[f"{mode}_raw"],
            n / took[mode],
            unit=unit,
            least_ratio=0.9,
        )
    table.row(
        "dense .h5, exact, codec=small, 1 core", n / took["small"], n / took["theirs"], unit=unit
    )
    n = events_in(bench.sparse) / 1e6
    took = race(
        bench.repeats,
        exact=lambda: bench.ours(bench.sparse, "exact"),
        rvt=lambda: bench.ours(bench.sparse, "rvt"),
        theirs=lambda: bench.theirs(bench.sparse),
        read=lambda: read_columns(bench.sparse),
    )
    for mode in ("exact", "rvt"):
        table.row(
            f"sparse .h5, {mode}, 1 core",
            n / took[mode],
            n / took["theirs"],
            unit=unit,
            least=14,
            limit=f"reading the .h5 alone {n / took['read']:.0f}",
        )


def decoding(bench: Bench, table: Table) -> None:
    parts = {
        (kind, codec): bench.ours(path, mode, codec, keep=True)
        for kind, path, mode in (
            ("dense", bench.dense, "exact"),
            ("dense, rvt", bench.dense, "rvt"),
            ("sparse", bench.sparse, "exact"),
        )
        for codec in ("fast", "small")
    }
    trees = {path: bench.theirs(path, keep=True) for path in (bench.dense, bench.sparse)}

    def all_of(part: Path) -> int:
        with h5py.File(part) as file:
            (group,) = file.values()
            n = len(group["end_us"])
            for i in range(0, n, FRAMES_AT_ONCE):
                read_frames(group, i, min(i + FRAMES_AT_ONCE, n))
            return n

    def all_of_theirs(path: Path) -> int:
        with h5py.File(path) as file:
            for i in range(0, len(file["data"]), FRAMES_AT_ONCE):
                file["data"][i : i + FRAMES_AT_ONCE]
            return len(file["data"])

    memory = np.empty((64, 20, HEIGHT // 2, WIDTH // 2), np.uint8)  # more than caches hold
    zeros = race(4, zeros=lambda: memory.fill(1))["zeros"] / len(memory)
    for (kind, codec), part in parts.items():
        tree = trees[bench.sparse if kind == "sparse" else bench.dense]
        n, other = all_of(part), all_of_theirs(tree)
        took = race(
            bench.repeats,
            ours=lambda part=part: all_of(part),
            theirs=lambda tree=tree: all_of_theirs(tree),
        )
        table.row(
            f"decode, {kind}, codec={codec}, 1 core",
            n / took["ours"],
            other / took["theirs"],
            unit=" /s",
            least=800 if codec == "fast" else 0,
            limit=f"filling a frame's memory {1 / zeros:.0f}",
        )


def histograms(bench: Bench, table: Table) -> None:
    windows = 10
    events = bench.dense_piece.events
    events = events.take(
        slice(0, int(np.searchsorted(np.maximum.accumulate(events.t), windows * WINDOW_US)))
    )
    events = events._replace(t=np.maximum.accumulate(events.t))
    seams = np.searchsorted(events.t, np.arange(windows + 1) * WINDOW_US)
    tensors = [
        [
            torch.from_numpy(np.asarray(c[a:b], np.int64))
            for c in (events.x, events.y, events.p, events.t)
        ]
        for a, b in pairwise(seams)
    ]

    def ours(downsample: int) -> None:
        ends = lambda first: count(WINDOW_US, WINDOW_US)  # noqa: E731
        for _ in each_window(
            InMemory(events), ends, FrameConfig(downsample=downsample), lambda counts: None
        ):
            pass

    ours(1), ours(2)
    took = race(
        bench.repeats + 2,
        full=lambda: ours(1),
        half=lambda: ours(2),
        put=lambda: [rvt_way.histogram(*t) for t in tensors],
        put_half=lambda: [rvt_way.half_resolution(rvt_way.histogram(*t)) for t in tensors],
    )
    n = events.t.size / 1e6
    table.row(
        "histogram, full resolution, 1 core",
        n / took["full"],
        n / took["put"],
        unit=" Mev/s",
        least_ratio=5,
    )
    table.row(
        "histogram, half resolution, 1 core",
        n / took["half"],
        n / took["put_half"],
        unit=" Mev/s",
        least_ratio=5,
    )


def sizes(bench: Bench, table: Table) -> None:
    """Of the fixture's dense recording, as it is."""
    if PARITY.is_dir():
        path = PARITY / "input" / "train" / "synth_a_0_1000000_td.h5"
        tree = next((PARITY / "output" / "train").glob("*/event_representations_v2/*/*.h5"))
    else:
        path = write_h5(bench.folder / "piece" / "train" / "a_td.h5", bench.dense_piece, 1, ZSTD)
        tree = bench.theirs(path, keep=True)
    with h5py.File(tree) as file:
        theirs = file["data"].id.get_storage_size() / len(file["data"]) / 1000
    for codec, most in (("fast", 1.3), ("small", 1.0)):
        with h5py.File(bench.ours(path, "rvt", codec, keep=True)) as file:
            (group,) = file.values()
            stored = (
                group["frames"].id.get_storage_size() + group["frame_start"].id.get_storage_size()
            )
            table.row(
                f"stored size of a frame, rvt, codec={codec}",
                stored / len(group["end_us"]) / 1000,
                theirs,
                unit=" kB",
                most_ratio=most,
            )


def processes(bench: Bench, table: Table, recordings: int) -> None:
    """Whole commands over few recordings and over many: their difference knows no start."""
    n, few, more = events_in(bench.dense) / 1e6, 2, 6
    took = race(
        max(1, bench.repeats - 1),
        **{
            f"{p} {r}": lambda p=p, r=r: bench.command(r, p)
            for r in (few, recordings)
            for p in (1, 2)
        },
    )
    theirs = {(p, r): bench.command(r, p, theirs=True)[0] for p in (1, 2) for r in (few, more)}
    ours = {
        p: n * (recordings - few) / (took[f"{p} {recordings}"] - took[f"{p} {few}"]) for p in (1, 2)
    }
    starts = [took[f"{p} {few}"] - n * few / ours[p] for p in (1, 2)]
    for p in (1, 2):
        table.row(
            f"command without start, exact, {p} process{'es' if p > 1 else ''}",
            ours[p],
            n * (more - few) / (theirs[p, more] - theirs[p, few]),
            unit=" Mev/s",
        )
    table.row(
        "two processes against one, without start",
        ours[2],
        ours[1],
        unit=" Mev/s",
        least_ratio=1.85,
        limit="x 2",
    )
    table.row(
        f"two processes against one, {recordings} recordings, whole",
        n * recordings / took[f"2 {recordings}"],
        n * recordings / took[f"1 {recordings}"],
        unit=" Mev/s",
        least_ratio=1.85,
        limit=f"x 2; starts take {' and '.join(f'{s:.1f}' for s in starts)} s",
    )


def memory(bench: Bench, table: Table, seconds: float) -> None:
    short = write_h5(bench.folder / "short" / "train" / "a_td.h5", bench.sparse_piece, 10, ZSTD)
    long = write_h5(bench.folder / "long" / "train" / "a_td.h5", bench.sparse_piece, seconds, ZSTD)
    peaks = {path: bench.command(1, 1, path=path)[1] for path in (short, long)}
    table.row(
        f"peak memory, sparse, {seconds:g} s against 10 s",
        peaks[long],
        peaks[short],
        unit=" MB",
        most_ratio=1.2,
    )
    theirs = {path: bench.command(1, 1, path=path, theirs=True)[1] for path in (short, long)}
    table.row(
        f"RVT's peak memory, {seconds:g} s against 10 s", theirs[long], theirs[short], unit=" MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="of a recording")
    parser.add_argument(
        "--long", type=float, default=120, help="seconds of the long recording, for memory"
    )
    parser.add_argument(
        "--recordings", type=int, default=24, help="that the commands prepare, 3 or more"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="for 4 GB of files (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["speed", "decoding", "histograms", "sizes", "processes", "memory"],
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=given.folder) as folder:
        bench, table = Bench(Path(folder), given.seconds, given.repeats), Table()
        with cores(1):
            machine()
            warm = write_h5(
                Path(folder) / "warm" / "train" / "a_td.h5", bench.sparse_piece, 1, ZSTD
            )
            for mode in ("exact", "rvt"):
                bench.ours(warm, mode)
            bench.theirs(warm)
            print(
                f"dense: {events_in(bench.dense)} events in {bench.dense.stat().st_size / 1e6:.0f} MB; sparse: "
                f"{events_in(bench.sparse)} in {bench.sparse.stat().st_size / 1e6:.0f} MB; "
                f"{'the fixture repeated' if PARITY.is_dir() else 'events at random places'}"
            )
            table.head()
            for name, rows in (
                ("speed", speed),
                ("decoding", decoding),
                ("histograms", histograms),
                ("sizes", sizes),
            ):
                if name in given.only:
                    rows(bench, table)
        if "processes" in given.only:
            processes(bench, table, given.recordings)
        if "memory" in given.only:
            memory(bench, table, given.long)
    print(f"{table.missed} not reached")
    sys.exit(table.missed > 0)


if __name__ == "__main__":
    main()
