"""`evspan infer`: a sensor file in, detections and a video out, against a plain loop over frames."""

import csv
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import BackboneConfig, FpnConfig, ModelConfig, PostprocessConfig
from evspan.data_prep.labels.box_files import NO_TRACK, RAW_BOX, read_boxes
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.launch.cli.infer import main
from evspan.pipeline.inference import overlay as overlay_module
from evspan.pipeline.inference.detect import Detected, WorkTimer, clip_boxes, detect, prefetch
from evspan.pipeline.inference.overlay import (
    DIVIDER_COLOR,
    DIVIDER_WIDTH,
    LABEL_COLOR,
    Overlay,
    class_color,
)
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.inference.writers import DetectionsFile
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.rvt_checkpoint import save_published
from evspan.pipeline.tracking import Tracker, TrackerOptions
from evspan.pipeline.weights import Weights, load_weights, save_weights
from PIL import Image
from support.refusals import refused_by

pytestmark = pytest.mark.timeout(240)
CLASSES = ["ball", "box"]  # of the three that the head has
CONFIDENCE = 0.2
HEADER = "% evt 3.0\n% format EVT3;height={};width={}\n% end\n"
has_ffmpeg = pytest.mark.skipif(
    not shutil.which("ffmpeg"), reason="the program ffmpeg is not installed"
)


@pytest.fixture(autouse=True)
def threads():
    """The command sets them for its whole process. One is quickest where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_weights(path: Path, downsample: int) -> Path:
    """Random, with attention over time, and strong enough that detections differ from frame to frame."""
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=8),
        fpn=FpnConfig(enable_small_object_attention=True),
        postprocess=PostprocessConfig(confidence_threshold=CONFIDENCE),
    )
    frames = FrameConfig(downsample=downsample, bins=4)
    detector = Detector(model, frames.channels)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith(("fpn", "yolox_head")) and parameter.ndim == 4:
                parameter *= 0.2 if "reg_preds" in name else 3.5
            if name.endswith(("gate", "gamma")):
                parameter.fill_(0.5)
        for predictions, bias in (
            (detector.yolox_head.obj_preds, -1.0),
            (detector.yolox_head.cls_preds, 0.0),
        ):
            for conv in predictions:
                conv.bias.fill_(bias)
    save_weights(path, Weights(detector.state_dict(), model, frames, CLASSES, 7))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """a_td.raw: 1 s of 320 x 240, boxes next to it. weights1, 2, 4.safetensors by downsample."""
    folder = tmp_path_factory.mktemp("infer")
    simulate(
        folder / "a_td.raw", seconds=0.93, seed=4, config=SimulatorConfig(height=240, width=320)
    )
    for downsample in (1, 2, 4):
        make_weights(folder / f"weights{downsample}.safetensors", downsample)
    return folder


def count_frames(path: Path, config: FrameConfig):
    """(ends, frames) by the definition, all at once."""
    recording = open_recording(path)
    t, x, y, p = (np.concatenate(c).astype(np.int64) for c in zip(*recording.chunks(), strict=True))
    window, of = divmod(t - t[0], config.window_us)
    height, width = recording.height // config.downsample, recording.width // config.downsample
    counts = np.zeros((window[-1] + 1, 2, config.bins, height, width), np.int32)
    inside = (y < height * config.downsample) & (x < width * config.downsample)
    place = (
        window,
        p,
        of * config.bins // config.window_us,
        y // config.downsample,
        x // config.downsample,
    )
    np.add.at(counts, tuple(v[inside] for v in place), 1)
    frames = counts.clip(max=config.cutoff).astype(np.uint8).reshape(len(counts), -1, height, width)
    return t[0] + config.window_us * np.arange(1, len(frames) + 1), frames


def suppress(rows: list[list[float]], threshold: float) -> list[list[float]]:
    """Greedy, class by class; rows: x1, y1, x2, y2, score, class."""
    kept: list[list[float]] = []
    for x1, y1, x2, y2, score, kind in sorted(rows, key=lambda row: -row[4]):
        for u1, v1, u2, v2, _, other in kept:
            shared = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
            if kind == other and shared > threshold * (
                (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            ):
                break
        else:
            kept.append([x1, y1, x2, y2, score, kind])
    return kept


def frame_by_frame(
    path: Path, checkpoint: Path, *, first=0, last=None, confidence=CONFIDENCE, nms=0.45
) -> np.ndarray:
    """The definition: one frame a call, the state handed on, detections as RAW_BOX."""
    weights, recording = load_weights(checkpoint), open_recording(path)
    detector, scale = detector_from(weights), weights.frames.downsample
    ends, frames = count_frames(path, weights.frames)
    size, out = frames.shape[2:], []
    state, no, yes = detector.initial_state(1, *size), torch.tensor([False]), torch.tensor([[True]])
    with torch.no_grad():
        for end, frame in list(zip(ends.tolist(), frames, strict=True))[first:last]:
            raw, state = detector(
                torch.from_numpy(frame)[None, None], state, starts=no, labelled=yes
            )
            d = detector.decode(raw, *size)[0].double().numpy()
            rows = np.concatenate(
                (
                    d[:, :2] - d[:, 2:4] / 2,
                    d[:, :2] + d[:, 2:4] / 2,
                    d[:, 4:5] * d[:, 5:].max(1, keepdims=True),
                    d[:, 5:].argmax(1)[:, None],
                ),
                1,
            )
            for x1, y1, x2, y2, score, kind in suppress(
                rows[rows[:, 4] >= confidence].tolist(), nms
            )[:300]:
                x1, x2 = np.clip((x1 * scale, x2 * scale), 0, recording.width)
                y1, y2 = np.clip((y1 * scale, y2 * scale), 0, recording.height)
                if x2 > x1 and y2 > y1:
                    out.append((end, x1, y1, x2 - x1, y2 - y1, kind, 0, score))
    return np.array(out, RAW_BOX)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == RAW_BOX
    assert actual.size == expected.size
    for name in ("t", "class_id", "track_id"):
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    for name in ("x", "y", "w", "h", "class_confidence"):
        np.testing.assert_allclose(
            actual[name],
            expected[name],
            rtol=1e-4,
            atol=1e-2 if name in "xywh" else 0,
            err_msg=name,
        )


def run(
    here: Path, out: Path, *more: object, recording: str | Path = "a_td.raw", weights: int = 2
) -> np.ndarray:
    checkpoint = here / f"weights{weights}.safetensors"
    main(
        [
            str(checkpoint),
            str(here / recording),
            "--output",
            str(out),
            *map(str, more),
        ]
    )
    return np.load(next(out.glob("*_bbox.npy"))) if out.is_dir() else np.load(out)


refused = partial(refused_by, main)


@pytest.mark.slow
def test_detections_are_those_of_a_plain_loop_however_many_frames_a_call(here, tmp_path):
    expected = frame_by_frame(here / "a_td.raw", here / "weights2.safetensors")
    ends = np.unique(expected["t"])
    assert ends.size == 19
    assert expected.size > 100
    assert len(np.unique(expected["class_id"])) == 3
    for frames in (1, 4, 7):
        assert_same(
            run(here, tmp_path / str(frames), "--no-video", "--frames-per-call", frames), expected
        )
    # The state matters: without it another frame would give other detections.
    alone = run(here, tmp_path / "late", "--no-video", "--from", 0.45, "--seconds", 0.05)
    assert np.unique(alone["t"]).tolist() == [ends[9]]
    with_state = expected[expected["t"] == ends[9]]
    assert alone.size != with_state.size or not np.allclose(
        alone["class_confidence"], with_state["class_confidence"], rtol=1e-3
    )


@pytest.mark.slow
def test_a_part_of_the_recording_and_other_thresholds(here, tmp_path):
    path, checkpoint = here / "a_td.raw", here / "weights2.safetensors"
    actual = run(
        here,
        tmp_path / "a",
        "--no-video",
        "--from",
        0.3,
        "--seconds",
        0.25,
        "--confidence",
        0.19,
        "--nms",
        0.1,
    )
    assert_same(
        actual, frame_by_frame(path, checkpoint, first=6, last=11, confidence=0.19, nms=0.1)
    )
    none = run(here, tmp_path / "none.npy", "--no-video", "--confidence", 1)
    assert none.dtype == RAW_BOX
    assert none.shape == (0,)


def test_a_published_checkpoint_is_read_directly(here, tmp_path):
    published = tmp_path / "weights2.ckpt"
    save_published(published, load_weights(here / "weights2.safetensors"))
    arguments = [here / "a_td.raw", "--no-video", "--seconds", "0.3", "--output"]
    main([str(word) for word in (published, *arguments, tmp_path / "a.npy")])
    main([str(word) for word in (here / "weights2.safetensors", *arguments, tmp_path / "b.npy")])
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("downsample", [1, 4])
def test_other_resolutions_and_sensors(here, tmp_path, downsample):
    """Gen4's size at a quarter; a sensor whose sides no window divides, at full resolution."""
    height, width = (720, 1280) if downsample == 4 else (187, 331)
    simulate(
        tmp_path / "b_td.dat",
        seconds=0.24,
        seed=1,
        config=SimulatorConfig(height=height, width=width),
    )
    actual = run(
        here, tmp_path / "out", "--no-video", recording=tmp_path / "b_td.dat", weights=downsample
    )
    assert_same(
        actual, frame_by_frame(tmp_path / "b_td.dat", here / f"weights{downsample}.safetensors")
    )
    assert actual.size > 20
    assert actual["x"].min() >= 0
    assert actual["y"].min() >= 0
    assert (actual["x"] + actual["w"]).max() <= width
    assert (actual["y"] + actual["h"]).max() <= height


@pytest.mark.slow
def test_a_real_recording(samples_dir, here, tmp_path, capsys):
    path = samples_dir / "gen4_evt3_triggers.raw"
    actual = run(here, tmp_path, "--no-video", recording=path, weights=4)
    assert_same(actual, frame_by_frame(path, here / "weights4.safetensors"))
    frames = len(count_frames(path, FrameConfig(bins=1, downsample=4))[1])
    assert actual.size
    assert f"{frames} frames of 50 ms, 1280 x 720, 0.08 M events read" in capsys.readouterr().out


def test_the_gif_plays_all_frames_at_the_cameras_pace_and_the_command_says_what_it_wrote(
    here, tmp_path, capsys
):
    actual = run(here, tmp_path / "out", "--video", tmp_path / "o.gif", "--seconds", 0.4)
    with Image.open(tmp_path / "o.gif") as gif:
        durations = []
        for i in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(i)
            durations.append(gif.info["duration"])
        assert gif.size == (640, 480)
        assert len(durations) == 8
        assert sum(durations) == 400
    output = capsys.readouterr().out
    kinds = [int((actual["class_id"] == i).sum()) for i in range(3)]
    for line in (
        "8 frames of 50 ms, 320 x 240",
        "weights2.safetensors, step 7",
        "x camera pace: 0.40 s of recording in ",
        f"{tmp_path / 'out' / 'a_bbox.npy'}: {actual.size} detections",
        f"(0 ball: {kinds[0]}, 1 box: {kinds[1]}, 2 class 2: {kinds[2]})",
        f"{tmp_path / 'o.gif'}: detections of confidence 0.3 or more, boxes of a_bbox.npy in green",
    ):
        assert line in output
    assert all(f"{part} " in output.splitlines()[-2] for part in ("decoding", "network", "drawing"))
    assert "latency of a frame" in output.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a_bbox.npy", "o.gif", "out"]


@pytest.mark.slow
@has_ffmpeg
def test_mp4_plays_all_frames(here, tmp_path):
    run(here, tmp_path, "--seconds", 0.4)
    command = [
        "ffmpeg",
        "-loglevel",
        "error",
        "-i",
        tmp_path / "a_overlay.mp4",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "-",
    ]
    pixels = subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
    assert len(pixels) == 8 * 640 * 480


def test_without_ffmpeg_the_video_is_a_gif_unless_mp4_is_asked_for(
    here, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    run(here, tmp_path / "out", "--seconds", 0.1)
    assert "ffmpeg" in capsys.readouterr().out
    assert (tmp_path / "out" / "a_overlay.gif").is_file()
    output = refused(
        capsys,
        here / "weights2.safetensors",
        here / "a_td.raw",
        "--output",
        tmp_path / "new",
        "--video",
        tmp_path / "o.mp4",
    )
    assert "Install the Debian package ffmpeg" in output
    assert "o.gif" in output
    assert not (tmp_path / "new").exists()


def test_the_overlay_shows_detections_and_the_latest_label_of_the_window():
    def box(t, x, y, kind=0):
        return t, x, y, 40, 32, kind, 0, 0.5

    labels = np.array(
        [
            box(10_000, 8, 8),
            box(49_999, 200, 100),
            box(50_000, 80, 80),
            box(50_000, 160, 8),
            box(120_000, 8, 160),
        ],
        RAW_BOX,
    )
    overlay = Overlay(FrameConfig(downsample=2), CLASSES, labels)
    for end, expected in (
        (9_999, []),
        (10_000, [8]),
        (49_999, [200]),
        (50_000, [80, 160]),
        (99_999, [80, 160]),
        (100_000, []),
        (119_999, []),
        (120_000, [8]),
        (169_999, [8]),
        (170_000, []),
    ):
        assert overlay.labels(end)["x"].tolist() == expected
    found = np.array([box(50_000, 240, 120, 2), box(50_000, 240, 60, 1)], RAW_BOX)
    picture = overlay.draw(Detected(50_000, np.zeros((20, 120, 160), np.uint8), found, 1.0), 0)
    assert picture.shape == (480, 640, 3)  # four times the frame, twice the sensor

    def colours(x, y):  # along the left edge of a box at (x, y), below its label
        return {tuple(c) for c in picture[2 * y + 20 : 2 * y + 60, 2 * x].tolist()}

    assert colours(80, 80) == colours(160, 8) == {LABEL_COLOR}
    assert colours(240, 120) == {class_color(2)}
    assert colours(240, 60) == {class_color(1)}
    assert class_color(1) != class_color(2)
    corner = {tuple(c) for c in picture[-60:, -60:].reshape(-1, 3).tolist()}
    assert {class_color(0), class_color(1), LABEL_COLOR} <= corner  # the legend
    assert colours(8, 8) == colours(200, 100) == colours(120, 120) == {(255, 255, 255)}
    both = Overlay(FrameConfig(downsample=2), CLASSES, labels, side_by_side=True).draw(
        Detected(50_000, np.zeros((20, 120, 160), np.uint8), found, 1.0), 0
    )
    assert both.shape == (480, 1280 + DIVIDER_WIDTH, 3)
    assert (both[:, :640] == 255).all()
    assert (both[:, 640 : 640 + DIVIDER_WIDTH] == DIVIDER_COLOR).all()
    assert (both[:, 640 + DIVIDER_WIDTH :] == picture).all()
    found["class_confidence"][1] = 0.29
    found["track_id"][0] = 12
    hidden = Overlay(FrameConfig(downsample=2), CLASSES, labels, lowest_confidence=0.3)
    picture = hidden.draw(Detected(50_000, np.zeros((20, 120, 160), np.uint8), found, 1.0), 0)
    assert colours(240, 120) == {class_color(2)}
    assert colours(240, 60) == {(255, 255, 255)}
    assert hidden._name(found[0]) == "class 2 #12 0.50"
    empty = Overlay(FrameConfig(downsample=2), CLASSES, labels[:0])
    assert not empty.labels(50_000).size


def test_the_overlay_shows_the_time_since_the_first_event(monkeypatch):
    texts = []
    monkeypatch.setattr(overlay_module, "draw_label", lambda rgb, text: texts.append(text) or rgb)
    labels = np.zeros(1, RAW_BOX)
    labels["t"] = 7_050_000  # in the recording's clock
    overlay = Overlay(FrameConfig(downsample=2), CLASSES, labels)
    frame = np.zeros((20, 120, 160), np.uint8)
    overlay.draw(Detected(7_050_000, frame, labels[:0], 1.0), 7_000_000)
    assert texts == ["0.05 s"]
    assert overlay.labels(7_050_000).size == 1


def test_boxes_are_cut_at_the_sensor():
    boxes = np.zeros(4, RAW_BOX)
    for name, values in zip(
        "xywh", ((-5, 90, 100, 3), (-6, 40, 5, -9), (20, 30, 9, 5), (20, 30, 9, 9)), strict=True
    ):
        boxes[name] = values
    boxes["class_id"] = 1, 0, 2, 2
    actual = clip_boxes(boxes, (50, 100))
    assert [actual[k].tolist() for k in "xywh"] == [[0, 90], [0, 40], [15, 10], [14, 10]]
    assert actual["class_id"].tolist() == [1, 0]


@pytest.mark.slow
def test_memory_does_not_grow_only_a_few_frames_are_alive(here):
    weights = load_weights(here / "weights2.safetensors")
    detector, alive, most, read = detector_from(weights), set(), 0, 0

    def frames():  # without end
        nonlocal most, read
        for i in count():
            frame = np.full((weights.frames.channels, 64, 64), i % 3, np.uint8)
            alive.add(i)
            weakref.finalize(frame, alive.discard, i)
            most, read = max(most, len(alive)), read + 1
            yield 50_000 * (i + 1), frame

    source = prefetch(frames(), 4)
    found = detect(
        detector,
        source,
        confidence=0.1,
        nms=0.45,
        frames_per_call=4,
        downsample=2,
        sensor=(128, 128),
        clock=WorkTimer(),
    )
    stream = prefetch(found, 4)
    ends = [item.end_us for item in islice(stream, 100)]
    stream.close()
    source.close()
    assert ends == [50_000 * (i + 1) for i in range(100)]
    assert most <= 20
    assert read <= 120


def test_ahead_hands_on_items_and_errors_and_ends_its_thread():
    def items():
        yield from range(5)
        raise KeyError("five")

    actual, before = [], threading.active_count()
    with pytest.raises(KeyError, match="five"):
        for item in prefetch(items(), 2):
            actual.append(item)
    assert actual == [0, 1, 2, 3, 4]
    assert list(prefetch(iter(()), 1)) == []
    assert list(prefetch(range(3), 9)) == [0, 1, 2]
    for depth in (1, 3):
        made = []
        numbers = prefetch((made.append(i) or i for i in count()), depth)
        assert next(numbers) == 0
        time.sleep(0.05)
        assert (
            len(made) <= depth + 2
        )  # those that wait, the one that waits for space, the one handed out
        numbers.close()
    assert threading.active_count() == before


def test_the_file_of_detections_is_what_numpy_saves(tmp_path):
    rng, parts = np.random.default_rng(0), []
    file = DetectionsFile(tmp_path / "a.npy")
    for n in (0, 1, 70_000, 3):
        parts.append(np.zeros(n, RAW_BOX))
        parts[-1]["t"], parts[-1]["h"] = rng.integers(0, 1 << 40, n), rng.random(n)
        file.add(parts[-1])
    file.close()
    np.save(tmp_path / "b.npy", np.concatenate(parts))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert read_boxes(tmp_path / "a.npy").size == 70_004


def test_a_recording_that_is_cut_off_leaves_nothing_new(here, tmp_path, capsys):
    broken, out = tmp_path / "a_td.raw", tmp_path / "out"
    broken.write_bytes((here / "a_td.raw").read_bytes()[:-1])
    lines = out / "a.json"
    arguments = (here / "weights2.safetensors", broken, "--output", out, "--json", lines)
    assert "cut off" in refused(capsys, *arguments)
    assert not list(out.iterdir())
    lines.write_bytes(b"earlier lines")
    assert "cut off" in refused(capsys, *arguments, "--overwrite")
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("a.json", b"earlier lines")]
    (out / "a_bbox.npy").write_bytes(b"earlier")
    refused(capsys, *arguments)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        "a.json": b"earlier lines",
        "a_bbox.npy": b"earlier",
    }


@pytest.mark.parametrize(
    ("option", "name"), [("--csv", "a.csv"), ("--video", "a.gif"), ("--output", "a.npy")]
)
def test_a_pipe_is_not_replaced(here, tmp_path, capsys, option, name):
    pipe = tmp_path / name
    os.mkfifo(pipe)
    arguments = (here / "weights2.safetensors", here / "a_td.raw", "--overwrite", option, pipe)
    message = refused(capsys, *arguments, *(() if option == "--output" else ("--output", tmp_path)))
    assert f"{name} is a pipe or a device" in message
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_lines_of_json_go_to_a_pipe(here, tmp_path):
    pipe = tmp_path / "lines"
    os.mkfifo(pipe)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(pipe.read_text().splitlines()))
    reader.start()
    run(here, tmp_path / "out", "--no-video", "--seconds", 0.2, "--json", pipe)
    reader.join()
    assert len(lines) == 4
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--confidence", "1.5"], "--confidence is 1.5"),
        (["--nms", "nan"], "--nms is nan"),
        (["--frames-per-call", "0"], "--frames-per-call is 0"),
        (["--threads", "-1"], "--threads is -1"),
        (["--from", "-1"], "--from is -1"),
        (["--from", "2"], "0.93 s after its first event, before 2.00 s"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--seconds", "0.02"], "0.02 seconds are less than a window of 50 ms"),
        (["--device", "abacus"], "the device abacus cannot be used here; there is cpu"),
        (["--device", "cuda:99"], "the device cuda:99 cannot be used here"),
        (["--video", "x.avi"], "neither of .gif, .mp4"),
        (["--video", "x.gif", "--no-video"], "not allowed with"),
        (["--checkpoints", "x"], "--checkpoints"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(here, tmp_path, capsys, wrong, message):
    arguments = [
        here / "weights2.safetensors",
        here / "a_td.raw",
        "--output",
        tmp_path / "out",
        *wrong,
    ]
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.rglob("*.*"))


def test_gpus_that_torch_cannot_use_are_not_passed_over(here, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("evspan.pipeline.parallel.devices.gpu_files", lambda: ["nvidia0"])
    arguments = [here / "weights2.safetensors", here / "a_td.raw", "--output", tmp_path / "out"]
    message = refused(capsys, *arguments)
    assert "has 1 GPU (driver " in message and "build without CUDA" in message
    assert not list(tmp_path.rglob("*.*"))


def test_a_checkpoint_that_is_missing_is_refused(here, tmp_path, capsys):
    message = refused(capsys, "nowhere", here / "a_td.raw", "--output", tmp_path / "out")
    assert "nowhere is not there. Name a published .ckpt, a run folder" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_recordings_that_cannot_work_are_refused(here, tmp_path, capsys):
    empty, tiny = tmp_path / "empty.raw", tmp_path / "tiny.raw"
    empty.write_text(HEADER.format(240, 320))
    tiny.write_text(HEADER.format(3, 3))
    for path, message in (
        (empty, "holds no events"),
        (tiny, "3 x 3 pixels: too small"),
        (here / "a_bbox.npy", "suffix .npy"),
        (tmp_path / "missing.raw", "missing.raw is no file"),
    ):
        output = refused(
            capsys,
            here / "weights4.safetensors",
            path,
            "--output",
            tmp_path / "out",
        )
        assert message in output
        assert path.name in output
    assert not list(tmp_path.rglob("*.npy"))


def test_the_boxes_of_the_recording_are_never_overwritten(here, tmp_path, capsys):
    before = (here / "a_bbox.npy").read_bytes()
    for output in (here, here / "a_bbox.npy", here / "." / ".." / here.name):
        text = refused(
            capsys,
            here / "weights2.safetensors",
            here / "a_td.raw",
            "--output",
            output,
        )
        assert "would be taken for its boxes" in text
    assert (here / "a_bbox.npy").read_bytes() == before
    actual = run(here, tmp_path / "mine.npy", "--no-video", "--seconds", 0.1)
    assert actual.size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.npy"]


@pytest.mark.slow
def test_several_recordings_give_what_each_gives_alone(here, tmp_path, capsys):
    other = tmp_path / "b_td.dat"
    simulate(other, seconds=0.3, seed=5, config=SimulatorConfig(height=240, width=320))
    checkpoint = str(here / "weights2.safetensors")
    output = tmp_path / "out"
    main([checkpoint, str(here / "a_td.raw"), str(other), "--no-video", "--output", str(output)])
    assert sorted(path.name for path in output.iterdir()) == ["a_bbox.npy", "b_bbox.npy"]
    for name, path in (("a", here / "a_td.raw"), ("b", other)):
        assert_same(
            np.load(output / f"{name}_bbox.npy"),
            frame_by_frame(path, here / "weights2.safetensors"),
        )
    assert capsys.readouterr().out.count("x camera pace") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "x.gif"], "--video x.gif is one file, for 2 recordings"),
        (["--csv", "x.csv"], "--csv x.csv is one file"),
        (["--json", "-"], "--json - is one file"),
        (["--output", "x.npy"], "--output x.npy is one file"),
    ],
)
def test_several_recordings_are_not_written_to_one_file(here, tmp_path, capsys, options, message):
    (tmp_path / "c_td.raw").touch()
    arguments = [here / "weights2.safetensors", here / "a_td.raw", tmp_path / "c_td.raw", *options]
    assert message in refused(capsys, *arguments)


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    output = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "evspan infer runs/tiny drive.raw" in output
    assert "class_confidence" in output


# -- other forms, and a file that grows ----------------------------------------------------------------------------
def test_csv_and_json_tell_what_the_npy_tells(here, tmp_path, capsys):
    main(
        [
            str(here / "weights2.safetensors"),
            str(here / "a_td.raw"),
            "--output",
            str(tmp_path),
            "--no-video",
            "--csv",
            str(tmp_path / "new" / "a.csv"),
            "--json",
            "-",
            "--frames-per-call",
            "3",
        ]
    )
    out, err = capsys.readouterr()
    boxes = np.load(tmp_path / "a_bbox.npy")
    rows = list(csv.DictReader((tmp_path / "new" / "a.csv").open()))
    frames = [json.loads(line) for line in out.splitlines()]  # nothing else is on standard output
    found = [(frame["end_us"], box) for frame in frames for box in frame["detections"]]
    assert len(rows) == len(found) == boxes.size > 0
    assert len(frames) == 19
    assert min(frame["latency_ms"] for frame in frames) > 0
    for box, row, (end, result) in zip(boxes, rows, found, strict=True):
        assert box["t"] == int(row["t_us"]) == end
        assert box["class_id"] == int(row["class_id"]) == result["class_id"]
        assert row["class"] == result["class"] == [*CLASSES, "class 2"][box["class_id"]]
        for name in "xywh":
            assert float(row[name]) == result[name] == pytest.approx(float(box[name]), abs=0.01)
        assert (
            result["confidence"]
            == float(row["confidence"])
            == pytest.approx(float(box["class_confidence"]), abs=1e-4)
        )
    assert "latency of a frame" in err


@pytest.mark.slow
def test_track_numbers_are_the_trackers_in_all_files(here, tmp_path, capsys):
    plain = run(here, tmp_path / "plain", "--no-video")
    confidence = float(np.quantile(plain["class_confidence"], 0.9))  # most begin no track
    options = ["--no-video", "--track", "--track-confidence", confidence, "--json", "-"]
    tracked = run(here, tmp_path / "out", *options, "--csv", tmp_path / "a.csv")
    out, err = capsys.readouterr()
    tracker = Tracker(TrackerOptions(high_confidence=confidence))
    for end in np.unique(plain["t"]):
        numbers = tracker.update(plain[plain["t"] == end], int(end))
        ids = np.where(numbers < 0, NO_TRACK, numbers + 1)
        assert tracked["track_id"][tracked["t"] == end].tolist() == ids.tolist()
    assert set(plain["track_id"]) == {0}
    assert len(set(tracked["track_id"])) > 2
    for name in ("t", "x", "y", "w", "h", "class_id", "class_confidence"):
        np.testing.assert_array_equal(tracked[name], plain[name])
    assert NO_TRACK in tracked["track_id"]
    ids = np.where(
        tracked["track_id"] == NO_TRACK, -1, tracked["track_id"].astype(np.int64)
    ).tolist()
    with (tmp_path / "a.csv").open() as file:
        assert [int(row["track_id"]) for row in csv.DictReader(file)] == ids
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [box["track_id"] for line in lines for box in line["detections"]] == ids
    assert f", {tracker.tracks} tracks" in err


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".raw", ".dat"])
def test_a_file_that_grows_gives_what_the_whole_one_gives(here, tmp_path, suffix):
    """Written in pieces that end within words, while it is read; frames come before the file is whole."""
    whole, growing = tmp_path / f"whole{suffix}", tmp_path / f"growing{suffix}"
    simulate(whole, seconds=0.93, seed=4, config=SimulatorConfig(height=240, width=320))
    checkpoint = str(here / "weights2.safetensors")
    options = ["--no-video"]
    main([checkpoint, str(whole), *options, "--output", str(tmp_path / "whole")])
    data = whole.read_bytes()
    first = len(data) // 3 | 1  # within a word
    growing.write_bytes(data[:first])
    seen: list[int] = []

    def write() -> None:
        lines = tmp_path / "lines.json"
        with growing.open("ab") as file:
            for begin in range(first, len(data), len(data) // 7 | 1):
                end = time.monotonic() + 120
                while not (lines.exists() and lines.stat().st_size) and time.monotonic() < end:
                    time.sleep(0.01)
                seen.append(len(lines.read_text().splitlines()) if lines.exists() else 0)
                file.write(data[begin : begin + (len(data) // 7 | 1)])
                file.flush()
                time.sleep(0.05)

    camera = threading.Thread(target=write)
    camera.start()
    main(
        [
            checkpoint,
            str(growing),
            *options,
            "--output",
            str(tmp_path / "grown"),
            "--follow",
            "2",
            "--json",
            str(tmp_path / "lines.json"),
            "--frames-per-call",
            "1",
        ]
    )
    camera.join()
    assert seen[0] > 0  # frames were reported while two thirds were missing
    assert_same(
        np.load(tmp_path / "grown" / "growing_bbox.npy"),
        np.load(tmp_path / "whole" / "whole_bbox.npy"),
    )


def test_an_interrupt_ends_the_wait_for_more_data(here, tmp_path):
    lines = tmp_path / "lines.json"
    interrupted_at: list[float] = []

    def number_of_lines() -> int:
        return len(lines.read_text().splitlines()) if lines.exists() else 0

    def interrupt() -> None:
        end = time.monotonic() + 120
        while number_of_lines() < 18 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)  # the 19th window is not complete
        interrupted_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    arguments = ["--no-video", "--follow", 30, "--json", lines, "--frames-per-call", 1]
    with pytest.raises(SystemExit, match="130"):
        run(here, tmp_path / "out", *arguments)
    seconds = time.monotonic() - interrupted_at[0]
    thread.join()
    assert seconds < 20
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_followed_says_so(here, tmp_path, capsys):
    h5 = tmp_path / "a_td.h5"
    simulate(h5, seconds=0.2, seed=4, config=SimulatorConfig(height=240, width=320))
    for recording, seconds, part in (
        (h5, "1", "record .raw or .dat"),
        (here / "a_td.raw", "0", "--follow is 0"),
    ):
        message = refused_by(
            main,
            capsys,
            here / "weights2.safetensors",
            recording,
            "--follow",
            seconds,
        )
        assert part in message
