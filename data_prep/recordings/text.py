"""Text recordings (.csv, .txt): a line of numbers per event.

Columns are separated by blanks, tabs, commas or semicolons. A first line may name them, in any
order and among others (t, x, y, p; t_us, t_ms, ... states the unit); without names they are
t x y p. A line of two whole numbers before the events is the sensor's width and height, as in rpg's
files. Lines that begin with # or % are comments; one may state `width 346 height 260` or
`geometry 346x260`, and a comment before the events may name the columns.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Context, Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import TimeUnit
from evspan.conf.text import printable
from evspan.data_prep.foreign_content import describe_foreign_content
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.columns import (
    COLUMNS,
    EXPONENTS,
    LATEST_US,
    NamedColumn,
    TimeSample,
    certain_unit,
    named_column,
    pixel,
    require_usual_order,
)
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import HD, checked_size
from evspan.data_prep.recordings.polarity import PolarityCoding
from evspan.data_prep.recordings.text_lines import (
    COMMENTS,
    FAULTS,
    IGNORED,
    TOO_FEW,
    parse_lines,
)
from numpy.typing import NDArray

HEAD_BYTES = 1 << 16  # in which names, comments and the first events are
TAIL_BYTES = 1 << 12
BLOCK_BYTES = 1 << 20
MOST_COLUMNS = 64
SHOWN = 60  # characters of a line that an error shows
PRECISE = Context(prec=16)  # digits that a float64 has
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
SEPARATOR = re.compile("[,;]")
SIZE_COMMENTS = (
    re.compile(r"geometry\W+(?P<width>\d+)\D+(?P<height>\d+)", re.IGNORECASE),
    re.compile(r"width\W+(?P<width>\d+)\W+height\W+(?P<height>\d+)", re.IGNORECASE),
    re.compile(r"height\W+(?P<height>\d+)\W+width\W+(?P<width>\d+)", re.IGNORECASE),
)
ADD_NAMES = "Name them in a first line: sed -i '1i {}' FILE"


@dataclass
class TextHead:
    """What the beginning of a text file says about its events.

    Attributes:
        start: byte of the first line with an event.
        names: of the columns, where they are named.
        size: height and width as text, where they are stated.
        lines: fields of the first lines with events.
    """

    start: int = 0
    names: list[str] = field(default_factory=list)
    size: tuple[str, str] | None = None
    lines: list[list[str]] = field(default_factory=list)

    @property
    def has_events(self) -> bool:
        """Whether the file is a recording: named columns t, x, y, p, or four numbers a line."""
        return bool(self.names) or (bool(self.lines) and len(self.lines[0]) == len(COLUMNS))


def read_text_head(path: Path) -> TextHead:
    """Reads the lines before the first event, and the first events.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(HEAD_BYTES)
    is_whole = len(data) < HEAD_BYTES
    head = TextHead()
    at = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    for line in data[at:].splitlines(keepends=True):
        if not is_whole and at + len(line) == len(data):
            break  # the line goes on
        _note_line(head, line.decode("latin-1").strip(), at)
        at += len(line)
    return head


def _note_line(head: TextHead, text: str, at: int) -> None:
    if not text:
        return
    if ord(text[0]) in COMMENTS:
        if not head.lines:
            _note_comment(head, text[1:].strip())
        return
    fields = _fields(text)
    is_numeric = all(NUMBER.fullmatch(item) for item in fields)
    if not head.lines:
        if not head.names and _names_columns(fields):
            head.names = fields
            return
        is_size = len(fields) == 2 and is_numeric and not head.names and head.size is None
        if is_size:
            head.size = (fields[1], fields[0])
            return
        if not head.names and not is_numeric:
            return  # prose, or another table
        head.start = at
    head.lines.append(fields)


def _note_comment(head: TextHead, text: str) -> None:
    for pattern in SIZE_COMMENTS:
        match = pattern.search(text)
        if match and head.size is None:
            head.size = (match["height"], match["width"])
    fields = _fields(text)
    if not head.names and _names_columns(fields):
        head.names = fields


def _fields(text: str) -> list[str]:
    fields = SEPARATOR.split(text) if SEPARATOR.search(text) else text.split()
    fields = [item.strip().strip('"') for item in fields]
    if fields and not fields[-1]:
        fields.pop()
    return fields


def _names_columns(fields: list[str]) -> bool:
    names = [column.name for column in map(named_column, fields) if column]
    return set(names) == set(COLUMNS)


class TextReader(Recording):
    """Reads lines of numbers, block by block."""

    format = "text"

    def __init__(
        self,
        path: Path,
        block_bytes: int = BLOCK_BYTES,
        *,
        unstated_size: tuple[int, int] | None = None,
        time_unit: TimeUnit | None = None,
    ) -> None:
        description = describe_foreign_content(path, is_text=True)
        if description:
            raise RecordingError(f"{path} {description}")
        self.block_bytes = block_bytes
        self.head = read_text_head(path)
        columns = self._named_columns(path)
        self.columns = np.array(
            [COLUMNS.index(column.name) if column else IGNORED for column in columns], np.int64
        )
        stated = checked_size(path, *self.head.size) if self.head.size else None
        size = stated or unstated_size
        super().__init__(path, *(size or HD), size_is_assumed=size is None)
        named = [column.unit for column in columns if column and column.unit]
        self.unit = time_unit or (named[0] if named else self._certain_unit())

    def _named_columns(self, path: Path) -> list[NamedColumn | None]:
        """What each column of the file is."""
        if self.head.names:
            columns = [named_column(name) for name in self.head.names]
            known = [column.name for column in columns if column]
            if len(known) > len(COLUMNS) or len(columns) > MOST_COLUMNS:
                raise RecordingError(
                    f"{path}: the columns are {printable(', '.join(self.head.names))[:200]}; each "
                    "of t, x, y and p must be there once. Correct the first line"
                )
            return columns
        if not self.head.lines:
            raise RecordingError(
                f"{path} contains no line of four numbers t x y p within its first {HEAD_BYTES} "
                "bytes. Give a file with a line for each event"
            )
        columns_found = len(self.head.lines[0])
        if columns_found != len(COLUMNS):
            raise RecordingError(
                f"{path}: the first line of numbers, at byte {self.head.start}, has "
                f"{columns_found} columns, which have no names; without names there are four: "
                f"t x y p. {ADD_NAMES.format('t,x,y,p,other')}"
            )
        rows = [line for line in self.head.lines if _is_event(line)]
        numbers = np.array([[float(item) for item in row] for row in rows]).reshape(-1, 4)
        require_usual_order(path, list(numbers.T), ADD_NAMES)
        return [named_column(name) for name in COLUMNS]

    def _certain_unit(self) -> TimeUnit:
        place = int(np.flatnonzero(self.columns == 0)[0])
        values = [line[place] for line in self.head.lines if len(line) > place]
        times = [time for time in map(_decimal, values) if time is not None]
        if not times:
            return TimeUnit.us  # an empty recording, or an error at its first line
        last = self._last_time(place)
        size = self.path.stat().st_size
        lines_bytes = max(1, min(size, HEAD_BYTES) - self.head.start)
        events = len(times) * max(1.0, (size - self.head.start) / lines_bytes)
        decimals = max(-min(0, _exponent(time)) for time in times)
        sample = TimeSample(
            float(times[0]), float(times[-1] if last is None else last), decimals, round(events)
        )
        return certain_unit(self.path, sample, self.height * self.width)

    def _last_time(self, place: int) -> Decimal | None:
        """The time in the last complete line."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.head.start, size - TAIL_BYTES))
            lines = file.read().decode("latin-1").splitlines()
        for line in reversed(lines[1:]):
            fields = _fields(line.strip())
            time = _decimal(fields[place]) if len(fields) == len(self.columns) else None
            if time is not None:
                return time
        return None

    def _decoded(self) -> Iterator[Events]:
        coding = PolarityCoding(self.path, self._polarities())
        first = 0
        for rows in self._rows():
            t, x, y, p = rows
            latest = max(int(t.max()), -int(t.min()))
            if latest > LATEST_US:
                raise RecordingError(
                    f"{self.path}: events {first} and on have times from {t.min()} to {t.max()} "
                    f"us, read as {self.unit.value}: over 285 years. Is dataset.time_unit right?"
                )
            yield Events(t, pixel(x), pixel(y), coding.decode(p, first))
            first += t.size

    def _polarities(self) -> list[int]:
        """The first different values of the column p; all of a block where there are over two."""
        values: set[int] = set()
        for rows in self._rows():
            values |= set(np.unique(rows[3]).tolist())
            if len(values) > 1:
                break
        return sorted(values)

    def _rows(self) -> Iterator[NDArray[np.int64]]:
        """Yields (4, n) t in us, x, y, p of the lines of a block, n > 0."""
        lines_before = 0
        at = self.head.start
        with self.path.open("rb") as file:
            lines_before = file.read(at).count(b"\n")
            rest = b""
            while data := file.read(self.block_bytes):
                text, newline, rest = (rest + data).rpartition(b"\n")
                if len(rest) > BLOCK_BYTES:
                    raise RecordingError(
                        f"{self.path}: the line at byte {at + len(text) + len(newline)} does not "
                        "end. It is no text file of events, or is damaged: copy it again"
                    )
                if newline:
                    yield from self._parsed(text + newline, lines_before, is_last=False)
                lines_before += text.count(b"\n") + len(newline)
                at += len(text) + len(newline)
            if rest.strip():
                yield from self._parsed(rest + b"\n", lines_before, is_last=True)

    def _parsed(
        self, text: bytes, lines_before: int, *, is_last: bool
    ) -> Iterator[NDArray[np.int64]]:
        rows = np.empty((len(COLUMNS), text.count(b"\n")), np.int64)
        n, fault, line, column = parse_lines(
            np.frombuffer(text, np.uint8), self.columns, EXPONENTS[self.unit], rows
        )
        if fault:
            raise self._refused(text, lines_before, fault, int(line), int(column), is_last=is_last)
        if n:
            yield rows[:, :n]

    def _refused(
        self, text: bytes, lines_before: int, fault: int, line: int, column: int, *, is_last: bool
    ) -> RecordingError:
        number = lines_before + text.count(b"\n", 0, line) + 1
        shown = text[line : text.index(b"\n", line)].decode("latin-1").strip()
        if is_last and fault == TOO_FEW:
            return RecordingError(
                f"{self.path} is cut off: its last line, {number}, is '{printable(shown[:SHOWN])}' "
                "and does not end. Copy it again, or delete that line: sed -i '$ d' FILE"
            )
        name = f"column {column + 1}"
        if column < len(self.columns) and self.columns[column] < IGNORED:
            name = f"{COLUMNS[self.columns[column]]} (column {column + 1})"
        return RecordingError(
            f"{self.path}, line {number}: {name} {FAULTS[fault]}: '{printable(shown[:SHOWN])}'. "
            "Correct the line, or copy the file again"
        )


def _is_event(fields: list[str]) -> bool:
    return len(fields) == len(COLUMNS) and all(NUMBER.fullmatch(item) for item in fields)


def _decimal(text: str) -> Decimal | None:
    """A number with the digits of a float64, without zeros at its end."""
    try:
        number = PRECISE.create_decimal(text).normalize()
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number.adjusted()) < 30 else None


def _exponent(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    return exponent if isinstance(exponent, int) else 0
