import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.errors import BoxesError, UserError
from evspan.conf.schema.prep import TimeUnit
from evspan.data_prep.labels.box_files import (
    NO_TRACK,
    RAW_BOX,
    find_boxes,
    read_boxes,
    recording_name,
    write_boxes,
)

KINDS = {name: RAW_BOX[name].str for name in RAW_BOX.names}


def table(n: int = 3, **columns) -> np.ndarray:
    """Boxes as a dict of columns makes them: field order and types are those of the dict."""
    plain = {
        "t": np.arange(n, dtype="<i8") * 1000,
        **{k: np.arange(n, dtype="<f4") + i for i, k in enumerate("xywh")},
        "class_id": np.ones(n, "<u4"),
    }
    columns = {k: np.asarray(v) for k, v in {**plain, **columns}.items() if v is not None}
    out = np.empty(n, [(name, column.dtype, column.shape[1:]) for name, column in columns.items()])
    for name, column in columns.items():
        out[name] = column
    return out


def saved(path: Path, array: np.ndarray, **how) -> Path:
    np.save(path, array, **how)
    return path


def refused(path: Path, *parts: str) -> None:
    with warnings.catch_warnings(), pytest.raises(BoxesError) as caught:
        warnings.simplefilter("error")
        read_boxes(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for words in parts:
        assert words in message, message


def test_prophesees_layout_comes_back_as_it_is(tmp_path):
    rng = np.random.default_rng(0)
    boxes = np.zeros(50, RAW_BOX)
    for name in RAW_BOX.names:
        boxes[name] = (
            np.sort(rng.integers(0, 2**31, 50)) if name == "t" else rng.integers(0, 1000, 50) / 4
        )
    write_boxes(tmp_path / "a_bbox.npy", boxes)
    assert np.load(tmp_path / "a_bbox.npy").dtype == RAW_BOX
    read = read_boxes(tmp_path / "a_bbox.npy")
    np.testing.assert_array_equal(read, boxes)
    assert read.dtype == RAW_BOX
    assert read.flags.writeable


def test_the_published_files_pad_each_box_to_40_bytes(tmp_path):
    boxes = np.zeros(3, RAW_BOX)
    boxes["t"], boxes["track_id"] = range(3), range(3)
    padded = saved(tmp_path / "a_bbox.npy", boxes.astype(np.dtype(RAW_BOX.descr, align=True)))
    assert np.load(padded).itemsize == 40
    np.testing.assert_array_equal(read_boxes(padded), boxes)


@pytest.mark.parametrize("seed", range(5))
def test_fields_in_any_order_of_any_type_under_older_names_with_others_between(tmp_path, seed):
    rng = np.random.default_rng(seed)
    n = 500
    columns = {
        "ts": (rng.integers(0, 50, n) * 100).astype(rng.choice(["<u8", ">i4", "<f8"])),
        **{k: rng.integers(0, 100, n).astype(rng.choice(["<f8", "<i2", "f2"])) for k in "xywh"},
        "class_id": rng.integers(0, 7, n).astype(rng.choice(["u1", "<i8", "<f4"])),
        "track_id": rng.integers(0, 99, n).astype("<i4"),
        "confidence": rng.random(n),
        "invalid": np.array(["no"] * n),
        "corners": rng.random((n, 4, 2)),
    }
    names = rng.permutation(list(columns)).tolist()
    array = np.empty(n, [(k, columns[k].dtype, columns[k].shape[1:]) for k in names])
    for k in names:
        array[k] = columns[k]
    read = read_boxes(saved(tmp_path / "a_bbox.npy", array))
    order = sorted(
        range(n), key=lambda i: columns["ts"][i]
    )  # Python's sort keeps the order of equal times
    for ours, theirs in {
        "t": "ts",
        "class_confidence": "confidence",
        "x": "x",
        "h": "h",
        "class_id": "class_id",
    }.items():
        assert read[ours].tolist() == columns[theirs][order].astype(KINDS[ours]).tolist(), ours
    assert read["track_id"].tolist() == columns["track_id"][order].tolist()


def test_optional_fields_and_both_names(tmp_path):
    read = read_boxes(saved(tmp_path / "a.npy", table()))
    assert read["track_id"].tolist() == [0] * 3
    assert read["class_confidence"].tolist() == [1.0] * 3
    both = table(ts=np.full(3, 9), confidence=np.zeros(3), class_confidence=np.full(3, 0.5))
    read = read_boxes(saved(tmp_path / "b.npy", both))
    assert read["t"].tolist() == [0, 1000, 2000]
    assert read["class_confidence"].tolist() == [0.5] * 3


@pytest.mark.parametrize("n", [0, 1])
def test_few_boxes(tmp_path, n):
    assert read_boxes(saved(tmp_path / "a.npy", table(n))).size == n


def test_fractions_of_a_microsecond_are_rounded(tmp_path):
    assert read_boxes(saved(tmp_path / "a.npy", table(t=[16666.67, 33333.33, 50000.0])))[
        "t"
    ].tolist() == [16667, 33333, 50000]


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (
            {"t": None},
            [
                "lacks the field t;",
                "it has x, y, w, h, class_id",
                "Boxes need t, x, y, w, h, class_id",
            ],
        ),
        ({"w": None, "class_id": None}, ["lacks the fields w, class_id"]),
        (
            {"w": [1, np.nan, np.inf]},
            ["2 of 3 boxes have a w", "first nan in row 1", "finite", "Remove or correct"],
        ),
        ({"x": [0, 0, -np.inf]}, ["1 of 3 boxes have a x", "first -inf in row 2"]),
        ({"h": [1e39, 0, 0]}, ["have a h", "first inf in row 0"]),
        (
            {"class_id": [0, -1, 2]},
            ["1 of 3 boxes have a class_id", "first -1 in row 1", "0 to 2**32 - 1"],
        ),
        ({"class_id": [0, 1, np.nan]}, ["have a class_id", "first nan in row 2"]),
        ({"class_id": [0, 1, 2**32]}, ["have a class_id", "first 4294967296 in row 2"]),
        ({"class_id": np.array([0, 1, 2**32], "u8")}, ["first 4294967296 in row 2"]),
        ({"class_id": [0, 1, 1.5]}, ["have a class_id", "first 1.5 in row 2", "whole number"]),
        ({"class_id": [0, 1, np.inf]}, ["first inf in row 2"]),
        ({"track_id": ["a", "b", "c"]}, ["'track_id' holds <U1"]),
        ({"t": [0, -5, 7]}, ["1 of 3 boxes have a t", "first -5 in row 1"]),
        ({"t": None, "ts": [0, -5, 7]}, ["1 of 3 boxes have a ts", "first -5 in row 1"]),
        ({"t": [0, 1e30, 7]}, ["have a t", "first 1e+30 in row 1"]),
        ({"t": [0, 2.0**63, 7]}, ["have a t", "row 1"]),
        ({"t": np.array([0, 2**63, 7], "u8")}, ["have a t", "first 9223372036854775808 in row 1"]),
        ({"t": [0, np.nan, 7]}, ["have a t", "first nan in row 1"]),
        ({"t": [np.float16(np.inf)] * 3}, ["3 of 3 boxes have a t"]),
        ({"class_id": ["car", "car", "car"]}, ["'class_id' holds <U3"]),
        ({"x": np.ones(3, complex)}, ["'x' holds complex128"]),
        ({"x": np.ones(3, bool)}, ["'x' holds bool"]),
        ({"t": np.array([1, 2, 3], "M8[us]")}, ["'t' holds datetime64[us]"]),
        ({"y": np.zeros((3, 2))}, ["'y' holds float64 of shape (2,)", "number per box"]),
    ],
)
def test_values_that_are_no_boxes_are_refused_and_never_wrap_around(tmp_path, columns, parts):
    refused(saved(tmp_path / "a_bbox.npy", table(**columns)), *parts)


def test_the_largest_values_that_fit(tmp_path):
    read = read_boxes(
        saved(tmp_path / "a.npy", table(t=[0, 1, 2**62], class_id=np.array([0, 1, 2**32 - 1])))
    )
    assert read["t"].tolist() == [0, 1, 2**62]
    assert read["class_id"].tolist() == [0, 1, 2**32 - 1]


@pytest.mark.parametrize(
    ("tracks", "expected"),
    [
        ([-1, -1, 3], [NO_TRACK, NO_TRACK, 3]),
        ([np.nan, 2.0, -1.0], [NO_TRACK, 2, NO_TRACK]),
        (np.array([-1, 5, 5], "i4"), [NO_TRACK, 5, 5]),
        (np.array([2**32 - 1, 0, 7], "u4"), [NO_TRACK, 0, 7]),
        (np.array([2**63, 5, 2**63], "u8"), [1, 0, 1]),
        (np.array([2**40, -1, 2**31], "i8"), [1, NO_TRACK, 0]),
        ([1.5, 1.5, 0.0], [1, 1, 0]),
        (np.array([np.inf, 1, -np.inf]), [1, 0, NO_TRACK]),
    ],
)
def test_boxes_without_a_track_and_with_ids_of_any_size_are_read(tmp_path, tracks, expected):
    read = read_boxes(saved(tmp_path / "a_bbox.npy", table(track_id=tracks)))
    assert read["track_id"].tolist() == expected


def test_confidences_that_are_no_numbers_get_the_default(tmp_path):
    columns = table(class_confidence=[np.nan, 0.5, np.inf])
    read = read_boxes(saved(tmp_path / "a_bbox.npy", columns))
    assert read["class_confidence"].tolist() == [1, 0.5, 1]


@pytest.mark.parametrize(
    ("unit", "times"),
    [
        (TimeUnit.us, [100_000, 250_000, 400_001]),
        (TimeUnit.ms, [100, 250, 400.001]),
        (TimeUnit.s, [0.1, 0.25, 0.400001]),
        (TimeUnit.ns, [100_000_400, 249_999_600, 400_001_000]),
    ],
)
@pytest.mark.parametrize("offset", [0, 700_000, -150_000])
def test_times_are_converted_to_microseconds_and_shifted(tmp_path, unit, times, offset):
    path = saved(tmp_path / "a_bbox.npy", table(t=times))
    read = read_boxes(path, time_unit=unit, offset_us=offset)
    assert (read["t"] - offset).tolist() == [100_000, 250_000, 400_001]


def test_times_that_the_unit_or_the_offset_takes_out_of_range_are_refused(tmp_path):
    path = saved(tmp_path / "a_bbox.npy", table(t=[0, 1, 2**60]))
    assert read_boxes(path)["t"][-1] == 2**60
    with pytest.raises(BoxesError, match=r"1 of 3 boxes have a t that does not fit"):
        read_boxes(path, time_unit=TimeUnit.s)
    late = saved(tmp_path / "b_bbox.npy", table(t=[0, 1, 2**63 - 1]))
    with pytest.raises(BoxesError, match="does not fit"):
        read_boxes(late, offset_us=2**53)


def test_unsorted_and_big_endian_columns_are_read(tmp_path):
    columns = table(t=np.array([30, 10, 20], ">i8"), x=np.array([3, 1, 2], ">f8"))
    read = read_boxes(saved(tmp_path / "a_bbox.npy", columns))
    assert read[["t", "x"]].tolist() == [(10, 1), (20, 2), (30, 3)]


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.zeros((4, 8)), ["float64 of shape (4, 8)", "structured array"]),
        (np.zeros((2, 2), RAW_BOX), ["of shape (2, 2)"]),
        (np.zeros((), RAW_BOX), ["of shape ()"]),
        (np.array([b"boxes"]), ["|S5 of shape (1,)"]),
    ],
)
def test_arrays_of_another_form(tmp_path, array, parts):
    refused(saved(tmp_path / "a_bbox.npy", array), *parts)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(tmp_path):
    fuse = tmp_path / "went off"
    saved(
        tmp_path / "field_bbox.npy",
        table(note=np.array([Bomb(fuse)] * 3, object)),
        allow_pickle=True,
    )
    saved(tmp_path / "object_bbox.npy", np.array([Bomb(fuse)], object), allow_pickle=True)
    (tmp_path / "pickle_bbox.npy").write_bytes(pickle.dumps(Bomb(fuse)))
    for path in tmp_path.glob("*.npy"):
        refused(path, "structured array with the fields t, x, y, w, h")
        assert not fuse.exists()
    np.load(tmp_path / "object_bbox.npy", allow_pickle=True)
    assert fuse.exists()  # it was live


def test_files_that_are_no_arrays(tmp_path):
    refused(tmp_path / "none_bbox.npy", "is not there")
    for name, data in (
        ("empty", b""),
        ("text", b"t,x,y,w,h\n"),
        ("magic", b"\x93NUMPY"),
        ("zip", b"PK\x03\x04 damaged"),
        ("header", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', "),
    ):
        (tmp_path / f"{name}_bbox.npy").write_bytes(data)
        refused(tmp_path / f"{name}_bbox.npy", "no plain .npy", "structured array with the fields")
    np.savez(tmp_path / "a.npz", boxes=table())
    npz = (tmp_path / "a.npz").rename(tmp_path / "npz_bbox.npy")
    refused(npz, "no plain .npy", "is a ZIP archive", "save the array of boxes with numpy.save")
    for name, data, remedy in (
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("page", b"<!DOCTYPE html><html>login</html>", "is a web page"),
        ("gz", b"\x1f\x8b\x08\x00damaged", "gunzip"),
        ("csv", b"t,x,y,w,h\n", "begins with 't,x,y,w,h'. Save"),
        ("none", b"", "is empty (0 bytes)"),
    ):
        (tmp_path / f"{name}_bbox.npy").write_bytes(data)
        refused(tmp_path / f"{name}_bbox.npy", "no plain .npy", remedy)
    (tmp_path / "folder_bbox.npy").mkdir()
    refused(tmp_path / "folder_bbox.npy", "no plain .npy")
    assert issubclass(BoxesError, UserError)


def test_a_truncated_file_and_a_header_that_promises_too_much(tmp_path):
    path = saved(tmp_path / "a_bbox.npy", table(1000))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "no plain .npy")
    path.write_bytes(
        whole.replace(b"(1000,)", b"(%s,)" % str(10**13).encode(), 1).replace(
            b" " * 10 + b"\n", b"\n", 1
        )
    )
    refused(path, "no plain .npy", "states 10000000000000 boxes of", "bytes follow instead of")
    path.write_bytes(whole + b"\0" * 44)  # rows that the header does not state would be lost
    refused(path, "no plain .npy", "states 1000 boxes")
    path.write_bytes(whole.replace(b"(1000,)", b"(-100,)", 1))
    refused(path, "no plain .npy")


def test_headers_that_numpy_would_evaluate_at_length_are_refused(tmp_path):
    path = tmp_path / "a_bbox.npy"
    for text in (b"(" * 9_000, b"{'descr': " + b" " * 70_000, b"-" * 9_000 + b"1"):
        size = len(text).to_bytes(4, "little")
        path.write_bytes(b"\x93NUMPY\x02\x00" + size + text)
        refused(path, "no plain .npy")
    nothing = b"{'descr': [], 'fortran_order': False, 'shape': (1000000000000,), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(nothing).to_bytes(2, "little") + nothing)
    refused(path)


@pytest.mark.parametrize(
    "recording",
    ["X_td.dat", "X_td.h5", "X_td.dat.h5", "X_td.raw", "X_td.hdf5", "X.raw", "X.dat", "X.h5"],
)
def test_a_recording_and_its_boxes_share_a_name(tmp_path, recording):
    assert recording_name(Path(recording)) == "X"
    assert find_boxes(tmp_path / recording) is None
    write_boxes(tmp_path / "X_bbox.npy", np.zeros(1, RAW_BOX))
    write_boxes(
        tmp_path / "X_td_bbox.npy", np.zeros(1, RAW_BOX)
    )  # another recording's: X_td_td.raw
    assert find_boxes(tmp_path / recording) == tmp_path / "X_bbox.npy"


def test_names_with_dots_and_endings_inside(tmp_path):
    assert (
        recording_name(Path("17-04-13_15-05-43_1098500000_1158500000_td.dat"))
        == "17-04-13_15-05-43_1098500000_1158500000"
    )
    assert recording_name(Path("a.b_td.raw")) == "a.b"
    assert recording_name(Path("a_td.raw_td.h5")) == "a_td.raw"
    assert recording_name(Path("a.mp4")) == "a"
