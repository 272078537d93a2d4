"""Measures how long SLURM takes to start a run of two nodes, to save, to requeue and to continue.

    .venv/bin/python tests/benchmarks/requeue_times.py [--rounds 3]

Uses a throw-away SLURM (tests/support/slurm_cluster.py: root, slurm-wlm, munge) whose requeued jobs
wait 5 s; on a cluster this is two minutes by default (cred_expire), so the wait is a row of its
own. The run is `micro`, one lane of 4 frames over two ranks, on the cores of this machine.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.slurm_cluster import Cluster
from support.slurm_runs import events, evspan, keys, time_out, wait_for
from support.small_shards import write_small_shards

CLUSTER_PROGRAM = Path(__file__).parent.parent / "support" / "slurm_cluster.py"


def main() -> None:
    """Runs the rounds and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    keeper = subprocess.Popen(
        [sys.executable, str(CLUSTER_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = keeper.stdout.readline().strip()
        cluster = Cluster(Path(line.partition("=")[2]))
        with TemporaryDirectory(prefix="evspan-") as folder:
            counts = {"train": [60, 44, 52], "val": [12]}
            shards = write_small_shards(Path(folder) / "shards", counts)
            rounds = []
            for number in range(args.rounds):
                rounds.append(measure(cluster, shards, Path(folder) / str(number)))
    finally:
        keeper.stdin.close()
        keeper.wait(30)
    print("| from | to | seconds, median | all |\n|---|---|---|---|")
    for name in rounds[0]:
        values = [times[name] for times in rounds]
        start, _, end = name.partition(" -> ")
        all_values = " ".join(f"{value:.1f}" for value in values)
        print(f"| {start} | {end} | {median(values):.1f} | {all_values} |")


def measure(cluster: Cluster, shards: Path, run: Path) -> dict[str, float]:
    """Submits a run, sends it the signal of a time limit, and returns seconds by phase."""
    overrides = keys(
        shards, run, "training.max_steps=100000", "cluster.detach=true", "training.engine=deepspeed"
    )
    process = evspan(cluster, "submit", *overrides)
    assert process.wait(60) == 0
    wait_for(lambda: events(run, "running"))
    time.sleep(3)
    signalled = time.time()
    time_out(cluster, run)
    wait_for(lambda: len(events(run, "running")) == 2)
    cluster.end_jobs()
    submitted = json.loads((run / "submitted.json").read_text())["time"]
    first, second = events(run, "running")
    saved = events(run, "saved")[0]["time"]
    requeued = events(run, "requeued")[0]["time"]
    set_up = events(run, "start")[1]["time"]
    ranks_started = second["time"] - second["seconds"]
    return {
        "sbatch -> first step": first["time"] - submitted,
        "signal -> saved": saved - signalled,
        "saved -> SLURM asked to requeue": requeued - saved,
        "requeued -> ranks started again (SLURM's wait)": ranks_started - requeued,
        "ranks started -> training again": second["time"] - ranks_started,
        "of which imports and set-up": set_up - ranks_started,
    }


if __name__ == "__main__":
    main()
