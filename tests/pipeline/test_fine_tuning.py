"""Frozen parameters and learning-rate multipliers: against torch's AdamW, on every engine, resumed."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from evspan.conf.compose import compose, load_config, save_config
from evspan.conf.errors import ConfigError, UserError
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
from evspan.pipeline.checkpoint_files import FORMAT_VERSION
from evspan.pipeline.engine.adam import parameter_groups
from evspan.pipeline.engine.checkpoints import load_snapshot
from evspan.pipeline.engine.continuation import check_continues, listed_changes
from evspan.pipeline.engine.parameter_patterns import (
    LearningRates,
    check_patterns,
    freeze,
    frozen_names,
)
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.norm import BatchNorm2d
from evspan.pipeline.weights import plain
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")

LANES = 2
FREEZE = ["backbone.stages.[01].*", "fpn.C3_p4.*"]
MULTIPLIERS = {"backbone.*": 0.1, "backbone.stages.3.*": 0.5, "yolox_head.*": 2.0}


@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_shards(tmp_path_factory.mktemp("data"), {"train": [9, 8], "val": [3]})


def model():
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
        fpn=FpnConfig(enable_small_object_attention=True),
        head=HeadConfig(num_classes=3),
    )


def config(data, run_dir, *, engine="plain", stage=0, precision="fp32", **training):
    return TrainConfig(
        run_dir=str(run_dir),
        model=model(),
        dataset=DatasetConfig(root=str(data)),
        training=TrainingConfig(
            **{
                "max_steps": 4,
                "batch_size": LANES,
                "sequence_length": 2,
                "precision": Precision[precision],
                "engine": EngineKind[engine],
                "evaluate_every": 0,
                "log_images_every": 0,
                "num_workers": 0,
                "freeze": FREEZE,
                **training,
            }
        ),
        optimizer=OptimizerConfig(
            lr=1e-3, warmup_fraction=0.2, gate_lr_multiplier=10, lr_multipliers=MULTIPLIERS
        ),
        deepspeed=DeepSpeedConfig(stage=stage),
        checkpoint=CheckpointConfig(every=2, keep=9),
    )


def trained(config, world):
    """The weights before the first step of this attempt."""
    trainer = Trainer(config, world)
    trainer._evaluate = lambda flag: None
    before = trainer.engine.full_state()
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()
        trainer.engine.close()
    return before


def snapshot(run_dir, step):
    loaded = load_snapshot(run_dir / "checkpoints" / f"step-{step:08d}", range(LANES), 0)
    return {**loaded.weights, **loaded.moments}


def rewind(run_dir):
    """Makes step 2 the newest checkpoint; returns the contents of step 4."""
    contents = snapshot(run_dir, 4)
    (run_dir / "checkpoints" / "step-00000004").rename(run_dir / "step-00000004")
    (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
    return contents


def is_frozen(name):
    return name.startswith(("backbone.stages.0.", "backbone.stages.1.", "fpn.C3_p4."))


# -- multipliers --------------------------------------------------------------------------------------
def test_multipliers_are_adamw_with_a_group_per_parameter():
    """Three steps of AdamW with one group per parameter and its own learning rate."""
    detector, expected = Detector(model(), 4), Detector(model(), 4)
    expected.load_state_dict(detector.state_dict())
    settings = OptimizerConfig(
        lr=0.01, weight_decay=0.3, gate_lr_multiplier=10, lr_multipliers=MULTIPLIERS
    )
    freeze(detector, FREEZE)
    ours = torch.optim.AdamW(parameter_groups(detector, settings), lr=1.0)
    groups = []
    for name, parameter in expected.named_parameters():
        rate = 0.01
        if name.startswith("backbone."):
            rate = 0.005 if name.startswith("backbone.stages.3.") else 0.001
        if name.startswith("yolox_head."):
            rate = 0.02
        if name.endswith(".gate"):
            rate *= 10
        decay = 0.3 if parameter.ndim > 1 else 0.0
        if not is_frozen(name):
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    theirs = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in expected.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        pairs = zip(detector.named_parameters(), expected.parameters(), strict=True)
        for (name, parameter), other in pairs:
            gradient = torch.randn(parameter.shape, generator=generator)
            other.grad = gradient
            if not is_frozen(name):
                parameter.grad = gradient
        ours.step()
        theirs.step()
    for (name, parameter), other in zip(
        detector.named_parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(parameter, before[name]) == is_frozen(name)


def test_the_groups_without_patterns_are_those_of_before():
    groups = parameter_groups(Detector(model(), 4), OptimizerConfig())
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert all(group["lr"] == 1e-3 for group in groups)
    assert all(p.ndim >= 2 for p in groups[0]["params"])


def test_the_last_pattern_that_matches_counts():
    names = ["a.b.w", "a.b.gate", "a.c.w", "d"]
    rates = LearningRates(names, {"a.*": 0.5, "*.b.*": 0.1, "?.c.w": 3}, of_gates=2)
    assert [rates.multiplier(name) for name in names] == [0.1, 0.2, 3, 1.0]


def test_the_logged_learning_rate_is_that_without_a_multiplier(data, world, tmp_path):
    run = config(data, tmp_path)
    run.optimizer.lr_multipliers = {"*": 0.25}
    trainer = Trainer(run, world)
    trainer.close()
    engine: Any = trainer.engine
    groups = engine.adam.param_groups
    assert trainer.engine.learning_rate == pytest.approx(1e-3 * 0.05)
    assert {round(group["lr"] / trainer.engine.learning_rate, 6) for group in groups} == {0.25, 2.5}


# -- frozen parameters --------------------------------------------------------------------------------
CASES = [
    ("plain", 0, "fp32"),
    ("plain", 0, "bf16"),
    ("deepspeed", 0, "fp32"),
    ("deepspeed", 0, "bf16"),
    pytest.param("deepspeed", 3, "bf16", marks=pytest.mark.slow),
    pytest.param("deepspeed", 1, "fp32", marks=pytest.mark.slow),
    pytest.param("deepspeed", 2, "bf16", marks=pytest.mark.slow),
    pytest.param("deepspeed", 3, "fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "stage", "precision"), CASES)
def test_frozen_parameters_stay_to_the_last_bit_and_have_no_moments(
    data, world, tmp_path, engine, stage, precision, capsys
):
    run = config(data, tmp_path, engine=engine, stage=stage, precision=precision)
    before = trained(run, world)
    after = snapshot(tmp_path, 4)
    parameters = [name.removeprefix("exp_avg/") for name in after if name.startswith("exp_avg/")]
    assert parameters
    assert not any(map(is_frozen, parameters))
    frozen = [name for name in before if is_frozen(name)]
    assert len(frozen) > 90
    for name, tensor in before.items():
        if is_frozen(name):  # the float32 values, in bf16 too, and the norms' statistics
            assert torch.equal(after[name], tensor), name
    changed = [name for name in parameters if not torch.equal(after[name], before[name])]
    assert len(changed) > 0.9 * len(parameters)
    assert f"frozen: 77 of 320 tensors, 0.02 of 0.30 M parameters: {', '.join(FREEZE)}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("engine", ["plain", pytest.param("deepspeed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resume_continues_to_the_last_bit(data, world, tmp_path, engine, precision):
    run = config(
        data,
        tmp_path,
        engine=engine,
        stage=2 if engine == "deepspeed" else 0,
        precision=precision,
        gradient_accumulation_steps=2,
    )
    trained(run, world)
    whole = rewind(tmp_path)
    trained(run, world)
    resumed = snapshot(tmp_path, 4)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.slow
def test_another_engine_and_stage_continue_a_frozen_run(data, world, tmp_path):
    run = config(data, tmp_path, precision="bf16")
    trained(run, world)
    whole = rewind(tmp_path)
    other = config(data, tmp_path, engine="deepspeed", stage=3, precision="bf16")
    trained(other, world)
    resumed = snapshot(tmp_path, 4)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        if is_frozen(name):
            assert torch.equal(resumed[name], tensor)
        else:
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_nothing_flows_back_into_a_frozen_bottom():
    detector = Detector(model(), 4)
    freeze(detector, ["backbone.stages.[012].*"])
    state = detector.initial_state(1, 32, 32)
    frames = torch.randint(0, 5, (2, 1, 4, 32, 32), dtype=torch.uint8)
    features, _ = detector.backbone(frames, state.stages, detector.exchange)
    assert [feature.requires_grad for feature in features] == [False, False, False, True]
    raw, _ = detector(frames, state)
    raw.sum().backward()
    with_gradient = {name for name, p in detector.named_parameters() if p.grad is not None}
    assert not any(name.startswith("backbone.stages.2.") for name in with_gradient)
    assert any(name.startswith("backbone.stages.3.") for name in with_gradient)


def test_a_batch_norm_whose_parameters_are_frozen_keeps_its_statistics():
    detector = Detector(model(), 4)
    norms = sum(isinstance(module, BatchNorm2d) for module in detector.fpn.modules())
    frozen = freeze(detector, ["fpn.*", "yolox_head.stems.0.bn.weight"])
    assert f"BatchNorms that keep their statistics: {norms}" in frozen.summary()
    detector.train()
    state = {name: buffer.clone() for name, buffer in detector.named_buffers()}
    frames = torch.randint(0, 5, (2, 1, 4, 32, 32), dtype=torch.uint8)
    detector(frames, detector.initial_state(1, 32, 32))
    for name, buffer in detector.named_buffers():
        # With its bias, the stem's norm is still trained.
        assert torch.equal(buffer, state[name]) == name.startswith("fpn."), name


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_that_is_frozen(data, world, tmp_path):
    trainer = Trainer(config(data, tmp_path, engine="deepspeed", stage=1), world)
    batches = trainer.loader.batches(0)
    before = trainer.engine.full_state()
    with torch.no_grad():
        trainer.engine.module.yolox_head.obj_preds[0].bias.fill_(float("nan"))
    trainer.micro_batch(next(batches))
    batches.close()
    trainer.close()
    after = trainer.engine.full_state()
    trainer.engine.close()
    assert not trainer.pending.values.read().applied
    assert all(torch.equal(after[name], before[name]) for name in before if is_frozen(name))


# -- refusals -----------------------------------------------------------------------------------------
def test_a_pattern_without_a_match_names_the_nearest(data, tmp_path):
    run = config(data, tmp_path)
    run.training.freeze = ["backbone.stage.0.*"]
    with pytest.raises(UserError, match=r"training.freeze: 'backbone.stage.0.\*' matches") as no:
        check_patterns(run, 4)
    assert "none of the 320 parameters; near it: backbone.stages.0.*" in str(no.value)
    run.training.freeze = ["backbone.*"]
    run.optimizer.lr_multipliers = {"backbone.stages.0.*": 2}
    with pytest.raises(UserError, match="optimizer.lr_multipliers: .* none of the 196 trained"):
        check_patterns(run, 4)


def test_all_frozen_is_refused():
    with pytest.raises(UserError, match=r"freeze=\[a.\*,b\] freezes all 2 parameter tensors"):
        frozen_names(["a.w", "b"], ["a.*", "b"])


def test_a_resume_refuses_other_frozen_parameters_and_lists_other_multipliers(data, tmp_path):
    run = config(data, tmp_path)
    saved = {"form": FORMAT_VERSION, "step": 2, "config": plain(asdict(run))}
    thawed = replace(run, training=replace(run.training, freeze=FREEZE[:1]))
    with pytest.raises(UserError, match="was saved with training.freeze=.*checkpoint.init_from="):
        check_continues(tmp_path, saved, thawed)
    slower = replace(run, optimizer=replace(run.optimizer, lr_multipliers={"fpn.*": 0.5}))
    check_continues(tmp_path, saved, slower)
    (change,) = listed_changes(saved, slower)
    assert change.startswith("optimizer.lr_multipliers ")
    assert change.endswith('-> {"fpn.*": 0.5}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"backbone.*": 0.1}', {"backbone.*": 0.1}),
        ("{'*.gate':10,backbone.*: 0.5}", {"*.gate": 10, "backbone.*": 0.5}),
        ("{backbone.stages.[01].*: 0.1}", {"backbone.stages.[01].*": 0.1}),
        ("{}", {}),
    ],
)
def test_multipliers_on_the_command_line(text, expected, tmp_path):
    words = [f"optimizer.lr_multipliers={text}", "training.freeze=[fpn.*,a.[01].*]"]
    composed = compose(TrainConfig, [*words, "dataset.root=x", "run_dir=y"])
    assert composed.optimizer.lr_multipliers == expected
    assert composed.training.freeze == ["fpn.*", "a.[01].*"]
    save_config(composed, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == composed


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["optimizer.lr_multipliers={a: 0}"], r"training.freeze=\[a\] trains it not at all"),
        (["optimizer.lr_multipliers={a: inf}"], "give a factor above 0"),
        (["training.freeze=['']"], "training.freeze has an empty pattern"),
    ],
)
def test_values_out_of_range_are_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(TrainConfig, [*words, "dataset.root=x", "run_dir=y"])
