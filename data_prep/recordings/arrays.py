"""Events that a program hands over in arrays, as a recording."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.columns import COLUMNS, LATEST_US, named_column, pixel
from evspan.data_prep.recordings.events import Events
from numpy.typing import NDArray

# Events, (t, x, y, p), or a structured array with these fields.
EventBlock: TypeAlias = Events | tuple[NDArray[Any], ...] | NDArray[np.void]
EXPECTED = (
    "Pass (t, x, y, p), arrays of one length, or a structured array with these fields; t in "
    "microseconds"
)


class ArrayRecording(Recording):
    """Blocks of events in the order of time, with the checks of every recording.

    `chunks()` reads the blocks once; they may come from a camera.

    Args:
        blocks: t in microseconds, integers; x, y: pixels; p: 0 or -1 darker, 1 brighter.
        height, width: of the sensor, in pixels.
    """

    format = "arrays"

    def __init__(self, blocks: Iterable[EventBlock], height: int, width: int) -> None:
        super().__init__(Path("events"), height, width)
        self.blocks = blocks

    def _decoded(self) -> Iterator[Events]:
        for number, block in enumerate(self.blocks):
            events = _events_of(block, f"block {number} of the events")
            if events.t.size:
                yield events


def is_block(source: object) -> bool:
    """Whether a value is one block of events, not an iterable of blocks."""
    is_columns = isinstance(source, tuple) and all(isinstance(c, np.ndarray) for c in source)
    is_records = isinstance(source, np.ndarray) and source.dtype.names is not None
    return is_columns or is_records


def _events_of(block: EventBlock, place: str) -> Events:
    """Raises RecordingError where a block is not what EXPECTED says."""
    columns = _columns_of(block, place)
    sizes = {column.shape for column in columns}
    if len(sizes) != 1 or columns[0].ndim != 1:
        raise RecordingError(f"{place} has arrays of the shapes {sorted(sizes)}. {EXPECTED}")
    for name, column in zip(COLUMNS, columns, strict=True):
        if column.dtype.kind not in "iub" and column.size:
            raise RecordingError(f"{place}: {name} is {column.dtype}, not integers. {EXPECTED}")
    t, x, y, p = columns
    if not t.size:
        return Events(*(column.astype(int) for column in columns))
    if max(int(t.max()), -int(t.min())) > LATEST_US:
        raise RecordingError(
            f"{place} has times from {t.min()} to {t.max()}, which are not microseconds. {EXPECTED}"
        )
    if int(p.max()) > 1 or int(p.min()) < -1:
        raise RecordingError(
            f"{place} has polarities from {p.min()} to {p.max()}; 0 or -1 is darker, 1 brighter"
        )
    return Events(np.ascontiguousarray(t, np.int64), pixel(x), pixel(y), (p > 0).astype(np.uint8))


def _columns_of(block: EventBlock, place: str) -> list[NDArray[Any]]:
    if isinstance(block, np.ndarray) and block.dtype.names is not None:
        fields: dict[str, NDArray[Any]] = {}
        for name in block.dtype.names:
            column = named_column(name)
            if column:
                fields.setdefault(column.name, block[name])
        if set(fields) == set(COLUMNS):
            return [fields[name] for name in COLUMNS]
    elif isinstance(block, tuple | list) and len(block) == len(COLUMNS):
        return [np.asarray(column) for column in block]
    raise RecordingError(f"{place} is of type {type(block).__name__}. {EXPECTED}")
