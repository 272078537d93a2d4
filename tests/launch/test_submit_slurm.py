"""`evspan submit` and `evspan sweep` on a throw-away SLURM: ranks on several nodes, and runs that are requeued."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.history import read, read_progress
from safetensors.numpy import load_file
from support.slurm_cluster import ASIDE, Cluster
from support.slurm_runs import (
    START_S,
    STEPS,
    events,
    evspan,
    job_of,
    keys,
    losses,
    scalar,
    submit_with_limit,
    time_out,
    wait_for,
    wait_for_return,
)
from support.slurm_times import AllocatedTime, allocated_time

pytestmark = pytest.mark.slow

SHARD_FRAMES = {"train": [60, 44, 52], "val": [12, 7]}
LIMIT_MIN = 2  # on a busy machine, ranks may take a minute to start


@pytest.fixture(scope="module")
def limited(cluster: Cluster, shards: Path, tmp_path_factory) -> Path:
    """A run that meets its time limit in its last evaluation."""
    folder = tmp_path_factory.mktemp("limited")
    (run,) = submit_with_limit(cluster, shards, folder, minutes=LIMIT_MIN, phases=1)
    return run


class Early(NamedTuple):
    """A command that was started before the first test, and the folder of its run or runs."""

    process: subprocess.Popen
    folder: Path


@pytest.fixture(scope="module")
def early(cluster: Cluster, shards: Path, limited: Path, tmp_path_factory):
    """Jobs that need no help, on nodes of their own: they wait while other tests run."""
    broken = tmp_path_factory.mktemp("sitecustomize")
    (broken / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('SLURM_PROCID') == '1':\n    sys.exit('broken')\n"
    )
    folders = {name: tmp_path_factory.mktemp(name) / "runs" for name in ("fault", "sweep", "many")}
    words = {
        "fault": [
            "submit",
            *keys(shards, folders["fault"]),
            f"cluster.environment=['PYTHONPATH={broken}']",
            "cluster.max_retries=2",
            "parallel.timeout_s=10",
            f"cluster.partition={ASIDE}",
        ],
        "sweep": [
            "sweep",
            *keys(shards, folders["sweep"]),
            "optimizer.lr=1e-3,2e-3,4e-3,-1",
            "training.max_steps=3",
            "training.engine=deepspeed",
            "cluster.array_parallelism=2",
            f"cluster.partition={ASIDE}",
        ],
        "many": [
            "train",
            "--multirun",
            "hydra/launcher=slurm",
            *keys(shards, folders["many"], "training.max_steps=1", "seed=1,2"),
            "parallel.sequence=1",
            f"hydra.launcher.partition={ASIDE}",
        ],
    }
    commands = {name: Early(evspan(cluster, *words[name]), folders[name]) for name in words}
    yield commands
    for process, _ in commands.values():
        process.kill()


@pytest.fixture
def slurm(cluster: Cluster, early: dict[str, Early]):
    yield cluster
    cluster.end_jobs()
    resume(cluster, "n2")


def finished(process: subprocess.Popen, seconds: float) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(
        run
        / "checkpoints"
        / (run / "checkpoints" / "latest").read_text().strip()
        / "weights.safetensors"
    )


def assert_same_run(run: Path, undisturbed: Path, steps: int = STEPS) -> None:
    """The same weights and losses, nothing half written, no step twice."""
    for name, expected in weights(undisturbed).items():
        np.testing.assert_allclose(weights(run)[name], expected, rtol=1e-6, atol=1e-8, err_msg=name)
    run_losses = losses(run)
    expected_losses = losses(undisturbed)
    assert run_losses.keys() == expected_losses.keys() == set(range(1, steps + 1))
    assert max(abs(run_losses[step] - expected_losses[step]) for step in run_losses) <= 1e-6 * max(
        expected_losses.values()
    )
    hidden = [path for path in run.rglob(".*") if {".submitit", ".locks"}.isdisjoint(path.parts)]
    assert not hidden


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The same by two ranks of this machine, without SLURM."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, _out, err = finished(evspan(None, "train", *keys(shards, run)), 240)
    assert code == 0, err
    return run


# -- what disturbs a run -----------------------------------------------------------------------------------------
def requeue(cluster: Cluster, run: Path) -> None:
    cluster.ask("scontrol", "requeue", job_of(run))


def preempt(cluster: Cluster, run: Path) -> None:
    """By a job of a partition with a higher priority, on both nodes."""
    cluster.ask(
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )


def take_node_down(cluster: Cluster, run: Path) -> None:
    cluster.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(1)
    resume(cluster, "n2")


def resume(cluster: Cluster, node: str) -> None:
    """SLURM refuses it for a node that is up, which a node that is down may become by itself."""
    subprocess.run(
        ["scontrol", "update", f"nodename={node}", "state=resume"],
        env=cluster.environment,
        capture_output=True,
    )


def kill_a_rank(cluster: Cluster, run: Path) -> None:
    os.kill(rank_of(run, 1), signal.SIGKILL)


def rank_of(run: Path, number: int) -> int:
    """The process that is this rank of the run, whose log it has open."""
    log = str(run / "logs" / f"rank-{number:02d}.log")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.readlink(path / "fd" / "1") == log
                and b"submitit" in (path / "cmdline").read_bytes()
            ):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process writes {log}")


def disturb(cluster: Cluster, run: Path, how: Callable[[Cluster, Path], None], *, at: int) -> None:
    """When the run has come to step `at`, or the first after a restart; returns when the next attempt trains."""
    started = len(events(run, "running"))
    wait_for(lambda: read_progress(run).get("step", 0) >= at and len(events(run, "running")) >= 1)
    how(cluster, run)
    end = time.monotonic() + START_S
    while len(events(run, "running")) == started:
        assert time.monotonic() < end, f"it has not come back after {how.__name__}: {read(run)}"
        time.sleep(0.5)


def assert_times_add_up(cluster: Cluster, run: Path, allocated: AllocatedTime) -> None:
    """The parts in the report add up to the time for which SLURM says that the run had its nodes."""
    code, out, err = finished(evspan(cluster, "report", str(run), "--json"), 60)
    assert code == 0, err
    times = json.loads(out)["runs"][0]["time"]
    parts = {part: seconds for part, seconds in times["parts_s"].items() if seconds}
    print(f"{parts}, queue {times['queue_s']} s; SLURM: {allocated.ends}, {allocated.queue_s} s")
    assert len(allocated.ends) == len(events(run, "start"))
    assert abs(sum(parts.values()) - allocated.seconds) <= 0.02 * allocated.seconds
    assert abs(times["queue_s"] - allocated.queue_s) <= 0.02 * allocated.seconds
    assert times["rank_hours"] == pytest.approx(2 * times["allocated_s"] / 3600, rel=0.02)
    assert times["goodput"] == pytest.approx(parts["training"] / times["allocated_s"], rel=0.01)
    assert {"launch", "imports", "first_step", "training", "saving", "exchange"} <= parts.keys()
    assert {"repeated", "idle", "ending"} <= parts.keys()


# -- tests -------------------------------------------------------------------------------------------------------
@pytest.mark.timeout(600)
def test_a_run_over_two_nodes_is_requeued(slurm, shards, undisturbed, tmp_path):
    """However it is interrupted, it ends with the weights of the uninterrupted run."""
    run = tmp_path / "run"
    submitted = evspan(slurm, "submit", *keys(shards, run))
    with allocated_time(slurm, run) as allocated:
        try:
            for at, how in ((4, time_out), (14, kill_a_rank), (24, preempt), (34, take_node_down)):
                disturb(slurm, run, how, at=at)
            code, out, err = finished(submitted, 120)
            wait_for(lambda: slurm.jobs()[job_of(run)] == "COMPLETED", 120)
        finally:
            submitted.kill()
    assert code == 0, f"{out}{err}{read(run)}"
    assert_times_add_up(slurm, run, allocated)
    assert_same_run(run, undisturbed)
    assert len(events(run, "start")) == 5
    assert len(events(run, "fault")) == 1
    assert "rank 1" in events(run, "fault")[0]["message"]
    # Saved where there was time to; at most the steps since the last checkpoint were trained again where there was none.
    assert scalar(run, "run/requeues") == [0, 1, 2, 3, 4]
    assert max(scalar(run, "run/steps_repeated")) <= 5
    assert scalar(run, "run/steps_repeated")[0] == 0
    assert min(scalar(run, "run/seconds_lost")) > 0


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_ten_disturbances_at_random_moments(slurm, shards, tmp_path):
    """While it starts, trains or saves; the seed of the moments is printed."""
    seed, steps = int(time.time()), 150
    print(f"seed {seed}")
    draw = random.Random(seed)
    more = [f"training.max_steps={steps}", "checkpoint.every=2"]
    code, _, err = finished(
        evspan(None, "train", *keys(shards, tmp_path / "undisturbed", *more)), 600
    )
    assert code == 0, err
    run = tmp_path / "run"
    submitted = evspan(slurm, "submit", *keys(shards, run, *more, "cluster.max_retries=9"))
    try:
        for number in range(10):
            how = draw.choice([requeue, preempt, time_out, take_node_down, kill_a_rank])
            wait_for(lambda number=number: len(events(run, "start")) > number)
            time.sleep(draw.uniform(0, 5))
            began = len(events(run, "start"))
            print(f"{how.__name__} at step {read_progress(run).get('step', 0)}", flush=True)
            how(slurm, run)
            end = time.monotonic() + 2 * START_S
            while len(events(run, "start")) == began:
                assert time.monotonic() < end, (
                    f"it has not come back after {how.__name__}: {read(run)}"
                )
                time.sleep(0.5)
        code, out, err = finished(submitted, 300)
    finally:
        submitted.kill()
    assert code == 0, f"{out}{err}{read(run)}"
    assert_same_run(run, tmp_path / "undisturbed", steps)
    repeated = scalar(run, "run/steps_repeated")
    print(
        f"{len(events(run, 'start'))} attempts; steps repeated {repeated}; seconds lost {scalar(run, 'run/seconds_lost')}"
    )
    assert max(repeated) <= 2


@pytest.mark.timeout(400)
def test_a_sweep_over_two_nodes(slurm, early):
    """Four runs, one of which has a wrong value; it fails alone, and the report has its message."""
    process, folder = early["sweep"]
    code, out, err = finished(process, 300)
    assert code == 1, f"{out}{err}"
    last_events = {run.name: read(run)[-1] for run in folder.iterdir() if run.name.isdigit()}
    assert {name: event["event"] for name, event in last_events.items()} == {
        "0": "done",
        "1": "done",
        "2": "done",
        "3": "failed",
    }
    assert "optimizer.lr" in last_events["3"]["message"]
    assert len({job_of(folder / name).split("_")[0] for name in "012"}) == 1  # one array
    code, out, err = finished(evspan(slurm, "report", str(folder)), 60)
    assert code == 0 and "optimizer.lr" in out and (folder / "report.html").exists(), err
    code, out, err = finished(evspan(slurm, "status", str(folder)), 60)
    assert code == 0 and out.count("done") >= 3 and "failed" in out, err


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize("waits", [True, False], ids=["the command waits", "detached"])
def test_a_sweep_whose_first_runs_fail_alike_ends(cluster, shards, tmp_path, waits):
    """Of six runs whose ranks cannot start, three are tried."""
    broken = tmp_path / "hook"
    broken.mkdir()
    # Only the ranks: the batch script's own commands use the same Python.
    task = "evspan.launch.slurm.submitted_task"
    (broken / "sitecustomize.py").write_text(
        f"import sys\nif {task!r} in sys.orig_argv:\n    sys.exit('no driver')\n"
    )
    sweep = tmp_path / "sweep"
    words = [
        *keys(shards, sweep),
        "seed=1,2,3,4,5,6",
        f"cluster.environment=['PYTHONPATH={broken}']",
        "cluster.max_retries=1",
        "cluster.array_parallelism=1",
        "cluster.fail_fast=true",
        f"cluster.detach={str(not waits).lower()}",
        f"cluster.partition={ASIDE}",
    ]
    code, out, err = finished(evspan(cluster, "sweep", *words), 300)
    runs = [sweep / str(number) for number in range(6)]
    wait_for(lambda: all(read(run)[-1]["event"] in ("failed", "cancelled") for run in runs), 300)
    ends = [read(run)[-1]["event"] for run in runs]
    assert ends[:3] == ["failed"] * 3
    assert ends[4:] == ["cancelled"] * 2  # the fourth may have been starting
    reason = events(runs[5], "cancelled")[0]["reason"]
    assert "the first 3 runs failed with the same error" in reason
    assert "left no note" in reason  # of the rank that SLURM names
    wait_for(lambda: not cluster.ask("squeue", "--noheader", f"--partition={ASIDE}"))
    if waits:
        assert code == 2
        assert "the first 3 runs failed with the same error" in err
    else:
        assert code == 0, f"{out}{err}"


@pytest.mark.timeout(300)
def test_a_permanent_fault_ends_the_run(early):
    """Its rank dies at each start, in the same place; the second time is the last."""
    process, run = early["fault"]
    code, out, err = finished(process, 200)
    assert code == 1, f"{out}{err}"
    message = events(run, "failed")[0]["message"]
    assert "2 times in a row at step 0" in message
    assert "rank-01 left no note" in message
    assert "SystemExit: broken" in message
    assert "2 times in a row" in out


@pytest.mark.timeout(240)
def test_a_cancelled_run_stays_away(slurm, shards, tmp_path):
    """Whether it was cancelled by evspan cancel or by scancel."""
    run = tmp_path / "run"
    code, out, err = finished(
        evspan(slurm, "submit", *keys(shards, run, "cluster.detach=true")), 60
    )
    assert code == 0 and "evspan status" in out, err
    again = finished(evspan(slurm, "submit", *keys(shards, run)), 60)
    assert again[0] == 2
    # Queued, or running already.
    assert "already has" in again[2] or "is in use by evspan train" in again[2]
    wait_for(lambda: events(run, "running"))
    code, out, err = finished(evspan(slurm, "cancel", str(run)), 60)
    assert code == 0, err
    wait_for(lambda: slurm.jobs()[job_of(run)] not in ("RUNNING", "COMPLETING"), 120)
    assert slurm.jobs()[job_of(run)] == "CANCELLED"
    code, out, err = finished(evspan(slurm, "status", str(run)), 60)
    assert "cancelled" in out
    code, out, err = finished(
        evspan(slurm, "submit", *keys(shards, run, "cluster.detach=true")), 60
    )
    assert code == 0, err
    wait_for(lambda: len(events(run, "running")) == 2)
    job = job_of(run)
    slurm.ask("scancel", job)
    wait_for(lambda: slurm.jobs()[job] not in ("RUNNING", "COMPLETING"), 120)
    assert slurm.jobs()[job] == "CANCELLED"
    assert not events(run, "requeued")


@pytest.mark.timeout(300)
def test_a_requeue_reads_the_resolved_config_of_the_run(slurm, shards, tmp_path):
    """A change of RUN/config.yaml after the start takes effect at the next attempt."""
    run = tmp_path / "run"
    more = ["training.max_steps=40", "training.engine=deepspeed"]
    submitted = evspan(slurm, "submit", *keys(shards, run, *more))
    try:
        wait_for(lambda: read_progress(run).get("step", 0) >= 2)
        assert json.loads((run / "config.json").read_text())["checkpoint"]["keep"] == 2
        config = load_config(TrainConfig, run / CONFIG_FILE)
        assert config.parallel.threads == 1
        config.checkpoint.keep = 4
        save_config(config, run / CONFIG_FILE)
        disturb(slurm, run, time_out, at=3)
        code, out, err = finished(submitted, 120)
    finally:
        submitted.kill()
    assert code == 0, f"{out}{err}{read(run)}"
    assert json.loads((run / "config.json").read_text())["checkpoint"]["keep"] == 4
    assert len(events(run, "start")) == 2


@pytest.mark.timeout(240)
def test_hydras_multirun_submits_the_same_jobs(early):
    process, folder = early["many"]
    code, out, err = finished(process, 150)
    assert code == 0, f"{out}{err}"
    assert [events(folder / n, "done")[0]["step"] for n in "01"] == [1, 1]


def test_what_slurm_refuses_is_one_line(slurm, shards, tmp_path):
    code, _out, err = finished(
        evspan(slurm, "submit", *keys(shards, tmp_path / "run", "cluster.partition=nowhere")), 60
    )
    assert code == 2
    assert "cluster.partition" in err
    assert len(err.splitlines()) == 1


@pytest.mark.timeout(600)
def test_a_time_limit_in_an_evaluation_requeues_the_run(slurm, limited, undisturbed):
    """A rank sleeps through SLURM's signal; the others wait for it."""
    wait_for_return(limited, "evaluating", 500)
    assert_same_run(limited, undisturbed)
    code, out, err = finished(evspan(slurm, "status", str(limited)), 60)
    assert code == 0 and "done" in out, err
    name = f"step-{STEPS:08d}"
    metrics = [
        json.loads((run / "checkpoints" / name / "metrics.json").read_text())
        for run in (limited, undisturbed)
    ]
    for values in metrics:
        del values["checkpoint"], values["xxh3"]  # of the file, which names the folder
    assert metrics[0] == metrics[1]
