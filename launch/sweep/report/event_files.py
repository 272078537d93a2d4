"""Finds the scalars of some tags in TensorBoard event files, without a Python loop over all bytes.

A file is a sequence of TFRecords: length (8 bytes), its checksum (4), the data, its checksum (4).
A scalar is mostly a record of one form: wall_time, step, and a summary of one value with the tag
and `simple_value`. These records are found by their tag, checked and decoded together by numpy.
Other records that contain a tag are parsed one by one. Records of images are not read.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from evspan.conf.text import plural
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

LARGE_BYTES = 1 << 12  # larger records are images, not scalars
READ_BYTES = 1 << 22
MOST_BROKEN_BYTES = 1 << 28  # that are searched for records after damage
HEADER_BYTES = 12  # length and checksum
CRC_BYTES = 4
WALL_TIME_BYTES = 9  # a tag and a double
MOST_STEP_BYTES = 11  # a tag and a varint; 0 for step 0, which is left out
WALL_TIME_TAG = 0x09
STEP_TAG = 0x10
SIMPLE_VALUE_TAG = 0x15
SESSION_START = b"\x3a\x02\x08\x01"  # session_log { status: START }, last in its record

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


class Point(NamedTuple):
    """A scalar. time: in seconds since 1970."""

    step: int
    value: float
    time: float


@dataclass
class EventFile:
    """The contents of an event file. Positions are bytes in the file, in ascending order.

    Attributes:
        points: for each tag the position and the value of its scalars.
        starts: position and step of the starts of attempts, which replace later steps.
        damaged: number of records whose checksums do not hold.
        broken_at: position from which on the file does not consist of records; None for a sound
            file. A half-written end is no damage.
    """

    points: dict[str, list[tuple[int, Point]]]
    starts: list[tuple[int, int]] = field(default_factory=list)
    damaged: int = 0
    broken_at: int | None = None

    def problem(self) -> str:
        """What is damaged; empty for a sound file."""
        parts = []
        if self.broken_at is not None:
            parts.append(f"damaged at byte {self.broken_at}")
        if self.damaged:
            parts.append(plural(self.damaged, "damaged record"))
        return ", ".join(parts)


def read_event_file(path: Path, tags: Sequence[str]) -> EventFile:
    """The undamaged scalars of these tags.

    Raises:
        OSError: the file cannot be read.
    """
    contents = EventFile({tag: [] for tag in tags})
    with path.open("rb") as file:
        for block in _blocks(file):
            num_sound = _BlockReader(block, contents).read()
            is_broken = block.kind is _Kind.broken or (block.kind is _Kind.end and num_sound > 0)
            if is_broken and contents.broken_at is None:
                contents.broken_at = block.position
    return contents


# -- blocks ----------------------------------------------------------------------------------------
class _Kind(Enum):
    records = "records"
    end = "end"  # half written
    broken = "broken"


class _Block(NamedTuple):
    """Part of a file.

    position: of `data` in the file. starts: of the records in `data`, if it consists of records.
    """

    kind: _Kind
    position: int
    data: bytes
    starts: list[int]


def _blocks(file: BinaryIO) -> Iterator[_Block]:
    """The file without its large records, in blocks of whole records."""
    size = file.seek(0, 2)
    file.seek(0)
    position = 0
    data = file.read(READ_BYTES)
    while data:
        starts, end, large = _walk(data)
        if starts:
            yield _Block(_Kind.records, position, data[:end], starts)
        position += end
        rest = data[end:]
        if large:
            if not _is_header(rest):
                file.seek(position)
                yield _Block(_Kind.broken, position, file.read(MOST_BROKEN_BYTES), [])
                return
            position += HEADER_BYTES + large + CRC_BYTES
            if position > size:  # half written
                return
            file.seek(position)
            rest = b""
        more = file.read(READ_BYTES)
        if not more and rest:
            yield _Block(_Kind.end, position, rest, [])
        data = rest + more if more else b""


def _walk(data: bytes) -> tuple[list[int], int, int]:
    """The starts of the whole small records, their end, the length of a large record there or 0."""
    unpack = struct.Struct("<Q").unpack_from
    size = len(data)
    last = size - HEADER_BYTES
    starts: list[int] = []
    start = 0
    while start <= last:
        (length,) = unpack(data, start)
        if length > LARGE_BYTES:
            return starts, start, length
        end = start + length + HEADER_BYTES + CRC_BYTES
        if end > size:
            break
        starts.append(start)
        start = end
    return starts, start, 0


def _is_header(data: bytes) -> bool:
    """Whether the checksum of the length holds."""
    (checksum,) = struct.unpack_from("<I", data, 8)
    return bool(masked_crc32c(data[:8]) == checksum)


# -- records ---------------------------------------------------------------------------------------
class _BlockReader:
    """Adds the scalars of a block to the contents of its file."""

    def __init__(self, block: _Block, contents: EventFile) -> None:
        self.block = block
        self.contents = contents
        self.bytes: Bytes = np.frombuffer(block.data, np.uint8)

    def read(self) -> int:
        """Returns the number of sound records that were found."""
        num_sound = self._read_starts()
        others: set[int] = set()
        for tag in self.contents.points:
            num_tag, others_of_tag = self._read_tag(tag)
            num_sound += num_tag
            others |= others_of_tag
        return num_sound + self._read_others(others)

    def _read_starts(self) -> int:
        found = _find_all(self.block.data, SESSION_START)
        records = _decode(self.bytes, found, found + len(SESSION_START))
        sound = records.is_sound
        positions = records.start[sound] + self.block.position
        self.contents.starts += zip(positions.tolist(), records.step[sound].tolist(), strict=True)
        return int(sound.sum())

    def _read_tag(self, tag: str) -> tuple[int, set[int]]:
        """Returns the number of sound records, and the other records that contain the tag."""
        name = tag.encode()
        value_size = len(name) + 7  # tag, its tag and size, simple_value and its tag
        prefix = bytes([0x2A, value_size + 2, 0x0A, value_size, 0x0A, len(name)])
        places = _find_all(self.block.data, name)
        value = places + len(name) + 1
        fits = (places >= len(prefix)) & (value + 4 + CRC_BYTES <= len(self.bytes))
        others = set(places[~fits].tolist())
        places = places[fits]
        value = value[fits]
        fits = (_rows(self.bytes, places - len(prefix), len(prefix)) == list(prefix)).all(axis=1)
        fits &= self.bytes[value - 1] == SIMPLE_VALUE_TAG
        others.update(places[~fits].tolist())
        places = places[fits]
        value = value[fits]
        records = _decode(self.bytes, places - len(prefix), value + 4)
        others.update(places[~records.has_form].tolist())
        self.contents.damaged += int((records.has_form & ~records.is_sound).sum())
        sound = records.is_sound
        values = _rows(self.bytes, value[sound], 4).view("<f4")[:, 0]
        points = map(
            Point, records.step[sound].tolist(), values.tolist(), records.time[sound].tolist()
        )
        positions = records.start[sound] + self.block.position
        self.contents.points[tag] += zip(positions.tolist(), points, strict=True)
        return int(sound.sum()), others

    def _read_others(self, places: set[int]) -> int:
        """Reads the records around these places, which are of any form. Returns their number."""
        if not self.block.starts:
            return 0
        indices = {bisect_right(self.block.starts, place) - 1 for place in places}
        num_read = 0
        for index in sorted(indices):
            num_read += self._read_record(self.block.starts[index])
        if num_read:
            for points in self.contents.points.values():
                points.sort(key=lambda item: item[0])
        return num_read

    def _read_record(self, start: int) -> bool:
        """Whether the record has scalars of the tags."""
        (length,) = struct.unpack_from("<Q", self.block.data, start)
        first = start + HEADER_BYTES
        record = self.block.data[first : first + length]
        try:
            event = Event.FromString(record)
        except Exception:  # DecodeError of protobuf, which is a dependency of tensorboard, not ours
            self.contents.damaged += 1
            return False
        values = [
            value
            for value in event.summary.value
            if value.tag in self.contents.points and value.WhichOneof("value") == "simple_value"
        ]
        if not values:
            return False
        (checksum,) = struct.unpack_from("<I", self.block.data, first + length)
        if masked_crc32c(record) != checksum:
            self.contents.damaged += 1
            return False
        for value in values:
            point = Point(event.step, value.simple_value, event.wall_time)
            self.contents.points[value.tag].append((start + self.block.position, point))
        return True


class _Records(NamedTuple):
    """N candidates for records of the usual form.

    start: (N,) of the record. step: (N,). time: (N,) in seconds since 1970.
    has_form: (N,) wall_time, step and length are where they belong.
    is_sound: (N,) also the checksums hold.
    """

    start: Indices
    step: Indices
    time: NDArray[np.float64]
    has_form: NDArray[np.bool_]
    is_sound: NDArray[np.bool_]


def _decode(data: Bytes, last_field: Indices, end: Indices) -> _Records:
    """Decodes records that have wall_time, step and one more field.

    Args:
        last_field: (N,) start of that field. end: (N,) of the record's data.
    """
    count = len(end)
    records = _Records(
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count),
        np.zeros(count, bool),
        np.zeros(count, bool),
    )
    for step_bytes in (0, *range(2, MOST_STEP_BYTES + 1)):
        wall_time = last_field - step_bytes - WALL_TIME_BYTES
        start = wall_time - HEADER_BYTES
        candidates = np.flatnonzero(
            ~records.has_form & (start >= 0) & (end + CRC_BYTES <= len(data))
        )
        if not candidates.size:
            continue
        is_time = data[wall_time[candidates]] == WALL_TIME_TAG
        candidates = candidates[is_time]
        lengths = _rows(data, start[candidates], 8).view("<u8")[:, 0]
        candidates = candidates[lengths == (end - wall_time)[candidates]]
        step_field = _rows(data, wall_time[candidates] + WALL_TIME_BYTES, step_bytes)
        is_step = _is_step(step_field)
        candidates = candidates[is_step]
        records.has_form[candidates] = True
        records.start[candidates] = start[candidates]
        records.step[candidates] = _step(step_field[is_step])
        times = _rows(data, wall_time[candidates] + 1, 8).view("<f8")[:, 0]
        records.time[candidates] = times
        records.is_sound[candidates] = _is_sound(data, start[candidates], end[candidates])
    return records


def _is_step(field_bytes: Bytes) -> NDArray[np.bool_]:
    """(N, K) bytes -> (N,) whether they are a whole field `step`, which step 0 does not have."""
    if not field_bytes.shape[1]:
        return np.ones(len(field_bytes), bool)
    continued = field_bytes[:, 1:] >= 0x80
    is_step: NDArray[np.bool_] = (field_bytes[:, 0] == STEP_TAG) & ~continued[:, -1]
    is_step &= continued[:, :-1].all(axis=1)
    return is_step


def _step(field_bytes: Bytes) -> Indices:
    """(N, K) bytes of the field `step` -> (N,) its varint."""
    step = np.zeros(len(field_bytes), np.int64)
    for i in range(1, field_bytes.shape[1]):
        step |= (field_bytes[:, i] & 0x7F).astype(np.int64) << (7 * (i - 1))
    return step


# -- bytes -----------------------------------------------------------------------------------------
def _find_all(data: bytes, text: bytes) -> Indices:
    """Where `text` begins, in ascending order."""
    places = []
    place = data.find(text)
    while place >= 0:
        places.append(place)
        place = data.find(text, place + len(text))
    return np.array(places, np.int64)


def _rows(data: Bytes, starts: Indices, width: int) -> Bytes:
    """(N, width): the bytes from each start on."""
    return np.ascontiguousarray(data[starts[:, None] + np.arange(width)])


def _is_sound(data: Bytes, start: Indices, end: Indices) -> NDArray[np.bool_]:
    """(N,) whether the checksums of the length and of the data hold."""
    header = _rows(data, start, HEADER_BYTES)
    is_sound: NDArray[np.bool_] = _crc32c(header[:, :8]) == header[:, 8:].copy().view("<u4")[:, 0]
    sizes = end - start - HEADER_BYTES
    for size in np.unique(sizes).tolist():
        same = np.flatnonzero(sizes == size)
        rows = _rows(data, start[same] + HEADER_BYTES, size + CRC_BYTES)
        stored = rows[:, size:].copy().view("<u4")[:, 0]
        is_sound[same] &= _crc32c(rows[:, :size]) == stored
    return is_sound


def _crc32c_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table.astype(np.uint32)


_TABLE = _crc32c_table()


def _crc32c(rows: Bytes) -> NDArray[np.uint32]:
    """(N, K) bytes -> (N,) TFRecord's masked CRC-32C of each row."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    crc ^= np.uint32(0xFFFFFFFF)
    return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)
