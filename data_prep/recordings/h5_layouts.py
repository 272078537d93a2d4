"""Layouts of HDF5 recordings: where the columns t, x, y and p are, and what is stated about them.

| layout | columns |
|---|---|
| RVT, eTraM | events/{t,x,y,p}, optionally events/height and events/width |
| DSEC | the same with t_offset, which is added to t; 640 x 480 |
| Metavision | CD/events, a compound dataset; attributes `format`, `geometry` |
| compound (PyTables, structured arrays) | events, a compound dataset |
| v2e | events, (N, 4) integers: t, x, y, p |

Every dataset is checked before it is read (`hdf5_files.require_plain_dataset`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from evspan.conf.errors import RecordingError
from evspan.conf.text import printable
from evspan.data_prep.hdf5_files import (
    UnsafeDatasetError,
    plain_member,
    require_bounded_expansion,
    require_plain_dataset,
)
from evspan.data_prep.hdf5_texts import read_text
from evspan.data_prep.recordings.header import HD, checked_size, stated_size
from numpy.typing import NDArray

DSEC_SIZE = (480, 640)  # height, width
# Few enough to stay in the cache on their way to a histogram; rounded to whole chunks.
EVENTS_AT_ONCE = 1 << 18
COLUMNS = ("t", "x", "y", "p")
ALIASES = {"t": ("t", "timestamp", "ts"), "x": ("x",), "y": ("y",), "p": ("p", "polarity", "pol")}
METAVISION = "CD/events"
METAVISION_HEADER = ("format", "geometry")  # attributes
ECF = 0x8ECF
BLOSC = 32001
BLOSC_OPTIONS = 4  # the filter reads four options without checking how many are stored
LARGEST_CHUNK_BYTES = 1 << 28  # HDF5 holds a whole chunk in memory
LARGEST_ENTRY_BYTES = 1024  # of a row of a compound dataset
LATEST_OFFSET_US = 1 << 53
NAMED = 8  # groups and datasets that an error names
MOST_VISITED = 200
# Layouts of the field that are not read: something that only they contain, and their name.
UNREAD = (
    ("prophesee/left", "M3ED"),
    ("davis/left/events", "MVSEC"),
    ("events/xs", "rpg (ESIM, e2vid; times in seconds)"),
    ("events_lowlevel", "an events tensor"),
    ("event_representations", "preprocessed frames"),
    ("data", "preprocessed frames"),
)


@dataclass(frozen=True)
class Layout:
    """The columns of a file, and what it states about them.

    Attributes:
        datasets: the datasets t, x, y and p, or one with all of them.
        fields: of one dataset, the names (or the indices) of its fields t, x, y and p.
        names: of the columns in messages.
        stated_size: height and width as the file states them.
        likely_size: the ones to assume otherwise.
        offset_us: is added to t.
    """

    datasets: Sequence[h5py.Dataset]
    names: Sequence[str]
    fields: Sequence[str] | Sequence[int] = ()
    stated_size: tuple[int, int] | None = None
    likely_size: tuple[int, int] = HD
    offset_us: int = 0

    @property
    def types(self) -> dict[str, np.dtype[Any]]:
        """The type of each column."""
        first = self.datasets[0].dtype
        types = [dataset.dtype for dataset in self.datasets]
        if self.fields:
            types = [first[name] if isinstance(name, str) else first for name in self.fields]
        return dict(zip(COLUMNS, types, strict=True))

    def read(self, first: int, last: int) -> tuple[NDArray[Any], ...]:
        """t, x, y, p of events `first` to `last`, in the types of the file."""
        if not self.fields:
            return tuple(column[first:last] for column in self.datasets)
        block = self.datasets[0][first:last]
        if isinstance(self.fields[0], str):
            return tuple(block[name] for name in self.fields)
        return tuple(block[:, index] for index in self.fields)

    def read_polarity(self, first: int, last: int) -> NDArray[Any]:
        """p of events `first` to `last`."""
        if self.fields:
            return self.read(first, last)[3]
        values: NDArray[Any] = self.datasets[3][first:last]
        return values

    def events_at_once(self) -> int:
        """EVENTS_AT_ONCE in whole chunks: HDF5 may decompress a chunk for each part of it."""
        chunks = self.datasets[0].chunks
        chunk = chunks[0] if chunks else 1
        whole: int = max(1, EVENTS_AT_ONCE // chunk) * chunk
        return whole


def find_layout(path: Path, file: h5py.File) -> Layout:
    """Finds the columns. The datasets are checked, but not their types and lengths.

    Raises:
        RecordingError: the file has no layout that is read; names what it contains.
        UnsafeDatasetError: a dataset is outside the file, or was never written.
    """
    metavision = plain_member(file, METAVISION)
    if isinstance(metavision, h5py.Dataset):
        size = stated_size(path, _header(path, file))
        return _compound_layout(path, metavision, f"{METAVISION} field ", size)
    events = plain_member(file, "events")
    if isinstance(events, h5py.Group):
        return _group_layout(path, file, events)
    if isinstance(events, h5py.Dataset):
        if events.ndim == 2 and events.shape[1] == len(COLUMNS) and events.dtype.kind in "iu":
            _check_storage(path, events, dimensions=2)
            require_bounded_expansion([events])
            return Layout([events], [f"column {i} of events" for i in range(4)], range(4))
        prefix = "events field " if events.dtype.fields else "events/"
        return _compound_layout(path, events, prefix, None)
    raise _unread_layout(path, file, ["events/" + name for name in COLUMNS])


def _header(path: Path, file: h5py.File) -> dict[str, str]:
    """What a file of Metavision states about its sensor."""
    names = [name for name in METAVISION_HEADER if name in file.attrs]
    try:
        return {name: read_text(file["/"], name, METAVISION_HEADER) for name in names}
    except UnsafeDatasetError as error:
        raise RecordingError(f"{path}: {error}. Copy the file again") from error


def _compound_layout(
    path: Path, dataset: h5py.Dataset, prefix: str, size: tuple[int, int] | None
) -> Layout:
    _check_storage(path, dataset)
    require_bounded_expansion([dataset])
    fields = dataset.dtype.fields or {}
    names: list[str] = []
    missing: list[str] = []
    for column, aliases in ALIASES.items():
        matching = [name for name in aliases if name in fields]
        names += matching[:1]
        if not matching:
            missing.append(prefix + column)
    if missing:
        raise _unread_layout(path, dataset.file, missing)
    return Layout([dataset], [prefix + name for name in names], names, size)


def _group_layout(path: Path, file: h5py.File, group: h5py.Group) -> Layout:
    columns: list[h5py.Dataset] = []
    missing: list[str] = []
    for name in COLUMNS:
        column = plain_member(group, name)
        if isinstance(column, h5py.Dataset):
            columns.append(column)
        else:
            missing.append(f"events/{name}")
    if missing:
        raise _unread_layout(path, file, missing)
    for column in columns:
        _check_storage(path, column)
    require_bounded_expansion(columns)
    sides = [_number(path, group, side) for side in ("height", "width")]
    size = None
    if sides[0] or sides[1]:
        size = checked_size(path, sides[0], sides[1])
    offset = _number(path, file, "t_offset")
    if offset and not _is_offset(offset):
        raise RecordingError(
            f"{path}: t_offset is {offset[:30]!r}, no number of microseconds. Correct it, or copy "
            "the file again"
        )
    is_dsec = bool(offset) and isinstance(plain_member(file, "ms_to_idx"), h5py.Dataset)
    return Layout(
        columns,
        [f"events/{name}" for name in COLUMNS],
        stated_size=size,
        likely_size=DSEC_SIZE if is_dsec else HD,
        offset_us=int(offset) if offset else 0,
    )


def _is_offset(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and int(digits[:20]) <= LATEST_OFFSET_US


def _unread_layout(path: Path, file: h5py.File, missing: Sequence[str]) -> RecordingError:
    """The refusal of a file without the columns: what it contains, and whose layout that is."""
    message = f"{path} lacks {', '.join(missing)}"
    found = _members(file)
    if found:
        message += f"; it contains {', '.join(found[:NAMED])}"
        if len(found) > NAMED:
            message += ", ..."
    owners = [owner for member, owner in UNREAD if plain_member(file, member) is not None]
    if owners:
        message += f", the layout of {owners[0]}"
    return RecordingError(
        f"{message}. A recording has the columns events/t, x, y and p, integers, t in "
        "microseconds: convert it"
    )


def _members(file: h5py.File) -> list[str]:
    """Names of the datasets, and of empty groups and links, three levels deep."""
    names: list[str] = []
    waiting = [("", file["/"])]
    visited = 0
    while waiting and visited < MOST_VISITED:
        prefix, group = waiting.pop(0)
        for name in group:
            visited += 1
            is_inside = isinstance(group.get(name, getlink=True), h5py.HardLink)
            member = group[name] if is_inside else None
            if isinstance(member, h5py.Group) and prefix.count("/") < 2 and len(member):
                waiting.append((f"{prefix}{name}/", member))
            else:
                names.append(printable(f"{prefix}{name}"))
            if visited >= MOST_VISITED:
                break
    return names


def checked_length(path: Path, layout: Layout) -> int:
    """The number of events.

    Raises:
        RecordingError: columns are of another type, or of different lengths.
    """
    for place, (name, dtype) in zip(layout.names, layout.types.items(), strict=True):
        allowed = "iub" if name == "p" else "iu"
        if dtype.kind not in allowed or dtype.shape:
            raise RecordingError(
                f"{path}: {printable(place)} is of type {dtype}. Columns are integers, t in "
                "microseconds: convert it"
            )
    lengths = [len(dataset) for dataset in layout.datasets]
    if len(set(lengths)) > 1:
        by_name = dict(zip(COLUMNS, lengths, strict=True))
        raise RecordingError(
            f"{path}: the columns of events/ differ in length ({by_name}). The file is damaged: "
            "copy it again"
        )
    return lengths[0]


def _check_storage(path: Path, column: h5py.Dataset, dimensions: int = 1) -> None:
    """Raises UserErrors where HDF5 could not read the column, or would return wrong values."""
    if column.chunks is not None:
        _check_chunks(path, column)
    require_plain_dataset(column)
    if column.ndim != dimensions:
        raise RecordingError(
            f"{path}: {column.name} has the shape {column.shape}; columns have one dimension"
        )
    if column.dtype.itemsize > LARGEST_ENTRY_BYTES:
        raise RecordingError(
            f"{path}: {column.name} has entries of {column.dtype.itemsize} bytes, too large for "
            "events. The file is damaged: copy it again"
        )
    _check_filters(path, column)


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
    entries = math.prod(column.chunks)
    if entries * column.dtype.itemsize > LARGEST_CHUNK_BYTES:
        raise RecordingError(
            f"{path}: {column.name} is stored in chunks of {entries} entries, too large to stream. "
            f"Store it in smaller ones: h5repack -l CHUNK=65536 {path} OUT.h5"
        )


def _number(path: Path, group: h5py.Group, name: str) -> str:
    """The only value of a dataset of a group, as text; empty where there is no such dataset."""
    dataset = plain_member(group, name)
    if dataset is None:
        return ""
    if not isinstance(dataset, h5py.Dataset) or dataset.size != 1:
        raise RecordingError(
            f"{path}: {group.name.strip('/')}/{name} must be one number. Correct it, or remove it"
        )
    require_plain_dataset(dataset)
    return _text(np.asarray(dataset[()]).item())


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
