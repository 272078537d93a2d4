"""YOLOX decoupled head: raw predictions; decoding is a function."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from evspan.pipeline.model.layers import BaseConv, side_by_side
from torch import Tensor, nn

Geometry = tuple[tuple[int, int, int], ...]  # per scale (h, w, stride)
T = TypeVar("T")


class YOLOXHead(nn.Module):
    """Per scale (n, C, h, w) -> (n, cells, 5 + classes): x, y, w, h, objectness, class logits; scale by scale, row-major."""

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
        self.cls_convs, self.reg_convs = branch(), branch()
        self.cls_preds, self.reg_preds, self.obj_preds = (
            prediction(classes),
            prediction(4),
            prediction(1),
        )
        for conv in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(conv.bias, -math.log(99))  # a prior probability of 1 %

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        stems = side_by_side([*self.stems], features)
        maps = stems + stems
        for layer in range(2):
            maps = side_by_side(
                [branch[layer] for branch in (*self.cls_convs, *self.reg_convs)], maps
            )
        out = []
        for i, (kinds, boxes) in enumerate(
            zip(maps[: len(stems)], maps[len(stems) :], strict=True)
        ):
            raw = torch.cat(
                (self.reg_preds[i](boxes), self.obj_preds[i](boxes), self.cls_preds[i](kinds)),
                dim=1,
            )
            out.append(raw.flatten(2).transpose(1, 2))
        return torch.cat(out, dim=1)


def once_per_geometry(
    build: Callable[[Geometry, torch.device], T],
) -> Callable[[Geometry, torch.device], T]:
    """Keep what `build` returns for a geometry and a device. While a graph is traced it is built anew, as part of the graph."""

    @functools.lru_cache(maxsize=32)
    def kept(geometry: Geometry, device: torch.device) -> T:
        with torch.inference_mode(
            False
        ):  # a tensor made in inference mode could not take part in training later
            return build(geometry, device)

    @functools.wraps(build)
    def built(geometry: Geometry, device: torch.device) -> T:
        return build(geometry, device) if torch.compiler.is_compiling() else kept(geometry, device)

    return built


@once_per_geometry
def cells(geometry: Geometry, device: torch.device) -> Tensor:
    """(cells, 5) float32, scale by scale, row-major: column, row, stride, and the cell's middle x, y in input pixels."""
    scales = []
    for h, w, stride in geometry:
        rows, columns = torch.meshgrid(
            torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
        )
        places = torch.stack((columns, rows), -1).view(-1, 2).float()
        scales.append(
            torch.cat(
                (places, torch.full_like(places[:, :1], stride), (places + 0.5) * stride), dim=1
            )
        )
    return torch.cat(scales)


def centre_and_size(place: Tensor, size: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Raw x, y and raw w, h, both (..., 2), of cells (..., 5) as `cells` tells them -> the same in input pixels."""
    stride = at[..., 2:3]
    return (place + at[..., :2]) * stride, size.exp() * stride


def decode(raw: Tensor, geometry: Geometry) -> Tensor:
    """(n, cells, 5 + classes) raw -> cx, cy, w, h in input pixels, objectness and class scores in 0..1; float32."""
    place, size, scores = raw.float().split([2, 2, raw.shape[-1] - 4], dim=-1)
    return torch.cat(
        (*centre_and_size(place, size, cells(geometry, raw.device)), scores.sigmoid()), dim=-1
    )
