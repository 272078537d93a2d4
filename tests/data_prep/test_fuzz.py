"""Damaged sensor and box files: reading ends soon, in a consistent result or in a UserError.

Cases run in a process of their own, so that a crash, a hang or too much memory is noticed:
python tests/data_prep/test_fuzz.py KIND FIRST N, with tests/ on PYTHONPATH. `make soak` repeats it
with more seeds; the same seed gives the same bytes.
"""

import faulthandler
import os
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.recordings.base import Recording, WordReader
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.evt21 import Evt21Reader
from evspan.data_prep.recordings.h5 import H5Reader
from evspan.data_prep.recordings.open import open_recording, open_writer
from numpy.typing import NDArray
from support.event_files import SIZES, random_words, write_raw

CASE_SECONDS = 20  # a case takes milliseconds
MOST_BYTES = 1 << 30  # above what the process takes before the first case
CHUNK = 500
ROOT = Path(__file__).parents[2]


def some_events(n: int) -> Events:
    rng = np.random.default_rng(n)
    return Events(
        np.cumsum(rng.integers(0, 3000, n)),
        rng.integers(0, 1280, n).astype(np.uint16),
        rng.integers(0, 720, n).astype(np.uint16),
        rng.integers(0, 2, n).astype(np.uint8),
    )


def whole_raw(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_raw(path, kind, random_words(kind, np.random.default_rng(0), 1500))

    return write


def whole_by_writer(path: Path) -> None:
    with open_writer(path, 720, 1280) as writer:
        writer.write(some_events(600))


def whole_h5(path: Path) -> None:
    """One column of each layout and codec that published files have."""
    events = some_events(600)
    with h5py.File(path, "w", libver="earliest") as file:
        file.create_dataset(
            "events/t",
            data=events.t,
            chunks=(128,),
            maxshape=(None,),
            **hdf5plugin.Blosc(cname="zstd"),
        )
        file.create_dataset(
            "events/x", data=events.x, chunks=(200,), compression="gzip", shuffle=True
        )
        file.create_dataset("events/y", data=events.y.astype("i4"))
        file.create_dataset(
            "events/p", data=events.p.astype("i1") * 2 - 1, chunks=(600,), compression="lzf"
        )
        file["events/height"] = 720
        file["events/width"] = 1280


def whole_metavision(path: Path) -> None:
    events = some_events(600)
    kind = [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")]
    with h5py.File(path, "w", libver="latest") as file:
        file["CD/events"] = np.rec.fromarrays(
            [events.x, events.y, events.p, events.t], np.dtype(kind)
        )
        file.attrs["geometry"] = "1280x720"


def whole_boxes(path: Path) -> None:
    boxes = np.zeros(60, RAW_BOX)
    boxes["t"] = np.arange(60) * 16_666
    boxes["w"] = 30
    boxes["h"] = 20
    boxes["class_id"] = np.arange(60) % 3
    np.save(path, boxes)


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{kind: (f"{kind}.raw", whole_raw(kind)) for kind in SIZES},
    "dat": ("a_td.dat", whole_by_writer),
    "h5": ("a_td.h5", whole_h5),
    "written_h5": ("b_td.h5", whole_by_writer),
    "metavision": ("a.hdf5", whole_metavision),
    "boxes": ("a_bbox.npy", whole_boxes),
}


NUMBERS = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]
BYTES = [0, 0xFF, 0x7F, 0x80, 0x25]
HEADER_LETTERS = list(b"0123456789-.eE;= x\n%")


def damaged(data: bytes, header: int, rng: np.random.Generator) -> bytes:
    """The data after one to four changes: bits, bytes, numbers, slices, the end.

    Half of the changes are in the first `header` bytes.
    """
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        damage(out, header, rng)
    if rng.random() < 0.6:  # whole words, so that more of the damage is read
        del out[len(out) - (len(out) - len(data)) % 8 :]
    return bytes(out)


def damage(out: bytearray, header: int, rng: np.random.Generator) -> None:
    """Makes one change."""
    end = min(len(out), header) if rng.random() < 0.5 else len(out)
    at = int(rng.integers(end + 1))
    span = int(rng.integers(1, 1 + min(64, len(out) + 1)))
    change = int(rng.integers(9))
    if change == 0 and at < len(out):
        out[at] ^= 1 << int(rng.integers(8))
    elif change == 1:
        out[at : at + span] = rng.bytes(len(out[at : at + span]))
    elif change == 2:
        out[at : at + span] = bytes([int(rng.choice(BYTES))]) * len(out[at : at + span])
    elif change == 3:
        number = int(rng.choice(NUMBERS))
        out[at : at + 8] = number.to_bytes(8, "little")[: int(rng.choice([1, 2, 4, 8]))]
    elif change == 4:
        del out[at : at + span * int(rng.choice([1, 1, 100]))]
    elif change == 5:
        out[at:at] = rng.bytes(span)
    elif change == 6:
        out[at:at] = out[int(rng.integers(len(out) + 1)) :][: span * 8]
    elif change == 7:
        change_digits(out, header, rng)
    else:
        del out[at:]


def change_digits(out: bytearray, header: int, rng: np.random.Generator) -> None:
    """Replaces up to three digits of the header."""
    digits = [i for i, byte in enumerate(out[:header]) if 0x30 <= byte <= 0x39]
    for i in digits[: int(rng.integers(len(digits) + 1))][-3:]:
        out[i] = int(rng.choice(HEADER_LETTERS))


def number_of_bits(words: np.ndarray) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


def events_in(path: Path, recording: Recording) -> int:
    """The number of events in the file, counted on all words at once."""
    if isinstance(recording, H5Reader):
        return recording.size
    assert isinstance(recording, WordReader)
    data = path.read_bytes()[recording.start :]
    if recording.format == "dat":
        return len(data) // 8
    words: NDArray[Any] = np.frombuffer(data, recording.word)
    if recording.format == "evt2":
        return int((words >> 28 <= 1).sum())
    if isinstance(recording, Evt21Reader):
        halves = words.view("<u4").reshape(-1, 2)
        upper_column = 0 if recording.upper_first else 1
        upper = halves[:, upper_column]
        pixels = halves[:, 1 - upper_column]
        return number_of_bits(pixels[upper >> 28 <= 1])
    kinds = words >> 12
    single = int((kinds == 2).sum())
    of_12 = number_of_bits(words[kinds == 4] & 0xFFF)
    of_8 = number_of_bits(words[kinds == 5] & 0xFF)
    return single + of_12 + of_8


def check_recording(path: Path) -> None:
    recording = open_recording(path)
    assert 1 <= recording.height <= 8192
    assert 1 <= recording.width <= 8192
    events = 0
    latest = None
    for t, x, y, p in recording.chunks(CHUNK):
        assert t.dtype == np.int64
        assert x.dtype == y.dtype == np.uint16
        assert p.dtype == np.uint8
        assert t.size == x.size == y.size == p.size
        assert 0 < t.size <= CHUNK
        assert x.max() < recording.width
        assert y.max() < recording.height
        assert p.max() <= 1
        assert (np.diff(t) >= 0).all()
        assert latest is None or t[0] >= latest
        events += t.size
        latest = t[-1]
    lost = recording.dropped["outside_sensor"] + recording.dropped["before_first_time"]
    assert recording.events == events
    assert events + lost == events_in(path, recording)
    assert recording.dropped["late_timestamps_raised"] <= events


def check_boxes(path: Path) -> None:
    boxes = read_boxes(path)
    assert boxes.dtype == RAW_BOX
    assert (np.diff(boxes["t"]) >= 0).all()
    assert (boxes["t"] >= 0).all()
    assert all(np.isfinite(boxes[k]).all() for k in ("x", "y", "w", "h", "class_confidence"))


def is_read(path: Path, check: Callable[[Path], None]) -> bool:
    """Whether the file is read; otherwise it is refused with an error that names it."""
    try:
        check(path)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert str(path) in message
    return False


def run_cases(kind: str, first: int, n: int) -> None:
    """Runs seeds first .. first + n - 1; prints how many files were read and how many refused."""
    name, make = FILES[kind]
    warnings.simplefilter("error")  # of numpy: a value that did not fit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        refused = 0
        make(path)
        whole = path.read_bytes()
        check = check_boxes if kind == "boxes" else check_recording
        check(path)
        header = 2048 if kind in ("h5", "written_h5", "metavision") else 160
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + n):
            path.write_bytes(damaged(whole, header, np.random.default_rng([seed, *kind.encode()])))
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            print(f"case {seed}", file=sys.stderr, flush=True)
            refused += not is_read(path, check)
            faulthandler.cancel_dump_traceback_later()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            assert grown < MOST_BYTES, f"{grown} bytes of memory"
    print(f"{kind}: {n - refused} read, {refused} refused")


def in_a_process(kind: str, first: int, n: int, timeout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, kind, str(first), str(n)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """The number of the case that ended the process, and its output."""
    return result.stderr.rsplit("case ", 1)[-1]


@pytest.mark.timeout(180)
def test_damaged_files_are_read_or_refused():
    result = in_a_process("all", 0, 150, timeout=150)
    assert result.returncode == 0, f"{result.stdout} and then case {failure(result)}"
    lines = [
        re.fullmatch(r"(\w+): (\d+) read, (\d+) refused", s) for s in result.stdout.splitlines()
    ]
    assert all(lines), result.stdout
    matches = [line for line in lines if line]
    assert {line[1] for line in matches} == FILES.keys()
    for line in matches:
        read = int(line[2])
        refused = int(line[3])
        assert read + refused == 150, line[0]
        assert min(read, refused) > 5, line[0]  # both outcomes occur


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", FILES)
def test_many_damaged_files_are_read_or_refused(kind):
    num_cases = int(os.environ.get("EVSPAN_FUZZ_CASES", 100_000)) // len(FILES)
    first = 1000
    end = first + num_cases
    hung: list[int] = []
    result = in_a_process(kind, first, num_cases, timeout=3 * 3600)
    while result.returncode:
        # HDF5 2.0 never returns from a variable-length attribute whose heap is overwritten with
        # zeros.
        assert kind == "metavision", f"{kind} {failure(result)}"
        assert "Timeout" in result.stderr, failure(result)
        assert "h5py/_hl/attrs.py" in result.stderr, failure(result)
        hung.append(int(failure(result).split()[0]))
        first = hung[-1] + 1
        result = in_a_process(kind, first, end - first, timeout=3 * 3600)
    assert len(hung) <= 5, hung
    print(f"{kind}: {num_cases} cases, hung in HDF5: {hung}; after them {result.stdout.strip()}")


if __name__ == "__main__":
    for kind_ in FILES if sys.argv[1] == "all" else [sys.argv[1]]:
        run_cases(kind_, int(sys.argv[2]), int(sys.argv[3]))
