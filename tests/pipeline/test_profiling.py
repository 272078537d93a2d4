"""Traces of the steps that were asked for: what is in them, and that they are all there is."""

import gzip
import json

import pytest
import torch
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import TrainingConfig
from evspan.pipeline.engine.profiling import REQUESTED_STEPS, Profiler
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from torch import nn

pytestmark = pytest.mark.timeout(240)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.top(self.body(x))


def train(run, steps, asked=(), request_at=None, first=1):
    """As the loop does it: a log line every second step."""
    net = Net()
    profiler = Profiler(run, 0, TensorBoardWriter(run, enabled=False), net, list(asked))
    for step in range(first, steps + 1):
        profiler.before(step)
        net(torch.ones(3, 8)).sum().backward()
        profiler.after()
        if step == request_at:
            (run / "profile.request").touch()
        if step % 2 == 0 and (count := profiler.requested()):
            profiler.request(step + 2, count)
    profiler.close()
    return net, profiler


def traces(run):
    out = {}
    for path in (run / "profile").glob("*"):
        with gzip.open(path) as file:
            out[path.name] = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    return out


def regions(events, start):
    return sorted(
        e["name"]
        for e in events
        if e["name"].startswith(start) and e.get("cat") == "user_annotation"
    )


def test_the_steps_asked_for_are_traced_and_parts_are_named(tmp_path):
    net, _ = train(tmp_path, 6, asked=(3, 4))
    ((name, events),) = traces(tmp_path).items()
    assert name == "steps-3-4-rank-0.json.gz"
    assert regions(events, "training step") == ["training step 3", "training step 4"]
    assert regions(events, "body") == ["body"] * 2
    assert regions(events, "top") == ["top"] * 2
    assert sum(e["name"] == "aten::linear" for e in events) == 4
    step = next(e for e in events if e["name"] == "training step 3")
    body = next(e for e in events if e["name"] == "body")
    assert step["ts"] <= body["ts"]
    assert body["ts"] + body["dur"] <= step["ts"] + step["dur"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("first", "steps", "asked", "there"),
    [
        (1, 3, (1, 1), "steps-1-1-rank-0.json.gz"),  # no step before it to warm up in
        (5, 8, (2, 6), "steps-5-6-rank-0.json.gz"),  # resumed in between
        (1, 3, (2, 9), "steps-2-3-rank-0.json.gz"),  # the run ends before
    ],
)
def test_what_there_is_of_them_is_traced(tmp_path, first, steps, asked, there):
    train(tmp_path, steps, asked=asked, first=first)
    ((name, events),) = traces(tmp_path).items()
    low, high = (int(n) for n in there.split("-")[1:3])
    assert name == there
    assert regions(events, "training step") == [f"training step {n}" for n in range(low, high + 1)]


def test_a_running_run_is_asked_by_a_file(tmp_path):
    train(tmp_path, 12, request_at=3)
    ((name, events),) = traces(tmp_path).items()  # seen at the log line of step 4; step 5 warms up
    assert REQUESTED_STEPS == 3
    assert name == "steps-6-8-rank-0.json.gz"
    assert regions(events, "training step") == [f"training step {n}" for n in (6, 7, 8)]
    assert not (tmp_path / "profile.request").exists()


def test_nobody_asks_nothing_is_written(tmp_path):
    train(tmp_path, 3)
    train(tmp_path, 12, asked=(2, 3), first=8)  # they are past
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [[3], [0, 2], [5, 4], [1, 2, 3], [10, 30]])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="training.profile is .*at most 20"):
        TrainingConfig(profile=steps)
