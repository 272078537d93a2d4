"""The first lines of a training: data, batch, learning rate, model, and where to watch it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.schema.layout import chosen_exchange
from evspan.conf.schema.training import EngineKind, OptimizerConfig, TrainConfig, TrainingConfig
from evspan.conf.text import plural
from evspan.pipeline.data.datasets import BOXES_IN_MEMORY, Dataset
from evspan.pipeline.engine.adam import learning_rate_factor
from evspan.pipeline.engine.continuation import schedule_allows
from evspan.pipeline.engine.limits import RunLimits
from evspan.pipeline.metrics_log import EVALUATION, read_metrics
from evspan.pipeline.parallel.mesh import Mesh
from torch import nn

CLASSES_SHOWN = 12


def frames_per_step(training: TrainingConfig) -> int:
    """Frames of all ranks in one optimizer update."""
    sequences = training.batch_size * training.gradient_accumulation_steps
    return sequences * training.sequence_length


def start_lines(
    config: TrainConfig, dataset: Dataset, model: nn.Module, mesh: Mesh, step: int
) -> list[str]:
    """What is about to be trained. The first line names the run.

    Args:
        step: that the run starts or resumes at.
    """
    begins = "resumes" if step else "starts"
    return [
        f"{config.run_dir}: {begins} at step {step} of {config.training.max_steps}; "
        f"{_layout(config, mesh)}, "
        f"{config.training.precision.name}",
        f"data: {_data(dataset)}",
        f"boxes: {_boxes(dataset)}",
        f"batch: {_batch(config, mesh)}",
        f"learning rate: {_learning_rate(config.optimizer, config.training.max_steps)}",
        f"model: {num_parameters(model.parameters()):,} parameters",
        f"watch it: tensorboard --logdir {config.run_dir}; log: "
        f"{Path(config.run_dir, 'logs', 'rank-00.log')}",
    ]


def num_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Of the whole model. With ZeRO 3 a rank holds a part of each parameter."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)


def _layout(config: TrainConfig, mesh: Mesh) -> str:
    ranks = mesh.data_size * mesh.sequence_size
    text = plural(ranks, "rank")
    if ranks > 1:
        text += f" = {mesh.data_size} data"
    if mesh.sequence_size > 1:
        kind = chosen_exchange(config.parallel.exchange, dws_conv=config.model.backbone.dws_conv)
        text += f" x {mesh.sequence_size} sequence, exchange {kind.name}"
    if config.training.engine is EngineKind.deepspeed:
        return f"{text}, ZeRO {config.deepspeed.stage}"
    return text


def _data(dataset: Dataset) -> str:
    frames = sum(recording.frames for recording in dataset.recordings)
    labelled = sum(int(np.count_nonzero(r.labelled)) for r in dataset.recordings)
    return (
        f"{plural(len(dataset.recordings), 'recording')}, {frames:,} frames of "
        f"{dataset.width} x {dataset.height}, {labelled:,} labelled"
    )


def _boxes(dataset: Dataset) -> str:
    """Per class, where the boxes are in memory anyway."""
    total = sum(int(recording.box_start[-1]) for recording in dataset.recordings)
    classes = plural_classes(len(dataset.classes))
    if total > BOXES_IN_MEMORY:
        return f"{total:,} of {classes}: {', '.join(dataset.classes[:CLASSES_SHOWN])}"
    counts = np.zeros(len(dataset.classes), np.int64)
    for recording in dataset.recordings:
        boxes, _ = recording.all_boxes()
        counts += np.bincount(boxes["class_id"], minlength=len(counts))
    shown = [
        f"{name} {count:,}" for name, count in zip(dataset.classes, counts.tolist(), strict=True)
    ]
    text = f"{counts.sum():,} of {classes}: {', '.join(shown[:CLASSES_SHOWN])}"
    return f"{text}, ..." if len(shown) > CLASSES_SHOWN else text


def plural_classes(number: int) -> str:
    """'1 class', '2 classes'."""
    return "1 class" if number == 1 else f"{number} classes"


def _batch(config: TrainConfig, mesh: Mesh) -> str:
    training = config.training
    steps = training.gradient_accumulation_steps
    sequences = training.batch_size * steps
    lanes = training.batch_size // mesh.data_size
    return (
        f"{sequences} sequences of {plural(training.sequence_length, 'frame')} = "
        f"{plural(mesh.data_size, 'data rank')} x {plural(lanes, 'lane')} x "
        f"{plural(steps, 'accumulation step')}; {frames_per_step(training)} frames per step"
    )


def _learning_rate(optimizer: OptimizerConfig, max_steps: int) -> str:
    factor = learning_rate_factor(optimizer, max_steps)
    warm_up = max(1, round(optimizer.warmup_fraction * max_steps))
    last = optimizer.lr * factor(max_steps - 1)
    return (
        f"{optimizer.lr:.3g} after {plural(warm_up, 'warm-up step')}, then "
        f"{optimizer.schedule.name} to {last:.1e} in step {max_steps}"
    )


def finished_lines(config: TrainConfig, step: int, limits: RunLimits) -> list[str]:
    """The result of a run that has ended, and how to train on.

    Args:
        config: with the real number of steps, as `limits` has it.
        step: the last one.
    """
    run = Path(config.run_dir)
    evaluations = [record for record in read_metrics(run) if record["kind"] == EVALUATION]
    scores = {record["step"]: record["ap"] for record in evaluations if _has_ap(record)}
    lines = [f"{run} is complete: step {step} of {config.training.max_steps}"]
    if limits.reason:
        lines[0] += f", {limits.reason}"
    if scores:
        best = max(scores, key=lambda number: (scores[number], number))
        last = max(scores)
        lines.append(
            f"AP {scores[last]:.3f} in step {last}, the best {scores[best]:.3f} in step {best}"
        )
    lines.append(f"weights: {run / 'checkpoints' / f'step-{step:08d}'}; evspan evaluate {run} ...")
    overrides = _longer(config, step, limits)
    if overrides:
        lines.append(f"to train on: {' '.join([f'run_dir={run}', *overrides])}")
    else:
        lines.append(
            "its learning rate has ended; to train on from these weights: "
            f"run_dir=NEW checkpoint.init_from={run}"
        )
    return lines


def _longer(config: TrainConfig, step: int, limits: RunLimits) -> list[str]:
    """Overrides with which a run goes on; []: its schedule allows no further step."""
    training = config.training
    if step < training.max_steps:
        return limits.remedies
    longer = replace(config, training=replace(training, max_steps=2 * step))
    if not schedule_allows(longer, training.max_steps, step):
        return []
    overrides = [*limits.remedies, f"training.max_steps={2 * step}"]
    if training.max_epochs:
        overrides.append(f"training.max_epochs={2 * training.max_epochs:g}")
    return overrides


def _has_ap(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("ap"), float)
