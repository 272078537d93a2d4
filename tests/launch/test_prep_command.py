"""`evspan prep` and its tools, as a user types them."""

import fcntl
import hashlib
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.data_prep.recordings.open import open_recording
from evspan.launch.cli.prep import HELP, main
from PIL import Image
from support.prepared import KEYS, assert_sound, contents, copied, entries, manifest

ROOT = Path(__file__).parents[2]
OWN = ("dataset=simulated", "frames.bins=3")


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards")
    done = typed(f"source={source}", f"output={output}", *OWN, "processes=1")
    assert (done.returncode, done.stderr) == (0, "")
    return output


def typed(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "evspan.launch", "prep", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture
def evspan_prep(capsys, monkeypatch):
    """Call it in this process; (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evspan"])  # Hydra reads and the command sets it
        capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def refused(result) -> str:
    code, out, err = result
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: "), (
        code,
        out,
        err,
    )
    return err


# -- prep --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_first_run_second_run(source, tmp_path):
    output = tmp_path / "shards"
    first = typed(f"source={source}", f"output={output}", *OWN, "processes=2")
    assert (first.returncode, first.stderr) == (0, "")
    lines = first.stdout.splitlines()
    assert sorted(line.split("] ")[1].split(":")[0] for line in lines[:5]) == sorted(KEYS)
    assert [line.split("]")[0] for line in lines[:5]] == [f"[{i}/5" for i in range(1, 6)]
    recordings = manifest(output)["recordings"]
    frames, boxes = (sum(r[k] for r in recordings) for k in ("frames", "boxes"))
    left_out = sum(sum(r["dropped_boxes"].values()) for r in recordings)
    assert len(lines) == 7
    assert lines[5].startswith("boxes left out: ")
    assert lines[5].endswith(f"; evspan prep report {output} has the rules")
    listed = lines[5].removeprefix("boxes left out: ").split(";")[0].split(", ")
    assert sum(int(words.split()[0]) for words in listed) == left_out > 0
    assert lines[6].startswith(f"{output}: 5 of 5 recordings prepared in ")
    assert (
        f"; {frames} frames, {sum(r['labelled_frames'] for r in recordings)} of them labelled, {boxes} boxes ("
        in lines[6]
    )
    again = typed(f"source={source}", f"output={output}", *OWN)
    assert (
        again.stdout == f"{output}: nothing to do, 5 recordings with {frames} frames up to date\n"
    )
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.slow
def test_recordings_that_are_prepared_again_are_named(source, shards, tmp_path, evspan_prep):
    mine, output = copied(source, tmp_path / "source"), copied(shards, tmp_path / "out")
    (mine / "val" / "d_bbox.npy").unlink()
    (mine / "train" / "c_td.h5").unlink()
    (output / "test" / "00000.h5").unlink()
    code, out, err = evspan_prep(f"source={mine}", f"output={output}", *OWN, "processes=1")
    assert code == 0
    missing, *others = err.splitlines()
    assert missing.startswith(
        "warning: val: 1 recording without a box file (d_bbox.npy next to d_td.raw): d; nothing is "
    )
    assert others == [
        "warning: val has no labelled frame in 1 recording: training and evaluation refuse it",
    ]
    assert "prepared again: val/d (it has no box file any more)\n" in out
    assert "prepared again: test/plain (its shard is missing or damaged)\n" in out
    assert "removed: train/c (no longer in the source)\n" in out
    assert out.splitlines()[-1].startswith(f"{output}: 2 of 4 recordings prepared")
    code, out, _ = evspan_prep(
        f"source={mine}",
        f"output={output}",
        *OWN,
        "dataset.labels.min_side=30",
        "processes=1",
    )
    assert code == 0
    assert (
        f"{output} was prepared with another config: dataset.labels.min_side: 0.0 -> 30.0\n" in out
    )
    assert_sound(output)


def test_dataset_configs_and_overrides_reach_the_manifest(source, tmp_path, evspan_prep):
    code, _, err = evspan_prep(
        f"source={source / 'val'}",
        f"output={tmp_path / 'out'}",
        "dataset=gen4",
        "processes=1",
        "frames.downsample=4",
        "frames.downsample_by=nearest",
        "frames.cutoff=20",
        "shard_mib=1",
        "dataset.labels.label_every_ms=50",
    )
    assert (code, err) == (0, "")
    written = manifest(tmp_path / "out")
    assert written["classes"] == ["pedestrian", "two_wheeler", "car"]
    assert written["config"]["frames"] == {
        "mode": "exact",
        "window_ms": 50,
        "bins": 10,
        "cutoff": 20,
        "downsample": 4,
        "downsample_by": "nearest",
    }
    assert written["config"]["dataset"]["labels"] == {
        "class_map": {"0": 0, "1": 1, "2": 2},
        "crop": True,
        "label_every_ms": 50,
        "min_side": 20.0,
        "min_diagonal": 60.0,
        "max_width_fraction": 0.9,
    }
    assert entries(tmp_path / "out")["test/d"]["dropped_boxes"]["boxes_under_min_diagonal"] > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_on_a_terminal_there_is_a_bar_instead_of_lines(source, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    arguments = [f"source={source}", f"output={tmp_path / 'out'}", *OWN, "processes=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evspan.launch", "prep", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=120)
    drawn = b""
    try:
        while piece := os.read(ours, 4096):
            drawn += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.returncode == 0
    assert b"preparing:   0%" in drawn
    assert b"/5 [" in drawn
    left_out, total = out.splitlines()
    assert left_out.startswith("boxes left out: ")
    assert total.startswith(f"{tmp_path / 'out'}: 5 of 5 recordings")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["source=/nowhere/at/all", "output=OUT"],
            "source /nowhere/at/all is not there. Give a folder with train/ val/ test/",
        ),
        (
            ["source=EMPTY", "output=OUT"],
            "EMPTY holds no recordings (.raw, .dat, .h5, .hdf5, .aedat4",
        ),
        (["source=SOURCE"], "prep needs source=RECORDINGS and output=SHARDS"),
        (
            ["source=SOURCE", "output=SOURCE/shards"],
            "output SOURCE/shards lies inside source SOURCE; choose a folder outside it",
        ),
        (["source=SOURCE", "output=OUT", "frames.downsampel=2"], "did you mean frames.downsample"),
        (["source=SOURCE", "output=OUT", "+frames.speed=2"], "there is no key 'frames.speed'"),
        (
            ["source=SOURCE", "output=OUT", "frames.downsample=3"],
            "frames.downsample is 3; choose 1, 2 or 4",
        ),
        (
            ["source=SOURCE", "output=OUT", "frames.bins=ten"],
            "frames.bins is 'ten'; give a whole number",
        ),
        (["source=SOURCE", "output=OUT", "frames.downsample_by=mean"], "give one of sum, nearest"),
        (
            ["source=SOURCE", "output=OUT", "dataset=simulated", "frames.mode=rvt"],
            "label_every_ms is 50; RVT (frames.mode=rvt) takes a label",
        ),
        (["source=SOURCE", "output=OUT", "max_invalid_fraction=2"], "max_invalid_fraction is 2"),
        (
            ["source=SOURCE", "output=OUT", "dataset=gen5"],
            "dataset has no option 'gen5'; did you mean dataset=gen4",
        ),
        (["source=SOURCE", "output=OUT", "processes"], "'processes' is not of the form key=value"),
        (["source=SOURCE", "output=OUT", "--processes=2"], "keys have no dashes: processes=2"),
        (
            ["source=SOURCE", "output=OUT", "cluster=gpu_nodes"],
            "cluster=gpu_nodes sets gpus_per_node, which this command does not read",
        ),
        (
            ["source=SOURCE", "output=OUT", "cluster=slurm", "cluster.gpus_per_node=2"],
            "there is no key 'cluster.gpus_per_node'",
        ),
        (["source=SOURCE", "output=OUT", "cluster.partition=cpu"], "add cluster=slurm"),
        (
            ["source=SOURCE", "output=OUT", "dataset=gen4", "dataset.classes=[one]"],
            "class_map names class [1, 2] but dataset.classes has 1 entries",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_make_nothing(
    source, tmp_path, evspan_prep, arguments, message
):
    (tmp_path / "empty").mkdir()
    names = {"SOURCE": str(source), "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}

    def filled(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, path)
        return text

    assert filled(message) in refused(evspan_prep(*map(filled, arguments)))
    assert not (tmp_path / "out").exists()
    assert not (source / "shards").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_bad_recording_ends_in_one_line_that_names_it(source, tmp_path):
    bad = copied(source, tmp_path / "source")
    path = bad / "train" / "b_td.dat"
    path.write_bytes(path.read_bytes()[:-3])
    done = typed(f"source={bad}", f"output={tmp_path / 'out'}", *OWN, "processes=2")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(
        "error: 1 of 5 recordings cannot be prepared; 4 are done and kept for the next run. train/b: "
    )
    assert str(path) in done.stderr
    assert "cut off" in done.stderr
    path.unlink()
    again = typed(f"source={bad}", f"output={tmp_path / 'out'}", *OWN, "processes=2")
    assert again.returncode == 0
    unused, *_, total = again.stdout.splitlines()
    assert unused.startswith("left out, box files of no recording: train/b_bbox.npy. ")
    assert "4 of 4 recordings prepared" in total
    assert len(contents(tmp_path / "out")) == 4


def test_debugging_shows_the_traceback(evspan_prep, monkeypatch):
    monkeypatch.setenv("EVSPAN_DEBUG", "1")
    with pytest.raises(Exception, match="is not there"):
        evspan_prep("source=/nowhere", "output=/tmp/x")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["source=x", "--help"]])
def test_help_lets_a_newcomer_act(evspan_prep, arguments):
    code, out, _ = evspan_prep(*arguments)
    assert code == 0
    assert out.strip() == HELP.strip()
    for word in (
        "source=raw output=shards",
        "X_bbox.npy",
        "preview",
        "decode",
        "info",
        "processes",
        "dataset=gen4",
    ):
        assert word in out


def test_cfg_shows_the_config_and_prepares_nothing(tmp_path, evspan_prep):
    code, out, _ = evspan_prep(
        "--cfg", "job", "source=raw", f"output={tmp_path / 'out'}", "frames.bins=7"
    )
    assert code == 0
    assert "bins: 7" in out
    assert "source: raw" in out
    assert not (tmp_path / "out").exists()


# -- info --------------------------------------------------------------------------------------------------------
def test_info_of_a_real_recording(samples_dir, evspan_prep):
    code, out, err = evspan_prep("info", samples_dir / "gen4_evt3_triggers.raw")
    assert (code, err) == (0, "")
    values = dict(line.split(None, 1) for line in out.splitlines())
    assert values == {
        "file": f"{samples_dir / 'gen4_evt3_triggers.raw'} (0.8 MB)",
        "format": "evt3",
        "sensor": "1280 x 720",
        "events": "82469",
        "time": "14224870 to 15476187 us, 1.251 s",
        "rate": values["rate"],
        "brighter": "50.2%",
        "boxes": "none next to it",
    }
    golden = json.loads((samples_dir / "golden.json").read_text())["gen4_evt3_triggers.raw"]
    assert values["brighter"] == f"{golden['p_sum'] / golden['events']:.1%}"
    events = np.concatenate(
        [e.t for e in open_recording(samples_dir / "gen4_evt3_triggers.raw").chunks()]
    )
    busiest = np.bincount(events // 10_000 - events[0] // 10_000).max()
    assert values["rate"] == f"0.07 M events/s on average, {busiest / 1e4:.2f} in the busiest 10 ms"


def test_info_and_decode_report_what_is_doubtful(tmp_path, evspan_prep):
    times = np.append(np.arange(1000), np.arange(1000)).astype("<u4")
    halves = np.stack([times, np.zeros(2000, "<u4")], 1)
    (tmp_path / "a_td.dat").write_bytes(b"% Version 2\n\x0c\x08" + halves.tobytes())
    code, out, _ = evspan_prep("info", tmp_path / "a_td.dat")
    assert code == 0
    assert "sensor    1280 x 720 (assumed: the file does not state it)" in out
    for text in (out, evspan_prep("decode", tmp_path / "a_td.dat", tmp_path / "a.h5")[1]):
        assert "dataset.sensor_size=[HEIGHT,WIDTH]" in text
        assert "the largest step is at event 1000, at 0 us, 999 us back" in text


def test_info_of_a_simulated_one_tells_its_boxes(source, evspan_prep):
    code, out, _ = evspan_prep("info", source / "train" / "c_td.h5")
    assert code == 0
    assert "format    h5\nsensor    200 x 160\n" in out
    assert f"boxes     {np.load(source / 'train' / 'c_bbox.npy').size} in c_bbox.npy\n" in out


def test_info_and_its_mistakes(tmp_path, evspan_prep):
    assert "nothing.raw" in refused(evspan_prep("info", tmp_path / "nothing.raw"))
    (tmp_path / "a.mov").write_bytes(b"film")
    assert ".mov" in refused(evspan_prep("info", tmp_path / "a.mov"))
    assert "--help shows how" in refused(evspan_prep("info"))
    code, out, _ = evspan_prep("info", "--help")
    assert code == 0
    assert "example: evspan prep info" in out


# -- decode ------------------------------------------------------------------------------------------------------
def columns_of(path):
    with h5py.File(path) as file:
        assert set(file) == {"events"}
        return {k: v[()] for k, v in file["events"].items()}


@pytest.mark.parametrize(
    "name", ["gen4_evt3_triggers.raw", "gen4_evt3_dense.raw", "gen3_evt2.raw", "atis_ncars.dat"]
)
def test_decode_gives_the_golden_events(samples_dir, tmp_path, evspan_prep, name):
    golden = json.loads((samples_dir / "golden.json").read_text())[name]
    code, out, err = evspan_prep("decode", samples_dir / name, tmp_path / "out.h5")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'out.h5'}: {golden['events']} events")
    columns = columns_of(tmp_path / "out.h5")
    for column, kind in (("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1")):
        assert (
            hashlib.sha256(columns[column].astype(kind).tobytes()).hexdigest()
            == golden["sha256"][column]
        )
    recording = open_recording(samples_dir / name)
    assert (columns["height"], columns["width"]) == (recording.height, recording.width)


PLAIN_H5PY = """
import sys, h5py
with h5py.File(sys.argv[1]) as file:
    print([len(file["events"][name][:]) for name in "txyp"], file["events/t"].compression)
assert "hdf5plugin" not in sys.modules
"""


@pytest.mark.parametrize(
    ("options", "compression"),
    [((), "gzip"), (("--compression", "none"), "None"), (("--compression", "lz4"), None)],
)
def test_plain_h5py_reads_what_decode_writes(source, tmp_path, evspan_prep, options, compression):
    out = tmp_path / "out.h5"
    assert evspan_prep("decode", source / "train/b_td.dat", out, *options)[0] == 0
    events = sum(len(part.t) for part in open_recording(source / "train/b_td.dat").chunks())
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_H5PY, out],
        env={**os.environ, "HDF5_PLUGIN_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if compression is None:  # needs hdf5plugin, which --help says
        assert "plugin" in done.stderr
        assert len(columns_of(out)["t"]) == events
        return
    assert done.stdout == f"{[events] * 4} {compression}\n"


@pytest.mark.parametrize("name", ["train/a_td.raw", "train/b_td.dat", "train/c_td.h5"])
def test_decode_of_every_format_can_be_decoded_again(source, tmp_path, evspan_prep, name):
    assert evspan_prep("decode", source / name, tmp_path / "one.h5")[0] == 0
    assert evspan_prep("decode", tmp_path / "one.h5", tmp_path / "two.h5")[0] == 0
    first, second = columns_of(tmp_path / "one.h5"), columns_of(tmp_path / "two.h5")
    expected = [
        np.concatenate(c) for c in zip(*open_recording(source / name).chunks(), strict=True)
    ]
    for column, values in zip("txyp", expected, strict=True):
        np.testing.assert_array_equal(first[column], values)
        np.testing.assert_array_equal(second[column], values)


def test_decode_does_not_touch_its_input(source, tmp_path, evspan_prep):
    path = tmp_path / "a.h5"
    path.write_bytes((source / "train" / "c_td.h5").read_bytes())
    before = path.read_bytes()
    (tmp_path / "linked.h5").symlink_to(path)
    os.link(path, tmp_path / "same.h5")
    for out in (path, tmp_path / "linked.h5", tmp_path / "same.h5", tmp_path / "." / "a.h5"):
        assert "is the recording itself; name another file" in refused(
            evspan_prep("decode", path, out)
        )
    assert path.read_bytes() == before


def test_a_decode_that_fails_leaves_no_file(source, tmp_path, evspan_prep):
    (tmp_path / "cut.raw").write_bytes((source / "train" / "a_td.raw").read_bytes()[:-1])
    assert "cut off" in refused(
        evspan_prep("decode", tmp_path / "cut.raw", tmp_path / "deep" / "out.h5")
    )
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "old.h5").write_bytes(b"what was there")
    refused(evspan_prep("decode", tmp_path / "cut.raw", tmp_path / "old.h5"))
    assert (tmp_path / "old.h5").read_bytes() == b"what was there"
    assert "decode writes HDF5: evspan prep decode" in refused(
        evspan_prep("decode", tmp_path / "cut.raw", tmp_path / "out.csv")
    )


# -- the whole way, on a real recording --------------------------------------------------------------------------
@pytest.mark.slow
def test_frames_of_a_real_recording_add_up_to_its_events(samples_dir, tmp_path, evspan_prep):
    golden = json.loads((samples_dir / "golden.json").read_text())["gen4_evt3_triggers.raw"]
    code, _out, err = evspan_prep(
        f"source={samples_dir / 'gen4_evt3_triggers.raw'}",
        f"output={tmp_path / 'out'}",
        "frames.downsample=1",
        "frames.cutoff=255",
        "processes=1",
    )
    assert (code, err) == (0, "")
    (columns,), (entry,) = contents(tmp_path / "out").values(), entries(tmp_path / "out").values()
    assert columns["frames"].shape == (26, 20, 720, 1280)
    assert entry["split"] == "test"
    assert (
        int(columns["frames"].sum(dtype=np.int64)) == golden["events"] == entry["events"] == 82_469
    )
    assert columns["end_us"].tolist() == [golden["t_first"] + 50_000 * k for k in range(1, 27)]
    assert int(columns["frames"][:, 10:].sum(dtype=np.int64)) == golden["p_sum"]
    assert not columns["labelled"].any()
    assert not columns["boxes"].size


# -- preview: that it is reached; what it draws is in test_preview.py --------------------------------------------
@pytest.mark.slow
def test_preview_of_shards(shards, tmp_path, evspan_prep):
    code, out, err = evspan_prep("preview", shards, tmp_path / "sheet.png", "--split", "train")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'sheet.png'}: 11 frames of train/a with ")
    assert Image.open(tmp_path / "sheet.png").size[0] > 400
    assert "has no recording 'x'" in refused(
        evspan_prep("preview", shards, tmp_path / "x.png", "--recording", "x")
    )
