"""`evspan prep preview`: its images of recordings and of shards."""

import shutil

import numpy as np
import pytest
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.draw import draw_boxes, draw_label, frame_to_rgb
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.preview import recording_frames, sample_evenly, shard_frames
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.simulator import simulate
from evspan.launch.cli.prep_preview import main
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from support.event_files import concatenated
from support.prepared import SCENE, WIDTH, contents, entries, prep_config
from support.slow_frames import slow_frame


@pytest.fixture
def preview(capsys):
    def call(*arguments):
        capsys.readouterr()
        code: int | str | None = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


def tiles(path, height, width, columns):
    """The images of a sheet, row by row."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    rows = (sheet.shape[0] + 2) // (height + 2)
    images = []
    for i in range(rows * columns):
        y = i // columns * (height + 2)
        x = i % columns * (width + 2)
        images.append(sheet[y : y + height, x : x + width])
    return images


def open_gif(path):
    gif = Image.open(path)
    assert isinstance(gif, GifImageFile)
    return gif


def drawn(frame, boxes, labels, end_us):
    corners = np.zeros((len(boxes), 4))
    for row, box in zip(corners, boxes, strict=True):
        row[:] = (box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])
    image = draw_boxes(frame_to_rgb(frame), corners, labels, upscale=2)
    return draw_label(image, f"{end_us / 1e6:.2f} s")


# -- what is shown --------------------------------------------------------------------------------
def test_frames_of_a_recording_come_with_the_boxes_at_their_ends(source):
    path = source / "train" / "a_td.raw"
    events = concatenated(open_recording(path).chunks())
    boxes = read_boxes(source / "train" / "a_bbox.npy")
    frames = list(recording_frames(path, FrameConfig(bins=2), ["ball", "box"], 0.0))
    first = int(events.t[0])
    start = frames[0].end_us + first - 50_000
    num_boxes = 0
    for frame in frames:
        end = frame.end_us + first
        expected = slow_frame(
            events.take((events.t >= start) & (events.t < end)),
            start,
            end,
            height=160,
            width=WIDTH,
            bins=2,
            cutoff=10,
            downsample=2,
            by="sum",
        )
        np.testing.assert_array_equal(frame.frame, expected)
        at_end = boxes[boxes["t"] == end]
        right = at_end["x"] + at_end["w"]
        bottom = at_end["y"] + at_end["h"]
        corners = np.stack([at_end["x"], at_end["y"], right, bottom], 1).astype(np.float64)
        np.testing.assert_array_equal(frame.boxes, corners / 2)
        assert frame.labels == [("ball", "box", "class 2")[k] for k in at_end["class_id"]]
        start = end
        num_boxes += len(at_end)
    assert len(frames) == 11
    assert num_boxes > 0


def test_frames_of_a_shard_are_what_is_stored(prepared):
    entry = next(r for r in load_manifest(prepared).recordings if r.name == "b")
    stored = contents(prepared)["train/b"]
    frames = list(shard_frames(prepared, entry, ["ball", "box", "bar"], [5, 1, 6]))
    for frame, i in zip(frames, (5, 1, 6), strict=True):
        boxes = stored["boxes"][stored["box_start"][i] : stored["box_start"][i + 1]]
        assert frame.end_us == stored["end_us"][i] - entry.first_us
        np.testing.assert_array_equal(frame.frame, stored["frames"][i])
        np.testing.assert_allclose(frame.boxes[:, :2], np.stack((boxes["x"], boxes["y"]), 1))
        np.testing.assert_allclose(
            frame.boxes[:, 2:] - frame.boxes[:, :2],
            np.stack((boxes["w"], boxes["h"]), 1),
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("length", "count"), [(0, 5), (1, 5), (5, 5), (6, 5), (23, 5), (1000, 7), (64, 1)]
)
def test_sampling_takes_evenly_from_a_stream_of_unknown_length(length, count):
    taken = sample_evenly(iter(range(length)), count)
    assert taken == sorted(set(taken))
    assert len(taken) == min(length, count)
    if length > count > 1:
        gaps = np.diff(taken)
        assert taken[0] == 0
        assert taken[-1] > 0.85 * (length - 1)
        assert gaps.max() <= 1.3 * gaps.min() + 1


# -- sheets ---------------------------------------------------------------------------------------
def test_a_sheet_of_a_shard_shows_its_frames(prepared, tmp_path, preview):
    code, out, err = preview(prepared, tmp_path / "sheet.png", "--split", "val")
    stored = contents(prepared)["val/d"]
    entry = entries(prepared)["val/d"]
    n = entry["frames"]
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'sheet.png'}: {n} frames of val/d with {entry['boxes']} boxes\n"
    assert n == 7
    images = tiles(tmp_path / "sheet.png", 160, 200, columns=2)  # about as wide as high
    for i in range(n):
        boxes = stored["boxes"][stored["box_start"][i] : stored["box_start"][i + 1]]
        labels = [("ball", "box", "bar")[box["class_id"]] for box in boxes]
        end_us = stored["end_us"][i] - entry["first_us"]
        expected = drawn(stored["frames"][i], boxes, labels, end_us)
        np.testing.assert_array_equal(images[i], expected)


def test_a_recording_and_its_shard_show_the_same_pixels(source, prepared, tmp_path, preview):
    assert preview(source / "test" / "plain.raw", tmp_path / "recording.png")[0] == 0
    assert preview(prepared / "test" / "00000.h5", tmp_path / "shard.png")[0] == 0
    recording = np.asarray(Image.open(tmp_path / "recording.png"))
    shard = np.asarray(Image.open(tmp_path / "shard.png"))
    # Colours may differ: hot pixels saturate per bin in shards.
    np.testing.assert_array_equal((recording != 255).any(2), (shard != 255).any(2))


def test_frames_and_from_choose(source, prepared, tmp_path, preview):
    for path, num_frames in ((source / "train" / "a_td.raw", 11), (prepared, 11)):
        code, out, _ = preview(path, tmp_path / "a.png", "--frames", "3")
        assert code == 0
        assert ": 3 frames of " in out
        code, out, _ = preview(path, tmp_path / "a.gif", "--from", "0.25")
        assert code == 0
        assert f": {num_frames - 5} frames of " in out
        code, out, _ = preview(path, tmp_path / "a.gif", "--frames", "4", "--from", "0.1")
        assert code == 0
        assert open_gif(tmp_path / "a.gif").n_frames == 4
        code, _, err = preview(path, tmp_path / "b.png", "--from", "7")
        assert code == 2
        assert "has no frames from 7 s on; give an earlier --from" in err


@pytest.mark.parametrize("period_us", [48_000, 52_000])
def test_from_counts_in_the_time_of_stored_windows_of_another_length(tmp_path, period_us, preview):
    """Labels end the windows: each is 2 ms shorter or longer than 50 ms."""
    raw = tmp_path / "raw"
    simulate(raw / "train" / "a_td.raw", seconds=3, seed=1, config=SCENE)
    boxes = np.zeros(60, RAW_BOX)
    boxes["t"] = period_us * np.arange(1, 61)
    boxes["w"] = boxes["h"] = 30
    write_boxes(raw / "train" / "a_bbox.npy", boxes)
    shards = tmp_path / "shards"
    prepare(prep_config(raw, shards, labels={"label_every_ms": 50}))
    ends = contents(shards)["train/a"]["end_us"] - entries(shards)["train/a"]["first_us"]
    starts = ends[:-1]  # of all windows but the first
    assert (np.diff(ends)[1:50] == period_us).all()
    begins_in_time = starts >= 2_500_000 - 25_000
    assert begins_in_time.sum() != len(ends) - 2500 // 50  # nominal windows
    for path in (shards, raw / "train" / "a_td.raw"):
        code, out, _ = preview(path, tmp_path / "a.gif", "--from", "2.5")
        assert code == 0
        assert f": {begins_in_time.sum()} frames of " in out


def test_downsample_and_window_are_those_asked_for(source, tmp_path, preview):
    recording = source / "val" / "d_td.raw"
    assert preview(recording, tmp_path / "a.png", "--frames", "1", "--downsample", "4")[0] == 0
    assert Image.open(tmp_path / "a.png").size == (100, 80)  # drawn at twice its size
    options = ["--frames", "1", "--downsample", "1", "--window-ms", "400"]
    assert preview(recording, tmp_path / "b.png", *options)[0] == 0
    assert Image.open(tmp_path / "b.png").size == (400, 320)
    rgb = np.asarray(Image.open(tmp_path / "b.png").convert("RGB"))
    assert (rgb != 255).any(2).mean() > 0.02


# -- animations -----------------------------------------------------------------------------------
def test_a_gif_plays_all_frames_in_real_time(source, prepared, tmp_path, preview):
    for path in (source / "train" / "a_td.raw", prepared / "train" / "00000.h5"):
        assert preview(path, tmp_path / "a.gif")[0] == 0
        gif = open_gif(tmp_path / "a.gif")
        assert gif.n_frames == 11
        assert gif.size == (200, 160)
        duration_ms = 0
        for i in range(11):
            gif.seek(i)
            duration_ms += gif.info["duration"]
        assert duration_ms == 50 * 11
        gif.seek(5)
        shown = np.asarray(gif.convert("RGB")).astype(int)
        redder = shown[..., 0] - shown[..., 2]
        assert (redder > 80).any()
        assert (redder < -80).any()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="no ffmpeg; apt-get install ffmpeg enables this test"
)
@pytest.mark.timeout(240)
def test_an_mp4_is_written(source, tmp_path, preview):
    code, out, err = preview(source / "train" / "a_td.raw", tmp_path / "a.mp4", "--downsample", "1")
    assert (code, err) == (0, "")
    assert ": 11 frames of a_td.raw" in out
    assert (tmp_path / "a.mp4").stat().st_size > 1000


# -- mistakes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RECORDING", "OUT.jpg"], "ends in none of .png, .gif, .mp4"),
        (["RECORDING", "OUT.png", "--frames", "0"], "give 1 frame or more"),
        (["RECORDING", "OUT.png", "--from", "-1"], "0 s or later"),
        (["RECORDING", "OUT.png", "--from", "nan"], "--from nan: give 1 frame or more"),
        (["SHARDS", "OUT.png", "--from", "nan"], "a time of 0 s or later"),
        (["SHARDS", "OUT.png", "--from", "inf"], "a time of 0 s or later"),
        (["RECORDING", "OUT.png", "--window-ms", "0"], "window_ms is 0"),
        (
            ["RECORDING", "OUT.png", "--split", "val"],
            "--recording and --split choose from a prepared dataset",
        ),
        (
            ["RECORDING", "OUT.png", "--frames", "many"],
            "--frames: invalid int value: 'many'; evspan prep preview --help shows how",
        ),
        (
            ["RECORDING"],
            "the following arguments are required: OUT; evspan prep preview --help shows how",
        ),
        (["SHARDS", "OUT.png", "--downsample", "4"], "the frames in SHARDS exist already"),
        (["SHARDS", "OUT.png", "--window-ms", "20"], "the frames in SHARDS exist already"),
        (
            ["SHARDS", "OUT.png", "--recording", "zz"],
            "has no recording 'zz' in any split; there are: train/a, train/b",
        ),
        (
            ["SHARDS", "OUT.png", "--split", "val", "--recording", "a"],
            "has no recording 'a' in split val",
        ),
        (["NOWHERE", "OUT.png"], "NOWHERE is no file"),
        (["EMPTY", "OUT.png"], "holds no manifest.json"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    source, prepared, tmp_path, preview, arguments, message
):
    (tmp_path / "empty").mkdir()
    names = {
        "RECORDING": source / "val" / "d_td.raw",
        "SHARDS": prepared,
        "OUT": tmp_path / "out",
        "NOWHERE": tmp_path / "nowhere",
        "EMPTY": tmp_path / "empty",
    }

    def filled(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path)) if "required" not in text else text
        return text

    code, out, err = preview(*map(filled, arguments))
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert filled(message) in err
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_recording_that_breaks_off_leaves_no_animation(source, tmp_path, preview):
    (tmp_path / "cut.raw").write_bytes((source / "train" / "a_td.raw").read_bytes()[:-1])
    for suffix in ("gif", "png"):
        code, _, err = preview(tmp_path / "cut.raw", tmp_path / f"a.{suffix}")
        assert code == 2
        assert "cut off" in err
    assert [p.name for p in tmp_path.iterdir()] == ["cut.raw"]


def test_help_shows_examples(preview):
    code, out, _ = preview("--help")
    assert code == 0
    assert "evspan prep preview drive_td.raw drive.png" in out
    assert "violet" in out


def test_a_real_street_is_drawn(samples_dir, tmp_path, preview):
    """The dense sample: 8.8 ms of a drive, which is one frame."""
    code, out, _ = preview(samples_dir / "gen4_evt3_dense.raw", tmp_path / "street.png")
    assert code == 0
    assert ": 1 frame of gen4_evt3_dense.raw with 0 boxes" in out
    image = np.asarray(Image.open(tmp_path / "street.png").convert("RGB"))
    assert image.shape == (360, 640, 3)
    coloured = (image != 255).any(2)
    events = concatenated(open_recording(samples_dir / "gen4_evt3_dense.raw").chunks())
    expected = np.zeros((360, 640), bool)
    expected[events.y // 2, events.x // 2] = True
    expected[340:, :60] = coloured[340:, :60]  # the time is written there
    np.testing.assert_array_equal(coloured, expected)
