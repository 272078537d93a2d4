"""Config of frames, labels and preparation. `evspan.conf.schema.training` imports the parts that training shares."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from evspan.conf.errors import ConfigError


class FrameMode(Enum):
    exact = "exact"  # half-open windows that tile the recording, saturating counts
    rvt = "rvt"  # bit for bit what RVT's preprocess_dataset.py writes


class DownsampleBy(Enum):
    sum = "sum"  # add the pixels of a block up, then saturate
    nearest = "nearest"  # keep the block's lower right of its centre pixels


class Codec(Enum):
    fast = "fast"  # a byte per event kept, see evspan.data_prep.frames.codec
    small = "small"  # the same through zstd: smaller, slower to read


class DatasetKind(Enum):
    shards = "shards"  # what `evspan prep` writes
    rvt_tree = "rvt_tree"  # RVT's preprocessed folders, read as they stand


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(kw_only=True)
class FrameConfig:
    """How events become frames: (2 * bins, H / downsample, W / downsample) uint8 counts per window."""

    mode: FrameMode = FrameMode.exact
    window_ms: int = 50
    bins: int = 10  # time bins per window and polarity
    cutoff: int = 10  # counts saturate here
    downsample: int = 2  # 1 | 2 | 4
    downsample_by: DownsampleBy = DownsampleBy.sum

    def __post_init__(self) -> None:
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
            self.downsample_by = DownsampleBy.nearest  # RVT knows no other

    @property
    def channels(self) -> int:
        return 2 * self.bins

    @property
    def window_us(self) -> int:
        return 1000 * self.window_ms


def frame_config(raw: dict[str, Any]) -> FrameConfig:
    """The config that a manifest or a weights file tells, its enums by name."""
    return FrameConfig(
        **dict(raw, mode=FrameMode[raw["mode"]], downsample_by=DownsampleBy[raw["downsample_by"]])
    )


@dataclass(kw_only=True)
class LabelConfig:
    """Which boxes are kept, and under which class; sizes in pixels of the full sensor resolution."""

    class_map: dict[int, int] = field(
        default_factory=dict
    )  # class_id in the box file -> index in `classes`
    label_every_ms: int = 100  # thin labels to one per 100 ms, or 50 for one per window
    crop: bool = True  # cut boxes at the sensor's border, drop those wholly outside
    min_side: float = 0.0
    min_diagonal: float = 0.0
    max_width_fraction: float | None = (
        None  # drop boxes wider than this share of the sensor; train split only
    )

    def __post_init__(self) -> None:
        require(
            self.label_every_ms >= 1,
            f"dataset.labels.label_every_ms is {self.label_every_ms}; give 1 ms or more",
        )
        require(
            self.min_side >= 0 and self.min_diagonal >= 0,
            f"dataset.labels.min_side {self.min_side} and min_diagonal {self.min_diagonal} must not be negative",
        )
        require(
            self.max_width_fraction is None or 0 < self.max_width_fraction <= 1,
            f"dataset.labels.max_width_fraction is {self.max_width_fraction}; give a share up to 1, or null for boxes of any width",
        )


@dataclass(kw_only=True)
class DatasetConfig:
    """A prepared dataset: where it lies and what its classes are."""

    name: str = "simulated"
    kind: DatasetKind = DatasetKind.shards
    root: str = (
        ""  # folder with the prepared shards (or RVT's tree); training and evaluation read it
    )
    classes: list[str] = field(default_factory=list)  # in the order of their stored ids
    labels: LabelConfig = field(
        default_factory=LabelConfig
    )  # how `evspan prep` makes them from raw boxes

    def __post_init__(self) -> None:
        self.classes = list(self.classes)
        outside = sorted(
            v for v in self.labels.class_map.values() if not 0 <= v < len(self.classes)
        )
        require(
            not outside,
            f"dataset.labels.class_map names class {outside} but dataset.classes has "
            f"{len(self.classes)} entries {self.classes}; add the class or correct the map",
        )


@dataclass(kw_only=True)
class LauncherConfig:
    """Where recordings are prepared. launcher=local: in processes of this machine; evspan.conf.schema.prep_cluster has the other way."""


@dataclass(kw_only=True)
class PrepConfig:
    """`evspan prep`: a folder of recordings (train/ val/ test/) in, a folder of shards out."""

    source: str = ""
    output: str = ""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    frames: FrameConfig = field(default_factory=FrameConfig)
    processes: int = 0  # 0: one per core that this process may use
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    shard_mib: int = 2048  # several recordings share a file up to this size
    max_invalid_fraction: float = (
        0.01  # refuse a recording with a larger share of events outside the sensor
    )
    codec: Codec = (
        Codec.fast
    )  # how frames are stored from now on; what is stored already stays as it is

    def __post_init__(self) -> None:
        require(
            self.processes >= 0,
            f"processes is {self.processes}; give a number of processes, or 0 for one per core",
        )
        require(self.shard_mib >= 1, f"shard_mib is {self.shard_mib}; give 1 MiB or more")
        labels = self.dataset.labels
        require(
            self.frames.mode is FrameMode.exact or labels.label_every_ms == 100,
            f"dataset.labels.label_every_ms is {labels.label_every_ms}; RVT (frames.mode=rvt) takes a label every 100 ms",
        )
        require(
            0 <= self.max_invalid_fraction <= 1,
            f"max_invalid_fraction is {self.max_invalid_fraction}; give a share from 0 to 1",
        )
