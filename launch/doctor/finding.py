"""What a check of `evspan doctor` says."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

PASS, WARN, FAIL = "pass", "warn", "fail"
GRADES = (PASS, WARN, FAIL)  # the best first


class Finding(NamedTuple):
    """remedy: shown unless the check passes. values: for comparing the tasks of a job; as JSON."""

    check: str
    grade: str
    found: str
    remedy: str = ""
    values: dict[str, Any] = {}


Check = Callable[[], Finding]


def graded(value: float, *, enough: float, least: float) -> str:
    return PASS if value >= enough else WARN if value >= least else FAIL


def ask(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """One after the other; one that the machine refuses to answer has failed."""
    for name, check in checks.items():
        try:
            yield check()
        except OSError as error:
            yield Finding(
                name,
                FAIL,
                f"{error.filename or 'it'}: {error.strerror or error}",
                "have the machine looked at",
            )


def worst(findings: Sequence[Finding]) -> str:
    return max((f.grade for f in findings), key=GRADES.index, default=PASS)


def one_line(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def complaint(lines: Iterable[str]) -> str:
    """What went wrong, of what a command of SLURM's said on several lines; else the last line."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [
        re.sub(r"^[\w-]+: (error|fatal): ", "", line)
        for line in said
        if re.match(r"[\w-]+: (error|fatal): ", line)
    ]
    return one_line("; ".join(dict.fromkeys(errors or said[-1:])))


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]
