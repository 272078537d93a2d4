"""Turns decoded predictions into detections: confidence threshold, suppression per class."""

import torch
from torch import Tensor

CANDIDATES = 3000  # per frame, by score, before suppression
BLOCK = 256  # candidates compared with each other at a time


def nms(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, threshold: float, limit: int | None = None
) -> Tensor:
    """Greedy non-maximum suppression within each class.

    Drops a box that overlaps a kept box of a higher score by an IoU above `threshold`.

    Args:
        boxes: (k, 4) x1, y1, x2, y2.
        scores, class_ids: (k,).
        threshold: IoU.
        limit: stop when this number of boxes is kept; None: no limit.

    Returns:
        (m,) int64 kept rows, highest score first. Of equal scores the first row comes first.
    """
    kept = torch.empty(0, dtype=torch.long, device=boxes.device)
    for block in torch.split(scores.argsort(descending=True, stable=True), BLOCK):
        block = block[~_overlaps(boxes, class_ids, block, kept, threshold).any(1)]
        overlaps = _overlaps(boxes, class_ids, block, block, threshold).cpu().numpy()
        alive = torch.ones(len(block), dtype=torch.bool).numpy()
        for i in range(len(alive)):
            if alive[i]:
                alive[i + 1 :] &= ~overlaps[i, i + 1 :]
        kept = torch.cat((kept, block[torch.from_numpy(alive).to(block.device)]))
        if limit is not None and len(kept) >= limit:
            return kept[:limit]
    return kept


def _overlaps(boxes: Tensor, class_ids: Tensor, a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """(len(a), len(b)) bool for rows a and b of boxes: same class and IoU above `threshold`."""
    first = boxes[a][:, None]
    second = boxes[b][None]
    low = torch.maximum(first[..., :2], second[..., :2])
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - low
    shared = sides.clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = shared / (area[a][:, None] + area[b][None] - shared).clamp(min=1e-12)
    return (iou > threshold) & (class_ids[a][:, None] == class_ids[b][None])


def detections(
    decoded: Tensor, *, confidence_threshold: float, nms_threshold: float, max_detections: int = 300
) -> list[Tensor]:
    """Selects the detections of each frame.

    Args:
        decoded: (n, cells, 5 + classes) cx, cy, w, h in pixels, objectness, class scores in 0..1.
        confidence_threshold: lowest objectness * class score.
        nms_threshold: IoU threshold of the suppression.
        max_detections: per frame.

    Returns:
        Per frame (k, 7): x1, y1, x2, y2 in pixels, objectness, class score, class id; highest
        objectness * class score first.
    """
    results = []
    for frame in decoded:
        best, class_ids = frame[:, 5:].max(1)
        scores = frame[:, 4] * best
        keep = (scores >= confidence_threshold).nonzero()[:, 0]
        if len(keep) > CANDIDATES:  # not topk, which takes any of equal scores
            keep = keep[scores[keep].argsort(descending=True, stable=True)[:CANDIDATES]]
        centre = frame[keep, :2]
        half = frame[keep, 2:4] / 2
        columns = (
            centre - half,
            centre + half,
            frame[keep, 4:5],
            best[keep, None],
            class_ids[keep, None].to(frame),
        )
        rows = torch.cat(columns, 1)
        kept = nms(rows[:, :4], scores[keep], class_ids[keep], nms_threshold, max_detections)
        results.append(rows[kept])
    return results
