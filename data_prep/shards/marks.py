"""Marks of damaged recordings: `evspan prep verify` writes them, `evspan prep` redoes these."""

import json
from pathlib import Path

from evspan.conf.errors import ShardError
from evspan.data_prep.shards.atomic import atomic_write

MARKS = ".damaged"


def read_marks(output: Path) -> dict[str, str]:
    """What is wrong, by split/recording."""
    path = output / MARKS
    if not path.exists():
        return {}
    try:
        return {str(key): str(reason) for key, reason in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged ({error}). Delete it and run evspan prep verify {output} again"
        ) from error


def write_marks(output: Path, marks: dict[str, str]) -> None:
    """Replaces the marks; without any, the file is removed."""
    path = output / MARKS
    if not marks:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(marks, indent=1, sort_keys=True) + "\n")
