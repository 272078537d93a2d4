"""A micro-batch whose loss is not finite is left out on the device, to the last bit.

The oracle, HostSkipEngine, reads the loss at once and does not call DeepSpeed at all.
"""

from contextlib import contextmanager

import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.engine import trainer as trainer_module
from evspan.pipeline.engine.adam import SkippableAdamW
from evspan.pipeline.engine.checkpoints import load_snapshot
from evspan.pipeline.engine.deepspeed_engine import DeepSpeedEngine
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.state import state_tensors
from support.host_skip_engine import HostSkipEngine
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = {1: "+-+--+", 3: "-++ +-+ ++- --- +-- +++".replace(" ", "")}  # -: not finite
LANES = 2


@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_small_shards(tmp_path_factory.mktemp("data"), {"train": [9, 8], "val": [3]})


def config(shards, run_dir, *, accumulation=1, stage=1, precision="fp32", **training):
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            fpn=FpnConfig(enable_small_object_attention=True, identity_init=False),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            **{"max_steps": 20, "log_every": 100, "log_images_every": 0, **training},
            batch_size=LANES,
            sequence_length=2,
            gradient_accumulation_steps=accumulation,
            precision=Precision[precision],
            evaluate_every=0,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_fraction=0.2),
        deepspeed=DeepSpeedConfig(stage=stage),
        checkpoint=CheckpointConfig(every=1),
    )


@contextmanager
def losses_of(pattern, patch):
    """Makes the network's output in the n-th micro-batch not finite where pattern[n] is '-'."""
    signs = iter(pattern)
    real = detection_loss

    def loss(raw, *args, **kwargs):
        return real(raw * (1.0 if next(signs) == "+" else torch.nan), *args, **kwargs)

    with patch.context() as context:
        context.setattr(trainer_module, "detection_loss", loss)
        yield


@contextmanager
def opened(config, world, engine=DeepSpeedEngine):
    trainer = Trainer(config, world, engine)
    try:
        yield trainer
    finally:
        trainer.close()
        trainer.engine.close()


def contents(trainer):
    """All that a checkpoint has, but for the running statistics."""
    weights = trainer.engine.full_state()
    kept = {name: t for name, t in weights.items() if "running_" not in name}
    kept = {name: t for name, t in kept.items() if "num_batches" not in name}
    carry = {f"carry {i}": t for i, t in enumerate(state_tensors(trainer.state))}
    moments = trainer.engine.optimizer_state.moments(keep=True)
    return kept | moments | carry


def statistics(trainer):
    return [flat.clone() for flat in trainer.statistics.flat]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [(1, "fp32", 1), (1, "fp32", 3), (0, "fp32", 3), (1, "bf16", 3), (0, "bf16", 1)],
)
def test_it_changes_nothing(shards, world, tmp_path, monkeypatch, stage, precision, accumulation):
    form = {"accumulation": accumulation, "stage": stage, "precision": precision}
    pattern = PATTERNS[accumulation]
    runs = []
    for engine in (HostSkipEngine, DeepSpeedEngine):
        with (
            opened(config(shards, tmp_path / engine.__name__, **form), world, engine) as trainer,
            losses_of(pattern, monkeypatch),
        ):
            batches = trainer.loader.batches(0)
            records = []
            for sign in pattern:
                before = statistics(trainer)
                trainer.micro_batch(next(batches))
                unchanged = all(map(torch.equal, before, statistics(trainer)))
                assert unchanged == (sign == "-")
            trainer._read_pending()
            counters = trainer.engine.optimizer_state.counters()
            records += [contents(trainer), counters, trainer.skipped, trainer.skipped_in_a_row]
            batches.close()
        runs.append(records)
    (expected, *expected_counts), (actual, *counts) = runs
    assert counts == expected_counts
    assert counts[1] == pattern.count("-")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def checkpoint(run_dir, step):
    return load_snapshot(run_dir / "checkpoints" / f"step-{step:08d}", range(LANES), 0)


@pytest.mark.slow
def test_a_checkpoint_after_it_is_the_one_before_with_a_state_of_zeros(
    shards, world, tmp_path, monkeypatch
):
    run = config(shards, tmp_path, max_steps=3)
    with opened(run, world) as trainer, losses_of("+-+", monkeypatch):
        trainer._evaluate = lambda flag: None
        trainer.run(StopFlag())
    before = checkpoint(tmp_path, 1)
    after = checkpoint(tmp_path, 2)
    assert any(t.any() for t in before.carry)
    assert not any(t.any() for t in after.carry)
    for name in ("weights", "moments"):
        one = getattr(before, name)
        other = getattr(after, name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(
        not torch.equal(t, before.weights[name])
        for name, t in checkpoint(tmp_path, 3).weights.items()
    )


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(
    shards, world, tmp_path, monkeypatch
):
    run = config(shards, tmp_path, max_nonfinite=2)
    run.checkpoint.every = 2
    with opened(run, world) as trainer, losses_of("++--+++", monkeypatch):
        message = "not finite 2 times in a row, last in step 4"
        with pytest.raises(UserError, match=message):
            trainer.run(StopFlag())
    steps = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == ["step-00000002"]


def test_the_error_comes_one_step_late_where_nothing_is_saved(shards, world, tmp_path, monkeypatch):
    run = config(shards, tmp_path, max_nonfinite=2)
    run.checkpoint.every = 100
    with opened(run, world) as trainer, losses_of("+--++++", monkeypatch):
        with pytest.raises(UserError, match="last in step 3"):
            trainer.run(StopFlag())
        assert trainer.step == 3


@pytest.mark.slow
def test_a_stop_request_in_a_step_that_is_left_out_saves_the_next_one(
    shards, world, tmp_path, monkeypatch
):
    run = config(shards, tmp_path)
    run.checkpoint.every = 100
    flag = StopFlag()
    with opened(run, world) as trainer, losses_of("++-+++", monkeypatch):
        real = trainer.micro_batch

        def micro_batch(*args, **kwargs):
            if trainer.step == 2:  # its end is not logged, as those of steps 1 and 2 are
                flag.request()
                kwargs["stop_requested"] = True
            return real(*args, **kwargs)

        trainer.micro_batch = micro_batch
        with pytest.raises(SystemExit):
            trainer.run(flag)
        assert trainer.skipped == 1
        assert trainer.engine.optimizer_state.counters()["updates"] == 3
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_gradients_that_are_not_finite_are_left_out_and_counted(
    shards, world, tmp_path, monkeypatch
):
    with opened(config(shards, tmp_path), world) as trainer:
        batches = trainer.loader.batches(0)
        trainer.micro_batch(next(batches))
        trainer._read_pending()
        before = contents(trainer)
        hook = next(trainer.engine.module.parameters()).register_hook(lambda g: g * torch.inf)
        trainer.micro_batch(next(batches))
        trainer._read_pending()
        hook.remove()
        after = contents(trainer)
        batches.close()
        assert trainer.skipped == trainer.skipped_in_a_row == 1
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert set(before) - set(same) == {name for name in before if name.startswith("carry")}


def test_the_fused_kernel_leaves_out_what_is_skipped():
    def stepped(fused, skips):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(1000))
        adam = SkippableAdamW([{"params": [parameter]}], lr=0.1, fused=fused)
        for skip in skips:
            gradient = torch.full((1000,), torch.nan) if skip else parameter.detach().sin()
            parameter.grad = gradient
            adam.skip = torch.tensor(float(skip))
            adam.step()
        return [parameter.detach(), *adam.state[parameter].values()]

    expected = stepped(True, [False, False])
    for actual in (stepped(True, [False, True, True, False]), stepped(True, [False, False, True])):
        assert all(map(torch.equal, actual, expected))
    for actual, reference in zip(expected, stepped(False, [False, True, False]), strict=True):
        torch.testing.assert_close(actual, reference)
