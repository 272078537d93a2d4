"""Runs `evspan train` on small shards as a user does, and reads its TensorBoard scalars."""

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]


def train_command(shards, run_dir, *overrides):
    """The command of a run of 6 steps."""
    return [
        sys.executable,
        "-m",
        "evspan.launch",
        "train",
        "experiment=demo",
        f"dataset.root={shards}",
        f"run_dir={run_dir}",
        "training.max_steps=6",
        "training.sequence_length=4",
        "training.log_every=1",
        "training.log_images_every=0",
        "optimizer.lr=0.0002",
        "checkpoint.every=3",
        "checkpoint.keep=9",
        "parallel.timeout_s=120",
        "evaluation.skip_first_ms=0",
        *overrides,
    ]


def train(shards, run_dir, *overrides, code=0, timeout=200):
    """Trains and returns the output. code: the expected exit code."""
    result = subprocess.run(
        train_command(shards, run_dir, *overrides),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


def scalars(run_dir, tag):
    """step -> value of a TensorBoard scalar."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(tag)}


LOSSES = (
    "loss/total",
    "loss/iou",
    "loss/objectness",
    "loss/class",
    "train/gradient_norm",
    "train/learning_rate",
)
