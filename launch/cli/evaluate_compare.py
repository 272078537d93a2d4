"""`evspan evaluate compare`: two evaluations of the same frames side by side."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from evspan.launch.cli.command import Parser, reported_errors

DESCRIPTION = """Two evaluations of the same frames side by side, with intervals. Bootstrap samples
of the recordings are drawn, the same ones for both, and scored. A difference is more than chance
where its interval excludes 0 (marked *). Boxes are still if their object has been slower than
evaluation.still_speed for evaluation.still_s or more, and moving if it has not. Boxes whose tracks
do not show that (no track, or a single box) are in neither group. Boxes outside a group, and
detections of them, are ignored."""
EXAMPLES = """examples:
  evspan evaluate compare runs/baseline/evaluation-val runs/attention/evaluation-val
  evspan evaluate compare runs/a/evaluation runs/b/evaluation --resamples 5000 --json > a_b.json"""


@dataclass(frozen=True)
class Options:
    """The command line. a, b: output folders of evaluations, or their metrics.json."""

    a: Path
    b: Path
    resamples: int
    seed: int
    confidence: float
    json: bool


def run(options: Options) -> None:
    """Compares, and prints a table or JSON."""
    from evspan.pipeline.evaluation.compare import CompareOptions, compare, open_evaluation, table

    a = open_evaluation(options.a)
    b = open_evaluation(options.b)
    summary = compare(
        a,
        b,
        CompareOptions(
            resamples=options.resamples, seed=options.seed, confidence=options.confidence
        ),
    )
    print(json.dumps(summary, indent=1) if options.json else table(summary, a, b))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan evaluate compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "a", type=Path, metavar="A", help="output folder of an evaluation, or its metrics.json"
    )
    parser.add_argument("b", type=Path, metavar="B", help="the one to compare with it")
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="number of bootstrap samples (default: 1000)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="FRACTION",
        help="of the intervals (default: 0.95)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def main(argv: list[str]) -> None:
    """The command."""
    parser = _parser()
    options = Options(**vars(parser.parse_args(argv)))
    if options.resamples < 1 or options.seed < 0 or not 0 < options.confidence < 1:
        parser.error(
            f"--resamples {options.resamples} must be 1 or more, --seed {options.seed} 0 or more, "
            f"and --confidence {options.confidence} between 0 and 1"
        )
    with reported_errors():
        run(options)
