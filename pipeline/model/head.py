"""YOLOX decoupled head: raw predictions; decoding is a function."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from evspan.pipeline.model.layers import BaseConv, parallel_convs
from torch import Tensor, nn

Geometry = tuple[tuple[int, int, int], ...]  # per scale (rows, columns, stride)
T = TypeVar("T")


class YOLOXHead(nn.Module):
    """One branch for classes, one for box and objectness, on every scale.

    Args:
        in_channels: channels of each scale, finest first.
        hidden: channels inside.
        classes: number of classes.
    """

    def __init__(self, in_channels: Sequence[int], hidden: int, classes: int) -> None:
        super().__init__()

        def branch() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(BaseConv(hidden, hidden, 3), BaseConv(hidden, hidden, 3))
                for _ in in_channels
            )

        def prediction(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(hidden, outputs, 1) for _ in in_channels)

        self.stems = nn.ModuleList(BaseConv(c, hidden, 1) for c in in_channels)
        self.cls_convs = branch()
        self.reg_convs = branch()
        self.cls_preds = prediction(classes)
        self.reg_preds = prediction(4)
        self.obj_preds = prediction(1)
        for conv in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(conv.bias, -math.log(99))  # a prior probability of 1 %

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Predicts.

        Args:
            features: (n, C, h, w) per scale, finest first.

        Returns:
            (n, cells, 5 + classes) raw x, y, w, h, objectness, class logits; scale by scale,
            row-major.
        """
        stems = parallel_convs([*self.stems], features)
        maps = stems + stems
        for layer in range(2):
            convs = [branch[layer] for branch in (*self.cls_convs, *self.reg_convs)]
            maps = parallel_convs(convs, maps)
        class_maps = maps[: len(stems)]
        box_maps = maps[len(stems) :]
        predictions = []
        for i, (class_map, box_map) in enumerate(zip(class_maps, box_maps, strict=True)):
            boxes = self.reg_preds[i](box_map)
            objectness = self.obj_preds[i](box_map)
            logits = self.cls_preds[i](class_map)
            raw = torch.cat((boxes, objectness, logits), dim=1)
            predictions.append(raw.flatten(2).transpose(1, 2))
        return torch.cat(predictions, dim=1)


def once_per_geometry(
    build: Callable[[Geometry, torch.device], T],
) -> Callable[[Geometry, torch.device], T]:
    """Caches what `build` returns per geometry and device.

    While a graph is traced, `build` runs every time, as part of the graph.
    """

    @functools.lru_cache(maxsize=32)
    def cached(geometry: Geometry, device: torch.device) -> T:
        # A tensor created in inference mode could not take part in training later.
        with torch.inference_mode(False):
            return build(geometry, device)

    @functools.wraps(build)
    def build_once(geometry: Geometry, device: torch.device) -> T:
        if torch.compiler.is_compiling():
            return build(geometry, device)
        return cached(geometry, device)

    return build_once


@once_per_geometry
def cells(geometry: Geometry, device: torch.device) -> Tensor:
    """Position of every feature cell.

    Args:
        geometry: per scale (rows, columns, stride).

    Returns:
        (cells, 5) float32, scale by scale, row-major: column, row, stride, and the cell's centre x,
        y in input pixels.
    """
    scales = []
    for h, w, stride in geometry:
        row_range = torch.arange(h, device=device)
        column_range = torch.arange(w, device=device)
        rows, columns = torch.meshgrid(row_range, column_range, indexing="ij")
        position = torch.stack((columns, rows), -1).view(-1, 2).float()
        strides = torch.full_like(position[:, :1], stride)
        scales.append(torch.cat((position, strides, (position + 0.5) * stride), dim=1))
    return torch.cat(scales)


def centre_and_size(raw_xy: Tensor, raw_wh: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes boxes.

    Args:
        raw_xy, raw_wh: (..., 2) raw x, y and w, h.
        at: (..., 5) of `cells`.

    Returns:
        Centre x, y and size w, h in input pixels, both (..., 2).
    """
    stride = at[..., 2:3]
    return (raw_xy + at[..., :2]) * stride, raw_wh.exp() * stride


def decode(raw: Tensor, geometry: Geometry) -> Tensor:
    """Decodes raw predictions.

    Args:
        raw: (n, cells, 5 + classes) of `YOLOXHead`.
        geometry: per scale (rows, columns, stride).

    Returns:
        (n, cells, 5 + classes) float32: cx, cy, w, h in input pixels, objectness and class scores
        in 0..1.
    """
    raw_xy, raw_wh, scores = torch.split(raw.float(), [2, 2, raw.shape[-1] - 4], dim=-1)
    centre, size = centre_and_size(raw_xy, raw_wh, cells(geometry, raw.device))
    return torch.cat((centre, size, scores.sigmoid()), dim=-1)
