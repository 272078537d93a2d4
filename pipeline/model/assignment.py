"""SimOTA: which cells answer for which boxes (Ge et al. 2021), all labelled frames in one batch, no host synchronisation."""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import HeadConfig
from pipeline.model.head import Geometry, cells, decode_boxes

PAIRS_AT_ONCE = 2**23  # frames x boxes x cells; a chunk of frames stays below it


class Assignment(NamedTuple):
    """Per frame and cell. foreground: (n, cells) bool. box: (n, cells) int64, row of the frame's boxes. iou: (n, cells)."""

    foreground: Tensor
    box: Tensor
    iou: Tensor


def pairwise_iou(boxes: Tensor, predicted: Tensor) -> Tensor:
    """(n, G, 4) and (n, A, 4), both cx, cy, w, h -> (n, G, A)."""
    a, b = boxes[:, :, None], predicted[:, None]
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared).clamp(min=1e-9)


@torch.no_grad()
def assign(raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig) -> Assignment:
    """raw: (n, cells, 5 + classes); boxes: (n, G, 5) class, cx, cy, w, h, the first `counts` (n,) rows of each valid."""
    n, pairs = raw.shape[0], max(1, boxes.shape[1] * raw.shape[1])
    step = max(1, PAIRS_AT_ONCE // pairs)
    parts = [_assign(raw[i : i + step], boxes[i : i + step], counts[i : i + step], geometry, config)
             for i in range(0, max(n, 1), step)]
    return Assignment(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _assign(raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig) -> Assignment:
    raw, predicted = raw.float(), decode_boxes(raw, geometry)
    valid = torch.arange(boxes.shape[1], device=raw.device) < counts[:, None]  # (n, G)
    near = _near_centre(boxes, geometry, config.center_radius) & valid[..., None]  # (n, G, A)
    candidate = near.any(1, keepdim=True) & valid[..., None]
    iou = torch.where(candidate, pairwise_iou(boxes[..., 1:], predicted), 0.0)
    cost = _class_cost(raw, boxes) - 3.0 * torch.log(iou + 1e-8) + 1e6 * ~near
    cost = torch.where(candidate, cost, torch.inf)

    top = min(config.candidate_top_k, raw.shape[1])
    wanted = iou.topk(top, dim=2).values.sum(2).int().clamp(min=1)  # dynamic k
    cheapest = cost.topk(top, dim=2, largest=False)
    chosen = (torch.arange(top, device=raw.device) < wanted[..., None]) & cheapest.values.isfinite()
    matching = torch.zeros_like(near).scatter_(2, cheapest.indices, chosen)
    contested = matching.sum(1, keepdim=True) > 1
    best = torch.zeros_like(near).scatter_(1, cost.argmin(1, keepdim=True), True)
    matching = torch.where(contested, best, matching)
    return Assignment(matching.any(1), matching.int().argmax(1), (matching * iou).sum(1))


def _near_centre(boxes: Tensor, geometry: Geometry, radius: float) -> Tensor:
    """(n, G, A): the cell's centre lies strictly within `radius` strides of the box's, in both directions."""
    places, strides = cells(geometry, boxes.device)
    distance = ((places + 0.5) * strides - boxes[:, :, None, 1:3]).abs().amax(-1)
    return distance < radius * strides[:, 0]


def _class_cost(raw: Tensor, boxes: Tensor) -> Tensor:
    """(n, G, A): binary cross-entropy of sqrt(class score * objectness) against the box's class, summed over classes."""
    score = (raw[..., 5:].sigmoid() * raw[..., 4:5].sigmoid()).sqrt()
    hit, miss = -score.log().clamp(min=-100), -torch.log1p(-score).clamp(min=-100)
    kind = boxes[..., 0].long()[:, :, None].expand(-1, -1, raw.shape[1])
    return miss.sum(-1)[:, None] + (hit - miss).transpose(1, 2).gather(1, kind)
