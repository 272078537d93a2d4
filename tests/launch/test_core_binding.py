"""`cluster.cpu_bind`: the threads and worker processes of a rank stay on the cores that SLURM gave it.

The other tests' throw-away SLURM binds nothing; this one has a cluster of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.slurm_cluster import ASIDE, Cluster, unavailable
from support.slurm_runs import events, evspan, keys, wait_for

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(unavailable()), reason="no throw-away SLURM"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores"),
]
SHARD_FRAMES = {"train": [60, 44, 52], "val": [12, 7]}
KEEP = """
import support.slurm_cluster as cluster
cluster.CONF = cluster.CONF.replace("TaskPlugin=task/none", "TaskPlugin=task/affinity")
cluster.keep()
"""


@pytest.fixture
def binding_cluster() -> Iterator[Cluster]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", KEEP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as keeper:
        assert keeper.stdin
        assert keeper.stdout
        line = keeper.stdout.readline().strip()
        assert line.startswith("export SLURM_CONF="), line
        yield Cluster(Path(line.partition("=")[2]))
        keeper.stdin.close()
        keeper.wait(120)


def affinities(process: psutil.Process) -> list[tuple[int, ...]]:
    """The cores of each thread of a process and of its descendants."""
    found = []
    for member in [process, *process.children(recursive=True)]:
        found += [tuple(sorted(os.sched_getaffinity(t.id))) for t in member.threads()]
    return found


def ranks(run: Path) -> list[psutil.Process]:
    """The processes of a run's ranks, without those that they have started."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or [])
        starts = f"submitted_task {run}/" in command and "srun" not in command
        if starts and "SLURM_PROCID" in (process.info["environ"] or {}):
            found.append(process)
    return [process for process in found if process.parent() not in found]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("bind", "cores"),
    [("map_cpu:1,0", {"0": (1,), "1": (0,)}), ("none", {"0": (0, 1), "1": (0, 1)})],
)
def test_all_of_a_rank_stays_on_its_cores(binding_cluster, shards, tmp_path, bind, cores):
    run = tmp_path / "run"
    words = [
        *keys(shards, run, "cluster.ranks_per_node=2", "training.max_steps=2000"),
        "training.num_workers=2",
        f"cluster.cpu_bind={bind}",
        "cluster.detach=true",
        f"cluster.partition={ASIDE}",
    ]
    command = evspan(binding_cluster, "submit", *words)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, f"{out}{err}"
    wait_for(lambda: events(run, "running") or events(run, "failed"), 200)
    found = {}
    threads = 0
    for process in ranks(run):
        of_rank = affinities(process)
        threads += len(of_rank)
        found[process.environ()["SLURM_PROCID"]] = set(of_rank)
    print(f"{bind}: {threads} threads of {len(found)} ranks on {found}")
    assert found == {rank: {own} for rank, own in cores.items()}
    assert threads > 4
