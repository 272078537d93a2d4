"""What `training.precision=auto` becomes, and torch's switches."""

from typing import Any

import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.training import ParallelConfig, Precision, TrainConfig, TrainingConfig
from evspan.pipeline.checkpoint_files import FORMAT_VERSION
from evspan.pipeline.engine import precision as module
from evspan.pipeline.engine.continuation import check_continues
from evspan.pipeline.engine.precision import resolve_precision, set_float32_kernels
from evspan.pipeline.parallel.world import World


def resolved(precision, saved, *, device="cpu", bf16_of_ranks=None):
    config = TrainConfig(
        training=TrainingConfig(precision=Precision[precision], batch_size=2),
        parallel=ParallelConfig(ranks=2),
    )
    world = World(0, 2, 0, 2, torch.device(device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gather_json", lambda own, name: bf16_of_ranks or [own])
        result = resolve_precision(config, world, saved)
    assert config.training.precision is Precision[precision]
    return result.training.precision.name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_chosen_precision_stays(precision):
    assert resolved(precision, None) == precision
    assert resolved(precision, "fp32") == precision  # the checkpoint is refused later


@pytest.mark.parametrize("saved", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("bf16", [True, False])
def test_auto_continues_with_the_checkpoints_precision_on_any_machine(saved, bf16):
    assert resolved("auto", saved, bf16_of_ranks=[bf16, bf16]) == saved


def test_auto_is_bf16_where_every_rank_computes_in_it():
    assert resolved("auto", None) == "fp32"
    assert resolved("auto", None, bf16_of_ranks=[True, True]) == "bf16"
    assert resolved("auto", None, bf16_of_ranks=[True, False]) == "fp32"


def test_only_tf32_rounds_the_inputs_of_products():
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for precision in (Precision.tf32, Precision.fp32, Precision.tf32, Precision.bf16):
            set_float32_kernels(precision)
            assert {switch.allow_tf32 for switch in switches} == {precision is Precision.tf32}
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def test_a_run_in_a_precision_that_is_gone_is_refused_with_the_remedy(tmp_path):
    meta = {"form": FORMAT_VERSION, "config": {"training": {"precision": "fp16"}}}
    with pytest.raises(UserError) as refused:
        check_continues(tmp_path, meta, TrainConfig())
    message = str(refused.value)
    assert "training.precision=fp16, which this version does not have" in message
    assert message.endswith(f"run_dir=NEW checkpoint.init_from={tmp_path}")
