"""Compares two evaluations of the same frames, with bootstrap intervals over recordings."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.evaluation.bootstrap import MEASURES, draws, measures
from evspan.pipeline.evaluation.frames import FRAMES, LabelledFrames, load_frames
from numpy.typing import NDArray

RESULTS = "metrics.json"
# Keys in which two evaluations may differ and still be comparable.
FREE_KEYS = ("confidence_threshold", "nms_threshold", "split")
FEW_RECORDINGS = 5  # fewer make intervals unreliable


@dataclass(frozen=True)
class Evaluation:
    """An output folder of `evspan evaluate`. results: metrics.json."""

    path: Path
    results: dict[str, Any]
    config: EvaluationConfig
    classes: list[str]
    frames: LabelledFrames

    @property
    def title(self) -> str:
        """Folder, checkpoint and step."""
        return f"{self.path}: {self.results.get('checkpoint')}, step {self.results.get('step')}"


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """resamples: number of bootstrap samples. confidence: of the intervals, between 0 and 1."""

    resamples: int = 1000
    seed: int = 0
    confidence: float = 0.95


def open_evaluation(path: Path) -> Evaluation:
    """Reads an evaluation.

    Args:
        path: its output folder, or the metrics.json in it.

    Raises:
        UserError: there is none, or it is not what `evspan evaluate` writes.
    """
    folder = path.parent if path.name == RESULTS else path
    try:
        results = json.loads((folder / RESULTS).read_text())
        protocol = dict(results["protocol"])
        classes = list(results["per_class"])
        unknown = sorted(protocol.keys() - {f.name for f in fields(EvaluationConfig)})
        if unknown:
            raise KeyError(f"protocol.{unknown[0]}")
        config = EvaluationConfig(**protocol)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} has no {RESULTS}. Name the output folder of an evaluation, such as "
            "RUN/evaluation-val or RUN/evaluation"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / RESULTS} is not what evspan evaluate writes ({type(error).__name__}: "
            f"{error}). Evaluate again"
        ) from error
    return Evaluation(folder, results, config, classes, load_frames(folder / FRAMES))


def check_comparable(a: Evaluation, b: Evaluation) -> None:
    """Checks that both scored the same frames by the same rules.

    Raises:
        UserError: they did not.
    """
    both = f"{a.path} and {b.path}"
    if a.classes != b.classes:
        raise UserError(
            f"{both} have other classes, {a.classes} and {b.classes}. Compare detectors of the "
            "same dataset"
        )
    for field in fields(EvaluationConfig):
        value_a = getattr(a.config, field.name)
        value_b = getattr(b.config, field.name)
        if field.name not in FREE_KEYS and value_a != value_b:
            raise UserError(
                f"{both} scored by other rules: {field.name} is {value_a} and {value_b}. Evaluate "
                f"both with the same evaluation.{field.name}"
            )
    if a.frames.names != b.frames.names:
        unpaired = sorted(set(a.frames.names) ^ set(b.frames.names))
        raise UserError(
            f"{both} are of other recordings: {len(unpaired)} are in one alone "
            f"({', '.join(unpaired[:3])}). Evaluate both on the same split"
        )
    for name in ("recording", "end_us", "box_frame", "boxes", "region_frame", "regions"):
        values_a = getattr(a.frames, name)
        values_b = getattr(b.frames, name)
        if not len(values_a) == len(values_b) == 0 and not np.array_equal(values_a, values_b):
            raise UserError(
                f"{both} have other frames or boxes in the same recordings ({len(a.frames)} and "
                f"{len(b.frames)} frames, {len(a.frames.boxes)} and {len(b.frames.boxes)} boxes). "
                "Evaluate both on the same shards"
            )


def compare(a: Evaluation, b: Evaluation, options: CompareOptions) -> dict[str, Any]:
    """Values, intervals and differences (b - a) of MEASURES, as JSON values.

    Both are scored on the same bootstrap samples of recordings.

    Raises:
        UserError: they cannot be compared, or the frames of an evaluation do not give the AP in its
            metrics.json.
    """
    check_comparable(a, b)
    weights = draws(len(a.frames.names), options.resamples, options.seed)
    values_a = _measures(a, weights)
    values_b = _measures(b, weights)
    intervals = {}
    for name in MEASURES:
        intervals[name] = {
            "a": _interval(values_a[name], options.confidence),
            "b": _interval(values_b[name], options.confidence),
            "difference": _interval(values_b[name] - values_a[name], options.confidence),
        }
    return {
        "a": _source(a),
        "b": _source(b),
        "recordings": len(a.frames.names),
        "resamples": options.resamples,
        "seed": options.seed,
        "confidence": options.confidence,
        "measures": intervals,
    }


def _source(evaluation: Evaluation) -> dict[str, Any]:
    keys = ("checkpoint", "step", "config_hash")
    return {"path": str(evaluation.path), **{key: evaluation.results.get(key) for key in keys}}


def _measures(
    evaluation: Evaluation, weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """`measures` of an evaluation, checked against the AP in its metrics.json."""
    values = measures(evaluation.frames, evaluation.classes, evaluation.config, weights)
    recorded = evaluation.results["ap"]
    ap = values["ap"][0]
    expected = np.nan if recorded is None else recorded
    if not np.isclose(expected, ap, rtol=0, atol=1e-6, equal_nan=True):
        raise UserError(
            f"{evaluation.path / FRAMES} has AP {ap:.6f}, but {RESULTS} next to it has {recorded}: "
            "they are of different evaluations. Evaluate again"
        )
    return values


def _interval(values: NDArray[np.float64], confidence: float) -> dict[str, float | None]:
    """Value and percentile interval.

    Args:
        values: (1 + resamples,) all recordings first, then the samples; nan where a sample has no
            such boxes.
    """
    value = None if np.isnan(values[0]) else float(values[0])
    samples = values[1:][~np.isnan(values[1:])]
    if value is None or not samples.size:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(samples, ((1 - confidence) / 2, (1 + confidence) / 2))
    return {"value": value, "low": float(low), "high": float(high)}


def table(summary: dict[str, Any], a: Evaluation, b: Evaluation) -> str:
    """What `compare` returned, as lines of text."""
    lines = [f"A  {a.title}", f"B  {b.title}"]
    for name in FREE_KEYS:
        value_a = getattr(a.config, name)
        value_b = getattr(b.config, name)
        if value_a != value_b:
            lines.append(f"{name} is {value_a} in A, {value_b} in B")
    lines.append(
        f"{summary['recordings']} recordings, {len(a.frames)} labelled frames; "
        f"{summary['resamples']} draws of recordings (seed {summary['seed']}), intervals of "
        f"{100 * summary['confidence']:g} %"
    )
    if summary["recordings"] < FEW_RECORDINGS:
        lines.append(
            f"so few recordings make the intervals unreliable: evaluate on {FEW_RECORDINGS} or more"
        )
    lines += ["", f"  {'':<15}{'A':<23}{'B':<23}{'B - A':<24}".rstrip()]
    for name, words in MEASURES.items():
        measure = summary["measures"][name]
        value_a = _cell(measure["a"], "")
        value_b = _cell(measure["b"], "")
        difference = _cell(measure["difference"], "+")
        mark = "*" if _excludes_zero(measure["difference"]) else ""
        line = f"  {words:<15}{value_a:<23}{value_b:<23}{difference:<24}{mark}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _cell(interval: dict[str, float | None], sign: str) -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return "-"
    text = format(value, f"{sign}.3f")
    if low is None or high is None:
        return text
    low_text = format(low, f"{sign}.3f")
    high_text = format(high, f"{sign}.3f")
    return f"{text} [{low_text}, {high_text}]"


def _excludes_zero(difference: dict[str, float | None]) -> bool:
    low, high = difference["low"], difference["high"]
    return low is not None and high is not None and (low > 0 or high < 0)
