"""Gradients of the device against float64 on the CPU: attention, size-aware loss, carried state."""

from statistics import median

import torch
from gpu import measure, models

SIZE = (96, 160)
LANES = 2
FRAMES = 4


def run(context):
    """Adds the rows."""
    from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig
    from evspan.pipeline.model.detector import Detector

    torch.manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(embed_dim=32, dim_head=8, ls_init_value=0.5),
        fpn=FpnConfig(enable_small_object_attention=True, identity_init=False),
        head=HeadConfig(num_classes=models.CLASSES, size_aware_loss=True),
    )
    model = Detector(config, models.CHANNELS).train()
    inputs = models.step_inputs(FRAMES, LANES, SIZE, torch.device("cpu"))
    expected_loss, expected = _step(model, inputs, torch.float64, torch.device("cpu"))
    for name, use_tf32, limit in (("fp32", False, 1e-3), ("tf32", True, 0.2)):
        if use_tf32 and not context.on_gpu:
            continue
        with measure.tf32(use_tf32):
            loss, gradients = _step(model, inputs, torch.float32, context.device)
        errors = {
            key: measure.relative_error(gradients[key], gradient)
            for key, gradient in expected.items()
        }
        worst = max(errors, key=errors.__getitem__)
        median_error = median(errors.values())
        context.report.compared(
            "gradients",
            f"against float64 on the CPU, {name}",
            median_error < limit,
            loss_error=abs(loss - expected_loss) / expected_loss,
            median=median_error,
            worst=errors[worst],
            of=worst,
        )


def _step(model, inputs, dtype, device):
    """The loss of the second of two chunks, and the gradients by parameter name."""
    from evspan.pipeline.model.loss import detection_loss

    copied = models.cast_copy(model, dtype, device)
    state = copied.initial_state(LANES, *SIZE, device=device, dtype=dtype)
    for _ in range(2):
        raw, state = copied(inputs.frames.to(device), state, labelled=inputs.labelled)
    boxes = inputs.boxes.to(device)
    counts = inputs.counts.to(device)
    loss = detection_loss(raw, boxes, counts, copied.geometry(*SIZE), copied.config.head).total
    loss.backward()
    named = copied.named_parameters()
    return float(loss), {name: p.grad for name, p in named if p.grad is not None}
