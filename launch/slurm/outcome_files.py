"""The outcome of each recording of a prep array: a JSON file in a folder of this user alone.

NUMBER.json has `entry`, the manifest's entry of the recording, or `error`: the names of its class
and of the classes above, its message, and for errors of files `errno` and `filename`. An error that
is no user's has its traceback as text in the message.
"""

import os
import socket
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any

from evspan.conf.errors import RecordingError, UserError
from evspan.conf.json_files import parse_json_object
from evspan.conf.private_files import (
    create_private_file,
    read_private_file,
    require_private_folder,
)
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.workers import Outcome, PrepJob

SUFFIX = ".json"
MOST_BYTES = 1 << 24  # of a file


class TaskError(Exception):
    """An error of the code in a task of the array; the message is its traceback."""


def outcome_file(folder: Path, number: int) -> Path:
    """The file with the outcome of job `number`."""
    return folder / f"{number}{SUFFIX}"


def finished_jobs(folder: Path) -> set[int]:
    """Numbers of the jobs that have an outcome file."""
    return {int(path.stem) for path in folder.glob(f"[0-9]*{SUFFIX}") if path.stem.isdecimal()}


def write_outcome(folder: Path, number: int, outcome: Outcome[PrepJob, RecordingEntry]) -> None:
    """Writes an outcome; the file appears whole or not at all."""
    values: dict[str, Any] = {}
    if outcome.error is not None:
        values["error"] = _described(outcome.error)
    elif outcome.value is not None:
        values["entry"] = asdict(outcome.value)
    temporary = folder / f".{number}.{socket.gethostname()}.{os.getpid()}"
    temporary.unlink(missing_ok=True)  # of a process that was killed
    create_private_file(temporary, dumps(values))
    os.replace(temporary, outcome_file(folder, number))


def read_outcome(folder: Path, number: int, job: PrepJob) -> Outcome[PrepJob, RecordingEntry]:
    """Reads what a task wrote about the job. A damaged file is an error of its recording.

    Raises:
        ForeignFileError: another user has written the file, or could have.
    """
    require_private_folder(folder)
    path = outcome_file(folder, number)
    content = read_private_file(path, most_bytes=MOST_BYTES)
    try:
        values = parse_json_object(content, str(path))
        if "error" in values:
            return Outcome(job, error=_rebuilt(values["error"]))
        return Outcome(job, RecordingEntry(**values["entry"]))
    except (UserError, TypeError, ValueError, KeyError) as error:
        return Outcome(
            job,
            error=RecordingError(
                f"{path}, which a SLURM task wrote, is damaged ({error}); run the same command "
                "again"
            ),
        )


def _described(error: Exception) -> dict[str, Any]:
    """JSON values of an error."""
    if isinstance(error, UserError):
        names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, UserError)]
        return {"classes": names, "message": str(error)}
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else str(error.filename)
        return {"errno": error.errno, "message": error.strerror or "", "filename": filename}
    return {"message": "".join(traceback.format_exception(error))}


def _rebuilt(values: dict[str, Any]) -> Exception:
    """The inverse of `_described`. Classes are searched by name among those of Evspan."""
    message = str(values["message"])
    if "errno" in values:
        return OSError(int(values["errno"]), message, values["filename"])
    known = {kind.__name__: kind for kind in _user_errors(UserError)}
    for name in values.get("classes", ()):
        if name in known:
            error = known[name].__new__(known[name])
            error.args = (message,)
            return error
    return TaskError(message)


def _user_errors(kind: type[UserError]) -> Iterator[type[UserError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _user_errors(subclass)
