"""Batches whose frames stay encoded until they are on a device: a byte an event, in one buffer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from evspan.pipeline.data.augment import Augmentation, source_maps
from evspan.pipeline.data.batch import Batch, BatchLabels
from evspan.pipeline.data.datasets import FrameCodes
from evspan.pipeline.data.expand import Shape, expand_frames, source_pixels
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes; a section of a buffer can be viewed as any dtype


class Section(NamedTuple):
    """A tensor in a buffer. offset: in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Packed(NamedTuple):
    """Tensors in one buffer, so that one copy moves all of them.

    buffer: (n,) uint8. layout: name -> section.
    """

    buffer: Tensor
    layout: dict[str, Section]

    def to(self, device: torch.device) -> "Packed":
        """A copy on `device`; the host does not wait for it where the buffer is pinned."""
        return self._replace(buffer=self.buffer.to(device, non_blocking=True))

    def tensors(self) -> dict[str, Tensor]:
        """Views of the buffer."""
        views = {}
        for name, (dtype, shape, offset) in self.layout.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            views[name] = self.buffer[offset : offset + size].view(dtype).view(shape)
        return views


def pack(arrays: Mapping[str, Sequence[NDArray[Any]]], *, pinned: bool) -> Packed:
    """Copies arrays into one buffer.

    Args:
        arrays: name -> the parts of one array, which are joined along their first dim; at least
            one.
        pinned: in page-locked memory, from which a GPU copies on its own.
    """
    layout = {}
    size = 0
    for name, parts in arrays.items():
        dtype = torch.from_numpy(np.empty(0, parts[0].dtype)).dtype
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        layout[name] = Section(dtype, shape, size)
        num_bytes = sum(part.nbytes for part in parts)
        size += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    target = buffer.numpy()
    for name, parts in arrays.items():
        offset = layout[name].offset
        for part in parts:
            target[offset : offset + part.nbytes].view(part.dtype)[:] = part.reshape(-1)
            offset += part.nbytes
    return Packed(buffer, layout)


def encode_lanes(
    runs: Sequence[FrameCodes | None],
    augmentations: Sequence[Augmentation],
    shape: Shape,
) -> dict[str, list[NDArray[Any]]]:
    """The frames of all lanes as arrays for `pack`; `expand` is the reverse.

    Args:
        runs: of each lane, the frames from the first on; None: it has none.
        augmentations: of each lane.
        shape: T, B, C, H, W. What the runs do not fill is zero.
    """
    _, lanes, channels, height, width = shape
    cells = channels * height * width
    codes = [np.zeros(0, np.uint8)]
    first = [np.zeros(0, np.int64)]
    begin = [np.zeros(0, np.int64)]  # where each frame begins among all T * B * C * H * W cells
    advance = [np.zeros(0, np.int64)]
    num_bytes = 0
    for lane, run in enumerate(runs):
        if run is None:
            continue
        has_events = run.advance > 0
        place = np.arange(len(run.advance)) * lanes + lane
        codes.append(run.code)
        first.append(run.start[:-1][has_events] + num_bytes)
        begin.append(place[has_events] * cells)
        advance.append(run.advance[has_events])
        num_bytes += len(run.code)
    begins = np.concatenate(begin)
    ends = begins + np.concatenate(advance)
    jump = begins - np.concatenate(([0], ends))[:-1]
    jump[:1] -= 1  # a byte that counts an event in the very first cell advances by 1, to cell 0
    arrays: dict[str, list[NDArray[Any]]] = {"code": codes, "first": first, "jump": [jump]}
    if any(augmentation != Augmentation() for augmentation in augmentations):
        maps = [source_maps(augmentation, height, width) for augmentation in augmentations]
        rows = np.stack([rows for rows, _ in maps])
        columns = np.stack([columns for _, columns in maps])
        nothing = height * width
        arrays["rows"] = [np.where(rows < 0, nothing, rows * width)]
        arrays["columns"] = [np.where(columns < 0, nothing, columns)]
    return arrays


def expand(tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """The frames that `encode_lanes` encoded.

    Args:
        tensors: its arrays, on any device.
        shape: T, B, C, H, W.

    Returns:
        (T, B, C, H, W) uint8, augmented.
    """
    source = None
    if "rows" in tensors:
        source = source_pixels(tensors["rows"], tensors["columns"])
    return expand_frames(tensors["code"], tensors["first"], tensors["jump"], shape, source)


class EncodedBatch(NamedTuple):
    """A `Batch` as it travels to a device.

    packed: the arrays of `encode_lanes`, starts, boxes, counts and regions.
    shape: T, B, C, H, W.
    labelled, following: as in `Batch`, which the detector reads on the CPU.
    """

    packed: Packed
    shape: Shape
    labelled: Tensor
    following: Tensor

    def to(self, device: torch.device) -> "EncodedBatch":
        """A copy on `device`, except what the detector reads on the CPU."""
        return self._replace(packed=self.packed.to(device))

    def expand(self) -> Batch:
        """The batch, on the device of the encoded one."""
        tensors = self.packed.tensors()
        return Batch(
            frames=expand(tensors, self.shape),
            starts=tensors["starts"],
            labelled=self.labelled,
            following=self.following,
            boxes=tensors["boxes"],
            counts=tensors["counts"],
            regions=tensors["regions"],
        )


def encode_batch(
    runs: Sequence[FrameCodes | None],
    augmentations: Sequence[Augmentation],
    shape: Shape,
    labels: BatchLabels,
    *,
    pinned: bool,
) -> EncodedBatch:
    """Encodes a batch.

    Args:
        runs, augmentations, shape: as in `encode_lanes`.
        labels: on the CPU.
        pinned: as in `pack`.
    """
    arrays = encode_lanes(runs, augmentations, shape)
    arrays["starts"] = [labels.starts.numpy()]
    arrays["boxes"] = [labels.boxes.numpy()]
    arrays["counts"] = [labels.counts.numpy()]
    arrays["regions"] = [labels.regions.numpy()]
    return EncodedBatch(pack(arrays, pinned=pinned), shape, labels.labelled, labels.following)
