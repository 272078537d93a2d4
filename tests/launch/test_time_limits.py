"""A campaign: time limits that end on a throw-away SLURM, whatever the ranks are doing.

tests/launch/test_submit_slurm.py has one of them, next to its other jobs.
"""

import json
from pathlib import Path

import pytest
from support.slow_phase import PHASES
from support.slurm_runs import (
    events,
    evspan,
    keys,
    losses,
    submit_with_limit,
    wait_for_return,
)

pytestmark = pytest.mark.soak

SHARD_FRAMES = {"train": [60, 44, 52], "val": [12, 7]}
EVALUATED = (3, 6, 9)
KEYS = [
    "training.max_steps=9",
    "training.evaluate_every=3",
    "training.log_images_every=4",
    "evaluation.skip_first_ms=0",
    "checkpoint.every=1",
    "parallel.timeout_s=300",
]
SECONDS = 1500


def metrics(run: Path) -> list[dict]:
    """Of all evaluations, without the run's folder."""
    values = []
    for step in EVALUATED:
        path = run / "checkpoints" / f"step-{step:08d}" / "metrics.json"
        values.append({**json.loads(path.read_text()), "checkpoint": None, "xxh3": None})
    return values


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The same by two ranks of this machine, without SLURM."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = evspan(None, "train", *keys(shards, run, *KEYS, "checkpoint.keep=9"))
    _, err = command.communicate(timeout=240)
    assert command.returncode == 0, err
    return run


@pytest.mark.timeout(240)
@pytest.mark.parametrize("minutes", [1, 2])
def test_a_limit_in_any_phase(cluster, shards, undisturbed, tmp_path, minutes):
    """All come back, and end with the losses and AP of the undisturbed run."""
    # The nodes take two runs at once; more could not start in one minute on two cores.
    runs = submit_with_limit(cluster, shards, tmp_path, *KEYS, minutes=minutes, phases=len(PHASES))
    for run, (phase, *_) in zip(runs, PHASES, strict=True):
        wait_for_return(run, phase, SECONDS)
        assert losses(run) == losses(undisturbed)
        assert metrics(run) == metrics(undisturbed)
        print(f"{minutes} min, {phase}: {len(events(run, 'start'))} attempts", flush=True)
