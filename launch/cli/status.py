"""`evspan status`: shows the state of a sweep's runs. It changes nothing."""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.table import format_table
from evspan.launch.output_streams import write_control
from evspan.launch.search.summary import search_as_json, summarise
from evspan.launch.sweep.chain_status import chain_rows
from evspan.launch.sweep.code_changes import code_changes, code_notes
from evspan.launch.sweep.rank_times import NOTE as RANKS_NOTE
from evspan.launch.sweep.rank_times import (
    RIGHT_ALIGNED,
    RanksOfRun,
    rank_rows,
    ranks_as_json,
    read_ranks,
    summary,
)
from evspan.launch.sweep.registry import RunEntry, RunList, describe_all, find_runs, read_chain
from evspan.launch.sweep.spikes import spike_lines
from evspan.launch.sweep.status import NUMBERS, as_json, status_rows, watch_runs
from evspan.pipeline.history import RANKS

DESCRIPTION = """Shows the runs of a sweep, or a single run: state, step, AP of the newest
evaluation, estimated time to the end (without evaluations), node, number of requeues, last error.
It reads the runs' files and SLURM's queue; sacct is not needed.

  waiting    in SLURM's queue, and why
  running    (starting: no step yet)
  requeued   waits for its next attempt
  saved      stopped by a signal after saving; start it again to continue
  lost       ended without a record, and not in the queue
  pruned     stopped by a search, with its checkpoint
  unknown    not submitted yet and no command does it now, or its files are damaged
  done, failed, cancelled

Below the runs: the chain of what they wait for and of commands that follow (after=FOLDER).

A note names the files of the checkout that have changed since jobs were submitted from it; the jobs
go on with the submitted code."""
EXAMPLES = """examples:
  evspan status sweeps/lr
  evspan status sweeps/lr --watch           repeat every few seconds until all runs have ended
  evspan status runs/demo --ranks           step times of its ranks; names slow ones
  evspan status runs/demo --json"""
CLEAR_SCREEN = "\033[H\033[2J"


@dataclass(frozen=True)
class StatusOptions:
    """Options of `evspan status`. interval_s: seconds between repetitions with --watch."""

    path: Path
    json: bool
    watch: bool
    ranks: bool
    interval_s: float

    def __post_init__(self) -> None:
        if self.interval_s < 1:
            raise UserError(
                f"--every is {self.interval_s:g}; give 1 s or more: all users share SLURM's "
                "controller"
            )


def parse_options(argv: list[str] | None) -> StatusOptions:
    """Options from the arguments after `evspan status`; sys.argv for None."""
    parser = Parser(
        "evspan status",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a run or of a sweep")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--watch", action="store_true", help="repeat until all runs have ended")
    parser.add_argument(
        "--ranks", action="store_true", help="show the step times of the run's ranks"
    )
    parser.add_argument(
        "--every",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between repetitions with --watch (default: 5)",
    )
    args = parser.parse_args(argv)
    if args.ranks and args.watch:
        parser.error("argument --ranks: not allowed with argument --watch")
    return StatusOptions(args.path, args.json, args.watch, args.ranks, args.every)


def status(options: StatusOptions) -> None:
    """Prints the state of the runs.

    Raises:
        UserError: there is no run; with --ranks, or it has logged no step.
    """
    if options.ranks:
        print_ranks(options)
    elif options.json:
        print_json(options.path, read_chain(options.path))
    elif options.watch:
        for run_list in watch_runs(options.path, options.interval_s):
            if sys.stdout.isatty():
                write_control(CLEAR_SCREEN)
            print(f"{options.path}  {time.strftime('%H:%M:%S')}")
            print_status(options.path, run_list)
    else:
        print_status(options.path, read_chain(options.path))


def print_ranks(options: StatusOptions) -> None:
    """Prints the ranks of each run: as JSON, or as a table. Those of a sweep may have none yet."""
    entries = find_runs(options.path)
    if len(entries) > 1:
        entries = [entry for entry in entries if os.path.exists(entry.folder / RANKS)]
        if not entries:
            raise UserError(
                f"no run in {options.path} has {RANKS}: no step was logged yet, or "
                "training.slow_rank_factor is 0"
            )
    by_run: list[tuple[RunEntry, RanksOfRun | UserError]] = []
    for entry in entries:
        try:
            by_run.append((entry, read_ranks(entry.folder)))
        except UserError as error:  # of one run of several: the others are shown
            if len(entries) == 1:
                raise
            by_run.append((entry, error))
    if options.json:
        runs = [_ranks_as_json(entry, ranks) for entry, ranks in by_run]
        print(json.dumps({"path": str(options.path), "runs": runs}, indent=1))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for entry, ranks in by_run:
        if isinstance(ranks, UserError):
            print(f"{entry.name}: {ranks}")
            continue
        print(f"{entry.name}: {summary(ranks)}")
        rows = rank_rows(ranks.ranks)
        print("\n".join(format_table(rows, right_aligned=RIGHT_ALIGNED, width=width)))
    print(RANKS_NOTE, flush=True)


def _ranks_as_json(entry: RunEntry, ranks: RanksOfRun | UserError) -> dict[str, Any]:
    values = {"problem": str(ranks)} if isinstance(ranks, UserError) else ranks_as_json(ranks)
    return {"folder": str(entry.folder), **values}


def print_json(path: Path, run_list: RunList) -> None:
    """Prints the runs as JSON."""
    changes = code_changes(run_list.runs)
    runs: list[dict[str, Any]] = []
    commands: list[dict[str, Any]] = []
    for run in run_list.runs:
        change = changes.get(run.name)
        row = {**as_json(run), "code_changed": change.files if change else []}
        (commands if run.is_command else runs).append(row)
    values: dict[str, Any] = {"path": str(path), "runs": runs, "note": run_list.note}
    if commands:
        values["commands"] = commands
    search = summarise(path, run_list.runs, with_importance=False)
    if search is not None:
        values["search"] = search_as_json(search)
    print(json.dumps(values, indent=1))


def print_status(path: Path, run_list: RunList) -> None:
    """Prints the runs as a table, and the chain that they are in as another one.

    On a terminal the lines are cut to the terminal's width.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    runs = [run for run in run_list.runs if not run.is_command]
    lines = []
    search = summarise(path, runs, with_importance=False)
    if runs:
        rows = status_rows(runs, search)
        headings = NUMBERS if search is None else (*NUMBERS, search.value_heading)
        numbers = [i for i, heading in enumerate(rows[0]) if heading in headings]
        lines = format_table(rows, right_aligned=numbers, width=width)
    if search is not None:
        lines += search.lines()
    elif len(runs) > 1:
        lines.append(describe_all(runs))
    elif runs:
        lines += spike_lines(runs[0].spikes)
    links = chain_rows(path, run_list.runs)
    if links:
        lines += format_table(links, right_aligned=(), width=width)
    lines += code_notes(run_list.runs)
    if run_list.note:
        lines.append(states_note(run_list.note))
    print("\n".join(lines), flush=True)


def states_note(note: str) -> str:
    """The line under a table of runs whose jobs could not be read from SLURM's queue."""
    return f"note: {note}; the states come from the runs' files"


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan status`."""
    with reported_errors():
        status(parse_options(argv))


if __name__ == "__main__":
    main()
