"""Whether the nodes read and decode a dataset as fast as training consumes it."""

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evspan.conf.text import plural
from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding, python_command
from evspan.launch.doctor.machine import start_process, wait_for

READ = "dataset"
DECODE = "decoding"
MODULE = "evspan.launch.doctor.data_task"
# Of torchrun's and SLURM's variables: the process is the only rank of a world of its own.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def start_measuring(
    work: Path, nodes: int, dataset: Path, overrides: Sequence[str], env: Mapping[str, str]
) -> subprocess.Popen[str]:
    """Starts the process that measures this node. The nodes begin to read at once."""
    command = python_command(MODULE, str(work), str(nodes), str(dataset), *overrides)
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port(env))}
    return start_process(command, {**env, **ALONE, **port})


def _port(env: Mapping[str, str]) -> int:
    """Another one than that of the job's ranks."""
    return 20_000 + int(env.get("SLURM_JOB_ID", os.getpid())) % 10_000


def data_findings(process: subprocess.Popen[str], ranks_per_node: int, nodes: int) -> list[Finding]:
    """The findings of a node. process: of `start_measuring`."""
    result = wait_for(process)
    if result.failure:
        remedy = (
            "correct --dataset (an output of evspan prep, on a file system of the nodes) or "
            "--config; where time or memory is short, measure a smaller step: size=..., "
            "training.batch_size=... or training.sequence_length=..."
        )
        return [Finding(READ, FAIL, result.failure, remedy)]
    values = json.loads(result.last_line)
    return [_reading(values, ranks_per_node, nodes), _decoding(values)]


def _reading(values: Mapping[str, Any], ranks_per_node: int, nodes: int) -> Finding:
    bytes_per_s = values["read_bytes"] / max(1e-9, values["read_s"])
    frames_per_s = bytes_per_s / max(1.0, values["frame_bytes"])
    needed = ranks_per_node * values["needed"]
    message = (
        f"{bytes_per_s / 1e6:.0f} MB/s ({_all_at_once(nodes)}) are {frames_per_s:.0f} frames/s; "
        f"the {ranks_per_node} ranks of a node train on {needed:.0f}"
    )
    remedy = (
        "copy the dataset to the nodes' own disks (cluster.setup), or spread its files over more "
        "servers (Lustre: lfs setstripe -c 4 on the folder before evspan prep)"
    )
    grade = PASS if frames_per_s >= needed else WARN
    threshold = f"{needed:.0f} frames/s or more"
    return Finding(READ, grade, message, remedy, {"frames_per_s": frames_per_s}, threshold)


def _all_at_once(nodes: int) -> str:
    return "one node" if nodes == 1 else f"all {nodes} nodes at once"


def _decoding(values: Mapping[str, Any]) -> Finding:
    needed = values["needed"]
    decoded = values["decoded"]
    cores = values["cores"]
    threads = math.ceil(needed / decoded)
    message = (
        f"{decoded:.0f} frames/s per core; a rank trains on {needed:.0f}, "
        f"and may use {plural(cores, 'core')}"
    )
    remedy = f"give each rank {threads + 1} cores or more: cluster.cpus_per_task={threads + 1}"
    grade = PASS if threads <= cores else WARN
    threshold = f"{needed / cores:.0f} frames/s per core or more"
    return Finding(
        DECODE, grade, message, remedy, {"decoded": decoded, "needed": needed}, threshold
    )
