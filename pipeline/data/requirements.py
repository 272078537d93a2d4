"""Opens splits to train on or to score: they have labels, and classes that the head has."""

from collections.abc import Sequence

from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.text import plural
from evspan.pipeline.data.datasets import Dataset, RecordingData, open_dataset


def open_training(config: DatasetConfig, num_classes: int) -> Dataset:
    """Opens the split train of a dataset that a detector can learn from.

    Args:
        num_classes: outputs of the detector's head.

    Raises:
        ConfigError, ShardError: as `open_dataset`; the head has fewer classes than the dataset, or
            no frame is labelled.
    """
    data = open_dataset(config, "train")
    if len(data.classes) > num_classes:
        raise ConfigError(
            f"{config.place} has {len(data.classes)} classes ({', '.join(data.classes)}) but "
            f"model.head.num_classes is {num_classes}; set "
            f"model.head.num_classes={len(data.classes)} or more"
        )
    for place, part in _parts(config, data):
        _require_labels(part, place, "train", "nothing can be learned")
    return data


def open_scored(config: DatasetConfig, split: str) -> Dataset:
    """Opens a split that detections can be scored on.

    Raises:
        ConfigError, ShardError: as `open_dataset`; or no frame is labelled.
    """
    data = open_dataset(config, split)
    _require_labels(data.recordings, config.place, split, "nothing can be scored")
    return data


def _parts(config: DatasetConfig, data: Dataset) -> list[tuple[str, list[RecordingData]]]:
    """Folder and recordings of each root of a split that all roots have."""
    if not data.parts:
        return [(config.place, data.recordings)]
    parts = []
    for source, part in zip(config.sources, data.parts, strict=True):
        parts.append((source.root, [data.recordings[i] for i in part.recordings]))
    return parts


def _require_labels(
    recordings: Sequence[RecordingData], root: str, split: str, consequence: str
) -> None:
    if any(recording.labelled.any() for recording in recordings):
        return
    frames = sum(recording.frames for recording in recordings)
    raise ShardError(
        f"{root}, split {split}: none of {plural(frames, 'frame')} in "
        f"{plural(len(recordings), 'recording')} is labelled, so {consequence}. Put the box "
        "files (X_bbox.npy) next to the recordings (X_td.*) and run the same evspan prep again; "
        "evspan prep report shows where labels are"
    )
