"""Recordings that cannot be read, and events that cannot be written.

Each error contains what is wrong, where, how much of it, and what to do.
"""

import gzip
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import RecordingError, UserError
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.h5 import Compression, H5Writer
from evspan.data_prep.recordings.open import open_recording, open_writer
from support.event_files import read_by, write_raw

DAT = b"% Data file containing CD events.\n% Version 2\n% Height 720\n% Width 1280\n"
ROOT = Path(__file__).parents[2]


def require_refusal(path: Path, *parts: str) -> None:
    """Reading ends in a RecordingError of one line with the file's name and all `parts`."""
    with pytest.raises(RecordingError) as caught:
        read_by(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(("kind", "size"), [("evt3", 2), ("evt2", 4), ("evt21", 8)])
def test_a_file_that_ends_inside_a_word_is_refused_before_any_event(tmp_path, kind, size):
    path = write_raw(tmp_path / "a.raw", kind, [0, 0, 0])
    whole = path.stat().st_size
    for over in range(1, size):
        path.write_bytes(path.read_bytes()[: whole - size] + b"\x01" * over)
        require_refusal(
            path,
            f"{over} byte",
            f"at byte {whole - size} of {whole - size + over}",
            f"head -c {whole - size}",
        )
        with pytest.raises(RecordingError):
            next(open_recording(path).chunks())


def test_a_dat_that_ends_inside_an_event(tmp_path):
    (tmp_path / "a_td.dat").write_bytes(DAT + bytes((0x0C, 8)) + bytes(8 * 5 + 3))
    require_refusal(tmp_path / "a_td.dat", "3 bytes", "a word of 8", f"head -c {len(DAT) + 2 + 40}")


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (
            "% evt 4.0\n% geometry 1280x720\n% end\n",
            ["format EVT4", "EVT3, EVT21, EVT2", "metavision_file_to_dat"],
        ),
        (
            "% format HISTO3D;height=320;width=320\n% end\n",
            ["format HISTO3D", "metavision_file_to_dat"],
        ),
        ("% geometry 1280x720\n% end\n", ["no header that names its format"]),
        ("", ["is empty (0 bytes)"]),
        ("\x89HDF\r\n", ["no header that names its format"]),
        ("% evt 3.0\n% end\n", ["does not contain the sensor's size", "% geometry 1280x720"]),
        ("% evt 3.0\n% system_ID 4711\n% end\n", ["does not contain the sensor's size"]),
        ("% format EVT3;height=720;width=99999\n% end\n", ["'99999'", "1 to 8192"]),
        ("% format EVT3;height=-720;width=1280\n% end\n", ["'-720'", "1 to 8192"]),
        ("% evt 3.0\n% geometry 0x720\n% end\n", ["'0'"]),
        ("% evt 3.0\n% geometry big\n% end\n", ["'big'"]),
        (f"% evt 3.0\n% geometry {'9' * 5000}x720\n% end\n", ["'9999999999", "1 to 8192"]),
        ("% evt 3.0\n% geometry 1280x720", ["byte 10", "does not end"]),
        (f"% evt 3.0\n% note {'x' * 70_000}\n% end\n", ["byte 10", "does not end"]),
        (
            "% format EVT3.0;width=400\n% geometry 640x480\n",
            ["sensor's width: '400' in format, '640' in geometry"],
        ),
        (
            "% format EVT3;height=720;width=1280\n% geometry 640x480\n% end\n",
            ["sensor's height: '720' in format, '480' in geometry"],
        ),
        (
            "% evt 3.0\n% geometry 640x480\n% geometry 1280x720\n% end\n",
            ["two values of geometry, '640x480' and '1280x720'"],
        ),
        ("% evt 2.0\n% format EVT3;height=9;width=9\n% end\n", ["two formats, EVT2 and EVT3"]),
        (
            "% format EVT21;height=720;width=1280;endianness=big\n% end\n",
            ["'big'", "little and legacy"],
        ),
    ],
)
def test_raw_headers(tmp_path, header, parts):
    (tmp_path / "a.raw").write_bytes(header.encode("latin-1"))
    require_refusal(tmp_path / "a.raw", *parts)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("% evt 3.0\n% system_ID 49\n", (720, 1280)),
        ("% evt 3.0\n% geometry 640x480\n% system_ID 49\n", (480, 640)),
        ("% format EVT3\n% Height 300\n% Width 400\n", (300, 400)),
        ("% FORMAT EVT3; height=300; width=400\r\n% END\r\n", (300, 400)),
        ("% format EVT3.0;width=640\n% geometry 640x480\n", (480, 640)),
        ("% format EVT3;height=480\n% geometry 640x480\n", (480, 640)),
        ("% evt 3.0\n% geometry 640x480\n% geometry 640x480\n", (480, 640)),
        *((f"% evt 3.0\n% system_ID {n}\n", (480, 640)) for n in (21, 23, 25, 28)),
        ("% evt 3.0\n% system_ID 26\n", (720, 1280)),
        ("% evt 3.0\n% geometry 640x480\n" + "% note x\n" * 5000 + "% end\n", (480, 640)),
    ],
)
def test_headers_that_are_read(tmp_path, header, size):
    path = write_raw(tmp_path / "a.raw", "evt3", [0x8001, 0x6002, 0x2003], header)
    events, recording = read_by(path)
    assert (recording.height, recording.width) == size
    assert events.t.tolist() == [4098]
    assert events.x.tolist() == [3]


def test_a_header_may_end_anywhere_in_the_readers_buffer(tmp_path):
    for length in range(8180, 8200):  # io.DEFAULT_BUFFER_SIZE is 8192
        header = "% evt 3.0\n% geometry 640x480\n% note "
        path = write_raw(
            tmp_path / "a.raw",
            "evt3",
            [0x8001, 0x6002, 0x2003],
            f"{header}{'x' * (length - len(header))}\n% end\n",
        )
        assert read_by(path)[0].t.tolist() == [4098]


@pytest.mark.parametrize(
    ("two", "parts"),
    [
        (bytes((0x0E, 8)), "contains external triggers (event type 14"),
        (bytes((0x0C, 16)), "[12, 16]"),
        (b"\x0c", "[12]"),
        (b"", "[]"),
        (b"% ", "does not end"),
    ],
)
def test_dat_of_other_events(tmp_path, two, parts):
    (tmp_path / "a_td.dat").write_bytes(DAT + two)
    require_refusal(tmp_path / "a_td.dat", parts, f"byte {len(DAT)}")


def test_dat_without_a_size_is_a_gen4_sensor(tmp_path):
    (tmp_path / "a_td.dat").write_bytes(b"% Version 2\n" + bytes((0, 8)) + bytes(8))
    _, recording = read_by(tmp_path / "a_td.dat")
    assert (recording.height, recording.width, recording.events) == (720, 1280, 1)


def test_what_is_no_recording(tmp_path):
    (tmp_path / "folder.raw").mkdir()
    for name in ("none.raw", "folder.raw"):
        require_refusal(tmp_path / name, "is no file", ".raw, .dat, .h5, .hdf5")
    for name in ("empty.raw", "empty.dat", "empty.h5", "empty.hdf5"):
        (tmp_path / name).touch()
        require_refusal(tmp_path / name)
    for name in ("a.aedat4", "noending"):
        (tmp_path / name).touch()
        require_refusal(tmp_path / name, Path(name).suffix or "(none)")
    with pytest.raises(
        RecordingError, match=r"a\.npz: events are written as one of \.raw, \.dat, \.h5"
    ):
        open_writer(tmp_path / "a.npz", 720, 1280)
    assert issubclass(RecordingError, UserError)


def h5_file(path: Path, **columns) -> Path:
    with h5py.File(path, "w") as file:
        for name, column in {
            **{c: np.arange(4) for c in "txy"},
            "p": np.arange(4) % 2,
            **columns,
        }.items():
            if column is not None:
                file[f"events/{name}"] = column
    return path


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"p": None, "x": None}, ["lacks events/x, events/p", "events/t, x, y and p"]),
        ({"y": np.arange(3)}, ["differ in length", "'y': 3", "copy it again"]),
        ({"t": np.arange(4.0)}, ["events/t is of type float64", "integers"]),
        ({"x": np.array([b"a"] * 4)}, ["events/x is of type |S1"]),
        ({"y": np.zeros((4, 2), int)}, ["/events/y", "(4, 2)", "one dimension"]),
        ({"t": np.int64(4)}, ["/events/t", "()", "one dimension"]),
        (
            {"t": np.array([1, 2, 3, 2**63], "u8")},
            ["events 0 and on", "9223372036854775808", "microseconds"],
        ),
        ({"t": np.array([1_700_000_000_000_000_000] * 4)}, ["events 0 and on", "microseconds"]),
        ({"t": np.array([-(2**62), 1, 2, 3])}, ["events 0 and on", "microseconds"]),
        ({"height": 0}, ["height '0'", "1 to 8192"]),
        ({"width": 10**12}, ["width '1000000000000'", "1 to 8192"]),
        ({"width": np.arange(3)}, ["events/width must be one number"]),
    ],
)
def test_h5_columns(tmp_path, columns, parts):
    require_refusal(h5_file(tmp_path / "a_td.h5", **columns), *parts)


def test_h5_without_events_or_with_a_group_for_a_column(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros(3)
    require_refusal(tmp_path / "a.h5", "lacks events/t, events/x, events/y, events/p")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["events"] = np.zeros(3)
    require_refusal(tmp_path / "b.h5", "lacks events/t")
    with h5py.File(h5_file(tmp_path / "c.h5", x=None), "a") as file:
        file.create_group("events/x")
    require_refusal(tmp_path / "c.h5", "lacks events/x")


def test_h5_that_was_cut_off_or_never_written_whole(tmp_path):
    path = h5_file(
        tmp_path / "a.h5",
        t=np.arange(100_000),
        x=np.zeros(100_000, "u2"),
        y=np.zeros(100_000, "u2"),
        p=np.zeros(100_000, "u1"),
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    require_refusal(path, "cannot be read as HDF5", "truncated", "copy it again")
    with h5py.File(h5_file(tmp_path / "b.h5", t=None), "a") as file:
        column = file.create_dataset("events/t", (4,), "i8", chunks=(1,))
        column[0] = 5
    require_refusal(tmp_path / "b.h5", "lacks 3 of its 4 chunks", "copy it again")
    with h5py.File(h5_file(tmp_path / "c.h5", t=None), "a") as file:
        file.create_dataset("events/t", (4,), "i8", chunks=(1 << 26,), maxshape=(None,))
    require_refusal(tmp_path / "c.h5", "chunks of 67108864 entries", "h5repack -l CHUNK=65536")


def test_blosc_without_its_options_is_refused_before_it_reads_past_them(tmp_path):
    with H5Writer(tmp_path / "a.h5", 720, 1280, compression=Compression.lz4) as writer:
        writer.write(events_at([5, 6]))
    whole = (tmp_path / "a.h5").read_bytes()
    options = struct.pack("<4H", 32001, 8, 1, 7)  # number, length of the name, flags, values
    assert options in whole
    (tmp_path / "a.h5").write_bytes(whole.replace(options, struct.pack("<4H", 32001, 0, 1, 0)))
    require_refusal(tmp_path / "a.h5", "only 0 of its 4 options are stored", "copy it again")


CD = np.dtype(
    {
        "names": ["x", "y", "p", "t"],
        "formats": ["<u2", "<u2", "<i2", "<i8"],
        "offsets": [0, 2, 4, 8],
    }
)


def metavision_file(path: Path, events: np.ndarray, filter_id: int, coded: bytes) -> Path:
    """CD/events in one chunk of a filter, as Metavision writes it: HDF5 does not code the chunk."""
    with h5py.File(path, "w") as file:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((events.size,))
        layout.set_filter(filter_id, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((events.size,), (h5py.h5s.UNLIMITED,))
        kind = h5py.h5t.py_create(CD, logical=True)
        dataset = h5py.h5d.create(file.create_group("CD").id, b"events", kind, space, layout)
        dataset.write_direct_chunk((0,), coded)
        file.attrs["geometry"] = "1280x720"
    return path


def test_codecs_that_are_not_installed_are_named(tmp_path):
    path = metavision_file(tmp_path / "a.hdf5", np.zeros(8, CD), 0x8ECF, b"coded")
    require_refusal(
        path, "/CD/events", "ECF", "0x8ECF", "HDF5_PLUGIN_PATH", f"metavision_file_to_dat -i {path}"
    )
    require_refusal(
        metavision_file(tmp_path / "b.hdf5", np.zeros(8, CD), 600, b"coded"),
        "HDF5 filter 600",
        "HDF5_PLUGIN_PATH",
    )
    with h5py.File(tmp_path / "c.hdf5", "w") as file:
        file["CD/events"] = np.zeros(3, [("x", "u2"), ("y", "u2"), ("t", "i8")])
    require_refusal(tmp_path / "c.hdf5", "lacks CD/events field p")
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["CD/events"] = np.arange(3)
    require_refusal(tmp_path / "d.hdf5", "lacks CD/events field t")


PLUGIN = """
#include <stddef.h>
static size_t flip(unsigned flags, size_t n, const unsigned values[], size_t size, size_t *space,
                   void **data) {
    for (size_t i = 0; i < size; i++) ((unsigned char *)*data)[i] ^= 0x5A;
    return size;
}
static const struct {
    int version, id; unsigned encodes, decodes; const char *name; void *can, *local;
    size_t (*filter)(unsigned, size_t, const unsigned[], size_t, size_t *, void **);
} codec = {1, 0x8ECF, 1, 1, "flip", 0, 0, flip};
int H5PLget_plugin_type(void) { return 0; }
const void *H5PLget_plugin_info(void) { return &codec; }
"""
READ = """
import sys
from evspan.data_prep.recordings.open import open_recording
recording = open_recording(sys.argv[1])
(events,) = recording.chunks()
print([(int(t), int(x), int(y), int(p)) for t, x, y, p in zip(*events)], recording.width)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(
    not shutil.which("cc"), reason="no C compiler (cc) to build a codec plugin with"
)
def test_metavision_hdf5_is_read_where_a_plugin_for_its_codec_is_installed(tmp_path):
    """A stand-in for ECF under its filter number: the values must have passed the plugin."""
    (tmp_path / "codec.c").write_text(PLUGIN)
    plugin = tmp_path / "plugins" / "libh5codec.so"
    plugin.parent.mkdir()
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", plugin, tmp_path / "codec.c"], check=True, timeout=120
    )
    events = np.array([(1, 2, 1, 30), (1279, 719, 0, 31)], CD)
    path = metavision_file(
        tmp_path / "a.hdf5", events, 0x8ECF, bytes(b ^ 0x5A for b in events.tobytes())
    )
    result = subprocess.run(
        [sys.executable, "-c", READ, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HDF5_PLUGIN_PATH": str(plugin.parent)},
    )
    assert result.stdout.strip() == "[(30, 1, 2, 1), (31, 1279, 719, 0)] 1280", result.stderr


def events_at(t, x=0, y=0, p=0) -> Events:
    t = np.array(t, np.int64)
    return Events(t, np.full(t.size, x, "u2"), np.full(t.size, y, "u2"), np.full(t.size, p, "u1"))


def test_a_compressed_recording_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "a.raw.gz"
    path.write_bytes(gzip.compress(b"% evt 3.0\n"))
    require_refusal(path, "suffix .gz", "is compressed with gzip", "gunzip")


@pytest.mark.parametrize("suffix", ["raw", "dat", "h5"])
def test_writers_refuse_what_they_would_write_wrong(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with open_writer(path, 720, 1280) as writer:
        writer.write(events_at([]))
        writer.write(events_at([5, 6]))
        for wrong, parts in (
            (events_at([5]), "from 6 us on"),
            (events_at([8, 7]), "order of time"),
            (events_at([9], x=1280), "x 1280"),
            (events_at([9], y=720), "y 720"),
            (events_at([9], p=2), "p 2"),
        ):
            with pytest.raises(RecordingError, match=parts):
                writer.write(wrong)
        writer.write(events_at([6]))
    assert read_by(path)[0].t.tolist() == [5, 6, 6]
    if suffix != "h5":
        with (
            open_writer(path, 720, 1280) as writer,
            pytest.raises(RecordingError, match="from 0 us on"),
        ):
            writer.write(events_at([-1]))
        with (
            open_writer(path, 720, 1280) as writer,
            pytest.raises(RecordingError, match=r"Write \.h5"),
        ):
            writer.write(events_at([2**41]))
        with pytest.raises(RecordingError, match=r"20000 x 720.*Write \.h5"):
            open_writer(path, 720, 20_000)


def test_dat_writer_refuses_gaps_that_its_clock_cannot_represent(tmp_path):
    with open_writer(tmp_path / "a.dat", 720, 1280) as writer:
        writer.write(events_at([2**32 - 1, 2**32]))
        with pytest.raises(RecordingError, match="35 minutes"):
            writer.write(events_at([2**32 + 1, 2**32 + 1 + 2**31]))
        with pytest.raises(RecordingError, match="35 minutes"):
            writer.write(events_at([2**32 + 2**31]))
        writer.write(events_at([2**32 + 2**31 - 1]))
    assert read_by(tmp_path / "a.dat")[0].t.tolist() == [2**32 - 1, 2**32, 2**32 + 2**31 - 1]
