"""Readers and writers on real recordings, random words, wraps and published HDF5 files."""

import hashlib
import json
import tracemalloc
from itertools import islice

import h5py
import hdf5plugin
import numpy as np
import pytest
from evspan.data_prep.recordings.base import WordReader
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording, open_writer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.event_files import (
    HEADERS,
    SIZES,
    WORDS,
    as_read,
    concatenated,
    meaning,
    random_words,
    read_by,
    write_raw,
)

KINDS = list(HEADERS)


def rows(events: Events) -> list[tuple]:
    return list(zip(*(column.tolist() for column in events), strict=True))


def events_of(t, x, y, p) -> Events:
    return Events(
        np.array(t, np.int64), np.array(x, np.uint16), np.array(y, np.uint16), np.array(p, np.uint8)
    )


def require_same(a: Events, b: Events) -> None:
    for name in Events._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


@pytest.mark.parametrize("words_at_once", [None, 31, 1009])
@pytest.mark.parametrize(
    "name", ["gen4_evt3_triggers.raw", "gen4_evt3_dense.raw", "gen3_evt2.raw", "atis_ncars.dat"]
)
def test_real_recordings_give_the_golden_columns(samples_dir, name, words_at_once):
    golden = json.loads((samples_dir / "golden.json").read_text())[name]
    opened = open_recording(samples_dir / name)
    assert isinstance(opened, WordReader)
    at_once = words_at_once and words_at_once * opened.word.itemsize
    events, recording = read_by(samples_dir / name, at_once)
    assert recording.events == events.t.size == golden["events"]
    assert (recording.first_us, recording.last_us) == (golden["t_first"], golden["t_last"])
    assert (events.x.max(), events.y.max(), events.p.sum()) == (
        golden["x_max"],
        golden["y_max"],
        golden["p_sum"],
    )
    for name, kind in zip("txyp", ("<i8", "<u2", "<u2", "u1"), strict=True):
        column = getattr(events, name).astype(kind)
        assert hashlib.sha256(column.tobytes()).hexdigest() == golden["sha256"][name], name
    assert not any(recording.dropped.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_words_are_decoded_by_the_definition_of_the_format(tmp_path, kind, seed):
    rng = np.random.default_rng(seed)
    top = 8 * np.dtype(WORDS[kind]).itemsize - 4
    start = [0x8 << top]
    if seed % 2 == 0:  # events before the first time
        start = [0x2 << top | 5, 0x1 << top | 5, 0x6 << top | 9]
    words = start + random_words(kind, rng, 3000)
    path = write_raw(tmp_path / "a.raw", kind, words)
    expected, dropped = as_read(meaning(kind, words), *SIZES[kind])
    assert dropped["outside_sensor"]
    assert bool(dropped["before_first_time"]) == (seed % 2 == 0)
    assert 0.01 < dropped["late_timestamps_raised"] / len(expected) < 0.8
    for at_once in (None, 8, 8 * int(rng.integers(2, 60))):
        events, recording = read_by(path, at_once)
        assert rows(events) == expected
        assert recording.dropped == dropped
        assert (recording.format, recording.height, recording.width) == (
            kind.removesuffix("_legacy"),
            *SIZES[kind],
        )


@pytest.mark.parametrize(("fall", "wraps"), [(0, 0), (1, 0), (2047, 0), (2048, 1), (4095, 1)])
def test_evt3_counter_falls_of_half_its_range_are_wraps(tmp_path, fall, wraps):
    words = [0x8FFF, 0x6000, 0x2001, 0x8FFF - fall, 0x6001, 0x2001]
    events, recording = read_by(write_raw(tmp_path / "a.raw", "evt3", words))
    expected = wraps * 2**24 + (4095 - fall) * 4096 + 1
    assert events.t.tolist() == [4095 * 4096, max(expected, 4095 * 4096)]
    assert recording.dropped["late_timestamps_raised"] == (expected < 4095 * 4096)


@pytest.mark.parametrize("seed", range(4))
def test_dat_records_are_decoded_by_the_definition_of_the_format(tmp_path, seed):
    rng = np.random.default_rng(seed)
    clock = 2**32 - 50_000
    loops = 0
    records = b""
    events = []
    for _ in range(2000):
        steps = [0, 1, 40, -30, -2000, 2**30]
        after = clock + int(rng.choice(steps, p=[0.3, 0.3, 0.3, 0.05, 0.03, 0.02]))
        if after >= 0:
            loops += after // 2**32
            clock = after % 2**32
        x = int(rng.integers(320))
        y = int(rng.integers(250))
        p = int(rng.integers(4))
        records += (clock | x << 32 | y << 46 | p << 60).to_bytes(8, "little")
        events.append((loops * 2**32 + clock, x, y, int(p > 0)))
    (tmp_path / "a_td.dat").write_bytes(b"% Height 240\n% Width 304\n" + bytes((0x0C, 8)) + records)
    expected, dropped = as_read(events, 240, 304)
    assert loops > 5
    assert all(dropped[k] for k in ("outside_sensor", "late_timestamps_raised"))
    for at_once in (None, 8, 8 * 37):
        read, recording = read_by(tmp_path / "a_td.dat", at_once)
        assert rows(read) == expected
        assert recording.dropped == dropped


def test_vectors_that_run_past_every_sensor_never_come_back_into_it(tmp_path):
    words = [0x8000, 0x6001, 0x0005, 0x3000, *[0x4FFF] * 11_000]  # twice around 16 bits
    events, recording = read_by(write_raw(tmp_path / "a.raw", "evt3", words))
    assert events.x.tolist() == list(range(1280))
    assert recording.dropped["outside_sensor"] == 12 * 11_000 - 1280


def test_evt21_layouts_by_the_vendors_example(tmp_path):
    """0x0102030405060708 is sent in two orders.

    GenX320 (little) sends 0807060504030201, IMX636 (legacy) sends 0403020108070605.
    """
    words = (0x8 << 60 | 3 << 32, 0x1 << 60 | 5 << 54 | 96 << 43 | 7 << 32 | 0b1001)

    def sent(word: int, order: str) -> bytes:
        first = word.to_bytes(8, "big")
        return first[::-1] if order == "little" else first[3::-1] + first[:3:-1]

    assert sent(0x0102030405060708, "little").hex() == "0807060504030201"
    assert sent(0x0102030405060708, "legacy").hex() == "0403020108070605"
    size = "% geometry 320x320\n"
    for order, header in (
        ("little", "% format EVT21;height=320;width=320\n"),
        ("legacy", f"% evt 2.1\n% endianness legacy\n{size}"),
        ("legacy", f"% evt 2.1\n% system_ID 49\n{size}"),
        ("little", f"% evt 2.1\n% system_ID 64\n{size}"),
        ("little", f"% format EVT2.1;endianness=little\n% endianness legacy\n{size}"),
    ):
        (tmp_path / "a.raw").write_bytes(
            header.encode() + b"% end\n" + b"".join(sent(word, order) for word in words)
        )
        assert rows(read_by(tmp_path / "a.raw")[0]) == [
            (3 * 64 + 5, 96, 7, 1),
            (3 * 64 + 5, 99, 7, 1),
        ], header


def test_evt3_counter_wraps_are_unwrapped_as_a_camera_sends_them(tmp_path):
    words = []
    times = []
    # A camera sends TIME_HIGH every 4096 us, events or not.
    for high in range(4000, 4000 + 3 * 4096):
        words += [0x8000 | high % 4096]
        if high % 1500 < 3:  # and is silent for 6 s at a time
            words += [0x6000 | high % 4096, 0x0001, 0x2002]
            times.append(high * 4096 + high % 4096)
    events, recording = read_by(write_raw(tmp_path / "a.raw", "evt3", words))
    assert events.t.tolist() == times
    assert times[-1] - times[0] > 2 * 2**24
    assert not any(recording.dropped.values())


@pytest.mark.parametrize(("words", "place"), [([], 0), ([0x0001], 0), ([0x6001, 0x8001], 0)])
def test_files_without_events_are_empty_recordings(tmp_path, words, place):
    events, recording = read_by(write_raw(tmp_path / "a.raw", "evt3", words))
    assert events.t.size == recording.events == place


GAPS = st.one_of(
    st.integers(0, 3),
    st.integers(0, 10_000),
    st.sampled_from([4095, 4096, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1]),
)
EVENT = st.tuples(GAPS, st.integers(0, 1279), st.integers(0, 719), st.integers(0, 1), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(EVENT, max_size=40),
    st.sampled_from(["raw", "dat", "h5"]),
    st.sampled_from([None, 2, 16, 200]),
)
def test_what_is_written_is_read(tmp_path_factory, drawn, suffix, at_once):
    gaps, x, y, p, cuts = zip(*drawn, strict=True) if drawn else ([],) * 5
    events = events_of(np.cumsum(gaps, dtype=np.int64) if drawn else [], x, y, p)
    path = tmp_path_factory.mktemp("written") / f"a.{suffix}"
    with open_writer(path, 720, 1280) as writer:
        for part in np.split(np.arange(len(gaps)), np.flatnonzero(cuts)):
            writer.write(events.take(part))
    read, recording = read_by(path, at_once)
    require_same(read, events)
    assert (recording.height, recording.width, sum(recording.dropped.values())) == (720, 1280, 0)


@pytest.mark.parametrize("suffix", ["raw", "dat", "h5"])
def test_long_recordings_keep_their_time_over_many_wraps(tmp_path, suffix):
    rng = np.random.default_rng(1)
    # 13 hours: 11 wraps of .dat, 2800 of EVT3.
    t = np.cumsum(rng.choice([0, 1, 40, 5_000, 9_000_000, 600_000_000], 400))
    assert t[-1] > 10 * 2**32
    events = events_of(
        t, rng.integers(0, 1280, 400), rng.integers(0, 720, 400), rng.integers(0, 2, 400)
    )
    with open_writer(tmp_path / f"a.{suffix}", 720, 1280) as writer:
        for part in np.array_split(np.arange(400), 7):
            writer.write(events.take(part))
    for at_once in (None, 40):
        require_same(read_by(tmp_path / f"a.{suffix}", at_once)[0], events)


@pytest.mark.parametrize("suffix", ["raw", "dat", "h5"])
def test_every_border_of_the_sensor(tmp_path, suffix):
    x, y = (a.ravel() for a in np.meshgrid([0, 1, 1278, 1279], [0, 1, 718, 719]))
    events = events_of(np.arange(16), x, y, np.arange(16) % 2)
    with open_writer(tmp_path / f"a.{suffix}", 720, 1280) as writer:
        writer.write(events)
    require_same(read_by(tmp_path / f"a.{suffix}")[0], events)


def test_chunks_are_no_larger_than_asked_for_and_come_again(tmp_path):
    with open_writer(tmp_path / "a.raw", 720, 1280) as writer:
        writer.write(
            events_of(
                np.arange(5000), np.arange(5000) % 1280, np.arange(5000) % 720, np.arange(5000) % 2
            )
        )
    recording = open_recording(tmp_path / "a.raw")
    for size in (7, 999, 1_000_000):
        chunks = list(recording.chunks(size))
        assert max(c.t.size for c in chunks) == min(size, 5000)
        assert concatenated(chunks).t.tolist() == list(range(5000))
        assert recording.events == 5000


@pytest.mark.parametrize("suffix", ["raw", "dat", "h5"])
def test_memory_does_not_grow_with_the_recording(tmp_path, suffix):
    def peak(path) -> int:
        tracemalloc.start()
        for chunk in open_recording(path).chunks(100_000):
            assert chunk.t.size <= 100_000
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached

    peaks = []
    for million in (2, 8):
        n = million * 1_000_000
        path = tmp_path / f"{million}.{suffix}"
        with open_writer(path, 720, 1280) as writer:
            for i in range(0, n, 500_000):
                t = np.arange(i, i + 500_000)
                writer.write(events_of(t, t % 1280, t // 1000 % 720, t % 2))
        peaks.append(peak(path))
    assert peaks[1] < 1.1 * peaks[0] < 100e6


def test_chunks_come_before_the_rest_of_the_file_is_read(tmp_path):
    with open_writer(tmp_path / "a.dat", 720, 1280) as writer:
        writer.write(events_of([5, 6], [1, 2], [3, 4], [0, 1]))
    with (tmp_path / "a.dat").open("r+b") as file:
        file.truncate(8 * 2**29 + len((tmp_path / "a.dat").read_bytes()))  # a hole of 4 GiB
    first = next(islice(open_recording(tmp_path / "a.dat").chunks(2), 1))
    assert first.t.tolist() == [5, 6]


def write_h5(path, columns, height=None, width=None, **options):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file.create_dataset(f"events/{name}", data=column, **options)
        for name, value in (("height", height), ("width", width)):
            if value is not None:
                file[f"events/{name}"] = value
    return path


@pytest.mark.parametrize("kind", ["i1", "i2", "u2", "<i4", ">i4", "u4", "i8", "u8", ">u2"])
def test_h5_columns_of_any_integer_type_do_not_wrap_into_the_sensor(tmp_path, kind):
    info = np.iinfo(kind)
    values = (0, 99, 100, 255, -1, 65535, 65536 + 5, 5 - 65536, info.max, info.min, 33014)
    x = [value for value in values if info.min <= value <= info.max]
    columns = {
        "t": np.arange(len(x)),
        "x": np.array(x, kind),
        "y": np.zeros(len(x), kind),
        "p": np.ones(len(x), "i1"),
    }
    for swap in (False, True):
        if swap:
            columns["x"], columns["y"] = columns["y"], columns["x"]
        events, recording = read_by(write_h5(tmp_path / "a_td.h5", columns, 100, 100))
        inside = [i for i, v in enumerate(x) if 0 <= v < 100]
        assert events.t.tolist() == inside
        assert (events.y if swap else events.x).tolist() == [x[i] for i in inside]
        assert recording.dropped["outside_sensor"] == len(x) - len(inside)


@pytest.mark.parametrize("kind", ["i4", "u4", ">i8", "u8", "i8"])
def test_h5_as_published(tmp_path, kind):
    """Late times of several types, p as -1/+1, no sensor size, several compressions."""
    t = np.array([3, 7, 5, 5, 9, 8, 10], kind)
    columns = {
        "t": t,
        "x": np.full(7, 1279, "u2"),
        "y": np.full(7, 719, "u2"),
        "p": np.array([-1, 1, -1, 1, 1, -1, 1], "i1"),
    }
    darker_is_0 = [0, 1, 0, 1, 1, 0, 1]
    for options in ({}, {"compression": "gzip"}, hdf5plugin.Blosc(cname="zstd"), {"chunks": (2,)}):
        for at_once in (None, 3):
            events, recording = read_by(
                write_h5(tmp_path / "a_td.h5", columns, **dict(options)), at_once
            )
            assert (recording.height, recording.width, recording.format) == (720, 1280, "h5")
            assert events.t.tolist() == [3, 7, 7, 7, 9, 9, 10]
            assert events.p.tolist() == darker_is_0
            assert recording.dropped == {
                "outside_sensor": 0,
                "before_first_time": 0,
                "time_spikes": 0,
                "late_timestamps_raised": 3,
                "late_by_1_ms_or_more": 0,
            }
    columns["p"] = columns["p"] > 0  # bool
    events, _ = read_by(write_h5(tmp_path / "b_td.h5", columns, 800, 1300))
    assert events.p.tolist() == darker_is_0


def test_metavision_hdf5_without_its_codec(tmp_path):
    kind = np.dtype(
        {
            "names": ["x", "y", "p", "t"],
            "formats": ["<u2", "<u2", "<i2", "<i8"],
            "offsets": [0, 2, 4, 8],
        }
    )
    data = np.array([(1, 2, 0, 10), (639, 479, 1, 11), (640, 1, 1, 12), (5, 6, 1, 9)], kind)
    for options, attributes, size in (
        ({}, {"geometry": "640x480"}, (480, 640)),
        ({"compression": "gzip"}, {}, (720, 1280)),
        ({"chunks": (1,)}, {"format": np.bytes_("EVT3;height=480;width=640")}, (480, 640)),
    ):
        with h5py.File(tmp_path / "a.hdf5", "w") as file:
            file.create_dataset("CD/events", data=data, **options)
            file.attrs.update(attributes)
        events, recording = read_by(tmp_path / "a.hdf5", 3)
        assert (recording.height, recording.width) == size
        in_order = [(10, 1, 2, 0), (11, 639, 479, 1), (12, 640, 1, 1)]
        inside = [row for row in in_order if row[1] < size[1]]
        assert rows(events) == [*inside, (events.t[-1], 5, 6, 1)]
        assert recording.dropped["late_timestamps_raised"] == 1
