"""Whole runs on the emulated GPU, whose operators refuse tensors of two devices: training, saving,
resuming, smoke's comparison, evaluation and inference give what the CPU gives."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from evspan.pipeline.engine.layout_comparison import ComparisonConfig, LayoutComparison
from evspan.pipeline.engine.layouts import REFERENCE, LayoutResult, layouts_of
from support.counted_step import set_launcher_variables
from support.emulated_deepspeed import deepspeed_on_emulated_gpu
from support.emulated_device import emulated_gpu, is_supported
from support.small_shards import write_small_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_supported(), reason="torch before 2.9"),
]
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
