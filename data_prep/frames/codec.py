"""How frames are stored: the few cells that counted anything, a byte each, in the order of the frame's memory.

Of a code's bytes, 0 to 253 mean: leave so many cells out, then count one event in the next; 254: one more event in the same
cell; 255: leave 254 cells out. So a byte stands for an event (of those that saturated counts keep), and in numpy a frame is

    step = np.append(np.arange(1, 255), [0, 254])           # how far each byte moves on
    cell = np.cumsum(step[code]) - 1
    frame = np.bincount(cell[code != 255], minlength=C * H * W).astype(np.uint8).reshape(C, H, W)

A general compressor spends its time on moving and comparing zeros: see tests/benchmarks/storage.py.
"""

import math

import numpy as np
from llvmlite.ir import Constant, IntType
from numba import njit, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

AGAIN, SKIP = 254, 255
STEP = 254  # cells that SKIP leaves out
BLOCK = 1024  # words looked through at a time


@intrinsic
def trailing_zeros(
    typing_context, word
):  # of a word that is not zero: one instruction, which numba has no function for
    def instruction(context, builder, signature, arguments):
        return builder.cttz(arguments[0], Constant(IntType(1), 1))

    return uint64(uint64), instruction


@njit(cache=True, nogil=True)
def _encode(words, tail, out):
    """Code of the cells `words` (uint64, eight cells each) and `tail` (uint64, a cell each) into `out`; its length, or -1: too
    small."""
    n, after = 0, 0  # bytes written, first cell after the last one counted
    busy = np.empty(BLOCK, np.int64)
    for part, width in ((words, 8), (tail, 1)):
        for block in range(0, part.size, BLOCK):
            # First which words are not zero, without a branch: which ones are is what no processor foresees.
            found = 0
            for w in range(block, min(block + BLOCK, part.size)):
                busy[found] = w
                found += part[w] != 0
            for k in range(found):
                word = part[busy[k]]
                base = busy[k] * width + (0 if width == 8 else 8 * words.size)
                while word != 0:
                    shift = trailing_zeros(word) & np.uint64(
                        0x38
                    )  # to the first byte that is not zero
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
def _decode(code, cells):
    """Add the code's counts to `cells` (uint8, zeros). False: it leads past them, so it is no code of such a frame."""
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
def _gather(words, per_word, rows, first, last, out):
    """Cell (rows[y], column) of each plane, `per_word` cells a word, to row y of `out`, from first[column] to last[column]."""
    for plane in range(words.shape[0]):
        for y in range(rows.size):
            if rows[y] < 0:
                continue
            source, target = words[plane, rows[y]], out[plane, y]
            for w in range(source.size):
                word = source[w]
                while word != 0:
                    shift = trailing_zeros(word) & np.uint64(0x38)
                    count = np.uint8((word >> shift) & np.uint64(0xFF))
                    word &= ~(np.uint64(0xFF) << shift)
                    column = per_word * w + (np.int64(shift) >> 3)
                    for x in range(first[column], last[column]):
                        target[x] = count


class FrameEncoder:
    """Frames -> codes; it keeps a buffer, which grows as needed."""

    def __init__(self) -> None:
        self.out = np.empty(1 << 20, np.uint8)

    def __call__(self, counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """counts: uint8, C-contiguous, of any shape -> (n,) uint8, which the next call overwrites."""
        cells = counts.reshape(-1)
        whole = cells.size // 8 * 8
        while (
            n := _encode(cells[:whole].view("<u8"), cells[whole:].astype(np.uint64), self.out)
        ) < 0:
            self.out = np.empty(2 * self.out.size, np.uint8)
        return self.out[:n]


def decode_frames(
    code: NDArray[np.uint8], start: NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """
    Args:
        code: of n frames, one after the other. start: (n + 1,) where each begins, and the end. shape: of a frame.
    Returns:
        (n, *shape) uint8
    Raises:
        ValueError: the bytes are no code of such frames.
    """
    frames = np.zeros((len(start) - 1, *shape), np.uint8)
    flat = frames.reshape(len(frames), math.prod(shape))
    for i, (first, last) in enumerate(zip(start.tolist(), start[1:].tolist(), strict=False)):
        if not 0 <= first <= last <= code.size or not _decode(code[first:last], flat[i]):
            raise ValueError(f"frame {i} of {len(frames)} does not decode to {shape}")
    return frames


def gather_cells(
    frame: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """out[:, y, x] = frame[:, rows[y], columns[x]], of the cells that are not zero: in a frame those are few.

    Args:
        frame, out: (C, H, W), C-contiguous; `out` zeros. rows: (H,), columns: (W,); -1: nothing is shown there. Columns that are
            not -1 neighbour each other, and only rise or only fall.
    """
    width = frame.shape[2]
    per_word = 1 if width % 8 else 8
    shown = np.flatnonzero(columns >= 0)
    last = np.bincount(columns[shown], minlength=width)
    first = np.zeros(width, np.int64)
    first[columns[shown[::-1]]] = shown[::-1]
    _gather(
        frame.view("<u8") if per_word == 8 else frame.astype("<u8"),
        per_word,
        rows,
        first,
        first + last,
        out,
    )
