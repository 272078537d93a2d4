"""Compares preparation with RVT's own way (`rvt_way.py`).

    .venv/bin/python tests/benchmarks/prep_speed.py [--seconds 10] [--repeats 3] [--folder DIR]

Recordings of 1280 x 720 repeat the preprocessing fixture (178 k events per window of 50 ms; 38 k in
the sparse one), or without it contain events at random pixels. Their .h5 files are compressed as
the fixture (Blosc zstd 5), or not: `plain`. Each row is the best of the repeats, the sides take
turns, in one process on one core, with inputs in the page cache and compiled parts warm. Rows with
`command` are whole commands, start included.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import count, pairwise
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import NamedTuple

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
    Piece,
    Table,
    cores,
    events_in,
    linked,
    peak_mb,
    piece,
    print_machine,
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
from evspan.data_prep.shards.reading import read_frames
from evspan.data_prep.shards.write import prepare_recording

LABELS = {
    "class_map": {0: 0, 1: 1, 2: 2},
    "min_side": 5,
    "max_width_fraction": 0.9,
    "label_every_ms": 100,
}
CLASSES = ["pedestrian", "two_wheeler", "car"]
CHUNK = 5  # frames per read, as in training
MODES = ("exact", "rvt")


# -- both sides ------------------------------------------------------------------------------------
def config(mode: str, codec: str = "fast") -> PrepConfig:
    """The config of one process."""
    return PrepConfig(
        processes=1,
        frames=FrameConfig(mode=FrameMode[mode]),
        codec=Codec[codec],
        dataset=DatasetConfig(name="gen4_rvt", classes=CLASSES, labels=LabelConfig(**LABELS)),
    )


class InMemory(Recording):
    """A recording of decoded events."""

    def __init__(self, events: Events) -> None:
        super().__init__(Path("memory"), HEIGHT, WIDTH)
        self.columns = events

    def _decoded(self) -> Iterator[Events]:
        yield self.columns


class CommandCost(NamedTuple):
    """Time of a command, and the peak memory of its first process."""

    seconds: float
    peak_mb: float


class Bench:
    """Inputs, created at first use, and the folder of outputs."""

    def __init__(self, folder: Path, seconds: float, repeats: int) -> None:
        self.folder = folder
        self.seconds = seconds
        self.repeats = repeats
        self.numbers = count()
        self.dense_piece = piece(dense=True)
        self.sparse_piece = piece(dense=False)

    @cached_property
    def dense(self) -> Path:
        """The dense recording as .h5."""
        return self.write("dense", self.dense_piece, self.seconds, ZSTD)

    @cached_property
    def sparse(self) -> Path:
        """The sparse recording as .h5."""
        return self.write("sparse", self.sparse_piece, self.seconds, ZSTD)

    def write(self, name: str, content: Piece, seconds: float, filters: dict) -> Path:
        """Writes a recording into a source folder of its own."""
        path = self.folder / name / "train" / "a_td.h5"
        return write_h5(path, content, seconds, filters)

    def ours(self, path: Path, mode: str, codec: str = "fast", keep: bool = False) -> Path:
        """Prepares a recording in this process. Returns the part, which is removed unless kept."""
        part = self.folder / f"part{next(self.numbers)}.h5"
        (source,) = (s for s in find_sources(path.parent.parent) if s.path == path)
        prepare_recording(source, part, config(mode, codec))
        if not keep:
            part.unlink()
        return part

    def theirs(self, path: Path, keep: bool = False) -> Path:
        """Prepares a recording in RVT's way. Returns the frames' file, removed unless kept."""
        out = self.folder / f"tree{next(self.numbers)}"
        rvt_way.prepare_recording(path, out)
        if not keep:
            rmtree(out)
        return out / rvt_way.REPRESENTATION / "event_representations_ds2_nearest.h5"

    def command(
        self, recordings: int, processes: int, *, theirs: bool = False, path: Path | None = None
    ) -> CommandCost:
        """Runs a whole command over so many copies of a recording."""
        number = next(self.numbers)
        source = linked(self.folder / f"source{number}", path or self.dense, recordings)
        out = self.folder / f"out{number}"
        if theirs:
            program = str(Path(rvt_way.__file__))
            words = [program, str(source), str(out), "--processes", str(processes)]
        else:
            classes = ",".join(CLASSES)
            words = ["-m", "evspan.launch", "prep", f"source={source}", f"output={out}"]
            words += [f"processes={processes}", f"dataset.classes=[{classes}]"]
            words += ["dataset.labels.class_map={0:0,1:1,2:2}", "dataset.labels.label_every_ms=50"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL
        )
        peak = 0.0
        while process.poll() is None:  # ru_maxrss would start at the memory of this process
            peak = max(peak, peak_mb(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"error: {words} ended with {process.returncode}")
        rmtree(out)
        rmtree(source)
        return CommandCost(seconds, peak)


def read_columns(path: Path) -> None:
    """Decompresses all columns block by block."""
    with h5py.File(path) as file:
        n = len(file["events/t"])
        for i in range(0, n, 1 << 20):
            for name in "txyp":
                file["events"][name][i : i + (1 << 20)]


# -- rows ------------------------------------------------------------------------------------------
MEV_PER_S = " Mev/s"


def speed(bench: Bench, table: Table) -> None:
    """Speed of preparation in one process."""
    dense_speed(bench, table)
    sparse_speed(bench, table)


def dense_speed(bench: Bench, table: Table) -> None:
    """The dense recording as .h5, uncompressed .h5 and .raw."""
    plain = bench.write("plain", bench.dense_piece, bench.seconds, {})
    raw = write_raw(bench.folder / "raw" / "train" / "a_td.raw", bench.dense)
    n = events_in(bench.dense) / 1e6
    seconds = race(
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
    rates = {name: n / value for name, value in seconds.items()}
    for mode in MODES:
        table.row(
            f"dense .h5, {mode}, 1 core",
            rates[mode],
            rates["theirs"],
            unit=MEV_PER_S,
            least=30,
            limit=f"reading the .h5 alone {rates['read']:.0f}",
        )
        table.row(
            f"dense .h5 plain, {mode}, 1 core",
            rates[f"{mode}_plain"],
            rates["theirs_plain"],
            unit=MEV_PER_S,
            least=30,
        )
        table.row(
            f"dense EVT3 .raw against .h5, {mode}, 1 core",
            rates[f"{mode}_raw"],
            rates[mode],
            unit=MEV_PER_S,
            least_ratio=0.9,
        )
    table.row(
        "dense .h5, exact, codec=small, 1 core", rates["small"], rates["theirs"], unit=MEV_PER_S
    )


def sparse_speed(bench: Bench, table: Table) -> None:
    """The sparse recording as .h5."""
    n = events_in(bench.sparse) / 1e6
    seconds = race(
        bench.repeats,
        exact=lambda: bench.ours(bench.sparse, "exact"),
        rvt=lambda: bench.ours(bench.sparse, "rvt"),
        theirs=lambda: bench.theirs(bench.sparse),
        read=lambda: read_columns(bench.sparse),
    )
    for mode in MODES:
        table.row(
            f"sparse .h5, {mode}, 1 core",
            n / seconds[mode],
            n / seconds["theirs"],
            unit=MEV_PER_S,
            least=14,
            limit=f"reading the .h5 alone {n / seconds['read']:.0f}",
        )


def read_part(part: Path) -> int:
    """Reads all frames of a part of ours in chunks. Returns their number."""
    with h5py.File(part) as file:
        (group,) = file.values()
        n = len(group["end_us"])
        for i in range(0, n, CHUNK):
            read_frames(group, i, min(i + CHUNK, n))
        return n


def read_tree(path: Path) -> int:
    """Reads all frames of RVT's file in chunks. Returns their number."""
    with h5py.File(path) as file:
        n = len(file["data"])
        for i in range(0, n, CHUNK):
            file["data"][i : i + CHUNK]
        return n


def decoding(bench: Bench, table: Table) -> None:
    """Speed of reading frames."""
    memory = np.empty((64, 20, HEIGHT // 2, WIDTH // 2), np.uint8)  # larger than the caches
    fill_seconds = race(4, fill=lambda: memory.fill(1))["fill"] / len(memory)
    trees = {path: bench.theirs(path, keep=True) for path in (bench.dense, bench.sparse)}
    for name, path, mode in (
        ("dense", bench.dense, "exact"),
        ("dense, rvt", bench.dense, "rvt"),
        ("sparse", bench.sparse, "exact"),
    ):
        for codec in ("fast", "small"):
            part = bench.ours(path, mode, codec, keep=True)
            num_ours = read_part(part)
            num_theirs = read_tree(trees[path])
            seconds = race(
                bench.repeats,
                ours=partial(read_part, part),
                theirs=partial(read_tree, trees[path]),
            )
            table.row(
                f"decode, {name}, codec={codec}, 1 core",
                num_ours / seconds["ours"],
                num_theirs / seconds["theirs"],
                unit=" /s",
                least=800 if codec == "fast" else 0,
                limit=f"filling a frame's memory {1 / fill_seconds:.0f}",
            )


def histograms(bench: Bench, table: Table) -> None:
    """Speed of counting events of ten windows."""
    windows = 10
    events = bench.dense_piece.events
    times = np.maximum.accumulate(events.t)
    last = int(np.searchsorted(times, windows * WINDOW_US))
    events = events._replace(t=times).take(slice(0, last))
    seams = np.searchsorted(events.t, np.arange(windows + 1) * WINDOW_US)
    columns = (events.x, events.y, events.p, events.t)
    tensors = []
    for first, last in pairwise(seams):
        tensors.append([torch.from_numpy(np.asarray(c[first:last], np.int64)) for c in columns])

    def ends(first: int) -> Iterator[int]:
        return count(WINDOW_US, WINDOW_US)

    def ours(downsample: int) -> None:
        frame_config = FrameConfig(downsample=downsample)
        for _ in each_window(InMemory(events), ends, frame_config, lambda counts: None):
            pass

    ours(1)  # compiles
    ours(2)
    seconds = race(
        bench.repeats + 2,
        full=lambda: ours(1),
        half=lambda: ours(2),
        put=lambda: [rvt_way.histogram(*t) for t in tensors],
        put_half=lambda: [rvt_way.half_resolution(rvt_way.histogram(*t)) for t in tensors],
    )
    n = events.t.size / 1e6
    for resolution, theirs in (("full", "put"), ("half", "put_half")):
        table.row(
            f"histogram, {resolution} resolution, 1 core",
            n / seconds[resolution],
            n / seconds[theirs],
            unit=MEV_PER_S,
            least_ratio=5,
        )


def sizes(bench: Bench, table: Table) -> None:
    """Stored size of the fixture's dense recording."""
    if PARITY.is_dir():
        path = PARITY / "input" / "train" / "synth_a_0_1000000_td.h5"
        tree = next((PARITY / "output" / "train").glob("*/event_representations_v2/*/*.h5"))
    else:
        path = bench.write("piece", bench.dense_piece, 1, ZSTD)
        tree = bench.theirs(path, keep=True)
    with h5py.File(tree) as file:
        theirs = stored_bytes(file["data"]) / len(file["data"]) / 1000
    for codec, most in (("fast", 1.3), ("small", 1.0)):
        with h5py.File(bench.ours(path, "rvt", codec, keep=True)) as file:
            (group,) = file.values()
            ours = stored_bytes(group["frames"]) + stored_bytes(group["frame_start"])
            table.row(
                f"stored size of a frame, rvt, codec={codec}",
                ours / len(group["end_us"]) / 1000,
                theirs,
                unit=" kB",
                most_ratio=most,
            )


def stored_bytes(dataset: h5py.Dataset) -> int:
    """Bytes of a dataset on disk."""
    return dataset.id.get_storage_size()


def processes(bench: Bench, table: Table, recordings: int) -> None:
    """Whole commands over few and over many recordings: the difference excludes the start."""
    n = events_in(bench.dense) / 1e6
    few = 2
    more = 6
    commands = {}
    for num_recordings in (few, recordings):
        for p in (1, 2):
            commands[f"{p} {num_recordings}"] = partial(bench.command, num_recordings, p)
    seconds = race(max(1, bench.repeats - 1), **commands)
    rates = {}
    starts = {}
    for p in (1, 2):
        few_seconds = seconds[f"{p} {few}"]
        rates[p] = n * (recordings - few) / (seconds[f"{p} {recordings}"] - few_seconds)
        starts[p] = few_seconds - n * few / rates[p]
        their_few = bench.command(few, p, theirs=True).seconds
        their_more = bench.command(more, p, theirs=True).seconds
        table.row(
            f"command without start, exact, processes: {p}",
            rates[p],
            n * (more - few) / (their_more - their_few),
            unit=MEV_PER_S,
        )
    table.row(
        "two processes against one, without start",
        rates[2],
        rates[1],
        unit=MEV_PER_S,
        least_ratio=1.85,
        limit="x 2",
    )
    table.row(
        f"two processes against one, {recordings} recordings, whole",
        n * recordings / seconds[f"2 {recordings}"],
        n * recordings / seconds[f"1 {recordings}"],
        unit=MEV_PER_S,
        least_ratio=1.85,
        limit=f"x 2; starts take {starts[1]:.1f} and {starts[2]:.1f} s",
    )


def memory(bench: Bench, table: Table, seconds: float) -> None:
    """Peak memory of a command on a long and on a short recording."""
    short = bench.write("short", bench.sparse_piece, 10, ZSTD)
    long = bench.write("long", bench.sparse_piece, seconds, ZSTD)
    table.row(
        f"peak memory, sparse, {seconds:g} s against 10 s",
        bench.command(1, 1, path=long).peak_mb,
        bench.command(1, 1, path=short).peak_mb,
        unit=" MB",
        most_ratio=1.2,
    )
    table.row(
        f"RVT's peak memory, {seconds:g} s against 10 s",
        bench.command(1, 1, path=long, theirs=True).peak_mb,
        bench.command(1, 1, path=short, theirs=True).peak_mb,
        unit=" MB",
    )


ONE_CORE_ROWS = {
    "speed": speed,
    "decoding": decoding,
    "histograms": histograms,
    "sizes": sizes,
}
ROWS = (*ONE_CORE_ROWS, "processes", "memory")


def warm_up(bench: Bench) -> None:
    """Compiles, and initializes libraries."""
    path = bench.write("warm", bench.sparse_piece, 1, ZSTD)
    for mode in MODES:
        bench.ours(path, mode)
    bench.theirs(path)


def print_inputs(bench: Bench) -> None:
    """Prints the sizes of the recordings."""
    content = "the fixture repeated" if PARITY.is_dir() else "events at random pixels"
    parts = []
    for name, path in (("dense", bench.dense), ("sparse", bench.sparse)):
        megabytes = path.stat().st_size / 1e6
        parts.append(f"{name}: {events_in(path)} events in {megabytes:.0f} MB")
    print(f"{'; '.join(parts)}; {content}")


def main() -> None:
    """Prints the table; exit code 1 if a target is not reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="length of a recording")
    parser.add_argument(
        "--long", type=float, default=120, help="length of the long recording in row `memory`"
    )
    parser.add_argument(
        "--recordings", type=int, default=24, help="number in row `processes`, 3 or more"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="for 4 GB of files (default: the system's temporary folder)"
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table()
    with TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(Path(folder), args.seconds, args.repeats)
        with cores(1):
            print_machine()
            warm_up(bench)
            print_inputs(bench)
            table.head()
            for name, rows in ONE_CORE_ROWS.items():
                if name in args.only:
                    rows(bench, table)
        if "processes" in args.only:
            processes(bench, table, args.recordings)
        if "memory" in args.only:
            memory(bench, table, args.long)
    print(f"{table.missed} not reached")
    sys.exit(table.missed > 0)


if __name__ == "__main__":
    main()
