"""Options and results of inference on recordings. No torch: the command line builds the options."""

from dataclasses import dataclass
from pathlib import Path

from evspan.conf.schema.prep import FrameConfig, TimeUnit


@dataclass(frozen=True)
class RecordingFiles:
    """A recording and the files that are written for it."""

    recording: Path
    detections: Path  # .npy
    video: Path | None = None  # .mp4 or .gif
    csv: Path | None = None
    json: Path | None = None  # "-": standard output
    boxes: Path | None = None  # its box file, drawn in the video
    key: str = ""  # in shards, whose folder `recording` is: split/name


@dataclass(frozen=True)
class InferOptions:
    """Which detector runs over which recordings, and how."""

    checkpoint: Path  # a run folder, a checkpoint folder or a .safetensors file
    recordings: tuple[RecordingFiles, ...]
    confidence: float | None = None  # smallest score; None: the checkpoint's
    nms: float | None = None  # IoU threshold of the per-class NMS; None: the checkpoint's
    start_s: float = 0.0  # seconds after the first event, rounded to whole windows
    seconds: float | None = None  # length of the part that is read; None: to the end
    follow_s: float | None = None  # wait at the file's end until no data comes for this long
    frames_per_call: int = 4  # frames that the network takes at once
    device: str | None = None  # None: cuda where it is available, else cpu
    threads: int | None = None  # CPU threads of the network; None: one less than the cores
    precision: str = "auto"  # fp32, tf32, bf16; auto: that of training on a GPU, fp32 on a CPU
    cuda_graphs: bool = False  # on a GPU: a call is one launch
    side_by_side: bool = False  # video: the events alone left of the detections
    video_confidence: float = 0.3  # video: detections of less are not drawn
    weights: str = "ema"  # of a checkpoint: ema (where it has one, else raw) or raw
    track: bool = False  # number the tracks of the detections
    track_confidence: float = 0.5  # detections from here on begin tracks
    sensor_size: tuple[int, int] | None = None  # height, width where a file does not state them
    time_unit: TimeUnit | None = None  # of text and NumPy recordings; None: what is certain


@dataclass(frozen=True)
class RecordingSummary:
    """What inference on one recording read, found and took."""

    files: RecordingFiles
    labels: Path | None  # the box file of the recording, drawn in the video
    frames: int
    config: FrameConfig
    width: int  # of the sensor, pixels
    height: int
    events: int
    dropped: dict[str, int]  # events left out or mended, by reason
    step: int  # of the checkpoint
    confidence: float  # the threshold that was used
    detections_per_class: list[tuple[str, int]]  # (class name, number), by class id
    work_seconds: dict[str, float]  # by part (decoding, network, drawing), which overlap in time
    wall_seconds: float
    latencies_ms: list[float]  # per frame, from its last event to its detections
    tracks: int | None = None  # number of tracks; None: they were not numbered

    @property
    def detections(self) -> int:
        """The number of detections of all classes."""
        return sum(number for _, number in self.detections_per_class)


@dataclass(frozen=True)
class ExportOptions:
    """Which detector is exported, for frames of which size."""

    checkpoint: Path  # a run folder, a checkpoint folder or a .safetensors file
    output: Path  # .onnx or .pt2
    height: int | None = None  # of the frames, pixels; None: those of a Gen4 sensor
    width: int | None = None
    batch: int = 1  # recordings side by side
    weights: str = "ema"  # of a checkpoint: ema (where it has one, else raw) or raw


@dataclass(frozen=True)
class ExportSummary:
    """What was exported, and how far the written file is from the detector."""

    step: int  # of the checkpoint
    frames: tuple[int, int, int, int]  # (B, 2 * bins, H, W) of the input
    num_states: int  # tensors of state
    checked_frames: int
    differences: str  # the largest ones, readable
