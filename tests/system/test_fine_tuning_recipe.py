"""The recipe of fine-tuning, as the READMEs give it: RVT's weights, own classes, attention added, AP."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import load_weights
from support.rvt_checkpoints import model_of, publish

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 4


def evspan(*words):
    """Runs a command; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", "evspan.launch", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_published_weights_are_tuned_to_own_classes(tmp_path):
    torch.manual_seed(0)
    published = Detector(model_of("micro"), 20).state_dict()
    weights = publish(tmp_path / "rvt-micro.ckpt", published)
    raw, shards, run = tmp_path / "raw", tmp_path / "shards", tmp_path / "tuned"
    size = ("--width", "256", "--height", "256", "--objects", "3,5")
    evspan("simulate", raw, "--recordings", "train=2,val=1", "--seconds", "1.5", *size)
    evspan(
        "prep",
        f"source={raw}",
        f"output={shards}",
        "frames.mode=rvt",
        "dataset.classes=[ball,box]",
        "dataset.labels.class_map={0:0,1:1}",
    )
    log = evspan(
        "train",
        f"dataset.root={shards}",
        f"run_dir={run}",
        f"checkpoint.init_from={weights}",
        "model=maxvit_yolox/size_aware_attention",
        "model.head.num_classes=2",
        "size=micro",
        "optimizer.lr=2e-4",
        'optimizer.lr_multipliers={"backbone.*": 0.1}',
        'training.freeze=["backbone.stages.0.*"]',
        f"training.max_steps={STEPS}",
        "training.batch_size=2",
        "training.log_images_every=0",
        "evaluation.skip_first_ms=0",
        "parallel.threads=1",
    )
    assert re.search(r"loaded 370 of 437 tensors; new: fpn\.small_object_attention_modules", log)
    assert "yolox_head.cls_preds (2 classes, 0 matched by name); unused: none" in log
    assert re.search(r"frozen: 31 of \d+ tensors, .*: backbone\.stages\.0\.\*", log)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["ap"] <= 1
    tuned = load_weights(run)
    assert tuned.step == STEPS
    assert tuned.classes == ["ball", "box"]
    assert tuned.model.fpn.enable_small_object_attention
    changed = {
        name for name, tensor in published.items() if not torch.equal(tuned.tensors[name], tensor)
    } - {name for name in published if "cls_preds" in name}
    assert changed
    assert not any(name.startswith("backbone.stages.0.") for name in changed)
    printed = evspan("evaluate", run, "evaluation.skip_first_ms=0", "parallel.threads=1")
    assert re.search(r"AP", printed)
