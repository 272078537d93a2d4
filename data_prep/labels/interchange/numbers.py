"""Numbers in text files: the fewest digits that give the same float32 again."""

import numpy as np


def plain(value: float) -> float:
    """The float with the fewest digits that is the same in float32."""
    return float(str(np.float32(value)))


def digits(value: float) -> str:
    """The text of `plain`, without an exponent."""
    return str(np.format_float_positional(np.float32(value), trim="-"))
