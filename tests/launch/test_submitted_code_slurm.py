"""On a throw-away SLURM: the checkout is edited while a job waits and between its attempts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from evspan.conf.code_version import package_files
from support.slurm_cluster import ASIDE, Cluster
from support.slurm_runs import (
    START_S,
    events,
    evspan,
    job_of,
    keys,
    time_out,
    wait_for,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RAISES = "raise RuntimeError('the checkout was edited')\n"
SHARD_FRAMES = {"train": [60, 44, 52], "val": [12, 7]}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The package in a folder `evspan`, which a command imports from PYTHONPATH."""
    folder = tmp_path_factory.mktemp("checkout") / "evspan"
    for name, path in package_files(ROOT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / name)
    return folder


@pytest.fixture
def submit(cluster: Cluster, shards: Path, checkout: Path, tmp_path) -> Callable[..., Path]:
    """Submits a run from the checkout, which waits until it is released. Returns its folder."""

    def start(name: str, *more: str) -> Path:
        run = tmp_path / name
        words = [
            *keys(shards, run, *more),
            "cluster.detach=true",
            f"cluster.partition={ASIDE}",
            "cluster.sbatch_args=[hold]",
        ]
        command = evspan(cluster, "submit", *words, PYTHONPATH=str(checkout.parent))
        out, err = command.communicate(timeout=120)
        assert command.returncode == 0, f"{out}{err}"
        return run

    return start


def status(cluster: Cluster, run: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "evspan.launch", "status", str(run)],
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


@pytest.mark.timeout(400)
def test_every_attempt_runs_the_submitted_code(cluster, submit, checkout):
    trainer = checkout / "pipeline" / "engine" / "trainer.py"
    requeue = checkout / "launch" / "slurm" / "requeue.py"
    task = checkout / "launch" / "slurm" / "rank_task.py"
    original = trainer.read_text()
    trainer.write_text(f"MARK = 'not committed'\n{original}")
    run = submit("archive", "training.max_steps=2000")
    code = json.loads((run / "submitted.json").read_text())["code"]
    assert "has changed" not in status(cluster, run)
    trainer.write_text(RAISES)
    task.unlink()
    assert "launch/slurm/rank_task.py, pipeline/engine/trainer.py" in status(cluster, run)
    live = submit_live(submit, trainer, task, original)
    for held in (live, run):
        cluster.ask("scontrol", "release", job_of(held))
        if held is live:
            wait_for(lambda: events(live, "failed"), 2 * START_S)
    wait_for(lambda: events(run, "running"))
    requeue.write_text(RAISES)  # the decision about the next attempt, too, is that of the copy
    time_out(cluster, run)
    wait_for(lambda: len(events(run, "running")) > 1 or events(run, "failed"), 3 * START_S)
    cluster.ask("scancel", job_of(run))
    starts = events(run, "start")
    assert not events(run, "fault")
    assert len(starts) == 2
    assert [event["digest"] for event in starts] == [code["digest"]] * 2
    assert starts[1]["step"] == events(run, "saved")[0]["step"] > 0
    archived = Path(code["folder"]) / "evspan" / "pipeline" / "engine" / "trainer.py"
    assert archived.is_relative_to(run)
    assert archived.read_text().startswith("MARK")
    # The same edit ends a run of the live code.
    assert "the checkout was edited" in str(events(live, "failed")[0]["message"])


def submit_live(submit: Callable[..., Path], trainer: Path, task: Path, original: str) -> Path:
    """Submits a run of the live code, and edits the checkout again while it waits."""
    edited = trainer.read_text()
    trainer.write_text(original)
    shutil.copy2(ROOT / "launch" / "slurm" / "rank_task.py", task)
    run = submit("live", "cluster.code=live", "cluster.max_retries=1")
    trainer.write_text(edited)
    return run
