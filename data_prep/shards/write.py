"""Prepares one recording: its frames and boxes as a group in a part file of its own."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import numpy as np
import xxhash
from evspan.conf.errors import BoxesError, RecordingError, ShardError
from evspan.conf.json_files import JsonFileError
from evspan.conf.schema.prep import Codec, DatasetConfig, FrameMode, PrepConfig, TimeUnit
from evspan.conf.text import printable
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.data_prep.frames.histogram import each_window, frame_size
from evspan.data_prep.frames.rvt import RvtEnds
from evspan.data_prep.frames.windows import WindowEnds, tolerance, window_ends
from evspan.data_prep.hdf5_files import (
    UnsafeDatasetError,
    is_damage,
    plain_member,
    unavailable,
)
from evspan.data_prep.labels.box_files import BoxArray, LabelRows, empty_boxes, read_labels
from evspan.data_prep.labels.checks import label_warnings
from evspan.data_prep.labels.classes import require_named
from evspan.data_prep.labels.clock import Span, clock_problem
from evspan.data_prep.labels.filters import filter_boxes, filter_regions
from evspan.data_prep.recordings.open import open_recording, require_own_content
from evspan.data_prep.recordings.sources import Source
from evspan.data_prep.shards.atomic import atomic_hdf5, file_xxh3
from evspan.data_prep.shards.attributes import CONFIG, ENTRY, read_numbers, read_text, write_text
from evspan.data_prep.shards.checksums import (
    BOX_XXH3,
    FRAME_XXH3,
    IGNORE_INDEX_COLUMNS,
    IGNORE_XXH3,
    INDEX_COLUMNS,
    INDEX_XXH3,
    index_digest,
    row_checksums,
)
from evspan.data_prep.shards.format import (
    BOX,
    FRAME_SHAPE,
    IGNORE_CLASS,
    IGNORE_COLUMNS,
    RecordingEntry,
    columns_digest,
    columns_of,
    parse_config,
    parse_entry,
)
from evspan.data_prep.shards.group_check import (
    RecordingColumns,
    check_structure,
    has_checksums,
    read_columns,
)
from evspan.data_prep.shards.manifest_check import name_problem
from evspan.data_prep.shards.reading import (
    READ_ERRORS,
    damage_reported,
    find_group,
    open_shard,
)
from evspan.data_prep.shards.validity import refuse_invalid
from numpy.typing import NDArray

FRAMES_AT_ONCE = 64
LONGEST_RVT_TAIL_US = 500_000  # after the last event, in which RVT's labels still end frames
LATEST_RVT_START_US = 60_000_000  # of a recording's first event; EVT3's clock starts below 16.8 s
CODE_CHUNK = 1 << 17  # bytes of code in a chunk of the file
FLUSH_BYTES = 8 * CODE_CHUNK  # bytes of code that are written at once
FILTERS: dict[Codec, Mapping[str, Any]] = {Codec.fast: {}, Codec.small: hdf5plugin.Zstd(clevel=3)}
COPIED = ("frames", "frame_start", "end_us")  # datasets that do not depend on labels
# Keys that older datasets were prepared without. With these values they are left out of the config
# that is compared, so that nothing of such a dataset is prepared again.
LATER_LABEL_KEYS = {"time_unit": TimeUnit.us, "offset_us": 0}


class Stored(NamedTuple):
    """A recording's group in a file, and the config that it was prepared with.

    checksums: whether training verifies its frames and boxes; shards of earlier versions have none.
    """

    entry: RecordingEntry
    config: dict[str, Any]
    file: Path
    checksums: bool = True


def stored_in(path: Path) -> dict[str, Stored]:
    """The groups of a part file or a shard, by split/recording, without the damaged ones.

    Raises:
        UnavailableFileError: the file cannot be read now.
    """
    groups: dict[str, Stored] = {}
    with suppress(ShardError, FileNotFoundError), open_shard(path) as file:
        names: list[str] = []
        with damage_reported(path, str(path)):
            names = list(file)
        for name in names:
            # One damaged group does not hide the others.
            with suppress(UnsafeDatasetError, JsonFileError, ShardError):
                stored = _stored_group(file, name, path)
                groups[f"{stored.entry.split}/{stored.entry.name}"] = stored
    return groups


def _stored_group(file: h5py.File, name: str, path: Path) -> Stored:
    """Raises an error where the group is damaged, or its file cannot be read now."""
    place = f"{path}: recording {printable(name)!r}"
    with damage_reported(path, place):
        group = plain_member(file, name)
        if not isinstance(group, h5py.Group):
            raise ShardError(f"{place} is no group")
        entry = parse_entry(read_text(group, ENTRY), place, in_part=True)
        if (entry.name, entry.group) != (name, name):
            raise ShardError(f"{place} is named {entry.name!r} by its entry")
        problems = check_structure(group, entry).problems
        if problems:
            raise ShardError(f"{place}: {'; '.join(problems)}")
        config = parse_config(read_text(group, CONFIG), place)
        return Stored(entry, config, path, has_checksums(group))


def resolved_config(config: PrepConfig) -> dict[str, Any]:
    """The part of the config that determines frames and boxes.

    It has no paths, processes, file sizes and limits. Enums are stored by name, keys of
    mappings as text.
    """
    dataset = asdict(config.dataset)
    for key, default in LATER_LABEL_KEYS.items():
        if dataset["labels"][key] == default:
            del dataset["labels"][key]
    raw = {
        "frames": asdict(config.frames),
        "dataset": {key: dataset[key] for key in ("name", "classes", "labels")},
    }
    if config.dataset.sensor_size:  # else as in older shards
        raw["dataset"]["sensor_size"] = config.dataset.sensor_size
    if config.dataset.time_unit:
        raw["dataset"]["time_unit"] = config.dataset.time_unit
    plain: dict[str, Any] = json.loads(json.dumps(raw, default=_plain))
    return plain


def _reading(config: dict[str, Any]) -> tuple[Any, Any]:
    """What a resolved config says of how recordings are read."""
    dataset = config["dataset"]
    return dataset.get("sensor_size"), dataset.get("time_unit")


def _plain(value: object) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def prepare_recording(
    source: Source, part: Path, config: PrepConfig, reuse: Stored | None = None
) -> RecordingEntry:
    """Writes the recording's group to the file `part`.

    Args:
        reuse: an older group of the same recording and frame config. Where its windows are still
            right, its frames are copied and only boxes and labels are written again.

    Raises:
        RecordingError, BoxesError: the recording or its box file cannot be used.
        NoSpaceError: the disk is full.
    """
    problem = name_problem(source.name)
    if problem:
        raise RecordingError(f"{source.path}: the recording's name {problem}. Rename the file")
    before = _Version.of(source)  # before the first byte is read: what is written now is noticed
    labels = _read_labels(source, config.dataset)
    if reuse and not before.is_recording_of(reuse.entry):
        reuse = None  # the recording was replaced after this job was planned
    with atomic_hdf5(part) as (file, check_disk):
        group = file.create_group(source.name)
        if reuse and _reading(reuse.config) != _reading(resolved_config(config)):
            reuse = None  # its frames may have another size, or other events
        entry = _copy_frames(group, reuse, labels, config) if reuse else None
        if entry is None:
            entry = _write_frames(group, source, labels, config, check_disk)
        refuse_invalid(source.path, entry, config.max_invalid_fraction)
        entry = _write_labels(group, entry, labels, config)
        before.require_unchanged(source)
        entry = replace(
            entry,
            source=source.relative,
            source_bytes=before.size,
            source_mtime_ns=before.mtime_ns,
            boxes_xxh3=before.boxes_xxh3,
        )
        _write_attributes(group, entry, config)
    return entry


@dataclass(frozen=True)
class _Version:
    """What tells a recording and its box file from later files of the same names.

    Attributes:
        size, mtime_ns: of the recording.
        boxes_xxh3: of the box file; empty where there is none.
    """

    size: int
    mtime_ns: int
    boxes_xxh3: str

    @staticmethod
    def of(source: Source) -> "_Version":
        """The files as they are now."""
        info = source.path.stat()
        boxes_xxh3 = ""
        if source.boxes:
            with suppress(FileNotFoundError):
                boxes_xxh3 = file_xxh3(source.boxes)
        return _Version(info.st_size, info.st_mtime_ns, boxes_xxh3)

    def is_recording_of(self, entry: RecordingEntry) -> bool:
        """Whether the entry was prepared from this recording, by its size and time."""
        return (self.size, self.mtime_ns) == (entry.source_bytes, entry.source_mtime_ns)

    def require_unchanged(self, source: Source) -> None:
        """Raises RecordingError where the recording or its box file is another one by now."""
        now = _Version.of(source)
        if now == self:
            return
        changed = source.path
        if source.boxes and now.boxes_xxh3 != self.boxes_xxh3:
            changed = source.boxes
        raise RecordingError(
            f"{changed} changed while it was read. Run the same again when it is complete"
        )


def _write_attributes(group: h5py.Group, entry: RecordingEntry, config: PrepConfig) -> None:
    """Writes the attributes of a group whose datasets are complete."""
    write_text(group, ENTRY, json.dumps(asdict(entry)))
    write_text(group, CONFIG, json.dumps(resolved_config(config)))
    names = INDEX_COLUMNS
    if entry.ignore_regions:
        names += IGNORE_INDEX_COLUMNS
    columns = {name: group[name][:] for name in names}
    write_text(group, INDEX_XXH3, index_digest(entry, config.frames.channels, columns))


def _read_labels(source: Source, config: DatasetConfig) -> "_Labels":
    """The recording's boxes; an error names a recording that is no recording either."""
    try:
        return _Labels.read(source.boxes, config)
    except BoxesError as error:
        try:
            require_own_content(source.path)
        except RecordingError as other:
            raise RecordingError(f"{other}; {error}") from error
        raise


@dataclass(frozen=True)
class _Labels:
    """A recording's labels as they are in its box file; without one both are empty.

    raw: (N,) RAW_BOX. regions: (R,) RAW_BOX, the ignore regions.
    """

    file: Path | None
    raw: BoxArray
    regions: BoxArray

    @staticmethod
    def read(file: Path | None, config: DatasetConfig) -> "_Labels":
        if file is None:
            return _Labels(file, empty_boxes(), empty_boxes())
        labels = config.labels
        rows = read_labels(file, time_unit=labels.time_unit, offset_us=labels.offset_us)
        require_named(file, rows.boxes, labels, config.classes)
        return _Labels(file, *rows)

    def windows(
        self, first_us: int, sensor_hw: tuple[int, int], config: PrepConfig, split: str
    ) -> WindowEnds | RvtEnds:
        """Ends of the windows of a recording whose first event is at `first_us`."""
        labels = config.dataset.labels
        if config.frames.mode is FrameMode.exact:
            return window_ends(
                LabelRows(self.raw, self.regions).times,
                first_us,
                window_us=config.frames.window_us,
                label_every_us=1000 * labels.label_every_ms,
            )
        if self.file is None:
            raise BoxesError(
                "it has no box file, and RVT's frames (frames.mode=rvt) end at labels. Add "
                "X_bbox.npy next to it, or use frames.mode=exact"
            )
        if first_us > LATEST_RVT_START_US:
            raise RecordingError(
                f"its first event is at {first_us / 1e6:,.0f} s, and RVT's windows "
                f"(frames.mode=rvt) begin at 0: {first_us // config.frames.window_us:,} empty "
                "frames would come first. Use frames.mode=exact, or subtract this time from its "
                "events and labels"
            )
        # RVT filters first: a label of which no box is left ends no frame.
        height, width = sensor_hw
        kept, _ = filter_boxes(
            self.raw,
            labels,
            classes=len(config.dataset.classes),
            height=height,
            width=width,
            split=split,
        )
        return RvtEnds(LabelRows(kept, self.regions).times, config.frames.window_us)


def _write_frames(
    group: h5py.Group,
    source: Source,
    labels: _Labels,
    config: PrepConfig,
    check_disk: Callable[[], None],
) -> RecordingEntry:
    """Writes `frames`, `frame_start` and `end_us`; returns the entry without its label counts."""
    recording = open_recording(
        source.path,
        unstated_size=config.dataset.sensor_size,
        time_unit=config.dataset.time_unit,
    )
    sensor_hw = (recording.height, recording.width)
    height, width = frame_size(config.frames, *sensor_hw)

    def ends(first_us: int) -> WindowEnds | RvtEnds:
        return labels.windows(first_us, sensor_hw, config, source.split)

    end_us: list[int] = []
    lengths: list[int] = []
    sums: list[int] = []
    digest = xxhash.xxh3_64()
    with CodeWriter(group, FILTERS[config.codec]) as writer:
        for end, code in each_window(recording, ends, config.frames, FrameEncoder()):
            if end > recording.last_us + LONGEST_RVT_TAIL_US:
                break  # these labels are not of this recording
            writer.write(code)
            digest.update(code.data)
            sums.append(xxhash.xxh3_64_intdigest(code.data))
            lengths.append(code.size)
            end_us.append(end)
            check_disk()
    group["frame_start"] = np.cumsum([0, *lengths], dtype=np.int64)
    group["end_us"] = np.array(end_us, np.int64)
    group[FRAME_XXH3] = np.array(sums, np.uint64)
    group.attrs[FRAME_SHAPE] = (config.frames.channels, height, width)
    return RecordingEntry(
        name=source.name,
        split=source.split,
        shard="",
        group=source.name,
        frames=len(end_us),
        labelled_frames=0,
        boxes=0,
        height=height,
        width=width,
        sensor_height=recording.height,
        sensor_width=recording.width,
        first_us=recording.first_us,
        last_us=recording.last_us,
        events=recording.events,
        dropped_events=dict(recording.dropped),
        event_warnings=recording.warnings(),
        source_xxh3=file_xxh3(source.path),
        frames_xxh3=digest.hexdigest(),
    )


class CodeWriter:
    """Writes the dataset `frames` of a group in whole chunks. A context manager."""

    def __init__(self, group: h5py.Group, filters: Mapping[str, Any]) -> None:
        self.stored = group.create_dataset(
            "frames", (0,), np.uint8, maxshape=(None,), chunks=(CODE_CHUNK,), **filters
        )
        self.waiting: list[NDArray[np.uint8]] = []
        self.waiting_bytes = 0

    def write(self, code: NDArray[np.uint8]) -> None:
        """Appends the code of a frame.

        Args:
            code: (n,) uint8; it is copied.
        """
        self.waiting.append(code.copy())
        self.waiting_bytes += code.size
        if self.waiting_bytes >= FLUSH_BYTES:
            self._flush(self.waiting_bytes // CODE_CHUNK * CODE_CHUNK)

    def _flush(self, size: int) -> None:
        """Writes the first `size` waiting bytes."""
        joined = np.concatenate(self.waiting) if self.waiting else np.zeros(0, np.uint8)
        begin = len(self.stored)
        self.stored.resize((begin + size,))
        self.stored[begin:] = joined[:size]
        self.waiting = [joined[size:]]
        self.waiting_bytes = joined.size - size

    def __enter__(self) -> "CodeWriter":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self._flush(self.waiting_bytes)


def _copy_frames(
    group: h5py.Group, old: Stored, labels: _Labels, config: PrepConfig
) -> RecordingEntry | None:
    """Copies the frames of an older group; returns the entry without its label counts.

    Returns None where the windows now end elsewhere, or where the group cannot be read.
    """
    entry = old.entry
    sensor_hw = (entry.sensor_height, entry.sensor_width)
    windows = labels.windows(entry.first_us, sensor_hw, config, entry.split)
    # Finite ends must also stop where the stored ones do: compare with one more of them.
    compared = entry.frames + 1 if isinstance(windows, RvtEnds) else entry.frames
    latest_us = entry.last_us + LONGEST_RVT_TAIL_US
    expected = [end for end in islice(windows, compared) if end <= latest_us]
    try:
        with open_shard(old.file) as file:
            stored = find_group(file, entry)
            end_us = _sound_columns(stored, entry).end_us
            if end_us.tolist() != expected:
                return None
            for name in COPIED:
                file.copy(stored[name], group)  # copies the chunks without decoding them
            group.attrs[FRAME_SHAPE] = read_numbers(stored, FRAME_SHAPE, 3)
            if FRAME_XXH3 in stored:
                file.copy(stored[FRAME_XXH3], group)
            else:
                group[FRAME_XXH3] = _frame_checksums(group, entry)
    except (*READ_ERRORS, ShardError) as error:
        if not isinstance(error, ShardError) and not is_damage(error):
            raise unavailable(old.file, error) from error
        for name in (*COPIED, FRAME_XXH3):
            group.pop(name, None)
        return None
    return replace(entry, shard="")


def _sound_columns(group: h5py.Group, entry: RecordingEntry) -> RecordingColumns:
    """The small columns of an older group, whose checksum is that of its entry.

    Raises:
        ShardError: they have changed since they were written.
    """
    columns = read_columns(group, entry)
    stored = [group[name][:] for name in columns_of(group)]
    if columns_digest(entry.frames_xxh3, stored) != entry.group_xxh3:
        raise ShardError(f"the columns of {entry.name} do not have their checksum")
    return columns


def _frame_checksums(group: h5py.Group, entry: RecordingEntry) -> NDArray[np.uint64]:
    """(N,) checksums of frames of a shard that has none.

    Raises:
        ShardError: the frames have changed since they were written.
    """
    digest = xxhash.xxh3_64()
    sums: list[NDArray[np.uint64]] = []
    frame_start = group["frame_start"][:]
    for first in range(0, entry.frames, FRAMES_AT_ONCE):
        start = frame_start[first : first + FRAMES_AT_ONCE + 1]
        codes = group["frames"][start[0] : start[-1]]
        digest.update(codes)
        sums.append(row_checksums(codes, start - start[0]))
    if digest.hexdigest() != entry.frames_xxh3:
        raise ShardError(f"the frames of {entry.name} do not have their checksum")
    return np.concatenate([np.zeros(0, np.uint64), *sums])


def _write_labels(
    group: h5py.Group, entry: RecordingEntry, labels: _Labels, config: PrepConfig
) -> RecordingEntry:
    """Writes boxes, box_start and labelled.

    Returns:
        The entry with their counts and the checksum of the group.
    """
    end_us = group["end_us"][:]
    classes = config.dataset.classes
    sensor_hw = (entry.sensor_height, entry.sensor_width)
    label_ends = labels.windows(entry.first_us, sensor_hw, config, entry.split).labelled_us
    labelled = np.isin(end_us, label_ends)
    kept, dropped = _kept_boxes(labels, end_us, label_ends, entry, config)
    boxes = _stored_boxes(kept, kept["class_id"], config)
    box_start = np.append(np.searchsorted(boxes["t_us"], end_us), boxes.size).astype(np.int64)
    group["boxes"] = boxes
    group["box_start"] = box_start
    group["labelled"] = labelled
    group[BOX_XXH3] = row_checksums(boxes, box_start)
    columns = [group["frame_start"][:], end_us, boxes, box_start, labelled]
    kept, dropped_regions = _kept_regions(labels, end_us, label_ends, entry, config)
    if dropped_regions:
        dropped["ignore_regions_outside_the_labelled_frames"] = dropped_regions
    if kept.size:
        regions = _stored_boxes(kept, np.full(kept.size, IGNORE_CLASS), config)
        ignore_start = np.append(np.searchsorted(regions["t_us"], end_us), regions.size)
        columns += [regions, ignore_start.astype(np.int64)]
        for name, column in zip(IGNORE_COLUMNS, columns[-2:], strict=True):
            group[name] = column
        group[IGNORE_XXH3] = row_checksums(regions, columns[-1])
    boxes_per_class = {
        name: int(np.count_nonzero(boxes["class_id"] == i)) for i, name in enumerate(classes)
    }
    warnings: dict[str, str] = {}
    if labels.file is not None:
        span = Span(entry.first_us, _last_label_us(end_us, entry, config))
        warnings = label_warnings(labels.file.name, labels.raw, span, config.dataset.labels)
    return replace(
        entry,
        labelled_frames=int(labelled.sum()),
        label_warnings=warnings,
        boxes=boxes.size,
        dropped_boxes=dropped,
        boxes_per_class=boxes_per_class,
        ignore_regions=kept.size,
        group_xxh3=columns_digest(entry.frames_xxh3, columns),
    )


def _stored_boxes(kept: BoxArray, class_id: NDArray[Any], config: PrepConfig) -> NDArray[np.void]:
    """(K,) BOX of (K,) RAW_BOX and their classes (K,)."""
    boxes = np.zeros(kept.size, BOX)
    if kept.size:
        boxes["t_us"] = kept["t"]
        boxes["class_id"] = class_id
        boxes["track_id"] = kept["track_id"]
        for side in "xywh":
            boxes[side] = kept[side] / config.frames.downsample
    return boxes


def _kept_regions(
    labels: _Labels,
    end_us: NDArray[np.int64],
    label_ends: NDArray[np.int64],
    entry: RecordingEntry,
    config: PrepConfig,
) -> tuple[BoxArray, int]:
    """The ignore regions of the labelled frames after all filters, and the number of the others."""
    # Labels may go on after the last window.
    is_at_end = np.isin(labels.regions["t"], label_ends[label_ends <= end_us.max(initial=0)])
    kept, outside = filter_regions(
        labels.regions[is_at_end],
        config.dataset.labels,
        height=entry.sensor_height,
        width=entry.sensor_width,
    )
    return kept, outside + int(np.count_nonzero(~is_at_end))


def _kept_boxes(
    labels: _Labels,
    end_us: NDArray[np.int64],
    label_ends: NDArray[np.int64],
    entry: RecordingEntry,
    config: PrepConfig,
) -> tuple[BoxArray, dict[str, int]]:
    """The boxes of the labelled frames after all filters, and how many each reason dropped."""
    if not labels.raw.size:
        return labels.raw, {}
    at_ends, dropped = _boxes_at_labelled_ends(labels, end_us, label_ends, entry, config)
    kept, filtered = filter_boxes(
        at_ends,
        config.dataset.labels,
        classes=len(config.dataset.classes),
        height=entry.sensor_height,
        width=entry.sensor_width,
        split=entry.split,
    )
    return kept, dropped | filtered


def _boxes_at_labelled_ends(
    labels: _Labels,
    end_us: NDArray[np.int64],
    label_ends: NDArray[np.int64],
    entry: RecordingEntry,
    config: PrepConfig,
) -> tuple[BoxArray, dict[str, int]]:
    """The boxes at whose time a labelled frame ends, and counts of the others by their place."""
    raw = labels.raw
    inside = (raw["t"] > entry.first_us) & (raw["t"] <= end_us.max(initial=entry.last_us))
    if not (raw["t"][inside] <= _last_label_us(end_us, entry, config)).any():
        problem = clock_problem(
            raw["t"], Span(entry.first_us, entry.last_us), config.dataset.labels
        )
        raise BoxesError(
            f"{labels.file}: all {raw.size} boxes lie outside the recording {entry.name}: {problem}"
        )
    distance = _distance_to_nearest(raw["t"][inside], label_ends)
    label_every_us = 1000 * config.dataset.labels.label_every_ms
    near = distance < label_every_us - tolerance(config.frames.window_us)
    dropped = {
        "boxes_outside_the_recording": int(np.count_nonzero(~inside)),
        "boxes_between_labelled_frames": int(np.count_nonzero((distance > 0) & near)),
        "boxes_off_the_windows": int(np.count_nonzero((distance > 0) & ~near)),
    }
    return raw[inside][distance == 0], dropped


def _last_label_us(end_us: NDArray[np.int64], entry: RecordingEntry, config: PrepConfig) -> int:
    """The latest time of a label that is about the events of a recording.

    That is the end of the last window that contains events. In mode rvt frames may go on to later
    labels.

    Args:
        end_us: (N,) ends of the windows.
    """
    window_us = config.frames.window_us
    latest_us = entry.last_us + window_us + tolerance(window_us)
    return min(latest_us, int(end_us.max(initial=entry.last_us)))


def _distance_to_nearest(times: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """|time - nearest end| of each time; the largest int64 where there are no ends.

    Args:
        times: (N,) in microseconds.
        ends: (L,) in microseconds, increasing.
    """
    if not ends.size:
        return np.full(times.size, np.iinfo(np.int64).max)
    after = np.searchsorted(ends, times)
    next_end = ends[np.minimum(after, ends.size - 1)]
    previous_end = ends[np.maximum(after - 1, 0)]
    nearest: NDArray[np.int64] = np.minimum(abs(times - previous_end), abs(times - next_end))
    return nearest
