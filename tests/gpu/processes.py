"""Starts the processes of `rank.py` and `simulated.py`, and reads their results."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu.rank import RESULT, Settings


class ProcessFailedError(Exception):
    """A process ended without a result."""


def start(kind: str, settings: Settings, **environment: str) -> subprocess.Popen[str]:
    """Starts `rank.py`. environment: variables beside those of this process."""
    command = [sys.executable, "-m", "gpu.rank", kind, json.dumps(asdict(settings))]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str], timeout: float) -> dict[str, Any]:
    """Waits for a process and returns its result.

    Args:
        timeout: seconds.

    Raises:
        ProcessFailedError: it ended without one, or not in time.
    """
    try:
        output, errors = process.communicate(timeout=max(1.0, timeout))
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        raise ProcessFailedError(f"still running after {timeout:.0f} s: {errors[-400:]}") from None
    for line in reversed(output.splitlines()):
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise ProcessFailedError(f"ended with code {process.returncode}: {errors[-400:]}")


def run_ranks(kind: str, ranks: Sequence[Settings], timeout: float) -> dict[str, Any]:
    """Runs one process per rank on this machine; returns rank 0's result."""
    port = str(_free_port())
    processes = []
    for settings in ranks:
        variables = {
            "RANK": str(settings.rank),
            "WORLD_SIZE": str(settings.ranks),
            "LOCAL_RANK": str(settings.rank),
            "LOCAL_WORLD_SIZE": str(settings.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(start(kind, settings, **variables))
    try:
        results = [result(process, timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return results[0]


def start_simulation(
    folder: Path,
    *,
    train: int,
    val: int,
    seconds: float,
    size: tuple[int, int],
    downsample: int,
) -> subprocess.Popen[str]:
    """Starts to write `folder`/shards. size: (height, width) of the sensor."""
    processes = max(1, min(train + val, len(os.sched_getaffinity(0)) - 1))
    numbers = [train, val, seconds, *size, downsample, processes]
    command = [sys.executable, "-m", "gpu.simulated", str(folder), *map(str, numbers)]
    return subprocess.Popen(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_shards(process: subprocess.Popen[str], folder: Path, timeout: float) -> Path:
    """Waits for `start_simulation`; returns the shards.

    Raises:
        ProcessFailedError: it failed or was not in time.
    """
    try:
        _, errors = process.communicate(timeout=max(1.0, timeout))
    except subprocess.TimeoutExpired:
        process.kill()
        raise ProcessFailedError(f"simulation still running after {timeout:.0f} s") from None
    if process.returncode:
        raise ProcessFailedError(
            f"simulation ended with code {process.returncode}: {errors[-400:]}"
        )
    return folder / "shards"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
