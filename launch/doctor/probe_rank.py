"""Prints what `evspan.pipeline.parallel.probe` measures, as one line of JSON.

torchrun --nproc-per-node 2 -m evspan.launch.doctor.probe_rank [TIMEOUT_S]

Also runs as a SLURM step of several tasks. Ranks without usable devices print the
versions of torch, CUDA and NCCL, and the reason as `device_error`.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from evspan.conf.errors import DeviceError
from evspan.launch.cli.command import run_command
from evspan.pipeline.parallel.probe import probe, versions

TIMEOUT_S = 45  # torch may wait twice as long


def main(argv: Sequence[str]) -> None:
    """argv: the seconds after which missing ranks are given up, or nothing."""
    timeout_s = int(argv[0]) if argv else TIMEOUT_S
    run_command(lambda: print(json.dumps(_measure(timeout_s)), flush=True))


def _measure(timeout_s: int) -> dict[str, Any]:
    try:
        return probe(timeout_s)
    except DeviceError as error:
        return {**versions(), "device_error": str(error)}


if __name__ == "__main__":
    main(sys.argv[1:])
