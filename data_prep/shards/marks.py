"""Recordings that `evspan prep verify` found damaged, in a file beside the manifest: the next `evspan prep` redoes them alone."""

import json
from pathlib import Path

from evspan.conf.errors import ShardError
from evspan.data_prep.shards.atomic import written_whole

MARKS = ".damaged"


def read_marks(output: Path) -> dict[str, str]:
    """split/recording -> what is wrong with it."""
    path = output / MARKS
    if not path.exists():
        return {}
    try:
        return {str(key): str(why) for key, why in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged ({error}). Delete it and run evspan prep verify {output} again"
        ) from error


def write_marks(output: Path, marks: dict[str, str]) -> None:
    path = output / MARKS
    if not marks:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as beside:
        beside.write_text(json.dumps(marks, indent=1, sort_keys=True) + "\n")
