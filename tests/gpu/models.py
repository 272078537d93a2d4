"""Detectors and batches of any size on any device."""

import copy
from typing import NamedTuple

import torch
from detector_sides import SIZES as DETECTOR_SIZES
from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.norm import BatchNorm2d
from torch import Tensor

CHANNELS = 20
CLASSES = 3
MAX_BOXES = 10
# Size -> embed_dim, dim_head, depth of the neck.
SIZES = {"micro": (16, 8, 0.33), **DETECTOR_SIZES}


def model_config(size: str, *, attention: bool = False) -> ModelConfig:
    """The config of a size with 3 scales."""
    embed_dim, dim_head, depth = SIZES[size]
    return ModelConfig(
        backbone=BackboneConfig(
            embed_dim=embed_dim,
            dim_head=dim_head,
            partition_split_32=1 if size == "micro" else 2,
        ),
        fpn=FpnConfig(depth=depth, enable_small_object_attention=attention),
        head=HeadConfig(num_classes=CLASSES),
    )


class StepInputs(NamedTuple):
    """Inputs of a training step.

    frames: (T, B, CHANNELS, H, W) uint8, 3 % of it not zero. starts: (B,) bool. labelled: (T, B)
    bool on the CPU, every second frame. boxes: (n, MAX_BOXES, 5) class, cx, cy, w, h in pixels.
    counts: (n,) valid rows of boxes, 3 to MAX_BOXES.
    """

    frames: Tensor
    starts: Tensor
    labelled: Tensor
    boxes: Tensor
    counts: Tensor


def step_inputs(steps: int, lanes: int, size: tuple[int, int], device: torch.device) -> StepInputs:
    """Draws inputs for `lanes` sequences of `steps` frames of (height, width) pixels."""
    height, width = size
    generator = torch.Generator(device=device).manual_seed(steps)
    frames = torch.zeros(steps, lanes, CHANNELS, height, width, dtype=torch.uint8, device=device)
    for frame in frames:  # one at a time: as float32 all of them take four times the memory
        noise = torch.rand(frame.shape, generator=generator, device=device)
        frame.copy_((noise * 100 - 96).clamp(min=0).ceil())
    labelled = torch.zeros(steps, lanes, dtype=torch.bool)
    labelled[::2] = True
    n = int(labelled.sum())
    counts = torch.randint(3, MAX_BOXES + 1, (n,), generator=generator, device=device)
    position = torch.rand(n, MAX_BOXES, 4, generator=generator, device=device)
    class_id = torch.randint(0, CLASSES, (n, MAX_BOXES, 1), generator=generator, device=device)
    centre = position[..., :2] * torch.tensor([width, height], device=device)
    boxes = torch.cat((class_id, centre, 10 + position[..., 2:] * 60), -1)
    is_valid = torch.arange(MAX_BOXES, device=device) < counts[:, None]
    starts = torch.ones(lanes, dtype=torch.bool, device=device)
    return StepInputs(frames, starts, labelled, boxes * is_valid[..., None], counts)


def cast(model: Detector, dtype: torch.dtype) -> Detector:
    """Casts the weights as the engine does: BatchNorm's statistics stay float32."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.running_mean = module.running_mean.float()
            module.running_var = module.running_var.float()
    return model


def cast_copy(model: Detector, dtype: torch.dtype, device: torch.device) -> Detector:
    """A copy in another dtype on another device."""
    return copy.deepcopy(model).to(device, dtype)


def total_loss(model: Detector, inputs: StepInputs, dtype: torch.dtype) -> Tensor:
    """Forward and loss from the zero state; the state is in `dtype`."""
    lanes = inputs.frames.shape[1]
    height, width = inputs.frames.shape[-2:]
    device = inputs.frames.device
    state = model.initial_state(lanes, height, width, device=device, dtype=dtype)
    raw, _ = model(inputs.frames, state, starts=inputs.starts, labelled=inputs.labelled)
    geometry = model.geometry(height, width)
    return detection_loss(raw, inputs.boxes, inputs.counts, geometry, model.config.head).total
