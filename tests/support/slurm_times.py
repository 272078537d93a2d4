"""The time for which SLURM gave nodes to a run, by its own clock: what a report has to add up to."""

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.slurm_cluster import Cluster
from support.slurm_runs import job_of

POLL_S = 0.3


class AllocatedTime:
    """Start and end of each allocation of a run's job, as `scontrol show job` gives them.

    After a requeue, SLURM gives the time at which the nodes were free again as that of the
    submission.
    """

    def __init__(self, cluster: Cluster, run: Path) -> None:
        self.cluster = cluster
        self.run = run
        self.ends: dict[int, int] = {}  # by start
        self.queued: dict[int, int] = {}  # by start
        self.running: int | None = None  # start of the current allocation
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.ended.wait(POLL_S):
            if (self.run / "submitted.json").exists():
                self.poll()

    def poll(self) -> None:
        """Looks once."""
        environment = {**self.cluster.environment, "SLURM_TIME_FORMAT": "%s"}
        result = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job_of(self.run)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        values = dict(re.findall(r" (JobState|SubmitTime|StartTime|EndTime)=(\S+)", result.stdout))
        if not values:
            return
        if values["JobState"] == "RUNNING":
            start = int(values["StartTime"])
            if self.running not in (None, start):
                self.ends[self.running] = int(values["SubmitTime"])
            self.running = start
            self.queued[start] = int(values["SubmitTime"])
        elif self.running is not None and values["JobState"] != "COMPLETING":
            is_over = values["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
            self.ends[self.running] = int(values["EndTime" if is_over else "SubmitTime"])
            self.running = None

    @property
    def seconds(self) -> int:
        """Of all allocations that have ended."""
        return sum(end - start for start, end in self.ends.items())

    @property
    def queue_s(self) -> int:
        """From each submission or requeue to the start."""
        return sum(start - queued for start, queued in self.queued.items())


@contextmanager
def allocated_time(cluster: Cluster, run: Path) -> Iterator[AllocatedTime]:
    """Watches the job of a run from its submission on."""
    watched = AllocatedTime(cluster, run)
    watched.thread.start()
    try:
        yield watched
    finally:
        watched.ended.set()
        watched.thread.join()
        watched.poll()
