"""Random boxes and detections of some frames, and the same scored by pycocotools."""

import numpy as np
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.evaluation.frames import labelled_frames
from support.coco_reference import coco_evaluation


def some_boxes(rng, count):
    """`count` random boxes of 3 classes."""
    boxes = np.zeros(count, BOX)
    boxes["w"], boxes["h"] = rng.uniform(4, 150, (2, count))
    boxes["x"], boxes["y"] = rng.uniform(0, 400, (2, count))
    boxes["class_id"] = rng.integers(0, 3, count)
    return boxes


def as_detections(rng, boxes, jitter):
    """Moved and resized copies with random scores."""
    corners = np.stack(
        (boxes["x"], boxes["y"], boxes["x"] + boxes["w"], boxes["y"] + boxes["h"]), 1
    )
    corners += rng.normal(0, jitter, corners.shape) * np.stack((boxes["w"], boxes["h"]) * 2, 1)
    scores = rng.uniform(0.01, 1, (len(boxes), 2))
    return np.concatenate((corners, scores, boxes["class_id"][:, None]), 1).astype(np.float32)


def some_frames(seed, frames=40):
    """Boxes and detections of each frame."""
    rng = np.random.default_rng(seed)
    boxes = [some_boxes(rng, rng.integers(0, 12)) for _ in range(frames)]
    detections = []
    for truth in boxes:
        hits = as_detections(rng, truth[rng.random(len(truth)) < 0.8], rng.choice([0.02, 0.1]))
        false_alarms = as_detections(rng, some_boxes(rng, rng.integers(0, 5)), 0)
        detections.append(np.concatenate((hits, false_alarms)))
    return boxes, detections


def flat(boxes, detections):
    """Frames of one recording, 50 ms apart."""
    return labelled_frames(["a"], [50_000 * np.arange(1, len(boxes) + 1)], [boxes], [detections])


def by_pycocotools(boxes, detections, classes, counts=None):
    """Scores frames. counts: per frame which boxes count; others get an area beyond COCO's."""
    annotations = []
    results = []
    for image, (truth, rows) in enumerate(zip(boxes, detections, strict=True), 1):
        for i, box in enumerate(truth):
            x, y, w, h = (float(box[k]) for k in "xywh")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(box["class_id"]) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h if counts is None or counts[image - 1][i] else 1e11,
                    "iscrowd": 0,
                }
            )
        for x1, y1, x2, y2, objectness, confidence, class_id in rows.astype(np.float64).tolist():
            results.append(
                {
                    "image_id": image,
                    "category_id": int(class_id) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": objectness * confidence,
                }
            )
    return coco_evaluation(len(boxes), annotations, results, classes)
