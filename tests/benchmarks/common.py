"""Recordings of any length with the preprocessing fixture's content, timing, and result tables."""

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

HEIGHT = 720
WIDTH = 1280
WINDOW_US = 50_000
PARITY = (
    Path(os.environ.get("EVSPAN_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
    / "prep_fixture"
)
ZSTD = dict(hdf5plugin.Blosc(cname="zstd", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE))


# -- recordings ----------------------------------------------------------------------------------
class Piece(NamedTuple):
    """A short recording to repeat: its events and boxes, and the period of the repetition."""

    events: Events
    boxes: np.ndarray
    period_us: int

    def repeated(self, seconds: float) -> Iterator[tuple[Events, np.ndarray]]:
        """Events and boxes of each repetition, at least one, of `seconds` in all."""
        for k in range(max(1, round(seconds * 1e6 / self.period_us))):
            boxes = self.boxes.copy()
            boxes["t"] += k * self.period_us
            yield self.events._replace(t=self.events.t + k * self.period_us), boxes


def piece(dense: bool) -> Piece:
    """synth_a or synth_b of the fixture, cut to a whole number of label periods.

    Without the fixture: as many events at random pixels.
    """
    if PARITY.is_dir():
        return _fixture_piece(dense)
    return _random_piece(dense)


def _fixture_piece(dense: bool) -> Piece:
    name = "train/synth_a_0_1000000" if dense else "val/synth_b_0_620000"
    period = 1_000_000 if dense else 600_000
    with h5py.File(PARITY / "input" / f"{name}_td.h5") as file:
        t, x, y, p = (file["events"][column][:] for column in "txyp")
    events = Events(t, x, y, (p > 0).astype(np.uint8)).take(t < period)
    boxes = np.load(PARITY / "input" / f"{name}_bbox.npy")
    return Piece(events, boxes[boxes["t"] < period], period)


def _random_piece(dense: bool) -> Piece:
    rng = np.random.default_rng(0)
    period = 1_000_000 if dense else 600_000
    events_per_window = 178_000 if dense else 38_000
    n = period * events_per_window // WINDOW_US
    boxes = np.zeros(period * 60 // 1_000_000, RAW_BOX)
    boxes["t"] = 20_000 + np.arange(boxes.size) * period // boxes.size
    for name, value in {"x": 100, "y": 100, "w": 200, "h": 150}.items():
        boxes[name] = value
    events = Events(
        np.sort(rng.integers(0, period, n)),
        rng.integers(0, WIDTH, n).astype(np.uint16),
        rng.integers(0, HEIGHT, n).astype(np.uint16),
        rng.integers(0, 2, n).astype(np.uint8),
    )
    return Piece(events, boxes, period)


def write_h5(path: Path, piece: Piece, seconds: float, filters: dict) -> Path:
    """Writes X_td.h5 as in the fixture, and X_bbox.npy.

    t int64, x and y uint16, p uint8, in chunks of 65536. filters: h5py's options of a dataset.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = []
    with h5py.File(path, "w") as file:
        columns = {}
        for name, dtype in {"t": "i8", "x": "u2", "y": "u2", "p": "u1"}.items():
            columns[name] = file.create_dataset(
                f"events/{name}", (0,), dtype, maxshape=(None,), chunks=(1 << 16,), **filters
            )
        file["events/height"] = HEIGHT
        file["events/width"] = WIDTH
        for events, piece_boxes in piece.repeated(seconds):
            boxes.append(piece_boxes)
            for name, column in events._asdict().items():
                columns[name].resize((len(columns[name]) + column.size,))
                columns[name][-column.size :] = column
    np.save(box_file(path), np.concatenate(boxes))
    return path


def box_file(path: Path) -> Path:
    """X_bbox.npy of X_td.SUFFIX."""
    return path.with_name(path.name.replace("_td" + path.suffix, "_bbox.npy"))


def write_raw(path: Path, source: Path) -> Path:
    """Writes the same recording as EVT3, and its boxes."""
    path.parent.mkdir(parents=True)
    with open_writer(path, HEIGHT, WIDTH) as writer:
        for events in open_recording(source).chunks():
            writer.write(events)
    np.save(box_file(path), np.load(box_file(source)))
    return path


def linked(folder: Path, path: Path, copies: int) -> Path:
    """Makes a source folder of `copies` recordings, hard links to the same file."""
    (folder / "train").mkdir(parents=True)
    for i in range(copies):
        (folder / "train" / f"r{i:03d}_td{path.suffix}").hardlink_to(path)
        (folder / "train" / f"r{i:03d}_bbox.npy").hardlink_to(box_file(path))
    return folder


def events_in(path: Path) -> int:
    """Number of events in an HDF5 recording."""
    with h5py.File(path) as file:
        return len(file["events/t"])


# -- timing --------------------------------------------------------------------------------------
@contextmanager
def cores(number: int) -> Iterator[None]:
    """Restricts this process to `number` cores."""
    available = os.sched_getaffinity(0)
    if len(available) < number:
        raise SystemExit(f"error: {number} cores are needed, {len(available)} are available")
    os.sched_setaffinity(0, sorted(available)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)


def race(repeats: int, **contenders: Callable[[], object]) -> dict[str, float]:
    """Best time in seconds of each contender. They take turns, so that load affects all of them."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@dataclass
class Table:
    """Prints rows: quantity, ours, theirs, ratio, target, whether it is reached, hardware limit."""

    missed: int = 0

    def head(self) -> None:
        """Prints the head."""
        self._line("what", "ours", "theirs", "ratio", "target", "", "limit")

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
        """Prints a row and counts it in `missed` if a target is not reached.

        Args:
            ratio: default ours / theirs.
            least: lower bound of ours.
            least_ratio, most_ratio: bounds of the ratio.
        """
        if ratio is None and theirs:
            ratio = ours / theirs
        value = ratio or 0
        targets = []
        if least:
            targets.append((f">= {least:g}{unit}", ours >= least))
        if least_ratio:
            targets.append((f">= x {least_ratio:g}", value >= least_ratio))
        if most_ratio:
            targets.append((f"<= x {most_ratio:g}", value <= most_ratio))
        reached = all(is_reached for _, is_reached in targets)
        self.missed += not reached
        self._line(
            what,
            f"{ours:.1f}{unit}",
            f"{theirs:.1f}{unit}" if theirs else "",
            f"x {ratio:.2f}" if ratio else "",
            ", ".join(target for target, _ in targets),
            yes_or_no(reached) if targets else "",
            limit,
        )

    def _line(self, *cells: str) -> None:
        widths = (50, 14, 14, 7, 12, 3, 0)
        padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
        print(f"| {' | '.join(padded)} |", flush=True)


def yes_or_no(reached: bool | None) -> str:
    """A table's cell; None: the row has no target."""
    if reached is None:
        return ""
    return "yes" if reached else "NO"


def as_ratio(ratio: float | None) -> str:
    """A table's cell; None: the row has no ratio."""
    return "" if ratio is None else f"x {ratio:.2f}"


def ratio_target(
    ratio: float | None, least: float | None, most: float | None
) -> tuple[str, bool | None]:
    """A ratio's target in words, and whether it is reached: None without a target."""
    if ratio is None:
        return "", None
    if least:
        return f">= x {least:g}", ratio >= least
    if most:
        return f"<= x {most:g}", ratio <= most
    return "", None


def status_kb(name: str, pid: int | str = "self") -> int:
    """A memory field of /proc/PID/status in kB, such as VmHWM; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in lines:
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process so far, in MB."""
    return status_kb("VmHWM", pid) / 1000


def print_machine() -> None:
    """Prints the processor, its load and memory speed, and the versions of the libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if "model name" in line]
    name = names[0] if names else "unknown processor"
    source = np.ones(1 << 28, np.uint8)
    target = np.zeros(1 << 28, np.uint8)
    seconds = race(3, copy=lambda: np.copyto(target, source))["copy"]
    num_cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{m} {version(m)}" for m in ("torch", "h5py", "numba", "numpy"))
    print(
        f"{name}, {num_cores} cores, load {os.getloadavg()[0]:.1f}; "
        f"one core copies {source.size / seconds / 1e9:.1f} GB/s; {versions}"
    )
