"""Codings of polarity in HDF5 recordings, as published files and tools write them."""

from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import RecordingError
from numpy.typing import NDArray

# What -1 becomes in an unsigned column of 1, 2, 4 and 8 bytes.
WRAPPED_MINUS_ONE = (255, (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1)
# The pair of values that a column contains, and which of them is brighter.
BRIGHTER = {(0, 1): 1, (-1, 1): 1, (0, 255): 255, **{(1, value): 1 for value in WRAPPED_MINUS_ONE}}
# Of a column with one value only: whether it is brighter. 255 alone may be either.
ALONE = {0: False, 1: True, -1: False, **dict.fromkeys(WRAPPED_MINUS_ONE[1:], False)}
NAMED = 6  # values that an error names


class PolarityCoding:
    """The coding of one recording.

    Attributes:
        values: what the column contains: one or two values, in order.
        brighter: the value of brighter events; None where all are darker.
    """

    def __init__(self, path: Path, values: list[int]) -> None:
        """Recognises the coding.

        Args:
            values: the first different values of the column, in order: none (of an empty
                recording), one, or more.

        Raises:
            RecordingError: they are not a known coding.
        """
        self.path = path
        self.values = values
        self.brighter: int | None = None
        if len(values) == 1 and values[0] in ALONE:
            self.brighter = values[0] if ALONE[values[0]] else None
        elif len(values) == 2 and (values[0], values[1]) in BRIGHTER:
            self.brighter = BRIGHTER[values[0], values[1]]
        elif values:
            raise self._refused(_listed(values))

    def _refused(self, found: str) -> RecordingError:
        return RecordingError(
            f"{self.path}: the polarities p are {found}. Known are 0 and 1, -1 and 1 (also where "
            "-1 is stored as 255, 65535 or 4294967295), and 0 and 255: convert the column"
        )

    def decode(self, column: NDArray[Any], first: int) -> NDArray[np.uint8]:
        """0 and 1 for the stored values.

        Args:
            column: (n,) of the events `first` and on.

        Raises:
            RecordingError: a value is none of the coding's.
        """
        if self.values in ([0, 1], [0], [1]) and column.dtype == np.uint8 and column.max() <= 1:
            return column
        if column.dtype == np.bool_:
            return column.view(np.uint8)
        known = column == self.values[0]
        for value in self.values[1:]:
            known |= column == value
        if not known.all():
            position = int(np.argmin(known))
            found = sorted({*self.values, *np.unique(column).tolist()})
            raise self._refused(
                f"{_listed(found)} (event {first + position} has {column[position]})"
            )
        if self.brighter is None:
            return np.zeros(column.size, np.uint8)
        is_brighter: NDArray[np.bool_] = column == self.brighter
        return is_brighter.view(np.uint8)


def _listed(values: list[int]) -> str:
    text = ", ".join(str(value) for value in values[:NAMED])
    return f"{text}, ..." if len(values) > NAMED else text
