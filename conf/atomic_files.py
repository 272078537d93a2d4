"""Replaces small text files as a whole."""

import os
from pathlib import Path


def replace_file(path: Path, text: str, *, sync: bool = False) -> None:
    """Writes a file that other processes read: they see the old content or the new one.

    Args:
        sync: whether the content is on the disk when this returns.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
