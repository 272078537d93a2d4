"""The moving average of the weights: what it is, how it is saved, continued and used.

test_skipped compares it with its definition in every engine, and test_checkpoint_layouts continues
it on every layout.
"""

import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EngineKind,
    EvaluateConfig,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
    WeightsKind,
)
from evspan.launch.local.rank import evaluate_rank, evaluation_output
from evspan.pipeline.checkpoint_files import DamagedError, find_weights, read_meta, weights_file
from evspan.pipeline.engine import ema
from evspan.pipeline.engine import trainer as trainer_module
from evspan.pipeline.engine.plain_engine import PlainEngine
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.parallel import world as world_module
from evspan.pipeline.weights import Average, load_weights
from safetensors.torch import load_file
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
DECAY = 0.2  # reached after two updates


@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_small_shards(tmp_path_factory.mktemp("data"), {"train": [9, 8], "val": [3]})


def evaluation_config():
    """With detections: a new detector gives all predictions scores of about 1e-4."""
    return EvaluationConfig(skip_first_ms=0, confidence_threshold=1e-5)


def config(shards, run_dir, *, decay=DECAY, precision="fp32", **training):
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
            batch_size=2,
            sequence_length=2,
            precision=Precision[precision],
            engine=EngineKind.plain,
            evaluate_every=2,
            log_images_every=0,
            num_workers=0,
            ema_decay=decay,
            **training,
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_fraction=0.2),
        checkpoint=CheckpointConfig(every=1, keep=9),
        evaluation=evaluation_config(),
    )


def train(config, world):
    trainer = Trainer(config, world)
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()
    return trainer


def checkpoint(run, step):
    return Path(run) / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def run(shards, world, tmp_path_factory):
    """Four steps, with a checkpoint after each."""
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        run = tmp_path_factory.mktemp("run") / "run"
        patch.chdir(run.parent)
        train(config(shards, run), world)
    return run


def continued(run, tmp_path, step):
    """A copy of the run with the checkpoint of this step as its newest."""
    for file in checkpoint(run, step).iterdir():
        path = checkpoint(tmp_path, step) / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    (tmp_path / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


@pytest.mark.slow
def test_it_is_that_of_its_definition(run):
    """From the weights that the run saved; running means and variances are averaged, too."""
    raws = [load_file(checkpoint(run, step) / "weights.safetensors") for step in (1, 2, 3, 4)]
    saved = [load_file(checkpoint(run, step) / "ema.safetensors") for step in (1, 2, 3, 4)]
    assert saved[0].keys() == raws[0].keys()
    changed = 0
    for name, average in saved[0].items():
        for n, (raw, after) in enumerate(zip(raws[1:], saved[1:]), 1):
            if raw[name].is_floating_point():
                weight = torch.tensor(1 - min(DECAY, (1 + n) / (10 + n)))
                average = average + weight * (raw[name] - average)
                changed += not torch.equal(average, raw[name])
            else:
                average = raw[name]
            assert torch.equal(average, after[name]), name
    assert changed > 3 * 100
    assert any("running_var" in name for name in saved[0])


def test_the_warm_up_follows_the_first_weights():
    assert [ema.warmed_up_decay(0.9999, n) for n in (0, 1, 90, 10**6)] == [
        1 / 10,
        2 / 11,
        91 / 100,
        0.9999,
    ]
    assert ema.warmed_up_decay(0.05, 0) == 0.05


def test_the_same_values_have_the_same_average_wherever_they_lie():
    """At every offset in a buffer, and cut into parts of every size."""
    generator = torch.Generator().manual_seed(0)
    size = 149
    average = torch.randn(size, generator=generator)
    source = torch.randn(size, generator=generator)
    weight = torch.tensor(0.1234)
    expected = average + weight * (source - average)
    for offset in range(17):
        averages = torch.zeros(offset + size)
        sources = torch.zeros(offset + size)
        averages[offset:] = average
        sources[offset:] = source
        ema.follow([averages[offset:]], [sources[offset:]], weight)
        assert torch.equal(averages[offset:], expected)
    for part in (1, 3, 8, 50, 101):
        averages = average.clone()
        ema.follow(list(averages.split(part)), list(source.split(part)), weight)
        assert torch.equal(averages, expected)


def test_a_skipped_step_leaves_it_as_it_is(shards, world, tmp_path, monkeypatch):
    signs = iter([1.0, torch.nan, 1.0])

    def loss(raw, *args, **kwargs):
        return detection_loss(raw * next(signs), *args, **kwargs)

    monkeypatch.setattr(trainer_module, "detection_loss", loss)
    trainer = Trainer(config(shards, tmp_path / "run"), world)
    batches = trainer.loader.batches(0)
    states = []
    for _ in range(3):
        trainer.micro_batch(next(batches))
        trainer._read_pending()
        states.append(trainer.average.state(trainer.engine.full_state()))
    batches.close()
    trainer.close()
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert not all(torch.equal(states[2][name], tensor) for name, tensor in states[1].items())
    assert trainer.average.updates == 2


def test_it_continues_to_the_last_bit(run, shards, world, tmp_path, caplog):
    continued(run, tmp_path, 2)
    train(config(shards, tmp_path), world)
    assert "begins with its weights" not in caplog.text
    for file in ("ema.safetensors", "weights.safetensors"):
        resumed = (checkpoint(tmp_path, 4) / file).read_bytes()
        assert resumed == (checkpoint(run, 4) / file).read_bytes()
    assert read_meta(checkpoint(tmp_path, 4)).values["ema"] == {"decay": DECAY, "updates": 4}


def test_without_one_in_the_checkpoint_it_begins_with_the_weights(shards, world, tmp_path, caplog):
    run = tmp_path / "run"
    without = config(shards, run, decay=0.0, max_nonfinite=9)
    without.training.max_steps = 1
    without.optimizer.end_factor = 1.0
    without.optimizer.warmup_fraction = 0.0
    without.training.evaluate_every = 0
    train(without, world)
    assert not (checkpoint(run, 1) / "ema.safetensors").exists()
    assert "ema" not in read_meta(checkpoint(run, 1)).values
    assert load_weights(run).average is None
    with_average = replace(without, training=replace(without.training, ema_decay=0.9999))
    trainer = Trainer(with_average, world)
    trainer.close()
    weights = trainer.engine.full_state()
    state = trainer.average.state(weights)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert trainer.average.info == Average(0.9999, 0)
    begins = [r for r in caplog.records if "it begins with its weights" in r.getMessage()]
    assert len(begins) == 1
    assert "training.ema_decay 0.0 -> 0.9999" in caplog.text


def test_frozen_parameters_are_the_weights_themselves(shards, world, tmp_path, monkeypatch):
    build = trainer_module._build_detector

    def frozen(*args):
        detector = build(*args)
        for parameter in detector.backbone.parameters():
            parameter.requires_grad_(False)
        return detector

    monkeypatch.setattr(trainer_module, "_build_detector", frozen)
    trainer = Trainer(config(shards, tmp_path / "run"), world)
    batches = trainer.loader.batches(0)
    for _ in range(2):
        trainer.micro_batch(next(batches))
    batches.close()
    trainer.close()
    (pair,) = trainer.average.trained
    trained = [p for p in trainer.engine.module.parameters() if p.requires_grad]
    assert pair.average.numel() == sum(p.numel() for p in trained)
    weights = trainer.engine.full_state()
    state = trainer.average.state(weights)
    differs = {name for name, tensor in weights.items() if not torch.equal(state[name], tensor)}
    assert "yolox_head.cls_preds.0.weight" in differs
    for name, parameter in trainer.engine.module.named_parameters():
        assert parameter.requires_grad or name not in differs, name


def test_in_bf16_it_averages_the_float32_weights(shards, world, tmp_path):
    trainer = Trainer(config(shards, tmp_path / "run", precision="bf16"), world)
    trainer.close()
    assert trainer.engine.dtype == torch.bfloat16
    ((source, average),) = trainer.average.trained
    assert isinstance(trainer.engine, PlainEngine)
    assert source is trainer.engine.weights.master
    assert average.dtype == torch.float32
    assert all(pair.average.dtype == torch.float32 for pair in trainer.average.buffers)


def test_the_average_is_what_is_evaluated_and_used(run):
    raw = load_weights(run, raw=True)
    average = load_weights(run)
    assert raw.kind == "raw"
    assert average.kind == "ema (decay 0.2, 4 updates)"
    files = {
        raw_only: weights_file(checkpoint(run, 4), raw=raw_only).name for raw_only in (True, False)
    }
    assert files == {True: "weights.safetensors", False: "ema.safetensors"}
    for kind, path in {
        "ema": find_weights(run / "checkpoints" / "best").file,
        "raw": checkpoint(run, 4) / "weights.safetensors",
    }.items():
        assert load_weights(path).kind.startswith(kind)
    for path in (run / "evaluation" / "metrics.json", checkpoint(run, 4) / "metrics.json"):
        assert json.loads(path.read_text())["weights"] == "ema (decay 0.2, 4 updates)"


def detections_in(folder):
    """Of the only recording."""
    (path,) = folder.glob("*_bbox.npy")
    return np.load(path)


def test_evaluate_takes_either(run, shards, world, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(world_module, "open_world", lambda config: nullcontext(world))
    metrics = {}
    detections = {}
    for kind in WeightsKind:
        evaluate = EvaluateConfig(
            checkpoint=str(run),
            dataset=DatasetConfig(root=str(shards)),
            evaluation=evaluation_config(),
            weights=kind,
        )
        evaluate_rank(evaluate)
        path = evaluation_output(evaluate) / "metrics.json"
        metrics[path.parent.name] = json.loads(path.read_text())
        detections[kind] = detections_in(path.parent)
    assert metrics.keys() == {"evaluation-val", "evaluation-val-raw"}
    average, raw = metrics.values()
    assert "weights: ema (decay 0.2, 4 updates)" in caplog.text
    assert raw["weights"] == "raw"
    # The training has evaluated the same weights.
    trained = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert average["ap"] == trained["ap"]
    average_detections = detections[WeightsKind.ema]
    assert len(average_detections) > 0
    assert np.array_equal(average_detections, detections_in(run / "evaluation"))
    assert not np.array_equal(average_detections, detections[WeightsKind.raw])
    assert average["config_hash"] == raw["config_hash"] == trained["config_hash"]


@pytest.mark.parametrize("file", ["ema.safetensors", "weights.safetensors"])
def test_each_is_checked_where_it_is_used(run, tmp_path, file):
    continued(run, tmp_path, 3)
    continued(run, tmp_path, 4)
    path = checkpoint(tmp_path, 4) / file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    is_raw = file == "weights.safetensors"
    assert load_weights(tmp_path, raw=is_raw).step == 3
    assert load_weights(tmp_path, raw=not is_raw).step == 4
    with pytest.raises(DamagedError, match=file):
        load_weights(checkpoint(tmp_path, 4), raw=is_raw)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ConfigError, match=rf"training.ema_decay is {decay}"):
        TrainingConfig(ema_decay=decay)
