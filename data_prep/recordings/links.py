"""Files and links as they are now: a link that leads nowhere is never taken for a missing file."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.conf.text import plural, printable

# Nothing is there; every other error means that it cannot be read now.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
NAMED = 3  # links that a message names


def stat_of(path: Path) -> os.stat_result | None:
    """The status of what `path` leads to; None where it leads to nothing.

    Raises:
        OSError: it cannot be read now, such as EACCES, EIO or ESTALE.
    """
    try:
        return path.stat()
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise


def leads_nowhere(path: Path) -> bool:
    """Whether `path` is a link without a target.

    Raises:
        OSError: the target cannot be read now.
    """
    return path.is_symlink() and stat_of(path) is None


def require_targets(paths: Sequence[Path]) -> None:
    """Raises RecordingError that names links without a target, if there are any."""
    links = [path for path in paths if leads_nowhere(path)]
    if not links:
        return
    named = ", ".join(printable(f"{path} -> {os.readlink(path)}") for path in links[:NAMED])
    if len(links) > NAMED:
        named += f" and {len(links) - NAMED} more"
    raise RecordingError(
        f"{plural(len(links), 'link')} of the source to files that are not there: {named}. "
        "Nothing was changed. Mount the disk or fetch the files (git annex get) and run the same "
        "again, or remove the links"
    )
