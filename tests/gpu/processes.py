"""Starts the processes of `rank.py` and `simulated.py`, and reads their results."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gpu.rank import RESULT, Settings

ERROR_CHARACTERS = 400  # of a failed process's messages
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b", re.MULTILINE)


class ProcessFailedError(Exception):
    """A process ended without a result. details: all that it wrote to standard error."""

    def __init__(self, message: str, errors: str) -> None:
        super().__init__(f"{message}: {cause(errors)}")
        self.details = errors


def cause(errors: str) -> str:
    """The message of the last exception in a process's output; without one its end."""
    exceptions = list(EXCEPTION.finditer(errors))
    if not exceptions:
        return errors[-ERROR_CHARACTERS:]
    begin = exceptions[-1].start()
    return errors[begin : begin + ERROR_CHARACTERS]


@dataclass(frozen=True)
class Started:
    """A process that writes into temporary files: a full pipe would stop it."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]

    def wait(self, timeout: float) -> None:
        """Waits for the end.

        Args:
            timeout: seconds.

        Raises:
            ProcessFailedError: it failed, or did not end in time.
        """
        try:
            code = self.process.wait(max(1.0, timeout))
        except subprocess.TimeoutExpired:
            self.kill()
            raise ProcessFailedError(
                f"still running after {timeout:.0f} s", _text(self.errors)
            ) from None
        if code:
            raise ProcessFailedError(f"ended with code {code}", _text(self.errors))

    def result(self) -> dict[str, Any]:
        """What the process printed after RESULT. Call it after `wait`.

        Raises:
            ProcessFailedError: it printed none.
        """
        for line in reversed(_text(self.output).splitlines()):
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        raise ProcessFailedError("printed no result", _text(self.errors))

    def kill(self) -> None:
        """Ends the process if it is running."""
        self.process.kill()
        self.process.wait()


def run(kind: str, settings: Settings, timeout: float) -> dict[str, Any]:
    """Runs `rank.py` on one rank; returns its result.

    Raises:
        ProcessFailedError: it ended without one, or not in time.
    """
    started = _start_rank(kind, settings, {})
    started.wait(timeout)
    return started.result()


def run_ranks(kind: str, ranks: Sequence[Settings], timeout: float) -> dict[str, Any]:
    """Runs one process per rank on this machine; returns rank 0's result.

    Raises:
        ProcessFailedError: a rank failed, or they did not end in time.
    """
    port = str(_free_port())
    started = []
    for settings in ranks:
        variables = {
            "RANK": str(settings.rank),
            "WORLD_SIZE": str(settings.ranks),
            "LOCAL_RANK": str(settings.rank),
            "LOCAL_WORLD_SIZE": str(settings.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        started.append(_start_rank(kind, settings, variables))
    deadline = time.monotonic() + timeout
    try:
        while any(rank.process.poll() is None for rank in started):
            for rank in started:
                if rank.process.poll():
                    rank.wait(1.0)  # raises: the others wait for it
            if time.monotonic() > deadline:
                started[0].wait(1.0)
            time.sleep(0.2)
        for rank in started:
            rank.wait(1.0)
        return started[0].result()
    finally:
        for rank in started:
            rank.kill()


def start_simulation(
    folder: Path,
    *,
    train: int,
    val: int,
    seconds: float,
    size: tuple[int, int],
    downsample: int,
) -> Started:
    """Starts to write `folder`/shards. size: (height, width) of the sensor."""
    processes = max(1, min(train + val, len(os.sched_getaffinity(0)) - 1))
    numbers = [train, val, seconds, *size, downsample, processes]
    command = ["gpu.simulated", str(folder), *map(str, numbers)]
    return _start(command, {"CUDA_VISIBLE_DEVICES": ""})


def _start_rank(kind: str, settings: Settings, variables: dict[str, str]) -> Started:
    return _start(["gpu.rank", kind, json.dumps(asdict(settings))], variables)


def _start(module: list[str], variables: dict[str, str]) -> Started:
    """Starts `python -m`. variables: in addition to those of this process."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        env={**os.environ, **variables},
        stdout=output,
        stderr=errors,
    )
    return Started(process, output, errors)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
