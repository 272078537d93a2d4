"""Detection loss: 5 * IoU loss + objectness + class, over the positives of the whole global batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from evspan.conf.schema.training import HeadConfig, SizeWeighting
from evspan.pipeline.model.assignment import assign
from evspan.pipeline.model.head import Geometry, cells, centre_and_size
from torch import Tensor

IOU_WEIGHT = 5.0


class Losses(NamedTuple):
    """This rank's sums divided by the positives of all ranks; `iou` includes its factor 5.

    positives: cells that answer for a box, and boxes: ground-truth boxes, both counted over all ranks.
    """

    total: Tensor
    iou: Tensor
    objectness: Tensor
    classes: Tensor
    positives: Tensor
    boxes: Tensor


def size_weights(area: Tensor, config: HeadConfig) -> Tensor:
    """Weight of the IoU term for boxes of `area` (input pixels squared): from size_aware_weight for small ones down to 1."""
    w = config.size_aware_weight
    if config.size_aware_mode is SizeWeighting.exponential:
        return (w * torch.exp(-area / config.small_threshold)).clamp(1, w)
    if config.size_aware_mode is SizeWeighting.linear:
        return (w * (1 - area / config.medium_threshold) + 1).clamp(1, w)
    medium = torch.where(area <= config.medium_threshold, (w + 1) / 2, 1.0)
    return torch.where(area <= config.small_threshold, w, medium)


def detection_loss(
    raw: Tensor,
    boxes: Tensor,
    counts: Tensor,
    geometry: Geometry,
    config: HeadConfig,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """
    Args:
        raw: (n, cells, 5 + classes) of the n labelled frames, n may be 0. boxes: (n, G, 5) float32 class, cx, cy, w, h in
            input pixels, rows beyond counts (n,) are padding. geometry: per scale (h, w, stride).
        sum_over_ranks: an all-reduce; the counts pass through it, no gradient does. The sum of `total` over the ranks is
            the loss of the global batch.
    """
    if boxes.shape[1] == 0:
        boxes = boxes.new_zeros(len(boxes), 1, 5)
    raw = raw.float()
    foreground, box, iou = assign(raw, boxes, counts, geometry, config)
    tallies = torch.stack((foreground.sum(), counts.sum())).float()
    positives, total_boxes = tallies if sum_over_ranks is None else sum_over_ranks(tallies)
    target = boxes.gather(1, box[..., None].expand(-1, -1, 5))  # (n, cells, 5)
    place, size, surely, kinds = raw.split([2, 2, 1, raw.shape[-1] - 5], dim=-1)
    # Background cells get harmless values before exp: a mask after it would still pass 0 * inf backward.
    predicted = centre_and_size(
        place, size.masked_fill(~foreground[..., None], 0.0), cells(geometry, raw.device)
    )
    iou_loss = 1 - _iou(*predicted, target[..., 1:3], target[..., 3:]).square()
    if config.size_aware_loss:
        iou_loss = iou_loss * size_weights(target[..., 3] * target[..., 4], config)
    hit = foreground.float()
    onehot = (target[..., :1] == torch.arange(kinds.shape[-1], device=raw.device)) * iou[..., None]
    sums = torch.stack(
        (
            (iou_loss * hit).sum() * IOU_WEIGHT,
            F.binary_cross_entropy_with_logits(surely[..., 0], hit, reduction="sum"),
            F.binary_cross_entropy_with_logits(
                kinds, onehot, weight=hit[..., None], reduction="sum"
            ),
        )
    )
    parts = sums / positives.clamp(min=1)
    return Losses(parts.sum(), parts[0], parts[1], parts[2], positives, total_boxes)


def _iou(centre: Tensor, size: Tensor, other_centre: Tensor, other_size: Tensor) -> Tensor:
    """(..., 2) each, x and y -> (...)."""
    half, other_half = size / 2, other_size / 2
    low = torch.maximum(centre - half, other_centre - other_half)
    sides = (torch.minimum(centre + half, other_centre + other_half) - low).clamp(min=0)
    shared, area, other_area = (torch.mul(*s.unbind(-1)) for s in (sides, size, other_size))
    return shared / (area + other_area - shared + 1e-16)
