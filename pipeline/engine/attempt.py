"""One start of a run: what its history tells of it, and what the starts before it have cost."""

import os
import socket
import time
from pathlib import Path

from evspan.pipeline.history import append, attempts, read, read_progress, slurm_job


class Attempt:
    """Written by rank 0. step: of the checkpoint that it begins with. of: the run's last step."""

    def __init__(self, run: Path, step: int, of: int) -> None:
        self.run, self.step, self.running = run, step, False
        events, progress = read(run), read_progress(run)
        self.number = attempts(events) + 1
        # The last that was heard of the run, and how far it was then.
        self.heard = max(
            [event["time"] for event in events if event["event"] not in ("requeued", "submitted")]
            + [progress.get("time", 0.0)]
        )
        self.reached = (
            max([event.get("step", 0) for event in events] + [progress.get("step", 0)])
            if step
            else 0
        )
        append(
            run,
            "start",
            step=step,
            of=of,
            attempt=self.number,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=slurm_job(),
        )

    def began_to_run(self) -> dict[str, float]:
        """Called after the first step; what TensorBoard shows of requeues."""
        self.running = True
        append(self.run, "running", step=self.step, seconds=round(seconds_since_start(), 2))
        told = {"run/requeues": float(self.number - 1)}
        if self.number > 1:
            told["run/seconds_lost"] = time.time() - self.heard
            told["run/steps_repeated"] = float(max(0, self.reached - self.step))
        return told


def seconds_since_start() -> float:
    """Of this process; Linux counts it in ticks since the machine's start."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
