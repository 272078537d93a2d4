"""YOLOX decoupled head: raw predictions; decoding is a function."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.model.layers import BaseConv, side_by_side

Geometry = tuple[tuple[int, int, int], ...]  # per scale (h, w, stride)


class YOLOXHead(nn.Module):
    """Per scale (n, C, h, w) -> (n, cells, 5 + classes): x, y, w, h, objectness, class logits; scale by scale, row-major."""

    def __init__(self, in_channels: Sequence[int], hidden: int, classes: int) -> None:
        super().__init__()

        def branch() -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(BaseConv(hidden, hidden, 3), BaseConv(hidden, hidden, 3)) for _ in in_channels)

        def prediction(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(hidden, outputs, 1) for _ in in_channels)

        self.stems = nn.ModuleList(BaseConv(c, hidden, 1) for c in in_channels)
        self.cls_convs, self.reg_convs = branch(), branch()
        self.cls_preds, self.reg_preds, self.obj_preds = prediction(classes), prediction(4), prediction(1)
        for conv in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(conv.bias, -math.log(99))  # a prior probability of 1 %

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        stems = side_by_side([*self.stems], features)
        maps = stems + stems
        for layer in range(2):
            maps = side_by_side([branch[layer] for branch in (*self.cls_convs, *self.reg_convs)], maps)
        out = []
        for i, (kinds, boxes) in enumerate(zip(maps[: len(stems)], maps[len(stems) :], strict=True)):
            raw = torch.cat((self.reg_preds[i](boxes), self.obj_preds[i](boxes), self.cls_preds[i](kinds)), dim=1)
            out.append(raw.flatten(2).transpose(1, 2))
        return torch.cat(out, dim=1)


def cells(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per cell: column and row (cells, 2), and stride (cells, 1), as float32."""
    places, strides = [], []
    for h, w, stride in geometry:
        rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        places.append(torch.stack((columns, rows), -1).view(-1, 2).float())
        strides.append(torch.full((h * w, 1), float(stride), device=device))
    return torch.cat(places), torch.cat(strides)


def decode_boxes(raw: Tensor, geometry: Geometry) -> Tensor:
    """(n, cells, >= 4) raw -> (n, cells, 4) cx, cy, w, h in input pixels, float32."""
    places, strides = cells(geometry, raw.device)
    raw = raw[..., :4].float()
    return torch.cat(((raw[..., :2] + places) * strides, raw[..., 2:].exp() * strides), dim=-1)


def decode(raw: Tensor, geometry: Geometry) -> Tensor:
    """(n, cells, 5 + classes) raw -> cx, cy, w, h in input pixels, objectness and class scores in 0..1."""
    return torch.cat((decode_boxes(raw, geometry), raw[..., 4:].float().sigmoid()), dim=-1)
