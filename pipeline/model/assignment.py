"""SimOTA: which cells answer for which boxes (Ge et al. 2021), all labelled frames in one batch, no host synchronisation."""

import math
from typing import NamedTuple

import torch
from evspan.conf.schema.training import HeadConfig
from evspan.pipeline.model.head import Geometry, cells, centre_and_size, once_per_geometry
from torch import Tensor

PAIRS_AT_ONCE = (
    2**22
)  # boxes x cells compared at a time, some 100 bytes each; at least those of one frame


class Assignment(NamedTuple):
    """Per frame and cell. foreground: (n, cells) bool. box: (n, cells) int64, row of the frame's boxes. iou: (n, cells).

    In the background box and iou mean nothing.
    """

    foreground: Tensor
    box: Tensor
    iou: Tensor


@torch.no_grad()
def assign(
    raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig
) -> Assignment:
    """Of equal costs the first cell counts, and the first box.

    Args:
        raw: (n, cells, 5 + classes). boxes: (n, G, 5) float32 class, cx, cy, w, h, G at least 1; the first `counts` (n,)
            rows of each frame are valid.
    """
    n = raw.shape[0]
    step = max(1, PAIRS_AT_ONCE // (boxes.shape[1] * _most_candidates(boxes, geometry, config)))
    if n <= step:
        return _assign(raw, boxes, counts, geometry, config)
    parts = [
        _assign(raw[i : i + step], boxes[i : i + step], counts[i : i + step], geometry, config)
        for i in range(0, n, step)
    ]
    return Assignment(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _assign(
    raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig
) -> Assignment:
    padding = torch.arange(boxes.shape[1], device=raw.device) >= counts[:, None]  # (n, G)
    # Padding lies infinitely far away: near no cell, overlapping none. Coordinates come first: (n, 2, G, 1).
    centre = boxes[..., 1:3].masked_fill(padding[..., None], torch.inf).transpose(1, 2)[..., None]
    size = boxes[..., 3:].transpose(1, 2)[..., None]
    cell, barred = _candidates(
        centre, geometry, config, _most_candidates(boxes, geometry, config)
    )  # (n, K)
    everywhere, at = raw.shape[:2], cells(geometry, raw.device)[cell]  # (n, K, 5)
    raw = raw.gather(1, cell[..., None].expand(-1, -1, raw.shape[2])).float()

    # Pairs (n, G, K). A cell that is no candidate overlaps nothing and costs without end.
    predicted = (
        t.transpose(1, 2)[:, :, None] for t in centre_and_size(raw[..., :2], raw[..., 2:4], at)
    )
    iou = pairwise_iou(centre, size, *predicted).masked_fill_(barred[:, None], 0.0)
    cost = torch.sub(_class_cost(raw, boxes[..., 0].long()), (iou + 1e-8).log_(), alpha=3).clamp_(
        min=0
    )
    cost.masked_fill_(barred[:, None], torch.inf)
    distance = (at[..., 3:].transpose(1, 2)[:, :, None] - centre).abs_().amax(1)
    far = distance >= config.center_radius * at[:, None, :, 2]

    top = min(config.candidate_top_k, cell.shape[1])
    wanted = torch.maximum(
        iou.topk(top, dim=2).values.sum(2).int(), ~padding
    )  # dynamic k, at least 1 for a box
    chosen = torch.arange(top, device=raw.device) < wanted[..., None]
    matching = torch.zeros_like(far).scatter_(2, _cheapest(cost, far, top), chosen)
    rivals = matching.sum(1)
    cheapest_box = cost.masked_fill_(far, torch.inf).argmin(1)  # every candidate is near a box
    box = torch.where(rivals > 1, cheapest_box, matching.view(torch.uint8).argmax(1))
    parts = (rivals > 0).masked_fill_(barred, False), box, iou.gather(1, box[:, None])[:, 0]
    return Assignment(*(t.new_zeros(everywhere).scatter_(1, cell, t) for t in parts))


def pairwise_iou(
    centre: Tensor, size: Tensor, predicted_centre: Tensor, predicted_size: Tensor
) -> Tensor:
    """(n, 2, G, 1) twice and (n, 2, 1, K) twice -> (n, G, K)."""
    half, predicted_half = size / 2, predicted_size / 2
    low = torch.maximum(centre - half, predicted_centre - predicted_half)
    sides = torch.minimum(centre + half, predicted_centre + predicted_half).sub_(low).clamp_(min=0)
    shared, area, predicted_area = (torch.mul(*s.unbind(1)) for s in (sides, size, predicted_size))
    return shared / (area + predicted_area - shared).clamp_(min=1e-9)


def _class_cost(raw: Tensor, kind: Tensor) -> Tensor:
    """(n, G, K): binary cross-entropy of sqrt(class score * objectness) against the box's class, summed over classes."""
    scores = raw[..., 4:].sigmoid()
    score = (scores[..., 1:] * scores[..., :1]).sqrt_()
    hit, miss = score.log().clamp_(min=-100), (-score).log1p_().clamp_(min=-100)
    rows = kind[:, :, None].expand(-1, -1, raw.shape[1])
    return (miss - hit).transpose(1, 2).gather(1, rows).sub_(miss.sum(-1)[:, None])


def _cheapest(cost: Tensor, far: Tensor, top: int) -> Tensor:
    """(n, G, top): each box's cheapest cells by cost + 1e6 * far, exactly: in float32 that sum would round the cost away."""
    # One integer orders by far, then cost, then cell: the bits of floats that are not negative sort as the floats do.
    key = torch.add(
        torch.arange(cost.shape[2], device=cost.device), cost.view(torch.int32), alpha=2**24
    )
    return key.add_(far, alpha=2**56).topk(top, dim=2, largest=False).indices


@once_per_geometry
def _lines(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of the columns and rows of scale 1, of scale 2, ... : axis (0: a column), middle and stride in pixels, each (lines,)."""
    counts = [
        (axis, count, stride) for h, w, stride in geometry for axis, count in ((0, w), (1, h))
    ]
    axis = torch.cat([torch.full((count,), axis, device=device) for axis, count, _ in counts])
    stride = torch.cat(
        [torch.full((count,), float(stride), device=device) for _, count, stride in counts]
    )
    index = torch.cat([torch.arange(count, device=device) for _, count, _ in counts])
    return axis, (index + 0.5) * stride, stride


def _most_candidates(boxes: Tensor, geometry: Geometry, config: HeadConfig) -> int:
    """How many cells of a frame can be near one of its boxes: an open interval of length x holds at most ceil(x) integers."""
    per_box = sum(min(h * w, math.ceil(2 * config.center_radius) ** 2) for h, w, _ in geometry)
    return min(sum(h * w for h, w, _ in geometry), boxes.shape[1] * per_box)


def _candidates(
    centre: Tensor, geometry: Geometry, config: HeadConfig, count: int
) -> tuple[Tensor, Tensor]:
    """Cells whose middle lies strictly within `center_radius` strides of some box's, in both directions, in ascending order.

    Args:
        centre: (n, 2, G, 1). count: how many to return per frame; where there are fewer, others follow.
    Returns:
        cell: (n, count), all different. barred: (n, count) bool, the others.
    """
    axis, middle, stride = _lines(geometry, centre.device)
    near = (centre[:, axis, :, 0] - middle[:, None]).abs_() < config.center_radius * stride[
        :, None
    ]  # (n, lines, G)
    lines = iter(near.float().split([count for h, w, _ in geometry for count in (w, h)], dim=1))
    # A product over boxes counts those near by row and by column, without a tensor of boxes x all cells.
    boxes_near = torch.cat(
        [
            (rows @ columns.transpose(1, 2)).flatten(1)
            for columns, rows in zip(lines, lines, strict=True)
        ],
        1,
    )
    total = boxes_near.shape[1]
    ranked = torch.add(
        torch.arange(0, -total, -1, device=centre.device), boxes_near > 0, alpha=total
    ).topk(count)
    return ranked.indices, ranked.values <= 0
