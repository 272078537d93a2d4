"""What the benchmarks share: recordings of the preprocessing fixture's content, at any length; races, and a table of them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5plugin
import numpy as np
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording, open_writer

HEIGHT, WIDTH, WINDOW_US = 720, 1280, 50_000
PARITY = (
    Path(os.environ.get("EVSPAN_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
    / "prep_fixture"
)
ZSTD = dict(hdf5plugin.Blosc(cname="zstd", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE))


# -- recordings ----------------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    """A short recording that is repeated: columns, boxes, and after what time it begins again."""

    events: Events
    boxes: np.ndarray
    period_us: int

    def repeated(self, seconds: float) -> Iterator[tuple[Events, np.ndarray]]:
        for k in range(max(1, round(seconds * 1e6 / self.period_us))):
            boxes = self.boxes.copy()
            boxes["t"] += k * self.period_us
            yield self.events._replace(t=self.events.t + k * self.period_us), boxes


def piece(dense: bool) -> Piece:
    """synth_a or synth_b of the fixture, cut to a whole number of label distances; or as many events at random places."""
    name, period = (
        ("train/synth_a_0_1000000", 1_000_000) if dense else ("val/synth_b_0_620000", 600_000)
    )
    if PARITY.is_dir():
        with h5py.File(PARITY / "input" / f"{name}_td.h5") as file:
            t, x, y, p = (file["events"][c][:] for c in "txyp")
        inside, boxes = t < period, np.load(PARITY / "input" / f"{name}_bbox.npy")
        return Piece(
            Events(t, x, y, (p > 0).astype(np.uint8)).take(inside),
            boxes[boxes["t"] < period],
            period,
        )
    rng, n = np.random.default_rng(0), period * (178_000 if dense else 38_000) // WINDOW_US
    boxes = np.zeros(period * 60 // 1_000_000, RAW_BOX)
    boxes["t"] = 20_000 + np.arange(boxes.size) * period // boxes.size
    boxes["x"], boxes["y"], boxes["w"], boxes["h"] = 100, 100, 200, 150
    return Piece(
        Events(
            np.sort(rng.integers(0, period, n)),
            rng.integers(0, WIDTH, n).astype(np.uint16),
            rng.integers(0, HEIGHT, n).astype(np.uint16),
            rng.integers(0, 2, n).astype(np.uint8),
        ),
        boxes,
        period,
    )


def write_h5(path: Path, piece: Piece, seconds: float, filters: dict) -> Path:
    """`X_td.h5` as the fixture's: t int64, x and y uint16, p uint8, chunks of 65536; and X_bbox.npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = []
    with h5py.File(path, "w") as file:
        columns = {
            name: file.create_dataset(
                f"events/{name}", (0,), kind, maxshape=(None,), chunks=(1 << 16,), **filters
            )
            for name, kind in zip("txyp", ("i8", "u2", "u2", "u1"), strict=True)
        }
        file["events/height"], file["events/width"] = HEIGHT, WIDTH
        for events, more in piece.repeated(seconds):
            boxes.append(more)
            for name, column in events._asdict().items():
                columns[name].resize((len(columns[name]) + column.size,))
                columns[name][-column.size :] = column
    np.save(box_file(path), np.concatenate(boxes))
    return path


def box_file(path: Path) -> Path:
    return path.with_name(path.name.replace("_td" + path.suffix, "_bbox.npy"))


def write_raw(path: Path, source: Path) -> Path:
    """The same recording as EVT3."""
    path.parent.mkdir(parents=True)
    with open_writer(path, HEIGHT, WIDTH) as writer:
        for events in open_recording(source).chunks():
            writer.write(events)
    np.save(box_file(path), np.load(box_file(source)))
    return path


def linked(folder: Path, path: Path, copies: int) -> Path:
    """A source folder with `copies` recordings, all the same file."""
    (folder / "train").mkdir(parents=True)
    for i in range(copies):
        (folder / "train" / f"r{i:03d}_td{path.suffix}").hardlink_to(path)
        (folder / "train" / f"r{i:03d}_bbox.npy").hardlink_to(box_file(path))
    return folder


def events_in(path: Path) -> int:
    with h5py.File(path) as file:
        return len(file["events/t"])


# -- timing --------------------------------------------------------------------------------------------------------
@contextmanager
def cores(number: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    if len(before) < number:
        raise SystemExit(f"error: {number} cores are needed, {len(before)} are there")
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def race(repeats: int, **contenders: Callable[[], object]) -> dict[str, float]:
    """Best seconds of each, run in turn, so that a slow moment of the machine meets all of them."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, work in contenders.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


@dataclass
class Table:
    """Rows as they come: what, ours, theirs, ratio, what is to be reached and whether it is, what the hardware would allow."""

    missed: int = 0

    def head(self) -> None:
        self._line("what", "ours", "theirs", "ratio", "to reach", "", "limit")

    def row(
        self,
        what: str,
        ours: float,
        theirs: float | None = None,
        *,
        unit: str = "",
        ratio: float | None = None,
        least: float = 0,
        least_ratio: float = 0,
        most_ratio: float = 0,
        limit: str = "",
    ) -> None:
        """least: of ours; least_ratio, most_ratio: of the ratio, ours / theirs unless given."""
        if ratio is None and theirs:
            ratio = ours / theirs
        goals = [(f">= {least:g}{unit}", ours >= least)] if least else []
        goals += [(f">= x {least_ratio:g}", (ratio or 0) >= least_ratio)] if least_ratio else []
        goals += [(f"<= x {most_ratio:g}", (ratio or 0) <= most_ratio)] if most_ratio else []
        reached = all(done for _, done in goals)
        self.missed += not reached
        self._line(
            what,
            f"{ours:.1f}{unit}",
            f"{theirs:.1f}{unit}" if theirs else "",
            f"x {ratio:.2f}" if ratio else "",
            ", ".join(goal for goal, _ in goals),
            ("yes" if reached else "NO") if goals else "",
            limit,
        )

    def _line(self, *cells: str) -> None:
        print(
            "| "
            + " | ".join(
                f"{cell:{width}}"
                for cell, width in zip(cells, (50, 14, 14, 7, 12, 3, 0), strict=True)
            )
            + " |",
            flush=True,
        )


def peak_mb(pid: int) -> float:
    """The most memory that a process has had resident so far."""
    try:
        told = next(
            (
                line
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if line.startswith("VmHWM")
            ),
            "0 0",
        )
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(told.split()[1]) / 1000


def machine() -> None:
    name = next(
        (
            line.split(": ")[1]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "?",
    )
    source, target = np.ones(1 << 28, np.uint8), np.zeros(1 << 28, np.uint8)
    took = race(3, copy=lambda: np.copyto(target, source))["copy"]
    print(
        f"{name}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; one core copies "
        f"{source.size / took / 1e9:.1f} GB/s; {', '.join(f'{m} {version(m)}' for m in ('torch', 'h5py', 'numba', 'numpy'))}"
    )
