"""`evspan infer` on folders, lists, patterns and shards; names of outputs; damaged recordings."""

import errno
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from evspan.conf.errors import ShardError, UserError
from evspan.conf.schema.prep import DownsampleBy, FrameConfig, frame_config
from evspan.conf.schema.training import BackboneConfig, ModelConfig, PostprocessConfig
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.reading import find_group
from evspan.launch.cli.infer import main
from evspan.pipeline.data import datasets
from evspan.pipeline.data.datasets import frame_differences
from evspan.pipeline.inference import overlay, sources
from evspan.pipeline.inference.inputs import expand_inputs
from evspan.pipeline.inference.options import InferOptions, RecordingFiles
from evspan.pipeline.inference.sources import StoredFrames
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights, save_weights
from support.prepared import prep_config
from support.small_shards import FRAMES as SMALL_FRAMES
from support.small_shards import write_small_shards

FRAMES = FrameConfig(bins=3, downsample=2)


def write_recording(path: Path, windows: int = 3, seed: int = 0, first_us: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    n = 2000 * windows
    t = np.sort(rng.integers(0, 50_000 * windows, n))
    t[0] = 0
    t[-1] = 50_000 * windows - 1
    columns = (
        first_us + t,
        rng.integers(0, 160, n),
        rng.integers(0, 128, n),
        rng.integers(0, 2, n),
    )
    np.savetxt(path, np.stack(columns, 1), "%d", header="width 160 height 128")
    return path


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(folder: Path, *words: str, split: str | None = None) -> dict[str, str]:
    items = expand_inputs([folder / word for word in words], split)
    return {item.name: str(item.path.relative_to(folder)) for item in items}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=8),
        postprocess=PostprocessConfig(confidence_threshold=0.0001),
    )
    detector = Detector(model, FRAMES.channels)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(path, Weights(detector.state_dict(), model, FRAMES, ["a", "b", "c"], 7))
    return path


def infer(checkpoint: Path, *arguments: object) -> None:
    main([str(checkpoint), *map(str, arguments), "--no-video", "--threads", "1"])


# -- what is read ----------------------------------------------------------------------------------
def test_folders_lists_and_patterns_name_recordings(tmp_path):
    touched(tmp_path, "set/train/a_td.raw", "set/val/a_td.raw", "set/val/b.dat", "flat/c.h5")
    touched(tmp_path, "set/val/b_bbox.npy", "flat/d.RAW", "flat/notes.txt", "one.raw")
    (tmp_path / "list.txt").write_text("val set/val/b.dat -\ntest flat/c.h5\n")
    assert names(tmp_path, "one.raw") == {"one": "one.raw"}
    assert names(tmp_path, "flat") == {"c": "flat/c.h5", "d": "flat/d.RAW"}
    in_set = {
        "train/a": "set/train/a_td.raw",
        "val/a": "set/val/a_td.raw",
        "val/b": "set/val/b.dat",
    }
    assert names(tmp_path, "set") == in_set
    assert names(tmp_path, "set", split="train") == {"train/a": "set/train/a_td.raw"}
    assert names(tmp_path, "list.txt") == {"val/b": "set/val/b.dat", "test/c": "flat/c.h5"}
    assert names(tmp_path, "flat/*.[hR]*") == {"c": "flat/c.h5", "d": "flat/d.RAW"}
    by_pattern = names(tmp_path, "set/**/*.raw")
    assert sorted(by_pattern.values()) == ["set/train/a_td.raw", "set/val/a_td.raw"]
    (boxes,) = [item.boxes for item in expand_inputs([tmp_path / "set"]) if item.name == "val/b"]
    assert boxes == tmp_path / "set/val/b_bbox.npy"
    (boxes,) = [item.boxes for item in expand_inputs([tmp_path / "list.txt"], "val")]
    assert boxes is None


def test_names_of_outputs_differ_and_each_recording_is_read_once(tmp_path):
    touched(tmp_path, "x/day/a.raw", "y/day/a.raw", "y/day/a.dat", "y/b.raw")
    found = names(tmp_path, "x/day/a.raw", "y/day/a.raw", "y/day/a.dat", "y/b.raw", "y/*.raw")
    assert found == {
        "x/day/a_raw": "x/day/a.raw",
        "y/day/a_raw": "y/day/a.raw",
        "a_dat": "y/day/a.dat",
        "b": "y/b.raw",
    }
    assert names(tmp_path, "x/day", "y/b.raw") == {"a": "x/day/a.raw", "b": "y/b.raw"}


@pytest.mark.parametrize(
    ("word", "split", "message"),
    [
        ("gone.raw", None, r"gone\.raw is no file"),
        ("*.nothing", None, r"\*\.nothing matches no file"),
        ("empty", None, "holds no recordings"),
        ("set", "test", "has no recordings of test; it has some of train"),
    ],
)
def test_what_names_no_recording_is_refused(tmp_path, word, split, message):
    touched(tmp_path, "set/train/a.raw", "empty/notes.md")
    with pytest.raises(UserError, match=message):
        expand_inputs([tmp_path / word], split)


# -- runs ------------------------------------------------------------------------------------------
def test_a_damaged_recording_does_not_stop_the_others(tmp_path, checkpoint, capsys):
    write_recording(tmp_path / "in/a.txt")
    write_recording(tmp_path / "in/b.txt")
    write_recording(tmp_path / "in/c.txt")
    with (tmp_path / "in/b.txt").open("a") as file:
        file.write("149999 1 2\n149999 1 2 1\n")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, tmp_path / "in", "--output", out)
    captured = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["a_bbox.npy", "c_bbox.npy"]
    assert captured.out.count("frames of 50 ms") == 2
    assert "1 of 3 recordings could not be read; the others are done" in captured.err
    assert "b.txt, line 6002: p (column 4) is missing" in captured.err


def test_a_recording_that_cannot_be_read_now_does_not_stop_the_others(
    tmp_path, checkpoint, capsys, monkeypatch
):
    for name in ("a", "b", "c", "d"):
        write_recording(tmp_path / f"in/{name}.txt")
    event_frames = sources.EventFrames.frames

    def opened(path, **options):
        if path.name == "b.txt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_recording(path, **options)

    def frames(self, start_s, seconds):
        if self.recording.path.name == "c.txt":
            raise OSError(errno.ESTALE, "Stale file handle", str(self.recording.path))
        return event_frames(self, start_s, seconds)

    monkeypatch.setattr(sources, "open_recording", opened)
    monkeypatch.setattr(sources.EventFrames, "frames", frames)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, tmp_path / "in", "--output", out)
    error = capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["a_bbox.npy", "d_bbox.npy"]
    assert "2 of 4 recordings could not be read; the others are done" in error
    assert "b.txt" in error and "c.txt: Stale file handle" in error


def test_a_full_disk_stops_all_recordings(tmp_path, checkpoint, monkeypatch):
    for name in ("a", "b"):
        write_recording(tmp_path / f"in/{name}.txt")
    opened = []

    def full(files, config, options):
        opened.append(files.recording.name)
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    monkeypatch.setattr("evspan.pipeline.inference.recordings.open_source", full)
    with pytest.raises(SystemExit):
        infer(checkpoint, tmp_path / "in", "--output", tmp_path / "out")
    assert opened == ["a.txt"]


def test_a_damaged_recording_of_shards_does_not_stop_the_others(tmp_path, checkpoint, capsys):
    for seed, name in enumerate(("a", "b", "c")):
        write_recording(tmp_path / f"raw/val/{name}.txt", seed=seed)
    shards = tmp_path / "shards"
    prepare(prep_config(tmp_path / "raw", shards, frames={"downsample": 2}))
    entry = next(e for e in load_manifest(shards).recordings if e.name == "b")
    with h5py.File(shards / entry.shard, "r+") as file:
        del file[entry.group]["frame_start"]
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, shards, "--output", out)
    error = capsys.readouterr().err
    assert "1 of 3 recordings could not be read; the others are done" in error
    assert "recording 'b'" in error
    assert sorted(path.name for path in out.rglob("*.npy")) == ["a_bbox.npy", "c_bbox.npy"]


def test_a_recording_of_shards_is_opened_without_the_others(tmp_path, monkeypatch):
    root = write_small_shards(tmp_path / "shards", {"val": [4, 5, 6]})
    groups = []

    def counted(file, entry):
        groups.append(entry.group)
        return find_group(file, entry)

    monkeypatch.setattr(datasets, "find_group", counted)
    source = stored_frames(root, "val/val_001", frame_config(SMALL_FRAMES))
    assert len(list(source.frames(0, None))) == 5
    assert groups == ["val_001"]
    with pytest.raises(ShardError, match="has no recording 'gone' in split 'val'"):
        stored_frames(root, "val/gone", frame_config(SMALL_FRAMES))


@pytest.mark.slow
def test_size_and_time_unit_of_a_recording_that_does_not_state_them(tmp_path, checkpoint, capsys):
    stated = write_recording(tmp_path / "stated.txt")
    rows = "".join(f"{i / 1000:.3f} {i % 160} 100 1\n" for i in range(150))
    unstated = tmp_path / "unstated.txt"
    unstated.write_text(rows)
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, unstated, "--output", tmp_path / "no")
    assert "or --time-unit of evspan infer" in capsys.readouterr().err
    unit = ("--time-unit", "s")
    infer(checkpoint, unstated, "--output", tmp_path / "wide", *unit)
    assert "3 frames of 50 ms, 1280 x 720" in capsys.readouterr().out
    infer(checkpoint, unstated, "--output", tmp_path / "out", *unit, "--sensor-size", "160x128")
    assert "3 frames of 50 ms, 160 x 128" in capsys.readouterr().out
    infer(checkpoint, stated, "--output", tmp_path / "out", "--sensor-size", "99x99")
    assert "3 frames of 50 ms, 160 x 128" in capsys.readouterr().out  # what a file states counts
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, unstated, *unit, "--sensor-size", "160")
    assert "'160' is not WIDTHxHEIGHT" in capsys.readouterr().err


def test_outputs_are_not_replaced_unless_that_is_wished(tmp_path, checkpoint, capsys):
    for name in ("a", "b", "c"):
        write_recording(tmp_path / f"in/{name}.txt")
    out = tmp_path / "out"
    touched(out, "a_bbox.npy", "b_bbox.npy")
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, tmp_path / "in", "--output", out)
    err = capsys.readouterr().err
    assert "a_bbox.npy exists already, and so does 1 more. Give --overwrite" in err
    assert not (out / "c_bbox.npy").exists()
    infer(checkpoint, tmp_path / "in", "--output", out, "--overwrite")
    assert len(np.load(out / "a_bbox.npy"))


@pytest.mark.slow
def test_shards_give_the_detections_of_their_recordings(tmp_path, checkpoint, capsys):
    """Without labels, frames of shards and recordings are the same."""
    write_recording(tmp_path / "raw/train/a.txt", windows=10)
    write_recording(tmp_path / "raw/val/b.txt", windows=3, seed=1)
    config = prep_config(tmp_path / "raw", tmp_path / "shards", frames={"downsample": 2})
    prepare(config)
    infer(checkpoint, tmp_path / "raw", "--output", tmp_path / "of_raw")
    infer(checkpoint, tmp_path / "shards", "--output", tmp_path / "of_shards")
    assert (
        f"train/a in {tmp_path / 'shards'}: 10 frames of 50 ms, 160 x 128"
        in capsys.readouterr().out
    )
    for key in ("train/a", "val/b"):
        expected = np.load(tmp_path / "of_raw" / f"{key}_bbox.npy")
        assert len(expected)
        np.testing.assert_array_equal(np.load(tmp_path / "of_shards" / f"{key}_bbox.npy"), expected)
    infer(checkpoint, tmp_path / "shards", "--split", "val", "--output", tmp_path / "val")
    assert [path.name for path in (tmp_path / "val").iterdir()] == ["val"]
    other = prep_config(tmp_path / "raw", tmp_path / "other", frames={"downsample": 4})
    prepare(other)
    with pytest.raises(SystemExit, match="2"):
        infer(checkpoint, tmp_path / "other", "--output", tmp_path / "no")
    assert "was prepared with FrameConfig(" in capsys.readouterr().err


def stored_frames(root: Path, key: str, config: FrameConfig) -> StoredFrames:
    files = RecordingFiles(root, detections=root / "none.npy", key=key)
    return StoredFrames(files, config, InferOptions(Path("weights"), (files,)))


def test_the_method_of_downsampling_counts_only_where_frames_are_downsampled(tmp_path):
    """Shards that were not downsampled have the same frames whatever the method."""
    write_recording(tmp_path / "raw/train/a.txt")
    frames = {"downsample": 1, "downsample_by": DownsampleBy.nearest}
    prepare(prep_config(tmp_path / "raw", tmp_path / "shards", frames=frames))
    summed = FrameConfig(bins=3, downsample=1, downsample_by=DownsampleBy.sum)
    source = stored_frames(tmp_path / "shards", "train/a", summed)
    assert len(list(source.frames(0, None))) == 3
    with pytest.raises(UserError, match=r"was prepared with FrameConfig\("):
        stored_frames(tmp_path / "shards", "train/a", replace(summed, cutoff=9))
    half = replace(summed, downsample=2)
    by_nearest = replace(half, downsample_by=DownsampleBy.nearest)
    assert frame_differences(half, by_nearest) == {
        "downsample_by": (DownsampleBy.sum, DownsampleBy.nearest)
    }
    assert frame_differences(summed, half) == {"downsample": (1, 2)}


@pytest.fixture(scope="module")
def source_of_windows(tmp_path_factory) -> StoredFrames:
    """Shards of 70 windows."""
    root = write_small_shards(tmp_path_factory.mktemp("windows") / "shards", {"val": [70]})
    return stored_frames(root, "val/val_000", frame_config(SMALL_FRAMES))


@pytest.mark.parametrize("length_us", [48_100, 50_000, 51_900])
@pytest.mark.parametrize("start_s", [0.0, 0.31, 1.52, 2.9])
@pytest.mark.parametrize("seconds", [None, 0.06, 0.42])
def test_a_part_of_shards_begins_and_ends_at_the_windows_that_are_closest(
    source_of_windows, length_us, start_s, seconds
):
    first_end_us = 20_000  # the first window begins before the first event
    ends = first_end_us + length_us * np.arange(70)
    source = source_of_windows
    source.data = replace(source.data, clock_us=5_000_000, end_us=ends)
    parts = [frame.end_us - 5_000_000 for frame in source.frames(start_s, seconds)]
    begins = ends - length_us
    first = int(np.abs(begins - 1e6 * start_s).argmin()) if start_s else 0
    last = 69
    if seconds is not None:
        last = int(np.abs(ends - begins[first] - 1e6 * seconds).argmin())
    assert parts == ends[first : last + 1].tolist()


def test_shards_of_even_windows_are_counted_as_recordings_are(source_of_windows):
    source = source_of_windows
    source.data = replace(source.data, clock_us=0, end_us=50_000 * np.arange(1, 71))
    for start_s in (0, 0.02, 0.03, 0.05, 0.11, 3.45):
        first = round(start_s / 0.05)
        for seconds in (0.05, 0.06, 0.09, 0.2):
            ends = [frame.end_us for frame in source.frames(start_s, seconds)]
            last = min(70, first + round(seconds / 0.05))
            assert ends == [50_000 * (i + 1) for i in range(first, last)]
    with pytest.raises(UserError, match="has 70 frames; begin earlier"):
        source.frames(3.6, None)


@pytest.mark.slow
def test_videos_of_recordings_and_shards_show_the_time_since_the_first_event(
    tmp_path, checkpoint, monkeypatch
):
    write_recording(tmp_path / "raw/train/a.txt", windows=4, first_us=7_000_000)
    prepare(prep_config(tmp_path / "raw", tmp_path / "shards", frames={"downsample": 2}))
    texts: list[str] = []
    monkeypatch.setattr(overlay, "draw_label", lambda rgb, text: texts.append(text) or rgb)
    for source in ("raw/train/a.txt", "shards"):
        texts.clear()
        video = ["--video", tmp_path / "a.gif"] if source != "shards" else []
        words = [checkpoint, tmp_path / source, "--output", tmp_path / "out" / source, *video]
        main([*map(str, words), "--threads", "1", "--from", "0.1"])
        assert texts == ["0.15 s", "0.20 s"]
