"""NumPy archives of events: every layout is read back in bounded memory, nothing is unpickled."""

import pickle
import tracemalloc

import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.npz import NpzReader
from evspan.data_prep.recordings.open import open_recording
from support.event_files import concatenated

N = 3000


def some_events(n: int) -> Events:
    rng = np.random.default_rng(n)
    return Events(
        np.cumsum(rng.integers(1, 60, n)),
        rng.integers(0, 240, n).astype(np.uint16),
        rng.integers(0, 180, n).astype(np.uint16),
        np.arange(n, dtype=np.uint8) % 2,
    )


EVENTS = some_events(N)
T, X, Y, P = EVENTS
TABLE = np.stack([column.astype(np.int64) for column in EVENTS], axis=1)
RECORDS = np.zeros(N, [("x", "<i2"), ("y", ">i2"), ("timestamp", "<u8"), ("polarity", "?")])
for _name, _column in zip(RECORDS.dtype.names, (X, Y, T, P), strict=True):
    RECORDS[_name] = _column
LAYOUTS = {
    "columns": {"t": T, "x": X, "y": Y, "p": P},
    "other names and types": {
        "timestamps": T.astype(np.uint32),
        "x": X.astype(np.float32),
        "y": Y.astype(np.int64),
        "polarity": P.astype(np.int8) * 2 - 1,
    },
    "seconds": {"t": T / 1e6, "x": X, "y": Y, "p": P.astype(bool)},
    "a named unit": {"t_ns": T * 1000 + 400, "x": X, "y": Y, "p": P},
    "a table": {"events": TABLE},
    "a table of floats": {"arr_0": TABLE.astype(np.float64)},
    "a table by columns": {"events": np.asfortranarray(TABLE)},
    "records": {"events": RECORDS},
    "records of N-ImageNet": {"event_data": RECORDS, "other": np.zeros(3)},
}


def require_same(a: Events, b: Events) -> None:
    for name in Events._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_events(tmp_path, layout, save):
    path = tmp_path / "a.npz"
    save(path, **LAYOUTS[layout])
    for at_once in (1 << 18, 97):
        require_same(concatenated(NpzReader(path, at_once).chunks()), EVENTS)
    assert open_recording(path).size_is_assumed
    save(path, **LAYOUTS[layout], height=180, width=np.array([240]))
    recording = open_recording(path)
    assert (recording.height, recording.width, recording.size_is_assumed) == (180, 240, False)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    peaks = []
    for n in (20_000, 400_000):
        path = tmp_path / f"{n}.npz"
        np.savez_compressed(path, **some_events(n)._asdict())
        recording = NpzReader(path, 10_000)
        tracemalloc.start()
        assert sum(chunk.t.size for chunk in recording.chunks()) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


class Exploit:
    def __reduce__(self):
        return (print, ("executed",))


def test_objects_are_not_unpickled(tmp_path, capsys):
    path = tmp_path / "a.npz"
    objects = np.array([Exploit()] * 4, object)
    assert pickle.dumps(objects)
    np.savez(path, t=objects, x=X[:4], y=Y[:4], p=P[:4])
    with pytest.raises(RecordingError, match=r"t\.npy contains Python objects"):
        open_recording(path)
    np.savez(path, **EVENTS._asdict(), height=np.array([Exploit()], object), width=4)
    with pytest.raises(RecordingError):
        open_recording(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": np.zeros((3, 2)), "x": X}, "lacks arrays t, x, y and p, or events; it has fr"),
        ({"t": T, "x": X[:-1], "y": Y, "p": P}, r"arrays differ in length \(\[2999, 3000\]\)"),
        ({"t": T, "x": X.astype("U4"), "y": Y, "p": P}, "x is of type <U4"),
        ({"t": T, "x": X + 0.5, "y": Y, "p": P}, r"x of event 0 is \d+\.5, no whole number"),
        ({"t": T, "x": X, "y": Y, "p": P + 1}, "polarities p are 1, 2"),
        ({"events": TABLE[:, :3]}, r"the shape \(3000, 3\)"),
        ({"events": TABLE[:, [1, 2, 0, 3]]}, "look like x, y, t, p"),
        ({"t": np.where(T[9] == T, np.nan, T / 1e6), "x": X, "y": Y, "p": P}, "times from nan"),
        ({"t": T * 1e15, "x": X, "y": Y, "p": P}, "not certain|which are not us"),
        ({"t": np.zeros(()), "x": X, "y": Y, "p": P}, "bytes, which is not what its shape"),
        ({"t": T // 1000, "x": X, "y": Y, "p": P, "width": 240, "height": "b"}, "size is height"),
        ({"t": (T // 1000) / 1e3, "x": X, "y": Y, "p": P}, "the unit of the times is not certain"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, arrays, message):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(RecordingError, match=message) as caught:
        list(open_recording(path).chunks())
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x93NUMPY\x01\x00", "NumPy array"),
        (b"abc\xff" * 99, "is no ZIP archive"),
        (b"PK\x03\x04" + bytes(99), "cannot be read as an archive of NumPy"),
    ],
)
def test_other_content_is_named(tmp_path, content, message):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=message):
        open_recording(path)


def test_an_archive_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **EVENTS._asdict())
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(RecordingError, match="cut off or damaged"):
        open_recording(path)
