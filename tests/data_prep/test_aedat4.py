"""AEDAT 4: files written byte by byte are read back; damaged ones are refused in one line."""

import base64
import tracemalloc

import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.decompression import (
    CompressionError,
    decompress_lz4,
    decompress_zstd,
)
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording
from support.aedat4_files import (
    COMPRESS,
    LZ4,
    PLAIN,
    ZSTD,
    event_packet,
    info,
    lz4_frame,
    packets_of,
    write_aedat4,
    zstd_frame,
)
from support.event_files import concatenated

# bytes(range(256)) * 300 + b"the end" * 50, written by the reference library in linked blocks of
# 64 KiB with checksums, without its size.
REFERENCE_FRAME = (
    "BCJNGFRArgoCAAD/8QABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4fICEiIyQlJicoKSorLC0uLzAxMjM0"
    "NTY3ODk6Ozw9Pj9AQUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVpbXF1eX2BhYmNkZWZnaGlqa2xtbm9wcXJzdHV2"
    "d3h5ent8fX5/gIGCg4SFhoeIiYqLjI2Oj5CRkpOUlZaXmJmam5ydnp+goaKjpKWmp6ipqqusra6vsLGys7S1tre4"
    "ubq7vL2+v8DBwsPExcbHyMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5ufo6err7O3u7/Dx8vP09fb3+Pn6"
    "+/z9/v8AAf//////////////////////////////////////////////////////////////////////////////"
    "////////////////////////////////////////////////////////////////////////////////////////"
    "////////////////////////////////////////////////////////////////////////////////////////"
    "/////////////////////////////////////////////////////////////////////////////////////+dQ"
    "+/z9/v8pEmdMQgAAAA8A////////////////////////////////////////////////////////////GX90aGUg"
    "ZW5kBwD/QFBlIGVuZFTINvwAAAAAJxQ98w=="
)
REFERENCE = bytes(range(256)) * 300 + b"the end" * 50


def some_events(n: int, first_us: int = 1_700_000_000_000_000) -> Events:
    """With the times of a Unix clock, as DV writes them."""
    rng = np.random.default_rng(n)
    return Events(
        first_us + np.cumsum(rng.integers(0, 50, n)),
        rng.integers(0, 346, n).astype(np.uint16),
        rng.integers(0, 260, n).astype(np.uint16),
        rng.integers(0, 2, n).astype(np.uint8),
    )


def require_same(a: Events, b: Events) -> None:
    for name in Events._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("is_closed", [True, False])
def test_a_written_file_is_read_back(tmp_path, compression, is_closed):
    events = some_events(5000)
    path = tmp_path / "a.aedat4"
    packets = [*packets_of(events, 700), (0, event_packet(some_events(0)))]
    write_aedat4(path, packets, compression=compression, is_closed=is_closed)
    recording = open_recording(path)
    require_same(concatenated(recording.chunks()), events)
    assert (recording.height, recording.width, recording.format) == (260, 346, "aedat4")
    assert recording.warnings() == {}


def test_other_streams_are_skipped_and_further_sensors_reported(tmp_path):
    events = some_events(900)
    frames = (1, b"frames of pixels, in another layout")
    others = (7, event_packet(some_events(50)))
    packets = packets_of(events, 100, number=3)
    xml = info({1: "FRME", 3: "EVTS", 7: "EVTS"})
    path = tmp_path / "a.aedat4"
    write_aedat4(path, [frames, *packets[:5], others, frames, *packets[5:]], xml=xml)
    recording = open_recording(path)
    require_same(concatenated(recording.chunks()), events)
    text = recording.warnings()["streams"]
    assert text.startswith("the file has 2 streams of events, 3 (DAVIS346_3), 7 (DAVIS346_7); only")
    write_aedat4(path, [frames], xml=info({1: "FRME"}))
    with pytest.raises(RecordingError, match="no stream of events"):
        open_recording(path)


def test_a_size_that_is_not_stated_is_assumed_or_given(tmp_path):
    path = tmp_path / "a.aedat4"
    write_aedat4(path, packets_of(some_events(9), 9), xml=info({0: "EVTS"}, None))
    assert open_recording(path).size_is_assumed
    assert open_recording(path, unstated_size=[260, 346]).width == 346
    negative = some_events(9)._replace(x=np.full(9, -5, np.int16))
    write_aedat4(path, packets_of(negative, 9))
    recording = open_recording(path)
    assert not concatenated(recording.chunks()).t.size
    assert recording.dropped["outside_sensor"] == 9


def test_memory_does_not_grow_with_the_recording(tmp_path):
    packet = (0, event_packet(some_events(1000)))
    peaks = []
    for packets in (20, 200):
        path = tmp_path / f"{packets}.aedat4"
        write_aedat4(path, [packet] * packets, compression=PLAIN)
        recording = open_recording(path)
        tracemalloc.start()
        assert sum(chunk.t.size for chunk in recording.chunks()) == 1000 * packets
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_lz4_frames_of_the_reference_library_are_read():
    frame = base64.b64decode(REFERENCE_FRAME)
    assert decompress_lz4(frame, 1 << 20).tobytes() == REFERENCE
    for at in (5, 6, 40, 300, len(frame) - 2):
        damaged = bytearray(frame)
        damaged[at] ^= 16
        with pytest.raises(CompressionError):
            decompress_lz4(bytes(damaged), 1 << 20)
    with pytest.raises(CompressionError, match="more than 1000 bytes"):
        decompress_lz4(frame, 1000)


@pytest.mark.parametrize("length", [0, 1, 14, 15, 16, 300, 70_000])
def test_lz4_round_trips(length):
    rng = np.random.default_rng(length)
    data = bytes(rng.integers(0, 3, length).astype(np.uint8))
    assert decompress_lz4(lz4_frame(data), 1 << 20).tobytes() == data


def test_zstandard_expands_to_the_limit_and_no_further():
    frame = zstd_frame(bytes(70_000))
    assert decompress_zstd(frame, 70_000).tobytes() == bytes(70_000)
    with pytest.raises(CompressionError, match="70000 bytes, more than 69999"):
        decompress_zstd(frame, 69_999)
    with pytest.raises(CompressionError):
        decompress_zstd(frame[:-3], 70_000)
    with pytest.raises(CompressionError, match="no Zstandard frame"):
        decompress_zstd(b"\0" + frame, 70_000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b"AER-DAT4.0", b"AER-DAT3.1"), "AEDAT recording of jAER"),
        (lambda data: data[:30], "header"),
        (lambda data: data[:-2000], r"is cut off: its header has the table of packets at byte"),
        (lambda data: data.replace(b"<dv ", b"<!DOCTYPE d><dv "), "header"),
        (lambda data: data.replace(b"</dv>", b"</dw>"), "XML in its header is damaged"),
        (lambda data: data.replace(b"<attr key", b"<!ENTITY  ", 1), "defines entities"),
        (lambda data: data.replace(b'">346<', b'">-46<'), "sensor's size is height '260' and wid"),
        (lambda data: data.replace(b"EVTS\x06", b"FRME\x06"), "does not contain events"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "a.aedat4"
    write_aedat4(path, packets_of(some_events(400), 100), compression=PLAIN)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordingError, match=message) as caught:
        list(open_recording(path).chunks())
    assert str(path) in str(caught.value)


def test_an_interrupted_recording_can_be_cut_as_the_message_says(tmp_path):
    path = tmp_path / "a.aedat4"
    events = some_events(400)
    write_aedat4(path, packets_of(events, 100), compression=LZ4, is_closed=False)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RecordingError, match=r"keep the whole packets: head -c \d+") as caught:
        list(open_recording(path).chunks())
    keep = int(str(caught.value).split("head -c ")[1])
    path.write_bytes(path.read_bytes()[:keep])
    require_same(concatenated(open_recording(path).chunks()), events.take(slice(0, 300)))


@pytest.mark.parametrize(
    ("compression", "magic", "message"),
    [(LZ4, b"\x04\x22\x4d\x18", "no LZ4 frame"), (ZSTD, b"\x28\xb5\x2f\xfd", "no Zstandard frame")],
)
def test_a_damaged_packet_is_named_by_its_place(tmp_path, compression, magic, message):
    path = tmp_path / "a.aedat4"
    write_aedat4(path, packets_of(some_events(400), 100), compression=compression)
    data = bytearray(path.read_bytes())
    at = data.rindex(magic)
    data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(RecordingError, match=rf"packet at byte {at - 8} .*{message}"):
        list(open_recording(path).chunks())
