"""metrics.jsonl: one line per kind and step, also over attempts, damage and full disks."""

import json
import logging

import pytest
from evspan.pipeline.metrics_log import EVALUATION, METRICS, TRAIN, MetricsLog, read_metrics


def steps(run, kind=TRAIN):
    return [record["step"] for record in read_metrics(run) if record["kind"] == kind]


def written(run, steps, **arguments):
    log = MetricsLog(run, enabled=True, **arguments)
    for step in steps:
        log.write(TRAIN, step, {"loss": float(step)})
    return log


def test_a_resumed_run_has_each_step_once(tmp_path):
    written(tmp_path, range(1, 8)).write(EVALUATION, 4, {"ap": 0.1})
    log = MetricsLog(tmp_path, enabled=True, resume_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert steps(tmp_path, EVALUATION) == [4]
    log.write(EVALUATION, 4, {"ap": 0.2})  # the attempt before was killed before it was recorded
    log.write(TRAIN, 5, {"loss": 0.5})
    (evaluation,) = (r for r in read_metrics(tmp_path) if r["kind"] == EVALUATION)
    assert evaluation["ap"] == 0.2
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    written(tmp_path, [1])  # starts over
    assert steps(tmp_path) == [1]


def test_every_line_is_json_without_nan(tmp_path):
    log = written(tmp_path, [1])
    log.write(TRAIN, 2, {"loss": float("nan"), "gradient_norm": float("inf")})
    lines = (tmp_path / METRICS).read_text().splitlines()
    last = json.loads(lines[-1], parse_constant=pytest.fail)
    assert len(lines) == 2
    assert last["loss"] is last["gradient_norm"] is None


def test_a_damaged_line_does_not_hide_the_others(tmp_path):
    written(tmp_path, [1, 2])
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'\xff\x00\n[1]\n{"kind": "train", "step": "3"}\n{"kind": "train", "st')
    assert steps(tmp_path) == [1, 2]
    written(tmp_path, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).open()] == [1, 2, 3]


def test_a_full_disk_gives_one_warning_and_later_lines_are_complete(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    logging.getLogger("evspan").propagate = True
    log = written(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr("evspan.pipeline.metrics_log.os.write", full)
        patch.setattr("evspan.pipeline.metrics_log.replace_file", full)
        log.write(TRAIN, 2, {"loss": 2.0})
        log.write(TRAIN, 3, {"loss": 3.0})
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    log.write(TRAIN, 4, {"loss": 4.0})
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_other_ranks_write_nothing(tmp_path):
    MetricsLog(tmp_path, enabled=False).write(TRAIN, 1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
