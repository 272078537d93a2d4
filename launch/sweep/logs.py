"""`evspan logs`: what the ranks of a run said, over all its attempts."""

import argparse
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.sweep.registry import Run, describe, find_runs, look

POLL_S = 0.5  # between looks at a log that grows
STATE_S = 5.0  # between questions whether the run goes on
DESCRIPTION = """What a run's ranks said, attempt after attempt (RUN/logs/rank-00.log). Rank 0 tells losses and AP."""
EXAMPLES = """examples:
  evspan logs sweeps/lr/3
  evspan logs sweeps/lr/3 --follow --lines 20
  evspan logs sweeps/lr/3 --all --lines 5"""


class Tail:
    """The lines of a file that grows, and may not be there yet."""

    def __init__(self, path: Path, before: str) -> None:
        self.path, self.before, self.at, self.rest = path, before, 0, b""

    def lines(self, *, last: bool = False) -> Iterator[str]:
        """New ones since the last call; one without its end is kept for the next, unless there is none (last)."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                for line in file:
                    self.at += len(line)
                    self.rest += line
                    if self.rest.endswith(b"\n"):
                        yield self._take()
        except FileNotFoundError:
            pass
        if last and self.rest:
            yield self._take()

    def _take(self) -> str:
        line, self.rest = self.rest, b""
        return self.before + line.decode(errors="replace").rstrip("\r\n")


def the_run(path: Path) -> Run:
    """
    Raises:
        UserError: `path` is no run, or holds several.
    """
    found = find_runs(path)
    if len(found) > 1 or found[0].folder != path:
        names = ", ".join(str(run.folder) for run in found[:5]) + (
            ", ..." if len(found) > 5 else ""
        )
        raise UserError(
            f"{path} is a sweep of {len(found)} run{'s' if len(found) > 1 else ''}; name one: {names}"
        )
    return look(path)[0][0]


def rank_of(log: Path) -> int:
    return int(log.stem.split("-")[1])


def logs_of(run: Path) -> list[Path]:
    """By rank."""
    return sorted(
        (p for p in (run / "logs").glob("rank-*.log") if re.fullmatch(r"rank-\d+\.log", p.name)),
        key=rank_of,
    )


def chosen(run: Run, given: argparse.Namespace) -> list[Tail]:
    """
    Raises:
        UserError: there is no such log, and none is waited for.
    """
    there = logs_of(run.folder)
    rank = given.rank or 0
    wanted = [p for p in there if given.all or rank_of(p) == rank]
    if not wanted and not (given.follow and run.goes_on):
        if there:
            raise UserError(
                f"{run.folder} has no log of rank {rank}; give one of {', '.join(str(rank_of(p)) for p in there)}"
            )
        told = f"{run.folder} has no logs: it is {describe(run)}"
        if not run.job:
            told += ". A run that was started on this machine speaks to its terminal only"
        elif run.goes_on:
            told += "; --follow waits for them"
        raise UserError(told)
    if given.all:
        return [Tail(p, f"[rank {rank_of(p)}] ") for p in wanted]
    return [Tail(wanted[0] if wanted else run.folder / "logs" / f"rank-{rank:02d}.log", "")]


def logs(given: argparse.Namespace) -> None:
    for name, number in (("--rank", given.rank), ("--lines", given.lines)):
        if number is not None and number < 0:
            raise UserError(f"{name} is {number}; give 0 or more")
    run = the_run(given.path)
    tails = chosen(run, given)
    for tail in tails:
        lines = tail.lines(last=not (given.follow and run.goes_on))
        for line in lines if given.lines is None else deque(lines, given.lines):
            print(line, flush=given.follow)
    if given.follow:
        follow(run, tails, given.all)


def follow(run: Run, tails: list[Tail], every_rank: bool) -> None:
    """Until the run has ended. Ranks whose log comes later are followed, too."""
    asked = time.monotonic()
    while run.goes_on:
        _print(tails)
        time.sleep(POLL_S)
        if every_rank:
            known = {tail.path for tail in tails}
            tails += [
                Tail(p, f"[rank {rank_of(p)}] ") for p in logs_of(run.folder) if p not in known
            ]
        if time.monotonic() - asked >= STATE_S:
            run, asked = look(run.folder)[0][0], time.monotonic()
    _print(tails, last=True)
    print(f"{run.folder}: {describe(run)}", flush=True)


def _print(tails: list[Tail], *, last: bool = False) -> None:
    for tail in tails:
        for line in tail.lines(last=last):
            print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "evspan logs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN", help="the folder of a run, such as one of a sweep"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="another one's than rank 0's")
    which.add_argument("--all", action="store_true", help="all ranks', each line with its rank")
    parser.add_argument(
        "--follow", "-f", action="store_true", help="go on with what comes, until the run has ended"
    )
    parser.add_argument(
        "--lines", "-n", type=int, metavar="N", help="begin with the last N (default: all)"
    )
    given = parser.parse_args(argv)
    try:
        run_command(lambda: logs(given))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 1
        )  # what is still held back goes nowhere at the end
        sys.exit(1)


if __name__ == "__main__":
    main()
