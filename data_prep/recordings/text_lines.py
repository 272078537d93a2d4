"""Parses lines of numbers, compiled: the events of a text file."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

MOST_DIGITS = 18  # of a number; an int64 holds them all
LARGEST_EXPONENT = 10_000
TIME = 0  # row of the times
IGNORED = 4  # target of a column that is none of t, x, y, p
# Faults.
NOT_A_NUMBER, TOO_FEW, TOO_MANY, NOT_WHOLE, TOO_LARGE = range(1, 6)
FAULTS = {
    NOT_A_NUMBER: "is not a number",
    TOO_FEW: "is missing",
    TOO_MANY: "follows the last column",
    NOT_WHOLE: "is not a whole number",
    TOO_LARGE: "is too large",
}
SPACE, TAB, RETURN, NEWLINE, COMMA, SEMICOLON = (ord(c) for c in " \t\r\n,;")
PLUS, MINUS, POINT, ZERO, LARGE_E, SMALL_E = (ord(c) for c in "+-.0Ee")
COMMENTS = (ord("#"), ord("%"))
HASH, PERCENT = COMMENTS


def _table(letters: str) -> NDArray[np.bool_]:
    """(256,) whether a byte is one of these."""
    table = np.zeros(256, np.bool_)
    table[list(letters.encode())] = True
    return table


IS_DIGIT = _table("0123456789")
ENDS_LINE = _table("\r\n")
ENDS_FIELD = _table("\r\n,; \t")


@njit(cache=True, nogil=True, inline="always")
def _exponent(text: NDArray[np.uint8], i: int) -> tuple[int, int, int]:
    """Reads e-12 from text[i] on, if there is one.

    Returns:
        The next index, the power of ten, and a fault or 0.
    """
    if text[i] != SMALL_E and text[i] != LARGE_E:
        return i, 0, 0
    i += 1
    falls = text[i] == MINUS
    if falls or text[i] == PLUS:
        i += 1
    if not IS_DIGIT[text[i]]:
        return i, 0, NOT_A_NUMBER
    exponent = 0
    while IS_DIGIT[text[i]]:
        exponent = min(exponent * 10 + int(text[i]) - ZERO, LARGEST_EXPONENT)
        i += 1
    return i, -exponent if falls else exponent, 0


@njit(cache=True, nogil=True, inline="always")
def _number(text: NDArray[np.uint8], i: int) -> tuple[int, int, int, int]:
    """Reads digits, perhaps with a sign, a point and an exponent, from text[i] on.

    The text ends with a newline.

    Returns:
        The next index, the mantissa, the power of ten, and a fault or 0.
    """
    negative = text[i] == MINUS
    if negative or text[i] == PLUS:
        i += 1
    mantissa = 0
    power = 0
    digits = 0  # that the mantissa has, without leading zeros
    found = False
    after_point = False
    while IS_DIGIT[text[i]] or (text[i] == POINT and not after_point):
        if text[i] == POINT:
            after_point = True
        elif digits < MOST_DIGITS:
            found = True
            mantissa = mantissa * 10 + (int(text[i]) - ZERO)
            digits += mantissa != 0
            power -= after_point
        elif not after_point:
            return i, mantissa, 0, TOO_LARGE
        i += 1
    if not found:
        return i, mantissa, 0, NOT_A_NUMBER
    i, exponent, fault = _exponent(text, i)
    return i, -mantissa if negative else mantissa, power + exponent, fault


@njit(cache=True, nogil=True, inline="always")
def _scaled(mantissa: int, power: int) -> tuple[int, bool, int]:
    """mantissa * 10**power, rounded to the nearest integer (half up).

    Returns:
        The integer, whether it is exact, and a fault or 0.
    """
    value = mantissa
    if value == 0:
        return value, True, 0
    if power >= 0:
        for _ in range(power):
            if abs(value) > 922_337_203_685_477_579:
                return value, False, TOO_LARGE
            value *= 10
        return value, True, 0
    if power < -MOST_DIGITS:
        return 0, False, 0
    divisor = 1
    for _ in range(-power):
        divisor *= 10
    whole = value // divisor
    rest = value - whole * divisor
    return whole + (rest >= divisor - rest), rest == 0, 0


@njit(cache=True, nogil=True, inline="always")
def _skip_separator(text: NDArray[np.uint8], i: int) -> int:
    """Blanks, and one comma or semicolon among them."""
    while text[i] == SPACE or text[i] == TAB:
        i += 1
    if text[i] == COMMA or text[i] == SEMICOLON:
        i += 1
        while text[i] == SPACE or text[i] == TAB:
            i += 1
    return i


@njit(cache=True, nogil=True, inline="always")
def _field(text: NDArray[np.uint8], i: int, target: int, time_power: int) -> tuple[int, int, int]:
    """Reads one column of a line.

    Returns:
        The next index, the value (0 of an ignored column), and a fault or 0.
    """
    if target == IGNORED:
        while not ENDS_FIELD[text[i]]:
            i += 1
        return i, 0, 0
    i, mantissa, power, fault = _number(text, i)
    if not fault and not ENDS_FIELD[text[i]]:
        fault = NOT_A_NUMBER
    if fault:
        return i, 0, fault
    if target == TIME:
        power += time_power
    value, exact, fault = _scaled(mantissa, power)
    if not fault and not exact and target != TIME:
        fault = NOT_WHOLE
    return i, value, fault


@njit(cache=True, nogil=True, inline="always")
def _line(
    text: NDArray[np.uint8],
    i: int,
    columns: NDArray[np.int64],
    time_power: int,
    event: NDArray[np.int64],
) -> tuple[int, int]:
    """Reads the columns of the line at text[i] into `event` (5,).

    Returns:
        A fault or 0, and its column.
    """
    for column in range(columns.size):
        if ENDS_LINE[text[i]]:
            return TOO_FEW, column
        i, value, fault = _field(text, i, columns[column], time_power)
        if fault:
            return fault, column
        event[columns[column]] = value
        i = _skip_separator(text, i)
    if not ENDS_LINE[text[i]]:
        return TOO_MANY, columns.size
    return 0, 0


@njit(cache=True, nogil=True)
def parse_lines(
    text: NDArray[np.uint8],
    columns: NDArray[np.int64],
    time_power: int,
    rows: NDArray[np.int64],
) -> tuple[int, int, int, int]:
    """Parses the lines of a text; blank lines and comments (#, %) are skipped.

    Args:
        text: (n,) bytes; the last one is a newline.
        columns: (k,) per column of the text the row that it goes to, or IGNORED.
        time_power: power of ten by which row TIME is multiplied; the result is rounded.
        rows: (4, m) the events t, x, y, p; m is at least the number of lines.

    Returns:
        The number of events, and a fault or 0, the index of its line and its column.
    """
    event = np.empty(IGNORED + 1, np.int64)
    n = 0
    i = 0
    while i < text.size:
        line = i
        while text[i] == SPACE or text[i] == TAB:
            i += 1
        if not ENDS_LINE[text[i]] and text[i] != HASH and text[i] != PERCENT:
            fault, column = _line(text, i, columns, time_power, event)
            if fault:
                return n, fault, line, column
            for row in range(IGNORED):
                rows[row, n] = event[row]
            n += 1
        while text[i] != NEWLINE:
            i += 1
        i += 1
    return n, 0, 0, 0
