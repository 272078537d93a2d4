"""`evspan report`: the runs of a sweep by AP, as text, as HTML, and as TensorBoard's HParams."""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.status import states_note
from evspan.launch.cli.table import format_table
from evspan.launch.sweep.report.summary import (
    SweepReport,
    highlights,
    result_rows,
    results_as_json,
    write_report,
)

DEFAULT_TENSORBOARD = "http://localhost:6006"
DESCRIPTION = """Ranks the runs of a sweep by the AP of their newest evaluation, and the trials of a
search by the best value of search.metric. Writes three
reports: a table as text; the same with curves, errors and requeues as PATH/report.html, which needs
no network and no other file; and for TensorBoard's HParams (tensorboard --logdir PATH) the
overrides that differ, AP, AP50, AP of small objects and the last loss. Later reports replace
earlier ones."""
EXAMPLES = """examples:
  evspan report sweeps/lr
  evspan report sweeps/lr --json | jq '.runs[0].metrics'
  evspan report sweeps/lr --tensorboard http://login1:6006"""


@dataclass(frozen=True)
class ReportOptions:
    """Options of `evspan report`."""

    path: Path
    tensorboard_url: str
    json: bool


def parse_options(argv: list[str] | None) -> ReportOptions:
    """Options from the arguments after `evspan report`; sys.argv for None."""
    parser = Parser(
        "evspan report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a run or of a sweep")
    parser.add_argument(
        "--tensorboard",
        default=DEFAULT_TENSORBOARD,
        metavar="URL",
        help=f"address of the page's links to TensorBoard (default: {DEFAULT_TENSORBOARD})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    return ReportOptions(args.path, args.tensorboard, args.json)


def report(options: ReportOptions) -> None:
    """Writes the reports and prints the table.

    Raises:
        UserError: there is no run, or the address is not one of http or https.
    """
    sweep_report = write_report(options.path, options.tensorboard_url)
    if options.json:
        print(json.dumps(results_as_json(sweep_report), indent=1))
        return
    print("\n".join(report_lines(sweep_report)))
    if sweep_report.page is not None:
        logdir = shlex.quote(str(options.path))
        print(f"{sweep_report.page}; HParams: tensorboard --logdir {logdir}")


def report_lines(sweep_report: SweepReport) -> list[str]:
    """The table, then the best run, failures and requeues."""
    results = sweep_report.results
    keys = sweep_report.keys
    rows = result_rows(results, keys, sweep_report.search)
    first_number = 1 + len(keys)  # the columns from AP up to step
    numbers = range(first_number, len(rows[0]) - 2)
    lines = format_table(rows, right_aligned=numbers)
    if sweep_report.search is not None:
        lines += sweep_report.search.lines()
    lines += highlights(results, keys, sweep_report.search)
    if sweep_report.note:
        lines.append(states_note(sweep_report.note))
    lines += [f"note: {line}" for line in sweep_report.not_written]
    return lines


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan report`."""
    with reported_errors():
        report(parse_options(argv))


if __name__ == "__main__":
    main()
