"""The published numbers, in every precision of a GPU: outputs, assignments, losses, gradients."""

from statistics import median

import numpy as np
import torch
from gpu import measure, models

# name -> dtype of the weights, TF32, largest error of a score, largest median over the tensors of
# the gradients' relative L2 errors. One other assignment changes some gradients altogether.
PRECISIONS = {
    "fp32": (torch.float32, False, 1e-4, 1e-4),
    "tf32": (torch.float32, True, 1e-2, 0.2),
    "bf16": (torch.bfloat16, True, 1e-1, 0.5),
}
SIZE = (192, 320)


def run(context):
    """Adds the rows."""
    folder = context.parity / "parity_small"
    if not folder.is_dir():
        context.report.skipped("parity", "", f"{folder} is missing: --parity DIR")
        return
    data = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    for name, (dtype, use_tf32, max_score, max_gradient) in PRECISIONS.items():
        if not context.on_gpu and name == "tf32":
            continue
        with measure.tf32(use_tf32):
            _forward(context, data, name, dtype, max_score)
            _training_step(context, data, name, dtype, max_gradient)


def _detector(data, dtype, device):
    from evspan.conf.schema.training import BackboneConfig, HeadConfig, ModelConfig
    from evspan.pipeline.model.detector import Detector

    config = ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=8), head=HeadConfig(num_classes=3)
    )
    model = Detector(config, 20)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in data["weights"].items()})
    model.to(device)
    return models.cast(model, dtype) if dtype != torch.float32 else model


def _forward(context, data, name, dtype, max_score):
    device = context.device
    model = _detector(data, dtype, device).eval()
    frames = torch.from_numpy(data["eval_input"]["events_uint8"]).to(device)
    with torch.no_grad():
        raw, _ = model(
            frames,
            model.initial_state(1, *SIZE, device=device, dtype=dtype),
            starts=torch.tensor([True], device=device),
            labelled=torch.ones(4, 1, dtype=torch.bool),
        )
    decoded = model.decode(raw, *SIZE).cpu()
    published = [data["eval_outputs"][f"t{t}.decoded"][0] for t in range(4)]
    difference = (decoded - torch.from_numpy(np.stack(published))).abs()
    scores = float(difference[..., 4:].max())
    boxes = float(difference[..., :4].max())
    context.report.compared(
        "parity", f"outputs, {name}", scores < max_score, scores=scores, boxes_px=boxes
    )


def _training_step(context, data, name, dtype, max_gradient):
    from evspan.pipeline.model.assignment import assign
    from evspan.pipeline.model.loss import detection_loss

    device = context.device
    model = _detector(data, dtype, device).train()
    inputs = data["train_input"]
    expected = data["train_expected"]
    places = list(
        zip(inputs["target_frame_t"].tolist(), inputs["target_sample_b"].tolist(), strict=True)
    )
    order = sorted(range(len(places)), key=places.__getitem__)
    labelled = torch.zeros(4, 2, dtype=torch.bool)
    for t, lane in places:
        labelled[t, lane] = True
    boxes = torch.from_numpy(inputs["targets"])[order].to(device)
    counts = (boxes.abs().sum(-1) > 0).sum(1)
    raw, _ = model(
        torch.from_numpy(inputs["events_uint8"]).to(device),
        model.initial_state(2, *SIZE, device=device, dtype=dtype),
        starts=torch.ones(2, dtype=torch.bool, device=device),
        labelled=labelled,
    )
    geometry = model.geometry(*SIZE)
    assignment = assign(raw, boxes, counts, geometry, model.config.head)
    num_same = 0
    for row, frame in enumerate(order):
        cells = assignment.foreground[row].nonzero()[:, 0].cpu().numpy()
        num_same += np.array_equal(cells, expected[f"assign/{frame}/fg_anchor_idx"])
    loss = detection_loss(raw, boxes, counts, geometry, model.config.head).total
    loss.backward()
    errors = {}
    for parameter_name, parameter in model.named_parameters():
        published = torch.from_numpy(data["train_grads"][parameter_name])
        errors[parameter_name] = measure.relative_error(parameter.grad, published)
    worst = max(errors, key=errors.__getitem__)
    median_error = median(errors.values())
    published_loss = float(expected["loss/loss"])
    context.report.compared(
        "parity",
        f"training step, {name}",
        median_error < max_gradient,
        same_assignments=f"{num_same}/{len(order)}",
        loss_error=abs(float(loss) - published_loss) / published_loss,
        median_gradient=median_error,
        worst_gradient=errors[worst],
        of=worst,
    )
