"""`evspan evaluate` takes dataset and protocol of the run, and prints JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evspan.conf.compose import compose, save_config
from evspan.conf.schema.prep import DatasetConfig, frame_config
from evspan.conf.schema.training import (
    BackboneConfig,
    EvaluateConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
)
from evspan.data_prep.shards.format import load_manifest
from evspan.launch.cli.run_defaults import with_run_config
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights, save_weights
from support.small_shards import write_small_shards

CLASSES = ["pedestrian", "two_wheeler", "car"]
TRAINED = TrainConfig(
    dataset=DatasetConfig(name="mine", root="/data/mine", classes=CLASSES),
    evaluation=EvaluationConfig(
        split="test",
        min_side=4.0,
        skip_first_ms=0,
        time_bins_s=[1.0],
        limit_recordings=3,
        write_detections=False,
        at_end=False,
    ),
)


def composed(run: Path, *overrides: str) -> EvaluateConfig:
    argv = [f"checkpoint={run}", *overrides]
    return with_run_config(compose(EvaluateConfig, argv), argv)


@pytest.fixture
def run(tmp_path):
    save_config(TRAINED, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "inside", ["", "checkpoints/step-00000001", "checkpoints/step-00000001/weights.safetensors"]
)
def test_what_is_not_given_is_the_runs(run, inside):
    config = composed(run / inside)
    assert config.dataset == TRAINED.dataset
    # An evaluation by hand scores all recordings and writes its detections.
    assert config.evaluation == replace(
        TRAINED.evaluation, limit_recordings=0, write_detections=True, at_end=True
    )


def test_what_is_given_wins(run):
    config = composed(run, "evaluation.split=val", "evaluation.min_side=null", "dataset.root=other")
    assert (config.evaluation.split, config.evaluation.min_side) == ("val", None)
    assert config.evaluation.skip_first_ms == 0
    assert (config.dataset.root, config.dataset.classes) == ("other", CLASSES)
    config = composed(run, "dataset=simulated")
    assert (config.dataset.name, config.dataset.root) == ("simulated", "")
    assert config.evaluation.min_side == 4.0
    config = composed(run, "dataset.labels.class_map={0: 1}")
    assert config.dataset.labels.class_map == {0: 1}


def test_a_file_of_no_run_changes_nothing(tmp_path, run):
    assert composed(tmp_path / "w.safetensors").dataset.root == ""
    (run / "config.yaml").write_text("model: 3")
    assert composed(run).dataset.root == ""


@pytest.mark.slow
def test_json_is_all_of_standard_output(tmp_path):
    shards = write_small_shards(tmp_path / "shards", {"val": [4]})
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=8, dim_head=4), head=HeadConfig(num_classes=3)
    )
    manifest = load_manifest(shards)
    frames = frame_config(manifest.config["frames"])
    run = tmp_path / "run"
    trained = TrainConfig(
        dataset=DatasetConfig(root=str(shards)), evaluation=EvaluationConfig(skip_first_ms=0)
    )
    save_config(trained, run / "config.yaml")
    weights = Weights(
        Detector(model, frames.channels).state_dict(), model, frames, manifest.classes, 5
    )
    save_weights(run / "w.safetensors", weights)
    done = subprocess.run(
        [sys.executable, "-m", "evspan.launch", "evaluate", run / "w.safetensors", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    metrics = json.loads(done.stdout)
    assert metrics == json.loads((run / "evaluation-val" / "metrics.json").read_text())
    assert metrics["protocol_name"] == "COCO AP"
    assert metrics["protocol"]["min_side"] == 0
    assert "COCO AP: boxes of any size" in done.stderr
    assert f"those of {run / 'config.yaml'}" in done.stderr
