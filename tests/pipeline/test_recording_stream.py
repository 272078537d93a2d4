"""`detector.stream` and `frames_of`: recordings, growing files and arrays give what `infer` writes."""

import pydoc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.errors import RecordingError, UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import BackboneConfig, FpnConfig, ModelConfig, PostprocessConfig
from evspan.data_prep import frames_of
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.launch.cli import infer
from evspan.pipeline import load_detector
from evspan.pipeline.inference.trained_detector import TrainedDetector
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import InputError
from evspan.pipeline.weights import Weights, load_weights, save_weights
from examples import detect_stream
from support.event_files import concatenated

pytestmark = pytest.mark.timeout(240)
SIZE = (160, 160)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """a_td.raw, weights.safetensors, and what `infer` writes: out1, out4/a_bbox.npy by frames per call."""
    folder = tmp_path_factory.mktemp("stream")
    simulate(
        folder / "a_td.raw", seconds=0.5, seed=4, config=SimulatorConfig(height=160, width=160)
    )
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=8),
        fpn=FpnConfig(enable_small_object_attention=True),
        postprocess=PostprocessConfig(confidence_threshold=0.2),
    )
    frames = FrameConfig(downsample=1, bins=4)
    detector = Detector(model, frames.channels)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith(("fpn", "yolox_head")) and parameter.ndim == 4:
                parameter *= 0.2 if "reg_preds" in name else 3.5
    for conv in detector.yolox_head.obj_preds:
        torch.nn.init.constant_(conv.bias, 0.5)
    for conv in detector.yolox_head.cls_preds:
        torch.nn.init.constant_(conv.bias, 0.5)
    path = folder / "weights.safetensors"
    save_weights(path, Weights(detector.state_dict(), model, frames, ["a", "b", "c"], 7))
    arguments = [str(path), str(folder / "a_td.raw"), "--no-video", "--threads", "1"]
    for n in ("1", "4"):
        output = str(folder / f"out{n}")
        infer.main([*arguments, "--output", output, "--frames-per-call", n])
    return folder


@pytest.fixture(scope="module")
def detector(here) -> TrainedDetector:
    return load_detector(here / "weights.safetensors")


def all_of(stream) -> tuple[list[int], np.ndarray]:
    items = list(stream)
    return [time_us for time_us, _ in items], np.concatenate([boxes for _, boxes in items])


@pytest.mark.slow
def test_a_recording_gives_what_infer_writes_bit_for_bit(here, detector):
    for n in (None, 1, 4):
        expected = np.load(here / f"out{n or 4}" / "a_bbox.npy")
        assert len(expected) > 20
        times, boxes = all_of(detector.stream(here / "a_td.raw", frames_per_call=n))
        np.testing.assert_array_equal(boxes, expected)
        assert boxes.dtype == expected.dtype
        assert len(times) == 10
        assert (np.diff(times) == 50_000).all()
    strict = all_of(detector.stream(here / "a_td.raw", confidence_threshold=0.6))[1]
    assert 0 < len(strict) < len(expected)
    assert (strict["class_confidence"] >= 0.6).all()


@pytest.mark.parametrize("frames_per_call", [0, -1, 1.5])
def test_frames_per_call_is_a_whole_number_from_1_on(here, detector, frames_per_call):
    with pytest.raises(InputError, match="frames_per_call is .*; pass a whole number"):
        detector.stream(here / "a_td.raw", frames_per_call=frames_per_call)


def as_records(events: Events) -> np.ndarray:
    records = np.zeros(len(events.t), [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    for name, column in events._asdict().items():
        records[name] = column
    records["p"] = 2 * records["p"] - 1
    return records


@pytest.mark.parametrize(
    "convert",
    [lambda e: e, tuple, as_records, lambda e: [c.astype(np.int64) for c in e]],
    ids=["Events", "tuples", "records", "lists"],
)
def test_arrays_give_what_infer_writes_bit_for_bit(here, detector, convert):
    recording = open_recording(here / "a_td.raw")
    blocks = (convert(events) for events in recording.chunks(777))
    times, boxes = all_of(detector.stream(blocks, sensor_size=SIZE))
    np.testing.assert_array_equal(boxes, np.load(here / "out1" / "a_bbox.npy"))
    assert len(times) == 10


def test_frames_are_yielded_before_the_last_event_is_read(here, detector):
    taken = []

    def blocks():
        for events in open_recording(here / "a_td.raw").chunks(500):
            taken.append(len(events.t))
            yield events

    total = sum(len(e.t) for e in open_recording(here / "a_td.raw").chunks())
    stream = detector.stream(blocks(), sensor_size=SIZE)
    next(stream)
    assert sum(taken) < total / 3


def test_a_growing_file_is_followed_until_it_is_stopped(here, detector, tmp_path):
    data = (here / "a_td.raw").read_bytes()
    path = tmp_path / "camera.raw"
    path.write_bytes(data[: len(data) // 2])
    stopped = threading.Event()
    times = []
    stream = detector.stream(path, follow_s=60, stop=stopped.is_set)
    boxes = []
    for time_us, detections in stream:
        if not times:
            with path.open("ab") as file:
                file.write(data[len(data) // 2 :])
        times.append(time_us)
        boxes.append(detections)
        if len(times) == 9:  # the last window ends with the file
            stopped.set()
    np.testing.assert_array_equal(np.concatenate(boxes), np.load(here / "out1" / "a_bbox.npy"))
    assert len(times) == 10


def test_a_growing_file_ends_when_nothing_comes(here, detector):
    _, boxes = all_of(detector.stream(here / "a_td.raw", follow_s=0.1))
    np.testing.assert_array_equal(boxes, np.load(here / "out1" / "a_bbox.npy"))
    with pytest.raises(UserError, match="cannot be read while it is written"):
        frames_of(csv_of(here), follow_s=1)


def csv_of(folder: Path) -> Path:
    path = folder / "a.csv"
    events = next(open_recording(folder / "a_td.raw").chunks())
    rows = np.stack(events, axis=1)
    np.savetxt(path, rows, "%d", ",", header="t_us,x,y,p", comments="")
    return path


def test_frames_of_counts_events_by_the_definition(here):
    config = FrameConfig(window_ms=30, bins=3, downsample=1, cutoff=255)
    t, x, y, p = (
        np.concatenate(c) for c in zip(*open_recording(here / "a_td.raw").chunks(), strict=True)
    )
    ends, frames = zip(*frames_of(here / "a_td.raw", config), strict=True)
    assert list(ends) == [int(t[0]) + 30_000 * (i + 1) for i in range(len(ends))]
    for end, frame in zip(ends, frames, strict=True):
        inside = (t >= end - 30_000) & (t < end)
        expected = np.zeros((6, *SIZE), np.int64)
        channel = p[inside].astype(int) * 3 + (t[inside] - end + 30_000) // 10_000
        np.add.at(expected, (channel, y[inside], x[inside]), 1)
        np.testing.assert_array_equal(frame, expected.clip(max=255))
    assert sum(frame.sum(dtype=int) for frame in frames) == len(t)


def test_frames_of_takes_one_block_and_the_defaults(here):
    events = concatenated(open_recording(here / "a_td.raw").chunks())
    for source in (events, tuple(events), as_records(events)):
        frames = [frame for _, frame in frames_of(source, sensor_size=SIZE)]
        assert frames[0].shape == (20, 80, 80)
    by_file = [frame for _, frame in frames_of(here / "a_td.raw")]
    np.testing.assert_array_equal(frames, by_file)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((np.arange(3), np.arange(3), np.arange(2), np.zeros(3, int)), "arrays of the shapes"),
        ((np.arange(3) / 1e6, *[np.zeros(3, int)] * 3), "t is float64, not integers"),
        ((np.array([1 << 60]), *[np.zeros(1, int)] * 3), "not microseconds"),
        ((np.arange(3), *[np.full(3, 2)] * 3), "polarities from 2 to 2"),
        (np.zeros(3, [("a", "i4")]), r"of type ndarray\. Pass \(t, x, y, p\)"),
        ("drive", r"block 0 of the events is of type str"),
    ],
)
def test_other_arrays_are_refused(block, message):
    with pytest.raises(RecordingError, match=message):
        list(frames_of(iter([block]), sensor_size=SIZE))


def test_arrays_need_the_sensors_size():
    with pytest.raises(UserError, match=r"pass sensor_size=\(height, width\)"):
        frames_of([])


@pytest.mark.slow
def test_the_example_prints_the_detections(here, capsys):
    arguments = [str(here / "weights.safetensors"), str(here / "a_td.raw"), "--confidence", "0.4"]
    detect_stream.main(arguments)
    text = capsys.readouterr().out
    expected = np.load(here / "out4" / "a_bbox.npy")
    assert text.count("\n") == (expected["class_confidence"] >= np.float32(0.4)).sum() > 0
    detect_stream.main([*arguments, "--arrays"])
    assert capsys.readouterr().out.count("\n") == text.count("\n")


@pytest.mark.parametrize("thing", [load_detector, TrainedDetector.stream, frames_of])
def test_help_shows_types_and_an_example(thing):
    text = pydoc.plain(pydoc.render_doc(thing))
    assert ">>> " in text
    assert "Args:" in text
    assert " -> " in text


def test_classes_of_the_head_without_a_name_are_numbered(here, tmp_path, capsys):
    weights = load_weights(here / "weights.safetensors")
    path = tmp_path / "one_class.safetensors"
    save_weights(path, replace(weights, classes=weights.classes[:1]))
    detector = load_detector(path)
    first = weights.classes[0]
    assert [detector.class_name(i) for i in range(3)] == [first, "class 1", "class 2"]
    detect_stream.main([str(path), str(here / "a_td.raw"), "--confidence", "0.2"])
    printed = capsys.readouterr().out
    assert "us: class 1 " in printed or "us: class 2 " in printed
