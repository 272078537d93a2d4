"""HDF5 recordings: events/{x,y,p,t} of RVT and eTraM, with optional height and width, and CD/events of Metavision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import GEN4_SIZE, Recording, Writer
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import checked_size, sensor_size
from evspan.data_prep.shards.atomic import Disk
from numpy.typing import NDArray

EVENTS_AT_ONCE = (
    1 << 18
)  # few enough to stay in the cache on their way to a histogram; whole chunks, though
COLUMNS = ("t", "x", "y", "p")
METAVISION = "CD/events"  # one dataset with the columns as fields
ECF = 0x8ECF
BLOSC, BLOSC_OPTIONS = 32001, 4  # it reads so many without looking how many there are
LARGEST_CHUNK_BYTES = 1 << 28  # HDF5 holds a whole chunk in memory
LATEST_US = 1 << 53  # 285 years: beyond, times are not in microseconds


class H5Reader(Recording):
    format = "h5"

    def __init__(self, path: Path, events_at_once: int | None = None) -> None:
        with _opened(path) as file:
            self.size = _checked_columns(path, file)
            self.events_at_once = events_at_once or _whole_chunks(file)
            super().__init__(path, *_sensor_size(path, file))

    def _decoded(self) -> Iterator[Events]:
        with _opened(self.path) as file:
            with _readable(self.path, "the list of columns"):
                stored = (
                    file[METAVISION]
                    if METAVISION in file
                    else [file[f"events/{c}"] for c in COLUMNS]
                )  # looked up once
            for i in range(0, self.size, self.events_at_once):
                with _readable(self.path, f"events {i} and on"):
                    t, x, y, p = _columns(stored, slice(i, i + self.events_at_once))
                if max(int(t.max()), -int(t.min())) > LATEST_US:
                    raise RecordingError(
                        f"{self.path}: events {i} and on have times from {t.min()} to {t.max()}, which are no "
                        "microseconds. Convert the column t to integer microseconds"
                    )
                yield Events(t.astype(np.int64, copy=False), _pixel(x), _pixel(y), _polarity(p))


@contextmanager
def _readable(path: Path, place: str) -> Iterator[None]:
    try:
        yield
    except (RecordingError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes h5py raise a dozen kinds
        raise RecordingError(
            f"{path}: {place} cannot be read as HDF5 ({error}). The file is cut off or damaged: copy it "
            "again"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    with _readable(path, "the file"):
        file = h5py.File(path, "r")
    try:
        yield file
    finally:
        file.close()


def _columns(stored: h5py.Dataset | list[h5py.Dataset], which: slice) -> tuple[NDArray, ...]:
    if isinstance(stored, list):
        return tuple(column[which] for column in stored)
    block = stored[which]
    return tuple(block[c] for c in COLUMNS)


def _whole_chunks(file: h5py.File) -> int:
    """About EVENTS_AT_ONCE: HDF5 may decompress a chunk again for each part of it that is read."""
    chunks = file[METAVISION if METAVISION in file else "events/t"].chunks
    chunk = chunks[0] if chunks else 1
    return max(1, EVENTS_AT_ONCE // chunk) * chunk


def _checked_columns(path: Path, file: h5py.File) -> int:
    """How many events the file holds. Raises RecordingError where its columns cannot be read, or only in part."""
    with _readable(path, "the list of columns"):
        if METAVISION in file:
            _check_stored(path, file[METAVISION])
            kinds = {
                c: file[METAVISION].dtype.fields[c][0]
                for c in COLUMNS
                if c in (file[METAVISION].dtype.names or ())
            }
            lengths, place = {METAVISION: len(file[METAVISION])}, f"{METAVISION} field "
        else:
            group = file.get("events")
            found = {
                c: group[c]
                for c in COLUMNS
                if isinstance(group, h5py.Group) and isinstance(group.get(c), h5py.Dataset)
            }
            for column in found.values():
                _check_stored(path, column)
            kinds = {c: column.dtype for c, column in found.items()}
            lengths, place = {c: len(column) for c, column in found.items()}, "events/"
    if missing := [c for c in COLUMNS if c not in kinds]:
        raise RecordingError(
            f"{path} lacks {', '.join(f'{place}{c}' for c in missing)}. A recording has the columns "
            "events/t, x, y and p"
        )
    if wrong := [c for c in COLUMNS if kinds[c].kind not in "iu" + "b" * (c == "p")]:
        raise RecordingError(
            f"{path}: {place}{wrong[0]} holds {kinds[wrong[0]]}. Columns hold integers, t in microseconds: "
            "convert it"
        )
    if len(set(lengths.values())) > 1:
        raise RecordingError(
            f"{path}: the columns of events/ differ in length ({lengths}). The file is damaged: copy it again"
        )
    return next(iter(lengths.values()))


def _check_stored(path: Path, column: h5py.Dataset) -> None:
    if column.ndim != 1:
        raise RecordingError(
            f"{path}: {column.name} has the shape {column.shape}; columns have one dimension"
        )
    layout = column.id.get_create_plist()
    for code, _, options, _ in (layout.get_filter(i) for i in range(layout.get_nfilters())):
        if code == BLOSC and len(options) < BLOSC_OPTIONS:
            raise RecordingError(
                f"{path}: {column.name} is compressed with Blosc, of whose {BLOSC_OPTIONS} options "
                f"{len(options)} are there. The file is damaged: copy it again"
            )
        if not h5py.h5z.filter_avail(code):
            codec, remedy = (
                f"the codec of HDF5 filter {code}",
                "Install its plugin and set HDF5_PLUGIN_PATH to its folder",
            )
            if code == ECF:
                codec = f"Metavision's ECF codec (HDF5 filter 0x8ECF = {ECF})"
                remedy += f" (github.com/prophesee-ai/hdf5_ecf), or convert the file: metavision_file_to_dat -i {path}"
            raise RecordingError(
                f"{path}: {column.name} is compressed with {codec}, which is not installed. {remedy}"
            )
    if column.chunks is None:
        return
    if column.chunks[0] * column.dtype.itemsize > LARGEST_CHUNK_BYTES:
        raise RecordingError(
            f"{path}: {column.name} is stored in chunks of {column.chunks[0]} entries, too large to stream. "
            f"Store it in smaller ones: h5repack -l CHUNK=65536 {path} OUT.h5"
        )
    # HDF5 reads zeros where a chunk was never written.
    wanted, stored = -(-len(column) // column.chunks[0]), column.id.get_num_chunks()
    if stored < wanted:
        raise RecordingError(
            f"{path}: {column.name} lacks {wanted - stored} of its {wanted} chunks. The recorder was stopped "
            "early, or the file is damaged: copy it again"
        )


def _sensor_size(path: Path, file: h5py.File) -> tuple[int, int]:
    with _readable(path, "the sensor's size"):
        if METAVISION in file:
            fields = {
                key: _text(file.attrs[key]) for key in ("format", "geometry") if key in file.attrs
            }
            return sensor_size(path, fields, GEN4_SIZE)
        told = {
            side: file["events"][side] for side in ("height", "width") if side in file["events"]
        }
        if any(value.size != 1 for value in told.values()):
            raise RecordingError(f"{path}: events/height and events/width must be one number each")
        height, width = (
            _text(np.asarray(told[side]).item()) if side in told else str(default)
            for side, default in zip(("height", "width"), GEN4_SIZE, strict=True)
        )
        return checked_size(path, height, width)


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _pixel(column: NDArray) -> NDArray[np.uint16]:
    """Coordinates that no uint16 holds become the largest one, which lies outside every sensor: they must not wrap into it."""
    if column.dtype == np.uint16:
        return column
    return np.where((column < 0) | (column > 65535), 65535, column).astype(np.uint16)


def _polarity(column: NDArray) -> NDArray[np.uint8]:
    """0 and 1; -1, as some files have it, becomes 0."""
    if column.dtype == np.uint8 and column.max() <= 1:
        return column
    return (column > 0).astype(np.uint8)


class H5Writer(Writer):
    """Events to events/{t,x,y,p}, compressed, with height and width; grows as it is written."""

    earliest_us = -LATEST_US

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width)
        self.disk = Disk(path, "w+")
        self.file = h5py.File(self.disk, "w")
        group = self.file.create_group("events")
        for name, kind in zip(COLUMNS, ("<i8", "<u2", "<u2", "u1"), strict=True):
            group.create_dataset(
                name,
                (0,),
                kind,
                maxshape=(None,),
                chunks=(1 << 16,),
                **hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.SHUFFLE),
            )
        group["height"], group["width"] = height, width
        self.group = group

    def _write(self, events: Events) -> None:
        n = len(self.group["t"])
        for name, column in events._asdict().items():
            self.group[name].resize((n + column.size,))
            self.group[name][n:] = column
        self.disk.check()

    def close(self) -> None:
        self.file.close()
        self.disk.close()
        self.disk.check()
