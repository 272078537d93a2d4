"""NumPy archives (.npz): arrays t, x, y, p, or one array of events.

`events` (or the only array) is structured with such fields, or has the shape (N, 4) with the
columns t, x, y, p. Names are those of `columns.py` (t_us, polarity, ...); whole numbers may be
stored as floats. `height` and `width` state the sensor's size. Members are read as streams, in
blocks: nothing is unpickled, and memory does not grow with the recording.
"""

import errno
import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from evspan.conf.errors import RecordingError, UserError
from evspan.conf.schema.prep import TimeUnit
from evspan.conf.text import printable
from evspan.data_prep.foreign_content import describe_foreign_content
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.columns import (
    COLUMNS,
    EXPONENTS,
    LATEST_US,
    SET_UNIT,
    TimeSample,
    certain_unit,
    named_column,
    pixel,
    require_usual_order,
)
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import HD, checked_size
from evspan.data_prep.recordings.polarity import PolarityCoding
from numpy.typing import NDArray

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
EVENTS_AT_ONCE = 1 << 18
FEW_EVENTS = 1 << 12  # that show order and unit
LARGEST_ITEM = 1024  # bytes of a row
MOST_MEMBERS = 1000
SAVE = "Save the recording with numpy.savez(FILE, t=t, x=x, y=y, p=p), t in whole microseconds"
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError),
    *(
        tokenize.TokenError,
        NotImplementedError,
        IndexError,
        KeyError,
        SyntaxError,
        TypeError,
        MemoryError,
    ),
    OverflowError,
)


@dataclass(frozen=True)
class _Array:
    """An array of the archive.

    member: its file. start: byte where its data begins. is_columns: (N, 4) column by column.
    """

    member: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    is_columns: bool


@dataclass(frozen=True)
class _Column:
    """One of t, x, y, p: an array, or a field or column of one."""

    array: _Array
    part: str | int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its type."""
        return self.array.dtype[self.part] if isinstance(self.part, str) else self.array.dtype

    @property
    def offset(self) -> int:
        """Byte where its data begins in the member."""
        if isinstance(self.part, int) and self.array.is_columns:
            rows = self.array.shape[0]
            return self.array.start + self.part * rows * self.array.dtype.itemsize
        return self.array.start

    def read(self, file: IO[bytes], rows: int) -> NDArray[Any]:
        """The next `rows` values. file: the member, behind those before.

        Raises:
            EOFError: the member ends before.
        """
        width = 1
        if isinstance(self.part, int) and not self.array.is_columns:
            width = len(COLUMNS)
        size = rows * width * self.array.dtype.itemsize
        data = file.read(size)
        if len(data) != size:
            raise EOFError(f"{self.array.member} ends early")
        values = np.frombuffer(data, self.array.dtype)
        if isinstance(self.part, str):
            return values[self.part]
        return values.reshape(rows, width)[:, self.part if width > 1 else 0]


@dataclass(frozen=True)
class _Archive:
    """The columns of an archive, and what it states."""

    columns: tuple[_Column, ...]
    events: int
    unit: TimeUnit | None
    size: tuple[int, int] | None
    is_named: bool


def holds_event_arrays(path: Path) -> bool:
    """Whether an archive contains t, x, y and p, or events; also if it cannot be read as one.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()[:MOST_MEMBERS]]
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        return True
    columns = {column.name for column in map(named_column, names) if column}
    return columns >= set(COLUMNS) or "events" in names or "event_data" in names


class NpzReader(Recording):
    """Reads archives, block by block."""

    format = "npz"

    def __init__(
        self,
        path: Path,
        events_at_once: int = EVENTS_AT_ONCE,
        *,
        unstated_size: tuple[int, int] | None = None,
        time_unit: TimeUnit | None = None,
    ) -> None:
        with path.open("rb") as file:
            start = file.read(4)
        if start not in ZIP_STARTS:
            description = describe_foreign_content(path)
            raise RecordingError(f"{path} {description or 'is no ZIP archive. ' + SAVE}")
        self.events_at_once = events_at_once
        with _readable(path, "the archive"), zipfile.ZipFile(path) as archive:
            self.archive = _find_columns(path, archive)
        size = self.archive.size or unstated_size
        super().__init__(path, *(size or HD), size_is_assumed=size is None)
        self.unit = time_unit or self.archive.unit or TimeUnit.us
        if self.archive.events:
            with _readable(path, "the first events"):
                first = next(self._blocks(self.archive.columns, FEW_EVENTS))
            if not self.archive.is_named:
                require_usual_order(path, first, SAVE)
            if not (time_unit or self.archive.unit):
                self.unit = self._certain_unit(first[0])

    def _certain_unit(self, t: NDArray[Any]) -> TimeUnit:
        """t: of the first events."""
        sample = TimeSample(float(t[0]), self._last_time(), _decimals(t), self.archive.events)
        return certain_unit(self.path, sample, self.height * self.width)

    def _last_time(self) -> float:
        """The time of the last event; reads the whole column, which may be compressed."""
        last = 0.0
        with _readable(self.path, "the times"):
            for (t,) in self._blocks(self.archive.columns[:1]):
                last = float(t[-1])
        return last

    def _blocks(
        self, columns: Sequence[_Column], at_once: int | None = None
    ) -> Iterator[Sequence[NDArray[Any]]]:
        """Yields blocks of these columns, in the types of the file."""
        at_once = at_once or self.events_at_once
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            files: list[IO[bytes]] = []
            for column in columns:
                member = stack.enter_context(archive.open(column.array.member))
                _skip(member, column.offset)
                files.append(member)
            for first in range(0, self.archive.events, at_once):
                rows = min(at_once, self.archive.events - first)
                yield [c.read(file, rows) for c, file in zip(columns, files, strict=True)]

    def _decoded(self) -> Iterator[Events]:
        with _readable(self.path, "the events"):
            coding = PolarityCoding(self.path, self._polarities())
            first = 0
            for t, x, y, p in self._blocks(self.archive.columns):
                yield Events(
                    self._times(t, first),
                    pixel(self._whole("x", x, first)),
                    pixel(self._whole("y", y, first)),
                    coding.decode(self._whole("p", p, first), first),
                )
                first += len(t)

    def _polarities(self) -> list[int]:
        values: set[int] = set()
        read = 0
        for (p,) in self._blocks(self.archive.columns[3:]):
            values |= set(np.unique(self._whole("p", p, read)).tolist())
            read += len(p)
            if len(values) > 1:
                break
        return sorted(values)

    def _times(self, t: NDArray[Any], first: int) -> NDArray[np.int64]:
        """Times of the events `first` and on, in us, rounded."""
        power = EXPONENTS[self.unit]
        least, most = float(t.min()), float(t.max())
        scale = 10.0**power
        if not max(abs(least), abs(most)) * scale <= LATEST_US:  # also of NaN
            raise RecordingError(
                f"{self.path}: events {first} and on have times from {least:g} to {most:g}, which "
                f"are not {self.unit.value}. {SET_UNIT}"
            )
        if t.dtype.kind == "f":
            rounded: NDArray[np.int64] = np.rint(t.astype(np.float64) * scale).astype(np.int64)
            return rounded
        whole: NDArray[np.int64] = t.astype(np.int64)
        if power >= 0:
            whole *= 10**power
            return whole
        divisor = 10**-power
        whole += divisor // 2
        whole //= divisor
        return whole

    def _whole(self, name: str, values: NDArray[Any], first: int) -> NDArray[Any]:
        """Values that are stored as floats, as integers."""
        if values.dtype.kind != "f":
            return np.ascontiguousarray(values)
        with np.errstate(invalid="ignore"):
            whole: NDArray[np.int64] = np.clip(values, -(1 << 31), 1 << 31).astype(np.int64)
        differs = whole != values
        if differs.any():
            i = int(np.argmax(differs))
            raise RecordingError(
                f"{self.path}: {name} of event {first + i} is {values[i]:g}, no whole number. "
                "Convert the column to integers"
            )
        return whole


@contextmanager
def _readable(path: Path, place: str) -> Iterator[None]:
    """Raises a RecordingError for what zipfile and numpy raise of a damaged archive."""
    try:
        yield
    except UserError:
        raise
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file
            raise
        reason = printable(" ".join(str(error).split()))[:200] or type(error).__name__
        raise RecordingError(
            f"{path}: {place} cannot be read as an archive of NumPy ({reason}). The file is cut "
            "off or damaged: copy it again"
        ) from error


def _skip(file: IO[bytes], size: int) -> None:
    """Reads and drops `size` bytes."""
    while size:
        data = file.read(min(size, 1 << 20))
        if not data:
            raise EOFError("a member ends early")
        size -= len(data)


def _find_columns(path: Path, archive: zipfile.ZipFile) -> _Archive:
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    if len(members) > MOST_MEMBERS:
        raise RecordingError(f"{path} contains {len(members)} arrays. {SAVE}")
    names = {info.filename.removesuffix(".npy"): info for info in members}
    size = _stated_size(path, archive, names)
    single = _by_name(names)
    is_named = True
    unit: TimeUnit | None = None
    if set(single) >= set(COLUMNS):
        arrays = [_array(path, archive, names[single[name]]) for name in COLUMNS]
        columns = [_Column(array) for array in arrays]
        unit = _unit_of(single["t"])
    else:
        array = _array(path, archive, _only_array(path, names))
        columns, unit = _columns_of(path, array)
        is_named = array.dtype.names is not None
    lengths = {column.array.shape[0] for column in columns}
    if len(lengths) > 1:
        raise RecordingError(
            f"{path}: the arrays differ in length ({sorted(lengths)}). The file is damaged: copy "
            "it again"
        )
    for name, column in zip(COLUMNS, columns, strict=True):
        _require_numbers(path, name, column)
    return _Archive(tuple(columns), lengths.pop(), unit, size, is_named)


def _by_name(names: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    """The name of each column in the file, by t, x, y, p; the first of an alias counts."""
    found: dict[str, str] = {}
    for name in names:
        column = named_column(name)
        if column:
            found.setdefault(column.name, name)
    return found


def _unit_of(name: str) -> TimeUnit | None:
    column = named_column(name)
    return column.unit if column else None


def _only_array(path: Path, names: dict[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    candidates = {name: info for name, info in names.items() if name not in ("height", "width")}
    for name in ("events", "event_data"):
        if name in candidates:
            return candidates[name]
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    listed = ", ".join(printable(name)[:40] for name in list(names)[:8]) or "none"
    raise RecordingError(f"{path} lacks arrays t, x, y and p, or events; it has {listed}. {SAVE}")


def _columns_of(path: Path, array: _Array) -> tuple[list[_Column], TimeUnit | None]:
    """The columns of one array of events, and the unit that its names state."""
    if array.dtype.names is not None:
        fields = _by_name(array.dtype.names)
        if set(fields) >= set(COLUMNS) and len(array.shape) == 1:
            return [_Column(array, fields[name]) for name in COLUMNS], _unit_of(fields["t"])
    elif len(array.shape) == 2 and array.shape[1] == len(COLUMNS):
        return [_Column(array, i) for i in range(len(COLUMNS))], None
    raise RecordingError(
        f"{path}: {printable(array.member)} has the type {printable(str(array.dtype))[:100]} and "
        f"the shape {array.shape}; events are (N,) with the fields t, x, y, p, or (N, 4). {SAVE}"
    )


def _require_numbers(path: Path, name: str, column: _Column) -> None:
    dtype = column.dtype
    is_number = dtype.kind in ("iuf" if name in "txy" else "iufb") and not dtype.shape
    if not is_number or dtype.itemsize > 8 or column.array.dtype.itemsize > LARGEST_ITEM:
        raise RecordingError(
            f"{path}: {name} is of type {printable(str(dtype))[:100]}; columns are numbers. {SAVE}"
        )


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
    """Reads the header of an array.

    Raises:
        RecordingError: it contains Python objects, or is not as long as the header states.
    """
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"version {version} of the array format")
        shape, is_fortran, dtype = read_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise RecordingError(
            f"{path}: {printable(info.filename)} contains Python objects, which are not "
            f"unpickled. {SAVE}"
        )
    items = 1
    for side in shape:
        items *= side
    is_vector = shape and all(side >= 0 for side in shape)
    if not is_vector or start + items * dtype.itemsize != info.file_size:
        raise RecordingError(
            f"{path}: {printable(info.filename)} has {info.file_size} bytes, which is not what its "
            f"shape {shape} and type need. The file is cut off or damaged: copy it again"
        )
    return _Array(info.filename, dtype, shape, start, is_fortran and len(shape) > 1)


def _stated_size(
    path: Path, archive: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo]
) -> tuple[int, int] | None:
    sides: list[str] = []
    for name in ("height", "width"):
        info = names.get(name)
        if info is None:
            return None
        if info.file_size > LARGEST_ITEM:
            raise RecordingError(f"{path}: {name} must be one number. Correct it, or remove it")
        with archive.open(info) as file:
            value = np.lib.format.read_array(file, allow_pickle=False)
        sides.append(str(value.item()) if value.size == 1 else "")
    return checked_size(path, sides[0], sides[1])


def _decimals(t: NDArray[Any]) -> int:
    """Digits after the point, roughly: 0, 3 or 6."""
    if t.dtype.kind != "f" or bool((t == np.floor(t)).all()):
        return 0
    thousandths = t.astype(np.float64) * 1000
    is_coarse = bool((np.abs(thousandths - np.rint(thousandths)) < 1e-3).all())
    return 3 if is_coarse else 6
