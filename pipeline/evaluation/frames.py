"""What is scored: labelled frames with their boxes and detections, in flat arrays and as a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.training import EvaluationConfig
from numpy.typing import NDArray

FRAMES = "frames.npz"  # next to metrics.json
BOX_FIELDS = ("x", "y", "w", "h", "class_id", "track_id")
NO_BOXES = np.dtype([(name, "f4") for name in BOX_FIELDS])
REGION_ARRAYS = ("regions", "region_frame")  # not in files of earlier versions


@dataclass(frozen=True)
class LabelledFrames:
    """F labelled frames with M boxes and K detections.

    Frames are sorted by recording, then by time; boxes, detections and ignore regions are in the
    order of their frames.

    Attributes:
        names: of the recordings.
        recording: (F,) index of the frame's recording.
        end_us: (F,) end of the frame, since the recording's first event.
        boxes: (M,) structured; x, y (top left corner), w, h in pixels of the stored frames,
            class_id, track_id.
        box_frame: (M,) index of the box's frame.
        detections: (K, 7) x1, y1, x2, y2 in pixels, objectness, class score, class id.
        detection_frame: (K,) index of the detection's frame.
        regions: (R,) structured as boxes, the ignore regions: detections that only match one do not
            count, as with COCO's crowds.
        region_frame: (R,) index of the region's frame.
    """

    names: list[str]
    recording: NDArray[np.int64]
    end_us: NDArray[np.int64]
    boxes: NDArray[Any]
    box_frame: NDArray[np.int64]
    detections: NDArray[np.float32]
    detection_frame: NDArray[np.int64]
    regions: NDArray[Any] = field(default_factory=lambda: np.zeros(0, NO_BOXES))
    region_frame: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.recording)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(K,) objectness x class score, by which detections are ranked."""
        return self.detections[:, 4].astype(np.float64) * self.detections[:, 5]

    def only(
        self, frames: NDArray[np.bool_], boxes: NDArray[np.bool_], detections: NDArray[np.bool_]
    ) -> "LabelledFrames":
        """A subset. Ignore regions stay with their frames.

        Args:
            frames: (F,) the frames to keep.
            boxes: (M,), detections: (K,) those to keep of what is in these frames.
        """
        number = np.cumsum(frames) - 1
        boxes = boxes & frames[self.box_frame]
        detections = detections & frames[self.detection_frame]
        regions = frames[self.region_frame]
        return replace(
            self,
            recording=self.recording[frames],
            end_us=self.end_us[frames],
            boxes=self.boxes[boxes],
            box_frame=number[self.box_frame[boxes]],
            detections=self.detections[detections],
            detection_frame=number[self.detection_frame[detections]],
            regions=self.regions[regions],
            region_frame=number[self.region_frame[regions]],
        )


def labelled_frames(
    names: Sequence[str],
    end_us: Sequence[NDArray[np.int64]],
    boxes: Sequence[Sequence[NDArray[Any]]],
    detections: Sequence[Sequence[NDArray[np.float32]]],
) -> LabelledFrames:
    """Flattens a list per recording.

    Args:
        names: of the recordings.
        end_us: per recording (n,), of its labelled frames.
        boxes: per recording and labelled frame (k,) structured; of class -1: ignore regions.
        detections: per recording and labelled frame (k, 7).
    """
    counts = [len(ends) for ends in end_us]
    boxes_of_frames = list(chain.from_iterable(boxes))
    detections_of_frames = list(chain.from_iterable(detections))
    assert len(boxes_of_frames) == len(detections_of_frames) == sum(counts)
    indices = np.arange(sum(counts))
    no_boxes: NDArray[Any] = np.zeros(0, NO_BOXES)
    rows = np.concatenate(boxes_of_frames) if boxes_of_frames else no_boxes
    row_frame = np.repeat(indices, [len(b) for b in boxes_of_frames])
    ignored = rows["class_id"] < 0
    no_detections = np.zeros((0, 7), np.float32)
    return LabelledFrames(
        names=list(names),
        recording=np.repeat(np.arange(len(counts)), counts),
        end_us=np.concatenate([np.zeros(0, np.int64), *end_us]),
        boxes=rows[~ignored],
        box_frame=row_frame[~ignored],
        detections=np.concatenate(detections_of_frames) if boxes_of_frames else no_detections,
        detection_frame=np.repeat(indices, [len(d) for d in detections_of_frames]),
        regions=rows[ignored],
        region_frame=row_frame[ignored],
    )


def scored(
    frames: LabelledFrames, config: EvaluationConfig
) -> tuple[LabelledFrames, NDArray[np.bool_]]:
    """Applies the filters of the protocol, the same to boxes and detections.

    The filters of sizes do not apply to ignore regions. A frame that has nothing else is empty.

    Args:
        config: from `protocol_of`.

    Returns:
        The frames that are scored, and which boxes (M,) are among them.
    """
    rows = frames.detections
    boxes = large_enough(frames.boxes["w"], frames.boxes["h"], config)
    detections = large_enough(rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1], config)
    late = frames.end_us > 1000 * config.skip_first_ms
    if config.skip_empty_frames:
        late &= np.bincount(frames.box_frame[boxes], minlength=len(frames)) > 0
    return frames.only(late, boxes, detections), boxes & late[frames.box_frame]


def large_enough(w: NDArray[Any], h: NDArray[Any], config: EvaluationConfig) -> NDArray[np.bool_]:
    """Which boxes have a size that is scored.

    Args:
        w, h: (n,) in pixels of the stored frames.
        config: from `protocol_of`; a minimum of None is none.

    Returns:
        (n,).
    """
    is_side_long = np.minimum(w, h) >= (config.min_side or 0)
    is_diagonal_long = np.hypot(w, h) >= (config.min_diagonal or 0)
    result: NDArray[np.bool_] = is_side_long & is_diagonal_long
    return result


def save_frames(path: Path, frames: LabelledFrames) -> None:
    """Writes an .npz file with an array per attribute."""
    arrays: dict[str, Any] = {f.name: np.asarray(getattr(frames, f.name)) for f in fields(frames)}
    np.savez(path, **arrays)


def load_frames(path: Path) -> LabelledFrames:
    """Reads what `save_frames` wrote.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    try:
        with np.load(path) as stored:  # nothing is unpickled
            names = [f.name for f in fields(LabelledFrames)]
            values: dict[str, Any] = {
                name: stored[name] for name in names if name in stored or name not in REGION_ARRAYS
            }
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there, so frames cannot be compared. Evaluate again with "
            "evaluation.write_detections=true"
        ) from error
    except (BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{path} holds no frames of an evaluation ({error}). Evaluate again"
        ) from error
    values["names"] = values["names"].tolist()
    return LabelledFrames(**values)
