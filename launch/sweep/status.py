"""`evspan status`: what the runs of a sweep do. It changes nothing."""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.sweep.registry import Run, differing, look, span
from evspan.launch.sweep.state import State

CELL = 36  # characters, of all columns but the last
DESCRIPTION = """What the runs of a sweep do, or a single run: state, step, AP of the newest evaluation, time to the end
(evaluations not counted), node, how often it was requeued, its last error. It reads the runs' files and SLURM's queue;
sacct is not needed.

  waiting    in SLURM's queue, and why       saved      all was saved on a stop signal; started again, it continues
  running    (starting: no step done yet)    done, failed, cancelled
  requeued   waits again                     lost       neither in the queue nor ended"""
EXAMPLES = """examples:
  evspan status sweeps/lr
  evspan status sweeps/lr --watch           anew every few seconds, until no run can go on
  evspan status runs/demo --json"""


def table(
    rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), width: int | None = None
) -> list[str]:
    """Lines; the first row is the heading. right: columns of numbers. width: the last column ends there."""
    cells = [[*(cut(cell, CELL) for cell in row[:-1]), row[-1]] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
    return [cut(line, width) if width else line for line in lines]


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def headings(keys: Sequence[str]) -> list[str]:
    """The last words of dotted keys, as many as tell them apart."""
    names = []
    for key in keys:
        words = key.split(".")
        names.append(
            next(
                ".".join(words[-n:])
                for n in range(1, len(words) + 1)
                if n == len(words)
                or not any(
                    other != key and f".{other}".endswith("." + ".".join(words[-n:]))
                    for other in keys
                )
            )
        )
    return names


def decimals(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def lines_of(runs: Sequence[Run], width: int | None = None) -> list[str]:
    """The table, and how many runs are in which state."""
    keys = differing(runs)
    rows = [
        ["run", *headings(keys), "state", "step", "AP", "ETA", "node", "requeues", "last error"]
    ]
    for run in runs:
        state = run.state.value + (f" ({run.reason})" if run.reason else "")
        step = "" if run.step is None else f"{run.step}/{run.of}" if run.of else str(run.step)
        rows.append(
            [
                run.name,
                *(run.overrides.get(key, "") for key in keys),
                state,
                step,
                decimals(run.ap),
                "" if run.eta_s is None else span(run.eta_s),
                run.node,
                str(run.requeues),
                run.error,
            ]
        )
    for empty in [
        i for i in reversed(range(1, len(rows[0]))) if not any(row[i] for row in rows[1:])
    ]:
        for row in rows:
            del row[empty]
    numbers = [
        i for i, heading in enumerate(rows[0]) if heading in ("step", "AP", "ETA", "requeues")
    ]
    told = table(rows, right=numbers, width=width)
    if len(runs) > 1:
        counts = Counter(run.state for run in runs)
        told.append(
            f"{len(runs)} runs: {', '.join(f'{counts[state]} {state.value}' for state in State if counts[state])}"
        )
    return told


def as_json(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "overrides": run.overrides,
        "state": run.state.value,
        "reason": run.reason,
        "error": run.error,
        "job": run.job,
        "step": run.step,
        "of": run.of,
        "ap": run.ap,
        "loss": run.loss,
        "eta_s": None if run.eta_s is None else round(run.eta_s),
        "node": run.node,
        "requeues": run.requeues,
    }


def status(given: argparse.Namespace) -> None:
    if given.every < 1:
        raise UserError(
            f"--every is {given.every:g}; give 1 s or more: all users share SLURM's controller"
        )
    terminal = sys.stdout.isatty()
    while True:
        runs, note = look(given.path)
        if given.json:
            print(
                json.dumps(
                    {"path": str(given.path), "runs": [as_json(run) for run in runs], "note": note},
                    indent=1,
                )
            )
            return
        told = lines_of(runs, shutil.get_terminal_size().columns if terminal else None)
        if given.watch:
            told = [f"{given.path}  {time.strftime('%H:%M:%S')}", *told]
        before = "\033[H\033[2J" if given.watch and terminal else ""
        print(
            before
            + "\n".join(
                [*told, *([f"note: {note}; states are what the runs' files tell"] if note else [])]
            ),
            flush=True,
        )
        if not given.watch or not any(run.goes_on for run in runs):
            return
        time.sleep(given.every)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "evspan status",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder of a run or of a sweep")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="for programs")
    how.add_argument("--watch", action="store_true", help="show it anew, until no run can go on")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="S", help="seconds, with --watch (default: 5)"
    )
    given = parser.parse_args(argv)
    run_command(lambda: status(given))


if __name__ == "__main__":
    main()
