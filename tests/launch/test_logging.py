"""The terminal shows plain lines; log files have timestamp, level and rank on every line."""

import logging
import os
import re
import subprocess
import sys

import pytest
from evspan.launch.logging_config import configure_logging, ensure_logging

logger = logging.getLogger("evspan.launch.test")
TORCHRUN = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "77"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


def log_everything() -> None:
    logger.debug("detail")
    logger.info("step 1: loss %.1f", 2.5)
    logger.warning("the disk is nearly full")
    logger.error("the disk is full")


def test_the_terminal_of_rank_0_shows_progress_and_problems(capsys):
    configure_logging(0)
    log_everything()
    assert capsys.readouterr() == (
        "step 1: loss 2.5\n",
        "warning: the disk is nearly full\nerror: the disk is full\n",
    )


def test_another_rank_shows_problems_only(capsys):
    configure_logging(3)
    log_everything()
    assert capsys.readouterr() == (
        "",
        "warning: the disk is nearly full\nerror: the disk is full\n",
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_a_log_file_has_timestamp_level_and_rank_on_every_line(capsys, rank):
    configure_logging(rank, log_file=True)
    log_everything()
    logger.info("AP\n  car  12.5\n  two-wheeler  3.0")
    out, err = capsys.readouterr()
    assert err == ""
    timestamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    texts = []
    for line in out.splitlines():
        match = re.fullmatch(rf"{timestamp} ([A-Z]+) rank {rank}: (.*)", line)
        assert match, line
        texts.append(match.groups())
    assert texts == [
        ("INFO", "step 1: loss 2.5"),
        ("WARNING", "the disk is nearly full"),
        ("ERROR", "the disk is full"),
        ("INFO", "AP"),
        ("INFO", "  car  12.5"),
        ("INFO", "  two-wheeler  3.0"),
    ]


def test_configured_again_it_prints_each_record_once(capsys):
    configure_logging(0)
    configure_logging(0)
    ensure_logging()
    logger.info("once")
    assert capsys.readouterr().out == "once\n"


def test_ensure_keeps_the_format_of_a_log_file(capsys):
    configure_logging(0, log_file=True)
    ensure_logging()
    logger.info("message")
    assert capsys.readouterr().out.endswith(" INFO rank 0: message\n")


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, True),
        ({**TORCHRUN, "RANK": "1"}, False),
        ({**STEP, "SLURM_PROCID": "1"}, False),
        ({**STEP, "SLURM_PROCID": "1", **TORCHRUN, "RANK": "0"}, True),
        ({"RANK": "1"}, True),  # left over: the command reports it
        ({"SLURM_PROCID": "1"}, True),
    ],
)
def test_the_rank_comes_from_the_launcher(capsys, monkeypatch, environment, shown):
    for name in (*TORCHRUN, *STEP, "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    configure_logging()
    logger.info("message")
    assert (capsys.readouterr().out == "message\n") is shown


def test_the_root_logger_does_not_print_a_record_again(capsys):
    configure_logging(0)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        logger.warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "warning: once\n"


def test_a_warning_with_a_traceback_has_it_in_the_log_file(capsys):
    configure_logging(2, log_file=True)
    try:
        raise ValueError("odd")
    except ValueError:
        logger.warning("could not read it", exc_info=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("WARNING rank 2: ValueError: odd")
    assert all(" WARNING rank 2: " in line for line in lines)


def test_every_line_of_a_ranks_log_has_timestamp_level_and_rank(tmp_path):
    """A rank on a node, whose run folder has no config: the error goes to the log only."""
    probe = (
        "import sys\nfrom evspan.launch.slurm.rank_task import RankTask\nRankTask(sys.argv[1])()"
    )
    environment = {**os.environ, "SLURM_PROCID": "1"}
    result = subprocess.run(
        [sys.executable, "-c", probe, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stdout == result.stderr == ""
    lines = (tmp_path / "logs" / "rank-01.log").read_text().splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"[\d-]+ [\d:,]+ ERROR rank 1: .*config.yaml.*", lines[0])


def test_a_closed_output_ends_the_command_instead_of_printing_logging_errors(monkeypatch, capfd):
    class ClosedPipe:
        def write(self, _: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            pass

    configure_logging(0)
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    with pytest.raises(BrokenPipeError):
        logging.getLogger("evspan.test").info("step 1")
    assert "Logging error" not in capfd.readouterr().err
