"""Checksums in a shard that are verified whenever it is read: of frames, boxes and small columns.

    <recording>/frame_xxh3      (N,) uint64: of the code of each frame
    <recording>/box_xxh3        (N,) uint64: of the rows of `boxes` of each frame
    <recording>/ignore_xxh3     (N,) uint64: of the rows of `ignore` of each frame; only where there
                                are ignore regions
    <recording> attribute       index_xxh3: 16 hex digits, `index_digest`

All are xxh3-64. Shards of earlier versions have none of them: they are read without.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

FRAME_XXH3 = "frame_xxh3"
BOX_XXH3 = "box_xxh3"
INDEX_XXH3 = "index_xxh3"  # attribute
IGNORE_XXH3 = "ignore_xxh3"
# Of a recording with ignore regions, after INDEX_COLUMNS.
IGNORE_INDEX_COLUMNS = ("ignore_start", IGNORE_XXH3)
INDEX_COLUMNS: tuple[str, ...] = (
    "frame_start",
    "end_us",
    "box_start",
    "labelled",
    FRAME_XXH3,
    BOX_XXH3,
)


class Prepared(Protocol):
    """The fields of a recording's entry that `index_digest` covers, of `format.RecordingEntry`."""

    name: str
    split: str
    height: int
    width: int
    first_us: int
    group_xxh3: str


def row_checksums(rows: NDArray[Any], start: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The checksum of the rows of each frame.

    Args:
        rows: (M,) of any dtype, C-contiguous.
        start: (n + 1,) frame i has rows[start[i]:start[i + 1]].

    Returns:
        (n,) uint64.
    """
    data = rows.view(np.uint8).reshape(-1)
    offsets = (start * rows.dtype.itemsize).tolist()
    digest = xxhash.xxh3_64_intdigest
    sums = [digest(data[a:b].data) for a, b in pairwise(offsets)]
    return np.array(sums, np.uint64)


def first_changed(
    rows: NDArray[Any], start: NDArray[np.int64], expected: NDArray[np.uint64]
) -> int:
    """The first frame whose rows do not have the expected checksum; -1: all have it.

    It runs for every frame that is read: plain integers are faster here than arrays.

    Args:
        rows, start: as in `row_checksums`.
        expected: (n,) uint64.
    """
    data = rows.view(np.uint8).data
    size = rows.dtype.itemsize
    offsets = start.tolist()
    digest = xxhash.xxh3_64_intdigest
    for i, checksum in enumerate(expected.tolist()):
        if digest(data[offsets[i] * size : offsets[i + 1] * size]) != checksum:
            return i
    return -1


def index_digest(entry: Prepared, channels: int, columns: Mapping[str, NDArray[Any]]) -> str:
    """The checksum of what training reads of a recording besides its frames and boxes.

    It covers group_xxh3 (16 ASCII characters), split/name, then as int64 channels, height and width
    of a frame and first_us, then the bytes of INDEX_COLUMNS, and of IGNORE_INDEX_COLUMNS where
    there are ignore regions. So it also binds a shard to its manifest.

    Args:
        columns: the arrays of INDEX_COLUMNS, and of IGNORE_INDEX_COLUMNS or none of them, by name.
    """
    digest = xxhash.xxh3_64(entry.group_xxh3.encode())
    digest.update(f"{entry.split}/{entry.name}".encode("utf-8", "surrogatepass"))
    digest.update(np.array([channels, entry.height, entry.width, entry.first_us], "<i8").tobytes())
    names = INDEX_COLUMNS
    if IGNORE_XXH3 in columns:
        names += IGNORE_INDEX_COLUMNS
    for name in names:
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()
