"""Text recordings: every order, unit and separator is read back; what is not certain is refused."""

import math
import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import TimeUnit
from evspan.data_prep.recordings.columns import TimeSample, certain_unit, named_column
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import holds_events, open_recording
from evspan.data_prep.recordings.sources import find_sources, unused_files
from evspan.data_prep.recordings.text import TextReader
from support.event_files import concatenated


def some_events(n: int) -> Events:
    rng = np.random.default_rng(n)
    return Events(
        np.cumsum(rng.integers(1, 60, n)),
        rng.integers(0, 240, n).astype(np.uint16),
        rng.integers(0, 180, n).astype(np.uint16),
        np.arange(n, dtype=np.uint8) % 2,
    )


def require_same(a: Events, b: Events) -> None:
    for name in Events._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


def lines(events: Events, form: str = "{t} {x} {y} {p}") -> str:
    rows = zip(*(column.tolist() for column in events), strict=True)
    return "".join(form.format(t=t, x=x, y=y, p=p, s=t / 1e6) + "\n" for t, x, y, p in rows)


EVENTS = some_events(500)
FORMS = {
    "whole microseconds": ("", "{t} {x} {y} {p}"),
    "the event camera dataset": ("", "{s:.9f} {x} {y} {p}"),
    "commas": ("", "{t},{x},{y},{p}"),
    "tabs and blanks": ("", "  {t}\t{x} \t{y}  {p} "),
    "semicolons": ("", "{t} ; {x};{y}; {p}"),
    "another order": ("x,y,p,t\n", "{x},{y},{p},{t}"),
    "other columns": ("frame t name X Y pol\n", "-1e7 {t} walk-3 {x} {y} {p}"),
    "a named unit": ("timestamp_s, x, y, polarity\n", "{s}, {x}, {y}, {p}"),
    "a unit in brackets": ("x,y,p,t [ns]\n", "{x},{y},{p},{t}400"),
    "names in quotes": ('"t","x","y","p"\n', "{t},{x},{y},{p}"),
    "names in a comment": ("# x y p t_us\n", "{x} {y} {p} {t}"),
    "comments and empty lines": ("% a comment\n\n# another\n", "{t} {x} {y} {p}\n\n# more"),
    "numpy.savetxt": ("", "{s:.18e} {x:.18e} {y:.18e} {p:.18e}"),
    "floats": ("t_us x y p\n", "{t}.0 {x}.0 {y}.00 {p}."),
    "a byte order mark": ("\ufefft,x,y,p\n", "{t},{x},{y},{p}"),
    "line ends of Windows": ("t,x,y,p\r\n", "{t},{x},{y},{p}\r"),
}


@pytest.mark.parametrize("block_bytes", [1 << 20, 100])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_events(tmp_path, form, block_bytes):
    head, line = FORMS[form]
    path = tmp_path / "a.txt"
    path.write_text(head + lines(EVENTS, line), encoding="utf-8", newline="")
    assert holds_events(path)
    recording = TextReader(path, block_bytes)
    require_same(concatenated(recording.chunks()), EVENTS)
    assert open_recording(path).format == "text"


def test_polarities_are_decoded_as_in_other_formats(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("t,x,y,p\n1,2,3,1\n2,3,4,-1\n3,4,5,1\n")
    assert concatenated(open_recording(path).chunks()).p.tolist() == [1, 0, 1]
    path.write_text("t,x,y,p\n1,2,3,1\n2,3,4,2\n")
    with pytest.raises(RecordingError, match="polarities p are 1, 2"):
        list(open_recording(path).chunks())
    path.write_text("t,x,y,p\n1,2,3,1\n2,3,4,0\n9,9,9,7\n")
    with pytest.raises(RecordingError, match=r"event 2 has 7"):
        list(TextReader(path, 20).chunks())


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ("240 180\n", (180, 240)),  # rpg's e2vid
        ("# geometry: 240x180\n", (180, 240)),
        ("% width 240\n", None),
        ("# width=240, height=180\nt,x,y,p\n", (180, 240)),
        ("% Height 180 Width 240\n", (180, 240)),
    ],
)
def test_the_sensors_size_is_read_where_it_is_stated(tmp_path, head, size):
    path = tmp_path / "a.txt"
    path.write_text(head + lines(EVENTS))
    recording = open_recording(path)
    require_same(concatenated(recording.chunks()), EVENTS)
    assert recording.size_is_assumed == (size is None)
    assert "sensor_size" in recording.warnings() or size == (recording.height, recording.width)
    assert open_recording(path, unstated_size=[200, 300]).width == (240 if size else 300)


def test_times_are_exact(tmp_path):
    """Decimal arithmetic by hand, half up; a float64 of Unix seconds has errors of 0.24 us."""
    path = tmp_path / "a.txt"
    path.write_text(
        "t_s x y p\n1468939993.067416019 1 1 1\n1468939993.0674165 1 1 0\n"
        "1468939993.0674174999 1 1 0\n1.46893999306741999e9 1 1 0\n"
    )
    t = concatenated(open_recording(path).chunks()).t
    assert t.tolist() == [
        1468939993067416,
        1468939993067417,
        1468939993067417,
        1468939993067420,
    ]


def test_numbers_are_those_of_python(tmp_path):
    """Random notations of up to 18 digits; the nearest microsecond by exact arithmetic."""
    rng = random.Random(0)
    texts = [random_number(rng) for _ in range(500)]
    expected = [math.floor(Fraction(text) + Fraction(1, 2)) for text in texts]
    path = tmp_path / "a.csv"
    path.write_text(
        "t_us,x,y,p\n" + "".join(f"{text},1,2,{i % 2}\n" for i, text in enumerate(texts))
    )
    decoded = TextReader(path)._decoded()
    assert np.concatenate([events.t for events in decoded]).tolist() == expected


def random_number(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789", weights=[4] + [1] * 9, k=rng.randrange(1, 16)))
    point = rng.randrange(len(digits) + 1)
    sign = rng.choice(["", "", "+", "-"])
    power = rng.randrange(-22, 1)
    exponent = rng.choice(["", f"e{power}", f"E{power:+03d}"])
    return f"{sign}{digits[:point]}.{digits[point:]}{exponent}"


@pytest.mark.parametrize(
    ("first", "last", "decimals", "events", "unit"),
    [
        (0, 1_000_000, 0, 500_000, "us"),
        (0, 1e10, 0, 500_000, None),  # 10,000 s as us, with 50 events/s: likely ns
        (0, 1000, 0, 500_000, None),  # 1 ms as us: likely ms
        (1.7e15, 1.7e15 + 9, 0, 5, "us"),
        (1.7e18, 1.7e18 + 1e9, 0, 500_000, "ns"),
        (0.000001, 1.5, 9, 500_000, "s"),
        (0.000001, 10_000.5, 9, 500_000, None),  # 50 events/s
        (0.5, 10_000.5, 3, 500_000, "ms"),
        (0.001, 1.5, 3, 500_000, "s"),
        (0.001, 0.5, 3, 50, None),
        (0, 0, 0, 0, "us"),
    ],
)
def test_a_unit_is_taken_only_if_it_is_certain(tmp_path, first, last, decimals, events, unit):
    sample = TimeSample(first, last, decimals, events)
    if unit:
        assert certain_unit(tmp_path, sample, 346 * 260) is TimeUnit[unit]
        return
    with pytest.raises(
        RecordingError, match=r"unit .* is not certain\. .*dataset\.time_unit=s, ms"
    ):
        certain_unit(tmp_path, sample, 346 * 260)


def test_a_unit_that_is_not_certain_can_be_given(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0.001 3 4 1\n0.002 3 4 0\n")
    with pytest.raises(RecordingError, match="not certain"):
        open_recording(path)
    for unit, times in ((TimeUnit.s, [1000, 2000]), (TimeUnit.ms, [1, 2])):
        recording = open_recording(path, time_unit=unit)
        assert concatenated(recording.chunks()).t.tolist() == times
    path.write_text("5 3 4 1\n1499 3 4 0\n1500 3 4 0\n")
    recording = open_recording(path, time_unit=TimeUnit.ns)
    assert concatenated(recording.chunks()).t.tolist() == [0, 1, 2]


def test_names_of_columns():
    assert named_column(" T ").name == "t"
    assert named_column("timestamp(ms)").unit is TimeUnit.ms
    assert named_column("ts").unit is None
    assert named_column("time_us").unit is TimeUnit.us
    assert [named_column(name) for name in ("t_x", "tus", "xx", "", "stamp")] == [None] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 1\n2 3 4 0\n3 nan 3 1\n", r"line 3: x \(column 2\) is not a number: '3 nan 3 1'"),
        ("1 2 3 1\n2 3 4 0\n3 4\n4 1 1 1\n", r"line 3: y \(column 3\) is missing: '3 4'"),
        ("1 2 3 1\n2 3 4 0 9\n3 4 1 1\n", r"line 2: column 5 follows the last column"),
        ("1 2 3 1\n2 3.5 4 0\n", r"line 2: x \(column 2\) is not a whole number"),
        ("1 2 3 1\n2 1e30 4 0\n", r"line 2: x \(column 2\) is too large"),
        ("1 2 3 1\n2 3 4 0\n3 2", "is cut off: its last line, 3, is '3 2'"),
        ("1 2 3 1 0\n", r"has 5 columns, which have no names"),
        ("t x y p p\n1 2 3 1 0\n", r"each of t, x, y and p must be there once"),
        ("hello\n", "contains no line of four numbers"),
        ("1 2 3 1\n\x1b[31m 3 4 0\n", r"line 2: .*not a number: '\\x1b\[31m"),
        ("9 10 0 7\n8 20 1 7\n", r"look like x, t, p, y\. Name them .*'1i x,t,p,y'"),
        ("t x y p\n99999999999999999999 1 1 1\n1 1 1 1\n", "unit of the times|too large"),
        ("t_s x y p\n9e17 1 1 1\n", "is too large"),
        ("t_s x y p\n9e11 1 1 1\n", "over 285 years"),
        ("<html><body>Sign in</body></html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(RecordingError, match=message) as caught:
        list(open_recording(path).chunks())
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_columns_in_another_order_are_named_in_the_remedy(tmp_path):
    """Metavision writes x,y,p,t without names; with the line of the message the file is read."""
    path = tmp_path / "a.csv"
    path.write_text(lines(EVENTS, "{x},{y},{p},{t}"))
    with pytest.raises(RecordingError, match=r"look like x, y, p, t\. .*sed -i '1i x,y,p,t'"):
        open_recording(path)
    path.write_text("x,y,p,t\n" + path.read_text())
    require_same(concatenated(open_recording(path).chunks()), EVENTS)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    peaks = []
    for repeats in (1, 12):
        path = tmp_path / f"{repeats}.txt"
        path.write_text(lines(some_events(6000 * repeats)))
        recording = TextReader(path, 1 << 16)
        tracemalloc.start()
        assert sum(chunk.t.size for chunk in recording.chunks()) == 6000 * repeats
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# -- in a source -----------------------------------------------------------------------------------
def test_text_in_a_source_is_a_recording_only_with_events(tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    (train / "a.txt").write_text(lines(EVENTS))
    (train / "b_td.csv").write_text("t,x,y,p\n" + lines(EVENTS, "{t},{x},{y},{p}"))
    np.savez(train / "c.npz", **EVENTS._asdict())
    np.save(train / "c_bbox.npy", np.zeros(0))
    (train / "notes.txt").write_text("Recorded in the rain.\n")
    (train / "labels.csv").write_text("frame,class,cx,cy,w,h\n0,1,2,3,4,5\n")
    (train / "poses.txt").write_text("0.1 1 2 3 4 5 6 7\n")
    np.savez(train / "calibration.npz", K=np.eye(3))
    (tmp_path / "classes.txt").write_text("car\nperson\n")
    sources = {source.name: source for source in find_sources(tmp_path)}
    assert sorted(sources) == ["a", "b", "c"]
    assert sources["c"].boxes == train / "c_bbox.npy"
    assert all("npz" not in line for line in unused_files(tmp_path) if "c.npz" in line)
    (train / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "pointer" in {source.name for source in find_sources(tmp_path)}


def test_a_text_file_as_a_source_is_a_recording_or_a_list(tmp_path):
    path = tmp_path / "events.txt"
    path.write_text(lines(EVENTS))
    assert [source.key for source in find_sources(path)] == ["test/events"]
    listed = tmp_path / "list.txt"
    listed.write_text("train events.txt\n")
    assert [source.key for source in find_sources(listed)] == ["train/events"]
