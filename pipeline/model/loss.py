"""Detection loss: 5 * IoU loss + objectness + class, over the positives of the whole global batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import HeadConfig, SizeWeighting
from pipeline.model.assignment import Assignment, assign
from pipeline.model.head import Geometry, decode_boxes

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


def detection_loss(raw: Tensor, boxes: Tensor, counts: Tensor, geometry: Geometry, config: HeadConfig, *,
                   sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Losses:
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
    assignment = assign(raw, boxes, counts, geometry, config)
    foreground = assignment.foreground
    tallies = torch.stack((foreground.sum(), counts.sum())).float()
    positives, total_boxes = tallies if sum_over_ranks is None else sum_over_ranks(tallies)
    share = 1 / positives.clamp(min=1)
    target = boxes.gather(1, assignment.box[..., None].expand(-1, -1, 5))  # (n, cells, 5)
    iou = _iou_sum(raw, target, foreground, geometry, config) * IOU_WEIGHT * share
    objectness = F.binary_cross_entropy_with_logits(raw[..., 4], foreground.float(), reduction="sum") * share
    classes = _class_sum(raw, target, assignment) * share
    return Losses(iou + objectness + classes, iou, objectness, classes, positives, total_boxes)


def _iou_sum(raw: Tensor, target: Tensor, foreground: Tensor, geometry: Geometry, config: HeadConfig) -> Tensor:
    # Background cells get harmless values before any arithmetic: where(..) after exp would still pass 0 * inf backward.
    predicted = decode_boxes(torch.where(foreground[..., None], raw[..., :4], 0.0), geometry)
    wanted = torch.where(foreground[..., None], target[..., 1:], 1.0)
    low = torch.maximum(predicted[..., :2] - predicted[..., 2:] / 2, wanted[..., :2] - wanted[..., 2:] / 2)
    high = torch.minimum(predicted[..., :2] + predicted[..., 2:] / 2, wanted[..., :2] + wanted[..., 2:] / 2)
    shared = (high - low).clamp(min=0).prod(-1)
    iou = shared / (predicted[..., 2:].prod(-1) + wanted[..., 2:].prod(-1) - shared + 1e-16)
    loss = 1 - iou.square()
    if config.size_aware_loss:
        loss = loss * size_weights(wanted[..., 2:].prod(-1), config)
    return torch.where(foreground, loss, 0.0).sum()


def _class_sum(raw: Tensor, target: Tensor, assignment: Assignment) -> Tensor:
    onehot = F.one_hot(target[..., 0].long(), raw.shape[-1] - 5) * assignment.iou[..., None]
    loss = F.binary_cross_entropy_with_logits(raw[..., 5:], onehot, reduction="none").sum(-1)
    return torch.where(assignment.foreground, loss, 0.0).sum()
