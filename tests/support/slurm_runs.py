"""Runs submitted to the throw-away SLURM: commands, events and waiting."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evspan.pipeline.history import read
from support.slow_phase import write_slow_phases
from support.slurm_cluster import ASIDE, Cluster
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
STEPS = 60
START_S = 180.0  # from a requeue to a first step, with both cores busy


def keys(shards: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run whose frames are shared by two ranks, one on each node."""
    return [
        f"dataset.root={shards}",
        f"run_dir={run}",
        "size=micro",
        "model=maxvit_yolox/size_aware_attention",
        "model.head.num_classes=3",
        "training.batch_size=2",
        "training.sequence_length=4",
        "training.num_workers=1",
        "training.engine=plain",  # starts faster; some tests have the other one
        f"training.max_steps={STEPS}",
        "training.evaluate_every=0",
        "training.log_every=1",
        "checkpoint.every=5",
        "checkpoint.keep=2",
        "parallel.ranks=2",
        "parallel.sequence=2",
        "parallel.threads=1",
        "parallel.timeout_s=60",
        "cluster.ranks_per_node=1",
        "cluster.signal_delay_s=20",
        *more,
    ]


def submit_with_limit(
    cluster: Cluster, shards: Path, folder: Path, *more: str, minutes: int, phases: int
) -> list[Path]:
    """Submits a sweep whose runs meet their time limit. more: overrides.

    Run I of it is slow in PHASES[I]; they differ in nothing else that matters. The site's policy is
    SBATCH_EXPORT=NONE, and the path has signs that mean something to SLURM and Submitit.

    Returns:
        The folders of the runs.
    """
    sweep = folder / "100% of%j"
    sweep.mkdir(parents=True)
    hook = write_slow_phases(folder / "hook")
    words = [
        *keys(shards, sweep, *more),
        f"cluster.timeout_min={minutes}",
        "cluster.max_retries=9",
        "cluster.detach=true",
        f"cluster.partition={ASIDE}",
        f"cluster.environment=['PYTHONPATH={hook}']",
        "checkpoint.keep=" + ",".join(str(9 + number) for number in range(phases)),
    ]
    command = evspan(cluster, "sweep", *words, SBATCH_EXPORT="NONE")
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, f"{out}{err}"
    return [sweep / str(number) for number in range(phases)]


def wait_for_return(run: Path, phase: str, seconds: float) -> None:
    """Waits for the end of a run, which has met its time limit in this phase and has come back."""
    wait_for(lambda: events(run, "done") or events(run, "failed"), seconds)
    history = read(run)
    assert history[-1]["event"] == "done", history
    assert not events(run, "fault"), history
    reasons = [event.get("reason") for event in events(run, "requeued")]
    assert f"time limit reached while {phase}" in reasons, history
    output = next(run.parent.glob(f".submitit/*/{job_of(run)}_0_log.out")).read_text()
    assert f"time limit reached while {phase}; requeued" in output


def evspan(cluster: Cluster | None, *words: str, **variables: str) -> subprocess.Popen:
    """Starts an evspan command that polls SLURM twice a second. variables: of its environment."""
    environment = dict(cluster.environment if cluster else os.environ)
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import evspan.launch.slurm.submit_runs as o; o.POLL_S = 0.5\n"
            "from evspan.launch.cli.main import main; main()",
            *words,
        ],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(condition: Callable[[], Any], seconds: float = START_S) -> Any:
    """Waits until a condition holds. Returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not true after {seconds:g} s"
        time.sleep(0.05)
    return value


def job_of(run: Path) -> str:
    """The id of a run's job."""
    return json.loads((run / "submitted.json").read_text())["job"]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of that name in a run's history."""
    return [event for event in read(run) if event["event"] == name]


def losses(run: Path) -> dict[int, float]:
    """As TensorBoard shows them: the last value of each step."""
    return dict(_scalars(run, "loss/total"))


def scalar(run: Path, tag: str) -> list[float]:
    """The values of a TensorBoard scalar."""
    return [value for _, value in _scalars(run, tag)]


def _scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def time_out(cluster: Cluster, run: Path) -> None:
    """Sends the signal of a time limit; SLURM's own limits are whole minutes."""
    cluster.ask("scancel", "--signal=USR2", job_of(run))
