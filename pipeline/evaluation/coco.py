"""COCO average precision over labelled frames (Lin et al. 2014), as in Prophesee's protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from evspan.pipeline.evaluation.frames import LabelledFrames
from evspan.pipeline.evaluation.ignored import only_in_regions
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

# In the order of COCO's area ranges; their limits are 32^2 and 96^2 pixels.
AREAS = ("all", "small", "medium", "large")
ALL_AREAS = 0
# Area ranges in square pixels, both ends included.
EVERY = (0.0, 1e10)
SMALL = (0.0, 32.0**2)
# Rows of the IoU thresholds 0.50, 0.55, ..., 0.95.
IOU50 = 0
IOU75 = 5
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
    """Fractions from 0 to 1; None where there are no such boxes.

    Attributes:
        ap: over IoU 0.50:0.95.
        ap50, ap75: at one IoU threshold.
        ap_small, ap_medium, ap_large: of boxes of one size.
        ar1, ar10, ar100: recall with that number of detections per frame and class.
        ar_small, ar_medium, ar_large: recall of boxes of one size, with 100 detections.
        per_class: AP over IoU 0.50:0.95.
        frames, boxes, detections: how many were scored.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_class: dict[str, float | None]
    frames: int
    boxes: int
    detections: int

    def scalars(self) -> dict[str, float]:
        """All values that are not None, by name, for curves."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("a")}
        values |= {f"ap_class/{name}": value for name, value in self.per_class.items()}
        return {k: v for k, v in values.items() if v is not None}

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The metrics as lines of text."""
        rows = [(words, getattr(self, name)) for name, words in WORDS.items()]
        rows += [(f"AP {name}", value) for name, value in self.per_class.items()]
        lines = []
        for words, value in rows:
            text = "-" if value is None else format(value, ".3f")
            lines.append(f"  {words:<16} {text:>6}")
        lines.append(f"  {self.frames} frames, {self.boxes} boxes, {self.detections} detections")
        return "\n".join(lines)


class Scorer:
    """Scores frames as COCO does: all boxes, those of a group, or those of some frames.

    Args:
        frames: what is scored.
        classes: names of class 0, 1, ...
        scores: (K,) to rank detections by; None: objectness x class score.
    """

    def __init__(
        self,
        frames: LabelledFrames,
        classes: Sequence[str],
        scores: NDArray[np.float64] | None = None,
    ) -> None:
        self.frames = frames
        self.classes = list(classes)
        # Frames are images 1, 2, ...: without times, so without a time tolerance.
        self._images = [{"id": i + 1} for i in range(len(frames))]
        self._categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
        self._boxes = _sides(frames.boxes)
        self._crowds = _sides(frames.regions)
        self._truth = self._with_areas(None)
        self._scores = frames.scores if scores is None else scores
        rows = frames.detections.astype(np.float64)
        columns = (
            frames.detection_frame + 1.0,
            rows[:, 0],
            rows[:, 1],
            rows[:, 2] - rows[:, 0],
            rows[:, 3] - rows[:, 1],
            self._scores,
            rows[:, 6] + 1,
        )
        self._detections = self._truth.load_res(np.stack(columns, 1))

    def _with_areas(self, areas: NDArray[np.float64] | None) -> COCO:
        """The boxes; areas: (M,) square pixels, None: their own.

        An ignore region is a crowd of every class: detections that match no box, and of whose area
        it covers at least the threshold of the IoU, are ignored.
        """
        frames = self.frames
        num_classes = len(self.classes)
        num_crowds = num_classes * len(frames.regions)
        crowd_classes = np.repeat(np.arange(1, num_classes + 1), len(frames.regions))
        class_ids = frames.boxes["class_id"].astype(np.int64) + 1
        crowds = np.tile(self._crowds, (num_classes, 1))
        if areas is not None:
            areas = np.concatenate((areas, crowds[:, 2] * crowds[:, 3]))
        is_crowd = np.zeros(len(class_ids) + num_crowds, bool)
        is_crowd[len(class_ids) :] = True
        return COCO.from_arrays(
            self._images,
            self._categories,
            np.concatenate((frames.box_frame, np.tile(frames.region_frame, num_classes))) + 1,
            np.concatenate((class_ids, crowd_classes)),
            np.concatenate((self._boxes, crowds)),
            area=areas,
            iscrowd=is_crowd,
        )

    def matched(
        self,
        group: NDArray[np.bool_] | None = None,
        areas: Sequence[tuple[float, float]] | None = None,
    ) -> COCOeval:
        """Matches detections to boxes.

        Args:
            group: (M,) boxes that count. The others, and detections of them, are ignored as COCO
                ignores other sizes.
            areas: ranges in square pixels; None: COCO's four, or EVERY with a group.
        """
        truth = self._truth
        if group is not None:
            # COCO counts boxes by their `area`, and unmatched detections by theirs: -1 is outside
            # every range.
            own_areas = self._boxes[:, 2] * self._boxes[:, 3]
            truth = self._with_areas(np.where(group, own_areas, -1.0))
        evaluation = COCOeval(truth, self._detections, "bbox")
        if areas is not None or group is not None:
            ranges = areas or [EVERY]
            evaluation.params.area_rng = [list(area) for area in ranges]
            evaluation.params.area_rng_lbl = list(AREAS[: len(ranges)])
            evaluation.params.max_dets = [MOST_DETECTIONS[-1]]
        evaluation.evaluate()
        return evaluation

    def metrics(self) -> Metrics:
        """COCO's metrics of all boxes."""
        count = len(self.frames.boxes)
        if count:
            precision, recall = _curves(self.matched())
        else:
            shape = (len(self.classes), len(AREAS), len(MOST_DETECTIONS))
            precision = np.full((10, 101, *shape), -1.0)
            recall = np.full((10, *shape), -1.0)
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
        """AP and recall of a group of boxes (M,); None where there are none."""
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
        """AP and recall of parts of the frames.

        Args:
            parts: by name, the frames (F,) of each part.

        Returns:
            By name; None where a part has no boxes.
        """
        images = {name: (np.flatnonzero(part) + 1).tolist() for name, part in parts.items()}
        sliced = {}
        if len(self.frames.boxes):
            sliced = self.matched().slice_by({name: ids for name, ids in images.items() if ids})
        results: dict[str, Values] = {}
        for name, part in parts.items():
            values: Values = {}
            for key, hotcoco_key in SLICED.items():
                value = float(sliced[name][hotcoco_key]) if name in sliced else -1.0
                values[key] = None if value < 0 else value
            values["frames"] = len(images[name])
            values["boxes"] = int(np.count_nonzero(part[self.frames.box_frame]))
            values["detections"] = int(np.count_nonzero(part[self.frames.detection_frame]))
            results[name] = values
        return results

    def confusion(self, iou: float, threshold: float) -> NDArray[np.int64]:
        """Confusion matrix. All classes compete for the boxes.

        Each detection, the highest score first, takes the box of the highest IoU of those left.
        Detections that take none and lie in an ignore region are left out.

        Args:
            iou: lowest IoU of a match.
            threshold: lowest score.

        Returns:
            (classes + 1, classes + 1) counts: the row is the box's class, the column the
            detection's; the last of both is "nothing".
        """
        if not len(self.frames):
            return np.zeros((len(self.classes) + 1,) * 2, np.int64)
        if len(self.frames.regions):
            kept = ~only_in_regions(self.frames, iou, threshold, MOST_DETECTIONS[-1])
            every_frame = np.ones(len(self.frames), bool)
            every_box = np.ones(len(self.frames.boxes), bool)
            without = replace(
                self.frames.only(every_frame, every_box, kept),
                regions=self.frames.regions[:0],
                region_frame=self.frames.region_frame[:0],
            )
            return Scorer(without, self.classes, self._scores[kept]).confusion(iou, threshold)
        evaluation = COCOeval(self._truth, self._detections, "bbox")
        result = evaluation.confusion_matrix(iou, MOST_DETECTIONS[-1], threshold)
        matrix: NDArray[np.int64] = result["matrix"].astype(np.int64)
        return matrix


def coco_metrics(frames: LabelledFrames, classes: Sequence[str]) -> Metrics:
    """COCO's metrics; classes: names of class 0, 1, ..."""
    return Scorer(frames, classes).metrics()


def _curves(evaluation: COCOeval) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall; -1 where there are no boxes.

    Returns:
        precision (IoU, recall, class, area, most) and recall (IoU, class, area, most).
    """
    evaluation.accumulate()
    curves = evaluation.eval
    assert curves is not None
    return curves["precision"], curves["recall"]


def _mean(values: NDArray[np.float64]) -> float | None:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def _sides(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """(M,) structured boxes -> (M, 4) x, y, w, h in pixels."""
    return np.stack([boxes[side] for side in "xywh"], 1).astype(np.float64)
