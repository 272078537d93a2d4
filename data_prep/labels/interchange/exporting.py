"""`evspan labels export`: boxes, detections and frames for other tools."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.progress import progress
from evspan.conf.text import printable
from evspan.data_prep.labels.box_files import (
    BOXES_ENDING,
    NO_TRACK,
    RAW_BOX,
    BoxArray,
    LabelRows,
    boxes_in,
    find_boxes,
    read_labels,
    recording_name,
)
from evspan.data_prep.labels.classes import read_classes
from evspan.data_prep.labels.interchange import coco, csv_tables, cvat, mot, voc, yolo
from evspan.data_prep.labels.interchange.annotations import Annotations, Label, Picture
from evspan.data_prep.labels.interchange.images import files_below
from evspan.data_prep.labels.interchange.names import frame_file
from evspan.data_prep.labels.interchange.pictures import (
    DrawnFrame,
    PictureOptions,
    draw_recording,
    draw_shard,
)
from evspan.data_prep.labels.interchange.recording_files import recordings_by_name
from evspan.data_prep.labels.interchange.timing import FRAME_LIST, write_frame_list
from evspan.data_prep.recordings.left_out import files_of, is_recording_file
from evspan.data_prep.recordings.open import SUFFIXES, open_recording
from evspan.data_prep.shards.format import MANIFEST, RecordingEntry, load_manifest
from evspan.data_prep.shards.reading import open_group, read_stored_boxes, read_stored_regions
from numpy.typing import NDArray

IMAGES = "images"
IGNORE_NAME = "ignore"  # class of ignore regions, which have none
ONE_FILE = {"coco": ".json", "csv": ".csv"}
NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to.

    Attributes:
        source: a box file, a folder of them, a run, shards, a recording, or a folder of
            recordings without box files.
        out: a folder; for COCO and CSV without frames also a file.
        format: one of `FORMATS`; None: frames only.
        frames: recording, folder of recordings or shards whose frames are drawn; None: those of
            `source` where it has events, else none.
        classes: names of class 0, 1, ...; empty: those next to the boxes, or of the shards.
        size: (width, height) of the sensor, where no recording gives it.
        confidence: detections under it are left out.
    """

    source: Path
    out: Path
    format: str | None = None
    frames: Path | None = None
    pictures: PictureOptions = field(default_factory=PictureOptions)
    classes: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    confidence: float = 0.0
    overwrite: bool = False


@dataclass
class ExportSummary:
    """What was written.

    Attributes:
        images: that were drawn. unpictured: boxes between the drawn frames, which were left out.
        unsupported: ignore regions that the format cannot express.
    """

    recordings: int = 0
    frames: int = 0
    images: int = 0
    boxes: int = 0
    unpictured: int = 0
    unsupported: int = 0


@dataclass
class _Recording:
    """Boxes and events of a recording.

    labels: None without a box file. events: a file. stored: the shard's folder and entry.
    folder: of the box file, next to which the recording may be.
    """

    name: str
    labels: LabelRows | None = None
    events: Path | None = None
    stored: tuple[Path, RecordingEntry] | None = None
    size: tuple[int, int] | None = None
    folder: Path | None = None

    @property
    def times(self) -> NDArray[np.int64]:
        """(L,) the times of labels, increasing."""
        if self.labels is None:
            return np.zeros(0, np.int64)
        return np.unique(self.labels.times)


def export_labels(options: ExportOptions) -> ExportSummary:
    """Writes frames and labels.

    Raises:
        UserError: the source cannot be read, the format lacks something, or the output is there
            already.
        OSError: a file cannot be read or written.
    """
    recordings, classes = _sources(options)
    if options.format is None and not any(_has_events(recording) for recording in recordings):
        raise UserError(_no_frames(options.source, recordings))
    _prepare_output(options, any(_has_events(recording) for recording in recordings))
    summary = ExportSummary(recordings=len(recordings))
    annotations = Annotations()
    for recording in recordings:
        one = _annotated(recording, classes, options, summary)
        if options.format in _PER_RECORDING:
            _PER_RECORDING[options.format](one, options.out / recording.name, options)
        else:
            _append(annotations, one)
    if options.format == "yolo":
        regions = [label for label in annotations.labels if label.ignore]
        annotations.labels = [label for label in annotations.labels if not label.ignore]
        summary.unsupported = len(regions)
        summary.boxes -= len(regions)
    annotations.classes = _all_classes(classes, annotations)
    if options.format in _WRITERS:
        _WRITERS[options.format](annotations, options.out)
    return summary


def _no_frames(source: Path, recordings: list[_Recording]) -> str:
    """Why a command without a format writes nothing."""
    if not any(_recording_next_to(source, recording.name) for recording in recordings):
        return (
            f"{source} has boxes and no events: give the format to write, for example "
            "--format coco, or the recording whose frames are drawn, --frames FILE"
        )
    folder = source if source.is_dir() else source.parent
    return (
        f"{source} has boxes, which are written in a format: give it, for example --format coco, "
        f"and --frames {folder} to draw the frames of the recordings there, too"
    )


# -- sources --------------------------------------------------------------------------------------
def _sources(options: ExportOptions) -> tuple[list[_Recording], list[str]]:
    """The recordings, and the names of class 0, 1, ..."""
    source = options.source
    if not source.exists():
        raise UserError(f"{source} is not there. Give a box file, a run, a recording or shards")
    if (source / MANIFEST).is_file():
        recordings, classes = _of_shards(source)
    elif source.is_file() and is_recording_file(source):
        boxes = find_boxes(source)
        labels = read_labels(boxes) if boxes else None
        name = recording_name(source)
        recordings = [_Recording(name, labels, source, folder=source.parent)]
        classes = _classes_near(source)
    else:
        recordings, classes = _of_box_files(source)
    if options.frames:
        _attach_events(recordings, options.frames)
    for recording in recordings:
        recording.size = options.size or _sensor_size(recording, source, options)
    return recordings, list(options.classes) or classes


def _of_shards(root: Path) -> tuple[list[_Recording], list[str]]:
    manifest = load_manifest(root)
    recordings = []
    for entry in manifest.recordings:
        recording = _Recording(entry.name, stored=(root, entry))
        recording.labels = _stored_labels(root, entry)
        recordings.append(recording)
    _require_different_names(recordings, root)
    return recordings, manifest.classes


def _stored_labels(root: Path, entry: RecordingEntry) -> LabelRows:
    """The boxes of a shard's labelled frames in pixels of the sensor."""
    group = open_group(root, entry)
    try:
        stored = read_stored_boxes(group)
        regions = read_stored_regions(group)
        labelled = group["end_us"][:][group["labelled"][:]]
    finally:
        group.file.close()
    factor = entry.sensor_height // entry.height
    empty = np.setdiff1d(labelled, np.concatenate((stored["t_us"], regions["t_us"])))
    markers = np.zeros(empty.size, RAW_BOX)
    markers["t"] = empty
    return LabelRows(_as_raw(stored, factor), np.concatenate((_as_raw(regions, factor), markers)))


def _as_raw(stored: NDArray[np.void], factor: int) -> BoxArray:
    """(N,) RAW_BOX of (N,) BOX. factor: sensor pixels per stored pixel."""
    boxes = np.zeros(stored.size, RAW_BOX)
    boxes["t"] = stored["t_us"]
    boxes["class_id"] = np.maximum(stored["class_id"], 0)
    boxes["track_id"] = stored["track_id"]
    boxes["class_confidence"] = 1
    for side in "xywh":
        boxes[side] = stored[side] * factor
    return boxes


def _of_box_files(source: Path) -> tuple[list[_Recording], list[str]]:
    if source.is_file():
        name = source.name
        if name.lower().endswith(BOXES_ENDING):
            name = name[: -len(BOXES_ENDING)]
        files = {name.removesuffix(".npy"): source}
    else:
        files = boxes_in(_evaluation_folder(source).iterdir())
    if not files and source.is_dir() and (found := files_of(source).recordings):
        return [_Recording(recording_name(path), events=path) for path in sorted(found)], []
    if not files:
        raise UserError(
            f"{source} has no box files (X{BOXES_ENDING}). Give a box file, the output folder of "
            "evspan infer or evaluate, a recording or shards"
        )
    recordings = []
    for name, path in sorted(files.items()):
        recordings.append(_Recording(name, read_labels(path), folder=path.parent))
    return recordings, _classes_near(next(iter(files.values())))


def _evaluation_folder(folder: Path) -> Path:
    """The folder itself, or the one evaluation of a run."""
    if boxes_in(folder.iterdir()):
        return folder
    evaluations = []
    for path in sorted(folder.glob("evaluation*")):
        if path.is_dir() and boxes_in(path.iterdir()):
            evaluations.append(path)
    if len(evaluations) > 1:
        listed = ", ".join(str(path) for path in evaluations[:NAMED])
        raise UserError(f"{folder} has several evaluations: {listed}. Give one of them")
    return evaluations[0] if evaluations else folder


def _classes_near(path: Path) -> list[str]:
    """The names in classes.txt next to a file, or in the folder above."""
    return read_classes(path.parent) or read_classes(path.resolve().parent.parent)


def _attach_events(recordings: list[_Recording], frames: Path) -> None:
    """Finds the events of each recording by its name.

    Raises:
        UserError: there are none of one of them, or those of several recordings of its name.
    """
    if not frames.exists():
        raise UserError(f"--frames {frames} is not there. Give a recording, a folder, or shards")
    if (frames / MANIFEST).is_file():
        _attach_stored(recordings, frames)
    elif frames.is_dir():
        names = {recording.name for recording in recordings}
        files = recordings_by_name(files_below(frames, SUFFIXES), names)
        for recording in recordings:
            recording.events = _one_file(recording, files.get(recording.name, []), frames)
    elif len(recordings) == 1:
        recordings[0].events = frames
    else:
        name = recording_name(frames)
        for recording in recordings:
            recording.events = frames if recording.name == name else None
    missing = [printable(recording.name) for recording in recordings if not _has_events(recording)]
    if missing:
        raise UserError(
            f"--frames {frames} has no recording {', '.join(missing[:NAMED])}. Give the folder of "
            "all recordings"
        )


def _attach_stored(recordings: list[_Recording], root: Path) -> None:
    entries: dict[str, list[RecordingEntry]] = {}
    for entry in load_manifest(root).recordings:
        entries.setdefault(entry.name, []).append(entry)
    for recording in recordings:
        of_name = entries.get(recording.name, [])
        if len(of_name) > 1:
            splits = ", ".join(f"{entry.split}/{printable(entry.name)}" for entry in of_name)
            raise UserError(
                f"--frames {root} has {len(of_name)} recordings of one name: {splits}. Give the "
                "recording whose boxes are exported: --frames FILE"
            )
        if of_name:
            recording.stored = (root, of_name[0])


def _one_file(recording: _Recording, files: list[Path], frames: Path) -> Path | None:
    """The recording's file among those of its name; of several the one next to its box file."""
    if len(files) <= 1:
        return files[0] if files else None
    if recording.folder is not None:
        folder = recording.folder.resolve()
        nearest = [path for path in files if path.parent.resolve() == folder]
        if len(nearest) == 1:
            return nearest[0]
    listed = ", ".join(printable(str(path)) for path in files[:NAMED])
    raise UserError(
        f"--frames {frames} has {len(files)} recordings of one name: {listed}. Give the one whose "
        "boxes are exported: --frames FILE"
    )


def _has_events(recording: _Recording) -> bool:
    return recording.events is not None or recording.stored is not None


def _sensor_size(
    recording: _Recording, source: Path, options: ExportOptions
) -> tuple[int, int] | None:
    """(width, height) from the recording, also from one next to a box file."""
    if recording.stored:
        _, entry = recording.stored
        return entry.sensor_width, entry.sensor_height
    path = recording.events or _recording_next_to(source, recording.name)
    if path is None:
        return None
    opened = open_recording(path, time_unit=options.pictures.time_unit)
    return opened.width, opened.height


def _recording_next_to(source: Path, name: str) -> Path | None:
    folder = source if source.is_dir() else source.parent
    files = recordings_by_name(folder.iterdir(), {name}).get(name)
    return files[0] if files else None


def _require_different_names(recordings: list[_Recording], root: Path) -> None:
    names = [recording.name for recording in recordings]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"{root} has recordings of one name in several splits ({', '.join(repeated[:NAMED])}). "
            "Export their box files instead"
        )


# -- annotations ----------------------------------------------------------------------------------
def _annotated(
    recording: _Recording, classes: list[str], options: ExportOptions, summary: ExportSummary
) -> Annotations:
    """Draws the frames, and returns them with their boxes; without events, all times of boxes."""
    if _has_events(recording):
        drawn = list(progress(_drawn(recording, options), f"{recording.name}", unit="frame"))
        summary.images += len(drawn)
    else:
        drawn = [
            DrawnFrame(frame_file(recording.name, time), time, recording.size or (0, 0))
            for time in recording.times.tolist()
        ]
    annotations = Annotations()
    by_time: dict[int, int] = {}
    for i, frame in enumerate(drawn):
        by_time[frame.time_us] = i
        size = frame.size if min(frame.size) > 0 else None
        annotations.pictures.append(Picture(frame.file, i, frame.time_us, recording.name, size))
    for label in _labels(recording, classes, by_time, options.confidence):
        if label.picture < 0:
            summary.unpictured += 1
        else:
            annotations.labels.append(label)
    annotations.classes = _all_classes(classes, annotations)
    summary.frames += len(drawn)
    summary.boxes += len(annotations.labels)
    return annotations


def _drawn(recording: _Recording, options: ExportOptions) -> Iterator[DrawnFrame]:
    folder = options.out / IMAGES
    if options.format in _PER_RECORDING:
        folder = options.out / recording.name / IMAGES
    if recording.stored is None:
        assert recording.events is not None
        return draw_recording(
            recording.events, recording.name, folder, options.pictures, recording.times
        )
    root, entry = recording.stored
    return draw_shard(root, entry, folder, _stored_indices(root, entry, recording, options))


def _stored_indices(
    root: Path, entry: RecordingEntry, recording: _Recording, options: ExportOptions
) -> list[int]:
    """The stored frames to draw: those of labels, or one per step where there are none."""
    group = open_group(root, entry)
    try:
        end_us = group["end_us"][:]
    finally:
        group.file.close()
    chosen = np.isin(end_us, recording.times)
    if not recording.times.size or options.pictures.every_ms is not None:
        window_us = np.median(np.diff(end_us, prepend=entry.first_us))
        frames = max(1, round(options.pictures.step_us / max(1, window_us)))
        chosen[frames - 1 :: frames] = True
    indices: list[int] = np.flatnonzero(chosen).tolist()
    return indices


def _labels(
    recording: _Recording, classes: list[str], pictures: dict[int, int], confidence: float
) -> Iterator[Label]:
    """The boxes and ignore regions; picture is -1 for those that lie between the pictures."""
    if recording.labels is None:
        return
    tracked = _uses_tracks(recording.labels.boxes)
    for boxes, ignore in ((recording.labels.boxes, False), (recording.labels.regions, True)):
        for row in boxes:
            if (ignore and row["w"] <= 0) or row["class_confidence"] < confidence:
                continue
            track = int(row["track_id"])
            yield Label(
                pictures.get(int(row["t"]), -1),
                IGNORE_NAME if ignore else _class_name(int(row["class_id"]), classes),
                float(row["x"]),
                float(row["y"]),
                float(row["w"]),
                float(row["h"]),
                track=track if tracked and track != NO_TRACK else None,
                confidence=float(row["class_confidence"]),
                ignore=ignore,
            )


def _uses_tracks(boxes: BoxArray) -> bool:
    """Whether track ids mean something: detections without tracks all have the id 0."""
    if not boxes.size or boxes["track_id"].any():
        return True
    return bool(np.unique(boxes["t"]).size == boxes.size and (boxes["class_confidence"] == 1).all())


def _class_name(class_id: int, classes: list[str]) -> str:
    return classes[class_id] if class_id < len(classes) else f"class_{class_id}"


def _all_classes(classes: list[str], annotations: Annotations) -> list[str]:
    """The names, and after them those that boxes have beside them."""
    names = dict.fromkeys(classes)
    others = {label.class_name for label in annotations.labels} - names.keys()
    return [*names, *sorted(others)]


def _append(annotations: Annotations, part: Annotations) -> None:
    first = len(annotations.pictures)
    annotations.pictures += part.pictures
    for label in part.labels:
        annotations.labels.append(label._replace(picture=first + label.picture))


# -- output ---------------------------------------------------------------------------------------
def _prepare_output(options: ExportOptions, has_images: bool) -> None:
    """Makes the folder; refuses files that are there.

    Raises:
        UserError: the output is there already, or the format does not fit it.
    """
    out = options.out
    if out.suffix in (".json", ".csv", ".xml", ".txt"):
        if ONE_FILE.get(options.format or "") != out.suffix or has_images:
            raise UserError(
                f"{out} is a file; {options.format or 'frames'} with its images is a folder. Give "
                f"{out.with_suffix('')} as OUT"
            )
        exists = out.exists()
        out.parent.mkdir(parents=True, exist_ok=True)
    else:
        exists = out.is_dir() and any(out.iterdir())
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file; give a folder as OUT")
        out.mkdir(parents=True, exist_ok=True)
    if exists and not options.overwrite:
        raise UserError(f"{out} is there already. Give another OUT, or --overwrite")


def _write_coco(annotations: Annotations, out: Path) -> None:
    coco.write_coco(annotations, out if out.suffix == ".json" else out / "annotations.json")


def _write_csv(annotations: Annotations, out: Path) -> None:
    csv_tables.write_csv(annotations, out if out.suffix == ".csv" else out / "labels.csv")


def _write_voc(annotations: Annotations, out: Path) -> None:
    voc.write_voc(annotations, out / "annotations")


def _write_yolo(annotations: Annotations, out: Path) -> None:
    if not all(picture.size for picture in annotations.pictures):
        raise UserError(
            "YOLO's boxes are fractions of the image, whose size is not known. Give --size WxH, or "
            "the recording, --frames FILE"
        )
    yolo.write_yolo(annotations, out)


def _write_cvat(annotations: Annotations, folder: Path, options: ExportOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cvat.write_cvat(annotations, folder / "annotations.xml")
    write_frame_list(folder / FRAME_LIST, [picture.name for picture in annotations.pictures])


def _write_mot(annotations: Annotations, folder: Path, options: ExportOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    times = {picture.time_us for picture in annotations.pictures if picture.time_us is not None}
    step_us = options.pictures.step_us
    if len(times) > 1:
        step_us = max(1, round(float(np.median(np.diff(sorted(times))))))
    mot.write_mot(annotations, folder, fps=1e6 / step_us)
    write_frame_list(folder / FRAME_LIST, [picture.name for picture in annotations.pictures])


_WRITERS: dict[str, Callable[[Annotations, Path], None]] = {
    "coco": _write_coco,
    "csv": _write_csv,
    "voc": _write_voc,
    "yolo": _write_yolo,
}
# These formats number frames from 0 or 1 on, for each recording anew.
_PER_RECORDING: dict[str, Callable[[Annotations, Path, ExportOptions], None]] = {
    "cvat": _write_cvat,
    "mot": _write_mot,
}
