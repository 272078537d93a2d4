"""The result of a check of `evspan doctor`."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PASS = "pass"
WARN = "warn"
FAIL = "fail"
GRADES = (PASS, WARN, FAIL)  # from best to worst
MAX_MESSAGE = 300  # characters
KEPT = "doctor.json"  # in the folder of runs: the findings of the last job


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: name of the check.
        grade: one of GRADES.
        message: what was measured.
        remedy: what to do; shown unless the check passes.
        values: JSON values by which the tasks of a job are compared.
        threshold: of what was measured; empty where nothing was.
    """

    check: str
    grade: str
    message: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    threshold: str = ""


Check = Callable[[], Finding]


def graded(value: float, *, enough: float, least: float) -> str:
    """PASS from `enough` on, WARN from `least` on, FAIL below."""
    if value >= enough:
        return PASS
    return WARN if value >= least else FAIL


def worst(findings: Sequence[Finding]) -> str:
    """The worst grade; PASS if there is no finding."""
    return max((finding.grade for finding in findings), key=GRADES.index, default=PASS)


def run_checks(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Runs the checks one after the other. A check that raises OSError has failed."""
    for name, check in checks.items():
        try:
            yield check()
        except OSError as error:
            reason = error.strerror or error
            message = f"{error.filename}: {reason}" if error.filename else str(reason)
            yield Finding(name, FAIL, message, "ask the machine's administrator")


def shorten(text: str, length: int = MAX_MESSAGE) -> str:
    """`text` on one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def error_summary(lines: Iterable[str]) -> str:
    """The error messages in the output of a SLURM command; the last line if it has none."""
    stripped = [line.strip() for line in lines if line.strip()]
    errors = []
    for line in stripped:
        match = re.match(r"[\w-]+: (error|fatal): ", line)
        if match:
            errors.append(line[match.end() :])
    return shorten("; ".join(dict.fromkeys(errors or stripped[-1:])))


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, "-m", module, *arguments]
