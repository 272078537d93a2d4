"""Processes that try to take the lock on one folder after the other, all at the same moment."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONTENDER = """
import sys
from evspan.conf.folder_lock import FolderInUseError, FolderLock
print("ready", flush=True)
for line in sys.stdin:
    folder, lock = line.strip(), None
    try:
        lock = FolderLock(folder, "evspan race")
        lock.__enter__()
        print("won", lock.holder.pid, flush=True)
    except FolderInUseError as error:
        lock = None
        print("lost", error, flush=True)
    sys.stdin.readline()  # until all have tried
    if lock:
        lock.__exit__(None, None, None)
    print("released", flush=True)
"""


class Contenders:
    """A number of processes; use it as a context."""

    def __init__(self, count: int) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", CONTENDER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]

    def __enter__(self) -> "Contenders":
        self._answers()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def race(self, folder: Path) -> list[str]:
        """The answer of each process: 'won PID', or 'lost MESSAGE'."""
        self._send(f"{folder}\n")
        answers = self._answers()
        self._send("\n")
        self._answers()
        return answers

    def _send(self, text: str) -> None:
        for process in self.processes:
            assert process.stdin
            process.stdin.write(text)
        for process in self.processes:
            assert process.stdin
            process.stdin.flush()

    def _answers(self) -> list[str]:
        answers = []
        for process in self.processes:
            assert process.stdout
            answers.append(process.stdout.readline().strip())
        return answers


def assert_one_winner(answers: Sequence[str]) -> None:
    """One has won, and every other one names it."""
    winners = [answer.split()[1] for answer in answers if answer.startswith("won ")]
    assert len(winners) == 1, answers
    for answer in answers:
        assert answer.startswith("won ") or f"process {winners[0]} on " in answer, answers
