"""`evspan cancel`: cancels the SLURM jobs of a run, or of all unfinished runs of a sweep."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.sweep.cancel import cancel_runs, describe_cancellation

DESCRIPTION = """Cancels the SLURM jobs of a run, or of all runs of a sweep that wait or run. The
run folders stay: submitted again, the runs continue from their newest checkpoints. It is not an
error if there is nothing to cancel."""
EXAMPLES = """examples:
  evspan cancel sweeps/lr/3
  evspan cancel sweeps/lr"""


@dataclass(frozen=True)
class CancelOptions:
    """Options of `evspan cancel`."""

    path: Path


def parse_options(argv: list[str] | None) -> CancelOptions:
    """Options from the arguments after `evspan cancel`; sys.argv for None."""
    parser = Parser(
        "evspan cancel",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a run or of a sweep")
    args = parser.parse_args(argv)
    return CancelOptions(args.path)


def cancel(options: CancelOptions) -> None:
    """Cancels the jobs and prints a line per run.

    Raises:
        UserError: there is no run, or SLURM does not answer.
    """
    print("\n".join(describe_cancellation(cancel_runs(options.path))))


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan cancel`."""
    with reported_errors():
        cancel(parse_options(argv))


if __name__ == "__main__":
    main()
