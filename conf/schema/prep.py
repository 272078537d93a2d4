"""Config of frames, labels and preparation. Training shares the frame and dataset parts."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from evspan.conf.errors import require
from evspan.conf.schema.cluster import PrepClusterConfig, Scheduler

MOST_OFFSET_US = 1 << 53  # 285 years
LARGEST_SENSOR = 8192  # pixels a side; more is a damaged header


class FrameMode(Enum):
    """How events are counted."""

    exact = "exact"  # half-open windows that tile the recording, saturating counts
    rvt = "rvt"  # bit for bit the output of RVT's preprocess_dataset.py


class DownsampleBy(Enum):
    """How a block of pixels becomes one."""

    sum = "sum"  # add the pixels of a block, then saturate
    nearest = "nearest"  # keep one pixel of a block: the lower right one of its four centre pixels


class Codec(Enum):
    """How frames are stored."""

    fast = "fast"  # one byte per counted event, see evspan.data_prep.frames.codec
    small = "small"  # the same, compressed with zstd: smaller, slower to read


class DatasetKind(Enum):
    """Format of a prepared dataset."""

    shards = "shards"  # written by `evspan prep`
    rvt_tree = "rvt_tree"  # RVT's preprocessed folders, read directly


class TimeUnit(Enum):
    """Unit of the times of a box file, or of a recording in text."""

    us = "us"
    ms = "ms"
    s = "s"
    ns = "ns"

    @property
    def in_us(self) -> float:
        """The unit in microseconds."""
        return {"us": 1, "ms": 1e3, "s": 1e6, "ns": 1e-3}[self.value]


def _require_member(key: str, value: object, choices: type[Enum]) -> None:
    """Checks a choice that a program gives: it may be the name, as text."""
    names = ", ".join(f"{choices.__name__}.{choice.name}" for choice in choices)
    require(isinstance(value, choices), f"{key} is {value!r}; give one of {names}")


@dataclass(kw_only=True)
class FrameConfig:
    """How events become frames: (2 * bins, H / downsample, W / downsample) uint8 counts."""

    mode: FrameMode = FrameMode.exact
    window_ms: int = 50  # time span of a frame
    bins: int = 10  # time bins per window and polarity
    cutoff: int = 10  # counts saturate at this value
    downsample: int = 2  # 1 | 2 | 4
    downsample_by: DownsampleBy = DownsampleBy.sum

    def __post_init__(self) -> None:
        _require_member("frames.mode", self.mode, FrameMode)
        _require_member("frames.downsample_by", self.downsample_by, DownsampleBy)
        require(
            self.window_ms >= 1,
            f"frames.window_ms is {self.window_ms}; give a window of 1 ms or more",
        )
        require(1 <= self.bins <= 50, f"frames.bins is {self.bins}; give 1 to 50 bins per window")
        require(
            1 <= self.cutoff <= 255,
            f"frames.cutoff is {self.cutoff}; counts are stored in a byte: give 1 to 255",
        )
        require(
            self.downsample in (1, 2, 4),
            f"frames.downsample is {self.downsample}; choose 1, 2 or 4",
        )
        if self.mode is FrameMode.rvt:
            require(
                self.window_ms == 50,
                f"frames.window_ms is {self.window_ms}; RVT's frames (frames.mode=rvt) span 50 ms",
            )
            self.downsample_by = DownsampleBy.nearest  # the only method of RVT

    @property
    def channels(self) -> int:
        """Channels of a frame: one per polarity and bin."""
        return 2 * self.bins

    @property
    def window_us(self) -> int:
        """Time span of a frame in microseconds."""
        return 1000 * self.window_ms


def frame_config(raw: dict[str, Any]) -> FrameConfig:
    """The frame config of a manifest or a weights file, where enums are stored by name."""
    mode = FrameMode[raw["mode"]]
    downsample_by = DownsampleBy[raw["downsample_by"]]
    return FrameConfig(**dict(raw, mode=mode, downsample_by=downsample_by))


@dataclass(kw_only=True)
class LabelConfig:
    """Which boxes are kept, and with which class. Sizes in pixels of the full sensor resolution."""

    # class_id in the box file -> index in `classes`. A map replaces the dataset's as a whole.
    class_map: dict[int, int] = field(default_factory=dict)
    time_unit: TimeUnit = TimeUnit.us  # of the times in the box files: us | ms | s | ns
    # Added to the times of the box files, where they count from another moment than the events.
    offset_us: int = 0
    label_every_ms: int = 100  # thin labels to one per 100 ms, or 50 for one per window
    crop: bool = True  # cut boxes at the sensor's border, drop those wholly outside
    min_side: float = 0.0
    min_diagonal: float = 0.0
    # Drop boxes wider than this fraction of the sensor; train split only.
    max_width_fraction: float | None = None

    def __post_init__(self) -> None:
        require(
            self.label_every_ms >= 1,
            f"dataset.labels.label_every_ms is {self.label_every_ms}; give 1 ms or more",
        )
        require(
            abs(self.offset_us) <= MOST_OFFSET_US,
            f"dataset.labels.offset_us is {self.offset_us}; give {MOST_OFFSET_US} us or less, "
            "either way",
        )
        require(
            self.min_side >= 0 and self.min_diagonal >= 0,
            f"dataset.labels.min_side {self.min_side} and min_diagonal {self.min_diagonal} must "
            "not be negative",
        )
        require(
            self.max_width_fraction is None or 0 < self.max_width_fraction <= 1,
            f"dataset.labels.max_width_fraction is {self.max_width_fraction}; give a fraction up "
            "to 1, or null for boxes of any width",
        )


@dataclass(kw_only=True)
class DatasetRoot:
    """One of several datasets that a run is trained on and evaluated with."""

    root: str = ""  # its folder
    # Its part of the training data, relative to the other weights: the fraction of the frames that
    # streamed lanes read, and of the chunks of random lanes.
    weight: float = 1.0
    # Name of a class of this dataset -> name of the run's class. null: its boxes are left out, so
    # the objects are background; `ignore`: they become ignore regions. Other classes keep theirs.
    class_map: dict[str, str | None] = field(default_factory=dict)
    kind: DatasetKind | None = None  # shards | rvt_tree; null: dataset.kind
    # In the order of their stored ids; for RVT's tree. Empty: dataset.classes.
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.class_map = dict(self.class_map)
        self.classes = list(self.classes)
        require(
            bool(self.root),
            "dataset.roots has an entry without a folder; give each its own: "
            "'dataset.roots=[{root: A}, {root: B, weight: 2}]'",
        )
        require(
            0 < self.weight < math.inf,
            f"dataset.roots: the weight of {self.root} is {self.weight}; give a number above 0",
        )
        repeated = {name for name in self.classes if self.classes.count(name) > 1}
        require(
            not repeated and all(self.classes),
            f"dataset.roots: the classes of {self.root} are {self.classes}; give each a name of "
            "its own",
        )


@dataclass(kw_only=True)
class DatasetConfig:
    """A prepared dataset: its folder and its classes."""

    name: str = "own"
    kind: DatasetKind = DatasetKind.shards
    root: str = ""  # folder of the prepared shards (or RVT's tree) for training and evaluation
    # Several datasets instead of `root`: [{root: A, weight: 1, class_map: {car: vehicle}}, ...].
    roots: list[DatasetRoot] = field(default_factory=list)
    # In the order of their stored ids. Empty: prep reads classes.txt of the source; training and
    # evaluation take the shards' classes.
    classes: list[str] = field(default_factory=list)
    # Height and width of the sensor, for recordings whose file does not state them.
    sensor_size: list[int] = field(default_factory=list)
    # Unit of the times in text recordings and NumPy archives; null: as their columns are named, or
    # what is certain.
    time_unit: TimeUnit | None = None
    # How `evspan prep` filters the boxes of the box files.
    labels: LabelConfig = field(default_factory=LabelConfig)

    def __post_init__(self) -> None:
        self.classes = list(self.classes)
        self.roots = list(self.roots)
        self.sensor_size = list(self.sensor_size)
        _require_distinct_roots(self.root, self.roots)
        sides = [side for side in self.sensor_size if 1 <= side <= LARGEST_SENSOR]
        require(
            not self.sensor_size or len(sides) == len(self.sensor_size) == 2,
            f"dataset.sensor_size is {self.sensor_size}; give [HEIGHT,WIDTH] in pixels, 1 to "
            f"{LARGEST_SENSOR} each, or [] for the size that each file states",
        )
        repeated = sorted({name for name in self.classes if self.classes.count(name) > 1})
        require(
            not repeated and all(self.classes),
            f"dataset.classes is {self.classes}; give each class a name of its own: "
            "dataset.classes=[pedestrian,cyclist]",
        )
        # Without names they may be in classes.txt, which is read later.
        outside = sorted(
            v
            for v in self.labels.class_map.values()
            if v < 0 or (self.classes and v >= len(self.classes))
        )
        require(
            not outside,
            f"dataset.labels.class_map names class {outside} but dataset.classes has "
            f"{len(self.classes)} entries {self.classes}; add the class or correct the map: "
            "dataset.classes=[a,b] 'dataset.labels.class_map={0:0,3:1}'",
        )

    @property
    def sources(self) -> list[DatasetRoot]:
        """The datasets to read: `roots`, or `root` alone; none if both are empty."""
        if self.roots:
            return self.roots
        return [DatasetRoot(root=self.root)] if self.root else []

    @property
    def place(self) -> str:
        """The folders, for a message."""
        return ", ".join(source.root for source in self.sources)


def _require_distinct_roots(root: str, roots: Sequence[DatasetRoot]) -> None:
    require(
        not (root and roots),
        f"dataset.root is {root}, and dataset.roots names {len(roots)}; give one of the two, and "
        "clear the other: dataset.root='' or dataset.roots=[]",
    )
    folders = [os.path.abspath(source.root) for source in roots]
    repeated = [source.root for source in roots if folders.count(os.path.abspath(source.root)) > 1]
    require(
        not repeated,
        f"dataset.roots names {', '.join(repeated)}: the same folder; name it once, with the sum "
        "of the weights",
    )


def split_fractions(text: str) -> tuple[float, float, float] | None:
    """The fractions of train, val and test that `split=0.8,0.1,0.1` states; None without any.

    They are divided by their sum.

    Raises:
        ConfigError: they are not three numbers, 0 or more, with one above 0.
    """
    if not text:
        return None
    try:
        numbers = [float(part) for part in text.strip("[]() ").split(",")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    require(
        len(numbers) == 3 and min(numbers) >= 0 and math.isfinite(total) and total > 0,
        f"split is {text}; give the fractions of train, val and test: split=0.8,0.1,0.1",
    )
    train, val, test = (number / total for number in numbers)
    return train, val, test


@dataclass(kw_only=True)
class PrepConfig:
    """`evspan prep`: a folder of recordings (train/ val/ test/) in, a folder of shards out."""

    source: str = ""
    output: str = ""
    # Fractions of train, val and test, for a source without these folders: 0.8,0.1,0.1. The name of
    # a recording decides, so that more recordings move none.
    split: str = ""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    frames: FrameConfig = field(default_factory=FrameConfig)
    processes: int = 0  # with cluster=local; 0: one per core that this process may use
    cluster: PrepClusterConfig = field(default_factory=PrepClusterConfig)
    shard_mib: int = 2048  # several recordings share a file up to this size
    # Refuse a recording with a larger fraction of events outside the sensor, or of a wrong time.
    max_invalid_fraction: float = 0.01
    # Remove recordings that the source no longer has, even most of a split.
    allow_removal: bool = False
    codec: Codec = Codec.fast  # of new frames; frames that are stored already keep theirs

    def __post_init__(self) -> None:
        split_fractions(self.split)
        require(
            self.processes >= 0,
            f"processes is {self.processes}; give a number of processes, or 0 for one per core",
        )
        require(
            not self.processes or self.cluster.scheduler is Scheduler.local,
            f"processes is {self.processes}, but the recordings are prepared by a SLURM job array; "
            "set cluster.cpus_per_task, the number of processes of each of its tasks",
        )
        require(
            not self.dataset.roots,
            "dataset.roots is for training and evaluation; prepare each dataset by itself: "
            "evspan prep source=RAW output=SHARDS",
        )
        require(self.shard_mib >= 1, f"shard_mib is {self.shard_mib}; give 1 MiB or more")
        label_every_ms = self.dataset.labels.label_every_ms
        require(
            self.frames.mode is FrameMode.exact or label_every_ms == 100,
            f"dataset.labels.label_every_ms is {label_every_ms}; RVT (frames.mode=rvt) takes a "
            "label every 100 ms",
        )
        require(
            0 <= self.max_invalid_fraction <= 1,
            f"max_invalid_fraction is {self.max_invalid_fraction}; give a fraction from 0 to 1",
        )
