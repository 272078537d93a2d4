"""Whether one recording's group in a shard holds what was written, fits together, and has the frames of its recording."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import xxhash
from evspan.conf.errors import ShardError, UserError
from evspan.conf.schema.prep import FrameConfig, FrameMode, frame_config
from evspan.data_prep.frames.histogram import each_window, whole_frame
from evspan.data_prep.frames.rvt import RvtEnds
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.recordings.sources import Source
from evspan.data_prep.shards.atomic import file_xxh3
from evspan.data_prep.shards.format import (
    BOX,
    COLUMNS,
    CONFIG,
    ENTRY,
    FRAME_SHAPE,
    RecordingEntry,
    group_digests,
    read_frames,
)
from numpy.typing import NDArray

# All that h5py says of damage, and json of an attribute.
UNREADABLE = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    MemoryError,
    ShardError,
)
NOT_OF_CONTENT = (
    "source",
    "source_mtime_ns",
    "shard",
)  # of a file that was moved or touched, only the manifest learns


@dataclass(frozen=True)
class Task:
    """One recording to verify. source: where it is known; absent: why it is not. sample: frames to compare, None: all."""

    root: Path
    entry: RecordingEntry
    config: dict[str, Any]
    source: Source | None
    absent: str
    sample: int | None
    seed: int

    @property
    def key(self) -> str:
        return f"{self.entry.split}/{self.entry.name}"


class Verified(NamedTuple):
    """problems: what is wrong, empty where all is right. compared: frames recomputed from the recording. not_compared: why."""

    problems: list[str]
    compared: int = 0
    not_compared: str = ""


def verify_recording(task: Task) -> Verified:
    """Everything about one recording; damage of any kind is told, not raised."""
    try:
        with h5py.File(task.root / task.entry.shard, "r") as file:
            if task.entry.group not in file:
                return Verified([f"{task.entry.shard} does not hold it"])
            group = file[task.entry.group]
            problems = (
                _structure(group, task.entry, task.config)
                or _contents(group, task.entry, task.config)
                or _checksums(group, task.entry)
            )
            return Verified(problems) if problems else _frames(group, task)
    except FileNotFoundError:
        return Verified([f"{task.entry.shard} is not there"])
    except UNREADABLE as error:
        return Verified([f"{task.entry.shard} cannot be read: {_line(error)}"])


def _structure(group: h5py.Group, entry: RecordingEntry, config: dict[str, Any]) -> list[str]:
    """Columns of other sizes than the manifest tells, before anything of these sizes is read."""
    n, shape = entry.frames, (frame_config(config["frames"]).channels, entry.height, entry.width)
    times = np.dtype(np.int64)
    expected = {
        "frame_start": ((n + 1,), times),
        "end_us": ((n,), times),
        "boxes": ((entry.boxes,), BOX),
        "box_start": ((n + 1,), times),
        "labelled": ((n,), np.dtype(bool)),
    }
    assert expected.keys() == set(COLUMNS)
    if missing := [
        name for name in ("frames", *COLUMNS) if not isinstance(group.get(name), h5py.Dataset)
    ]:
        return [f"{', '.join(missing)} missing"]
    problems = [
        f"{name} is {group[name].dtype} of shape {group[name].shape} instead of {kind} of shape {wanted}"
        for name, (wanted, kind) in expected.items()
        if (group[name].shape, group[name].dtype) != (wanted, kind)
    ]
    # What HDF5 reads all the same, but does not copy: prep could not bring it into a new shard.
    problems += [
        f"{name} has a stored size of {group[name].id.get_storage_size()} bytes instead of {group[name].nbytes}"
        for name in expected
        if not group[name].chunks and group[name].id.get_storage_size() != group[name].nbytes
    ]
    if tuple(np.atleast_1d(group.attrs[FRAME_SHAPE]).tolist()) != shape:
        problems.append(
            f"frames have the shape {tuple(np.atleast_1d(group.attrs[FRAME_SHAPE]).tolist())} instead of {shape}"
        )
    return problems


def _contents(group: h5py.Group, entry: RecordingEntry, config: dict[str, Any]) -> list[str]:
    """Columns that do not fit together, the manifest, or the config."""
    told, made_with = (
        asdict(RecordingEntry(**json.loads(group.attrs[ENTRY]))),
        json.loads(group.attrs[CONFIG]),
    )
    differing = [
        name
        for name, value in asdict(entry).items()
        if name not in NOT_OF_CONTENT and told[name] != value
    ]
    end_us, boxes, labelled = group["end_us"][:], group["boxes"][:], group["labelled"][:]
    frame_start, box_start = group["frame_start"][:], group["box_start"][:]
    problems = [f"the shard and the manifest differ in {', '.join(differing)}"] if differing else []
    problems += (
        ["it was made with another config than the manifest tells"] if made_with != config else []
    )
    for name, start, size in (
        ("frame_start", frame_start, len(group["frames"])),
        ("box_start", box_start, boxes.size),
    ):
        if start[0] != 0 or start[-1] != size or (np.diff(start) < 0).any():
            problems.append(f"{name} does not lead from 0 up to {size}")
    if (np.diff(end_us) <= 0).any():
        problems.append("end_us does not increase")
    if labelled.sum() != entry.labelled_frames:
        problems.append(f"{labelled.sum()} frames are labelled instead of {entry.labelled_frames}")
    return problems or _boxes(boxes, np.diff(box_start), end_us, labelled, entry, config)


def _boxes(
    boxes: NDArray,
    per_frame: NDArray[np.int64],
    end_us: NDArray[np.int64],
    labelled: NDArray[np.bool_],
    entry: RecordingEntry,
    config: dict[str, Any],
) -> list[str]:
    """Boxes that no frame, class or place can have."""
    classes, downsample = config["dataset"]["classes"], config["frames"]["downsample"]
    corners = np.stack([boxes[side].astype(np.float64) for side in "xywh"], 1)
    wrong = {
        "lie on frames that are not labelled": int(per_frame[~labelled].sum()),
        "have another time than the end of their frame": int(
            (boxes["t_us"] != np.repeat(end_us, per_frame)).sum()
        ),
        "have a class that the dataset lacks": int(
            ((boxes["class_id"] < 0) | (boxes["class_id"] >= len(classes))).sum()
        ),
        "are not finite": int((~np.isfinite(corners)).any(1).sum()),
    }
    if config["dataset"]["labels"]["crop"]:
        size = np.array([entry.sensor_width, entry.sensor_height]) / downsample
        outside = (
            (corners[:, :2] < 0) | (corners[:, 2:] <= 0) | (corners[:, :2] + corners[:, 2:] > size)
        )
        wrong["lie outside the frame"] = int(outside.any(1).sum())
    problems = [f"{n} of {boxes.size} boxes {what}" for what, n in wrong.items() if n]
    per_class = {name: int((boxes["class_id"] == i).sum()) for i, name in enumerate(classes)}
    if not problems and per_class != entry.boxes_per_class:
        problems.append(f"boxes per class are {per_class} instead of {entry.boxes_per_class}")
    return problems


def _checksums(group: h5py.Group, entry: RecordingEntry) -> list[str]:
    frames, whole = group_digests(group)
    if frames != entry.frames_xxh3:
        return [f"the frames have the checksum {frames} instead of {entry.frames_xxh3}"]
    if whole != entry.group_xxh3:
        return [f"{', '.join(COLUMNS)} have the checksum {whole} instead of {entry.group_xxh3}"]
    return []


def _frames(group: h5py.Group, task: Task) -> Verified:
    """Decode the sampled frames, and compare them with the recording's where it is there."""
    entry, source, config = task.entry, task.source, frame_config(task.config["frames"])
    wanted = sampled_frames(task)
    if source is None:
        over = [i for i in wanted if read_frames(group, i, i + 1).max(initial=0) > config.cutoff]
        return Verified(
            [f"frame {over[0]} counts beyond the cutoff of {config.cutoff}"] if over else [],
            0,
            task.absent,
        )
    try:
        if (
            source.path.stat().st_size != entry.source_bytes
            or file_xxh3(source.path) != entry.source_xxh3
        ):
            return Verified([f"the recording {source.path} has changed since"])
        if (file_xxh3(source.boxes) if source.boxes else "") != entry.boxes_xxh3:
            return Verified(
                [f"the box file {source.boxes or f'of {source.path}'} has changed since"]
            )
        compared, differing = 0, list[int]()
        for i, frame in _recomputed(source.path, group["end_us"][:].tolist(), wanted, config):
            compared += 1
            if i >= entry.frames or not np.array_equal(frame, read_frames(group, i, i + 1)[0]):
                differing.append(i)
    except ShardError:
        raise
    except (UserError, OSError) as error:
        return Verified([], 0, _line(error))
    if differing:
        return Verified(
            [
                f"{len(differing)} of {compared} compared frames differ from the recording's, first {differing[0]}"
            ]
        )
    if compared != len(wanted):
        return Verified([f"the recording gives {compared} of {len(wanted)} compared frames"])
    return Verified([], compared)


def sampled_frames(task: Task) -> list[int]:
    n = task.entry.frames
    if task.sample is None or task.sample >= n:
        return list(range(n))
    rng = np.random.default_rng((task.seed, xxhash.xxh3_64_intdigest(task.key.encode())))
    return sorted(rng.choice(n, task.sample, replace=False).tolist())


class _StoredEnds(RvtEnds):
    """The windows that are stored, rather than those that labels give."""

    def __init__(self, end_us: list[int]) -> None:
        self.end_us = end_us


def _recomputed(
    path: Path, end_us: list[int], wanted: list[int], config: FrameConfig
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(index, frame) of the wanted windows, in one pass up to the last of them; the others are counted, but not copied."""
    if not wanted:
        return
    last = wanted[-1] + (
        len(wanted) == len(end_us)
    )  # where all are compared, one beyond them is a difference, too
    index, kept = count(), {*wanted, last}
    ends: Iterable[int] = _StoredEnds(end_us)
    if config.mode is FrameMode.exact:
        ends = chain(end_us, count(end_us[-1] + config.window_us, config.window_us))

    def finish(counts: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        return whole_frame(counts) if next(index) in kept else None

    for i, (_, frame) in enumerate(
        each_window(open_recording(path), lambda first_us: ends, config, finish)
    ):
        if frame is not None:
            yield i, frame
        if i == last:
            return


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
