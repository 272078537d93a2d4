"""The rows of a check, its table, and the time that is left."""

import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK = "ok"
FAILED = "FAILED"
SKIPPED = "skipped"
ERRORS = "errors.txt"
MOST_CHARACTERS = 400  # of the reason of a failure
MEASURED = ""  # a measurement that nothing is compared with

Value = float | int | str


@dataclass(frozen=True)
class Row:
    """One line of the table. values: name -> measurement. reason: of a failure or a skip."""

    part: str
    name: str
    status: str
    values: dict[str, Value] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        values = "  ".join(f"{name}={_text(value)}" for name, value in self.values.items())
        details = " ".join(text for text in (values, self.reason) if text)
        return f"{self.part:10} {self.name:58} {self.status:8} {details}".rstrip()


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Report:
    """Collects rows and prints each one when it is added.

    Args:
        seconds: that the whole check may take.
        output: folder of gpu_check.json, which is written again after every row, and errors.txt.
        machine: versions and names, for the JSON file.
    """

    def __init__(self, seconds: float, output: Path, machine: dict[str, Value]) -> None:
        self.started = time.monotonic()
        self.seconds = seconds
        self.output = output
        self.machine = machine
        self.rows: list[Row] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - self.elapsed

    def measured(self, part: str, name: str, **values: Value) -> None:
        """Adds a row that has no expectation."""
        self._add(Row(part, name, MEASURED, values))

    def compared(self, part: str, name: str, passed: bool, **values: Value) -> None:
        """Adds a row that passes or fails."""
        self._add(Row(part, name, OK if passed else FAILED, values))

    def failed(self, part: str, name: str, error: BaseException | str) -> None:
        """Adds a row for an error. errors.txt gets its traceback, or that of the process."""
        if isinstance(error, BaseException):
            details = getattr(error, "details", "") or "".join(traceback.format_exception(error))
            with (self.output / ERRORS).open("a") as file:
                file.write(f"== {part} {name}\n{details.rstrip()}\n\n")
            error = f"{type(error).__name__}: {error}"
        self._add(Row(part, name, FAILED, {}, " ".join(error.split())[:MOST_CHARACTERS]))

    def skipped(self, part: str, name: str, reason: str) -> None:
        """Adds a row for something that cannot run here."""
        self._add(Row(part, name, SKIPPED, {}, reason))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"[{self.elapsed:4.0f} s] {row}", flush=True)
        self.write()

    def write(self) -> Path:
        """Writes all rows so far as JSON; returns the path."""
        path = self.output / "gpu_check.json"
        contents = {"machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        path.write_text(json.dumps(contents, indent=1) + "\n")
        return path

    def with_status(self, status: str) -> Sequence[Row]:
        """The rows of a status."""
        return [row for row in self.rows if row.status == status]
