"""Several runs on this machine, one after the other: what each one's end does to the others."""

import signal
import sys
import time
from pathlib import Path

import pytest
from evspan.conf.compose import compose
from evspan.conf.schema.training import TrainConfig
from evspan.launch.local import sequential
from evspan.launch.search import local_trials
from evspan.launch.search.local_trials import LocalTrials
from evspan.launch.search.study import Trial
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.state import State
from evspan.pipeline.history import read

ENDS = {  # how a training ends
    "killed": "import os; os.kill(os.getpid(), 9)",
    "stopped": "import os; os.kill(os.getpid(), 15)",
    "saved": "raise SystemExit(75)",
    "refused": "import sys; print('error: no data', file=sys.stderr); raise SystemExit(2)",
    "done": "from evspan.pipeline.history import append; append(RUN, 'done', step=1)",
}


def planned(folder: Path, names: list[str]) -> list[PlannedRun]:
    config = compose(TrainConfig, [])
    return [PlannedRun(folder / name, [], config) for name in names]


def ends_as_named(run: PlannedRun) -> list[str]:
    """Instead of a training: a process that ends as the run's folder is named."""
    return [sys.executable, "-c", f"RUN = {str(run.folder)!r}; {ENDS[run.folder.name]}"]


@pytest.fixture(autouse=True)
def trainings_that_end(monkeypatch):
    monkeypatch.setattr(sequential, "train_command", ends_as_named)
    monkeypatch.setattr(local_trials, "train_command", ends_as_named)


def test_a_failed_run_keeps_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sequential, "newest_step", lambda run, read_files: 700)
    (run,) = planned(tmp_path, ["killed"])
    sequential.run_sequentially([run])
    failed = read(run.folder)[-1]
    assert (failed["event"], failed["step"]) == ("failed", 700)


def test_a_run_that_is_killed_or_refused_does_not_stop_the_others(tmp_path, capfd):
    runs = planned(tmp_path, ["killed", "refused", "done"])
    assert sequential.run_sequentially(runs) == 1
    killed, refused, done = (read(run.folder)[-1] for run in runs)
    assert (killed["event"], killed["message"]) == ("failed", "was killed by SIGKILL")
    assert killed["code"] == 128 + signal.SIGKILL
    assert (refused["event"], refused["message"]) == ("failed", "no data")
    assert done["event"] == "done"


@pytest.mark.parametrize(("name", "code"), [("stopped", 128 + signal.SIGTERM), ("saved", 75)])
def test_a_stop_signal_stops_all(tmp_path, name, code):
    runs = planned(tmp_path, [name, "done"])
    assert sequential.run_sequentially(runs) == code
    assert not read(runs[1].folder)


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("killed", State.failed, "was killed by SIGKILL"),
        ("refused", State.failed, "no data"),
        ("stopped", State.saved, ""),
        ("saved", State.saved, ""),
    ],
)
def test_how_a_trial_has_ended(tmp_path, name, state, reason):
    (run,) = planned(tmp_path, [name])
    run.folder.mkdir()
    trials = LocalTrials()
    trials.start(Trial(0, name, (), None, {}, None, None, "", 0), run)
    end = time.monotonic() + 60
    while (seen := trials.observe([run])[0]).active:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (seen.state, seen.reason) == (state, reason)
