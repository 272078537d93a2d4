"""What a recording says of itself: assumed sizes, doubtful units, unknown times, foreign content."""

import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import ConfigError, RecordingError
from evspan.conf.schema.prep import DatasetConfig
from evspan.data_prep import hdf5_files
from evspan.data_prep.foreign_content import describe_foreign_content
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.recordings.rates import time_unit_warning
from support.event_files import read_by, write_raw

T = np.arange(3000) * 100
POINTERS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8366716\n"


def h5_file(path: Path, **columns) -> Path:
    """events/{t,x,y,p} of 3000 events, and what else is given by its path."""
    events = {"t": T, "x": T // 100 % 640, "y": T // 100 % 480, "p": T // 100 % 2}
    with h5py.File(path, "w") as file:
        for name, column in events.items():
            if columns.get(name, column) is not None:
                file[f"events/{name}"] = columns.get(name, column)
        for name in columns.keys() - events.keys():
            file[name] = columns[name]
    return path


def warnings_of(path: Path, **options) -> dict[str, str]:
    recording = open_recording(path, **options)
    for _ in recording.chunks():
        pass
    return recording.warnings()


@pytest.mark.parametrize("kind", ["h5", "dat"])
def test_an_assumed_sensor_size_is_reported_and_can_be_given(tmp_path, kind):
    path = tmp_path / f"a_td.{kind}"
    if kind == "h5":
        h5_file(path)
    else:
        halves = np.stack([T, (T // 100 % 640) | (T // 100 % 480) << 14], 1).astype("<u4")
        path.write_bytes(b"% Version 2\n\x0c\x08" + halves.tobytes())
    text = warnings_of(path)["sensor_size"]
    assert "1280 x 720 is assumed" in text
    assert "reach x 639 and y 479" in text
    assert "dataset.sensor_size=[HEIGHT,WIDTH]" in text
    assert "sensor_size" not in warnings_of(path, unstated_size=[480, 640])
    assert open_recording(path, unstated_size=[480, 640]).width == 640


def test_a_stated_size_counts_more_than_a_given_one(tmp_path):
    path = h5_file(tmp_path / "a_td.h5", **{"events/height": 480, "events/width": 640})
    recording = open_recording(path, unstated_size=[100, 100])
    assert (recording.height, recording.width, recording.size_is_assumed) == (480, 640, False)
    for size in ([480], [0, 640], [480, 640, 1], [480, 10_000]):
        with pytest.raises(ConfigError, match="dataset.sensor_size"):
            DatasetConfig(sensor_size=size)


def test_a_raw_file_without_a_size_is_read_with_a_given_one(tmp_path):
    path = write_raw(tmp_path / "a.raw", "evt3", [0x8001, 0x6002, 0x2003], "% evt 3.0\n% end\n")
    with pytest.raises(RecordingError, match="sensor_size"):
        open_recording(path)
    assert open_recording(path, unstated_size=[480, 640]).height == 480


@pytest.mark.parametrize(
    ("events", "span_us", "part"),
    [
        (30_000, 1_200_000_000, "likely nanoseconds (then they span 1.2 s)"),
        (600_000_000, 60_000_000_000, "likely nanoseconds (then they span 60 s)"),
        (10_000_000, 10_000, "likely milliseconds or seconds"),
        (10_000_000, 10, "likely milliseconds or seconds"),
        (600_000_000, 60_000_000, ""),  # 10 M/s for a minute
        (60_000_000_000, 600_000_000, ""),  # 100 M/s for ten minutes
        (60_000_000_000, 16_000_000_000, ""),  # 3.75 M/s for 4.4 h: no sensor puts out 3.75 G/s
        (36_000_000, 3_600_000_000, ""),  # noise alone, for an hour
        (50_000, 50_000_000, ""),
        (1, 0, ""),
        (100, 0, ""),
    ],
)
def test_implausible_rates_are_reported(events, span_us, part):
    text = time_unit_warning(events, span_us, 1280 * 720)
    assert part in text
    assert bool(text) == bool(part)


def test_events_before_the_first_time_word_are_reported(tmp_path):
    path = write_raw(tmp_path / "a.raw", "evt3", [0x0001, 0x2003, 0x2004])
    assert "2 of 2 events come before the first time word" in warnings_of(path)["unknown_times"]
    words = [0x2003, 0x8001, *([0x2004] * 2000)]
    assert warnings_of(write_raw(tmp_path / "b.raw", "evt3", words)) == {}


# -- HDF5 layouts ----------------------------------------------------------------------------------
def test_dsec_is_read_with_its_offset(tmp_path):
    path = h5_file(tmp_path / "a.h5", t_offset=np.int64(36_607_300_000), ms_to_idx=np.arange(5))
    events, recording = read_by(path)
    assert events.t.tolist() == (T + 36_607_300_000).tolist()
    assert (recording.height, recording.width) == (480, 640)
    assert "640 x 480 is assumed" in recording.warnings()["sensor_size"]
    for wrong in (1.5, np.arange(3), 1 << 60, "1"):
        with pytest.raises(RecordingError, match="t_offset"):
            open_recording(h5_file(tmp_path / "b.h5", t_offset=wrong))


@pytest.mark.parametrize("name", ["events", "CD/events", "table"])
def test_tables_that_expand_from_a_few_bytes_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(hdf5_files, "SMALL_BYTES", 1 << 20)
    kind = np.dtype([("t", "i8"), ("x", "u2"), ("y", "u2"), ("p", "u1")])
    values = np.zeros((1 << 20, 4), "i4") if name == "table" else np.zeros(1 << 20, kind)
    place = name.replace("table", "events")
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset(place, data=values, chunks=values.shape, compression="gzip")
    with pytest.raises(RecordingError, match=f"/{place} would expand from .* over 1000 times"):
        open_recording(path)


def test_compound_events_and_v2e_are_read(tmp_path):
    expected, _ = read_by(h5_file(tmp_path / "a.h5"))
    columns = [expected.p, expected.t, expected.x, expected.y]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        kind = [("polarity", "?"), ("timestamp", "u4"), ("x", "u2"), ("y", "u2")]
        file["events"] = np.rec.fromarrays(columns, np.dtype(kind))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        table = np.stack([expected.t, expected.x, expected.y, expected.p], 1)
        file["events"] = np.where(table == table, table, 0).astype("u4")
        file["events"][expected.p == 0, 3] = (1 << 32) - 1  # v2e's -1
    for name in ("b.h5", "c.h5"):
        for at_once in (None, 100):
            events, _ = read_by(tmp_path / name, at_once)
            for column, same in zip(events, expected, strict=True):
                np.testing.assert_array_equal(column, same)


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        (["prophesee/left/t", "prophesee/left/x"], ["prophesee/left/t", "layout of M3ED"]),
        (["davis/left/events"], ["davis/left/events", "layout of MVSEC"]),
        (["events/xs", "events/ts"], ["lacks events/t", "events/xs", "rpg"]),
        (["data"], ["it contains data", "preprocessed frames"]),
        (["a\x1b[31m/b"], ["a\\x1b[31m/b"]),
        ([f"n{i}" for i in range(300)], ["n0, n1", ", ..."]),
        ([], ["lacks events/t"]),
    ],
)
def test_other_layouts_are_refused_with_what_they_contain(tmp_path, members, parts):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for member in members:
            file[member] = np.arange(3)
    with pytest.raises(RecordingError) as caught:
        open_recording(tmp_path / "a.h5")
    for part in (str(tmp_path / "a.h5"), *parts):
        assert part in str(caught.value)


def test_columns_in_other_files_or_never_written_are_refused(tmp_path):
    h5_file(tmp_path / "other.h5")
    layout = h5py.VirtualLayout((3000,), "i8")
    layout[:] = h5py.VirtualSource("gone.h5", "t", shape=(3000,))
    for name, part in (
        ("link", "link to another file"),
        ("virtual", "virtual dataset"),
        ("external", "in another file"),
        ("unwritten", "only 0 were written"),
    ):
        path = h5_file(tmp_path / f"{name}.h5", t=None)
        with h5py.File(path, "a") as file:
            if name == "link":
                file["events/t"] = h5py.ExternalLink("other.h5", "events/t")
            elif name == "virtual":
                file.create_virtual_dataset("events/t", layout)
            elif name == "external":
                file.create_dataset("events/t", (3000,), "i8", external=[("x.bin", 0, 24_000)])
            else:
                file.create_dataset("events/t", (3000,), "i8")
        with pytest.raises(RecordingError, match=part) as caught:
            open_recording(path)
        assert f"{path}: /events/t" in str(caught.value)


# -- polarity --------------------------------------------------------------------------------------
P = T // 100 % 3 == 0


@pytest.mark.parametrize(
    ("dark", "bright", "kind"),
    [
        *((0, 1, kind) for kind in ("u1", "?", "i2", "u8", ">i4")),
        *((-1, 1, kind) for kind in ("i1", "i2", "i8")),
        *((0, 255, kind) for kind in ("u1", "i2", "u4")),
        (255, 1, "u1"),
        (255, 1, "i2"),
        (65_535, 1, "u2"),
        (4_294_967_295, 1, "u4"),
        (4_294_967_295, 1, "i8"),
        (2**64 - 1, 1, "u8"),
    ],
)
def test_codings_of_polarity(tmp_path, dark, bright, kind):
    values = np.array([dark, bright], object)[P.astype(int)].astype(kind)
    for at_once in (None, 7):
        events, _ = read_by(h5_file(tmp_path / "a.h5", p=values), at_once)
        np.testing.assert_array_equal(events.p, P)
    for constant, expected in ((dark, 0), (bright, 1)):
        path = h5_file(tmp_path / "a.h5", p=np.full(3000, constant).astype(kind))
        if constant == 255:  # darker or brighter
            with pytest.raises(RecordingError, match="polarities p are 255"):
                read_by(path)
        else:
            assert set(read_by(path)[0].p.tolist()) == {expected}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1, 2], "1, 2"),
        ([0, 1, 2, 3], "0, 1, 2, 3"),
        ([-1, 0], "-1, 0"),
        ([-1, 0, 1], "-1, 0, 1"),
        ([0, 65_535], "0, 65535"),
        ([7], "7"),
        (range(20), "0, 1, 2, 3, 4, 5, ..."),
    ],
)
def test_other_polarities_are_refused_with_their_values(tmp_path, values, found):
    p = np.resize(np.array(values, np.int32), 3000)
    with pytest.raises(RecordingError) as caught:
        read_by(h5_file(tmp_path / "a.h5", p=p))
    assert f"polarities p are {found}" in str(caught.value)


def test_a_polarity_that_contradicts_those_before_has_its_place(tmp_path):
    for p, part in (
        ([0, 1, 1] * 999 + [0, 1, 255], "0, 1, 255 (event 2999 has 255)"),
        ([-1, 1, 1] * 999 + [0, 1, 1], "-1, 0, 1 (event 2997 has 0)"),
    ):
        path = h5_file(tmp_path / "a.h5", p=np.array(p, np.int16))
        with pytest.raises(RecordingError) as caught:
            read_by(path, 100)
        assert part in str(caught.value)


# -- foreign content -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is empty (0 bytes)"),
        (POINTERS, "git lfs pull"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "Zstandard"),
        (b"PK\x03\x04" + bytes(50), "ZIP archive"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"\n <html>", "is a web page"),
        (bytes(5000), "zeros only"),
        (b"\x93NUMPY\x01\x00", "NumPy array"),
        (b"t,x,y,p\n0,1,2,1\n", "text file that begins with 't,x,y,p'"),
        (b"#!AER-DAT3.1\r\n", "AEDAT"),
    ],
)
@pytest.mark.parametrize("suffix", ["raw", "dat", "h5", "hdf5"])
def test_what_a_file_contains_instead_is_named(tmp_path, data, part, suffix):
    path = tmp_path / f"a_td.{suffix}"
    path.write_bytes(data)
    with pytest.raises(RecordingError) as caught:
        open_recording(path)
    assert str(caught.value).startswith(f"{path} is ") or "zeros" in part
    assert part in str(caught.value)


def test_a_numpy_array_is_not_told_to_have_the_suffix_that_it_has(tmp_path):
    np.save(tmp_path / "a_bbox.npy", np.zeros(3))
    with pytest.raises(
        RecordingError, match=r"\.npy; .*is a NumPy array\. .*of \.npz with"
    ) as caught:
        open_recording(tmp_path / "a_bbox.npy")
    assert "Give it the suffix" not in str(caught.value)


def test_recordings_under_another_formats_suffix_are_named(tmp_path):
    write_raw(tmp_path / "a.h5", "evt3", [0x8001])
    with pytest.raises(RecordingError, match="header of a Prophesee recording"):
        open_recording(tmp_path / "a.h5")
    h5_file(tmp_path / "a.raw")
    with pytest.raises(RecordingError, match="is an HDF5 file"):
        open_recording(tmp_path / "a.raw")
    h5_file(tmp_path / "b.h5")
    assert describe_foreign_content(tmp_path / "b.h5", expected=b"\x89HDF") == ""
    (tmp_path / "c").write_bytes(b"\x01\x02\xff")
    assert describe_foreign_content(tmp_path / "c") == ""
