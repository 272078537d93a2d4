"""One rank of a run, as a task of a SLURM job: what Submitit calls on the node."""

import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.conf.failure_notes import FAILURE_FILE, read_failure_note
from evspan.launch.logging_config import configure_logging

SENT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NOTES = "attempts"  # below the run's folder: what each rank of an attempt that failed said


@dataclass
class Attempt:
    """Trains with these arguments of `evspan train`, from the newest checkpoint on. Requeued, it is called anew.

    A rank that fails leaves a note, from which `evspan.launch.slurm.requeue` decides, when all ranks have ended.
    """

    run: str
    argv: list[str]

    def __call__(self) -> None:
        rank = int(os.environ.get("SLURM_PROCID", 0))
        for number in SENT:  # until the trainer listens, there is nothing to save
            signal.signal(number, _leave)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        write_to(Path(self.run, "logs", f"rank-{rank:02d}.log"))
        configure_logging(rank, log_file=True)
        note = notes_of(self.run, os.environ) / f"rank-{rank:02d}.json"
        note.parent.mkdir(parents=True, exist_ok=True)
        os.environ[FAILURE_FILE] = failure = str(note.with_suffix(".txt"))
        _find_first_rank()
        code, told = 1, ""
        try:
            from evspan.launch.cli.train import main

            main(self.argv)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
            raise
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            traceback.print_exc()  # into the rank's log; Submitit's goes elsewhere
            sys.exit(1)
        finally:
            sys.stdout.flush()
            if code:
                note.write_text(
                    json.dumps(
                        {
                            "code": code,
                            "message": read_failure_note(Path(failure)).message or told,
                            "host": socket.gethostname(),
                        }
                    )
                )


def notes_of(run: str | Path, env: Any) -> Path:
    """The folder of the notes of this attempt: a requeued job keeps its id."""
    return Path(run, NOTES, f"{env.get('SLURM_JOB_ID', 0)}.{env.get('SLURM_RESTART_COUNT', 0)}")


def write_to(log: Path) -> None:
    """All that this process and its libraries say, from now on; attempts follow one another in one file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(STOPPED_EXIT_CODE)


def _find_first_rank() -> None:
    """Some clusters' node names mean nothing to the nodes; the address of the node that runs the batch script always does."""
    from evspan.pipeline.parallel.rank_env import first_host

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if "MASTER_ADDR" in os.environ or not nodes or not address:
        return
    try:
        socket.getaddrinfo(first_host(nodes), None)
    except OSError:
        os.environ["MASTER_ADDR"] = address
