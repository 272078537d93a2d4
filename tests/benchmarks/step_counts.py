"""Counts what a training step asks of a GPU, on an emulated one.

    .venv/bin/python tests/benchmarks/step_counts.py --world 64 --sequence 8 --attention \\
        --precision bf16 --zero 1 --size base

Prints operators, host waits, copies between host and device, and collectives of one rank's step,
and the lines that cause the most of them. The counts of a step do not depend on the frame size, so
frames are small; `--full-frames` takes 360 x 640 without values (--no-values), for bytes and FLOP.
"""

import argparse
import tempfile
from dataclasses import fields
from pathlib import Path

TESTS = Path(__file__).parents[1]


def main() -> None:
    """Counts a step and prints the table."""
    import sys

    sys.path.insert(0, str(TESTS))
    from support.counted_step import SIZES, StepOptions, step_counts, write_shards

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--sequence", type=int, default=1, help="ranks per sequence")
    parser.add_argument("--exchange", choices=("auto", "transpose", "relay"), default="auto")
    parser.add_argument("--batch-norm", choices=("world", "sequence", "rank"), default="world")
    parser.add_argument("--dws-conv", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--engine", choices=("deepspeed", "plain"), default="deepspeed")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--lanes", type=int, default=2, help="per rank")
    parser.add_argument("--frames", type=int, default=4, help="per rank")
    parser.add_argument("--full-frames", action="store_true")
    parser.add_argument("--no-values", dest="values", action="store_false")
    parser.add_argument("--rows", type=int, default=12, help="lines of each kind")
    args = vars(parser.parse_args())
    rows = args.pop("rows")
    options = StepOptions(**{f.name: args[f.name] for f in fields(StepOptions)})
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder, "shards"), options)
        counts = step_counts(options, shards, Path(folder, "run"))
    print(options)
    print(counts.table(rows))


if __name__ == "__main__":
    main()
