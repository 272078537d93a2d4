"""SimOTA (Ge et al. 2021): assigns ground-truth boxes to feature cells.

All labelled frames are one batch, and the host does not wait for the device.
"""

import math
from typing import NamedTuple

import torch
from evspan.conf.schema.training import HeadConfig
from evspan.pipeline.model.head import Geometry, cells, centre_and_size, once_per_geometry
from torch import Tensor

# Box-cell pairs per batch, about 100 bytes each; at least those of one frame.
PAIRS_AT_ONCE = 2**22


class Assignment(NamedTuple):
    """Which box each cell predicts; all are (n, cells).

    In the background `box` and `iou` have no meaning.

    foreground: bool, the cell predicts a box. box: int64, row of the frame's boxes. iou: of the
    cell's predicted box with that box.
    """

    foreground: Tensor
    box: Tensor
    iou: Tensor


@torch.no_grad()
def assign(
    raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig
) -> Assignment:
    """Assigns boxes to cells. Of equal costs the first cell and the first box win.

    Args:
        raw: (n, cells, 5 + classes) raw predictions.
        boxes: (n, G, 5) float32 class, cx, cy, w, h in input pixels, G at least 1.
        counts: (n,) number of valid rows of each frame's boxes; the others are padding.
        geometry: per scale (rows, columns, stride).
        config: center_radius and candidate_top_k.
    """
    n = raw.shape[0]
    pairs_per_frame = boxes.shape[1] * _most_candidates(boxes, geometry, config)
    step = max(1, PAIRS_AT_ONCE // pairs_per_frame)
    if n <= step:
        return _assign(raw, boxes, counts, geometry, config)
    parts = []
    for i in range(0, n, step):
        rows = slice(i, i + step)
        parts.append(_assign(raw[rows], boxes[rows], counts[rows], geometry, config))
    return Assignment(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _assign(
    raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig
) -> Assignment:
    padding = torch.arange(boxes.shape[1], device=raw.device) >= counts[:, None]  # (n, G)
    # Padding is infinitely far away: near no cell, overlapping none. Coordinates come first: (n, 2,
    # G, 1).
    centre = boxes[..., 1:3].masked_fill(padding[..., None], torch.inf).transpose(1, 2)[..., None]
    size = boxes[..., 3:].transpose(1, 2)[..., None]
    num_candidates = _most_candidates(boxes, geometry, config)
    cell, excluded = _candidates(centre, geometry, config, num_candidates)  # (n, K)
    all_cells = raw.shape[:2]
    at = cells(geometry, raw.device)[cell]  # (n, K, 5)
    raw = raw.gather(1, cell[..., None].expand(-1, -1, raw.shape[2])).float()

    # Pairs are (n, G, K). A cell that is not a candidate overlaps nothing and has infinite cost.
    predicted_centre, predicted_size = centre_and_size(raw[..., :2], raw[..., 2:4], at)
    iou = pairwise_iou(
        centre,
        size,
        predicted_centre.transpose(1, 2)[:, :, None],
        predicted_size.transpose(1, 2)[:, :, None],
    )
    iou = iou.masked_fill_(excluded[:, None], 0.0)
    class_cost = _class_cost(raw, boxes[..., 0].long())
    cost = torch.sub(class_cost, (iou + 1e-8).log_(), alpha=3).clamp_(min=0)
    cost.masked_fill_(excluded[:, None], torch.inf)
    distance = (at[..., 3:].transpose(1, 2)[:, :, None] - centre).abs_().amax(1)
    far = distance >= config.center_radius * at[:, None, :, 2]

    top = min(config.candidate_top_k, cell.shape[1])
    # Dynamic k: at least 1 per box, 0 for padding.
    num_matches = torch.maximum(iou.topk(top, dim=2).values.sum(2).int(), ~padding)
    chosen = torch.arange(top, device=raw.device) < num_matches[..., None]
    matching = torch.zeros_like(far).scatter_(2, _cheapest(cost, far, top), chosen)
    rivals = matching.sum(1)
    cheapest_box = cost.masked_fill_(far, torch.inf).argmin(1)  # every candidate is near a box
    box = torch.where(rivals > 1, cheapest_box, matching.view(torch.uint8).argmax(1))
    foreground = (rivals > 0).masked_fill_(excluded, False)
    parts = (foreground, box, iou.gather(1, box[:, None])[:, 0])
    return Assignment(*(t.new_zeros(all_cells).scatter_(1, cell, t) for t in parts))


def pairwise_iou(
    centre: Tensor, size: Tensor, predicted_centre: Tensor, predicted_size: Tensor
) -> Tensor:
    """IoU of every box with every predicted box.

    Args:
        centre, size: (n, 2, G, 1) x and y of the boxes.
        predicted_centre, predicted_size: (n, 2, 1, K).

    Returns:
        (n, G, K).
    """
    half = size / 2
    predicted_half = predicted_size / 2
    low = torch.maximum(centre - half, predicted_centre - predicted_half)
    sides = torch.minimum(centre + half, predicted_centre + predicted_half).sub_(low).clamp_(min=0)
    shared = torch.mul(*sides.unbind(1))
    area = torch.mul(*size.unbind(1))
    predicted_area = torch.mul(*predicted_size.unbind(1))
    return shared / (area + predicted_area - shared).clamp_(min=1e-9)


def _class_cost(raw: Tensor, class_ids: Tensor) -> Tensor:
    """Cost of predicting a box's class: binary cross-entropy, summed over classes.

    The predicted probability is sqrt(class score * objectness).

    Args:
        raw: (n, K, 5 + classes). class_ids: (n, G).

    Returns:
        (n, G, K).
    """
    scores = raw[..., 4:].sigmoid()
    score = (scores[..., 1:] * scores[..., :1]).sqrt_()
    hit = score.log().clamp_(min=-100)
    miss = (-score).log1p_().clamp_(min=-100)
    rows = class_ids[:, :, None].expand(-1, -1, raw.shape[1])
    return (miss - hit).transpose(1, 2).gather(1, rows).sub_(miss.sum(-1)[:, None])


def _cheapest(cost: Tensor, far: Tensor, top: int) -> Tensor:
    """(n, G, top): each box's cheapest cells by cost + 1e6 * far, exactly.

    In float32 that sum would round the cost away. One integer instead orders by far, then cost,
    then cell: the bits of non-negative floats sort as the floats do.
    """
    cell = torch.arange(cost.shape[2], device=cost.device)
    key = torch.add(cell, cost.view(torch.int32), alpha=2**24)
    return key.add_(far, alpha=2**56).topk(top, dim=2, largest=False).indices


class _Lines(NamedTuple):
    """Columns and rows of scale 1, of scale 2, ..., all (lines,).

    axis: 0 for a column, 1 for a row. middle: its centre. stride: both in input pixels.
    """

    axis: Tensor
    middle: Tensor
    stride: Tensor


@once_per_geometry
def _lines(geometry: Geometry, device: torch.device) -> _Lines:
    axes = []
    strides = []
    indices = []
    for h, w, stride in geometry:
        for axis, count in ((0, w), (1, h)):
            axes.append(torch.full((count,), axis, device=device))
            strides.append(torch.full((count,), float(stride), device=device))
            indices.append(torch.arange(count, device=device))
    stride_of_line = torch.cat(strides)
    middle = (torch.cat(indices) + 0.5) * stride_of_line
    return _Lines(torch.cat(axes), middle, stride_of_line)


def _most_candidates(boxes: Tensor, geometry: Geometry, config: HeadConfig) -> int:
    """The largest possible number of cells near a box of one frame.

    An open interval of length x contains at most ceil(x) integers.
    """
    per_side = math.ceil(2 * config.center_radius)
    per_box = sum(min(h * w, per_side**2) for h, w, _ in geometry)
    return min(sum(h * w for h, w, _ in geometry), boxes.shape[1] * per_box)


def _candidates(
    centre: Tensor, geometry: Geometry, config: HeadConfig, count: int
) -> tuple[Tensor, Tensor]:
    """Cells whose centre is near a box's: less than `center_radius` strides in x and in y.

    Args:
        centre: (n, 2, G, 1) of the boxes, in input pixels.
        count: number of cells to return per frame; where fewer are near, others follow.

    Returns:
        cell: (n, count) int64, all different, near ones first, ascending.
        excluded: (n, count) bool, the cells that are not near.
    """
    lines = _lines(geometry, centre.device)
    distance = (centre[:, lines.axis, :, 0] - lines.middle[:, None]).abs_()
    near = distance < config.center_radius * lines.stride[:, None]  # (n, lines, G)
    lengths: list[int] = []
    for h, w, _ in geometry:
        lengths += [w, h]
    near_by_line = torch.split(near.float(), lengths, dim=1)
    # A product over boxes counts those near by row and by column, without a tensor of boxes x all
    # cells.
    boxes_near = []
    for columns, rows in zip(near_by_line[::2], near_by_line[1::2], strict=True):
        boxes_near.append((rows @ columns.transpose(1, 2)).flatten(1))
    num_near = torch.cat(boxes_near, 1)
    total = num_near.shape[1]
    descending = torch.arange(0, -total, -1, device=centre.device)
    ranked = torch.add(descending, num_near > 0, alpha=total).topk(count)
    return ranked.indices, ranked.values <= 0
