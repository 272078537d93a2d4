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
from support.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
STEPS = 60
START_S = 90.0  # from a requeue to a first step, with both cores busy


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


def evspan(cluster: Cluster | None, *words: str) -> subprocess.Popen:
    """Starts an evspan command that polls SLURM twice a second."""
    environment = dict(cluster.environment if cluster else os.environ)
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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


def time_out(cluster: Cluster, run: Path) -> None:
    """Sends the signal of a time limit; SLURM's own limits are whole minutes."""
    cluster.ask("scancel", "--signal=USR2", job_of(run))
