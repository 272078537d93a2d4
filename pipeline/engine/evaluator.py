"""Evaluation over all ranks: recordings are dealt out, streamed with carry, gathered, and scored once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import EvaluationConfig
from evspan.data_prep.labels.box_files import write_boxes
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.evaluation.coco import Metrics
from evspan.pipeline.evaluation.frames import FRAMES, save_frames
from evspan.pipeline.inference.streaming import RecordingResult, evaluate_split, labelled, score
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.parallel.reductions import broadcast_object, deal, gather_objects
from evspan.pipeline.parallel.world import World
from evspan.pipeline.weights import Weights, describe, plain


def evaluate_weights(
    weights: Weights, dataset: DatasetConfig, config: EvaluationConfig, world: World
) -> tuple[Metrics, list[RecordingResult], Dataset]:
    """Metrics on every rank; the results of all recordings (for files and pictures) too.

    A detector of its own evaluates, built from consolidated weights: training's module, its BatchNorm statistics and
    its carry stay as they are, and ranks may have different numbers of frames at every ZeRO stage.
    """
    data = open_dataset(dataset, config.split)
    check_fit(weights, data)
    detector = detector_from(weights, device=world.device)
    mine = deal(data.recordings, world.rank, world.size, weight=[r.frames for r in data.recordings])
    parts = gather_objects(
        evaluate_split(detector, data, config, device=world.device, recordings=mine)
    )
    results = sorted((r for part in parts for r in part), key=lambda r: r.name)
    metrics = broadcast_object(score(results, data, config) if world.is_main else None)
    return metrics, results, data


def check_fit(weights: Weights, data: Dataset) -> None:
    """Raises ConfigError when the frames or classes are not those that the weights were trained on."""
    if weights.frames.channels != data.channels:
        raise ConfigError(
            f"the weights were trained on frames of {weights.frames.channels} channels, the dataset has "
            f"{data.channels}. Prepare it with frames.bins={weights.frames.bins}"
        )
    if weights.classes != data.classes:
        raise ConfigError(
            f"the weights know the classes {weights.classes}, the dataset has {data.classes}. "
            "Choose the dataset config that they were trained with"
        )


def described(
    checkpoint: str, weights: Weights, dataset: DatasetConfig, config: EvaluationConfig
) -> dict[str, Any]:
    """What metrics.json names beside the protocol. Equal hashes: the same model, frames, dataset and rules, whatever weights."""
    settings = {
        **describe(weights),
        "step": None,
        "dataset": {**plain(asdict(dataset)), "root": None},
        "protocol": protocol(config),
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())
    return {
        "checkpoint": checkpoint,
        "step": weights.step,
        "split": config.split,
        "dataset": dataset.name,
        "root": dataset.root,
        "config_hash": digest,
    }


def protocol(config: EvaluationConfig) -> dict[str, Any]:
    """What the numbers depend on: thresholds, filters, bins."""
    return {
        k: v
        for k, v in asdict(config).items()
        if k not in ("sequence_length", "batch_size", "write_detections")
    }


def write_results(
    output: Path,
    metrics: Metrics,
    results: list[RecordingResult],
    data: Dataset,
    config: EvaluationConfig,
    about: dict[str, Any],
) -> None:
    """metrics.json (protocol, thresholds and checkpoint named), and where asked, what was detected: a `_bbox.npy` per recording,
    and all labelled frames for `evspan evaluate compare`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / FRAMES).unlink(missing_ok=True)  # of an older evaluation
    if config.write_detections:
        for result in results:
            write_boxes(output / f"{result.name}_bbox.npy", result.as_raw_boxes(data))
        save_frames(output / FRAMES, labelled(results, data))
    told = {**metrics.to_json(), **about, "protocol": protocol(config)}
    (output / "metrics.json").write_text(json.dumps(told, indent=1) + "\n")
