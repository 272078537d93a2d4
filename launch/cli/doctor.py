"""`evspan doctor`: checks this machine, SLURM's settings and the nodes of the cluster."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.atomic_files import replace_file
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.doctor.checks import DoctorOptions, Section, run_doctor
from evspan.launch.doctor.finding import FAIL, KEPT, PASS, WARN, Finding

CHECK_WIDTH = 18  # of the column with the names of the checks
DESCRIPTION = """Checks this machine, SLURM's settings if SLURM is installed and, with --nodes, the
nodes of a job: folder, limits, network, clocks, software, devices, and collectives in and between
nodes against what the interface should deliver. --dataset also measures how fast all nodes read and
decode it at once, against what training consumes. The findings of a job are kept in doctor.json of
the folder, which `evspan report` links. The exit code is 0 if no check failed."""
EXAMPLES = """examples:
  evspan doctor --folder runs                             # this machine, and SLURM's settings
  evspan doctor --folder runs --partition gpu --nodes 2 --gpus-per-node 4
  evspan doctor --nodes 2 --gpus-per-node 8 --cpus-per-task 12 --dataset /scratch/gen4 \\
      --config size=base
  evspan doctor --nodes 2 -- --qos=debug --constraint=a100   # options after -- are srun's"""


@dataclass(frozen=True)
class CommandOptions:
    """Options of `evspan doctor`."""

    doctor: DoctorOptions
    json: bool


class Row(NamedTuple):
    """A finding and where the check ran: here, or in a job."""

    where: str
    finding: Finding


def parse_options(argv: list[str] | None) -> CommandOptions:
    """Options from the arguments after `evspan doctor`; sys.argv for None."""
    parser = Parser(
        "evspan doctor",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="folder of the runs (default: the current one)",
    )
    parser.add_argument("--partition", default="", metavar="NAME", help="default: the cluster's")
    parser.add_argument(
        "--nodes",
        type=int,
        default=0,
        metavar="N",
        help="number of nodes to check in a job (default: no job)",
    )
    parser.add_argument(
        "--ranks-per-node", type=int, default=0, metavar="N", help="default: one per GPU, or one"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="N",
        help="GPUs that the job requests (default: none)",
    )
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        default=0,
        metavar="N",
        help="cores of a rank, as cluster.cpus_per_task; they limit how fast it decodes "
        "(default: SLURM's, mostly one)",
    )
    parser.add_argument(
        "--account", default="", metavar="NAME", help="account that the job is charged to"
    )
    parser.add_argument(
        "--time",
        type=int,
        default=10,
        metavar="MINUTES",
        help="time limit of the job (default: 10)",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="DIR",
        help="shards that all nodes read at once and train on for some steps",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the training that is measured on --dataset, as for evspan bench; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("srun", nargs="*", metavar="-- OPTION", help="further options of srun")
    args = parser.parse_args(argv)
    doctor_options = DoctorOptions(
        folder=args.folder,
        partition=args.partition,
        nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        account=args.account,
        time_min=args.time,
        srun_options=tuple(args.srun),
        dataset=args.dataset,
        overrides=tuple(args.config),
    )
    return CommandOptions(doctor_options, args.json)


def doctor(options: CommandOptions) -> int:
    """Runs the checks and prints them; returns the exit code.

    Raises:
        UserError: this process is one of several ranks.
    """
    with exit_on_sigterm(), closing(run_doctor(options.doctor, print_srun_line)) as results:
        rows = list(collect_rows(results, print_rows=not options.json))
    findings = as_json(rows)
    keep_findings(findings, options.doctor)
    if options.json:
        print(findings)
    else:
        print_totals(rows)
    return int(count_grade(rows, FAIL) > 0)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that the job is cancelled and the work folder removed."""
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def collect_rows(results: Iterable[Section | Finding], *, print_rows: bool) -> Iterator[Row]:
    """The findings as rows, printed as they come."""
    where = ""
    for result in results:
        if isinstance(result, Section):
            if print_rows:
                print_title(result.title, first=not where)
            where = result.where
            continue
        if print_rows:
            print_finding(result)
        yield Row(where, result)


def print_title(title: str, *, first: bool) -> None:
    """Prints the title of a section."""
    if not first:
        print()
    print(f"{title}\n", flush=True)


def print_finding(finding: Finding) -> None:
    """Prints a finding, and its remedy unless the check passed."""
    print(f"  {finding.grade}  {finding.check:{CHECK_WIDTH}}{finding.message}", flush=True)
    if finding.grade != PASS and finding.remedy:
        print(f"        {'':{CHECK_WIDTH}}-> {finding.remedy}", flush=True)


def print_srun_line(line: str) -> None:
    """Passes on a line that srun wrote to stderr."""
    print(line, file=sys.stderr, flush=True)


def count_grade(rows: list[Row], grade: str) -> int:
    """The number of findings with this grade."""
    return sum(row.finding.grade == grade for row in rows)


def print_totals(rows: list[Row]) -> None:
    """Prints how many checks failed, need attention and passed."""
    failed = count_grade(rows, FAIL)
    warned = count_grade(rows, WARN)
    passed = count_grade(rows, PASS)
    print(f"\ndoctor: {failed} failed, {warned} to look at, {passed} passed", flush=True)


def keep_findings(findings: str, options: DoctorOptions) -> None:
    """Writes the findings of a job, for `evspan report`; not where the folder cannot be written."""
    if options.nodes and os.access(options.folder, os.W_OK):
        with suppress(OSError):
            replace_file(options.folder / KEPT, findings + "\n")


def as_json(rows: list[Row]) -> str:
    """All findings as JSON, with the time."""
    checks = []
    for row in rows:
        finding = row.finding
        check = {
            "where": row.where,
            "check": finding.check,
            "grade": finding.grade,
            "found": finding.message,
            "threshold": finding.threshold,
            "remedy": finding.remedy if finding.grade != PASS else "",
        }
        checks.append(check)
    passed = count_grade(rows, FAIL) == 0
    content = {"time": round(time.time()), "passed": passed, "checks": checks}
    return json.dumps(content, indent=1, ensure_ascii=False)


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan doctor`."""
    with reported_errors():
        sys.exit(doctor(parse_options(argv)))


if __name__ == "__main__":
    main()
