"""What is scored: labelled frames of recordings with their boxes and detections, in flat arrays; as a file for `compare`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.training import EvaluationConfig
from numpy.typing import NDArray

FRAMES = "frames.npz"  # beside metrics.json


@dataclass(frozen=True)
class LabelledFrames:
    """F labelled frames, recording after recording, in order of time; M boxes and K detections in the order of their frames."""

    names: list[str]  # of the recordings
    recording: NDArray[np.int64]  # (F,) which of them
    end_us: NDArray[np.int64]  # (F,) end of the frame since the recording's first event
    boxes: NDArray  # (M,) x, y, w, h in pixels of the stored frames (x, y: top left corner), class_id, track_id
    box_frame: NDArray[np.int64]  # (M,)
    detections: NDArray[np.float32]  # (K, 7) x1, y1, x2, y2, objectness, class score, class id
    detection_frame: NDArray[np.int64]  # (K,)

    def __len__(self) -> int:
        return len(self.recording)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(K,) what detections are ranked by: objectness x class score."""
        return self.detections[:, 4].astype(np.float64) * self.detections[:, 5]

    def only(
        self, frames: NDArray[np.bool_], boxes: NDArray[np.bool_], detections: NDArray[np.bool_]
    ) -> "LabelledFrames":
        """These frames, and of what is in them these boxes and detections."""
        number = np.cumsum(frames) - 1
        boxes, detections = (
            boxes & frames[self.box_frame],
            detections & frames[self.detection_frame],
        )
        return replace(
            self,
            recording=self.recording[frames],
            end_us=self.end_us[frames],
            boxes=self.boxes[boxes],
            box_frame=number[self.box_frame[boxes]],
            detections=self.detections[detections],
            detection_frame=number[self.detection_frame[detections]],
        )


def labelled_frames(
    names: Sequence[str],
    end_us: Sequence[NDArray[np.int64]],
    boxes: Sequence[Sequence[NDArray]],
    detections: Sequence[Sequence[NDArray]],
) -> LabelledFrames:
    """From a list per recording, with an entry per labelled frame: boxes (n,) structured, detections (k, 7)."""
    counts = [len(ends) for ends in end_us]
    truth, found = [b for part in boxes for b in part], [d for part in detections for d in part]
    assert len(truth) == len(found) == sum(counts)
    return LabelledFrames(
        list(names),
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([np.zeros(0, np.int64), *end_us]),
        np.concatenate(truth)
        if truth
        else np.zeros(0, [(k, "f4") for k in ("x", "y", "w", "h", "class_id", "track_id")]),
        np.repeat(np.arange(len(truth)), [len(b) for b in truth]),
        np.concatenate(found) if found else np.zeros((0, 7), np.float32),
        np.repeat(np.arange(len(found)), [len(d) for d in found]),
    )


def scored(
    frames: LabelledFrames, config: EvaluationConfig
) -> tuple[LabelledFrames, NDArray[np.bool_]]:
    """What the protocol scores, and which boxes (M,) are in it. Boxes and detections pass the same filters."""
    rows = frames.detections
    boxes = _large_enough(frames.boxes["w"], frames.boxes["h"], config)
    detections = _large_enough(rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1], config)
    late = frames.end_us > 1000 * config.skip_first_ms
    if config.skip_empty_frames:
        late &= np.bincount(frames.box_frame[boxes], minlength=len(frames)) > 0
    return frames.only(late, boxes, detections), boxes & late[frames.box_frame]


def _large_enough(w: NDArray, h: NDArray, config: EvaluationConfig) -> NDArray[np.bool_]:
    return (np.minimum(w, h) >= config.min_side) & (np.hypot(w, h) >= config.min_diagonal)


def save_frames(path: Path, frames: LabelledFrames) -> None:
    np.savez(path, **{f.name: np.asarray(getattr(frames, f.name)) for f in fields(frames)})  # type: ignore[arg-type]


def load_frames(path: Path) -> LabelledFrames:
    """Raises UserError where there is no such file, or another one."""
    try:
        with np.load(path) as stored:  # nothing is unpickled
            values: dict[str, Any] = {f.name: stored[f.name] for f in fields(LabelledFrames)}
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there, so frames cannot be compared. Evaluate again with "
            "evaluation.write_detections=true"
        ) from error
    except (BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{path} holds no frames of an evaluation ({error}). Evaluate again"
        ) from error
    return LabelledFrames(**values | {"names": values["names"].tolist()})
