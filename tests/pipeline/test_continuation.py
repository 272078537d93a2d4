"""A run continues on its own data, with its own seed, model and batch; other changes are listed.

A run whose newest checkpoint is damaged continues to the same end as one that was not disturbed.
"""

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.errors import UserError
from evspan.conf.schema.layout import BatchNormRanks
from evspan.conf.schema.prep import DatasetConfig, DatasetKind
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EngineKind,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.checkpoint_files import dump_with_checksum, read_meta
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data_digest import data_differences, data_digest
from evspan.pipeline.engine.checkpoints import Checkpoints, load_snapshot
from evspan.pipeline.engine.continuation import (
    EFFECTS,
    Effect,
    check_continues,
    config_keys,
    listed_changes,
)
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.engine.trainer import train as run_train
from evspan.pipeline.history import read
from evspan.pipeline.weights import load_weights
from support.damages import DAMAGES, flip_bit, swap
from support.one_rank import open_one_rank
from support.rvt_tree import write_rvt_tree
from support.small_shards import write_small_shards

STEPS = 4
FOLDER = Path("run/checkpoints/step-00000002")


@pytest.fixture(scope="module")
def world():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_one_rank() as world:
        yield world
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    counts = {"train": [9, 8, 7, 6], "val": [3]}
    return write_small_shards(tmp_path_factory.mktemp("data") / "shards", counts)


def config(shards: Path, run_dir: Path, **optimizer: Any) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            max_steps=STEPS,
            batch_size=2,
            sequence_length=2,
            precision=Precision.fp32,
            engine=EngineKind.plain,
            evaluate_every=0,
            log_images_every=0,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(**{"lr": 1e-3, "warmup_fraction": 0.2, **optimizer}),
        checkpoint=CheckpointConfig(every=2, keep=9),
    )


def train(config: TrainConfig, world) -> dict[int, float]:
    """Learning rates by step."""
    rates = {}
    trainer = Trainer(config, world, on_step=lambda r: rates.update({r.step: r.learning_rate}))
    trainer._evaluate = lambda *_: None
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()
    return rates


@pytest.fixture(scope="module")
def trained(shards, world, tmp_path_factory):
    """A run of 4 steps, its learning rates, and step 2 as its newest checkpoint."""
    run = tmp_path_factory.mktemp("trained") / "run"
    rates = train(config(shards, run), world)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "checkpoints" / "latest").write_text("step-00000002\n")
    return run, rates


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def events(run: Path) -> list[str]:
    return [event["message"] for event in read(run) if event["event"] == "changed"]


# -- damaged checkpoints -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def undisturbed(shards, world, tmp_path_factory):
    """A whole run with a checkpoint, and an AP, at each step."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    every_step = config(shards, run)
    every_step.checkpoint.every = 1
    train(every_step, world)
    checkpoints = Checkpoints(run, rank=0, keep=9)
    for step in (1, 2, 3):
        checkpoints.record(step, {"ap": 0.1 * step})
    return run


def damaged_run(
    undisturbed: Path, run: Path, shards: Path, world, damage: Any, file: str, seed: int = 0
) -> None:
    """Stops after step 3, damages a file of that checkpoint or a pointer, continues to the end."""
    shutil.copytree(undisturbed, run)
    folder = run / "checkpoints"
    shutil.rmtree(folder / "step-00000004")
    (folder / "latest").write_text("step-00000003\n")
    path = folder / file if file in ("latest", "best") else folder / "step-00000003" / file
    damage(path, random.Random(f"{damage.__name__} {file} {seed}"))
    again = config(shards, run)
    again.checkpoint.every = 1
    steps = sorted(train(again, world))
    used = 3 if file in ("latest", "best", "metrics.json") else 2
    assert steps == list(range(used + 1, STEPS + 1))
    (event,) = [event for event in read(run) if event["event"] == "fallback"]
    assert event["step"] == used
    assert file in event["message"]
    expected = load_snapshot(undisturbed / "checkpoints" / "step-00000004", range(2), 0)
    actual = load_snapshot(folder / "step-00000004", range(2), 0)
    for before, after in zip(expected[:2], actual[:2], strict=True):
        assert [
            name for name, tensor in before.items() if not torch.equal(after[name], tensor)
        ] == []
    assert all(map(torch.equal, expected.carry, actual.carry))


@pytest.mark.parametrize(
    ("damage", "file"), [(flip_bit, "moments.safetensors"), (swap, "lanes-0000-0002.safetensors")]
)
def test_a_damaged_run_continues_to_the_same_end(
    undisturbed, shards, world, tmp_path, damage, file
):
    damaged_run(undisturbed, tmp_path / "run", shards, world, damage, file)


@pytest.mark.soak
def test_sixty_damaged_runs_continue_to_the_same_end(undisturbed, shards, world, tmp_path):
    files = [
        "meta.json",
        "weights.safetensors",
        "moments.safetensors",
        "lanes-0000-0002.safetensors",
        "rank-0000.safetensors",
        "metrics.json",
        "latest",
        "best",
    ]
    done = 0
    for damage in DAMAGES:
        for file in files:
            if damage is swap and file == "rank-0000.safetensors":
                continue  # no step draws from the generators: both checkpoints have the same
            run = tmp_path / f"{damage.__name__}-{file}"
            damaged_run(undisturbed, run, shards, world, damage, file)
            done += 1
    for file in files[:5]:
        damaged_run(undisturbed, tmp_path / f"again-{file}", shards, world, flip_bit, file, 1)
        done += 1
    print(f"{done} damaged runs, {done} continued to the last bit, each with one event")


# -- the config --------------------------------------------------------------------------------
def test_the_effect_of_every_key_is_decided():
    """A new key belongs into the table: refused, listed or ignored."""
    assert set(EFFECTS) == set(config_keys(TrainConfig))


def changed(value: Any) -> Any:
    if isinstance(value, list):
        return [*value, 1]
    if isinstance(value, dict):
        return {**value, "1": 0}
    return "other" if isinstance(value, str) or value is None else value + 1


def saved_config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


@pytest.mark.parametrize("key", sorted(EFFECTS))
def test_another_value_is_refused_listed_or_ignored(trained, shards, key):
    run, _ = trained
    saved = saved_config(run)
    *groups, name = key.split(".")
    values = saved
    for group in groups:
        values = values[group]
    values[name] = "bf16" if key == "training.precision" else changed(values[name])
    meta = {"form": 2, "step": 2, "config": saved}
    this_run = config(shards, run)
    if EFFECTS[key] is Effect.refused or key == "training.max_steps":
        with pytest.raises(UserError, match=f"was saved with {key}=") as refused:
            check_continues(FOLDER, meta, this_run)
        assert f"run_dir=NEW checkpoint.init_from={FOLDER}" in str(refused.value)
        return
    check_continues(FOLDER, meta, this_run)
    changes = listed_changes(meta, this_run)
    if EFFECTS[key] is Effect.listed:
        assert len(changes) == 1
        assert changes[0].startswith(f"{key} ")
    else:
        assert changes == []


EXPECTED = {
    Effect.refused: ("seed", "model.backbone.embed_dim", "training.batch_size"),
    Effect.listed: ("optimizer.lr", "evaluation.split", "training.log_every"),
    Effect.ignored: ("training.num_workers", "parallel.device", "parallel.ranks", "dataset.name"),
    Effect.data: ("dataset.root", "dataset.classes"),
}


def test_the_effects_are_those_of_the_design():
    for effect, keys in EXPECTED.items():
        assert [key for key in keys if EFFECTS[key] is not effect] == []


def meta_of(config: TrainConfig, run: Path) -> dict[str, Any]:
    return {"form": 2, "step": 2, "config": saved_config(run)}


def test_the_number_of_ranks_is_listed_where_batch_norm_depends_on_it(trained, shards):
    run, _ = trained
    this_run = config(shards, run)
    this_run.parallel.ranks = 2
    meta = meta_of(this_run, run)
    assert listed_changes(meta, this_run) == []
    this_run.parallel.batch_norm = BatchNormRanks.rank
    assert listed_changes(meta, this_run) == [
        "parallel.ranks 1 -> 2",
        "parallel.batch_norm world -> rank",
    ]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
@pytest.mark.parametrize(
    ("max_steps", "end_factor", "allowed"),
    [(8, 1.0, True), (8, 0.1, False), (3, 1.0, True), (3, 0.1, False), (1, 1.0, False)],
)
def test_another_number_of_steps_needs_a_schedule_that_does_not_depend_on_it(
    trained, shards, schedule, max_steps, end_factor, allowed
):
    run, _ = trained
    this_run = config(shards, run, end_factor=end_factor)
    this_run.optimizer.schedule = type(this_run.optimizer.schedule)[schedule]
    this_run.training.max_steps = max_steps
    meta = meta_of(this_run, run)
    if allowed:
        check_continues(FOLDER, meta, this_run)
        assert f"training.max_steps 4 -> {max_steps}" in listed_changes(meta, this_run)
    else:
        with pytest.raises(UserError, match=f"max_steps=4, this run has {max_steps}"):
            check_continues(FOLDER, meta, this_run)


def test_a_key_that_an_earlier_version_did_not_have_was_its_default(trained, shards):
    run, _ = trained
    saved = saved_config(run)
    del saved["optimizer"]["gate_lr_multiplier"]
    del saved["parallel"]
    meta = {"form": 2, "step": 2, "config": saved}
    assert listed_changes(meta, config(shards, run)) == []
    assert listed_changes(meta, config(shards, run, gate_lr_multiplier=3.0)) == [
        "optimizer.gate_lr_multiplier 1.0 -> 3.0"
    ]


def test_lanes_of_an_earlier_version_began_together(trained, shards):
    run, _ = trained
    saved = saved_config(run)
    del saved["training"]["stagger_lanes"]
    meta = {"form": 2, "step": 2, "config": saved}
    this_run = config(shards, run)
    this_run.training.stagger_lanes = False
    check_continues(FOLDER, meta, this_run)
    this_run.training.stagger_lanes = True
    with pytest.raises(UserError, match="stagger_lanes=false, this run has true"):
        check_continues(FOLDER, meta, this_run)


def test_a_refusal_names_all_keys_in_one_line(trained, shards, world):
    run, _ = trained
    this_run = config(shards, run)
    this_run.seed = 7
    this_run.model.backbone.mlp_ratio = 2
    with pytest.raises(UserError) as refused:
        Trainer(this_run, world)
    assert "seed=0, this run has 7; model.backbone.mlp_ratio=4, this run has 2" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)


def test_another_learning_rate_is_listed_and_takes_effect(trained, run, shards, world, caplog):
    _, before = trained
    with caplog.at_level(logging.INFO, "evspan"):
        rates = train(config(shards, run, lr=1e-2, weight_decay=0.1), world)
    assert sorted(rates) == [3, 4]
    assert rates[3] == pytest.approx(10 * before[3])
    assert rates[4] == pytest.approx(10 * before[4])
    (message,) = events(run)
    assert message.endswith(
        "continues step-00000002 with other settings: optimizer.lr 0.001 -> 0.01, "
        "optimizer.weight_decay 0.0005 -> 0.1"
    )
    assert message in caplog.messages
    meta = read_meta(run / "checkpoints" / "step-00000004")
    assert meta.values["config"]["optimizer"]["lr"] == 1e-2


def test_a_run_that_starts_over_does_so_once(trained, run, shards, world):
    """An attempt that SLURM requeues reads RUN/config.yaml, and continues."""
    over = config(shards, run)
    over.checkpoint.resume = False
    over.checkpoint.keep = 7
    save_config(over, run / CONFIG_FILE)
    assert sorted(train(over, world)) == [1, 2, 3, 4]
    attempt = load_config(TrainConfig, run / CONFIG_FILE)
    assert attempt.checkpoint.resume
    assert attempt.checkpoint.keep == 7
    assert train(attempt, world) == {}
    folders = sorted(path.name for path in (run / "checkpoints").glob("former-*"))
    assert folders == ["former-1"]


JOB = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.fixture
def attempt(run, shards, world, monkeypatch):
    """One attempt of `checkpoint.resume=false`, as of torchrun or srun: without RUN/config.yaml.

    Returns:
        A function of the variables of its launcher and of its last step. It returns the resumed
        step.
    """
    over = config(shards, run)
    over.checkpoint.resume = False
    over.evaluation.at_end = False

    def start(environment, *, until=STEPS):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(Trainer, "_exit_if_stopped", lambda *_: None)
            patch.setattr(
                Trainer,
                "_is_last_step",
                property(lambda trainer: trainer.step >= until),
            )
            run_train(over, world)
        return [event["step"] for event in read(run) if event["event"] == "start"][-1]

    return start


def former(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("former-*"))


@pytest.mark.parametrize(
    ("first", "restarted"),
    [
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1"}),
        (ELASTIC, ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (JOB | ELASTIC, JOB | ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "2"}),
    ],
)
def test_a_job_that_is_started_again_starts_over_once(run, attempt, caplog, first, restarted):
    caplog.set_level(logging.INFO)
    assert attempt(first, until=2) == 0
    assert "started again" not in caplog.text
    assert attempt(restarted) == 2
    assert "an earlier attempt of this job has started over" in caplog.text
    assert former(run) == ["former-1"]


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        (JOB, False),  # the same step, not requeued
        (JOB | {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, True),
        (JOB | {"SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "1"}, True),
        (JOB | ELASTIC | {"TORCHELASTIC_RESTART_COUNT": "1"}, True),  # by a torchrun of its own
        ({}, False),
    ],
)
def test_a_job_without_a_checkpoint_of_its_own_starts_over(
    run, attempt, caplog, environment, warns
):
    attempt(JOB, until=2)
    assert attempt(environment, until=1) == 0
    assert former(run) == ["former-1", "former-2"]
    warning = "none of the 1 checkpoints names it, so checkpoint.resume=false starts over"
    assert (warning in caplog.text) is warns


# -- the data ----------------------------------------------------------------------------------
def moved_shards(shards: Path, tmp_path: Path, edit: Any = None) -> Path:
    """A copy of the shards; edit: of the manifest's values, in place."""
    root = tmp_path / "moved"
    shutil.copytree(shards, root)
    if edit is not None:
        manifest = json.loads((root / "manifest.json").read_text())
        edit(manifest)
        text = json.dumps(manifest["config"], sort_keys=True)
        manifest["config_hash"] = xxhash.xxh3_64_hexdigest(text.encode())
        (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def other_window(manifest: dict[str, Any]) -> None:
    manifest["config"]["frames"]["window_ms"] = 25


def half_of_the_recordings(manifest: dict[str, Any]) -> None:
    del manifest["recordings"][2:4]


def other_order(manifest: dict[str, Any]) -> None:
    manifest["recordings"][:2] = manifest["recordings"][1::-1]


def other_classes(manifest: dict[str, Any]) -> None:
    manifest["classes"] = ["ball", "bar", "box"]
    if "dataset" in manifest["config"]:
        manifest["config"]["dataset"]["classes"] = manifest["classes"]


@pytest.mark.parametrize(
    ("edit", "difference"),
    [
        (other_window, "frames.window_ms was 50, is 25"),
        (half_of_the_recordings, r"2 of 4 recordings are missing \(train_002, train_003\)"),
        (other_order, "the recordings are in another order"),
        (other_classes, r"classes was \['ball', 'box', 'bar'\], is \['ball', 'bar', 'box'\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_data_is_refused(run, shards, world, tmp_path, edit, difference):
    root = moved_shards(shards, tmp_path, edit)
    with pytest.raises(UserError, match=difference) as refused:
        Trainer(config(root, run), world)
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith(f"checkpoint.init_from={run / 'checkpoints' / 'step-00000002'}")
    assert events(run) == []


@pytest.mark.parametrize(
    ("train_frames", "seed", "difference"),
    [
        (
            [9, 8, 7, 6],
            1,
            r"4 of 4 recordings are changed \(train_000, train_001, train_002, ...\)",
        ),
        ([9, 8, 7, 6, 5], 0, r"1 recording is new \(train_004\)"),
        ([9, 8, 7, 5], 0, r"1 of 4 recordings is changed \(train_003\)"),
    ],
)
def test_other_recordings_are_refused(run, world, tmp_path, train_frames, seed, difference):
    counts = {"train": train_frames, "val": [3]}
    root = write_small_shards(tmp_path / "other", counts, seed)
    with pytest.raises(UserError, match=difference):
        Trainer(config(root, run), world)


def test_the_same_data_elsewhere_continues_silently(run, shards, world, tmp_path, caplog):
    root = moved_shards(shards, tmp_path)
    assert sorted(train(config(root, run), world)) == [3, 4]
    assert events(run) == []
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_other_recordings_for_the_evaluation_are_listed(run, shards, world, tmp_path):
    root = moved_shards(shards, tmp_path, lambda m: m["recordings"][4].update(name="other"))
    Trainer(config(root, run), world).close()
    (message,) = events(run)
    assert message.endswith("other settings: the recordings of evaluation.split=val")


def without_digest(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002" / "meta.json"
    values = read_meta(path.parent).values
    del values["data"]
    path.write_bytes(dump_with_checksum(values))


def test_a_checkpoint_of_an_earlier_version_is_compared_as_far_as_it_goes(
    run, shards, world, tmp_path, caplog
):
    without_digest(run)
    with pytest.raises(UserError, match="frames.window_ms was 50, is 25"):
        Trainer(config(moved_shards(shards, tmp_path, other_window), run), world)
    assert sorted(train(config(shards, run), world)) == [3, 4]
    assert "has no digest of its data" in caplog.text


def test_a_fine_tuning_starts_on_other_data(run, shards, world, tmp_path):
    """The remedy of the refusals."""
    root = moved_shards(shards, tmp_path, other_window)
    this_run = config(root, tmp_path / "new")
    checkpoint = replace(this_run.checkpoint, init_from=str(run))
    trainer = Trainer(replace(this_run, checkpoint=checkpoint), world)
    trainer.close()
    expected = load_weights(run).tensors
    actual = trainer.engine.full_state()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert trainer._weights().frames.window_ms == 25


def test_trees_of_rvt_are_compared_by_their_files(tmp_path):
    def digest(root: Path) -> dict[str, Any]:
        config = DatasetConfig(root=str(root), kind=DatasetKind.rvt_tree, classes=["a", "b", "c"])
        return data_digest(open_dataset(config, "train"), config, "val")

    tree = write_rvt_tree(tmp_path / "tree", {"a": 9, "b": 5, "c": 4})
    whole = digest(tree)
    assert [name_and_frames[:2] for name_and_frames in whole["recordings"]] == [
        ["a", 9],
        ["b", 5],
        ["c", 4],
    ]
    shutil.copytree(tree, tmp_path / "moved")
    assert data_differences(whole, digest(tmp_path / "moved")) == []
    shutil.rmtree(tree / "train" / "c")
    labels = tree / "train" / "b" / "labels_v2" / "labels.npz"
    with np.load(labels) as stored:
        arrays = dict(stored)
    arrays["labels"]["x"][0] += 1
    np.savez(labels, **arrays)
    assert data_differences(whole, digest(tree)) == [
        "1 of 3 recordings is missing (c)",
        "1 of 3 recordings is changed (b)",
    ]
