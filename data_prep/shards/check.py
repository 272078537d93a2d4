"""Checks one recording's group in a shard: checksums, structure, and frames against the recording.

The checks come in an order in which each may rely on those before: the datasets have the sizes
that the manifest states (`check_structure`), the attributes are those of the manifest, the
values fit together (`column_problems`, `_boxes`), they have their checksums (`_checksums`), sampled
frames decode and are those of the recording (`_frames`). The first check with problems ends it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import xxhash
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig, FrameMode, TimeUnit, frame_config
from evspan.conf.text import one_line
from evspan.data_prep.frames.histogram import each_window, whole_frame
from evspan.data_prep.hdf5_files import (
    UnavailableFileError,
    is_damage,
    plain_member,
    unavailable,
)
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.recordings.sources import Source
from evspan.data_prep.shards.atomic import file_xxh3
from evspan.data_prep.shards.attributes import CONFIG, ENTRY, read_text
from evspan.data_prep.shards.checksums import BOX_XXH3, IGNORE_XXH3, first_changed
from evspan.data_prep.shards.format import (
    IGNORE_CLASS,
    BoxArray,
    RecordingEntry,
    columns_of,
    group_digests,
    parse_config,
    parse_entry,
)
from evspan.data_prep.shards.group_check import (
    RecordingColumns,
    check_structure,
    column_problems,
    stored_columns,
)
from evspan.data_prep.shards.reading import READ_ERRORS, open_regular, read_frames, shard_path
from numpy.typing import NDArray

# Fields of an entry that may differ from the shard: of a moved or touched recording, only the
# manifest is updated.
NOT_OF_CONTENT = ("source", "source_mtime_ns", "shard")


@dataclass(frozen=True)
class Task:
    """One recording to check.

    Attributes:
        root: of the prepared dataset.
        config: of the manifest.
        source: the recording, where it is known.
        absent: why it is not.
        sample: number of frames to compare with the recording; None: all.
        seed: selects the frames.
    """

    root: Path
    entry: RecordingEntry
    config: dict[str, Any]
    source: Source | None
    absent: str
    sample: int | None
    seed: int

    @property
    def key(self) -> str:
        """split/recording."""
        return f"{self.entry.split}/{self.entry.name}"


class Verified(NamedTuple):
    """The result of checking a recording.

    Attributes:
        problems: empty where it is intact.
        compared: number of frames that were recomputed from the recording.
        not_compared: why none were.
    """

    problems: list[str]
    compared: int = 0
    not_compared: str = ""


def verify_recording(task: Task) -> Verified:
    """Checks all of one recording. Damage of any kind is in the result.

    Raises:
        ShardError: the shard lies outside the folder.
        UnavailableFileError: the shard cannot be read now, which is no damage.
    """
    shard = task.entry.shard
    path = shard_path(task.root, task.entry)
    try:
        with open_regular(path) as file:
            names = list(file)  # as `evspan prep` finds it; fails where this list is damaged
            group = plain_member(file, task.entry.group)
            if task.entry.group not in names or not isinstance(group, h5py.Group):
                return Verified([f"{shard} does not hold it"])
            return _verify_group(group, task)
    except FileNotFoundError:
        return Verified([f"{shard} is not there"])
    except UnavailableFileError:
        raise
    except UserError as error:
        return Verified([f"{shard} cannot be read: {one_line(error)}"])
    except READ_ERRORS as error:
        if not is_damage(error):
            raise unavailable(path, error) from error
        return Verified([f"{shard} cannot be read: {one_line(error)}"])


def _verify_group(group: h5py.Group, task: Task) -> Verified:
    channels = frame_config(task.config["frames"]).channels
    structure = check_structure(group, task.entry, channels)
    problems = structure.problems
    if not problems:
        columns = stored_columns(structure)
        problems = (
            _attribute_problems(group, task.entry, task.config)
            or column_problems(group, structure, columns, task.entry)
            or _boxes(group["boxes"][:], columns, task.entry, task.config)
            or _regions(group, columns, task.entry, task.config)
            or _checksums(group, columns, task.entry)
        )
    return Verified(problems) if problems else _frames(group, task)


def _attribute_problems(
    group: h5py.Group, entry: RecordingEntry, config: dict[str, Any]
) -> list[str]:
    """Where the attributes of the group differ from the manifest."""
    problems: list[str] = []
    stored_entry = asdict(parse_entry(read_text(group, ENTRY), ENTRY, in_part=True))
    differing = [
        name
        for name, value in asdict(entry).items()
        if name not in NOT_OF_CONTENT and stored_entry[name] != value
    ]
    if differing:
        problems.append(f"the shard and the manifest differ in {', '.join(differing)}")
    if parse_config(read_text(group, CONFIG), CONFIG) != config:
        problems.append("it was made with another config than the manifest states")
    return problems


def _boxes(
    boxes: BoxArray,
    columns: RecordingColumns,
    entry: RecordingEntry,
    config: dict[str, Any],
) -> list[str]:
    """Boxes with a frame, class or place that none can have.

    Args:
        boxes: (M,) BOX.
        columns: those that `column_problems` accepts.
    """
    classes = config["dataset"]["classes"]
    class_id = boxes["class_id"]
    wrong = {"have a class that the dataset lacks": (class_id < 0) | (class_id >= len(classes))}
    wrong |= _misplaced(boxes, columns.box_start, columns, entry, config)
    problems = [
        f"{np.count_nonzero(mask)} of {boxes.size} boxes {what}"
        for what, mask in wrong.items()
        if mask.any()
    ]
    if problems:
        return problems
    per_class = {name: int(np.count_nonzero(class_id == i)) for i, name in enumerate(classes)}
    if per_class != entry.boxes_per_class:
        return [f"boxes per class are {per_class} instead of {entry.boxes_per_class}"]
    return []


def _regions(
    group: h5py.Group, columns: RecordingColumns, entry: RecordingEntry, config: dict[str, Any]
) -> list[str]:
    """Ignore regions with a frame, class or place that none can have, or another checksum."""
    if columns.ignore_start is None or columns.ignore_xxh3 is None:
        return []
    regions = group["ignore"][:]
    wrong = {"have a class": regions["class_id"] != IGNORE_CLASS}
    wrong |= _misplaced(regions, columns.ignore_start, columns, entry, config)
    problems = [
        f"{np.count_nonzero(mask)} of {regions.size} ignore regions {what}"
        for what, mask in wrong.items()
        if mask.any()
    ]
    changed = first_changed(regions, columns.ignore_start, columns.ignore_xxh3)
    if changed >= 0 and not problems:
        problems.append(
            f"the ignore regions of frame {changed} do not have the checksum of {IGNORE_XXH3}"
        )
    return problems


def _misplaced(
    boxes: BoxArray,
    start: NDArray[np.int64],
    columns: RecordingColumns,
    entry: RecordingEntry,
    config: dict[str, Any],
) -> dict[str, NDArray[np.bool_]]:
    """(M,) which boxes have a frame or place that none can have, by what is wrong.

    Args:
        boxes: (M,) BOX.
        start: (N + 1,) frame i has boxes[start[i]:start[i + 1]].
    """
    per_frame = np.diff(start)
    sides = np.stack([boxes[side].astype(np.float64) for side in "xywh"], 1)
    wrong: dict[str, NDArray[np.bool_]] = {
        "lie on frames that are not labelled": np.repeat(~columns.labelled, per_frame),
        "have another time than the end of their frame": boxes["t_us"]
        != np.repeat(columns.end_us, per_frame),
        "are not finite": np.logical_not(np.isfinite(sides).all(1)),
    }
    if config["dataset"]["labels"]["crop"]:
        sensor_wh = np.array([entry.sensor_width, entry.sensor_height])
        frame_wh = sensor_wh / config["frames"]["downsample"]
        corner = sides[:, :2]
        size = sides[:, 2:]
        outside = (corner < 0) | (size <= 0) | (corner + size > frame_wh)
        wrong["lie outside the frame"] = outside.any(1)
    return wrong


def _checksums(group: h5py.Group, columns: RecordingColumns, entry: RecordingEntry) -> list[str]:
    frames, whole = group_digests(group)
    if frames != entry.frames_xxh3:
        return [f"the frames have the checksum {frames} instead of {entry.frames_xxh3}"]
    if whole != entry.group_xxh3:
        names = ", ".join(columns_of(group))
        return [f"{names} have the checksum {whole} instead of {entry.group_xxh3}"]
    if columns.box_xxh3 is not None:
        changed = first_changed(group["boxes"][:], columns.box_start, columns.box_xxh3)
        if changed >= 0:
            return [f"the boxes of frame {changed} do not have the checksum of {BOX_XXH3}"]
    return []


def _frames(group: h5py.Group, task: Task) -> Verified:
    """Decodes the sampled frames, and compares them with those of the recording if it is there."""
    sampled = sampled_frames(task)
    if task.source is None:
        return _check_counts(group, sampled, task)
    try:
        problem = _changed_files(task.entry, task.source)
        if problem:
            return Verified([problem])
    except (UserError, OSError) as error:  # the recording cannot be read
        return Verified([], 0, one_line(error))
    return _compare_frames(group, sampled, task.source.path, task)


def _check_counts(group: h5py.Group, sampled: list[int], task: Task) -> Verified:
    """Without a recording: no count exceeds the cutoff."""
    cutoff = frame_config(task.config["frames"]).cutoff
    for i in sampled:
        if read_frames(group, i, i + 1).max(initial=0) > cutoff:
            return Verified([f"frame {i} counts beyond the cutoff of {cutoff}"], 0, task.absent)
    return Verified([], 0, task.absent)


def _changed_files(entry: RecordingEntry, source: Source) -> str:
    """Whether the recording or its box file has changed since it was prepared; empty if not."""
    size = source.path.stat().st_size
    if size != entry.source_bytes or file_xxh3(source.path) != entry.source_xxh3:
        return f"the recording {source.path} has changed since"
    boxes_xxh3 = file_xxh3(source.boxes) if source.boxes else ""
    if boxes_xxh3 != entry.boxes_xxh3:
        box_file = source.boxes or f"of {source.path}"
        return f"the box file {box_file} has changed since"
    return ""


def _compare_frames(group: h5py.Group, sampled: list[int], path: Path, task: Task) -> Verified:
    compared = 0
    differing: list[int] = []
    config = frame_config(task.config["frames"])
    dataset = task.config["dataset"]
    recomputed = _recomputed(path, dataset, group["end_us"][:].tolist(), sampled, config)
    while True:
        try:
            item = next(recomputed, None)
        except (UserError, OSError) as error:  # the recording cannot be read
            return Verified([], 0, one_line(error))
        if item is None:
            break
        i, frame = item
        compared += 1
        beyond = i >= task.entry.frames
        if beyond or not np.array_equal(frame, read_frames(group, i, i + 1)[0]):
            differing.append(i)
    if differing:
        return Verified(
            [
                f"{len(differing)} of {compared} compared frames differ from the recording's, "
                f"first {differing[0]}"
            ]
        )
    if compared != len(sampled):
        return Verified([f"the recording gives {compared} of {len(sampled)} compared frames"])
    return Verified([], compared)


def sampled_frames(task: Task) -> list[int]:
    """Indices of the frames to compare, increasing; a function of seed and recording."""
    n = task.entry.frames
    if task.sample is None or task.sample >= n:
        return list(range(n))
    rng = np.random.default_rng((task.seed, xxhash.xxh3_64_intdigest(task.key.encode())))
    sampled: list[int] = sorted(rng.choice(n, task.sample, replace=False).tolist())
    return sampled


def _recomputed(
    path: Path,
    dataset: dict[str, Any],
    end_us: list[int],
    sampled: list[int],
    config: FrameConfig,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields (index, frame) of the sampled windows, in one pass over the recording.

    Frames that are not sampled are counted, but not copied. When all frames are compared, a frame
    beyond the stored ones is yielded, too: it is a difference.

    Args:
        dataset: of the resolved config; how the recording was read.
        end_us: ends of the stored windows.
    """
    if not sampled:
        return
    last = sampled[-1]
    if len(sampled) == len(end_us):
        last += 1
    copied = {*sampled, last}
    index = count()

    def finish(counts: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        return whole_frame(counts) if next(index) in copied else None

    def ends(first_us: int) -> Iterable[int]:
        if config.mode is FrameMode.exact:  # the windows go on to the last event
            return chain(end_us, count(end_us[-1] + config.window_us, config.window_us))
        return end_us

    unit = dataset.get("time_unit")
    recording = open_recording(
        path,
        unstated_size=dataset.get("sensor_size"),
        time_unit=TimeUnit[unit] if unit else None,
    )
    for i, (_, frame) in enumerate(each_window(recording, ends, config, finish)):
        if frame is not None:
            yield i, frame
        if i == last:
            return
