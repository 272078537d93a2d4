"""The page of the study: tables and figures from the scores that are there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evspan.conf.text import plural
from learning.curves import Bar, Line, Panel, write_effects, write_svg
from learning.effects import (
    POWER,
    Effect,
    holm,
    paired_effect,
    seeds_needed,
    smallest_found,
)
from learning.experiments import (
    ATTENTION,
    BIASES,
    GENERALISATION,
    LENGTH,
    LENGTHS,
    RATE,
    RESTS_LONG,
    RESTS_TEST,
    SETS,
    WINDOWS_MS,
    Experiment,
    Family,
)
from learning.intervals import CONFIDENCE, interval
from learning.recordings import Recordings
from learning.scores import RESTS, SPEEDS, TIMES, Score, Values, bin_names

MISSING = "missing"
PERCENT = f"{100 * CONFIDENCE:g} %"
SIGNIFICANT = 1 - CONFIDENCE
INTRODUCTION = f"""Simulated recordings, size `micro`, frames of 96 x 128. Every number is of the moving average of the
weights, on held-out recordings, in points of 100. ± is half of the {PERCENT} interval over seeds
and recordings: a hierarchical bootstrap, widened for few seeds (Student's t). Differences are paired
by seed and by recording. p is corrected for several comparisons, as many as the caption says (Holm); **bold**: p < {SIGNIFICANT:.2f}."""


Pair = tuple[str, str]  # a variant, and the one that it is compared with


class Key(NamedTuple):
    """What a score is of. on: the set; step: of the checkpoint."""

    experiment: str
    variant: str
    seed: int
    on: str
    step: int


@dataclass(frozen=True)
class Power:
    """What a pilot tells: fractions from 0 to 1.

    Attributes:
        pilot_seeds: of the pilot. between_seeds: standard deviation of a paired difference.
        by_recordings: its standard error by the choice of recordings.
        needed: seeds that find `intended` with probability POWER; None: no number does.
        planned: seeds. found: the smallest effect that they find so; None with one seed.
    """

    intended: float
    comparisons: int
    pilot_seeds: int
    between_seeds: float
    by_recordings: float
    needed: int | None
    planned: int
    found: float | None


@dataclass(frozen=True)
class Results:
    """What there is.

    Attributes:
        scale: factor on the steps. planned: seeds by experiment. digests: by set.
        pilot: pilot.json, the power as it was stated before the runs.
        real: (variant, seed) -> detections per frame without boxes.
        hours: of the jobs so far, one after the other. sets: recipes by name.
    """

    scores: Mapping[Key, Score]
    scale: float = 1.0
    planned: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    pilot: Mapping[str, Any] = field(default_factory=dict)
    real: Mapping[tuple[str, int], float] = field(default_factory=dict)
    hours: float = 0.0
    sets: Mapping[str, Recordings] = field(default_factory=lambda: SETS)

    def by_seed(
        self, experiment: Experiment, variant: str, measure: str, on: str, step: int = 0
    ) -> dict[int, Values]:
        """Seed -> values; step 0: the last one."""
        step = step or experiment.steps_of(experiment.variant(variant), self.scale)
        return {
            key.seed: score.values[measure]
            for key, score in self.scores.items()
            if key[:2] == (experiment.name, variant)
            and key[3:] == (on, step)
            and measure in score.values
        }

    def recordings(self, on: str) -> int:
        """Number of recordings of a set; 0 while nothing is scored on it."""
        return next((score.recordings for key, score in self.scores.items() if key.on == on), 0)

    def mean(
        self, experiment: Experiment, variant: str, measure: str, on: str, step: int = 0
    ) -> Effect | None:
        """The mean over seeds."""
        values = self.by_seed(experiment, variant, measure, on, step)
        return paired_effect(values, {s: 0 * v for s, v in values.items()}, self.recordings(on))

    def difference(
        self, experiment: Experiment, pair: Pair, measure: str, on: str, step: int = 0
    ) -> Effect | None:
        """The mean over seeds of the first variant's values less the second one's."""
        ours, theirs = (self.by_seed(experiment, variant, measure, on, step) for variant in pair)
        return paired_effect(ours, theirs, self.recordings(on))


def power_of(experiment: Experiment, results: Results) -> dict[str, Power]:
    """By family, from the paired differences of the pilot's two variants; those that have two seeds."""
    powers = {}
    planned = results.planned.get(experiment.name, experiment.seeds)
    for family in experiment.families:
        pair = (experiment.pilot[1], experiment.pilot[0])
        difference = results.difference(experiment, pair, family.measure, family.on)
        if difference is None or difference.between_seeds is None:
            continue
        comparisons = _comparisons(experiment, family)
        spread = (difference.between_seeds, difference.by_recordings, comparisons)
        powers[family.question] = Power(
            family.intended,
            comparisons,
            difference.seeds,
            difference.between_seeds,
            difference.by_recordings,
            seeds_needed(family.intended, *spread),
            planned,
            smallest_found(planned, *spread) if planned > 1 else None,
        )
    return powers


# -- the page --------------------------------------------------------------------------------------
class _Page:
    """Collects the parts, and numbers tables and figures."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder = folder
        self.results = results
        self.parts: list[str] = []
        self.tables = 0
        self.figures = 0

    def add(self, *parts: str) -> None:
        self.parts += [*parts, ""]

    def table(self, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.tables += 1
        lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        self.add(f"*Table {self.tables}. {caption}*", "", *lines)

    def figure(self, name: str, caption: str) -> Path:
        """The path of a figure, which is on the page from now on."""
        self.figures += 1
        self.add(f"![{name}]({name}.svg)", "", f"*Figure {self.figures}. {caption}*")
        return self.folder / f"{name}.svg"


def write_page(folder: Path, experiments: Sequence[Experiment], results: Results) -> str:
    """Writes report.md and its figures; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    page = _Page(folder, results)
    page.add("# The learning study: results")
    page.add(INTRODUCTION)
    if results.hours:
        page.add(f"The runs and scores took {results.hours:.1f} hours, one after the other.")
    for experiment in experiments:
        _write_experiment(page, experiment)
    text = "\n".join(page.parts).rstrip() + "\n"
    (folder / "report.md").write_text(text)
    return text


def _write_experiment(page: _Page, experiment: Experiment) -> None:
    results = page.results
    page.add(f"## {experiment.title}")
    page.add(_method(experiment, results))
    if not any(key.experiment == experiment.name for key in results.scores):
        page.add("Nothing is scored yet.")
        return
    _write_power(page, experiment)
    for family in experiment.families:
        _write_family(page, experiment, family)
    _write_forest(page, experiment)
    if experiment.name == ATTENTION.name:
        _write_recovery(page)
        _write_groups(page, experiment, "learn-v3")
    elif experiment.name == LENGTH.name:
        _write_rest_curves(page)
        _write_drift(page)
        _write_groups(page, experiment, RESTS_TEST)
    elif experiment.name == GENERALISATION.name:
        _write_real(page)
    else:
        _write_rates(page)


def _method(experiment: Experiment, results: Results) -> str:
    steps = round(experiment.steps * results.scale)
    base = ""
    for variant in experiment.variants:
        if variant.once:
            ap = results.mean(experiment, variant.name, "ap", experiment.scored_on[0])
            variant_steps = experiment.steps_of(variant, results.scale)
            base += f" One run: {variant.title}, {variant_steps} steps"
            base += f" of {experiment.frames_of(variant)} frames, AP {_cell(ap)}."
    sets = []
    for name in experiment.sets(experiment.variants):
        recordings = results.sets[name]
        digest = results.digests.get(name, "not made yet")
        counts = recordings.counts.replace("=", " ").replace(",", ", ")
        sets.append(f"`{name}` ({counts} recordings of {recordings.seconds} s; {digest})")
    return (
        f"{experiment.method} {steps} steps of {experiment.frames} frames a run.{base} "
        f"Sets: {', '.join(sets)}."
    )


def _write_power(page: _Page, experiment: Experiment) -> None:
    """The intended effects and the seeds that resolve them."""
    stated = page.results.pilot.get(experiment.name)
    if stated:
        powers = {name: Power(**values) for name, values in stated["families"].items()}
        origin = f"stated on {stated['date']}, before the other runs, from a pilot of"
    else:
        powers = power_of(experiment, page.results)
        origin = "from the runs below (there was no pilot):"
    if not powers:
        page.add(
            "There is no pilot, and less than two seeds of its variants: the power is not known."
        )
        return
    rows = []
    for question, power in powers.items():
        needed = "no number: more recordings" if power.needed is None else str(power.needed)
        found = "" if power.found is None else f"{100 * power.found:.1f}"
        rows.append(
            [
                question,
                f"{100 * power.intended:.1f}",
                f"{100 * power.between_seeds:.2f}",
                f"{100 * power.by_recordings:.2f}",
                str(power.comparisons),
                needed,
                str(power.planned),
                found,
            ]
        )
    pilot_seeds = max(power.pilot_seeds for power in powers.values())
    first, second = (experiment.variant(name).title for name in experiment.pilot)
    page.table(
        f"Power, {origin} {plural(pilot_seeds, 'seed')} ({second} less {first}): the seeds that find "
        f"the intended effect with probability {100 * POWER:g} % at the strictest step of the correction, and "
        "the smallest effect that the planned seeds find so.",
        [
            "question",
            "intended",
            "SD between seeds",
            "SE by recordings",
            "comparisons",
            "seeds needed",
            "seeds planned",
            "smallest effect found",
        ],
        rows,
    )


def _write_family(page: _Page, experiment: Experiment, family: Family) -> None:
    """Its table, and a sentence of what differs and what is excluded."""
    results = page.results
    differences = _differences(experiment, family, results)
    p_of = _corrected(experiment, family, results)
    rows = []
    references = list(dict.fromkeys(reference for _, reference in family.pairs))
    for reference in references:
        mean = results.mean(experiment, reference, family.measure, family.on)
        rows.append(
            [experiment.variant(reference).title, str(_num_seeds(mean)), _cell(mean), "", "", ""]
        )
        for pair, difference in differences.items():
            if pair[1] != reference:
                continue
            mean = results.mean(experiment, pair[0], family.measure, family.on)
            significant = p_of.get(pair, 1.0) < SIGNIFICANT
            cell = _cell(difference, signed=True)
            rows.append(
                [
                    experiment.variant(pair[0]).title,
                    str(_num_seeds(difference)),
                    _cell(mean),
                    experiment.variant(reference).title,
                    f"**{cell}**" if significant else cell,
                    _probability(p_of[pair]) if pair in p_of else "",
                ]
            )
    page.table(
        f"{family.question}: `{family.measure}` on `{family.on}`. "
        f"{_sample(experiment, results, family.on)}; p of {plural(_comparisons(experiment, family), 'comparison')}.",
        ["variant", "n", "points", "less", "difference", "p"],
        rows,
    )
    page.add(_verdict(experiment, differences, p_of))


def _verdict(
    experiment: Experiment,
    differences: Mapping[Pair, Effect | None],
    p_of: Mapping[Pair, float],
) -> str:
    sentences = []
    open_ends = []
    for pair, difference in differences.items():
        if difference is None or difference.half is None:
            continue
        title = experiment.variant(pair[0]).title
        if p_of[pair] < SIGNIFICANT:
            word = "above" if difference.value > 0 else "below"
            reference = experiment.variant(pair[1]).title
            points = difference.points(signed=True)
            sentences.append(
                f"{title} is {word} {reference} by {points} (p {_probability(p_of[pair], '= ')})"
            )
        else:
            open_ends.append((difference.value + difference.half, title))
    if open_ends:
        upper, title = max(open_ends)
        if len(open_ends) == 1:
            words = "1 difference is not significant; its interval excludes"
        else:
            words = f"{len(open_ends)} differences are not significant; their intervals exclude"
        sentences.append(
            f"{words} gains above {100 * upper:+.1f} points (largest upper end: {title})"
        )
    missing = sum(difference is None for difference in differences.values())
    if missing:
        sentences.append(f"{plural(missing, 'comparison')} missing")
    sentences = sentences or ["no comparison has two seeds yet"]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _comparisons(experiment: Experiment, family: Family) -> int:
    """The number of comparisons that are corrected together with those of a family."""
    return sum(len(other.pairs) for other in experiment.corrected_with(family))


def _differences(
    experiment: Experiment, family: Family, results: Results
) -> dict[Pair, Effect | None]:
    return {
        pair: results.difference(experiment, pair, family.measure, family.on)
        for pair in family.pairs
    }


def _corrected(experiment: Experiment, family: Family, results: Results) -> dict[Pair, float]:
    """The corrected p of the pairs of a family that have one.

    What is missing counts as a comparison with p = 1.
    """
    probabilities: dict[tuple[str, Pair], float] = {}
    known = []
    for other in experiment.corrected_with(family):
        for pair, difference in _differences(experiment, other, results).items():
            p = None if difference is None else difference.p
            probabilities[other.question, pair] = 1.0 if p is None else p
            if other == family and p is not None:
                known.append(pair)
    corrected = dict(zip(probabilities, holm(list(probabilities.values())), strict=True))
    return {pair: corrected[family.question, pair] for pair in known}


def _probability(p: float, equals: str = "") -> str:
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def _cell(value: Effect | None, *, signed: bool = False) -> str:
    return MISSING if value is None else value.points(signed=signed)


def _num_seeds(value: Effect | None) -> int:
    return 0 if value is None else value.seeds


def _sample(experiment: Experiment, results: Results, on: str) -> str:
    """'n = 3 to 5 seeds each, 16 recordings; ± or bars: 95 % interval': for a caption."""
    seeds: dict[str, set[int]] = {
        variant.name: set() for variant in experiment.variants if not variant.once
    }
    for key in results.scores:
        if key.experiment == experiment.name and key.on == on and key.variant in seeds:
            seeds[key.variant].add(key.seed)
    numbers = sorted({len(of_variant) for of_variant in seeds.values()})
    spans = " to ".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
    planned = results.planned.get(experiment.name, experiment.seeds)
    of = f" of {planned} planned" if numbers[0] < planned else ""
    return (
        f"n = {spans} seeds each{of}, {results.recordings(on)} recordings; ± or bars: "
        f"{PERCENT} interval over both"
    )


# -- figures ---------------------------------------------------------------------------------------
def _write_forest(page: _Page, experiment: Experiment) -> None:
    """Differences of all families."""
    panels = {}
    for family in experiment.families:
        bars = []
        for pair in family.pairs:
            difference = page.results.difference(experiment, pair, family.measure, family.on)
            title, reference = (experiment.variant(name).title for name in pair)
            several = len({reference for _, reference in family.pairs}) > 1
            name = f"{title} (less {reference})" if several else title
            bars.append(_bar(name, difference))
        panels[family.question] = bars
    reference = experiment.variant(experiment.families[0].pairs[0][1]).title
    sample = _sample(experiment, page.results, experiment.families[0].on)
    caption = f"Differences in points, first of all to {reference}. Blue: the interval excludes zero, uncorrected"
    path = page.figure(f"{experiment.name}-effects", f"{caption}. {sample}.")
    write_effects(path, panels, sample)


def _bar(name: str, value: Effect | None) -> Bar:
    if value is None:
        return Bar(name, None, None)
    return Bar(name, 100 * value.value, None if value.half is None else 100 * value.half)


def _line(name: str, effects: Sequence[tuple[float, Effect | None]]) -> Line:
    there = [(x, e) for x, e in effects if e is not None]
    return Line(name, [(x, e.value) for x, e in there], halves=[e.half for _, e in there])


def _write_recovery(page: _Page) -> None:
    """AP after the branch, by step, of the variants that are scored on the way."""
    results = page.results
    on = "learn-v3"
    lines = []
    for variant in ATTENTION.variants:
        if not variant.also_scored:
            continue
        starts = "published_start" if variant.name == "published" else "base"
        points = [(0.0, results.mean(ATTENTION, starts, "ap", on))]
        for step in ATTENTION.scored_steps(variant, results.scale):
            points.append((float(step), results.mean(ATTENTION, variant.name, "ap", on, step)))
        lines.append(_line(variant.title, points))
    lines = [line for line in lines if line.mean]
    if not lines:
        return
    caption = (
        "AP after the branch: the published start costs what lies between the two curves at step 0. "
        f"{_sample(ATTENTION, results, on)}."
    )
    page.add(_cost_of_published(results))
    panel = Panel("AP after the branch", "step", "AP", lines)
    write_svg(page.figure("attention-recovery", caption), [[panel]], "bars: 95 % interval")


def _cost_of_published(results: Results) -> str:
    """What the published start costs before any step, and after the last one."""
    on = "learn-v3"
    ours = results.by_seed(ATTENTION, "published_start", "ap", on)
    base = results.by_seed(ATTENTION, "base", "ap", on)
    cost = None
    if base:
        everywhere = dict.fromkeys(ours, base[0])
        cost = paired_effect(ours, everywhere, results.recordings(on))
    end = results.difference(ATTENTION, ("published", "continued"), "ap", on)
    return (
        f"Right after the branch, before any step, the published start changes the baseline's AP by "
        f"{_cell(cost, signed=True)} points ({plural(_num_seeds(cost), 'seed')}); after the last step it is "
        f"{_cell(end, signed=True)} from the baseline continued ({plural(_num_seeds(end), 'seed')})."
    )


def _write_rest_curves(page: _Page) -> None:
    """Recall and AP by time at rest: the figure that shows whether long sequences pay."""
    on = RESTS_TEST
    names = bin_names(RESTS)
    rows = []
    for measure, label in (("found", "found"), ("ap", "AP")):
        panels = []
        for bias in BIASES:
            lines = []
            for frames in LENGTHS:
                variant = f"frames_{frames}_bias_{bias}"
                values = [
                    page.results.mean(LENGTH, variant, f"{measure}/rest/{name}", on)
                    for name in names
                ]
                lines.append(_line(f"T = {frames}", list(enumerate(values))))
            title = f"{label}, forget bias {bias}"
            panels.append(Panel(title, "seconds at rest", label, lines, x_names=names))
        rows.append(panels)
    if not any(line.mean for panels in rows for panel in panels for line in panel.lines):
        return
    caption = (
        "Fraction of objects that are found, and their AP, by the time that they have been at rest, for "
        f"sequences of T frames (50 ms). {_sample(LENGTH, page.results, on)}."
    )
    write_svg(page.figure("length-rest", caption), rows, "bars: 95 % interval")


def _write_drift(page: _Page) -> None:
    """AP by time since the recording began, on recordings longer than all sequences."""
    on = RESTS_LONG
    names = bin_names(TIMES)
    panels = []
    for bias in BIASES:
        lines = []
        for frames in LENGTHS:
            variant = f"frames_{frames}_bias_{bias}"
            values = [page.results.mean(LENGTH, variant, f"ap/since/{name}", on) for name in names]
            lines.append(_line(f"T = {frames}", list(enumerate(values))))
        panels.append(
            Panel(f"AP, forget bias {bias}", "seconds since the start", "AP", lines, x_names=names)
        )
    if not any(line.mean for panel in panels for line in panel.lines):
        page.add(f"Longer sequences than trained (`{on}`): {MISSING}.")
        return
    caption = (
        "Does memory drift? AP by time since the recording began, state carried for 800 frames; "
        f"sequences were trained on at most 80. {_sample(LENGTH, page.results, on)}."
    )
    write_svg(page.figure("length-drift", caption), [panels], "bars: 95 % interval")


def _write_rates(page: _Page) -> None:
    lines = []
    for variant in RATE.variants:
        values = []
        for ms in WINDOWS_MS:
            values.append((float(ms), page.results.mean(RATE, variant.name, "ap", f"rate-{ms}-v1")))
        lines.append(_line(f"trained on {variant.title}", values))
    caption = f"AP by window. {_sample(RATE, page.results, f'rate-{WINDOWS_MS[0]}-v1')}."
    panel = Panel("AP by window", "window, ms", "AP", lines, log=True)
    write_svg(page.figure("rate", caption), [[panel]], "bars: 95 % interval")


# -- more tables -----------------------------------------------------------------------------------
def _write_groups(page: _Page, experiment: Experiment, on: str) -> None:
    """By class, speed and time at rest: AP of what is compared with, and differences to it."""
    references = list(dict.fromkeys(reference for _, reference in experiment.families[0].pairs))
    found: set[str] = set()
    for key, score in page.results.scores.items():
        if key.experiment == experiment.name:
            found |= score.values.keys()
    classes = sorted(measure for measure in found if measure.startswith("ap/class/"))
    rests = bin_names(RESTS)
    groups = {
        "AP by class": classes,
        "AP by speed, pixels of the stored frames per second": [
            f"ap/speed/{name}" for name in bin_names(SPEEDS)
        ],
        "AP by time at rest, seconds": [f"ap/rest/{name}" for name in rests],
    }
    if experiment.name == LENGTH.name:
        by_rest = {"Objects found by time at rest, seconds": [f"found/rest/{n}" for n in rests]}
        groups = by_rest | groups
    for title, measures in groups.items():
        rows = []
        for reference in references:
            variants = [pair[0] for pair in experiment.families[0].pairs if pair[1] == reference]
            cells = [_cell(page.results.mean(experiment, reference, m, on)) for m in measures]
            rows.append([experiment.variant(reference).title, *cells])
            for variant in variants:
                cells = []
                for measure in measures:
                    value = page.results.difference(experiment, (variant, reference), measure, on)
                    cells.append(_cell(value, signed=True))
                rows.append([f"{experiment.variant(variant).title}, difference", *cells])
        names = [measure.rpartition("/")[2] for measure in measures]
        page.table(
            f"{title}, on `{on}`, not corrected for several comparisons. "
            f"{_sample(experiment, page.results, on)}.",
            ["variant", *names],
            rows,
        )


def _write_real(page: _Page) -> None:
    """Detections per frame on real events."""
    if not page.results.real:
        page.add(f"Detections per frame on real events without boxes: {MISSING} (`--real DIR`).")
        return
    rows = []
    seeds = set()
    for variant in GENERALISATION.variants:
        values = [v for (name, seed), v in page.results.real.items() if name == variant.name]
        seeds |= {seed for name, seed in page.results.real if name == variant.name}
        rows.append([variant.title, str(len(values)), _per_frame(values)])
    page.table(
        "Detections of confidence 0.3 or more per frame on real events without boxes. "
        f"n = {len(seeds)} seeds; ± half of the 95 % interval over them (Student's t).",
        ["trained on", "n", "detections per frame"],
        rows,
    )


def _per_frame(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    mean = interval(values)
    return f"{mean.mean:.2f}" if mean.half is None else f"{mean.mean:.2f} ± {mean.half:.2f}"
