"""One rank of a run, as a task of a SLURM job: the callable that Submitit pickles and calls."""

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import NamedTuple

from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import STOP_SIGNALS, STOPPED_EXIT_CODE
from evspan.conf.failure_notes import FAILURE_FILE, read_failure_note
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import printable
from evspan.launch.logging_config import configure_logging
from evspan.pipeline.parallel.rank_exit import end_process
from evspan.pipeline.time_records import record_allocation, this_allocation

logger = logging.getLogger(__name__)

JOB_END = "EVSPAN_JOB_END"  # seconds since 1970; the batch script sets both variables
SIGNAL_DELAY = "EVSPAN_SIGNAL_DELAY_S"  # cluster.signal_delay_s
# SLURM sends its signal up to this many seconds earlier than --signal says; its clock is coarse.
SIGNAL_EARLY_S = 90
NOTES = "attempts"  # below a run's folder: the notes of ranks that failed, by attempt


class RankNote(NamedTuple):
    """How a rank ended that did not end well. `evspan.launch.slurm.requeue` reads it.

    rank: 'rank-00'. message: the error in one line; may be empty. host: name of the node.
    """

    rank: str
    code: int
    message: str
    host: str


@dataclass
class RankTask:
    """Trains with the resolved config in the folder `run`, from the newest checkpoint on.

    SLURM starts it in every task of the job, and again after a requeue. A rank that fails leaves a
    RankNote.
    """

    run: str

    def __call__(self) -> None:
        """Train as one rank. Ends the process with the rank's exit code unless that is 0."""
        rank = int(os.environ.get("SLURM_PROCID", 0))
        # Until the trainer handles stop signals, there is nothing to save.
        for number in STOP_SIGNALS:
            signal.signal(number, _leave)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        redirect_output(Path(self.run, "logs", f"rank-{rank:02d}.log"))
        configure_logging(rank, log_file=True)
        if rank == 0:
            _record_allocation(self.run)
        folder = notes_folder(self.run, os.environ)
        folder.mkdir(parents=True, exist_ok=True)
        failure = folder / f"rank-{rank:02d}.txt"
        os.environ[FAILURE_FILE] = str(failure)
        _find_first_rank()
        exit_code, message = self._train()
        sys.stdout.flush()
        if exit_code == 0:
            return
        message = read_failure_note(failure).message or message
        note = RankNote(f"rank-{rank:02d}", exit_code, message, socket.gethostname())
        write_note(folder, note)
        end_process(exit_code)

    def _train(self) -> tuple[int, str]:
        """The exit code, and the message of an error that no command reports."""
        try:
            from evspan.conf.compose import CONFIG_FILE
            from evspan.launch.cli.command import raised_errors
            from evspan.launch.local.rank import run_rank

            with raised_errors():
                run_rank("train", Path(self.run, CONFIG_FILE))
        except SystemExit as end:
            if isinstance(end.code, int):
                return end.code, ""
            return 1 if end.code else 0, str(end.code or "")
        except BaseException as error:
            logger.exception("the rank failed")
            return 1, f"{type(error).__name__}: {error}"
        return 0, ""


def _record_allocation(run: str) -> None:
    allocation = this_allocation(ranks=int(os.environ.get("SLURM_NTASKS", 1)))
    if allocation is None:
        return
    try:
        record_allocation(run, allocation)
    except OSError as error:
        logger.warning("the start of this job is not recorded: %s", error)


def notes_folder(run: str | Path, env: Mapping[str, str]) -> Path:
    """The folder for the notes of this attempt. A requeued job keeps its id."""
    attempt = f"{env.get('SLURM_JOB_ID', 0)}.{env.get('SLURM_RESTART_COUNT', 0)}"
    return Path(run, NOTES, attempt)


def write_note(folder: Path, note: RankNote) -> None:
    """Write the note of a rank. Without space for it, the rank counts as one that left no note."""
    values = {"code": note.code, "message": note.message, "host": note.host}
    try:
        replace_file(folder / f"{note.rank}.json", json.dumps(values))
    except OSError as error:
        logger.warning("the end of this rank could not be noted: %s", error)


def read_notes(folder: Path) -> list[RankNote]:
    """The notes of an attempt, in the order of ranks, without those that are damaged."""
    notes = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            values = read_json_object(path)
            note = RankNote(
                path.stem, int(values["code"]), str(values["message"]), str(values["host"])
            )
        except (OSError, JsonFileError, KeyError, TypeError, ValueError) as error:
            print(f"evspan: {path} is not used: {printable(str(error))}", flush=True)
            continue
        notes.append(note)
    return notes


def redirect_output(log: Path) -> None:
    """Append all output of this process and its libraries to `log`, which all attempts share."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _leave(number: int, _: FrameType | None) -> None:
    early_s = seconds_early(number, os.environ)
    if not early_s:
        sys.exit(STOPPED_EXIT_CODE)
    again = Timer(early_s, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def seconds_early(number: int, env: Mapping[str, str]) -> float:
    """How many seconds SLURM has sent the signal of a time limit before cluster.signal_delay_s.

    It may be a minute. With a short limit, the ranks would never come to train. Zero for a signal
    that is in time, or that announces a preemption.
    """
    end = env.get(JOB_END, "")
    if number != signal.SIGUSR2 or not end.isdecimal():
        return 0.0
    early_s = int(end) - time.time() - int(env.get(SIGNAL_DELAY, 0))
    return early_s if 0 < early_s < SIGNAL_EARLY_S else 0.0


def _find_first_rank() -> None:
    """Set MASTER_ADDR where the nodes cannot resolve the name of the first node.

    The address of the node that runs the batch script, which is the first, always works.
    """
    from evspan.pipeline.parallel.rank_env import first_host

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if "MASTER_ADDR" in os.environ or not nodes or not address:
        return
    try:
        socket.getaddrinfo(first_host(nodes), None)
    except OSError:
        os.environ["MASTER_ADDR"] = address
