"""Decoded predictions -> detections: confidence threshold and non-maximum suppression per class."""

import torch
from torch import Tensor

CANDIDATES = 3000  # per frame, by score, before suppression


def nms(boxes: Tensor, scores: Tensor, kinds: Tensor, threshold: float) -> Tensor:
    """Greedy suppression within each class: (k, 4) x1, y1, x2, y2, scores and classes (k,) -> kept rows, best first."""
    order = scores.argsort(descending=True, stable=True)
    ordered, kinds = boxes[order], kinds[order]
    area = (ordered[:, 2:] - ordered[:, :2]).prod(1)
    shared = (torch.minimum(ordered[:, None, 2:], ordered[None, :, 2:])
              - torch.maximum(ordered[:, None, :2], ordered[None, :, :2])).clamp(min=0).prod(-1)
    iou = shared / (area[:, None] + area[None] - shared).clamp(min=1e-12)
    over = ((iou > threshold) & (kinds[:, None] == kinds[None])).cpu().numpy()
    alive = torch.ones(len(order), dtype=torch.bool).numpy()
    for i in range(len(alive)):
        if alive[i]:
            alive[i + 1 :] &= ~over[i, i + 1 :]
    return order[torch.from_numpy(alive).to(order.device)]


def detections(decoded: Tensor, *, confidence_threshold: float, nms_threshold: float, max_detections: int = 300) -> list[Tensor]:
    """
    Args:
        decoded: (n, cells, 5 + classes) cx, cy, w, h, objectness, class scores.
    Returns:
        per frame (k, 7): x1, y1, x2, y2, objectness, class score, class id; objectness * class score descending.
    """
    out = []
    for frame in decoded:
        best, kinds = frame[:, 5:].max(1)
        scores = frame[:, 4] * best
        keep = (scores >= confidence_threshold).nonzero()[:, 0]
        if len(keep) > CANDIDATES:
            keep = keep[scores[keep].topk(CANDIDATES).indices]
        centre, half = frame[keep, :2], frame[keep, 2:4] / 2
        rows = torch.cat((centre - half, centre + half, frame[keep, 4:5], best[keep, None], kinds[keep, None].to(frame)), 1)
        out.append(rows[nms(rows[:, :4], scores[keep], rows[:, 6], nms_threshold)][:max_detections])
    return out
