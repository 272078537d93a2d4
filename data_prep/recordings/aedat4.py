r"""AEDAT 4 recordings of iniVation's DV: one stream of events, packet by packet.

    #!AER-DAT4.0\r\n
    IOHeader            uint32 size, FlatBuffer: compression, position of the data table, XML
    packet, packet, ... int32 stream, int32 size, data
    FileDataTable       not needed

The data of a packet, decompressed, is a FlatBuffer with its size in front. That of events has the
identifier EVTS and one vector of structs of 16 bytes: int64 t in us, int16 x, int16 y, bool p.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.conf.text import plural, printable
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.columns import LATEST_US
from evspan.data_prep.recordings.decompression import (
    CompressionError,
    decompress_lz4,
    decompress_zstd,
)
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import HD, checked_size
from numpy.typing import NDArray

MAGIC = b"#!AER-DAT4.0\r\n"
NONE, LZ4, LZ4_HIGH, ZSTD, ZSTD_HIGH = range(5)  # compression
LARGEST_HEADER = 1 << 22  # bytes
LARGEST_PACKET = 1 << 28  # bytes, decompressed; DV writes packets of 10 ms
EVENT = np.dtype(
    {
        "names": ["t", "x", "y", "p"],
        "formats": ["<i8", "<i2", "<i2", "u1"],
        "offsets": [0, 8, 10, 12],
        "itemsize": 16,
    }
)
EVENT_IDENTIFIER = b"EVTS"
COPY_AGAIN = "The file is cut off or damaged: copy it again"


@dataclass(frozen=True)
class _Header:
    """compression: of the packets. start: of the first packet. end: of the last one, or 0.

    xml: describes the streams.
    """

    compression: int
    start: int
    end: int
    xml: str


@dataclass(frozen=True)
class _Stream:
    """A stream of events: its number, its source and the sensor's size as far as stated."""

    number: int
    source: str
    size: tuple[int, int] | None


class Aedat4Reader(Recording):
    """Reads the first stream of events."""

    format = "aedat4"

    def __init__(self, path: Path, *, unstated_size: tuple[int, int] | None = None) -> None:
        try:
            self.header = _read_header(path)
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise RecordingError(f"{path}: its header is not AEDAT 4's. {COPY_AGAIN}") from error
        self.streams = _event_streams(path, self.header.xml)
        if not self.streams:
            raise RecordingError(
                f"{path} contains no stream of events, only others (frames, IMU, triggers). Record "
                "the events, too"
            )
        size = self.streams[0].size or unstated_size
        super().__init__(path, *(size or HD), size_is_assumed=size is None)

    def warnings(self) -> dict[str, str]:
        """Those of every recording, and `streams`: events of other sensors that are not read."""
        texts = super().warnings()
        if len(self.streams) > 1:
            named = ", ".join(f"{s.number} ({s.source})" for s in self.streams)
            texts["streams"] = (
                f"the file has {plural(len(self.streams), 'stream')} of events, {named}; only "
                f"{self.streams[0].number} is read. Export the others to files of their own"
            )
        return texts

    def _decoded(self) -> Iterator[Events]:
        stream = self.streams[0].number
        with self.path.open("rb") as file:
            file.seek(self.header.start)
            for place, data in self._packets(file, stream):
                yield _events_of(f"{self.path}: the packet at byte {place}", data)

    def _packets(self, file: BinaryIO, stream: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yields the place and the data of the packets of a stream."""
        file_bytes = self.path.stat().st_size
        end = self.header.end or file_bytes
        if end > file_bytes:
            raise RecordingError(
                f"{self.path} is cut off: its header has the table of packets at byte {end}, and "
                f"the file has {file_bytes}. Copy it again"
            )
        at = self.header.start
        while at < end:
            head = file.read(8)
            number, size = struct.unpack("<ii", head) if len(head) == 8 else (0, -1)
            if not 0 <= size <= end - at - 8:
                raise RecordingError(
                    f"{self.path} is cut off or damaged: the packet at byte {at} does not end "
                    f"before byte {end}. Copy it again; of a recording that was interrupted, keep "
                    f"the whole packets: head -c {at}"
                )
            if number == stream:
                yield at, self._decompressed(at, file.read(size))
            else:
                file.seek(size, 1)
            at += 8 + size

    def _decompressed(self, at: int, data: bytes) -> NDArray[np.uint8]:
        compression = self.header.compression
        try:
            if compression in (LZ4, LZ4_HIGH):
                return decompress_lz4(data, LARGEST_PACKET)
            if compression in (ZSTD, ZSTD_HIGH):
                return decompress_zstd(data, LARGEST_PACKET)
        except CompressionError as error:
            raise RecordingError(
                f"{self.path}: the packet at byte {at} cannot be decompressed: {error}. "
                f"{COPY_AGAIN}"
            ) from error
        if len(data) > LARGEST_PACKET:
            raise RecordingError(
                f"{self.path}: the packet at byte {at} has {len(data)} bytes, more than "
                f"{LARGEST_PACKET}. {COPY_AGAIN}"
            )
        return np.frombuffer(data, np.uint8)


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        data = file.read(len(MAGIC) + 4 + LARGEST_HEADER)
    if not data.startswith(MAGIC):
        raise RecordingError(
            f"{path} does not begin with {MAGIC.decode().strip()}. Recordings of jAER (AEDAT 1 to "
            "3) are not read: convert them to .csv with a line t,x,y,p per event"
        )
    (size,) = struct.unpack_from("<I", data, len(MAGIC))
    start = len(MAGIC) + 4
    if size > LARGEST_HEADER or start + size > len(data):
        raise RecordingError(f"{path}: its header has {size} bytes. {COPY_AGAIN}")
    table = _Table(data[start : start + size])
    compression = table.int32(0)
    if compression not in (NONE, LZ4, LZ4_HIGH, ZSTD, ZSTD_HIGH):
        raise RecordingError(
            f"{path}: compression {compression} is unknown; none (0), LZ4 (1, 2) and Zstandard "
            "(3, 4) are read. Export the recording again with one of these"
        )
    end = table.int64(1, default=-1)
    if end > 0 and end < start + size:
        raise RecordingError(f"{path}: its table of packets is at byte {end}. {COPY_AGAIN}")
    return _Header(compression, start + size, max(0, end), table.text(2))


class _Table:
    """The root table of a FlatBuffer. Reads beyond it raise struct.error."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        (self.at,) = struct.unpack_from("<I", data)
        (back,) = struct.unpack_from("<i", data, self.at)
        self.fields = self.at - back
        if self.fields < 0:
            raise struct.error("a table before the buffer")
        (self.fields_bytes,) = struct.unpack_from("<H", data, self.fields)

    def place(self, field: int) -> int:
        """Where the field is; 0: it has its default."""
        entry = 4 + 2 * field
        if entry + 2 > self.fields_bytes:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, self.fields + entry)
        return self.at + int(offset) if offset else 0

    def int32(self, field: int, default: int = 0) -> int:
        """The field as int32."""
        place = self.place(field)
        return int(struct.unpack_from("<i", self.data, place)[0]) if place else default

    def int64(self, field: int, default: int = 0) -> int:
        """The field as int64."""
        place = self.place(field)
        return int(struct.unpack_from("<q", self.data, place)[0]) if place else default

    def vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        """Start and number of items of a vector; (0, 0) where it is not there."""
        place = self.place(field)
        if not place:
            return 0, 0
        (offset,) = struct.unpack_from("<I", self.data, place)
        (items,) = struct.unpack_from("<I", self.data, place + offset)
        start = place + int(offset) + 4
        if start + items * item_bytes > len(self.data):
            raise struct.error("a vector beyond the buffer")
        return start, int(items)

    def text(self, field: int) -> str:
        """The field as a string; empty where it is not there."""
        start, items = self.vector(field, 1)
        return bytes(self.data[start : start + items]).decode()


def _event_streams(path: Path, xml: str) -> list[_Stream]:
    """The streams of events that the header's XML describes, by number."""
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise RecordingError(f"{path}: the XML in its header defines entities. {COPY_AGAIN}")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise RecordingError(
            f"{path}: the XML in its header is damaged ({error}). {COPY_AGAIN}"
        ) from error
    streams: list[_Stream] = []
    for parent in root.iter("node"):
        if parent.get("name") != "outInfo":
            continue
        for node in parent.findall("node"):
            number = node.get("name", "")
            is_number = number.isascii() and number.isdigit() and len(number) < 10
            if is_number and _attributes(node).get("typeIdentifier") == EVENT_IDENTIFIER.decode():
                streams.append(_stream(path, int(number), node))
    return sorted(streams, key=lambda stream: stream.number)


def _stream(path: Path, number: int, node: ElementTree.Element) -> _Stream:
    info: dict[str, str] = {}
    for child in node.findall("node"):
        if child.get("name") == "info":
            info = _attributes(child)
    size = None
    if "sizeX" in info and "sizeY" in info:
        size = checked_size(path, info["sizeY"], info["sizeX"])
    return _Stream(number, printable(info.get("source", "without a name")), size)


def _attributes(node: ElementTree.Element) -> dict[str, str]:
    return {attr.get("key", ""): attr.text or "" for attr in node.findall("attr")}


def _events_of(place: str, data: NDArray[np.uint8]) -> Events:
    """The events of a packet. place: names it in messages."""
    buffer = data.tobytes()
    try:
        (size,) = struct.unpack_from("<I", buffer)
        if buffer[8:12] != EVENT_IDENTIFIER or size + 4 > len(buffer):
            raise RecordingError(f"{place} does not contain events. {COPY_AGAIN}")
        start, items = _Table(buffer[4 : 4 + size]).vector(0, EVENT.itemsize)
    except (struct.error, IndexError) as error:
        raise RecordingError(f"{place} is damaged. {COPY_AGAIN}") from error
    rows = np.frombuffer(buffer, EVENT, items, offset=4 + start if items else 0)
    if items and max(int(rows["t"].max()), -int(rows["t"].min())) > LATEST_US:
        raise RecordingError(
            f"{place} has times from {rows['t'].min()} to {rows['t'].max()}, which are not "
            f"microseconds. {COPY_AGAIN}"
        )
    return Events(
        rows["t"].astype(np.int64),
        rows["x"].astype(np.uint16),  # a negative one lies outside every sensor
        rows["y"].astype(np.uint16),
        (rows["p"] != 0).astype(np.uint8),
    )
