"""The findings of `evspan doctor` on a job, kept beside the runs."""

import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import plural
from evspan.launch.doctor.finding import FAIL, KEPT, WARN

MAX_BYTES = 1 << 20


class KeptFindings(NamedTuple):
    """Where the findings are, relative to a folder, and what they say in a line."""

    link: str
    summary: str


def find_kept(folder: Path) -> KeptFindings | None:
    """The findings in a folder of runs or the one above; None where there are none to read."""
    for place, link in ((folder, ""), (folder.absolute().parent, "../")):
        path = place / KEPT
        try:
            content = read_json_object(path, most_bytes=MAX_BYTES)
            return KeptFindings(link + quote(KEPT), _summary(content))
        except (OSError, JsonFileError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return None


def _summary(content: dict[str, Any]) -> str:
    grades = [str(check["grade"]) for check in content["checks"]]
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(content["time"])))
    failed = grades.count(FAIL)
    warned = grades.count(WARN)
    return f"{plural(len(grades), 'check')} on {day}, {failed} failed, {warned} to look at"
