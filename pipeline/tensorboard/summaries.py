"""What TensorBoard is told of a run beside its curves; by rank 0 alone."""

from collections.abc import Iterable

from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.data.loader import Batch
from evspan.pipeline.evaluation.frames import scored
from evspan.pipeline.evaluation.pr_curves import pr_curves
from evspan.pipeline.inference.streaming import RecordingResult, labelled
from evspan.pipeline.tensorboard.attention_probe import Look, gate_names
from evspan.pipeline.tensorboard.images import evaluation_picture, training_picture, watched_picture
from evspan.pipeline.tensorboard.layout import charts
from evspan.pipeline.tensorboard.run_info import about_run
from evspan.pipeline.tensorboard.writer import Monitor


def tell_start(
    monitor: Monitor,
    config: TrainConfig,
    classes: list[str],
    parameters: Iterable[str],
    environment: dict[str, str],
    step: int,
    *,
    gpu: bool,
) -> None:
    """Config, code and environment as text, and which curves belong together."""
    for name, text in about_run(config, environment).items():
        monitor.text(name, text, step)
    monitor.layout(charts(config, classes, gates=gate_names(parameters).values(), gpu=gpu))


def tell_look(monitor: Monitor, look: Look, batch: Batch, classes: list[str], step: int) -> None:
    """What the network is taught, what it makes of the watched frames, and what its attention multiplies with."""
    for name, rgb in (
        ("training/boxes", training_picture(batch, classes)),
        ("evaluation/watched_frames", watched_picture(look, classes)),
    ):
        if rgb is not None:
            monitor.picture(name, rgb, step)
    monitor.scalars({f"attention_gates/{name}": value for name, value in look.gates.items()}, step)
    monitor.histograms(
        {f"attention/{name}": values for name, values in look.multipliers.items()}, step
    )
    if look.gates:
        monitor.histograms({"attention/gates": [*look.gates.values()]}, step)


def tell_evaluation(
    monitor: Monitor, results: list[RecordingResult], data: Dataset, config: TrainConfig, step: int
) -> None:
    """Detections over frames, and precision against recall."""
    if (rgb := evaluation_picture(results, data)) is not None:
        monitor.picture("evaluation/boxes_green_detections_orange", rgb, step)
    for name, curve in pr_curves(
        scored(labelled(results, data), config.evaluation)[0], data.classes
    ).items():
        monitor.pr_curve(
            f"evaluation/pr_at_iou_0.50/{name}",
            curve.true_positives,
            curve.false_positives,
            curve.missed,
            curve.precision,
            curve.recall,
            step,
        )
