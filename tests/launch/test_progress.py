"""Progress bars: on a terminal only, below the lines of the log."""

import subprocess
import sys

from support.terminal import Terminal, screen

WORK = """
import logging, sys
from evspan.conf.progress import ProgressBar, progress
from evspan.launch.logging_config import configure_logging

configure_logging(int(sys.argv[1]))
logger = logging.getLogger("evspan.test")
for item in progress([1, 2, 3], "reading", unit="file"):
    logger.info("file %d", item)
with ProgressBar("training", 1000, done=400) as bar:
    bar.note("loss 1.25")
    bar.advance(100)
    logger.warning("half")
    with ProgressBar("evaluating", None) as inner:
        inner.advance(3)
        logger.info("inside")
logger.info("done")
"""
LINES = ["file 1", "file 2", "file 3", "warning: half", "inside", "done"]


def test_on_a_terminal_the_lines_of_the_log_stay_and_the_bars_go():
    with Terminal([sys.executable, "-c", WORK, "0"]) as terminal:
        assert terminal.wait() == 0
        output = terminal.output
    assert b"reading:" in output
    assert b"500/1000" in output
    assert b"loss 1.25" in output
    assert b"evaluating: 3" in output
    assert screen(output) == LINES


def test_another_rank_draws_nothing_on_the_same_terminal():
    with Terminal([sys.executable, "-c", WORK, "1"]) as terminal:
        assert terminal.wait() == 0
    assert screen(terminal.output) == ["warning: half"]


def test_elsewhere_there_are_lines_only():
    result = subprocess.run(
        [sys.executable, "-c", WORK, "0"], capture_output=True, text=True, timeout=120
    )
    assert (result.stdout + result.stderr).split("\n") == [
        *("file 1", "file 2", "file 3", "inside", "done", "warning: half", "")
    ]


def test_a_bar_that_cannot_be_written_ends_nothing():
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", WORK, "0"], stderr=full, timeout=120)
    assert result.returncode == 0
