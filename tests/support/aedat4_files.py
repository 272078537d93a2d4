"""Writes AEDAT 4 files byte by byte, as DV lays them out; FlatBuffers and LZ4 frames included."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import xxhash
from evspan.data_prep.recordings.events import Events

STREAM = """<node name="{number}" path="/mainloop/Recorder/outInfo/{number}/">
<attr key="compression" type="string">LZ4</attr>
<attr key="originalOutputName" type="string">events</attr>
<attr key="typeIdentifier" type="string">{kind}</attr>
<node name="info" path="/mainloop/Recorder/outInfo/{number}/info/">{size}
<attr key="source" type="string">DAVIS346_{number}</attr></node></node>"""
SIZE = '<attr key="sizeX" type="int">{}</attr><attr key="sizeY" type="int">{}</attr>'
EVENT = struct.Struct("<qhhB3x")
PLAIN = 0
LZ4 = 1
ZSTD = 3


def info(streams: dict[int, str], size: tuple[int, int] | None = (260, 346)) -> str:
    """The XML of a header. streams: identifier by number. size: height and width."""
    stated = SIZE.format(size[1], size[0]) if size else ""
    nodes = [STREAM.format(number=n, kind=kind, size=stated) for n, kind in streams.items()]
    return (
        '<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">'
        + "".join(nodes)
        + "</node></dv>"
    )


def header(compression: int, table_at: int, xml: str) -> bytes:
    text = xml.encode()
    body = struct.pack("<I4s", 20, b"IOHE")
    body += struct.pack("<5H2x", 10, 20, 4, 8, 16)  # vtable: sizes, then where the fields are
    body += struct.pack("<iiqI", 12, compression, table_at, 4)
    body += struct.pack("<I", len(text)) + text + b"\0"
    return b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(body)) + body


def event_packet(events: Events, identifier: bytes = b"EVTS") -> bytes:
    rows = zip(*(column.tolist() for column in events), strict=True)
    data = b"".join(EVENT.pack(*row) for row in rows)
    body = struct.pack("<I4s", 16, identifier)
    body += struct.pack("<3H2x", 6, 8, 4)
    body += struct.pack("<iI", 8, 8)
    body += struct.pack("<4xI", len(events.t)) + data  # the structs are aligned to 8 bytes
    return struct.pack("<I", len(body)) + body


def lz4_frame(data: bytes) -> bytes:
    """One frame with blocks of 64 KiB; a match where the next 8 bytes were there before."""
    flags = bytes([1 << 6 | 1 << 5 | 4, 4 << 4])
    out = struct.pack("<I", 0x184D2204) + flags
    out += bytes([xxhash.xxh32_intdigest(flags) >> 8 & 0xFF])
    for start in range(0, len(data), 1 << 16):
        block = lz4_block(data[start : start + (1 << 16)])
        out += struct.pack("<I", len(block)) + block
    return out + struct.pack("<II", 0, xxhash.xxh32_intdigest(data))


def lz4_block(data: bytes) -> bytes:
    out = b""
    literals = 0
    last: dict[bytes, int] = {}
    i = 0
    while i + 16 < len(data):
        before = last.get(data[i : i + 8])
        last[data[i : i + 8]] = i
        if before is None or i - before > 65535:
            i += 1
            continue
        length = 8
        while i + length + 8 < len(data) and data[before + length] == data[i + length]:
            length += 1
        out += lz4_sequence(data[literals:i], i - before, length)
        i += length
        literals = i
    return out + lz4_sequence(data[literals:], 0, 0)


def lz4_sequence(literals: bytes, offset: int, match: int) -> bytes:
    def nibble(n: int) -> tuple[int, bytes]:
        if n < 15:
            return n, b""
        more, rest = divmod(n - 15, 255)
        return 15, b"\xff" * more + bytes([rest])

    first, more = nibble(len(literals))
    if not offset:
        return bytes([first << 4]) + more + literals
    second, further = nibble(match - 4)
    return bytes([first << 4 | second]) + more + literals + struct.pack("<H", offset) + further


def zstd_frame(data: bytes) -> bytes:
    with h5py.File("frame", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset(
            "data",
            data=np.frombuffer(data, np.uint8),
            chunks=(len(data),),
            **hdf5plugin.Zstd(),
        )
        stored: bytes = dataset.id.read_direct_chunk((0,))[1]
    return stored


COMPRESS: dict[int, Callable[[bytes], bytes]] = {
    PLAIN: bytes,
    LZ4: lz4_frame,
    2: lz4_frame,
    ZSTD: zstd_frame,
    4: zstd_frame,
}


def write_aedat4(
    path: Path,
    packets: Sequence[tuple[int, bytes]],
    *,
    compression: int = LZ4,
    xml: str | None = None,
    is_closed: bool = True,
) -> None:
    """Writes packets (number of the stream, data before compression).

    Args:
        is_closed: with the table at the end, as after a recording that was not interrupted.
    """
    xml = info({0: "EVTS"}) if xml is None else xml
    body = b""
    for number, data in packets:
        stored = COMPRESS[compression](data)
        body += struct.pack("<ii", number, len(stored)) + stored
    table_at = -1
    if is_closed:
        table_at = len(header(compression, 0, xml)) + len(body)
    table = b"a table that nobody reads" if is_closed else b""
    path.write_bytes(header(compression, table_at, xml) + body + table)


def packets_of(events: Events, size: int, number: int = 0) -> list[tuple[int, bytes]]:
    """The events in packets of `size`."""
    return [
        (number, event_packet(events.take(slice(i, i + size))))
        for i in range(0, len(events.t), size)
    ]
