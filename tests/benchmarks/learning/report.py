"""The report of the learning study: tables with intervals over seeds, as JSON too, and curves."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evspan.launch.sweep.registry import Run, describe
from evspan.launch.sweep.report.curves import read_curves
from evspan.launch.sweep.state import State, number
from learning.curves import Line, Panel, write_svg
from learning.intervals import CONFIDENCE, Interval, interval, paired
from learning.plan import LENGTHS, VARIANT_LENGTH, VARIANTS, Plan, override_key
from learning.recordings import RecordingSet

MEASURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap_small": "AP small",
    "ap_still": "AP still",
    "ap_moving": "AP moving",
    "recall_still": "recall still",
    "recall_moving": "recall moving",
}
BREAKDOWN = "evaluation-val/metrics.json"  # written by `evspan evaluate` in the run's folder
COMPARED = ("ap", "ap_small", "ap_still", "recall_still")  # with the first row of a table
CURVES = {"loss/total": "loss", "evaluation/ap": "AP", "evaluation/ap_small": "AP small"}
NOTE = f"""Points of 100: the mean over seeds ± half of its {CONFIDENCE:.0%} interval (Student's t over
the seeds). The choice of held-out recordings adds uncertainty that is not included: all runs are
scored on the same ones. Differences are paired by seed: a seed draws the same frames and
augmentations in every variant. **Bold**: the interval excludes zero."""

Seeds = dict[int, Run]


@dataclass(frozen=True)
class Results:
    """Finished runs by seed, for each row of the three tables."""

    variants: dict[str, Seeds]
    lengths: dict[str, Seeds]
    bptt_lengths: dict[str, Seeds]


def write_report(plan: Plan, recordings: RecordingSet, runs: Sequence[Run]) -> str:
    """Writes report.md, report.json and curves.svg. Returns the text of report.md."""
    results = _collect(plan, runs)
    text = _page(plan, recordings, runs, results)
    (plan.folder / "report.md").write_text(text)
    summary = {
        "set": plan.folder.name,
        "digest": recordings.digest,
        "steps": plan.steps,
        "frames_per_step": plan.frames,
        "extra": list(plan.extra),
        "variants": _as_json(results.variants),
        "lengths": _as_json(results.lengths),
        "bptt_lengths": _as_json(results.bptt_lengths),
    }
    (plan.folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    rows = [
        _variant_panels(results.variants),
        _length_panels(results.lengths, "length", "frames of a sequence"),
        _length_panels(results.bptt_lengths, "BPTT length", "frames that gradients flow through"),
    ]
    caption = (
        f"{plan.folder.name}, {plan.steps} steps of {plan.frames} frames. Thin: single seeds; "
        f"thick: their mean; bars: {CONFIDENCE:.0%} of Student's t over seeds"
    )
    write_svg(plan.folder / "curves.svg", [panels for panels in rows if panels], caption)
    return text


def _collect(plan: Plan, runs: Sequence[Run]) -> Results:
    variants: dict[str, Seeds] = {name: {} for name in plan.variants}
    lengths: dict[str, Seeds] = {str(frames): {} for frames in plan.lengths}
    bptt_lengths: dict[str, Seeds] = {str(frames): {} for frames in plan.bptt_lengths}

    def add(seeds: Seeds, seed: int, overrides: list[str]) -> None:
        run = plan.find(runs, overrides)
        if run is not None and _is_finished(plan, run):
            seeds[seed] = run

    for seed in range(plan.seeds):
        for name in plan.variants:
            add(variants[name], seed, plan.variant(name, seed))
        for frames in plan.lengths:
            add(lengths[str(frames)], seed, plan.length(frames, seed))
        for frames in plan.bptt_lengths:
            add(bptt_lengths[str(frames)], seed, plan.bptt(frames, seed))
    return Results(variants, lengths, bptt_lengths)


def _is_finished(plan: Plan, run: Run) -> bool:
    return run.state is State.done and run.metrics.get("step") == plan.steps


def finished_runs(plan: Plan, runs: Sequence[Run]) -> list[Run]:
    """The runs of the plan that are finished and evaluated."""
    planned = [plan.find(runs, overrides) for overrides in plan.all_runs()]
    return [run for run in planned if run is not None and _is_finished(plan, run)]


def measured(run: Run) -> dict[str, float | None]:
    """Measure -> fraction from 0 to 1: the last evaluation, and the checkpoint's breakdown."""
    metrics = {name: number(run.metrics[name]) for name in MEASURES if name in run.metrics}
    try:
        breakdown = json.loads((run.folder / BREAKDOWN).read_text())
    except (FileNotFoundError, ValueError):
        return metrics
    if breakdown.get("step") == run.metrics.get("step"):
        groups = breakdown.get("breakdown", {}).get("stillness", {})
        for group, scores in groups.items():
            metrics[f"ap_{group}"] = number(scores.get("ap"))
            metrics[f"recall_{group}"] = number(scores.get("recall"))
    return metrics


def values_by_seed(seeds: Mapping[int, Run], measure: str) -> dict[int, float]:
    """Seed -> value. Seeds without such boxes are left out."""
    values = {}
    for seed, run in seeds.items():
        value = measured(run).get(measure)
        if value is not None:
            values[seed] = value
    return values


def available_measures(rows: Mapping[str, Seeds]) -> list[str]:
    """The measures that at least one run has."""
    return [
        name for name in MEASURES if any(values_by_seed(seeds, name) for seeds in rows.values())
    ]


# -- report.md -------------------------------------------------------------------------------------
def _page(plan: Plan, recordings: RecordingSet, runs: Sequence[Run], results: Results) -> str:
    set_line = f"Set {recordings.digest}"
    if not recordings.original:
        set_line += ", not bit-identical to the original set: compare only runs on this copy"
    budget = f"Every run: {plan.steps} steps of {plan.frames} frames"
    if plan.extra:
        budget += f", {shlex.join(plan.extra)}"
    parts = [f"# {plan.folder.name}\n", f"{set_line}. {budget}.\n", NOTE]
    if results.variants:
        parts.append(
            f"\n## Variants\n\nSequences of {VARIANT_LENGTH} frames; half of the lanes follow "
            "recordings.\n"
        )
        parts += _table(
            {_title(name): seeds for name, seeds in results.variants.items()}, "variant"
        )
    if results.lengths:
        parts.append(
            "\n## Length of sequences\n\nThe baseline. All lanes follow recordings and carry their "
            "state; gradients flow through as many frames as the row says. Frames seen and steps are equal.\n"
        )
        parts += _table(results.lengths, "frames")
    if results.bptt_lengths:
        parts.append(
            f"\n## BPTT length\n\nThe baseline in sequences of {LENGTHS[-1]} frames. Every run sees "
            "the same batches; gradients flow back through as many frames as the row says.\n"
        )
        parts += _table(results.bptt_lengths, "frames")
    unfinished = _unfinished(plan, runs)
    if unfinished:
        parts.append("\nNot finished, so not in the tables: " + "; ".join(unfinished) + ".")
    return "\n".join([*parts, ""])


def _title(variant: str) -> str:
    change = VARIANTS[variant]
    return variant if variant == change else f"{variant}: {change}"


def _table(rows: dict[str, Seeds], first_column: str) -> list[str]:
    """A Markdown table. Every row is compared with the first one."""
    measures = available_measures(rows)
    reference = next(iter(rows))
    compared = [name for name in COMPARED if name in measures] if len(rows) > 1 else []
    header = [first_column, "seeds", *[MEASURES[name] for name in measures]]
    for name in compared:
        header.append(f"{MEASURES[name]} less {reference.partition(':')[0]}'s")
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for title, seeds in rows.items():
        cells = [title, str(len(seeds))]
        for name in measures:
            cells.append(_mean_cell(values_by_seed(seeds, name)))
        for name in compared:
            if title == reference:
                cells.append("")
            else:
                reference_values = values_by_seed(rows[reference], name)
                cells.append(
                    _difference_cell(paired(values_by_seed(seeds, name), reference_values))
                )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean_cell(values: Mapping[int, float]) -> str:
    return interval(list(values.values())).points() if values else ""


def _difference_cell(difference: Interval | None) -> str:
    if difference is None:
        return ""
    points = difference.points(signed=True)
    return f"**{points}**" if difference.excludes_zero else points


def _unfinished(plan: Plan, runs: Sequence[Run]) -> list[str]:
    descriptions = []
    for overrides in plan.all_runs():
        values = {override_key(override): override.partition("=")[2] for override in overrides}
        experiment = values["experiment"].removeprefix("bench/")
        run = plan.find(runs, overrides)
        if run is None:
            descriptions.append(f"{experiment} seed={values['seed']} (not started)")
        elif run.state is not State.done:
            length = f"sequence_length={values['training.sequence_length']}"
            descriptions.append(f"{experiment} {length} seed={values['seed']} ({describe(run)})")
    return descriptions


def _as_json(rows: dict[str, Seeds]) -> dict[str, Any]:
    """Row -> measure -> values by seed, their mean, half of the interval (null: one seed)."""
    summary: dict[str, Any] = {}
    for title, seeds in rows.items():
        summary[title] = {}
        for name in available_measures({title: seeds}):
            values = values_by_seed(seeds, name)
            mean = interval(list(values.values()))
            summary[title][name] = {"seeds": values, "mean": mean.mean, "half": mean.half}
    return summary


# -- curves.svg ------------------------------------------------------------------------------------
def _variant_panels(variants: dict[str, Seeds]) -> list[Panel]:
    """Loss and AP by step."""
    if not variants:
        return []
    curves_of = {
        name: [read_curves(run.folder, list(CURVES)).by_tag for run in seeds.values()]
        for name, seeds in variants.items()
    }
    panels = []
    for tag, title in CURVES.items():
        lines = []
        for name, runs in curves_of.items():
            seeds = [_points(curves[tag].points) for curves in runs]
            lines.append(Line(name, mean_curve(seeds), seeds))
        panels.append(Panel(f"{title} by step", "step", title, lines))
    return panels


def _points(points: Sequence[Any]) -> list[tuple[float, float]]:
    return [(float(p.step), p.value) for p in points if number(p.value) is not None]


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean at the steps that all curves have."""
    if not curves:
        return []
    by_step = [dict(points) for points in curves]
    common = set(by_step[0]).intersection(*by_step[1:])
    return [(step, sum(curve[step] for curve in by_step) / len(curves)) for step in sorted(common)]


def _length_panels(rows: dict[str, Seeds], by: str, x_label: str) -> list[Panel]:
    """Pairs of measures by length."""
    if not rows:
        return []
    available = available_measures(rows)
    panels = []
    for pair in (("ap", "ap_small"), ("ap_still", "ap_moving"), ("recall_still", "recall_moving")):
        lines = [_length_line(rows, measure) for measure in pair if measure in available]
        if lines:
            title = f"{' and '.join(line.name for line in lines)} by {by}"
            panels.append(Panel(title, x_label, lines[0].name.split()[0], lines, log=True))
    return panels


def _length_line(rows: dict[str, Seeds], measure: str) -> Line:
    means = {}
    for frames, seeds in rows.items():
        values = values_by_seed(seeds, measure)
        if values:
            means[int(frames)] = interval(list(values.values()))
    lengths = sorted(means)
    return Line(
        MEASURES[measure],
        [(float(length), means[length].mean) for length in lengths],
        halves=[means[length].half for length in lengths],
    )
