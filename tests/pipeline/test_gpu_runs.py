"""Whole runs on the emulated GPU, whose operators refuse tensors of two devices: training, saving,
resuming, smoke's comparison, evaluation and inference give what the CPU gives."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.engine.evaluator import Evaluation, evaluate_weights
from evspan.pipeline.engine.layout_comparison import ComparisonConfig, LayoutComparison
from evspan.pipeline.engine.layouts import REFERENCE, LayoutResult, layouts_of
from evspan.pipeline.inference.streaming import evaluate_split
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.weights import load_weights
from support.counted_step import set_launcher_variables
from support.emulated_deepspeed import deepspeed_on_emulated_gpu
from support.emulated_device import emulated_gpu, is_supported
from support.small_shards import write_small_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_supported(), reason="torch before 2.9"),
]
SMALL_COPY = 2**16
BELOW_THE_FIRST_SCORES = 1e-5  # a new detector gives all predictions about 1e-4
SHARD_FRAMES = {"train": [40, 40], "val": [20]}


@dataclass(frozen=True)
class Runs:
    """Smoke's reference on the CPU, and a layout on the GPU compared with it."""

    folder: Path
    on_gpu: LayoutResult


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    write_small_shards(folder / "shards", SHARD_FRAMES)
    config = ComparisonConfig(folder, ranks=1, steps=4, threads=1)
    set_launcher_variables(rank=0, world=1)
    with emulated_gpu() as gpu:
        comparison = LayoutComparison(replace(gpu.world, device=torch.device("cpu")), config)
        comparison.run(REFERENCE)
        comparison.world = gpu.world
        with deepspeed_on_emulated_gpu():
            on_gpu = comparison.run(layouts_of(1)[0])
    return Runs(folder, on_gpu)


def test_smoke_on_a_gpu_agrees_with_the_cpu(runs):
    result = runs.on_gpu
    assert not result.skipped
    assert result.loss < 1e-4
    assert result.gradients < 1e-3  # other kernels: rounding
    assert result.resumed < 1e-6
    assert result.other == REFERENCE.name
    assert result.resumed_other < 1e-4  # the CPU's checkpoint on the GPU


def checkpoint(runs: Runs) -> Path:
    return next(runs.folder.glob("runs/*/whole/checkpoints/step-*"))


def evaluated(runs: Runs, device: torch.device) -> Evaluation:
    data = DatasetConfig(root=str(runs.folder / "shards"))
    config = EvaluationConfig(
        split="val", skip_first_ms=0, confidence_threshold=BELOW_THE_FIRST_SCORES
    )
    with emulated_gpu() as gpu:
        world = replace(gpu.world, device=device)
        return evaluate_weights(load_weights(checkpoint(runs)), data, config, world)


def test_evaluation_on_a_gpu_agrees_with_the_cpu(runs):
    on_gpu = evaluated(runs, torch.device("cuda", 0))
    on_cpu = evaluated(runs, torch.device("cpu"))
    assert [r.name for r in on_gpu.results] == [r.name for r in on_cpu.results]
    assert on_gpu.metrics.ap == pytest.approx(on_cpu.metrics.ap, abs=1e-3)
    for ours, expected in zip(on_gpu.results, on_cpu.results, strict=True):
        for rows, expected_rows in zip(ours.detections, expected.detections, strict=True):
            assert len(expected_rows) >= 20
            np.testing.assert_allclose(rows[:20], expected_rows[:20], rtol=1e-4, atol=1e-4)


def test_evaluation_waits_once_per_batch(runs):
    data = open_dataset(DatasetConfig(root=str(runs.folder / "shards")), "val")
    config = EvaluationConfig(split="val", sequence_length=5, batch_size=1)
    with emulated_gpu() as gpu:
        detector = detector_from(load_weights(checkpoint(runs)), device=gpu.device)
        arguments = {"device": gpu.device, "recordings": data.recordings}
        with gpu.counting() as counts:
            evaluate_split(detector, data, config, **arguments)
    batches = SHARD_FRAMES["val"][0] // 5
    assert counts.waits.total() <= batches, counts.waits
    # The driver takes small copies from pageable memory into its own and returns.
    assert counts.copied_bytes("H2D", pinned=False) < SMALL_COPY, counts.copies
