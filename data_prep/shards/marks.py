"""Marks of damaged recordings: `evspan prep verify` writes them, `evspan prep` redoes these."""

import json
from pathlib import Path

from evspan.conf.errors import ShardError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.data_prep.hdf5_files import unavailable
from evspan.data_prep.shards.atomic import atomic_write
from evspan.data_prep.shards.format import SPLITS

MARKS = ".damaged"


def read_marks(output: Path) -> dict[str, str]:
    """What is wrong, by split/recording.

    Raises:
        ShardError: the file is damaged.
        UnavailableFileError: the file cannot be read now.
    """
    path = output / MARKS
    try:
        marks = read_json_object(path)
    except FileNotFoundError:
        return {}
    except JsonFileError as error:
        raise ShardError(
            f"{path} is damaged ({error}). Delete it and run evspan prep verify {output} again"
        ) from error
    except OSError as error:
        raise unavailable(path, error) from error
    for key in marks:
        if key.split("/")[0] not in SPLITS:
            raise ShardError(
                f"{path} is damaged ({key[:80]!r} is no recording). Delete it and run evspan prep "
                f"verify {output} again"
            )
    return {key: str(reason) for key, reason in marks.items()}


def write_marks(output: Path, marks: dict[str, str]) -> None:
    """Replaces the marks; without any, the file is removed."""
    path = output / MARKS
    if not marks:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(marks, indent=1, sort_keys=True) + "\n")
