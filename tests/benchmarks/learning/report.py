"""What `evspan bench learn` found: tables with intervals over seeds, the same as JSON, and the curves."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from evspan.launch.sweep.registry import Run, describe
from evspan.launch.sweep.report.curves import read_curves
from evspan.launch.sweep.state import State, number
from learning.curves import Line, Panel, write_picture
from learning.intervals import CONFIDENCE, Interval, interval, paired
from learning.recordings import Made
from learning.study import ARM_LENGTH, ARMS, LENGTHS, Plan

MEASURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap_small": "AP small",
    "ap_still": "AP still",
    "ap_moving": "AP moving",
    "recall_still": "recall still",
    "recall_moving": "recall moving",
}
BREAKDOWN = (
    "evaluation-val/metrics.json"  # of a run: what `evspan evaluate` tells of its newest checkpoint
)
COMPARED = (
    "ap",
    "ap_small",
    "ap_still",
    "recall_still",
)  # with the baseline, or the shortest sequence
CURVES = {"loss/total": "loss", "evaluation/ap": "AP", "evaluation/ap_small": "AP small"}
NOTE = f"""Points of 100: the mean over seeds ± half of its {CONFIDENCE:.0%} interval, Student's t over the seeds. What the
held-out recordings leave to chance is not in it: all runs are scored on the same. Differences are taken seed by seed: in every
arm a seed draws the same frames and augmentations. **Bold**: zero is outside the interval."""

Seeds = dict[int, Run]


def write_report(plan: Plan, made: Made, runs: Sequence[Run]) -> None:
    """report.md, report.json and curves.svg of the plan's folder; prints the first."""
    arms = {
        name: _finished(plan, runs, lambda seed, name=name: plan.arm(name, seed))
        for name in plan.arms
    }
    lengths = {
        str(n): _finished(plan, runs, lambda seed, n=n: plan.length(n, seed)) for n in plan.lengths
    }
    horizons = {
        str(n): _finished(plan, runs, lambda seed, n=n: plan.horizon(n, seed))
        for n in plan.horizons
    }
    text = _page(plan, made, runs, arms, lengths, horizons)
    (plan.folder / "report.md").write_text(text)
    told = {
        "set": plan.folder.name,
        "digest": made.digest,
        "steps": plan.steps,
        "frames_per_step": plan.frames,
        "extra": list(plan.extra),
        "arms": _as_json(arms),
        "lengths": _as_json(lengths),
        "horizons": _as_json(horizons),
    }
    (plan.folder / "report.json").write_text(json.dumps(told, indent=1) + "\n")
    rows = [
        panels
        for panels in (
            _arm_panels(arms),
            _length_panels(lengths, "length", "frames of a sequence"),
            _length_panels(horizons, "horizon", "frames that gradients flow through"),
        )
        if panels
    ]
    write_picture(
        plan.folder / "curves.svg",
        rows,
        f"{plan.folder.name}, {plan.steps} steps of {plan.frames} frames. Thin: "
        f"single seeds; thick: their mean; bars: {CONFIDENCE:.0%} of Student's t over seeds",
    )
    print(f"\n{text}\n{plan.folder / 'report.md'}, report.json, curves.svg", flush=True)


def _finished(plan: Plan, runs: Sequence[Run], overrides: Any) -> Seeds:
    """Those that are done, by seed."""
    found = {seed: plan.found(runs, overrides(seed)) for seed in range(plan.seeds)}
    return {seed: run for seed, run in found.items() if run is not None and _done(plan, run)}


def _done(plan: Plan, run: Run) -> bool:
    return run.state is State.done and run.metrics.get("step") == plan.steps


def finished(plan: Plan, runs: Sequence[Run]) -> list[Run]:
    """Those of the plan that are done and evaluated."""
    found = (plan.found(runs, overrides) for overrides in plan.all_runs())
    return [run for run in found if run is not None and _done(plan, run)]


def measured(run: Run) -> dict[str, float | None]:
    """By the names of MEASURES, shares from 0 to 1: what the run's last evaluation tells, and the breakdown of its checkpoint."""
    told = {name: number(run.metrics[name]) for name in MEASURES if name in run.metrics}
    try:
        file = json.loads((run.folder / BREAKDOWN).read_text())
    except (FileNotFoundError, ValueError):
        return told
    if file.get("step") == run.metrics.get("step"):
        for group, of_group in file.get("breakdown", {}).get("stillness", {}).items():
            told |= {f"{name}_{group}": number(of_group.get(name)) for name in ("ap", "recall")}
    return told


def values(seeds: Mapping[int, Run], measure: str) -> dict[int, float]:
    """Seed -> share; those without such boxes are left out."""
    found = {seed: measured(run).get(measure) for seed, run in seeds.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def measures(groups: Mapping[str, Seeds]) -> list[str]:
    """That any run's evaluation has told."""
    return [name for name in MEASURES if any(values(seeds, name) for seeds in groups.values())]


def _named(arm: str) -> str:
    return arm if arm == ARMS[arm] else f"{arm}: {ARMS[arm]}"


# -- the page ----------------------------------------------------------------------------------------------------
def _page(
    plan: Plan,
    made: Made,
    runs: Sequence[Run],
    arms: dict[str, Seeds],
    lengths: dict[str, Seeds],
    horizons: dict[str, Seeds],
) -> str:
    first = (
        ""
        if made.first
        else ", other bits than those that were made first: compare only with runs on this copy"
    )
    parts = [
        f"# {plan.folder.name}\n",
        f"Set {made.digest}{first}. Every run: {plan.steps} steps of {plan.frames} frames"
        f"{f', {shlex.join(plan.extra)}' if plan.extra else ''}.\n",
        NOTE,
    ]
    if arms:
        parts.append(
            f"\n## Arms\n\nSequences of {ARM_LENGTH} frames, half of the lanes follow recordings.\n"
        )
        parts += _table({_named(name): seeds for name, seeds in arms.items()}, "arm")
    if lengths:
        parts.append(
            "\n## Length of sequences\n\nThe baseline; all lanes follow recordings with their state carried, gradients "
            "flow through as many frames as the row says. Frames seen and steps are the same.\n"
        )
        parts += _table(lengths, "frames")
    if horizons:
        parts.append(
            f"\n## Horizon\n\nThe baseline in sequences of {LENGTHS[-1]} frames: every run sees the same batches, and "
            "gradients flow back through as many frames as the row says.\n"
        )
        parts += _table(horizons, "frames")
    if unfinished := _unfinished(plan, runs):
        parts.append("\nNot done, so not in the tables: " + "; ".join(unfinished) + ".")
    return "\n".join([*parts, ""])


def _table(groups: dict[str, Seeds], head: str) -> list[str]:
    """The first row is what the others are compared with."""
    there = measures(groups)
    against, compared = next(iter(groups)), [name for name in COMPARED if name in there]
    heads = [head, "seeds", *(MEASURES[name] for name in there)]
    if len(groups) > 1:
        heads += [f"{MEASURES[name]} less {against.partition(':')[0]}'s" for name in compared]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name, seeds in groups.items():
        cells = [
            name,
            str(len(seeds)),
            *(
                _cell(interval(list(found.values())) if (found := values(seeds, m)) else None)
                for m in there
            ),
        ]
        if len(groups) > 1:
            base = groups[against]
            cells += [
                "" if name == against else _difference(paired(values(seeds, m), values(base, m)))
                for m in compared
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(told: Interval | None) -> str:
    return "" if told is None else told.points()


def _difference(told: Interval | None) -> str:
    if told is None:
        return ""
    return f"**{told.points(signed=True)}**" if told.clear else told.points(signed=True)


def _unfinished(plan: Plan, runs: Sequence[Run]) -> list[str]:
    out = []
    for overrides in plan.all_runs():
        run = plan.found(runs, overrides)
        if run is None:
            out.append(
                f"{overrides[0].removeprefix('experiment=bench/')} {overrides[4]} (not started)"
            )
        elif run.state is not State.done:
            out.append(
                f"{overrides[0].removeprefix('experiment=bench/')} {overrides[1].partition('.')[2]} {overrides[4]} "
                f"({describe(run)})"
            )
    return out


def _as_json(groups: dict[str, Seeds]) -> dict[str, Any]:
    """Group -> measure -> what each seed gave, their mean, half of the interval (null: one seed)."""
    out: dict[str, Any] = {}
    for name, seeds in groups.items():
        found = {m: values(seeds, m) for m in measures({name: seeds})}
        told = {m: (by_seed, interval(list(by_seed.values()))) for m, by_seed in found.items()}
        out[name] = {
            m: {"seeds": by_seed, "mean": i.mean, "half": i.half}
            for m, (by_seed, i) in told.items()
        }
    return out


# -- the picture -------------------------------------------------------------------------------------------------
def _arm_panels(arms: dict[str, Seeds]) -> list[Panel]:
    """The course of the loss and of AP."""
    if not arms:
        return []
    read = {
        name: [read_curves(run.folder, list(CURVES)) for run in seeds.values()]
        for name, seeds in arms.items()
    }
    panels = []
    for tag, title in CURVES.items():
        lines = []
        for name, runs in read.items():
            each = [
                [
                    (float(p.step), p.value)
                    for p in curves[tag].points
                    if number(p.value) is not None
                ]
                for curves in runs
            ]
            lines.append(Line(name, mean_curve(each), each))
        panels.append(Panel(f"{title} by step", "step", title, lines))
    return panels


def mean_curve(each: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """At the steps that all have."""
    common = sorted(set.intersection(*(set(dict(points)) for points in each))) if each else []
    return [(step, sum(dict(points)[step] for points in each) / len(each)) for step in common]


def _length_panels(lengths: dict[str, Seeds], by: str, x_label: str) -> list[Panel]:
    """AP by length, or by horizon."""
    if not lengths:
        return []
    panels = []
    for wanted in (
        ("ap", "ap_small"),
        ("ap_still", "ap_moving"),
        ("recall_still", "recall_moving"),
    ):
        lines = []
        for measure in (m for m in wanted if m in measures(lengths)):
            told = {
                int(n): interval(list(found.values()))
                for n, seeds in lengths.items()
                if (found := values(seeds, measure))
            }
            lines.append(
                Line(
                    MEASURES[measure],
                    [(float(n), i.mean) for n, i in sorted(told.items())],
                    halves=[i.half for _, i in sorted(told.items())],
                )
            )
        if lines:
            title = f"{' and '.join(line.name for line in lines)} by {by}"
            panels.append(Panel(title, x_label, lines[0].name.split()[0], lines, log=True))
    return panels
