"""Successors, smoke runs and chains on a throw-away SLURM, with preemption that cancels jobs."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from evspan.launch.sweep.registry import read_runs
from evspan.launch.sweep.state import State
from evspan.pipeline.history import read, read_progress
from support.slurm_cluster import ASIDE, CANCELLING, Cluster
from support.slurm_runs import events, evspan, job_of, keys, losses, wait_for

pytestmark = pytest.mark.slow

SHARD_FRAMES = {"train": [60, 44, 52], "val": [12, 7]}
ONE_RANK = ("parallel.ranks=1", "parallel.sequence=1")
DETACHED = ("cluster.successor=true", "cluster.detach=true")


def output_of(process: subprocess.Popen, seconds: float = 280) -> str:
    """What a command prints; it must succeed."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, f"{out}{err}"
    return out


def submitted(run: Path, key: str) -> str:
    return json.loads((run / "submitted.json").read_text())[key]


def preempt(cluster: Cluster) -> None:
    """By a job of a partition with a higher priority, on both nodes."""
    cluster.ask(
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )


@pytest.fixture(scope="module")
def with_broken_smoke(cluster: Cluster, shards: Path, tmp_path_factory) -> Path:
    """A run whose smoke run fails, on nodes of its own."""
    broken = tmp_path_factory.mktemp("sitecustomize")
    # Only the ranks: the batch script's own commands use the same Python.
    task = "evspan.launch.slurm.submitted_task"
    text = f"import sys\nif {task!r} in sys.orig_argv:\n    sys.exit('no GPU on this node')\n"
    (broken / "sitecustomize.py").write_text(text)
    run = tmp_path_factory.mktemp("smoke") / "run"
    words = keys(shards, run, *ONE_RANK, *DETACHED, f"cluster.partition={ASIDE}")
    environment = f"cluster.environment=['PYTHONPATH={broken}']"
    output_of(evspan(cluster, "submit", "--smoke", *words, environment))
    return run


@pytest.mark.timeout(400)
def test_a_run_whose_job_is_cancelled_continues_in_its_successor(
    cluster, shards, with_broken_smoke, tmp_path
):
    run = tmp_path / "run"
    words = [*ONE_RANK, *DETACHED, "training.max_steps=40", f"cluster.partition={CANCELLING}"]
    output_of(evspan(cluster, "submit", *keys(shards, run, *words)))
    first = job_of(run)
    second = submitted(run, "successor")
    wait_for(lambda: read_progress(run).get("step", 0) >= 2, 180)
    preempt(cluster)
    wait_for(lambda: job_of(run) == second)
    third = wait_for(lambda: submitted(run, "successor"))
    assert third != second
    assert third in output_of(evspan(cluster, "status", str(run)))
    wait_for(lambda: events(run, "done"), 180)
    wait_for(lambda: cluster.jobs()[third] == "CANCELLED")  # it is not needed
    assert cluster.jobs()[first] not in ("RUNNING", "PENDING")
    assert not events(run, "failed")
    assert losses(run).keys() == set(range(1, 41))


@pytest.mark.timeout(300)
def test_a_failed_smoke_run_cancels_the_job_of_its_run(cluster, with_broken_smoke):
    run = with_broken_smoke
    wait_for(lambda: events(run, "cancelled"), 180)
    wait_for(lambda: cluster.jobs()[job_of(run)] == "CANCELLED")
    status = output_of(evspan(cluster, "status", str(run)))
    assert "the smoke run before it has not succeeded" in status
    assert "rank-00 left no note" in status  # and the path of its output
    assert not events(run, "start")


@pytest.mark.timeout(300)
def test_cancel_ends_a_run_and_its_successor(cluster, shards, tmp_path):
    run = tmp_path / "run"
    words = [*ONE_RANK, *DETACHED, f"cluster.partition={ASIDE}"]
    output_of(evspan(cluster, "submit", *keys(shards, run, *words)))
    successor = submitted(run, "successor")
    out = output_of(evspan(cluster, "cancel", str(run)))
    assert f"and its successor {successor}" in out
    for job in (job_of(run), successor):
        wait_for(lambda job=job: cluster.jobs()[job] == "CANCELLED")
    assert "cancelled" in output_of(evspan(cluster, "status", str(run)))


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_a_chain_from_recordings_to_a_report_with_random_preemptions(cluster, tmp_path):
    """Each run of the sweep has the losses of an uninterrupted run."""
    raw, shards, sweep = (tmp_path / name for name in ("raw", "shards", "sweep"))
    small = ("--recordings", "train=4,val=2", "--seconds", "3")
    output_of(evspan(None, "simulate", str(raw), *small))
    prep = ["prep", f"source={raw}", f"output={shards}", "dataset=simulated"]
    output_of(
        evspan(
            cluster,
            "submit",
            *prep,
            "frames.downsample=4",
            "cluster=slurm",
            "cluster.mem_gb=1",
            f"cluster.partition={ASIDE}",
        )
    )
    more = ["training.max_steps=60", "checkpoint.every=10", "model.head.num_classes=3"]
    words = keys(shards, sweep, *ONE_RANK, *DETACHED, *more, f"cluster.partition={CANCELLING}")
    output_of(evspan(cluster, "sweep", *words, "optimizer.lr=1e-3,2e-3", f"after={shards}"))
    aside = f"cluster.partition={ASIDE}"
    for name in ("0", "1"):
        output_of(evspan(cluster, "submit", "evaluate", str(sweep / name), f"after={sweep}", aside))
    report = [f"after={folder}" for folder in (sweep, sweep / "0", sweep / "1")]
    output_of(evspan(cluster, "submit", "report", str(sweep), *report, aside))
    print(output_of(evspan(cluster, "status", str(sweep))), flush=True)
    seed = int(time.time())
    print(f"seed {seed}")
    draw = random.Random(seed)
    for number in range(1, 5):
        runs = [sweep / "0", sweep / "1"]
        wait_for(lambda n=number, r=runs: max(len(events(run, "start")) for run in r) >= n, 600)
        time.sleep(draw.uniform(0, 12))
        print(f"preempted at {[read_progress(run).get('step', 0) for run in runs]}", flush=True)
        preempt(cluster)
        if all(events(run, "done") for run in runs):
            break
        time.sleep(10)
    done = sweep / ".jobs" / "report"
    wait_for(lambda: events(done, "done") or events(done, "failed"), 900)
    print(output_of(evspan(cluster, "status", str(sweep))), flush=True)
    print(cluster.jobs())
    assert all(run.state is State.done for run in read_runs(sweep).runs)
    assert events(done, "done"), read(done)
    assert (sweep / "report.html").exists()
    assert (sweep / "0" / "evaluation-val" / "metrics.json").exists()
    for name, lr in (("0", "1e-3"), ("1", "2e-3")):
        local = tmp_path / f"local-{name}"
        words = keys(shards, local, *ONE_RANK, *more, f"optimizer.lr={lr}")
        output_of(evspan(None, "train", *words), 600)
        expected = losses(local)
        measured = losses(sweep / name)
        assert measured.keys() == expected.keys()
        worst = max(abs(measured[step] - expected[step]) for step in expected)
        print(f"run {name}: {len(events(sweep / name, 'start'))} attempts, difference {worst:g}")
        assert worst <= 1e-6 * max(expected.values())
