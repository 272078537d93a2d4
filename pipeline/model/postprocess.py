"""Decoded predictions -> detections: confidence threshold and non-maximum suppression per class."""

import torch
from torch import Tensor

CANDIDATES = 3000  # per frame, by score, before suppression
BLOCK = 256  # candidates compared with each other at a time


def nms(
    boxes: Tensor, scores: Tensor, kinds: Tensor, threshold: float, limit: int | None = None
) -> Tensor:
    """Greedy suppression within each class: what overlaps a kept, better box by an IoU above `threshold` goes.

    Args:
        boxes: (k, 4) x1, y1, x2, y2. scores, kinds: (k,). limit: stop when so many are kept.
    Returns:
        the kept rows, best first.
    """
    kept = torch.empty(0, dtype=torch.long, device=boxes.device)
    for block in scores.argsort(descending=True, stable=True).split(BLOCK):
        block = block[~_overlaps(boxes, kinds, block, kept, threshold).any(1)]
        over = _overlaps(boxes, kinds, block, block, threshold).cpu().numpy()
        alive = torch.ones(len(block), dtype=torch.bool).numpy()
        for i in range(len(alive)):
            if alive[i]:
                alive[i + 1 :] &= ~over[i, i + 1 :]
        kept = torch.cat((kept, block[torch.from_numpy(alive).to(block.device)]))
        if limit is not None and len(kept) >= limit:
            return kept[:limit]
    return kept


def _overlaps(boxes: Tensor, kinds: Tensor, a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """(len(a), len(b)) bool for rows a and b of boxes: same class and IoU above `threshold`."""
    first, second = boxes[a][:, None], boxes[b][None]
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(
        first[..., :2], second[..., :2]
    )
    shared = sides.clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = shared / (area[a][:, None] + area[b][None] - shared).clamp(min=1e-12)
    return (iou > threshold) & (kinds[a][:, None] == kinds[b][None])


def detections(
    decoded: Tensor, *, confidence_threshold: float, nms_threshold: float, max_detections: int = 300
) -> list[Tensor]:
    """
    Args:
        decoded: (n, cells, 5 + classes) cx, cy, w, h, objectness, class scores.
        confidence_threshold: smallest objectness * class score.
    Returns:
        per frame (k, 7): x1, y1, x2, y2, objectness, class score, class id; objectness * class score descending.
    """
    out = []
    for frame in decoded:
        best, kinds = frame[:, 5:].max(1)
        scores = frame[:, 4] * best
        keep = (scores >= confidence_threshold).nonzero()[:, 0]
        if len(keep) > CANDIDATES:  # not topk, which takes any of equal scores
            keep = keep[scores[keep].argsort(descending=True, stable=True)[:CANDIDATES]]
        centre, half = frame[keep, :2], frame[keep, 2:4] / 2
        rows = torch.cat(
            (
                centre - half,
                centre + half,
                frame[keep, 4:5],
                best[keep, None],
                kinds[keep, None].to(frame),
            ),
            1,
        )
        out.append(rows[nms(rows[:, :4], scores[keep], kinds[keep], nms_threshold, max_detections)])
    return out
