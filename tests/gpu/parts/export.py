"""The streaming step as ONNX against the detector on the CPU, where onnx is installed."""

import torch
from evspan.conf.schema.prep import FrameConfig
from evspan.pipeline.inference import exported_step
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights
from gpu import models


def run(context):
    """Adds the row."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if name in context.missing]
    if missing:
        context.report.skipped("export", "ONNX", f"not installed: {', '.join(missing)}")
        return
    torch.manual_seed(0)
    detector = Detector(models.model_config("micro"), models.CHANNELS).eval()
    shape = (1, models.CHANNELS, 96, 160)
    state = detector.initial_state(1, *shape[2:])
    classes = ["a", "b", "c"]
    weights = Weights(detector.state_dict(), detector.config, FrameConfig(), classes, 0)
    path = context.folder / "step.onnx"
    metadata = exported_step.file_metadata(weights, state)
    exported_step.write_onnx(exported_step.trace(detector, shape), path, metadata)
    differences = exported_step.check(exported_step.run_onnx(path), detector, shape, cutoff=10)
    context.report.compared(
        "export",
        "ONNX against the detector, on the CPU",
        differences.worst <= 1,
        worst_in_tolerances=differences.worst,
    )
