"""Detection loss: 5 * IoU + objectness + class, over the positives of the global batch."""

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
    """Sums divided by the number of positives of all ranks; all scalars ().

    total: of this rank's frames, the sum of the three parts. The only one with a gradient.
    iou: IoU loss over all ranks, its factor 5 included.
    objectness, classes: binary cross-entropies over all ranks.
    positives: number of cells assigned to a box, over all ranks.
    boxes: number of ground-truth boxes, over all ranks.
    """

    total: Tensor
    iou: Tensor
    objectness: Tensor
    classes: Tensor
    positives: Tensor
    boxes: Tensor


def size_weights(area: Tensor, config: HeadConfig) -> Tensor:
    """Weight of the IoU term: size_aware_weight for small boxes, 1 for large ones.

    Args:
        area: (...) of the boxes, in square input pixels.

    Returns:
        (...) weights.
    """
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
    regions: Tensor | None = None,
) -> Losses:
    """Loss of this rank's labelled frames. Its sum over the ranks is the loss of the global batch.

    Args:
        raw: (n, cells, 5 + classes) raw predictions of the n labelled frames; n may be 0.
        boxes: (n, G, 5) float32 class, cx, cy, w, h in input pixels.
        counts: (n,) number of valid rows of each frame's boxes; the others are padding.
        geometry: per scale (rows, columns, stride).
        config: of the assignment and the size weighting.
        sum_over_ranks: (5,) -> (5,), an all-reduce of counts and sums, without gradient; called
            once. None: one rank.
        regions: (n, R, 4) float32 cx, cy, w, h of ignore regions in input pixels: background cells
            whose centre lies in one have no loss. Rows of size 0 are padding; R may be 0.
    """
    if boxes.shape[1] == 0:
        boxes = boxes.new_zeros(len(boxes), 1, 5)
    raw = raw.float()
    foreground, box, iou = assign(raw, boxes, counts, geometry, config)
    target = boxes.gather(1, box[..., None].expand(-1, -1, 5))  # (n, cells, 5)
    sizes = [2, 2, 1, raw.shape[-1] - 5]
    raw_xy, raw_wh, objectness, logits = torch.split(raw, sizes, dim=-1)
    # Background cells get harmless values before exp: a mask after it would pass 0 * inf backward.
    raw_wh = raw_wh.masked_fill(~foreground[..., None], 0.0)
    centre, size = centre_and_size(raw_xy, raw_wh, cells(geometry, raw.device))
    iou_loss = 1 - _iou(centre, size, target[..., 1:3], target[..., 3:]).square()
    if config.size_aware_loss:
        iou_loss = iou_loss * size_weights(target[..., 3] * target[..., 4], config)
    is_positive = foreground.float()
    counted = None
    if regions is not None and regions.shape[1]:
        counted = (foreground | ~inside_regions(regions, geometry)).float()
    class_ids = torch.arange(logits.shape[-1], device=raw.device)
    class_target = (target[..., :1] == class_ids) * iou[..., None]
    sums = torch.stack(
        (
            (iou_loss * is_positive).sum() * IOU_WEIGHT,
            F.binary_cross_entropy_with_logits(
                objectness[..., 0], is_positive, weight=counted, reduction="sum"
            ),
            F.binary_cross_entropy_with_logits(
                logits, class_target, weight=is_positive[..., None], reduction="sum"
            ),
        )
    )
    totals = torch.cat((torch.stack((foreground.sum(), counts.sum())).float(), sums.detach()))
    if sum_over_ranks is not None:
        totals = sum_over_ranks(totals)
    positives, total_boxes, *_ = totals.unbind()
    normalizer = positives.clamp(min=1)
    iou_part, objectness_part, classes_part = (totals[2:] / normalizer).unbind()
    return Losses(
        total=(sums / normalizer).sum(),
        iou=iou_part,
        objectness=objectness_part,
        classes=classes_part,
        positives=positives,
        boxes=total_boxes,
    )


def inside_regions(regions: Tensor, geometry: Geometry) -> Tensor:
    """Which cells have their centre inside of a region, its border excluded.

    Args:
        regions: (n, R, 4) cx, cy, w, h in input pixels; those of size 0 contain nothing.
        geometry: per scale (rows, columns, stride).

    Returns:
        (n, cells) bool.
    """
    centre = cells(geometry, regions.device)[:, 3:].T[None, :, None]  # (1, 2, 1, cells)
    by_axis = regions.transpose(1, 2)[..., None]  # (n, 4, R, 1)
    place = by_axis[:, :2]
    size = by_axis[:, 2:]
    near = (centre - place).abs_().mul_(2) < size
    return (near[:, 0] & near[:, 1]).any(1)


def _iou(centre: Tensor, size: Tensor, other_centre: Tensor, other_size: Tensor) -> Tensor:
    """IoU of pairs of boxes: (..., 2) each, x and y -> (...)."""
    half = size / 2
    other_half = other_size / 2
    low = torch.maximum(centre - half, other_centre - other_half)
    sides = (torch.minimum(centre + half, other_centre + other_half) - low).clamp(min=0)
    shared = torch.mul(*sides.unbind(-1))
    area = torch.mul(*size.unbind(-1))
    other_area = torch.mul(*other_size.unbind(-1))
    return shared / (area + other_area - shared + 1e-16)
