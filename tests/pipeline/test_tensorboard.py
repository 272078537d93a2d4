"""The TensorBoard file of a real run, read by TensorBoard's own reader; the cost of logging."""

import io
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.code_version import code_commit, running_code
from evspan.conf.compose import compose
from evspan.conf.schema.training import TrainConfig, TrainingConfig
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.engine.profiling import Profiler
from evspan.pipeline.engine.resources import Resources, resident_bytes
from evspan.pipeline.evaluation.frames import scored
from evspan.pipeline.evaluation.pr_curves import pr_curves
from evspan.pipeline.inference.streaming import evaluate_split, labelled
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.tensorboard.images import GREEN
from evspan.pipeline.tensorboard.run_info import config_lines
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from evspan.pipeline.weights import load_weights
from PIL import Image
from support.small_shards import CLASSES, HEIGHT, WIDTH, write_small_shards
from support.training_runs import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ALL = {"tensors": 0, "images": 0, "scalars": 0, "histograms": 0}


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory):
    """(reader, config, output) of a run of four steps."""
    folder = tmp_path_factory.mktemp("logged_run")
    shards = write_small_shards(folder / "shards", {"train": [23, 12, 9], "val": [12, 7, 5]})
    output = train(
        shards,
        folder / "run",
        "parallel.ranks=1",
        "parallel.threads=1",
        "training.max_steps=4",
        "training.log_images_every=3",
        "training.profile=[2,2]",
        "training.evaluate_every=2",
        "training.log_every=2",
        "evaluation.sequence_length=4",
        "evaluation.confidence_threshold=1e-5",  # a new detector gives all predictions about 1e-4
    )
    reader = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance=ALL)
    reader.Reload()
    lines = text_of(reader, "run/config").strip("`\n").splitlines()
    return reader, compose(TrainConfig, lines), output


def text_of(reader, tag):
    (event,) = reader.Tensors(f"{tag}/text_summary")
    return tensor_util.make_ndarray(event.tensor_proto).item().decode()


def images(reader, tag):
    return {
        e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string)).convert("RGB"))
        for e in reader.Images(tag)
    }


def test_the_logged_config_is_that_of_the_run(logged_run):
    reader, config, _ = logged_run
    assert isinstance(config, TrainConfig)
    assert config.training.max_steps == 4
    assert config.training.profile == [2, 2]
    assert config.optimizer.lr == 0.0002
    assert config.evaluation.skip_first_ms == 0
    assert config.model.fpn.enable_small_object_attention
    assert f"```\n{config_lines(config)}\n```" == text_of(reader, "run/config")


def test_the_environment_names_code_and_ranks(logged_run):
    table = dict(
        row.strip("| ").split(" | ")
        for row in text_of(logged_run[0], "run/environment").splitlines()[2:]
    )
    assert {"code", "ranks", "torch", "deepspeed", "Python", "CUDA", "system"} <= table.keys()
    commit, _, digest = table["code"].partition(", digest ")
    assert commit == (code_commit() or "not in a git checkout")
    assert digest == running_code().digest
    assert table["ranks"].startswith("1 on ")
    assert table["torch"].count(".") == 2


def test_the_commit_is_that_of_the_checkout_that_tracks_the_code(tmp_path):
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    code, other = tmp_path / "code.py", tmp_path / "other.py"
    code.write_text("1\n")
    other.write_text("1\n")
    assert code_commit(code) is None
    git("init")
    git("add", "code.py")
    git("commit", "-m", "code")
    assert code_commit(code) == git("rev-parse", "HEAD")
    assert code_commit(other) is None  # it lies there, but is none of it
    code.write_text("2\n")
    assert code_commit(code) == git("rev-parse", "HEAD") + "-dirty"


def test_the_layout_has_a_chart_for_every_curve_that_belongs_somewhere(logged_run):
    reader, *_ = logged_run
    (event,) = reader.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    scalars = reader.Tags()["scalars"]
    matched = {
        of.title: {
            chart.title: [
                tag for tag in scalars if any(re.match(p, tag) for p in chart.multiline.tag)
            ]
            for chart in of.chart
        }
        for of in layout.category
    }  # so CustomScalarsPlugin.scalars_impl matches
    assert [*matched] == ["Learning", "Average precision", "Speed", "Time", "Stability"]
    assert sorted(matched["Learning"]["losses"]) == [
        "loss/class",
        "loss/iou",
        "loss/objectness",
        "loss/total",
    ]
    assert len(matched["Learning"]["attention gates"]) == 9
    precision = matched["Average precision"]
    assert sorted(precision["AP 0.50:0.95, AP50, AP75"]) == [
        "evaluation/ap",
        "evaluation/ap50",
        "evaluation/ap75",
    ]
    assert sorted(precision["AP by class"]) == sorted(
        f"evaluation/ap_class/{name}" for name in CLASSES
    )
    assert matched["Speed"] == {
        "frames per second": ["speed/frames_per_s"],
        "milliseconds per step": ["speed/step_ms"],
        "model TFLOP/s of all ranks": ["speed/model_tflops_per_s"],
        "fraction of the time": ["speed/data_wait_fraction"],
        "memory, GiB": ["memory/resident_gib"],
    }
    assert all(tags for charts in matched.values() for tags in charts.values())  # none stays empty
    assert set(scalars) == {
        tag for charts in matched.values() for tags in charts.values() for tag in tags
    }  # none is forgotten


def test_the_first_groups_are_ap_and_losses(logged_run):
    """TensorBoard sorts tags by name."""
    reader, _, _ = logged_run
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in reader.Tags()[kind]]
    groups = sorted({tag.split("/")[0] for tag in tags})
    assert groups[:2] == ["evaluation", "loss"]
    assert min(tags) == "evaluation/ap"


def test_scalars_are_in_their_units(logged_run):
    reader, config, _ = logged_run
    speed, step = (
        {e.step: e.value for e in reader.Scalars(f"speed/{k}")} for k in ("frames_per_s", "step_ms")
    )
    assert [*speed] == [*step] == [1, 2, 4]  # the first two of an attempt always
    per_step = config.training.batch_size * config.training.sequence_length
    assert all(step[k] == pytest.approx(1000 * per_step / speed[k], rel=1e-4) for k in step)
    assert all(0.1 < e.value < 20 for e in reader.Scalars("memory/resident_gib"))
    assert all(0 <= e.value < 1 for e in reader.Scalars("speed/data_wait_fraction"))


def test_images_of_the_probe_frames_show_their_boxes(logged_run):
    reader, config, _ = logged_run
    shown = images(reader, "evaluation/watched_frames")
    assert [*shown] == [3, 4]  # every third, and the last
    data = open_dataset(config.dataset, "val")
    there = [(r, int(f)) for r in data.recordings for f in np.flatnonzero(r.labelled)]
    height, width = 3 * HEIGHT + 2, 3 * WIDTH + 2
    for rgb in shown.values():
        assert rgb.shape == (4 * height - 2, 4 * width - 2, 3)
        for i in range(4):
            recording, frame = there[(2 * i + 1) * len(there) // 8]
            tile = rgb[i * height :][: 3 * HEIGHT]
            for box in recording.boxes(frame):
                x, y = (
                    round(3 * float(box["x"])),
                    round(3 * (float(box["y"]) + float(box["h"]) * 0.6)),
                )
                for column in (0, 2, 3):  # boxes, spatial and motion attention
                    assert tuple(tile[y, column * width + x]) == GREEN, (i, column)
            assert (tile[:, width : width + 3 * WIDTH] == GREEN).all(
                -1
            ).sum() == 0  # detections: no box of the labels
    assert not np.array_equal(
        shown[3][:, 2 * width :], shown[4][:, 2 * width :]
    )  # attention learns
    assert [*images(reader, "training/boxes")] == [3, 4]
    assert [*images(reader, "training/augmentations")] == [0]
    assert [*images(reader, "training/first_batch")] == [0]


def test_histograms_of_gates_and_of_what_they_multiply(logged_run):
    reader, *_ = logged_run
    assert set(reader.Tags()["histograms"]) == {
        "model/attention/gates",
        *(f"model/attention/scale_{i}/channel" for i in range(3)),
        *(
            f"model/attention/scale_{i}/{part}"
            for i in (0, 1)
            for part in ("spatial", "motion", "temporal")
        ),
    }
    for event in reader.Histograms("model/attention/scale_0/spatial"):
        assert event.histogram_value.num == 4 * 8 * 16
        assert 0 < event.histogram_value.min < event.histogram_value.max < 1
    last = reader.Histograms("model/attention/gates")[-1].histogram_value
    gates = [
        reader.Scalars(tag)[-1].value
        for tag in reader.Tags()["scalars"]
        if tag.startswith("model/attention_gates/")
    ]
    assert last.num == len(gates) == 9
    assert any(gates)
    assert (last.min, last.max, last.sum) == pytest.approx(
        (min(gates), max(gates), sum(gates)), rel=1e-5
    )


def test_pr_curves_are_those_of_the_evaluation(logged_run):
    reader, config, _ = logged_run
    data = open_dataset(config.dataset, "val")
    results = evaluate_split(
        detector_from(load_weights(config.run_dir)),
        data,
        config.evaluation,
        device=torch.device("cpu"),
        recordings=data.recordings,
    )
    curves = pr_curves(scored(labelled(results, data), config.evaluation)[0], CLASSES)
    for name in CLASSES:
        events = reader.Tensors(f"evaluation/pr_at_iou_0.50/{name}")
        assert [e.step for e in events] == [2, 4]
        right, wrong, none, missed, precision, recall = tensor_util.make_ndarray(
            events[-1].tensor_proto
        )
        curve = curves[name]
        np.testing.assert_array_equal(
            (right, wrong, missed), (curve.true_positives, curve.false_positives, curve.missed)
        )
        np.testing.assert_allclose((precision, recall), (curve.precision, curve.recall), rtol=1e-6)
        assert not none.any()
        assert right[0] + missed[0] > 0
        assert wrong[0] > right[0]  # most predictions of a new detector match no box


def test_the_requested_profile_is_written_and_logged(logged_run):
    reader, _, output = logged_run
    text = text_of(reader, "run/profile")
    assert "steps-2-2-rank-0.json.gz" in text
    assert "aten::" in text
    assert "profile of steps 2 to 2:" in output


def test_ranks_that_share_sequences_and_weights_log_together(tmp_path):
    """ZeRO 3: no rank has all weights. A trace is asked for by a file, of both ranks."""
    shards = write_small_shards(tmp_path / "shards", {"train": [23, 12], "val": [7]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile.request").touch()
    train(
        shards,
        tmp_path / "run",
        "parallel.sequence=2",
        "deepspeed=zero3",
        "training.sequence_length=2",
        "training.max_steps=3",
        "training.log_images_every=3",
        "checkpoint.every=3",
    )
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance=ALL)
    reader.Reload()
    assert sorted(p.name for p in (tmp_path / "run" / "profile").iterdir()) == [
        f"steps-3-3-rank-{r}.json.gz" for r in (0, 1)
    ]
    assert [*images(reader, "evaluation/watched_frames")] == [3]
    assert len(reader.Histograms("model/attention/gates")) == 1
    assert all(0 < e.value < 1 for e in reader.Scalars("speed/exchange_fraction"))
    (event,) = reader.Tensors("custom_scalars__config__")
    assert "exchange_fraction" in tensor_util.make_ndarray(event.tensor_proto).item().decode(
        errors="replace"
    )
    assert "ranks | 2 on " in text_of(reader, "run/environment")


def test_logging_nothing_costs_less_than_a_hundredth_of_a_step(logged_run, tmp_path):
    """The cost of a step without images and traces."""
    reader, *_ = logged_run
    step_s = min(e.value for e in reader.Scalars("speed/step_ms")) / 1000
    profiler = Profiler(
        tmp_path, 0, TensorBoardWriter(tmp_path, enabled=False), torch.nn.Linear(1, 1), []
    )
    began, rounds = time.perf_counter(), 10_000
    for step in range(rounds):
        profiler.before(step + 1)
        profiler.after()
    each = (time.perf_counter() - began) / rounds
    resources, logs = Resources(torch.device("cpu")), 100
    began = time.perf_counter()
    for _ in range(logs):
        resources.read(), profiler.requested()
    each += (time.perf_counter() - began) / logs / TrainingConfig().log_every
    assert each < 0.01 * step_s, f"{1e6 * each:.1f} us of {1e3 * step_s:.1f} ms"


def test_resident_memory_grows_with_what_is_held():
    before = resident_bytes()
    held = np.ones(50_000_000, np.uint8)
    assert 0.9 * len(held) < resident_bytes() - before < 3 * len(held)


# TensorBoard's thread ends with the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    """/dev/full refuses each write as a full disk does. A minute later a new file is opened."""
    writer = TensorBoardWriter(tmp_path, enabled=True)
    writer.write_scalars({"a": 1.0}, 1)
    writer.flush()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert writer.summary_writer
    assert writer.summary_writer.file_writer
    file_type = type(writer.summary_writer.file_writer.event_writer._general_file_writer)
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(file_type, "write", lambda _, data: full.write(data))
        for step in range(2, 5):
            writer.write_scalars({"a": 1.0}, step)
            writer.flush()
        assert writer.summary_writer is None
        monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 1
    writer.write_scalars({"a": 1.0}, 5)
    assert writer.summary_writer is None
    writer._retry_at = 0.0
    writer.write_scalars({"a": 1.0}, 6)
    writer.close()
    files = [*(tmp_path / "tensorboard").iterdir()]
    assert len(files) == 2
    assert path in files
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("a")] == [1, 6]


def test_what_is_written_after_close_opens_no_other_file(tmp_path):
    writer = TensorBoardWriter(tmp_path, enabled=True, resume_step=5)
    writer.write_scalars({"a": 1.0}, 6)
    writer.close()
    writer.write_text("b", "late", 7)
    writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
