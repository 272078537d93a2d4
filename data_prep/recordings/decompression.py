"""Decompresses LZ4 frames (.lz4) and Zstandard frames from memory into memory, with a limit.

LZ4's block format is decoded here, Zstandard by the library that `hdf5plugin` brings with it.
"""

import ctypes
import struct
from functools import cache
from pathlib import Path

import hdf5plugin
import numpy as np
import xxhash
from numba import njit
from numpy.typing import NDArray

LZ4_MAGIC = 0x184D2204
ZSTD_MAGIC = 0xFD2FB528
UNCOMPRESSED = 1 << 31  # flag of an LZ4 block's size
FIRST_BLOCK_SIZE = 4  # code of 64 KiB; each further code is four times as much
END_OF_INPUT = -1
BAD_OFFSET = -2
END_OF_OUTPUT = -3
DICTIONARY_BYTES = (0, 1, 2, 4)  # by Zstandard's code
SIZE_BYTES = (0, 2, 4, 8)


class CompressionError(ValueError):
    """Compressed data that is damaged, too large or of another kind."""


@njit(cache=True, nogil=True)
def _length(source: NDArray[np.uint8], i: int, first: int) -> tuple[int, int]:
    """A length of which `first` (0 to 15) is in the token, and the next index; or END_OF_INPUT.

    After 15 it goes on with the bytes 255, 255, ..., n, which are added.
    """
    total = first
    if first < 15:
        return total, i
    while i < source.size:
        byte = source[i]
        i += 1
        total += byte
        if byte != 255:
            return total, i
    return total, END_OF_INPUT


@njit(cache=True, nogil=True)
def _copy_match(
    source: NDArray[np.uint8], i: int, token: int, output: NDArray[np.uint8], size: int
) -> tuple[int, int]:
    """Repeats earlier output, as the offset at source[i:] and the token state.

    Returns:
        The next index, and the size of the output; both negative after a fault.
    """
    if i + 2 > source.size:
        return END_OF_INPUT, END_OF_INPUT
    offset = np.int64(source[i]) | np.int64(source[i + 1]) << 8
    if not 0 < offset <= size:
        return BAD_OFFSET, BAD_OFFSET
    match, i = _length(source, i + 2, token & 15)
    if i < 0:
        return i, i
    match += 4
    if size + match > output.size:
        return END_OF_OUTPUT, END_OF_OUTPUT
    for k in range(size, size + match):
        output[k] = output[k - offset]
    return i, size + match


@njit(cache=True, nogil=True)
def _block(source: NDArray[np.uint8], output: NDArray[np.uint8], size: int) -> int:
    """Decodes the block `source` to output[size:].

    Returns:
        The size of the output after it; negative: END_OF_INPUT, BAD_OFFSET, END_OF_OUTPUT.
    """
    i = 0
    while 0 <= i < source.size:
        token = int(source[i])
        literals, i = _length(source, i + 1, token >> 4)
        if i < 0 or i + literals > source.size:
            return END_OF_INPUT
        if size + literals > output.size:
            return END_OF_OUTPUT
        for k in range(literals):
            output[size + k] = source[i + k]
        i += literals
        size += literals
        if i == source.size:
            return size
        i, size = _copy_match(source, i, token, output, size)
    return size if size < 0 else END_OF_INPUT


def decompress_lz4(data: bytes, limit: int) -> NDArray[np.uint8]:
    """Decompresses one LZ4 frame.

    Args:
        limit: the most bytes of the result.

    Raises:
        CompressionError: it is no LZ4 frame, is damaged, or expands to more.
    """
    try:
        return _lz4(data, limit)
    except (struct.error, IndexError) as error:
        raise CompressionError("the LZ4 frame ends early") from error


def _lz4(data: bytes, limit: int) -> NDArray[np.uint8]:
    magic, flags, descriptor = struct.unpack_from("<IBB", data)
    if magic != LZ4_MAGIC or flags >> 6 != 1:
        raise CompressionError("it is no LZ4 frame")
    has_block_sums, has_size, has_sum, has_dictionary = (bool(flags & bit) for bit in (16, 8, 4, 1))
    header_end = 6 + 8 * has_size + 4 * has_dictionary
    if data[header_end] != xxhash.xxh32_intdigest(data[4:header_end]) >> 8 & 0xFF:
        raise CompressionError("the checksum of the LZ4 header differs")
    code = descriptor >> 4 & 7
    if has_dictionary or code < FIRST_BLOCK_SIZE:
        raise CompressionError("the LZ4 frame has a dictionary, or blocks of an unknown size")
    blocks = _lz4_blocks(data, header_end + 1, 4 * has_block_sums)
    capacity = len(blocks) << (8 + 2 * code)
    if has_size:
        capacity = struct.unpack_from("<Q", data, 6)[0]
        if capacity > limit:
            raise CompressionError(f"it expands to {capacity} bytes, more than {limit}")
    output = np.empty(min(capacity, limit), np.uint8)
    source = np.frombuffer(data, np.uint8)
    size = 0
    for start, end, is_compressed in blocks:
        size = _decoded_block(source[start:end], is_compressed, output, size)
    if has_sum:
        end = blocks[-1][1] if blocks else header_end + 1
        stored = struct.unpack_from("<I", data, end + 4 * has_block_sums + 4)[0]
        if stored != xxhash.xxh32_intdigest(output[:size].data):
            raise CompressionError("the checksum of the LZ4 frame differs")
    return output[:size]


def _lz4_blocks(data: bytes, at: int, sum_bytes: int) -> list[tuple[int, int, bool]]:
    """Start, end and whether it is compressed, of each block."""
    blocks: list[tuple[int, int, bool]] = []
    while True:
        (size,) = struct.unpack_from("<I", data, at)
        if size == 0:
            return blocks
        start = at + 4
        at = start + (size & ~UNCOMPRESSED)
        if at > len(data):
            raise CompressionError("an LZ4 block ends early")
        blocks.append((start, at, not size & UNCOMPRESSED))
        at += sum_bytes


def _decoded_block(
    block: NDArray[np.uint8], is_compressed: bool, output: NDArray[np.uint8], size: int
) -> int:
    """Appends a block to `output`; returns the size after it."""
    if not is_compressed:
        if size + block.size > output.size:
            raise CompressionError(f"it expands to more than {output.size} bytes")
        output[size : size + block.size] = block
        return size + block.size
    after = _block(block, output, size)
    if after == END_OF_OUTPUT:
        raise CompressionError(f"it expands to more than {output.size} bytes")
    if after < 0:
        raise CompressionError("an LZ4 block is damaged")
    return int(after)


def decompress_zstd(data: bytes, limit: int) -> NDArray[np.uint8]:
    """Decompresses one Zstandard frame that states its size.

    Args:
        limit: the most bytes of the result.

    Raises:
        CompressionError: it is no such frame, is damaged, or expands to more.
    """
    try:
        size = _zstd_size(data)
    except (struct.error, IndexError) as error:
        raise CompressionError("the Zstandard frame ends early") from error
    if size > limit:
        raise CompressionError(f"it expands to {size} bytes, more than {limit}")
    library = _zstd_library()
    output = np.empty(size, np.uint8)
    written = library.ZSTD_decompress(output.ctypes.data, size, data, len(data))
    if written != size:  # an error is a number close to 2**64
        raise CompressionError("the Zstandard frame is damaged")
    return output


@cache
def _zstd_library() -> ctypes.CDLL:
    """The filter of HDF5, which contains Zstandard's own functions.

    Raises:
        CompressionError: this installation has it without them.
    """
    for path in Path(hdf5plugin.PLUGIN_PATH).glob("libh5zstd.*"):
        try:
            library = ctypes.CDLL(str(path))
            decompress = library.ZSTD_decompress
        except (OSError, AttributeError):
            continue
        decompress.restype = ctypes.c_size_t
        decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
        return library
    raise CompressionError(
        "Zstandard is not in this installation of hdf5plugin. Install it with pip, or export the "
        "recording with LZ4"
    )


def _zstd_size(data: bytes) -> int:
    """The size of the decompressed data, from the frame's header."""
    magic, descriptor = struct.unpack_from("<IB", data)
    if magic != ZSTD_MAGIC:
        raise CompressionError("it is no Zstandard frame")
    is_single = bool(descriptor & 32)
    size_bytes = SIZE_BYTES[descriptor >> 6]
    if size_bytes == 0 and is_single:
        size_bytes = 1
    if not size_bytes:
        raise CompressionError("the Zstandard frame does not state its size")
    at = 5 + (not is_single) + DICTIONARY_BYTES[descriptor & 3]
    if at + size_bytes > len(data):
        raise CompressionError("the Zstandard frame ends early")
    size = int.from_bytes(data[at : at + size_bytes], "little")
    return size + 256 if size_bytes == 2 else size
