"""How frames are stored: one byte per counted event, in the order of the frame's memory.

A frame has C * H * W cells, most of them 0. A byte of its code means: 0 to 253, skip this many
cells, then count one event in the next; 254, count one more event in the same cell; 255, skip 254
cells. In numpy a frame is

    step = np.append(np.arange(1, 255), [0, 254])           # cells that each byte advances
    cell = np.cumsum(step[code]) - 1
    frame = np.bincount(cell[code != 255], minlength=C * H * W).astype(np.uint8).reshape(C, H, W)

The last byte of a code counts an event: nothing is skipped after it.

A general compressor spends its time on moving and comparing zeros: tests/benchmarks/storage.py.
"""

import math
from typing import Any

import numpy as np
from llvmlite.ir import Constant, IntType
from numba import njit, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

AGAIN = 254  # code: one more event in the same cell
SKIP = 255  # code: skip STEP cells
STEP = 254
BLOCK = 1024  # words that are searched at a time
MEASURED = 1 << 20  # bytes whose steps are added in 32 bits


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Number of trailing zero bits of a uint64 word that is not 0; one instruction of the CPU."""

    def instruction(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], Constant(IntType(1), 1))

    return uint64(uint64), instruction


@njit(cache=True, nogil=True)
def _encode(words: NDArray[np.uint64], tail: NDArray[np.uint64], out: NDArray[np.uint8]) -> int:
    """Writes the code of a frame into `out`.

    Args:
        words: (W,) the first cells, eight per word, little-endian.
        tail: (K,) the cells that fill no word, one each.

    Returns:
        Bytes of code; -1 where `out` is too small.
    """
    n = 0  # bytes written
    after = 0  # first cell after the last one that was counted
    busy = np.empty(BLOCK, np.int64)
    for part, width in ((words, 8), (tail, 1)):
        for block in range(0, part.size, BLOCK):
            # Lists the words that are not 0, without a branch, which a CPU would mispredict.
            num_busy = 0
            for w in range(block, min(block + BLOCK, part.size)):
                busy[num_busy] = w
                num_busy += part[w] != 0
            for k in range(num_busy):
                word = part[busy[k]]
                base = busy[k] * width + (0 if width == 8 else 8 * words.size)
                while word != 0:
                    # Bits below the first byte that is not 0; numba passes the typing context.
                    shift = trailing_zeros(word) & np.uint64(0x38)  # type: ignore[call-arg]
                    count = np.int64((word >> shift) & np.uint64(0xFF))
                    word &= ~(np.uint64(0xFF) << shift)
                    cell = base + (np.int64(shift) >> 3)
                    gap = cell - after
                    if n + gap // STEP + count > out.size:
                        return -1
                    while gap >= STEP:
                        out[n] = SKIP
                        n += 1
                        gap -= STEP
                    out[n] = gap
                    n += 1
                    for _ in range(count - 1):
                        out[n] = AGAIN
                        n += 1
                    after = cell + 1
    return n


@njit(cache=True, nogil=True)
def _decode(code: NDArray[np.uint8], cells: NDArray[np.uint8]) -> bool:
    """Decodes a frame into `cells`.

    Args:
        code: (n,)
        cells: (C * H * W,) zeros.

    Returns:
        False where the code leads past the last cell or ends with a skip: it is no code of such a
        frame.
    """
    if code.size and code[-1] == SKIP:
        return False
    cell = -1
    for i in range(code.size):
        byte = code[i]
        if byte < AGAIN:
            cell += byte + 1
            if cell >= cells.size:
                return False
            cells[cell] = 1
        elif byte == SKIP:
            cell += STEP
        elif cell < 0 or cell >= cells.size:
            return False
        else:
            cells[cell] += 1
    return True


@njit(cache=True, nogil=True)
def _measure(
    code: NDArray[np.uint8],
    start: NDArray[np.int64],
    cells: int,
    advance: NDArray[np.int64],
) -> int:
    """Measures frames without decoding them; see `measure_frames`.

    Returns:
        The first frame that `_decode` refuses; -1: there is none.
    """
    for frame in range(start.size - 1):
        first = start[frame]
        last = start[frame + 1]
        if first < 0 or last < first or last > code.size:
            return frame
        if first == last:
            advance[frame] = 0
            continue
        # Without SKIP at the end, cells never fall and the last byte reaches the last cell.
        if code[first] == AGAIN or code[last - 1] == SKIP:
            return frame
        total = np.int64(0)
        for block in range(first, last, MEASURED):
            # A slice from 0 and 32 bits, so that the CPU adds several bytes at once.
            part = np.int32(0)
            measured = code[block : min(block + MEASURED, last)]
            for i in range(measured.size):
                byte = np.int32(measured[i])
                step = np.int32(byte + np.int32(1))
                step = np.int32(0) if byte == AGAIN else step
                step = np.int32(STEP) if byte == SKIP else step
                part = np.int32(part + step)
            total += part
        if total > cells:
            return frame
        advance[frame] = total
    return -1


@njit(cache=True, nogil=True)
def _gather(
    words: NDArray[np.uint64],
    per_word: int,
    rows: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """Copies the cells of a frame that are not 0; see `gather_cells`.

    Args:
        words: (C, H, W / per_word) the frame, `per_word` cells per word.
        rows: (H,) source row of each row of `out`, or -1.
        first, last: (W,) a source column goes to the columns first, ..., last - 1 of `out`.
        out: (C, H, W) zeros.
    """
    for plane in range(words.shape[0]):
        for y in range(rows.size):
            if rows[y] < 0:
                continue
            source = words[plane, rows[y]]
            target = out[plane, y]
            for w in range(source.size):
                word = source[w]
                while word != 0:
                    shift = trailing_zeros(word) & np.uint64(0x38)  # type: ignore[call-arg]
                    count = np.uint8((word >> shift) & np.uint64(0xFF))
                    word &= ~(np.uint64(0xFF) << shift)
                    column = per_word * w + (np.int64(shift) >> 3)
                    for x in range(first[column], last[column]):
                        target[x] = count


@njit(cache=True, nogil=True)
def _decode_moved(
    code: NDArray[np.uint8],
    first_row: NDArray[np.int64],
    last_row: NDArray[np.int64],
    first_column: NDArray[np.int64],
    last_column: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """Decodes a frame and moves its pixels; see `decode_moved`.

    Args:
        code: (n,) a code that `_measure` accepts.
        first_row, last_row: (H,) a source row goes to the rows first, ..., last - 1 of `out`.
        first_column, last_column: (W,) the same for columns.
        out: (C, H, W) zeros.
    """
    height = first_row.size
    width = first_column.size
    plane = 0
    y = 0
    x = np.int64(-1)
    for i in range(code.size):
        byte = code[i]
        if byte != AGAIN:
            x += np.int64(STEP) if byte == SKIP else np.int64(byte) + 1
            while x >= width:
                x -= width
                y += 1
                if y == height:
                    y = 0
                    plane += 1
            if byte == SKIP:
                continue
        for row in range(first_row[y], last_row[y]):
            for column in range(first_column[x], last_column[x]):
                out[plane, row, column] += 1


class FrameEncoder:
    """Encodes frames. Its buffer grows as needed."""

    def __init__(self) -> None:
        self.out = np.empty(1 << 20, np.uint8)

    def __call__(self, counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Encodes a frame.

        Args:
            counts: uint8 of any shape, C-contiguous.

        Returns:
            (n,) uint8; the next call overwrites it.
        """
        cells = counts.reshape(-1)
        whole = cells.size // 8 * 8
        words = cells[:whole].view("<u8")
        tail = cells[whole:].astype(np.uint64)
        n = _encode(words, tail, self.out)
        while n < 0:
            self.out = np.empty(2 * self.out.size, np.uint8)
            n = _encode(words, tail, self.out)
        return self.out[:n]


def decode_frames(
    code: NDArray[np.uint8], start: NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Decodes consecutive frames.

    Args:
        code: (M,) codes of n frames, one after the other.
        start: (n + 1,) index of the first byte of each frame, and the end.
        shape: of a frame.

    Returns:
        (n, *shape) uint8.

    Raises:
        ValueError: the bytes are no code of such frames.
    """
    frames = np.zeros((len(start) - 1, *shape), np.uint8)
    decode_into(code, start, frames)
    return frames


def decode_into(code: NDArray[np.uint8], start: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Decodes consecutive frames as `decode_frames`.

    Args:
        out: (n, ...) zeros; each frame is C-contiguous.
    """
    size = math.prod(out.shape[1:])
    for i, (first, last) in enumerate(zip(start.tolist(), start[1:].tolist(), strict=False)):
        inside = 0 <= first <= last <= code.size
        if not inside or not _decode(code[first:last], out[i].reshape(size)):
            raise ValueError(_no_code(i, len(out), out.shape[1:]))


def measure_frames(
    code: NDArray[np.uint8], start: NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[np.int64]:
    """Checks the codes of consecutive frames as `decode_frames` does, without decoding them.

    Args:
        code, start, shape: as in `decode_frames`.

    Returns:
        (n,) one more than the last cell with an event, in each frame; 0: the frame has none.

    Raises:
        ValueError: the bytes are no code of such frames.
    """
    advance = np.empty(len(start) - 1, np.int64)
    refused = _measure(code, start, math.prod(shape), advance)
    if refused >= 0:
        raise ValueError(_no_code(refused, len(advance), shape))
    return advance


@njit(cache=True, nogil=True)
def find_cell(
    code: NDArray[np.uint8], first: NDArray[np.int64], last: NDArray[np.int64], cell: int
) -> NDArray[np.int64]:
    """Finds the byte of each frame that reaches a cell.

    Args:
        code: (K,) codes that `measure_frames` accepts.
        first, last: (n,) a frame's bytes are first, ..., last - 1.
        cell: position in a frame. Each of the frames has an event there or further on.

    Returns:
        (n,) index of the first byte that leads to `cell` or beyond it.
    """
    found = np.empty(first.size, np.int64)
    for frame in range(first.size):
        reached = np.int64(-1)
        i = first[frame] - 1
        while reached < cell and i + 1 < last[frame]:
            i += 1
            byte = code[i]
            if byte == SKIP:
                reached += STEP
            elif byte != AGAIN:
                reached += np.int64(byte) + 1
        found[frame] = i
    return found


def _no_code(frame: int, num_frames: int, shape: tuple[int, ...]) -> str:
    return f"frame {frame} of {num_frames} does not decode to {shape}"


def decode_moved(
    code: NDArray[np.uint8],
    start: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """out[i, :, y, x] = frame i[:, rows[y], columns[x]], without decoding the frames elsewhere.

    Args:
        code, start: as in `decode_frames`, and checked by `measure_frames`.
        rows, columns: as in `gather_cells`.
        out: (n, C, H, W) zeros; each frame is C-contiguous.
    """
    first_row, last_row = _targets(rows)
    first_column, last_column = _targets(columns)
    for first, last, frame in zip(start[:-1].tolist(), start[1:].tolist(), out, strict=True):
        _decode_moved(code[first:last], first_row, last_row, first_column, last_column, frame)


def gather_cells(
    frame: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """out[:, y, x] = frame[:, rows[y], columns[x]], fast for frames with few cells that are not 0.

    Args:
        frame: (C, H, W) C-contiguous.
        rows: (H,) source row of each row of `out`; -1: the row stays 0. Those that are not -1 are
            adjacent, and only rise or only fall.
        columns: (W,) the same for columns.
        out: (C, H, W) C-contiguous, zeros.
    """
    first, last = _targets(columns)
    if frame.shape[2] % 8:
        _gather(frame.astype("<u8"), 1, rows, first, last, out)
    else:
        _gather(frame.view("<u8"), 8, rows, first, last, out)


def _targets(source: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pixels that show each source pixel: first, ..., last - 1.

    Args:
        source: (n,) as `columns` of `gather_cells`.

    Returns:
        first, last: (n,)
    """
    shown = np.flatnonzero(source >= 0)
    copies = np.bincount(source[shown], minlength=source.size)
    first = np.zeros(source.size, np.int64)
    first[source[shown[::-1]]] = shown[::-1]
    return first, first + copies
