"""`evspan evaluate compare`: two evaluations of the same frames, and whether their difference is more than chance."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.training import EvaluationConfig
from evspan.launch.cli.command import Parser, run_command
from evspan.pipeline.evaluation.bootstrap import MEASURES, draws, measures
from evspan.pipeline.evaluation.frames import FRAMES, LabelledFrames, load_frames
from numpy.typing import NDArray

RESULTS = "metrics.json"
FREE = (
    "confidence_threshold",
    "nms_threshold",
    "split",
)  # what two evaluations may differ in and still score alike
FEW = 5  # recordings; fewer tell little of others
DESCRIPTION = """Two evaluations of the same frames side by side, with intervals: recordings are drawn anew, with
replacement and the same ones for both, and scored each time. The difference is more than chance where its interval leaves out
0 (marked *). Still are boxes slower than evaluation.still_speed for evaluation.still_s or more, moving the others; boxes of the
other group, and detections of them, are ignored."""
EXAMPLES = """examples:
  evspan evaluate compare runs/baseline/evaluation-val runs/attention/evaluation-val
  evspan evaluate compare runs/a/evaluation runs/b/evaluation --resamples 5000 --json > compared.json"""


class Evaluation(NamedTuple):
    path: Path
    results: dict[str, Any]  # metrics.json
    config: EvaluationConfig
    classes: list[str]
    frames: LabelledFrames

    @property
    def about(self) -> str:
        return f"{self.path}: {self.results.get('checkpoint')}, step {self.results.get('step')}"


def open_evaluation(path: Path) -> Evaluation:
    """path: an output folder of an evaluation, or its metrics.json.

    Raises:
        UserError: nothing there, or not what `evspan evaluate` writes.
    """
    folder = path.parent if path.name == RESULTS else path
    try:
        results = json.loads((folder / RESULTS).read_text())
        protocol, classes = dict(results["protocol"]), list(results["per_class"])
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
            f"{folder / RESULTS} is not what evspan evaluate writes ({type(error).__name__}: {error}). Evaluate "
            "again"
        ) from error
    return Evaluation(folder, results, config, classes, load_frames(folder / FRAMES))


def check_alike(a: Evaluation, b: Evaluation) -> None:
    """Raises UserError where they did not score the same frames by the same rules."""
    both = f"{a.path} and {b.path}"
    if a.classes != b.classes:
        raise UserError(
            f"{both} have other classes, {a.classes} and {b.classes}. Compare detectors of the same dataset"
        )
    for field in fields(EvaluationConfig):
        values = [getattr(e.config, field.name) for e in (a, b)]
        if field.name not in FREE and values[0] != values[1]:
            raise UserError(
                f"{both} scored by other rules: {field.name} is {values[0]} and {values[1]}. Evaluate both with the "
                f"same evaluation.{field.name}"
            )
    if a.frames.names != b.frames.names:
        other = sorted(set(a.frames.names) ^ set(b.frames.names))
        raise UserError(
            f"{both} are of other recordings: {len(other)} are in one alone ({', '.join(other[:3])}). Evaluate both "
            "on the same split"
        )
    for name in ("recording", "end_us", "box_frame", "boxes"):
        if not np.array_equal(getattr(a.frames, name), getattr(b.frames, name)):
            raise UserError(
                f"{both} have other frames or boxes in the same recordings ({len(a.frames)} and {len(b.frames)} "
                f"frames, {len(a.frames.boxes)} and {len(b.frames.boxes)} boxes). Evaluate both on the same shards"
            )


def compare(
    a: Evaluation, b: Evaluation, *, resamples: int, seed: int, confidence: float
) -> dict[str, Any]:
    """Values, intervals and differences, as JSON values.

    Raises:
        UserError: they cannot be compared, or an evaluation's frames are not those that its metrics.json tells of.
    """
    check_alike(a, b)
    weights = draws(len(a.frames.names), resamples, seed)
    of_a, of_b = (_measured(e, weights) for e in (a, b))
    told = {
        name: {
            "a": _interval(of_a[name], confidence),
            "b": _interval(of_b[name], confidence),
            "difference": _interval(of_b[name] - of_a[name], confidence),
        }
        for name in MEASURES
    }
    about = [
        {
            "path": str(e.path),
            **{k: e.results.get(k) for k in ("checkpoint", "step", "config_hash")},
        }
        for e in (a, b)
    ]
    return {
        "a": about[0],
        "b": about[1],
        "recordings": len(a.frames.names),
        "resamples": resamples,
        "seed": seed,
        "confidence": confidence,
        "measures": told,
    }


def _measured(evaluation: Evaluation, weights: NDArray) -> dict[str, NDArray]:
    values = measures(evaluation.frames, evaluation.classes, evaluation.config, weights)
    then, now = evaluation.results["ap"], values["ap"][0]
    if not np.isclose(np.nan if then is None else then, now, rtol=0, atol=1e-6, equal_nan=True):
        raise UserError(
            f"{evaluation.path / FRAMES} has AP {now:.6f}, {RESULTS} beside it tells of {then}: they are of "
            "different evaluations. Evaluate again"
        )
    return values


def _interval(values: NDArray, confidence: float) -> dict[str, float | None]:
    """The first of `values`, and the bounds that leave out equal shares of the others; nan: draws without such boxes."""
    drawn = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not drawn.size:
        return {
            "value": None if np.isnan(values[0]) else float(values[0]),
            "low": None,
            "high": None,
        }
    low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def table(told: dict[str, Any], a: Evaluation, b: Evaluation) -> str:
    lines = [f"A  {a.about}", f"B  {b.about}"]
    lines += [
        f"{name} is {x} in A, {y} in B"
        for name in FREE
        if (x := getattr(a.config, name)) != (y := getattr(b.config, name))
    ]
    lines += [
        f"{told['recordings']} recordings, {len(a.frames)} labelled frames; {told['resamples']} draws of recordings (seed "
        f"{told['seed']}), intervals of {100 * told['confidence']:g} %"
    ]
    if told["recordings"] < FEW:
        lines.append(
            f"so few recordings tell little of others: evaluate on {FEW} or more before you trust an interval"
        )
    lines += ["", f"  {'':<15}{'A':<23}{'B':<23}{'B - A':<24}".rstrip()]
    for name, words in MEASURES.items():
        one = told["measures"][name]
        cells = (
            f"{_cell(one['a'], ''):<23}{_cell(one['b'], ''):<23}{_cell(one['difference'], '+'):<24}"
        )
        lines.append(
            f"  {words:<15}{cells}{'*' if _beyond_chance(one['difference']) else ''}".rstrip()
        )
    return "\n".join(lines)


def _cell(value: dict[str, float | None], sign: str) -> str:
    texts = [
        "-" if value[k] is None else format(value[k], f"{sign}.3f")
        for k in ("value", "low", "high")
    ]
    return texts[0] if value["low"] is None else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _beyond_chance(difference: dict[str, float | None]) -> bool:
    low, high = difference["low"], difference["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def main(argv: list[str]) -> None:
    parser = Parser(
        "evspan evaluate compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "a", type=Path, metavar="A", help="output folder of an evaluation, or its metrics.json"
    )
    parser.add_argument("b", type=Path, metavar="B", help="the one to compare with it")
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="draws of recordings; default: 1000",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default: 0")
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of an interval; default: 0.95",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    given = parser.parse_args(argv)
    if given.resamples < 1 or given.seed < 0 or not 0 < given.confidence < 1:
        parser.error(
            f"--resamples {given.resamples} must be 1 or more, --seed {given.seed} 0 or more, and --confidence "
            f"{given.confidence} between 0 and 1"
        )

    def run() -> None:
        a, b = open_evaluation(given.a), open_evaluation(given.b)
        told = compare(
            a, b, resamples=given.resamples, seed=given.seed, confidence=given.confidence
        )
        print(json.dumps(told, indent=1) if given.json else table(told, a, b))

    run_command(run)
