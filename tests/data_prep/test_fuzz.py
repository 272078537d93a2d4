"""Damaged sensor and box files: reading ends soon, in a consistent result or in a UserError."""

import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.data_prep import hdf5_texts
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.recordings.base import Recording, WordReader
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.evt21 import Evt21Reader
from evspan.data_prep.recordings.h5 import H5Reader
from evspan.data_prep.recordings.npz import NpzReader
from evspan.data_prep.recordings.open import open_recording, open_writer
from numpy.typing import NDArray
from support import fuzz
from support.aedat4_files import LZ4, PLAIN, ZSTD, packets_of, write_aedat4
from support.event_files import SIZES, random_words, write_raw

CHUNK = 500


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
        file.attrs["geometry"] = np.bytes_("1280x720")


def whole_aedat4(compression: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_aedat4(path, packets_of(some_events(600), 150), compression=compression)

    return write


def whole_text(path: Path) -> None:
    rows = np.stack(some_events(600), axis=1)
    if path.suffix == ".txt":
        np.savetxt(path, rows / [1e6, 1, 1, 1], fmt="%.9f %d %d %d", header="width 1280 height 720")
    else:
        columns = rows[:, [1, 2, 3, 0]]
        np.savetxt(path, columns, fmt="%d", delimiter=",", header="x,y,p,t_us", comments="")


def whole_npz(path: Path) -> None:
    if path.stem == "table":
        np.savez_compressed(path, events=np.stack(some_events(600), axis=1))
    else:
        np.savez(path, **some_events(600)._asdict(), height=720, width=1280)


def whole_boxes(path: Path) -> None:
    boxes = np.zeros(60, RAW_BOX)
    boxes["t"] = np.arange(60) * 16_666
    boxes["w"] = 30
    boxes["h"] = 20
    boxes["class_id"] = np.arange(60) % 3
    np.save(path, boxes)


def number_of_bits(words: np.ndarray) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


def events_in(path: Path, recording: Recording) -> int | None:
    """The number of events in the file, counted on all words at once; None: not counted."""
    if isinstance(recording, H5Reader):
        return recording.size
    if isinstance(recording, NpzReader):
        return recording.archive.events
    if not isinstance(recording, WordReader):
        return None
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
    reasons = ("outside_sensor", "before_first_time", "time_spikes")
    lost = sum(recording.dropped[reason] for reason in reasons)
    assert recording.events == events
    assert events + lost == (events_in(path, recording) or events + lost)
    assert recording.dropped["late_timestamps_raised"] <= events


def check_boxes(path: Path) -> None:
    boxes = read_boxes(path)
    assert boxes.dtype == RAW_BOX
    assert (np.diff(boxes["t"]) >= 0).all()
    assert (boxes["t"] >= 0).all()
    assert all(np.isfinite(boxes[k]).all() for k in ("x", "y", "w", "h", "class_confidence"))


def damage_objects(folder: Path, rng: np.random.Generator) -> None:
    """Replaces one to three objects of an HDF5 recording by others, valid but unexpected."""
    outside = str(fuzz.canary(folder))
    with h5py.File(folder / "a.h5", "r+") as file:
        for _ in range(int(rng.integers(1, 4))):
            name = str(rng.choice(NAMES))
            write = OBJECTS[int(rng.integers(len(OBJECTS)))]
            with suppress(KeyError, OSError, RuntimeError):
                del file[name]
            # A parent is no group now, or a link that leads nowhere.
            with suppress(ValueError, OSError, TypeError, KeyError, RuntimeError):
                write(file, name, outside, rng)


def damage_members(folder: Path, rng: np.random.Generator) -> None:
    """Damages the arrays of an archive, or the archive, whose checksums notice nearly all."""
    (path,) = folder.glob("*.npz")
    if rng.random() < 0.5:
        path.write_bytes(fuzz.damaged(path.read_bytes(), 300, rng))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = str(rng.choice(sorted(members)))
    members[name] = fuzz.damaged(members[name], 128, rng)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


NAMES = [
    *(f"events/{name}" for name in ("t", "x", "y", "p", "height", "width")),
    *("events", "t_offset", "ms_to_idx", "CD", "CD/events"),
]


def write_external(file: h5py.File, name: str, outside: str, _: np.random.Generator) -> None:
    file.create_dataset(name, (600,), "u1", external=[(outside, 0, 600)])


def write_virtual(file: h5py.File, name: str, outside: str, rng: np.random.Generator) -> None:
    layout = h5py.VirtualLayout((600,), "i4")
    source = outside if rng.random() < 0.5 else "gone.h5"
    layout[:] = h5py.VirtualSource(source, "events/t", shape=(600,))
    file.create_virtual_dataset(name, layout)


def write_link(file: h5py.File, name: str, outside: str, rng: np.random.Generator) -> None:
    soft = h5py.SoftLink(str(rng.choice(["/events/t", "/events", "/gone", f"/{name}"])))
    file[name] = h5py.ExternalLink(outside, "/events/t") if rng.random() < 0.5 else soft


def write_unwritten(file: h5py.File, name: str, _: str, rng: np.random.Generator) -> None:
    shape = [(600,), (1 << 40,), (1 << 62,), (600, 4), ()][int(rng.integers(5))]
    chunks = None
    if shape and rng.random() < 0.5:
        chunks = (int(rng.choice([1, 1 << 16, 1 << 28])),) + (1,) * (len(shape) - 1)
    file.create_dataset(name, shape, str(rng.choice(["u1", "i8"])), chunks=chunks)


def write_bomb(file: h5py.File, name: str, _: str, rng: np.random.Generator) -> None:
    chunk = 1 << int(rng.integers(10, 23))
    dataset = file.create_dataset(name, (chunk * 16,), "u1", chunks=(chunk,), compression="gzip")
    zeros = zlib.compress(bytes(chunk))
    for i in range(16):
        dataset.id.write_direct_chunk((i * chunk,), zeros)


def write_values(file: h5py.File, name: str, _: str, rng: np.random.Generator) -> None:
    n = int(rng.choice([0, 1, 599, 600, 600, 600]))
    values: list[Any] = [
        np.full(n, np.nan, "f4"),
        np.arange(n) * 1.5,
        rng.integers(-(2**63), 2**63 - 1, n),
        rng.integers(0, 2**64 - 1, n, np.uint64),
        rng.integers(-2, 3, n).astype("i1"),
        rng.integers(0, 2, n) * 255,
        rng.integers(0, 9, (n, 4)),
        np.zeros(n, [("t", "i8"), ("x", "u2"), ("y", "u2"), ("p", "?")]),
        np.zeros(n, [("t", "i8", (3,)), ("x", "u2"), ("y", "f4"), ("p", "S9")]),
        np.array([b"text"] * n, "S4"),
        h5py.Empty("i8"),
        "text",
        -1,
        1e300,
        1 << 60,
    ]
    file[name] = values[int(rng.integers(len(values)))]


def write_ragged(file: h5py.File, name: str, _: str, rng: np.random.Generator) -> None:
    kinds = [h5py.vlen_dtype("i4"), h5py.string_dtype(), h5py.ref_dtype]
    file.create_dataset(name, (600,), kinds[int(rng.integers(3))])


def write_group(file: h5py.File, name: str, _: str, __: np.random.Generator) -> None:
    file.create_group(name)


OBJECTS = [
    *(write_external, write_virtual, write_link, write_unwritten, write_bomb),
    *(write_values, write_values, write_values, write_ragged, write_group),
]


def recording(name: str, write: Callable[[Path], None], header: int = 160) -> fuzz.Kind:
    return fuzz.Kind(
        make=lambda folder: write(folder / name),
        check=lambda folder: check_recording(folder / name),
        files=name,
        header=header,
    )


HDF5_HEADER = 2048  # bytes with superblock, groups and object headers
KINDS = {
    **{kind: recording(f"{kind}.raw", whole_raw(kind)) for kind in SIZES},
    "dat": recording("a_td.dat", whole_by_writer),
    "h5": recording("a_td.h5", whole_h5, HDF5_HEADER),
    "written_h5": recording("b_td.h5", whole_by_writer, HDF5_HEADER),
    "metavision": recording("a.hdf5", whole_metavision, HDF5_HEADER),
    "h5_objects": replace(recording("a.h5", whole_by_writer), damage=damage_objects),
    "aedat4": recording("a.aedat4", whole_aedat4(PLAIN), 900),
    "aedat4_lz4": recording("b.aedat4", whole_aedat4(LZ4), 900),
    "aedat4_zstd": recording("c.aedat4", whole_aedat4(ZSTD), 900),
    "text": replace(recording("a.txt", whole_text, 300), least=1),
    "csv": replace(recording("a.csv", whole_text, 300), least=1),
    "npz": replace(recording("a.npz", whole_npz), damage=damage_members, least=1),
    "npz_table": replace(recording("table.npz", whole_npz), damage=damage_members, least=1),
    "boxes": fuzz.Kind(
        make=lambda folder: whole_boxes(folder / "a_bbox.npy"),
        check=lambda folder: check_boxes(folder / "a_bbox.npy"),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_damaged_files_are_read_or_refused():
    fuzz.run_all(__file__, KINDS, 150, least=3)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused(kind):
    fuzz.run_many(__file__, KINDS, kind)


def refuse_to_start(*_: object) -> None:
    """In place of the process that reads texts of variable length: a case starts none."""
    raise RecordingError("a text of variable length")


if __name__ == "__main__":
    hdf5_texts._texts = refuse_to_start  # type: ignore[assignment]
    fuzz.main(KINDS)
