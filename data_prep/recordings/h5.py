"""HDF5 recordings: events/{x,y,p,t} of RVT and eTraM, and CD/events of Metavision.

The groups of RVT and eTraM may also contain events/height and events/width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.hdf5_files import open_hdf5_for_reading
from evspan.data_prep.recordings.base import GEN4_SIZE, Recording, Writer
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import checked_size, sensor_size
from evspan.data_prep.shards.atomic import Disk
from numpy.typing import NDArray

# Few enough to stay in the cache on their way to a histogram; rounded to whole chunks.
EVENTS_AT_ONCE = 1 << 18
COLUMNS = ("t", "x", "y", "p")
WRITTEN_TYPES = {"t": "<i8", "x": "<u2", "y": "<u2", "p": "u1"}
WRITTEN_CHUNK = 1 << 16
METAVISION = "CD/events"  # one dataset with the columns as fields
ECF = 0x8ECF
BLOSC = 32001
BLOSC_OPTIONS = 4  # the filter reads four options without checking how many are stored
LARGEST_CHUNK_BYTES = 1 << 28  # HDF5 holds a whole chunk in memory
LATEST_US = 1 << 53  # 285 years: times beyond are not in microseconds


class H5Reader(Recording):
    """Reads both layouts, block by block."""

    format = "h5"

    def __init__(self, path: Path, events_at_once: int | None = None) -> None:
        with _opened(path) as file:
            self.size = _checked_length(path, file)
            self.events_at_once = events_at_once or _whole_chunks(file)
            super().__init__(path, *_sensor_size(path, file))

    def _decoded(self) -> Iterator[Events]:
        with _opened(self.path) as file:
            with _readable(self.path, "the list of columns"):
                columns = _columns(file)
            for first in range(0, self.size, self.events_at_once):
                with _readable(self.path, f"events {first} and on"):
                    t, x, y, p = _read(columns, first, first + self.events_at_once)
                if max(int(t.max()), -int(t.min())) > LATEST_US:
                    raise RecordingError(
                        f"{self.path}: events {first} and on have times from {t.min()} to "
                        f"{t.max()}, which are not microseconds. Convert the column t to integer "
                        "microseconds"
                    )
                yield Events(t.astype(np.int64, copy=False), _pixel(x), _pixel(y), _polarity(p))


@contextmanager
def _readable(path: Path, place: str) -> Iterator[None]:
    """Raises RecordingError for whatever h5py raises; of a damaged file that is a dozen kinds."""
    try:
        yield
    except (RecordingError, PermissionError):
        raise
    except Exception as error:
        raise RecordingError(
            f"{path}: {place} cannot be read as HDF5 ({error}). The file is cut off or damaged: "
            "copy it again"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    with _readable(path, "the file"):
        file = open_hdf5_for_reading(path)
    try:
        yield file
    finally:
        file.close()


def _columns(file: h5py.File) -> h5py.Dataset | list[h5py.Dataset]:
    """The dataset with all columns, or the datasets t, x, y, p."""
    if METAVISION in file:
        return file[METAVISION]
    return [file[f"events/{name}"] for name in COLUMNS]


def _read(
    columns: h5py.Dataset | list[h5py.Dataset], first: int, last: int
) -> tuple[NDArray[Any], ...]:
    """t, x, y, p of events `first` to `last`, in the types of the file."""
    if isinstance(columns, list):
        return tuple(column[first:last] for column in columns)
    block = columns[first:last]
    return tuple(block[name] for name in COLUMNS)


def _whole_chunks(file: h5py.File) -> int:
    """EVENTS_AT_ONCE, rounded to whole chunks: HDF5 may decompress a chunk for each part of it."""
    chunks = file[METAVISION if METAVISION in file else "events/t"].chunks
    chunk = chunks[0] if chunks else 1
    whole: int = max(1, EVENTS_AT_ONCE // chunk) * chunk
    return whole


@dataclass(frozen=True)
class _Layout:
    """The columns that a file contains, by name, with their types and lengths."""

    prefix: str  # of a column's name in messages
    types: Mapping[str, np.dtype[Any]]
    lengths: Mapping[str, int]


def _checked_length(path: Path, file: h5py.File) -> int:
    """The number of events.

    Raises:
        RecordingError: columns are missing, of another type, of different lengths, or stored in a
            way that cannot be read.
    """
    with _readable(path, "the list of columns"):
        if METAVISION in file:
            layout = _metavision_layout(path, file[METAVISION])
        else:
            layout = _group_layout(path, file.get("events"))
    missing = [layout.prefix + name for name in COLUMNS if name not in layout.types]
    if missing:
        raise RecordingError(
            f"{path} lacks {', '.join(missing)}. A recording has the columns events/t, x, y and p"
        )
    for name in COLUMNS:
        allowed = "iub" if name == "p" else "iu"
        if layout.types[name].kind not in allowed:
            raise RecordingError(
                f"{path}: {layout.prefix}{name} is of type {layout.types[name]}. Columns are "
                "integers, t in microseconds: convert it"
            )
    if len(set(layout.lengths.values())) > 1:
        raise RecordingError(
            f"{path}: the columns of events/ differ in length ({layout.lengths}). The file is "
            "damaged: copy it again"
        )
    return next(iter(layout.lengths.values()))


def _metavision_layout(path: Path, dataset: h5py.Dataset) -> _Layout:
    _check_storage(path, dataset)
    fields = dataset.dtype.fields or {}
    types = {name: fields[name][0] for name in COLUMNS if name in fields}
    return _Layout(f"{METAVISION} field ", types, {METAVISION: len(dataset)})


def _group_layout(path: Path, group: object) -> _Layout:
    columns = {}
    if isinstance(group, h5py.Group):
        columns = {c: group[c] for c in COLUMNS if isinstance(group.get(c), h5py.Dataset)}
    for column in columns.values():
        _check_storage(path, column)
    types = {name: column.dtype for name, column in columns.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    return _Layout("events/", types, lengths)


def _check_storage(path: Path, column: h5py.Dataset) -> None:
    """Raises RecordingError where HDF5 could not read the column, or would return wrong values."""
    if column.ndim != 1:
        raise RecordingError(
            f"{path}: {column.name} has the shape {column.shape}; columns have one dimension"
        )
    _check_filters(path, column)
    if column.chunks is not None:
        _check_chunks(path, column)


def _check_filters(path: Path, column: h5py.Dataset) -> None:
    properties = column.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, options, _ = properties.get_filter(i)
        if code == BLOSC and len(options) < BLOSC_OPTIONS:
            raise RecordingError(
                f"{path}: {column.name} is compressed with Blosc, but only {len(options)} of its "
                f"{BLOSC_OPTIONS} options are stored. The file is damaged: copy it again"
            )
        if h5py.h5z.filter_avail(code):
            continue
        codec = f"the codec of HDF5 filter {code}"
        remedy = "Install its plugin and set HDF5_PLUGIN_PATH to its folder"
        if code == ECF:
            codec = f"Metavision's ECF codec (HDF5 filter 0x8ECF = {ECF})"
            remedy += (
                " (github.com/prophesee-ai/hdf5_ecf), or convert the file: "
                f"metavision_file_to_dat -i {path}"
            )
        raise RecordingError(
            f"{path}: {column.name} is compressed with {codec}, which is not installed. {remedy}"
        )


def _check_chunks(path: Path, column: h5py.Dataset) -> None:
    chunk = column.chunks[0]
    if chunk * column.dtype.itemsize > LARGEST_CHUNK_BYTES:
        raise RecordingError(
            f"{path}: {column.name} is stored in chunks of {chunk} entries, too large to stream. "
            f"Store it in smaller ones: h5repack -l CHUNK=65536 {path} OUT.h5"
        )
    # HDF5 returns zeros where a chunk was never written.
    expected = -(-len(column) // chunk)
    missing = expected - column.id.get_num_chunks()
    if missing > 0:
        raise RecordingError(
            f"{path}: {column.name} lacks {missing} of its {expected} chunks. The recorder was "
            "stopped early, or the file is damaged: copy it again"
        )


def _sensor_size(path: Path, file: h5py.File) -> tuple[int, int]:
    with _readable(path, "the sensor's size"):
        if METAVISION in file:
            stored = [key for key in ("format", "geometry") if key in file.attrs]
            fields = {key: _text(file.attrs[key]) for key in stored}
            return sensor_size(path, fields, GEN4_SIZE)
        height = _side(path, file["events"], "height", GEN4_SIZE[0])
        width = _side(path, file["events"], "width", GEN4_SIZE[1])
        return checked_size(path, height, width)


def _side(path: Path, group: h5py.Group, name: str, default: int) -> str:
    if name not in group:
        return str(default)
    if group[name].size != 1:
        raise RecordingError(f"{path}: events/height and events/width must be one number each")
    return _text(np.asarray(group[name]).item())


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _pixel(column: NDArray[Any]) -> NDArray[np.uint16]:
    """Coordinates as uint16.

    What no uint16 can hold becomes the largest one, which lies outside every sensor: it must not
    wrap into one.
    """
    if column.dtype == np.uint16:
        return column
    return np.where((column < 0) | (column > 65535), 65535, column).astype(np.uint16)


def _polarity(column: NDArray[Any]) -> NDArray[np.uint8]:
    """0 and 1; -1, which some files contain, becomes 0."""
    if column.dtype == np.uint8 and column.max() <= 1:
        return column
    return (column > 0).astype(np.uint8)


class H5Writer(Writer):
    """Writes events/{t,x,y,p}, compressed, with height and width."""

    earliest_us = -LATEST_US

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width)
        self.disk = Disk(path, "w+")
        self.file = h5py.File(self.disk, "w")
        self.group = self.file.create_group("events")
        for name, dtype in WRITTEN_TYPES.items():
            self.group.create_dataset(
                name,
                (0,),
                dtype,
                maxshape=(None,),
                chunks=(WRITTEN_CHUNK,),
                **hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.SHUFFLE),
            )
        self.group["height"] = height
        self.group["width"] = width

    def _write(self, events: Events) -> None:
        written = len(self.group["t"])
        for name, column in events._asdict().items():
            self.group[name].resize((written + column.size,))
            self.group[name][written:] = column
        self.disk.check()

    def close(self) -> None:
        """Closes the file and checks that everything reached the disk."""
        self.file.close()
        self.disk.close()
        self.disk.check()
