"""What SLURM's way costs a run of two nodes: from sbatch to the first step, from a signal to saved, requeued and training again.

    .venv/bin/python tests/benchmarks/requeue_times.py [--rounds 3]

On a throw-away SLURM (tests/support/slurm_cluster.py: root, slurm-wlm, munge) whose requeued jobs wait 5 s, a cluster's mostly two
minutes (cred_expire): that wait is told apart. micro, one lane of 4 frames over two ranks on the cores of this machine.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    keeper = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent.parent / "support" / "slurm_cluster.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        cluster = Cluster(Path(keeper.stdout.readline().strip().partition("=")[2]))
        with TemporaryDirectory(prefix="evspan-") as folder:
            shards = write_small_shards(
                Path(folder) / "shards", {"train": [60, 44, 52], "val": [12]}
            )
            rounds = [
                measured(cluster, shards, Path(folder) / str(number))
                for number in range(given.rounds)
            ]
    finally:
        keeper.stdin.close()
        keeper.wait(30)
    print("| from | to | seconds, median | all |\n|---|---|---|---|")
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        start, _, end = name.partition(" -> ")
        print(
            f"| {start} | {end} | {median(values):.1f} | {' '.join(f'{value:.1f}' for value in values)} |"
        )


def measured(cluster: Cluster, shards: Path, run: Path) -> dict[str, float]:
    process = evspan(
        cluster, "submit", *keys(shards, run, "training.max_steps=100000", "cluster.detach=true")
    )
    assert process.wait(60) == 0
    wait_for(lambda: events(run, "running"))
    time.sleep(3)
    signalled = time.time()
    time_out(cluster, run)
    wait_for(lambda: len(events(run, "running")) == 2)
    cluster.end_jobs()
    submitted = json.loads((run / "submitted.json").read_text())["time"]
    first, second = events(run, "running")
    saved, requeued, again = (
        events(run, name)[at]["time"] for name, at in (("saved", 0), ("requeued", 0), ("start", 1))
    )
    began = second["time"] - second["seconds"]
    return {
        "sbatch -> first step": first["time"] - submitted,
        "signal -> saved": saved - signalled,
        "saved -> SLURM asked to requeue": requeued - saved,
        "requeued -> ranks started again (SLURM's wait)": began - requeued,
        "ranks started -> training again": second["time"] - began,
        "of which imports and set-up": again - began,
    }


if __name__ == "__main__":
    main()
