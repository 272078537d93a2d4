"""Writes .safetensors files from tensors where they are, without copies of them.

The format, https://huggingface.co/docs/safetensors: 8 bytes, the header's length; the header, JSON
with the dtype, shape and place of each tensor; the tensors' bytes.

safetensors' own `save` makes three copies in memory and holds the interpreter's lock meanwhile, for
a third of a second per 160 MB, so a training step would wait for a file that a thread writes. Its
`save_file` makes files that only their owner may read, and does not raise OSError on a full disk.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from evspan.pipeline.checkpoint_files import FileSum
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNED = 8  # bytes


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> FileSum:
    """Writes a .safetensors file.

    Args:
        tensors: of the dtypes in DTYPES. Contiguous ones on the CPU are written without a copy, and
            without an operator of torch, which in a thread would start threads of its own.
        header: text by key, which `safe_open(path).metadata()` returns.

    Returns:
        The file's checksum, of the bytes in memory: it does not depend on what the disk has.

    Raises:
        OSError: it cannot be written.
    """
    # The largest elements first, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    digest = xxhash.xxh3_64()
    size = 0
    with path.open("wb") as file:
        for part in _parts(dict(ordered), header):
            digest.update(part)
            file.write(part)
            size += len(part)
    return FileSum(size, digest.hexdigest())


def _parts(
    tensors: Mapping[str, Tensor], header: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    """What the file consists of, in order."""
    yield _header_bytes(tensors, header)
    for tensor in tensors.values():
        yield _as_bytes(tensor)


def _header_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None) -> bytes:
    """The length and the header. tensors: in the order of their bytes."""
    entries: dict[str, object] = {}
    if header:
        entries["__metadata__"] = dict(header)
    first = 0
    for name, tensor in tensors.items():
        last = first + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, last],
        }
        first = last
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    return struct.pack("<Q", len(text)) + text


def _as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
