"""Runs on this machine, one after the other, as `evspan train` does each."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evspan.conf.errors import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE
from evspan.pipeline.history import append, read

if TYPE_CHECKING:
    from evspan.launch.sweep.submit import Planned

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run_here(plans: Sequence["Planned"]) -> int:
    """0 when all are done; 75 when one was stopped and saved, which ends the others' turn; else 1."""
    failed = 0
    for plan in plans:
        if (events := read(plan.run)) and events[-1]["event"] == "done":
            print(f"{plan.run}: done already")
            continue
        print(f"{plan.run}: {' '.join(plan.overrides)}", flush=True)
        if plan.config is not None and plan.config.cluster.dry_run:
            continue
        code, told = _train(plan.argv)
        if code in (STOPPED_EXIT_CODE, INTERRUPTED_EXIT_CODE) or code < 0:
            print(f"{plan.run}: stopped; the same command goes on")
            return abs(code)
        if code:
            failed += 1
            append(plan.run, "failed", step=0, message=told or f"exit code {code}", code=code)
    return int(failed > 0)


def _train(argv: Sequence[str]) -> tuple[int, str]:
    """(exit code, its error in one line). What it says is passed on as it comes; so are signals."""
    child = subprocess.Popen(
        [sys.executable, "-m", "evspan.launch", "train", *argv],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in STOPS}
    told = ""
    try:
        assert child.stderr is not None
        for line in child.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("error: "):
                told = line.removeprefix("error: ").strip()
        return child.wait(), told
    except KeyboardInterrupt:  # the terminal has told the child, too
        child.wait()
        return INTERRUPTED_EXIT_CODE, told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
