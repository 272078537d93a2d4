"""COCO average precision over frames (Lin et al. 2014; Prophesee's protocol for event cameras scores labelled frames so)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from evspan.pipeline.evaluation.frames import LabelledFrames
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

AREAS, ALL_AREAS = (
    ("all", "small", "medium", "large"),
    0,
)  # in the order of COCO's area ranges; limits 32^2 and 96^2 pixels
EVERY, SMALL = (0.0, 1e10), (0.0, 32.0**2)  # square pixels, both ends included
IOU50, IOU75 = 0, 5  # rows of the thresholds 0.50, 0.55, ..., 0.95
MOST_DETECTIONS = (1, 10, 100)  # per frame and class
WORDS = {
    "ap": "AP 0.50:0.95",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar1": "AR, 1 a frame",
    "ar10": "AR, 10",
    "ar100": "AR, 100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}
SLICED = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "APs",
    "ap_medium": "APm",
    "ap_large": "APl",
    "ar100": "AR100",
}
Values = dict[str, float | int | None]


@dataclass(frozen=True)
class Metrics:
    """Shares from 0 to 1; None where there are no such boxes. `frames` were scored, with `boxes` and `detections` in them."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None  # of 100 a frame, as the other two
    ar_medium: float | None
    ar_large: float | None
    per_class: dict[str, float | None]  # AP 0.50:0.95
    frames: int
    boxes: int
    detections: int

    def scalars(self) -> dict[str, float]:
        """What there is a number of, by name, for curves."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("a")}
        values |= {f"ap_class/{name}": value for name, value in self.per_class.items()}
        return {k: v for k, v in values.items() if v is not None}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        rows = [(words, getattr(self, name)) for name, words in WORDS.items()]
        rows += [(f"AP {name}", value) for name, value in self.per_class.items()]
        lines = [
            f"  {words:<16} {'-' if value is None else format(value, '.3f'):>6}"
            for words, value in rows
        ]
        return "\n".join(
            [*lines, f"  {self.frames} frames, {self.boxes} boxes, {self.detections} detections"]
        )


class Scorer:
    """Scores frames as COCO does, again and again: all boxes, those of a group, those of some frames."""

    def __init__(
        self, frames: LabelledFrames, classes: Sequence[str], scores: NDArray | None = None
    ) -> None:
        """scores: (K,) to rank detections by, instead of theirs."""
        self.frames, self.classes = frames, list(classes)
        # Frames are images 1, 2, ...: no times, so no tolerance to trip over.
        self._images = [{"id": i + 1} for i in range(len(frames))]
        self._categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
        self._boxes = np.stack([frames.boxes[k] for k in "xywh"], 1).astype(np.float64)
        self._truth = self._with_areas(None)
        rows = frames.detections.astype(np.float64)
        self._found = self._truth.load_res(
            np.stack(
                (
                    frames.detection_frame + 1.0,
                    rows[:, 0],
                    rows[:, 1],
                    rows[:, 2] - rows[:, 0],
                    rows[:, 3] - rows[:, 1],
                    frames.scores if scores is None else scores,
                    rows[:, 6] + 1,
                ),
                1,
            )
        )

    def _with_areas(self, areas: NDArray | None) -> COCO:
        boxes = self.frames.boxes
        return COCO.from_arrays(
            self._images,
            self._categories,
            self.frames.box_frame + 1,
            boxes["class_id"].astype(np.int64) + 1,
            self._boxes,
            area=areas,
        )

    def matched(
        self,
        group: NDArray[np.bool_] | None = None,
        areas: Sequence[tuple[float, float]] | None = None,
    ) -> COCOeval:
        """
        Args:
            group: (M,) boxes that count. The others, and detections of them, are ignored as COCO ignores other sizes.
            areas: ranges instead of COCO's four; by default EVERY with a group.
        """
        # COCO counts boxes by their `area`, and unmatched detections by theirs: -1 lies outside every range of sizes.
        truth = (
            self._truth
            if group is None
            else self._with_areas(np.where(group, self._boxes[:, 2] * self._boxes[:, 3], -1.0))
        )
        evaluation = COCOeval(truth, self._found, "bbox")
        if areas is not None or group is not None:
            evaluation.params.area_rng = [list(a) for a in areas or [EVERY]]
            evaluation.params.area_rng_lbl = [AREAS[i] for i in range(len(areas or [EVERY]))]
            evaluation.params.max_dets = [MOST_DETECTIONS[-1]]
        evaluation.evaluate()
        return evaluation

    def metrics(self) -> Metrics:
        count, shape = (
            len(self.frames.boxes),
            (10, 101, len(self.classes), len(AREAS), len(MOST_DETECTIONS)),
        )
        precision, recall = (
            _curves(self.matched())
            if count
            else (np.full(shape, -1.0), np.full((10, *shape[2:]), -1.0))
        )
        most = len(MOST_DETECTIONS) - 1
        ap = {area: precision[:, :, :, i, most] for i, area in enumerate(AREAS)}
        ar = {area: recall[:, :, i, most] for i, area in enumerate(AREAS)}
        return Metrics(
            ap=_mean(ap["all"]),
            ap50=_mean(ap["all"][IOU50]),
            ap75=_mean(ap["all"][IOU75]),
            ap_small=_mean(ap["small"]),
            ap_medium=_mean(ap["medium"]),
            ap_large=_mean(ap["large"]),
            ar1=_mean(recall[:, :, ALL_AREAS, 0]),
            ar10=_mean(recall[:, :, ALL_AREAS, 1]),
            ar100=_mean(ar["all"]),
            ar_small=_mean(ar["small"]),
            ar_medium=_mean(ar["medium"]),
            ar_large=_mean(ar["large"]),
            per_class={name: _mean(ap["all"][:, :, k]) for k, name in enumerate(self.classes)},
            frames=len(self.frames),
            boxes=count,
            detections=len(self.frames.detections),
        )

    def of_group(self, group: NDArray[np.bool_]) -> Values:
        """AP and recall of these boxes (M,) alone; None where there are none."""
        if not group.any():
            return {"ap": None, "ap50": None, "recall": None, "recall50": None, "boxes": 0}
        precision, recall = _curves(self.matched(group))
        return {
            "ap": _mean(precision),
            "ap50": _mean(precision[IOU50]),
            "recall": _mean(recall),
            "recall50": _mean(recall[IOU50]),
            "boxes": int(np.count_nonzero(group)),
        }

    def of_frames(self, parts: Mapping[str, NDArray[np.bool_]]) -> dict[str, Values]:
        """By name, what the frames (F,) of each part score."""
        images = {name: (np.flatnonzero(part) + 1).tolist() for name, part in parts.items()}
        sliced = (
            self.matched().slice_by({k: v for k, v in images.items() if v})
            if len(self.frames.boxes)
            else {}
        )
        out: dict[str, Values] = {}
        for name, part in parts.items():
            values = {
                k: sliced[name][theirs] if name in sliced else -1.0 for k, theirs in SLICED.items()
            }
            out[name] = {k: None if v < 0 else float(v) for k, v in values.items()}
            out[name] |= {
                "frames": len(images[name]),
                "boxes": int(np.count_nonzero(part[self.frames.box_frame])),
                "detections": int(np.count_nonzero(part[self.frames.detection_frame])),
            }
        return out

    def confusion(self, iou: float, threshold: float) -> NDArray[np.int64]:
        """(classes + 1, classes + 1) counts: row the box's class, column that of the detection it was given; last: nothing.

        All classes compete: detections that score `threshold` or more, the surest first, take the box of the highest IoU of
        those left, if it is `iou` or more.
        """
        if not len(self.frames):
            return np.zeros((len(self.classes) + 1,) * 2, np.int64)
        told = COCOeval(self._truth, self._found, "bbox").confusion_matrix(
            iou, MOST_DETECTIONS[-1], threshold
        )
        return told["matrix"].astype(np.int64)


def coco_metrics(frames: LabelledFrames, classes: Sequence[str]) -> Metrics:
    """classes: names of class 0, 1, ..."""
    return Scorer(frames, classes).metrics()


def _curves(evaluation: COCOeval) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """precision (IoU, recall, class, area, most) and recall (IoU, class, area, most); -1 where there are no boxes."""
    evaluation.accumulate()
    curves = evaluation.eval
    assert curves is not None
    return curves["precision"], curves["recall"]


def _mean(values: NDArray[np.float64]) -> float | None:
    there = values[values > -1]
    return float(there.mean()) if there.size else None
