"""Files that a command would replace: they are kept unless --overwrite is given."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from evspan.conf.errors import UserError

OPTION = "--overwrite"


def add_overwrite_option(parser: argparse.ArgumentParser) -> None:
    """Adds --overwrite."""
    parser.add_argument(OPTION, action="store_true", help="replace files that exist already")


def require_new(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Checks that nothing is at these paths, unless it may be replaced.

    Raises:
        UserError: there is; names the first one and counts the others.
    """
    if overwrite:
        return
    existing = [path for path in paths if path.exists()]
    if not existing:
        return
    others = ""
    if len(existing) > 1:
        verb = "does" if len(existing) == 2 else "do"
        others = f", and so {verb} {len(existing) - 1} more"
    raise UserError(
        f"{existing[0]} exists already{others}. Give {OPTION} to replace, or name another place"
    )
