"""Checkpoints in the format that RVT publishes, with random weights."""

from pathlib import Path
from typing import Any

import torch
from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig
from evspan.pipeline.model.detector import Detector

SIZES = {  # name -> embed_dim, dim_head, neck depth
    "micro": (16, 8, 0.33),
    "tiny": (32, 32, 0.33),
    "small": (48, 24, 0.33),
    "base": (64, 32, 0.67),
}


def model_of(size: str, classes: int = 3, **parts: Any) -> ModelConfig:
    """The config of a size. parts: keys of the backbone, and `fpn`, a dict of the neck's."""
    embed_dim, dim_head, depth = SIZES[size]
    fpn = FpnConfig(depth=depth, **parts.pop("fpn", {}))
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=embed_dim, dim_head=dim_head, **parts),
        fpn=fpn,
        head=HeadConfig(num_classes=classes),
    )


def random_tensors(model: ModelConfig, channels: int = 20) -> dict[str, torch.Tensor]:
    """A state dict with different values everywhere; BatchNorm's variances are above zero."""
    with torch.device("meta"):
        shapes = Detector(model, channels).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in shapes.items():
        if tensor.is_floating_point():
            tensors[name] = torch.rand(tensor.shape, generator=generator) + 0.1
        else:
            tensors[name] = torch.tensor(7)
    return tensors


def publish(path: Path, tensors: dict[str, torch.Tensor], **more: Any) -> Path:
    """Writes a checkpoint. more: further entries of the file."""
    state_dict = {f"mdl.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": state_dict, "global_step": 400_000, **more}, path)
    return path
