"""Batches whose frames stay encoded until they are on a device: a byte an event, in one buffer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from evspan.data_prep.frames.codec import find_cell
from evspan.pipeline.data.augment import (
    DROPPED,
    NOISE,
    Augmentation,
    affine_coefficients,
    hot_cells,
    source_maps,
)
from evspan.pipeline.data.batch import Batch, BatchLabels
from evspan.pipeline.data.datasets import FrameCodes
from evspan.pipeline.data.expand import (
    Shape,
    affine_source,
    erase_patches,
    expand_frames,
    fill_cells,
    noise_cells,
    source_pixels,
)
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


class _Codes(NamedTuple):
    """The frames with events of one lane, among all bytes and cells of a batch.

    code: (K,) uint8.
    first: (n,) index of the first byte of each frame.
    begin: (n,) where the frame's first event counts from: the cell of its first byte is
        begin + the cells that the byte advances - 1.
    end: (n,) the same sum at its last byte.
    split: (m,) index of the bytes at which a frame with swapped polarities goes back to its begin.
    keys: (n,) drop << 32 | key of the random numbers, for `kept_events`.
    """

    code: NDArray[np.uint8]
    first: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    split: NDArray[np.int64]
    keys: NDArray[np.int64]


def encode_lanes(
    runs: Sequence[FrameCodes | None],
    augmentations: Sequence[Augmentation],
    shape: Shape,
    first_frames: Sequence[int] | None = None,
) -> dict[str, list[NDArray[Any]]]:
    """The frames of all lanes as arrays for `pack`; `expand` is the reverse.

    Args:
        runs: of each lane, the frames from the first on; None: it has none.
        augmentations: of each lane.
        shape: T, B, C, H, W. What the runs do not fill is zero.
        first_frames: position of each lane's first frame in its recording; None: 0.
    """
    cells = math.prod(shape[2:])
    starts = first_frames or [0] * len(runs)
    lanes = []
    num_bytes = 0
    for lane, run in enumerate(runs):
        if run is None:
            continue
        place = (np.arange(len(run.advance)) * shape[1] + lane) * cells
        lanes.append(_lane_codes(run, augmentations[lane], place, cells, num_bytes, starts[lane]))
        num_bytes += len(run.code)
    codes = _join(lanes)
    jump = codes.begin - np.concatenate(([0], codes.end))[:-1]
    jump[:1] -= 1  # a byte that counts an event in the very first cell advances by 1, to cell 0
    arrays: dict[str, list[NDArray[Any]]] = {
        "code": [lane.code for lane in lanes] or [codes.code],
        "first": [codes.first, codes.split],
        "jump": [jump, np.full(len(codes.split), -cells)],
    }
    if any(augmentation.drop for augmentation in augmentations):
        num_bytes_of = np.diff(np.append(codes.first, num_bytes))
        before = np.concatenate(([1], codes.keys + num_bytes_of))[:-1]
        arrays["thin"] = [codes.keys - before]
    arrays |= _maps(augmentations, *shape[3:])
    return arrays | _added_events(runs, augmentations, shape, starts)


def _lane_codes(
    run: FrameCodes,
    augmentation: Augmentation,
    place: NDArray[np.int64],
    cells: int,
    num_bytes: int,
    first_frame: int,
) -> _Codes:
    """The codes of a lane.

    Args:
        place: (n,) the first cell of each frame of the run.
        num_bytes: of the lanes before.
        first_frame: position of the run's first frame in its recording.
    """
    has_events = run.advance > 0
    first = run.start[:-1][has_events]
    advance = run.advance[has_events]
    begin = place[has_events]
    end = begin + advance
    split = np.zeros(0, np.int64)
    keys = np.zeros(len(first), np.int64)
    if augmentation.polarity_flip:
        # The first half of a frame moves up by half a frame, the second down.
        half = cells // 2
        reaches = advance > half
        begin = begin + half
        end = end + np.where(reaches, -half, half)
        last = run.start[1:][has_events]
        split = find_cell(run.code, first[reaches], last[reaches], half)
    if augmentation.drop:
        frames = first_frame + np.flatnonzero(has_events)
        keys = augmentation.frame_keys(DROPPED, frames) + (augmentation.drop << 32)
    return _Codes(run.code, first + num_bytes, begin, end, split + num_bytes, keys)


def _join(lanes: list[_Codes]) -> _Codes:
    """All but the codes, which `pack` joins."""
    none = np.zeros(0, np.int64)
    empty = _Codes(np.zeros(0, np.uint8), none, none, none, none, none)
    columns = zip(*(lane[1:] for lane in (empty, *lanes)), strict=True)
    return _Codes(empty.code, *map(np.concatenate, columns))


def _maps(
    augmentations: Sequence[Augmentation], height: int, width: int
) -> dict[str, list[NDArray[Any]]]:
    """The maps of pixels of all lanes; none where no pixel moves."""
    if not any(augmentation.moves or augmentation.patches for augmentation in augmentations):
        return {}
    maps = [source_maps(augmentation, height, width) for augmentation in augmentations]
    rows = np.stack([rows for rows, _ in maps])
    columns = np.stack([columns for _, columns in maps])
    nothing = height * width
    arrays: dict[str, list[NDArray[Any]]] = {
        "rows": [np.where(rows < 0, nothing, rows * width)],
        "columns": [np.where(columns < 0, nothing, columns)],
    }
    turned = [i for i, a in enumerate(augmentations) if not a.moves_rows_and_columns]
    if turned:
        arrays["turned"] = [np.array(turned)]
        arrays["affine"] = [
            affine_coefficients(augmentations[lane], height, width)[None] for lane in turned
        ]
    if any(augmentation.patches for augmentation in augmentations):
        erased_rows = np.zeros_like(rows)
        erased_columns = np.zeros_like(columns)
        for lane, augmentation in enumerate(augmentations):
            for i, (top, left, bottom, right) in enumerate(augmentation.patches):
                erased_rows[lane, top:bottom] |= 1 << i
                erased_columns[lane, left:right] |= 1 << i
        arrays["erased_rows"] = [erased_rows]
        arrays["erased_columns"] = [erased_columns]
    return arrays


def _added_events(
    runs: Sequence[FrameCodes | None],
    augmentations: Sequence[Augmentation],
    shape: Shape,
    first_frames: Sequence[int],
) -> dict[str, list[NDArray[Any]]]:
    """Which cells of the result get an event; none where no lane adds events."""
    cells = math.prod(shape[2:])
    keys = []
    counts = []
    begins = []
    hot = []
    for lane, (run, augmentation) in enumerate(zip(runs, augmentations, strict=True)):
        if run is None or not augmentation.adds_events:
            continue
        frames = np.arange(len(run.advance))
        places = (frames * shape[1] + lane) * cells
        if augmentation.noise:
            keys.append(augmentation.frame_keys(NOISE, first_frames[lane] + frames))
            counts.append(np.full(len(frames), augmentation.noise))
            begins.append(places)
        if augmentation.hot:
            hot.append((places[:, None] + hot_cells(augmentation, shape[2:])).reshape(-1))
    arrays: dict[str, list[NDArray[Any]]] = {}
    if keys:
        most = max(augmentation.noise for augmentation in augmentations)
        arrays = {"noise_keys": keys, "noise_counts": counts, "noise_begins": begins}
        arrays["noise_index"] = [np.arange(most)]
    if hot:
        arrays["hot"] = hot
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
    if source is not None and "affine" in tensors:
        affine = affine_source(tensors["affine"], *shape[3:])
        source.index_copy_(0, tensors["turned"], affine)
    if source is not None and "erased_rows" in tensors:
        source = erase_patches(source, tensors["erased_rows"], tensors["erased_columns"])
    frames = expand_frames(
        tensors["code"], tensors["first"], tensors["jump"], shape, source, tensors.get("thin")
    )
    if "noise_keys" in tensors:
        names = ("noise_keys", "noise_counts", "noise_begins", "noise_index")
        keys, counts, begins, index = (tensors[name] for name in names)
        fill_cells(frames, noise_cells(keys, counts, begins, index, math.prod(shape[2:])))
    if "hot" in tensors:
        fill_cells(frames, tensors["hot"])
    return frames


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
    first_frames: Sequence[int] | None = None,
) -> EncodedBatch:
    """Encodes a batch.

    Args:
        runs, augmentations, shape, first_frames: as in `encode_lanes`.
        labels: on the CPU.
        pinned: as in `pack`.
    """
    arrays = encode_lanes(runs, augmentations, shape, first_frames)
    arrays["starts"] = [labels.starts.numpy()]
    arrays["boxes"] = [labels.boxes.numpy()]
    arrays["counts"] = [labels.counts.numpy()]
    arrays["regions"] = [labels.regions.numpy()]
    return EncodedBatch(pack(arrays, pinned=pinned), shape, labels.labelled, labels.following)
