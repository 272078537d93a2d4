"""COCO average precision over frames (Lin et al. 2014; Prophesee's protocol for event cameras scores labelled frames so)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

AREAS, ALL_AREAS = ("all", "small", "medium", "large"), 0  # in the order of COCO's area ranges; limits 32^2 and 96^2 pixels
IOU50, IOU75 = 0, 5  # rows of the thresholds 0.50, 0.55, ..., 0.95
MOST_DETECTIONS = (1, 10, 100)  # per frame and class
WORDS = {"ap": "AP 0.50:0.95", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium",
         "ap_large": "AP large", "ar1": "AR, 1 a frame", "ar10": "AR, 10", "ar100": "AR, 100"}


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
        lines = [f"  {words:<16} {'-' if value is None else format(value, '.3f'):>6}" for words, value in rows]
        return "\n".join([*lines, f"  {self.frames} frames, {self.boxes} boxes, {self.detections} detections"])


def coco_metrics(boxes: Sequence[NDArray], detections: Sequence[NDArray], classes: Sequence[str]) -> Metrics:
    """
    Args:
        boxes: per frame a structured array with x, y, w, h (pixels, top left corner) and class_id.
        detections: per frame (k, 7) x1, y1, x2, y2, objectness, class score, class id, ranked by the product of the scores.
        classes: names of class 0, 1, ...
    """
    truth, found = coco_form(boxes, detections, classes)
    total, count = sum(len(b) for b in boxes), len(found)
    precision, recall = _curves(truth, found) if total else (np.full((10, 101, len(classes), 4, 3), -1.0),
                                                             np.full((10, len(classes), 4, 3), -1.0))
    most = len(MOST_DETECTIONS) - 1
    by_area = {area: precision[:, :, :, i, most] for i, area in enumerate(AREAS)}
    every = by_area["all"]
    return Metrics(
        ap=_mean(every), ap50=_mean(every[IOU50]), ap75=_mean(every[IOU75]),
        ap_small=_mean(by_area["small"]), ap_medium=_mean(by_area["medium"]), ap_large=_mean(by_area["large"]),
        ar1=_mean(recall[:, :, ALL_AREAS, 0]), ar10=_mean(recall[:, :, ALL_AREAS, 1]), ar100=_mean(recall[:, :, ALL_AREAS, 2]),
        per_class={name: _mean(every[:, :, k]) for k, name in enumerate(classes)},
        frames=len(boxes), boxes=total, detections=count)


def coco_form(boxes: Sequence[NDArray], detections: Sequence[NDArray],
              classes: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(dataset, results) as COCO's tools take them. Frames are images 1, 2, ...: no times, so no tolerance to trip over."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (truth, found) in enumerate(zip(boxes, detections, strict=True), 1):
        for box in truth:
            x, y, w, h = (float(box[k]) for k in "xywh")
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": int(box["class_id"]) + 1,
                                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        for x1, y1, x2, y2, objectness, score, kind in found.astype(np.float64).tolist():
            results.append({"image_id": image, "category_id": int(kind) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "score": objectness * score})
    images = [{"id": i + 1} for i in range(len(boxes))]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def _curves(truth: dict[str, Any], found: list[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """precision (IoU, recall, class, area, most) and recall (IoU, class, area, most); -1 where there are no boxes."""
    dataset = COCO(truth)
    evaluation = COCOeval(dataset, dataset.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval
    assert curves is not None
    return curves["precision"], curves["recall"]


def _mean(values: NDArray[np.float64]) -> float | None:
    there = values[values > -1]
    return float(there.mean()) if there.size else None
