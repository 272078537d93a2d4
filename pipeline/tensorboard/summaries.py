"""Writes the TensorBoard images, histograms and text of a run. Rank 0 only."""

from collections.abc import Iterable

from evspan.conf.schema.training import EvaluationConfig, TrainConfig
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.evaluation.frames import scored
from evspan.pipeline.evaluation.pr_curves import pr_curves
from evspan.pipeline.inference.streaming import RecordingResult, labelled
from evspan.pipeline.tensorboard.attention_probe import ProbeResult, gate_names
from evspan.pipeline.tensorboard.augmentation_images import first_images
from evspan.pipeline.tensorboard.images import evaluation_image, probe_image, training_image
from evspan.pipeline.tensorboard.layout import charts
from evspan.pipeline.tensorboard.run_info import run_info
from evspan.pipeline.tensorboard.writer import TensorBoardWriter


def write_run_info(
    writer: TensorBoardWriter,
    config: TrainConfig,
    classes: list[str],
    parameters: Iterable[str],
    environment: dict[str, str],
    step: int,
    *,
    gpu: bool,
    mfu: bool,
) -> None:
    """Writes config, code version and environment as text, and the layout of the charts.

    Args:
        parameters: names of the detector's parameters.
        gpu: whether the run is on a GPU.
        mfu: whether the device's peak is known.
    """
    for tag, markdown in run_info(config, environment).items():
        writer.write_text(tag, markdown, step)
    gates = gate_names(parameters).values()
    writer.write_layout(charts(config, classes, gates=gates, gpu=gpu, mfu=mfu))


def write_first_images(writer: TensorBoardWriter, loader: Loader, index: int, step: int) -> None:
    """Writes an example of every augmentation, and what was drawn for micro-batch `index`."""
    for tag, image in first_images(loader, index).items():
        writer.write_image(tag, image, step)


def write_images(
    writer: TensorBoardWriter, probe: ProbeResult, batch: Batch, classes: list[str], step: int
) -> None:
    """Writes a training batch with its boxes, and the result of the attention probe."""
    training = training_image(batch, classes)
    if training is not None:
        writer.write_image("training/boxes", training, step)
    evaluation = probe_image(probe, classes)
    if evaluation is not None:
        writer.write_image("evaluation/watched_frames", evaluation, step)
    gates = {f"model/attention_gates/{name}": value for name, value in probe.gates.items()}
    writer.write_scalars(gates, step)
    factors = {f"model/attention/{name}": values for name, values in probe.multipliers.items()}
    writer.write_histograms(factors, step)
    if probe.gates:
        writer.write_histograms({"model/attention/gates": [*probe.gates.values()]}, step)


def write_evaluation(
    writer: TensorBoardWriter,
    results: list[RecordingResult],
    data: Dataset,
    config: EvaluationConfig,
    step: int,
) -> None:
    """Writes detections on frames, and a precision-recall curve per class.

    Args:
        config: from `protocol_of`.
    """
    image = evaluation_image(results, data)
    if image is not None:
        writer.write_image("evaluation/boxes_green_detections_orange", image, step)
    frames, *_ = scored(labelled(results, data), config)
    for name, curve in pr_curves(frames, data.classes).items():
        writer.write_pr_curve(f"evaluation/pr_at_iou_0.50/{name}", curve, step)
