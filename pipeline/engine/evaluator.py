"""Evaluates a checkpoint on all ranks: each runs some of the recordings, rank 0 scores them."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind, FrameConfig
from evspan.conf.schema.training import EvaluationConfig
from evspan.conf.text import plural
from evspan.data_prep.labels.box_files import write_boxes
from evspan.data_prep.shards.format import load_manifest
from evspan.pipeline.data.datasets import Dataset, frame_differences
from evspan.pipeline.data.loader import ReadingStoppedError
from evspan.pipeline.data.requirements import open_scored
from evspan.pipeline.engine.meetings import PER_TIMEOUT, Meetings
from evspan.pipeline.engine.signals import any_rank
from evspan.pipeline.evaluation.coco import Metrics
from evspan.pipeline.evaluation.frames import FRAMES, load_frames, save_frames
from evspan.pipeline.evaluation.protocol import protocol_name, protocol_of
from evspan.pipeline.inference.gathered_results import gather_results
from evspan.pipeline.inference.precision import run_precision
from evspan.pipeline.inference.streaming import RecordingResult, evaluate_split, labelled, score
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.parallel.rank_exit import leave_threads_behind
from evspan.pipeline.parallel.reductions import broadcast_json, deal
from evspan.pipeline.parallel.world import World
from evspan.pipeline.weights import Weights, describe, plain

logger = logging.getLogger(__name__)
BOXES = "_bbox.npy"
# These do not change the numbers, or only by rounding.
NOT_IN_PROTOCOL = ("sequence_length", "batch_size", "write_detections", "precision", "at_end")
# These change the breakdowns of the metrics, but not the AP.
NOT_IN_AP = (
    "confusion_threshold",
    "still_speed",
    "still_s",
    "time_bins_s",
    "speed_bins",
    "rest_bins_s",
)


class EvaluationStoppedError(Exception):
    """A rank was asked to stop before it had evaluated its recordings. Raised on all ranks."""


class Evaluation(NamedTuple):
    """Metrics of a split, with the results of its recordings sorted by name.

    config: with the minimum sizes by which the results were scored.
    """

    metrics: Metrics
    results: list[RecordingResult]
    data: Dataset
    config: EvaluationConfig


def evaluate_weights(
    weights: Weights,
    dataset: DatasetConfig,
    config: EvaluationConfig,
    world: World,
    *,
    stop_requested: Callable[[], bool] | None = None,
) -> Evaluation:
    """Evaluates on all ranks. A collective; returns the same on every rank.

    It builds a detector from the consolidated weights. So the model that is trained keeps its
    BatchNorm statistics and its state, and ranks may have different numbers of frames at every ZeRO
    stage.

    Args:
        stop_requested: whether this rank was asked to stop; called between chunks of frames. A rank
            that was does not read the rest of its recordings. Ranks have different numbers of
            chunks, so they agree after the last one.

    Raises:
        ConfigError: the dataset has other frames or classes than the weights.
        EvaluationStoppedError: a rank has left out recordings.
    """
    data = open_scored(dataset, config.split)
    check_dataset(weights, data)
    config = protocol_of(config, data)
    data = limit_recordings(data, config, log=world.is_main)
    if world.is_main:
        _warn_of_other_frames(weights, data, dataset.place)
    detector = detector_from(weights, device=world.device, precision=config.precision)
    recordings = deal(
        data.recordings, world.rank, world.size, weight=[r.frames for r in data.recordings]
    )
    meetings = Meetings(
        lambda works: any_rank(works, world.device, name="whether a rank still evaluates"),
        world.timeout_s / PER_TIMEOUT if world.size > 1 else math.inf,
    )
    own_results: list[RecordingResult] = []
    is_complete = True
    try:
        own_results = evaluate_split(
            detector,
            data,
            config,
            device=world.device,
            recordings=recordings,
            stop_requested=stop_requested,
            between_chunks=meetings.while_working,
        )
    except ReadingStoppedError:
        leave_threads_behind()
        is_complete = False
    if world.size > 1:
        meetings.until_all_are_done()
    if stop_requested is not None and any_rank(
        not is_complete, world.device, name="whether all recordings were evaluated"
    ):
        raise EvaluationStoppedError
    results = gather_results(own_results)
    results.sort(key=lambda result: result.name)
    metrics = score(results, data, config).to_json() if world.is_main else {}
    return Evaluation(Metrics(**broadcast_json(metrics, name="metrics")), results, data, config)


def limit_recordings(data: Dataset, config: EvaluationConfig, *, log: bool = False) -> Dataset:
    """The split with `evaluation.limit_recordings` of its n recordings.

    Those at the places k * n // limit for k = 0, 1, ..., in the split's order: always the same, and
    evenly over it.
    """
    number = len(data.recordings)
    limit = config.limit_recordings
    if not limit or limit >= number:
        return data
    if log:
        logger.info(
            "evaluates %d of %s of %s (evaluation.limit_recordings)",
            limit,
            plural(number, "recording"),
            config.split,
        )
    return replace(data, recordings=[data.recordings[k * number // limit] for k in range(limit)])


def check_dataset(weights: Weights, data: Dataset) -> None:
    """Checks that a dataset has the frames and classes that the weights were trained on.

    Raises:
        ConfigError: it has others.
    """
    if weights.frames.channels != data.channels:
        raise ConfigError(
            f"the weights were trained on frames of {weights.frames.channels} channels, the "
            f"dataset has {data.channels}. Prepare it with frames.bins={weights.frames.bins}"
        )
    if weights.classes != data.classes:
        raise ConfigError(
            f"the weights have the classes {weights.classes}, the dataset has {data.classes}. "
            "Prepare the recordings with the classes of the weights; of RVT's folders, name the "
            "same with dataset.classes=[...]; of shards that have other classes, "
            "'dataset.roots=[{root: SHARDS, class_map: {...}}]' dataset.classes=[...]"
        )


def other_frames(weights: Weights, frames: FrameConfig) -> dict[str, list[Any]]:
    """The settings of frames that are not those of the weights: [the weights', the frames'].

    The number of bins is `check_dataset`'s.
    """
    differences = frame_differences(weights.frames, frames)
    return {key: plain(pair) for key, pair in differences.items()}


def _warn_of_other_frames(weights: Weights, data: Dataset, root: str) -> None:
    different = [
        f"frames.{key}={evaluated} (weights: {trained})"
        for key, (trained, evaluated) in other_frames(weights, data.frames).items()
    ]
    if different:
        logger.warning(
            "%s was prepared with %s. The metrics are those of the weights on such frames; to "
            "evaluate as they were trained, prepare the recordings with the weights' values",
            root,
            ", ".join(different),
        )


def describe_evaluation(
    checkpoint: str,
    weights: Weights,
    dataset: DatasetConfig,
    config: EvaluationConfig,
    device: torch.device,
    *,
    data: Dataset,
) -> dict[str, Any]:
    """The part of metrics.json that describes an evaluation, without its protocol.

    Two evaluations with the same `config_hash` have the same model, frames, dataset and protocol;
    only the weights may differ, and the precision in which they were trained and ran.

    Args:
        config: from `protocol_of`.
        device: that the detector ran on.
        data: the split.
    """
    prepared = _describe_dataset(dataset)
    settings = {
        **describe(replace(weights, average=None)),
        "step": None,
        "dataset": prepared,
        "protocol": protocol(config),
    }
    del settings["precision"]
    digest = xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())
    description = {
        "checkpoint": checkpoint,
        "step": weights.step,
        "weights": weights.kind,
        "split": config.split,
        "dataset": prepared["name"],
        "root": dataset.place,
        "config_hash": digest,
        "protocol_name": protocol_name(config, data),
        "precision": run_precision(config.precision, weights.precision, device).name,
    }
    different = other_frames(weights, data.frames)
    if different:
        description["other_frames"] = different
    return description


def _describe_dataset(config: DatasetConfig) -> dict[str, Any]:
    """The dataset without its place: of shards, what they were prepared with."""
    description = {**plain(asdict(config)), "root": None}
    del description["roots"]
    if not config.roots:
        return description | _prepared_with(config.kind, config.root)
    description["roots"] = [
        {
            "class_map": dict(source.class_map),
            "classes": list(source.classes),
            **_prepared_with(source.kind or config.kind, source.root),
        }
        for source in config.roots
    ]
    return description


def _prepared_with(kind: DatasetKind, root: str) -> dict[str, Any]:
    """The dataset config of a folder of shards."""
    if kind is not DatasetKind.shards:
        return {}
    prepared: dict[str, Any] = load_manifest(root).config.get("dataset", {})
    return prepared


def protocol(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that the numbers depend on: thresholds, filters, bins."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_IN_PROTOCOL}


def evaluation_id(config: EvaluationConfig, recordings: str) -> str:
    """Identifies what an AP is of: the APs of two evaluations with one id can be compared.

    Unlike `config_hash`, it includes the recordings and their labels, and nothing that leaves the
    AP as it is.

    Args:
        config: from `protocol_of`.
        recordings: the checksum of the split, from `data_digest`.
    """
    settings = {key: value for key, value in protocol(config).items() if key not in NOT_IN_AP}
    text = json.dumps([settings, recordings], sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_results(
    output: Path,
    metrics: Metrics,
    results: list[RecordingResult],
    data: Dataset,
    config: EvaluationConfig,
    description: dict[str, Any],
) -> None:
    """Writes metrics.json and, with `config.write_detections`, the detections.

    Those are a `NAME_bbox.npy` per recording, and all labelled frames for
    `evspan evaluate compare`.

    Args:
        config: from `protocol_of`.
        description: from `describe_evaluation`.
    """
    output.mkdir(parents=True, exist_ok=True)
    _remove_detections(output)
    if config.write_detections:
        for result in results:
            path = output / f"{result.name}{BOXES}"  # of several roots LABEL/NAME
            path.parent.mkdir(exist_ok=True)
            write_boxes(path, result.as_raw_boxes(data))
        save_frames(output / FRAMES, labelled(results, data))
    summary = {**metrics.to_json(), **description, "protocol": protocol(config)}
    if config.limit_recordings:
        summary["recordings"] = [result.name for result in results]
    (output / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")


def _remove_detections(output: Path) -> None:
    """Removes those of an older evaluation, of the recordings that its frames name."""
    try:
        names = load_frames(output / FRAMES).names
    except UserError:  # there is none, or it is damaged
        names = []
    for name in names:
        path = Path(f"{name}{BOXES}")
        if ".." not in path.parts and not path.is_absolute():
            (output / path).unlink(missing_ok=True)
    (output / FRAMES).unlink(missing_ok=True)
