"""Runs that end before `training.max_steps`: by epochs, hours, or an AP that no longer rises."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EngineKind,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.launch.sweep.state import State, infer_state
from evspan.pipeline.checkpoint_files import METRICS, read_meta, read_with_checksum
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.engine import limits as limits_module
from evspan.pipeline.engine import trainer as trainer_module
from evspan.pipeline.engine.evaluator import evaluate_weights, evaluation_id, limit_recordings
from evspan.pipeline.engine.limits import RunLimits, total_steps
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.history import read
from evspan.pipeline.metrics_log import read_metrics
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards
from support.training_runs import train as train_command

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 17  # of the training split
PER_STEP = 4  # frames: 2 lanes of 2


@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    splits = {"train": [9, 8], "val": [3, 2, 3, 2, 2]}
    return write_small_shards(tmp_path_factory.mktemp("data"), splits)


def config(shards, run_dir, *, evaluation=None, end_factor=1e-4, **training):
    values = {"max_steps": 10, "evaluate_every": 0, "log_every": 1, **training}
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            fpn=FpnConfig(enable_small_object_attention=False),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            batch_size=2,
            sequence_length=2,
            engine=EngineKind.plain,
            log_images_every=0,
            num_workers=0,
            **values,
        ),
        optimizer=OptimizerConfig(lr=1e-3, end_factor=end_factor),
        checkpoint=CheckpointConfig(every=100, keep=9),
        evaluation=EvaluationConfig(**{"skip_first_ms": 0, **(evaluation or {})}),
    )


def train(config, world, *, until=None, each_step=lambda: None):
    """Learning rates by step. until: ends as on a stop signal, before this step is evaluated."""
    rates = {}

    def on_step(report):
        rates[report.step] = report.learning_rate
        each_step()
        if report.step == until:
            trainer.end_after_step()

    trainer = Trainer(config, world, on_step=on_step)
    try:
        trainer.run(StopFlag())
    except SystemExit:
        assert until is not None
    finally:
        trainer.close()
    return rates


def last_event(run):
    event = read(Path(run))[-1]
    return event["event"], event["step"], event.get("reason", "")


def evaluated_steps(run):
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in run.rglob("step-*/metrics.json")
    )


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "steps"),
    [(0, 7, 7), (1, 99, 5), (2, 99, 9), (0.5, 99, 3), (2, 8, 8), (0.001, 99, 1)],
)
def test_an_epoch_is_the_frames_of_the_split(max_epochs, max_steps, steps):
    training = TrainingConfig(
        max_steps=max_steps, max_epochs=max_epochs, batch_size=2, sequence_length=2
    )
    assert total_steps(training, FRAMES) == steps
    twice = replace(training, gradient_accumulation_steps=2)
    assert total_steps(twice, 2 * FRAMES) == steps


@pytest.mark.slow
def test_epochs_end_the_run_and_its_schedule(shards, world, tmp_path):
    run = tmp_path / "epochs"
    one_epoch = config(shards, run, max_steps=99, max_epochs=1.0)
    rates = train(one_epoch, world)
    assert rates == train(config(shards, tmp_path / "steps", max_steps=5), world)
    assert last_event(run) == ("done", 5, "")
    assert evaluated_steps(run) == [5]
    assert read(run)[0]["of"] == 5
    meta = read_meta(run / "checkpoints" / "step-00000005").values
    assert meta["config"]["training"]["max_steps"] == 99
    # The same command again: there is nothing to do.
    assert train(one_epoch, world) == {}
    assert last_event(run) == ("done", 5, "")
    with pytest.raises(UserError, match=r"training.max_epochs=1.0, this run has 2.0"):
        Trainer(config(shards, run, max_steps=99, max_epochs=2.0), world)
    # Of the same steps by the other key.
    assert train(config(shards, run, max_steps=5), world) == {}


@pytest.mark.slow
def test_epochs_may_be_added_where_the_schedule_allows(shards, world, tmp_path, caplog):
    run = tmp_path / "run"
    train(config(shards, run, max_epochs=1, end_factor=1.0), world)
    longer = config(shards, run, max_epochs=1.5, end_factor=1.0)
    assert sorted(train(longer, world)) == [6, 7]
    assert train(longer, world) == {}
    overrides = "training.max_steps=14 training.max_epochs=3"
    assert f"to train on: run_dir={run} {overrides}\n" in caplog.text


@pytest.fixture
def aps(monkeypatch):
    """The APs of the next evaluations; the rest of an evaluation is as it is."""
    values: list[float | None] = []

    def evaluate(*args, **kwargs):
        evaluation = evaluate_weights(*args, **kwargs)
        return evaluation._replace(metrics=replace(evaluation.metrics, ap=values.pop(0)))

    monkeypatch.setattr(trainer_module, "evaluate_weights", evaluate)
    return values


REASON = "no better AP in 3 evaluations (training.patience)"


@pytest.mark.slow
def test_an_ap_that_does_not_rise_ends_the_run(shards, world, tmp_path, aps, caplog):
    aps += [0.1, 0.3, 0.2, 0.3, None]
    run = tmp_path / "run"
    rates = train(config(shards, run, evaluate_every=1, patience=3), world)
    assert sorted(rates) == [1, 2, 3, 4, 5]
    assert not aps
    assert last_event(run) == ("done", 5, REASON)
    assert f"ends at step 5 of 10: {REASON}" in caplog.text
    assert infer_state(read(run), "", None, queue_read=False) == (State.done, REASON)
    # The same command again.
    assert train(config(shards, run, evaluate_every=1, patience=3), world) == {}
    assert last_event(run) == ("done", 5, REASON)
    assert f"to train on: run_dir={run} training.patience=6\n" in caplog.text
    # More patience continues it.
    aps += [0.1, 0.2]
    rates = train(config(shards, run, evaluate_every=1, patience=5), world)
    assert sorted(rates) == [6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    "until", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_patience_is_counted_over_attempts(shards, world, tmp_path, aps, until):
    """Stopped before the evaluation of a step, which the next attempt does."""
    aps += [0.1, 0.3, 0.2, 0.3, 0.1]
    run = tmp_path / "run"
    patient = config(shards, run, evaluate_every=1, patience=3)
    train(patient, world, until=until)
    assert last_event(run)[:2] == ("saved", until)
    train(patient, world)
    assert last_event(run) == ("done", 5, REASON)
    assert not aps


def test_the_count_begins_again_with_another_evaluation():
    training = TrainingConfig(patience=3)
    first = RunLimits(training, FRAMES)
    first.evaluated(0.6, "two recordings")
    first.evaluated(0.5, "two recordings")
    again = RunLimits(training, FRAMES)
    again.resume(first.to_json(), {})
    for ap in (0.3, 0.4, 0.5, 0.45, 0.44):
        again.evaluated(ap, "all recordings")
        assert not again.is_last(1)
    again.evaluated(0.43, "all recordings")
    assert again.reason == REASON


def test_a_count_of_an_earlier_version_goes_on():
    limits = RunLimits(TrainingConfig(patience=3), FRAMES)
    limits.resume({"best_ap": 0.6, "without_better": 2, "frames": FRAMES}, {})
    limits.evaluated(0.5, "all recordings")
    assert limits.reason == REASON


@pytest.mark.slow
def test_a_run_that_continues_with_another_evaluation_has_its_own_best(
    shards, world, tmp_path, aps
):
    aps += [0.6, 0.3, 0.4]
    run = tmp_path / "run"
    few = config(
        shards, run, evaluate_every=1, patience=1, evaluation={"limit_recordings": 2}, max_steps=9
    )
    few.checkpoint.keep = 1
    train(few, world, until=2)
    best = run / "checkpoints" / "best"
    assert best.read_text() == "step-00000001\n"
    more = config(shards, run, evaluate_every=1, patience=1, max_steps=9)
    more.checkpoint.keep = 1
    train(more, world, until=4)
    assert last_event(run)[:2] == ("saved", 4)
    assert best.read_text() == "step-00000003\n"
    metrics, _ = read_with_checksum(run / "checkpoints" / "step-00000003", METRICS)
    assert metrics["evaluation_id"] == metrics["limits"]["evaluation_id"]


def test_an_evaluation_is_known_by_what_its_ap_depends_on():
    plain = EvaluationConfig(min_side=0, min_diagonal=0)
    same = [
        replace(plain, batch_size=2, time_bins_s=[1.0], still_s=2.0),
        replace(plain, at_end=False, write_detections=False, confusion_threshold=0.5),
    ]
    other = [
        replace(plain, split="test"),
        replace(plain, limit_recordings=2),
        replace(plain, min_side=10),
        replace(plain, nms_threshold=0.5),
    ]
    own = evaluation_id(plain, "a")
    assert {evaluation_id(config, "a") for config in same} == {own}
    ids = [evaluation_id(config, "a") for config in other]
    assert len({own, evaluation_id(plain, "b"), *ids}) == 2 + len(other)


@pytest.mark.slow
def test_hours_are_counted_over_attempts(shards, world, tmp_path, monkeypatch, caplog):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(limits_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def twenty_minutes():
        clock.now += 1200

    run = tmp_path / "run"
    two_hours = config(shards, run, max_hours=2, log_every=100)
    assert sorted(train(two_hours, world, until=2, each_step=twenty_minutes)) == [1, 2]
    clock.now += 10**6  # between the attempts
    # Step 7 is the first one that begins after six times twenty minutes.
    rates = train(two_hours, world, each_step=twenty_minutes)
    assert sorted(rates) == [3, 4, 5, 6, 7]
    assert last_event(run) == ("done", 7, "training.max_hours=2 have passed")
    assert evaluated_steps(run) == [7]
    steps = [record["step"] for record in read_metrics(run) if record["kind"] == "train"]
    assert steps[-1] == 7  # the last step has its line, whatever ends the run
    assert train(two_hours, world) == {}
    assert last_event(run) == ("done", 7, "training.max_hours=2 have passed")
    assert f"to train on: run_dir={run} training.max_hours=4.67\n" in caplog.text


def test_a_run_that_another_rank_ended_by_time_stays_ended(monkeypatch):
    """The other rank's clock is ahead of this one's, which is saved."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(limits_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(limits_module, "any_rank", lambda value, device, name: True)
    one_hour = TrainingConfig(max_hours=1)
    ended = RunLimits(one_hour, FRAMES)
    clock.now = 3599.9
    ended.check_time(torch.device("cpu"))
    assert ended.is_last(1)
    resumed = RunLimits(one_hour, FRAMES)
    resumed.resume(ended.to_json(), {})
    assert resumed.is_last(1)


def test_the_last_step_is_evaluated_or_not(shards, world, tmp_path):
    run = tmp_path / "run"
    train(config(shards, run, max_steps=3, evaluate_every=2, evaluation={"at_end": False}), world)
    assert evaluated_steps(run) == [2]
    assert last_event(run) == ("done", 3, "")
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize(
    ("limit", "places"),
    [(0, [0, 1, 2, 3, 4]), (1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (9, [*range(5)])],
)
def test_recordings_are_chosen_evenly(shards, limit, places):
    data = open_dataset(DatasetConfig(root=str(shards)), "val")
    chosen = limit_recordings(data, EvaluationConfig(limit_recordings=limit))
    assert [r.name for r in chosen.recordings] == [data.recordings[i].name for i in places]


def test_metrics_name_the_recordings(shards, world, tmp_path, caplog):
    run = tmp_path / "run"
    train(config(shards, run, max_steps=1, evaluation={"limit_recordings": 2}), world)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    names = [r.name for r in open_dataset(DatasetConfig(root=str(shards)), "val").recordings]
    assert metrics["recordings"] == [names[0], names[2]]
    assert metrics["protocol"]["limit_recordings"] == 2
    written = {path.name for path in (run / "evaluation").glob("*_bbox.npy")}
    assert written == {f"{name}_bbox.npy" for name in metrics["recordings"]}
    assert "evaluates 2 of 5 recordings of val (evaluation.limit_recordings)" in caplog.text


@pytest.mark.slow
def test_two_ranks_end_together(shards, tmp_path):
    run = tmp_path / "run"
    output = train_command(
        shards,
        run,
        "parallel.ranks=2",
        "training.engine=plain",
        "training.max_hours=0.00001",
        "training.evaluate_every=4",
    )
    assert "ends at step 1 of 6: training.max_hours=1e-05 have passed" in output
    assert last_event(run) == ("done", 1, "training.max_hours=1e-05 have passed")
    assert evaluated_steps(run) == [1]


@pytest.mark.parametrize(
    ("schema", "key"),
    [
        (TrainingConfig, "max_epochs"),
        (TrainingConfig, "max_hours"),
        (TrainingConfig, "patience"),
        (EvaluationConfig, "limit_recordings"),
    ],
)
def test_negative_limits_are_refused(schema, key):
    with pytest.raises(ConfigError, match=f"{key} is -1"):
        schema(**{key: -1})
