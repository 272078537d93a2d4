"""Options and results of pseudo-labelling. No torch: the command line builds the options."""

from dataclasses import dataclass, field
from pathlib import Path

from evspan.conf.errors import UserError, require
from evspan.conf.schema.prep import FrameConfig, TimeUnit
from evspan.conf.text import printable

# LEOD's thresholds: 0.3 for pedestrians and two-wheelers, 0.6 for cars and all others.
DEFAULT_THRESHOLD = 0.6
CLASS_THRESHOLDS = {
    "pedestrian": 0.3,
    "person": 0.3,
    "two_wheeler": 0.3,
    "bicycle": 0.3,
    "cyclist": 0.3,
    "motorbike": 0.3,
}


@dataclass(frozen=True)
class Thresholds:
    """A threshold for each class.

    Attributes:
        default: of classes that `by_class` does not name.
        by_class: class name -> threshold.
        strict: every name in by_class has to be a class of the detector.
    """

    default: float = DEFAULT_THRESHOLD
    by_class: dict[str, float] = field(default_factory=lambda: dict(CLASS_THRESHOLDS))
    strict: bool = False

    def __post_init__(self) -> None:
        for value in (self.default, *self.by_class.values()):
            require(0 <= value <= 1, f"a threshold is {value:g}; give numbers from 0 to 1")

    def of(self, classes: list[str]) -> list[float]:
        """The threshold of class 0, 1, ...

        Raises:
            UserError: a name is no class of the detector.
        """
        unknown = [name for name in self.by_class if name not in classes]
        if unknown and self.strict:
            raise UserError(
                f"a threshold is given for {printable(unknown[0])!r}, which is no class of the "
                f"detector; its classes are {', '.join(classes)}"
            )
        return [self.by_class.get(name, self.default) for name in classes]


@dataclass(frozen=True)
class FilterOptions:
    """Which detections become pseudo-boxes, and which become ignore regions. LEOD's values.

    Attributes:
        confidence: detections below (objectness x class score) are left out.
        nms_iou: detections of both directions that overlap more are one.
        objectness, class_score: a pseudo-box is above both thresholds of its class.
        match_iou: lowest IoU of a box with its track's predicted place.
        gap_ms: a track ends when it has no box for longer.
        min_track_ms: pseudo-boxes of shorter tracks become ignore regions.
        min_side: boxes of which a side is shorter are left out, in pixels of the sensor.
        max_width_fraction: boxes that are wider are left out, as a fraction of the sensor.
        uncertain_regions: detections under the thresholds become ignore regions; LEOD leaves them
            out.
        gap_regions: where a track has no box between two others, an ignore region is put.
    """

    confidence: float = 0.1
    nms_iou: float = 0.45
    objectness: Thresholds = Thresholds()
    class_score: Thresholds = Thresholds()
    match_iou: float = 0.45
    gap_ms: float = 300.0
    min_track_ms: float = 300.0
    min_side: float = 5.0
    max_width_fraction: float = 0.9
    uncertain_regions: bool = True
    gap_regions: bool = True

    def __post_init__(self) -> None:
        for name in ("confidence", "nms_iou", "match_iou", "max_width_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value:g}; give a number from 0 to 1")
        for name in ("gap_ms", "min_track_ms", "min_side"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"{name} is {value:g}; give 0 or more")


@dataclass(frozen=True)
class PseudoOptions:
    """Which detector labels which recordings.

    Attributes:
        checkpoint: a run folder, a checkpoint folder or a weights file.
        source: a recording, a folder of recordings or a list of them.
        output: the folder for box files, classes.txt, recordings.txt and summary.json.
        split: recordings of it are labelled; all where the source has no splits.
        keep_labels: box files of the source are kept where they have labels.
        class_map: class id in the box files -> the detector's; None: they are the same.
        label_every_ms: pseudo-labels are that far apart, as `dataset.labels.label_every_ms`.
        label_time_unit, label_offset_us: of the box files of the source, as `dataset.labels` has
            them. Times are written in microseconds on the recording's clock.
        sensor_size: (height, width) in pixels of recordings that do not state it.
        time_unit: of text and NumPy recordings; None: what is certain.
    """

    checkpoint: Path
    source: Path
    output: Path
    filters: FilterOptions = FilterOptions()
    split: str = "train"
    keep_labels: bool = True
    class_map: dict[int, int] | None = None
    label_every_ms: int = 100
    label_time_unit: TimeUnit = TimeUnit.us
    label_offset_us: int = 0
    sensor_size: tuple[int, int] | None = None
    time_unit: TimeUnit | None = None
    backward: bool = True
    weights: str = "ema"
    frames_per_call: int = 4
    device: str | None = None
    threads: int | None = None
    overwrite: bool = False


@dataclass
class Counts:
    """Boxes and ignore regions of one class, or of all."""

    labels: int = 0
    pseudo_boxes: int = 0
    short_tracks: int = 0
    uncertain: int = 0
    gaps: int = 0
    tracks: int = 0


@dataclass(frozen=True)
class PseudoSummary:
    """What was written for a recording.

    Attributes:
        name: of the recording. boxes: its box file.
        frames: that the detector has seen. labelled_frames: that have a label now.
        config: how events became these frames.
        per_class: counts by class name.
    """

    name: str
    boxes: Path
    frames: int
    labelled_frames: int
    config: FrameConfig
    per_class: dict[str, Counts]
