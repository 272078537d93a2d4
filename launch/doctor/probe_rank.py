"""Prints what `evspan.pipeline.parallel.probe` measures, as one line of JSON.

torchrun --nproc-per-node 2 -m evspan.launch.doctor.probe_rank [TIMEOUT_S]

Also runs as a SLURM step of several tasks. A single process reports only the versions of torch
and CUDA.
"""

import json
import sys
from collections.abc import Sequence

from evspan.launch.cli.command import run_command
from evspan.pipeline.parallel.probe import probe

TIMEOUT_S = 45  # torch may wait twice as long


def main(argv: Sequence[str]) -> None:
    """argv: the seconds after which missing ranks are given up, or nothing."""
    timeout_s = int(argv[0]) if argv else TIMEOUT_S
    run_command(lambda: print(json.dumps(probe(timeout_s)), flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
