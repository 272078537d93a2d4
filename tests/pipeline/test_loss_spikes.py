"""Loss spikes: the rule against its definition, what is recorded, resumed runs, `status` and `report`."""

import json
import math
import re

import numpy as np
import pytest
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.launch.sweep.spikes import LaneRead, read_spikes, spike_lines
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data.sampling import sampling_plan
from evspan.pipeline.engine import loss_spikes
from evspan.pipeline.engine.loss_spikes import LossSpikes, LossWindow
from evspan.pipeline.engine.trainer import Trainer, train
from evspan.pipeline.history import append, read
from evspan.pipeline.metrics_log import read_metrics
from support.one_rank import open_one_rank

SHARD_FRAMES = {"train": [23, 12, 9], "val": [12]}
LANES, FRAMES, STEPS = 2, 4, 9


def spikes_by_definition(losses: list[float], steps: int, sigmas: float) -> dict[int, float]:
    """Index of each spike -> standard deviations above the mean of the `steps` losses before it."""
    found = {}
    for i, loss in enumerate(losses):
        before = losses[max(0, i - steps) : i]
        if len(before) < steps:
            continue
        mean = sum(before) / steps
        sigma = math.sqrt(sum((value - mean) ** 2 for value in before) / steps)
        if loss > mean + sigmas * sigma:
            found[i] = (loss - mean) / sigma
    return found


def test_spikes_are_those_of_the_definition():
    rng = np.random.default_rng(3)
    losses = (5 * np.exp(-np.arange(600) / 200) + rng.normal(0, 0.1, 600)).tolist()
    for index in (40, 200, 201, 330, 599):  # the first one is before the window is full
        losses[index] += 4
    window = LossWindow(128, 6)
    found = {}
    for i, loss in enumerate(losses):
        deviation = window.add(loss)
        if deviation is not None:
            found[i] = deviation.sigmas
    expected = spikes_by_definition(losses, 128, 6)
    assert [*found] == [*expected] == [200, 330, 599]  # 201 is not: 200 is among those before it
    assert found == pytest.approx(expected)


def test_losses_that_are_equal_or_not_finite_are_not_compared():
    window = LossWindow(4, 6)
    assert [window.add(2.0) for _ in range(5)] == [None] * 5
    assert window.add(3.0) is None  # no spread to compare with
    assert window.add(math.inf) is None
    assert window.add(math.nan) is None
    assert list(window.losses) == [2.0, 2.0, 2.0, 3.0]
    assert LossWindow(2, 0).add(1.0) is None


# -- what is recorded --------------------------------------------------------------------------------
def config_of(shards, run_dir, **training) -> TrainConfig:
    options = {
        "max_steps": STEPS,
        "batch_size": LANES,
        "sequence_length": FRAMES,
        "num_workers": 0,
        "log_every": 1,
        "evaluate_every": 0,
        "log_images_every": 0,
        **training,
    }
    config = TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=16, dim_head=8),
            fpn=FpnConfig(depth=0.33),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(**options),
        checkpoint=CheckpointConfig(every=3, keep=9),
    )
    config.evaluation.at_end = False
    return config


def open_spikes(shards, run_dir, **training) -> tuple[LossSpikes, TrainConfig]:
    config = config_of(shards, run_dir, **training)
    data = open_dataset(config.dataset, "train")
    plan = sampling_plan(data, config.training, seed=config.seed)
    return LossSpikes(run_dir, config.training, plan, data, enabled=True), config


def test_the_batch_of_a_spike_is_that_of_its_micro_batch(shards, tmp_path):
    spikes, config = open_spikes(
        shards, tmp_path, spike_window=4, gradient_accumulation_steps=3, batch_size=4
    )
    for step, loss in enumerate((1.0, 1.1, 1.0, 1.1), 1):
        spikes.add(step, [loss] * 3)
    spikes.add(5, [1.0, 9.0, 1.0])
    spikes.add(6, [1.0, 1.0, math.nan])
    first, second = read(tmp_path)
    assert (first["event"], first["step"], first["micro_batch"]) == ("spike", 5, 2)
    assert first["loss"] == pytest.approx(11 / 3)
    assert (second["step"], second["micro_batch"], second["loss"]) == (6, 3, None)
    assert "sigmas" not in second
    data = open_dataset(config.dataset, "train")
    plan = sampling_plan(data, config.training, seed=config.seed)
    for event, index in ((first, 4 * 3 + 1), (second, 5 * 3 + 2)):
        assert [lane["lane"] for lane in event["batch"]] == [0, 1, 2, 3]
        for lane in event["batch"]:
            chunk = plan.chunk(lane["lane"], index)
            recording = data.recordings[chunk.recording]
            assert (lane["recording"], lane["frame"]) == (recording.name, chunk.first)
            assert lane["file"] == str(next(shards.glob("train/*.h5")))


def test_a_run_that_only_spikes_does_not_fill_its_history(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loss_spikes, "MOST_SPIKES", 3)
    spikes, _ = open_spikes(shards, tmp_path)
    for step in range(1, 9):
        spikes.add(step, [math.inf])
    assert [event["step"] for event in read(tmp_path)] == [1, 2, 3]
    assert caplog.text.count("not finite") == 3
    assert caplog.text.count("are not recorded") == 1


def test_a_history_that_cannot_be_written_does_not_end_the_run(shards, tmp_path, caplog):
    (tmp_path / "history.jsonl").mkdir()
    spikes, _ = open_spikes(shards, tmp_path, spike_window=2)
    spikes.resume(["x", math.inf, 1.0, None, 2])
    assert spikes.state() == [1.0, 2.0]
    spikes.add(1, [math.inf])
    spikes.add(2, [math.inf])
    assert caplog.text.count("could not be written; the run goes on") == 1
    assert caplog.text.count("loss is not finite") == 2


def recorded(run_dir) -> dict[int, tuple]:
    return {spike.step: spike[1:] for spike in read_spikes(read(run_dir))}


@pytest.mark.slow
def test_a_resumed_run_records_the_spikes_of_the_uninterrupted_one(shards, tmp_path):
    """Of losses that rise and fall: with a low limit, each rise is a spike."""
    options = {"spike_window": 3, "spike_sigmas": 0.2}
    config = config_of(shards, tmp_path / "whole", **options)
    with open_one_rank() as world:
        train(config, world)
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole")]
    expected = spikes_by_definition(losses, 3, 0.2)
    whole = recorded(tmp_path / "whole")
    assert [*whole] == [index + 1 for index in expected]
    assert len(whole) >= 2

    class KilledError(Exception):
        pass

    def kill(report) -> None:
        if report.step == 5:
            raise KilledError

    config = config_of(shards, tmp_path / "parts", **options)
    with open_one_rank() as world:
        trainer = Trainer(config, world, on_step=kill)
        with pytest.raises(KilledError):
            trainer.run(trainer.stop_flag)
        trainer.close()
    with open_one_rank() as world:
        train(config, world)  # from step 3
    assert recorded(tmp_path / "parts") == whole


# -- status and report -------------------------------------------------------------------------------
def spike_event(step: int, **values) -> dict:
    lane = {"lane": 0, "recording": "a", "file": "a.h5", "frame": 5 * step, "frames": 5}
    values = {"loss": 40.0, "mean": 3.0, "sigma": 1.0, "sigmas": 37.0, "batch": [lane], **values}
    return {"event": "spike", "time": 1.0, "step": step, "micro_batch": 1, **values}


def test_a_repeated_step_counts_once():
    events = [spike_event(9), spike_event(7), spike_event(9, loss=41.0)]
    assert [(spike.step, spike.loss) for spike in read_spikes(events)] == [(7, 40.0), (9, 41.0)]


def test_damaged_events_do_no_harm():
    events = [
        {"event": "spike", "time": 1.0},
        spike_event(3, loss="much", batch=[{"lane": True, "recording": "\x1b[2J"}, 5], sigmas=None),
        spike_event(4, batch={"lane": 1}),
    ]
    first, second = read_spikes(events)
    assert first.batch == [LaneRead(0, "\\x1b[2J", "", 0, 0)]
    assert "not finite" in first.describe()
    assert second.batch == []


def test_the_last_spikes_are_listed():
    lines = spike_lines(read_spikes([spike_event(step) for step in range(1, 9)]))
    assert lines[0] == "3 earlier loss spikes; --json lists all"
    assert lines[1:] == [
        f"loss spike in step {step}: 40, 37.0 sigma above the mean 3; "
        f"lane 0: a (a.h5) from frame {5 * step}"
        for step in range(4, 9)
    ]


def test_status_and_report_show_the_spikes(tmp_path, monkeypatch, capsys):
    from evspan.launch.cli import report, status

    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "run"
    append(run, "start", step=0, of=100, attempt=1, host="n1", pid=1, job="")
    append(run, "running", step=1, seconds=2.0)
    event = spike_event(7)
    append(run, event.pop("event"), **{k: v for k, v in event.items() if k != "time"})
    (run / "progress.json").write_text(
        json.dumps({"time": 2.0, "step": 8, "of": 100, "frames_per_s": 12.34, "mfu": 0.1234})
    )
    status.main([str(run)])
    output = capsys.readouterr().out
    assert re.search(r"frames/s +MFU", output)
    assert re.search(r"12\.3 +12\.3 %", output)
    assert "loss spike in step 7: 40, 37.0 sigma" in output
    assert "starting" not in output  # a spike does not change the state
    status.main([str(run), "--json"])
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["mfu"], listed["spikes"][0]["batch"][0]["frame"]) == (0.1234, 35)
    report.main([str(run)])
    assert "1 loss spike, the last: loss spike in step 7" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "Loss spikes" in page
    assert "lane 0: a (a.h5) from frame 35" in page
