"""Prophesee's protocol on prepared recordings: boxes against themselves, the rules of its toolbox, one rank or several."""

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.schema.prep import DatasetConfig, FrameConfig, FrameMode, frame_config
from evspan.conf.schema.training import (
    BackboneConfig,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
)
from evspan.data_prep.labels.box_files import read_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.manifest_check import hash_config
from evspan.data_prep.simulator import CLASSES, SimulatorConfig, simulate
from evspan.launch.local.ranks import run_ranks
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.engine.evaluator import describe_evaluation, evaluate_weights, write_results
from evspan.pipeline.engine.meetings import Meetings
from evspan.pipeline.evaluation.breakdown import breakdown
from evspan.pipeline.evaluation.frames import FRAMES, load_frames
from evspan.pipeline.evaluation.protocol import (
    COCO,
    PROPHESEE,
    protocol_line,
    protocol_name,
    protocol_of,
)
from evspan.pipeline.inference.streaming import RecordingResult, labelled, score
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights, load_weights, save_weights
from support import uneven_ranks
from support.coco_reference import coco_evaluation
from support.one_rank import open_one_rank
from support.prepared import HEIGHT, WIDTH, prep_config
from support.small_shards import BINS, write_small_shards
from support.small_shards import CLASSES as SMALL_CLASSES

ROOT = Path(__file__).parents[2]
SECONDS = 2.0
SCENE = SimulatorConfig(height=HEIGHT, width=WIDTH, min_objects=4, max_objects=5)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "val" / "r_td.raw"
    simulate(path, seconds=SECONDS, seed=4, config=SCENE)
    return path


def prepared(recording, folder, hertz, mode="exact", **labels):
    """The recording with labels so often; (dataset, its boxes as their file holds them)."""
    source = folder / "raw"
    (source / "val").mkdir(parents=True)
    shutil.copy(recording, source / "val")
    boxes = np.load(recording.with_name("r_bbox.npy"))
    times = np.unique(np.rint(np.arange(1, 60 * SECONDS) * 1e6 / 60).astype(np.int64))
    boxes = boxes[np.isin(boxes["t"], times[60 // hertz - 1 :: 60 // hertz])]
    np.save(source / "val" / "r_bbox.npy", boxes)
    labels["label_every_ms"] = 50 if mode == "exact" else 100
    prepare(
        prep_config(
            source,
            folder / "shards",
            labels=labels,
            frames={"mode": FrameMode[mode], "downsample": 2},
        )
    )
    return open_dataset(DatasetConfig(root=str(folder / "shards")), "val"), boxes


def as_results(data, jitter=0.0, seed=0):
    """Detections of all boxes, moved by `jitter` of their size, with random scores, and some of nothing."""
    rng, out = np.random.default_rng(seed), []
    for r in data.recordings:
        frames = np.flatnonzero(r.labelled).tolist()
        result = RecordingResult(r.name, frames, [r.boxes(f) for f in frames])
        for b in result.boxes:
            corners = np.stack((b["x"], b["y"], b["x"] + b["w"], b["y"] + b["h"]), 1)
            corners += jitter * rng.normal(size=corners.shape) * np.stack((b["w"], b["h"]) * 2, 1)
            rows = np.concatenate(
                (corners, rng.uniform(0.1, 1, (len(b), 2)), b["class_id"][:, None]), 1
            )
            spurious = np.array([(5, 5, 25, 30, 0.5, rng.random(), 1)] * bool(jitter)).reshape(
                -1, 7
            )
            result.detections.append(np.concatenate((rows, spurious)).astype(np.float32))
        out.append(result)
    return out


@pytest.mark.parametrize(
    ("hertz", "mode"),
    [(10, "exact"), (20, "exact"), (30, "exact"), (60, "exact"), (30, "rvt"), (60, "rvt")],
)
def test_boxes_against_themselves_give_100(recording, tmp_path, hertz, mode):
    data, boxes = prepared(recording, tmp_path, hertz, mode)
    config = EvaluationConfig()
    results = as_results(data)
    metrics = score(results, data, config)
    fractions = [
        metrics.ap,
        metrics.ap50,
        metrics.ap75,
        metrics.ar100,
        *(v for v in metrics.per_class.values() if v is not None),
    ]
    assert fractions == pytest.approx([1.0] * len(fractions))
    taken = (
        20 if mode == "exact" and hertz in (20, 60) else 10
    )  # of 30 a second, the third is the next that 50 ms windows reach
    assert 0.9 * taken * (SECONDS - 0.5) <= metrics.frames <= taken * (SECONDS - 0.5) + 1
    assert metrics.boxes == metrics.detections >= metrics.frames
    # Every label time that is taken is a time of the box file, and its boxes are the file's.
    raw = results[0].as_raw_boxes(data)
    assert np.isin(raw["t"], boxes["t"]).all() if mode == "exact" else len(raw)
    result = breakdown(labelled(results, data), data.classes, config)
    every = [
        *result.per_recording.values(),
        *result.by_time,
        *result.by_speed,
        *result.by_rest,
        *result.stillness.values(),
    ]
    assert {round(v["ap"], 9) for v in every if v["boxes"]} == {1.0}


def by_the_toolbox(truth, found, classes, *, tolerance_us, skip_us, min_diagonal, min_side):
    """AP by the rules of Prophesee's toolbox, from box files alone: detections near the time of a box, in frames with boxes."""

    def kept(boxes):
        w, h = boxes["w"], boxes["h"]
        return boxes[
            (boxes["t"] > skip_us)
            & (w**2 + h**2 >= min_diagonal**2)
            & (w >= min_side)
            & (h >= min_side)
        ]

    truth, found = kept(truth), kept(found)
    annotations, results, times = [], [], np.unique(truth["t"])
    for image, t in enumerate(times, 1):
        for b in truth[truth["t"] == t]:
            box = [float(b[k]) for k in "xywh"]
            annotations.append(
                {
                    "area": box[2] * box[3],
                    "iscrowd": False,
                    "image_id": image,
                    "bbox": box,
                    "category_id": int(b["class_id"]) + 1,
                    "id": len(annotations) + 1,
                }
            )
        for b in found[np.abs(found["t"] - t) <= tolerance_us]:
            results.append(
                {
                    "image_id": image,
                    "category_id": int(b["class_id"]) + 1,
                    "score": float(b["class_confidence"]),
                    "bbox": [float(b[k]) for k in "xywh"],
                }
            )
    return coco_evaluation(len(times), annotations, results, classes).stats


def test_an_evaluation_leaves_no_detections_of_an_older_one(recording, tmp_path):
    data, _ = prepared(recording, tmp_path, 20, crop=False)
    out = tmp_path / "out"
    config = EvaluationConfig()
    results = as_results(data, jitter=0.06)
    metrics = score(results, data, config)
    write_results(out, metrics, results, data, config, {})
    assert (out / "r_bbox.npy").exists()
    own = out / "mine_bbox.npy"
    own.touch()
    write_results(out, metrics, results, data, replace(config, write_detections=False), {})
    assert not (out / "r_bbox.npy").exists()
    assert own.exists()


@pytest.mark.parametrize("filters", [{}, {"min_side": 2.0, "min_diagonal": 9.0}])
def test_our_files_score_alike_by_the_toolboxs_rules(recording, tmp_path, filters):
    data, boxes = prepared(recording, tmp_path, 20, crop=False)
    config = EvaluationConfig(**filters)
    results = as_results(data, jitter=0.06)
    metrics = score(results, data, config)
    write_results(tmp_path / "out", metrics, results, data, config, {})
    found = read_boxes(tmp_path / "out" / "r_bbox.npy")
    theirs = by_the_toolbox(
        boxes[np.isin(boxes["t"], found["t"])],
        found,
        CLASSES,
        tolerance_us=1000,
        skip_us=500_000 + data.recordings[0].clock_us,
        min_diagonal=2 * filters.get("min_diagonal", 0),
        min_side=2 * filters.get("min_side", 0),
    )
    assert [
        metrics.ap,
        metrics.ap50,
        metrics.ap75,
        metrics.ar1,
        metrics.ar10,
        metrics.ar100,
    ] == pytest.approx(theirs[[0, 1, 2, 6, 7, 8]].tolist(), abs=1e-6)
    assert 0.2 < metrics.ap < 0.95
    assert 20 < metrics.boxes < len(boxes)
    if filters:
        assert metrics.boxes < score(results, data, EvaluationConfig()).boxes


# -- over ranks --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def weights_and_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    shards = write_small_shards(folder / "shards", {"val": [14, 22]})
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5),
        head=HeadConfig(num_classes=3),
        fpn=FpnConfig(enable_small_object_attention=True, identity_init=False),
    )
    detector = Detector(model, 2 * BINS)
    for (
        name,
        parameter,
    ) in detector.named_parameters():  # sure of much, so that there is something to score
        if "preds" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=2.0)
        elif "obj_preds" in name or "cls_preds" in name:
            torch.nn.init.zeros_(parameter)
    frames = frame_config(load_manifest(shards).config["frames"])
    save_weights(
        folder / "w.safetensors", Weights(detector.state_dict(), model, frames, SMALL_CLASSES, 5)
    )
    return folder / "w.safetensors", shards


def evaluated(weights, shards, output, *overrides):
    completed = subprocess.run(
        [
            sys.executable,
            "-m",
            "evspan.launch",
            "evaluate",
            str(weights),
            f"dataset.root={shards}",
            f"output={output}",
            "evaluation.batch_size=1",
            "evaluation.skip_first_ms=0",
            "parallel.threads=1",
            "evaluation.confidence_threshold=0.1",
            *overrides,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return json.loads((output / "metrics.json").read_text()), completed.stdout


def test_other_frames_than_the_weights_are_reported(weights_and_shards, caplog):
    """The evaluation runs: people measure a detector on other windows on purpose."""
    path, shards = weights_and_shards
    weights = load_weights(path)
    weights = replace(weights, frames=replace(weights.frames, window_ms=20, cutoff=3))
    dataset = DatasetConfig(root=str(shards))
    config = EvaluationConfig(skip_first_ms=0)
    data = open_dataset(dataset, "val")
    frames = data.frames
    with open_one_rank() as world:
        evaluate_weights(weights, dataset, config, world)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"frames.window_ms={frames.window_ms} (weights: 20)" in caplog.messages[0]
        assert f"frames.cutoff={frames.cutoff} (weights: 3)" in caplog.messages[0]
        summary = describe_evaluation("w", weights, dataset, config, world.device, data=data)
        assert summary["other_frames"] == {
            "window_ms": [20, frames.window_ms],
            "cutoff": [3, frames.cutoff],
        }
        caplog.clear()
        evaluate_weights(load_weights(path), dataset, config, world)
        assert not caplog.messages


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_rank_may_evaluate_longer_than_a_collective_may_wait(weights_and_shards, tmp_path):
    """Two ranks for one recording: the other one is done at once, and waits."""
    output = tmp_path / "metrics.json"
    command = [
        *("env", f"PYTHONPATH={ROOT / 'tests'}", "OMP_WAIT_POLICY=PASSIVE"),
        *(sys.executable, "-m", uneven_ranks.__name__),
        *map(str, (*weights_and_shards, output)),
    ]
    started = time.monotonic()
    assert run_ranks(command, uneven_ranks.RANKS, threads=1) == 0
    assert time.monotonic() - started > uneven_ranks.TIMEOUT_S
    assert json.loads(output.read_text())["boxes"] > 0


def test_ranks_meet_equally_often():
    """Whatever their amounts of work. The fake collective returns when all have called it."""
    rounds: list[list[bool]] = []
    barrier = threading.Barrier(3, timeout=20)
    works = [False] * 3

    def rank(number: int, chunks: int) -> None:
        def any_works(value: bool) -> bool:
            works[number] = value
            if barrier.wait() == 0:
                rounds.append(list(works))
            barrier.wait()
            return any(rounds[-1])

        meetings = Meetings(any_works, 0.02)
        for _ in range(chunks):
            time.sleep(0.01)
            meetings.while_working()
        meetings.until_all_are_done()

    ranks = [threading.Thread(target=rank, args=(i, n)) for i, n in enumerate((0, 9, 40))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(20)
        assert not thread.is_alive()
    assert rounds[-1] == [False] * 3
    assert all(any(values) for values in rounds[:-1])
    assert len(rounds) > 5


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_ranks_score_as_one_does(weights_and_shards, tmp_path):
    """Three ranks for two recordings: one has nothing to do."""
    alone, shown = evaluated(*weights_and_shards, tmp_path / "one")
    result, _ = evaluated(*weights_and_shards, tmp_path / "three", "parallel.ranks=3")
    assert result == alone
    assert alone["detections"] > 100
    assert alone["boxes"] == 2 * (7 + 11)
    assert alone["ar100"] > 0
    one, three = load_frames(tmp_path / "one" / FRAMES), load_frames(tmp_path / "three" / FRAMES)
    np.testing.assert_array_equal(one.detections, three.detections)
    assert {p.name for p in (tmp_path / "three").iterdir()} - {".locks"} == {
        "metrics.json",
        FRAMES,
        "val_000_bbox.npy",
        "val_001_bbox.npy",
    }
    assert "AP 0.50:0.95" in shown
    assert "since start" in shown
    assert "val_001" in shown
    # metrics.json contains what was scored, how, and by what.
    assert result["checkpoint"] == str(weights_and_shards[0])
    assert result["step"] == 5
    assert result["split"] == "val"
    assert result["protocol"]["confidence_threshold"] == 0.1
    assert result["protocol"]["still_speed"] == 5.0
    assert result["breakdown"]["confusion"]["score_threshold"] == 0.3
    assert len(result["config_hash"]) == 16
    assert result["breakdown"]["per_recording"]["val_001"]["frames"] == 11


# -- names and minimum sizes -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dataset", "frame_hw", "downsample", "expected"),
    [
        # name, min_side and min_diagonal of prep -> those of the evaluation, and its name
        (("gen4", 20, 60), (360, 640), 2, (10, 30, PROPHESEE)),
        (("gen4", 20, 60), (720, 1280), 1, (20, 60, PROPHESEE)),
        (("gen4_rvt", 5, 0), (360, 640), 2, (10, 30, PROPHESEE)),
        (("rvt_tree", 0, 0), (360, 640), 2, (10, 30, PROPHESEE)),
        (("rvt_tree", 0, 0), (240, 304), 1, (10, 30, PROPHESEE)),
        (("own", 14, 0), (360, 640), 2, (7, 0, COCO)),
        (("simulated", 0, 0), (180, 320), 4, (0, 0, COCO)),
        (("gen4", 20, 60), (100, 100), 2, (10, 30, COCO)),  # of another sensor
    ],
)
def test_the_minimum_sizes_follow_the_dataset(dataset, frame_hw, downsample, expected):
    name, min_side, min_diagonal = dataset
    height, width = frame_hw
    data = Dataset(
        [],
        FrameConfig(downsample=downsample),
        height,
        width,
        CLASSES,
        name=name,
        min_side=min_side,
        min_diagonal=min_diagonal,
    )
    protocol = protocol_of(EvaluationConfig(), data)
    assert (protocol.min_side, protocol.min_diagonal) == expected[:2]
    assert protocol_name(protocol, data) == expected[2]
    assert protocol_line(protocol, data).startswith(expected[2])
    given = protocol_of(EvaluationConfig(min_side=3.0), data)
    assert (given.min_side, given.min_diagonal) == (3.0, expected[1])
    assert protocol_name(given, data) == COCO
    later = protocol_of(EvaluationConfig(skip_first_ms=0), data)
    assert protocol_name(later, data) == COCO


def test_prepared_minimum_sizes_are_read_from_the_shards(tmp_path):
    shards = write_small_shards(tmp_path, {"val": [3]})
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["config"]["dataset"]["labels"] |= {"min_side": 6.0, "min_diagonal": 9.0}
    manifest["config_hash"] = hash_config(manifest["config"])
    (shards / "manifest.json").write_text(json.dumps(manifest))
    data = open_dataset(DatasetConfig(root=str(shards)), "val")
    assert (data.min_side, data.min_diagonal) == (6.0, 9.0)
    assert data.name == manifest["config"]["dataset"]["name"]
