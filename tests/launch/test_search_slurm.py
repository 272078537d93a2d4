"""`evspan sweep search=optuna` on a throw-away SLURM: killed controllers and jobs, no trial lost or run twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from evspan.launch.search.study import JOURNAL
from evspan.launch.sweep.registry import Run, read_runs
from evspan.pipeline.history import read, read_progress
from evspan.pipeline.metrics_log import read_metrics
from support.search_runs import search_words, study_of, train_steps
from support.slurm_cluster import Cluster
from support.slurm_runs import ROOT, evspan, job_of, wait_for

pytestmark = pytest.mark.slow

SHARD_FRAMES = {"train": [60, 44, 52], "val": [12, 7]}
PARTITION = "both"  # all four nodes


@pytest.fixture
def slurm(cluster: Cluster):
    cluster.ask("scontrol", "create", f"partitionname={PARTITION}", "nodes=n[1-4]", "state=up")
    yield cluster
    subprocess.run(
        ["scancel", f"--partition={PARTITION}", "--user=root"], env=cluster.environment, check=False
    )
    wait_for(lambda: not cluster.ask("squeue", "--noheader", f"--partition={PARTITION}"), 120)
    cluster.ask("scontrol", "delete", f"partitionname={PARTITION}")


def controller(cluster: Cluster, words: list[str]) -> subprocess.Popen:
    """A controller on this machine that looks twice a second. Its output goes to a file."""
    sweep = next(Path(word.partition("=")[2]) for word in words if word.startswith("run_dir="))
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Path(f"{sweep}.log").open("a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import evspan.launch.search.controller as c; c.POLL_S = 0.5\n"
                "from evspan.launch.cli.main import main; main()",
                "sweep",
                *words,
            ],
            cwd="/",
            stdout=log,
            stderr=log,
            env=environment,
        )


def log_of(sweep: Path) -> str:
    return Path(f"{sweep}.log").read_text()


def jobs_started(run: Path) -> set[str]:
    return {event["job"] for event in read(run) if event["event"] == "start"}


def assert_no_trial_lost_or_twice(sweep: Path, trials: int, steps_of_trial: int = 9) -> None:
    """Each trial has one folder, one end, and metrics of its own; all are reported once."""
    study = study_of(sweep)
    assert len(study.trials) == trials
    folders = [trial.user_attrs["folder"] for trial in study.trials]
    assert sorted(folders, key=int) == [str(number) for number in range(trials)]
    rows = {row["folder"]: row for row in json.loads((sweep / "sweep.json").read_text())["runs"]}
    assert sorted(rows) == sorted(folders)
    states = Counter(trial.state.name for trial in study.trials)
    assert set(states) <= {"COMPLETE", "PRUNED"}, states
    for trial in study.trials:
        run = sweep / trial.user_attrs["folder"]
        assert rows[run.name]["overrides"] == trial.user_attrs["overrides"]
        ends = [e["event"] for e in read(run) if e["event"] in ("done", "pruned", "failed")]
        expected = "done" if trial.state.name == "COMPLETE" else "pruned"
        assert ends[-1] == expected, (run, read(run))
        assert "failed" not in ends
        # One job at a time has trained it, and it was submitted once for each loss of its job.
        assert len(jobs_started(run)) <= 1 + trial.user_attrs.get("retries", 0), read(run)
        steps = [r["step"] for r in read_metrics(run) if r["kind"] == "train"]
        assert steps == sorted(set(steps))
        if expected == "done":
            assert steps[-1] == steps_of_trial
    # Each value is in the journal once.
    reported = Counter()
    for line in (sweep / JOURNAL).read_text().splitlines():
        entry = json.loads(line)
        if "intermediate_value" in entry:
            reported[entry["trial_id"], entry["step"]] += 1
    assert reported
    assert max(reported.values()) == 1


@pytest.mark.timeout(300)
def test_a_search_survives_kills_of_its_controller(slurm, shards, tmp_path):
    """Four trials over the four nodes; the controller is killed twice, at random moments."""
    sweep = tmp_path / "search"
    words = search_words(
        shards,
        sweep,
        "search.trials=4",
        "cluster.array_parallelism=3",
        f"cluster.partition={PARTITION}",
    )
    process = controller(slurm, words)
    try:
        for number in range(2):
            folder = sweep / str(number)
            wait_for(lambda folder=folder: read(folder))
            time.sleep(random.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = controller(slurm, words)
        assert process.wait(240) == 0, log_of(sweep)
    finally:
        process.kill()
    assert_no_trial_lost_or_twice(sweep, 4)
    assert "continues" in log_of(sweep)


@pytest.mark.timeout(300)
def test_a_detached_controller_comes_back_and_is_cancelled(slurm, shards, tmp_path):
    """Its process is killed: SLURM starts it again. `evspan cancel` ends it and its runs, and the same command goes on."""
    sweep = tmp_path / "search"
    words = search_words(
        shards,
        sweep,
        "search.trials=2",
        "training.max_steps=4000",
        "cluster.array_parallelism=1",
        f"cluster.partition={PARTITION}",
        "cluster.detach=true",
    )
    out, err = evspan(slurm, "sweep", *words).communicate(timeout=120)
    assert "controller of the search of 2 trials" in err + out
    job = json.loads((sweep / "search.json").read_text())["job"]
    refused = evspan(slurm, "sweep", *words).communicate(timeout=120)[1]
    assert f"SLURM job {job} runs the search" in refused or "is in use" in refused
    wait_for(lambda: read_progress(sweep / "0").get("step", 0) > 0)
    os.kill(process_of(sweep / "logs" / "search.log"), signal.SIGKILL)
    wait_for(lambda: "continues 1 trial" in (sweep / "logs" / "search.log").read_text())
    shown = evspan(slurm, "status", str(sweep)).communicate(timeout=120)[0]
    assert f"controller: SLURM job {job}" in shown
    out, err = evspan(slurm, "cancel", str(sweep)).communicate(timeout=120)
    assert f"cancelled SLURM job {job}, the controller of the search" in out, err
    wait_for(lambda: slurm.jobs()[job] == "CANCELLED")
    wait_for(lambda: slurm.jobs()[job_of(sweep / "0")] == "CANCELLED")
    assert len(study_of(sweep).trials) == 1  # none was started, or lost


def process_of(log: Path) -> int:
    """The process whose output goes to this file."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "fd" / "1") == str(log):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process writes {log}")


# -- the campaign --------------------------------------------------------------------------------------------------
TRIALS = 24
STEPS = 96


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_24_trials_under_five_kills(slurm, shards, tmp_path):
    """The controller and a job are killed at five random moments; then a grid of the same size is trained."""
    seed = int(time.time())
    draw = random.Random(seed)
    more = [
        f"training.max_steps={STEPS}",
        "checkpoint.every=6",
        "cluster.array_parallelism=4",
        "cluster.max_retries=9",
        f"cluster.partition={PARTITION}",
    ]
    sweep = tmp_path / "search"
    words = search_words(
        shards,
        sweep,
        *more,
        f"search.trials={TRIALS}",
        "search.min_steps=6",
        "search.reduction_factor=4",
    )
    process = controller(slurm, words)
    began = time.monotonic()
    try:
        for number in range(5):
            wait_for(lambda number=number: (sweep / str(4 * number)).exists(), 600)
            time.sleep(draw.uniform(0, 10))
            process.send_signal(signal.SIGKILL)
            process.wait()
            training = wait_for(lambda: runs_that_train(slurm, sweep), 120)
            how = draw.choice([["scontrol", "requeue"], ["scancel", "--signal=KILL"]])
            job = draw.choice(training).job
            print(f"kill {number}: controller; {' '.join(how)} {job}", flush=True)
            subprocess.run([*how, job], env=slurm.environment, check=False)
            process = controller(slurm, words)
        assert process.wait(1800) == 0, log_of(sweep)
    finally:
        process.kill()
    seconds = time.monotonic() - began
    assert_no_trial_lost_or_twice(sweep, TRIALS, STEPS)
    states = Counter(trial.state.name for trial in study_of(sweep).trials)
    searched = train_steps(sweep)
    print(f"seed {seed}; {dict(states)}; {searched} steps in {seconds:.0f} s", flush=True)
    assert searched <= TRIALS * STEPS / 2
    grid = tmp_path / "grid"
    values = ",".join(f"{10 ** (-6 + 4 * i / (TRIALS - 1)):.4g}" for i in range(TRIALS))
    grid_words = [w for w in search_words(shards, grid, *more) if not w.startswith("search")]
    grid_words = [w for w in grid_words if not w.startswith("optimizer.lr=")]
    code = controller(slurm, [*grid_words, f"optimizer.lr={values}"]).wait(1800)
    assert code == 0, log_of(grid)
    best_of_grid = min(best_loss(grid / str(number)) for number in range(TRIALS))
    best = study_of(sweep).best_value
    print(f"search: best loss {best:.4f}; grid: {best_of_grid:.4f} in {train_steps(grid)} steps")
    assert best <= 1.05 * best_of_grid


def runs_that_train(cluster: Cluster, sweep: Path) -> list[Run]:
    """A job that is killed before its ranks have started counts as cancelled by somebody."""
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        runs = read_runs(sweep).runs
    finally:
        del os.environ["SLURM_CONF"]
    return [run for run in runs if run.alive and read_progress(run.folder).get("step", 0) > 0]


def best_loss(run: Path) -> float:
    """As the search computes it, of 6 steps each."""
    losses = [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]
    return min(sum(losses[i : i + 6]) / 6 for i in range(0, len(losses) - 5, 6))
