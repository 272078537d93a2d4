"""Damages of a file, as a disk, a copy or a hand may cause them. `rng` chooses the place."""

import random
import shutil
from pathlib import Path


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_page(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    first = rng.randrange(len(data)) // 4096 * 4096
    page = data[first : first + 4096]
    data[first : first + 4096] = bytes(len(page))
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size - 1)])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def append_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def swap(path: Path, rng: random.Random) -> None:
    """With the same file of the checkpoint before; a pointer names that checkpoint."""
    folder = path.parent if path.parent.name == "checkpoints" else path.parent.parent
    *_, older, _ = sorted(folder.glob("step-*"))
    if path.parent == folder:
        path.write_text(f"{older.name}\n")
    else:
        shutil.copy(older / path.name, path)


DAMAGES = (flip_bit, zero_page, truncate, remove, append_bytes, empty, swap)
