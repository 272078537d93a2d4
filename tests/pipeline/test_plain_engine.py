"""The plain engine trains as DeepSpeed does, and either continues the other's checkpoints."""

from typing import Any

import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    EngineKind,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.benchmark.operations import OperatorCounter
from evspan.pipeline.engine.checkpoints import load_snapshot
from evspan.pipeline.engine.plain_engine import PlainEngine
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

LANES = 2
STEPS = 4


@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_small_shards(tmp_path_factory.mktemp("data"), {"train": [9, 8], "val": [3]})


def config(shards, run_dir, engine, *, accumulation=1, precision="fp32"):
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            fpn=FpnConfig(enable_small_object_attention=True),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            max_steps=STEPS,
            batch_size=LANES,
            sequence_length=2,
            gradient_accumulation_steps=accumulation,
            precision=Precision[precision],
            engine=EngineKind[engine],
            evaluate_every=0,
            log_images_every=0,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(lr=1e-3, warmup_fraction=0.2, gate_lr_multiplier=10),
        checkpoint=CheckpointConfig(every=2, keep=9),
    )


def trained(config, world):
    """Losses, gradient norm and learning rate by step."""
    reports = {}
    trainer = Trainer(config, world, on_step=lambda report: reports.update({report.step: report}))
    trainer._evaluate = lambda flag: None
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()
        trainer.engine.close()
    return {step: [*r.losses, r.gradient_norm, r.learning_rate] for step, r in reports.items()}


def snapshot(run_dir, step):
    loaded = load_snapshot(run_dir / "checkpoints" / f"step-{step:08d}", range(LANES), 0)
    return {**loaded.weights, **loaded.moments}


def rewind(run_dir):
    """Makes step 2 the newest checkpoint; returns the contents of step 4."""
    contents = snapshot(run_dir, 4)
    (run_dir / "checkpoints" / "step-00000004").rename(run_dir / "step-00000004")
    (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
    return contents


def files(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints" / "step-00000002").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_trains_as_deepspeed_does_and_each_continues_the_other(
    shards, world, tmp_path, accumulation
):
    losses = {}
    for engine in ("deepspeed", "plain"):
        run = config(shards, tmp_path / engine, engine, accumulation=accumulation)
        losses[engine] = trained(run, world)
    actual, expected = (torch.tensor([*losses[e].values()]) for e in ("plain", "deepspeed"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert files(tmp_path / "plain") == files(tmp_path / "deepspeed")
    for before, after in (("deepspeed", "plain"), ("plain", "deepspeed")):
        expected = rewind(tmp_path / before)
        run = config(shards, tmp_path / before, after, accumulation=accumulation)
        assert sorted(trained(run, world)) == [3, 4]
        actual = snapshot(tmp_path / before, 4)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_in_bf16_each_loads_what_the_other_saved(shards, world, tmp_path):
    first = {}
    for engine in ("deepspeed", "plain"):
        run = config(shards, tmp_path / engine, engine, precision="bf16")
        first[engine] = trained(run, world)[1]
    # The gradients are the same up to the order in which a norm is summed.
    assert first["plain"] == pytest.approx(first["deepspeed"], rel=1e-3)
    for before, after in (("deepspeed", "plain"), ("plain", "deepspeed")):
        expected = snapshot(tmp_path / before, 4)
        run = config(shards, tmp_path / before, after, precision="bf16")
        trainer = Trainer(run, world)
        weights = trainer.engine.full_state()
        moments = trainer.engine.optimizer_state.moments(keep=True)
        loaded = {**weights, **moments}
        assert trainer.engine.optimizer_state.counters()["updates"] == 4
        assert trainer.engine.dtype == torch.bfloat16
        trainer.close()
        trainer.engine.close()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_an_update_takes_few_operators(shards, world, tmp_path):
    trainer = Trainer(config(shards, tmp_path, "plain"), world)
    batches = trainer.loader.batches(0)
    trainer.micro_batch(next(batches))
    trainer.micro_batch(next(batches))
    engine: Any = trainer.engine
    engine.gradient = torch.ones_like(engine.weights.master)
    engine.any_counts = torch.tensor(True)
    with OperatorCounter() as seen:
        engine.step()
    batches.close()
    trainer.close()
    # A CPU's AdamW takes about ten operators for each of the three groups, the fused one two.
    assert seen.operators.total() <= 60


def test_in_bf16_small_gradients_of_many_micro_batches_are_kept(world):
    """One micro-batch has a gradient of 1, where bf16 has steps of 1/128; the others have 1/512."""
    micro_batches = 64
    config = TrainConfig(
        training=TrainingConfig(
            engine=EngineKind.plain,
            precision=Precision.bf16,
            gradient_accumulation_steps=micro_batches,
        )
    )
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, 2))
    engine = PlainEngine(module, config, world, lanes=1)
    assert module.weight.dtype == torch.bfloat16
    for i in range(micro_batches):
        gradient = 1.0 if i == 0 else 1 / 512
        loss = micro_batches * gradient * module.weight.sum()
        engine.backward(loss, torch.tensor(True))
        if i + 1 < micro_batches:
            assert engine.step() is None
    expected = torch.full((3, 2), 1 + 63 / 512)
    gradients = engine.full_gradients()
    torch.testing.assert_close(gradients["weight"], expected, rtol=0, atol=1e-6)
    update = engine.step()
    torch.testing.assert_close(update.gradient_norm, expected.norm())


def test_what_only_deepspeed_does_is_refused():
    with pytest.raises(UserError, match=r"training\.engine=plain partitions and offloads nothing"):
        TrainConfig(
            training=TrainingConfig(engine=EngineKind.plain), deepspeed=DeepSpeedConfig(stage=2)
        )
