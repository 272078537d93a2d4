"""The results of a sweep's runs: curves, the best AP, and what interruptions cost."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from evspan.launch.sweep.registry import Run
from evspan.launch.sweep.report.curves import Curve, read_curves
from evspan.launch.sweep.report.run_time import run_time_use
from evspan.launch.sweep.state import number
from evspan.pipeline.time_use import TimeUse, total_of

LOSS_TAG = "loss/total"
AP_TAG = "evaluation/ap"
METRIC_NAMES = {"ap": "AP", "ap50": "AP50", "ap_small": "AP small"}  # keys of metrics.json


@dataclass(frozen=True)
class InterruptionCost:
    """What the requeues of a run cost.

    Attributes:
        seconds: time without a training step.
        starting: the part of `seconds` from the start of an attempt to its first step.
        steps: steps that were computed a second time.
    """

    seconds: float = 0.0
    starting: float = 0.0
    steps: int = 0


class BestAp(NamedTuple):
    """The highest AP of a run, 0 to 1, and the step of that evaluation."""

    ap: float
    step: int


@dataclass(frozen=True)
class RunResult:
    """A run with its curves and the cost of its interruptions.

    problem: what of its files cannot be read; may be empty. time: what it used its time for.
    """

    run: Run
    loss: Curve
    ap: Curve
    cost: InterruptionCost
    problem: str = ""
    time: TimeUse = field(default_factory=TimeUse)

    @property
    def best(self) -> BestAp | None:
        """The highest AP; the earliest if several are equal, as in checkpoints/best."""
        best = None
        for point in self.ap.points:
            if number(point.value) is None:
                continue
            if best is None or point.value > best.ap:
                best = BestAp(point.value, point.step)
        return best

    @property
    def best_ap(self) -> float | None:
        """The highest AP, 0 to 1; None if there was no evaluation."""
        return self.run.ap if self.best is None else self.best.ap

    @property
    def last_loss(self) -> float | None:
        """The loss of the newest step; None if there is none or it is not finite."""
        if not self.loss.points:
            return self.run.loss
        return number(self.loss.points[-1].value)

    def metrics(self) -> dict[str, float]:
        """The metrics of the newest evaluation and the last loss, those that are finite numbers."""
        values = {key: number(self.run.metrics.get(key)) for key in METRIC_NAMES}
        values["final_loss"] = self.last_loss
        return {key: value for key, value in values.items() if value is not None}


def read_results(runs: Sequence[Run]) -> list[RunResult]:
    """The results of the runs by AP, best first; runs without AP come last, in their order."""
    results = []
    for run in runs:
        curves = read_curves(run.folder, (LOSS_TAG, AP_TAG))
        loss = curves.by_tag[LOSS_TAG]
        cost = interruption_cost(run, loss)
        use, time_problem = run_time_use(run)
        problems = (run.problem, curves.problem, time_problem)
        problem = "; ".join(part for part in problems if part)
        results.append(RunResult(run, loss, curves.by_tag[AP_TAG], cost, problem, use))
    return sorted(results, key=_rank, reverse=True)


def total_time(results: Sequence[RunResult]) -> TimeUse:
    """The time of all runs."""
    return total_of(result.time for result in results)


def highest_ap(results: Sequence[RunResult]) -> float | None:
    """Of all runs; None if none was evaluated."""
    aps = [result.best_ap for result in results if result.best_ap is not None]
    return max(aps, default=None)


def _rank(result: RunResult) -> float:
    return -1.0 if result.run.ap is None else result.run.ap


class _AttemptSpan(NamedTuple):
    """An attempt that trained. Times are in seconds since 1970."""

    started: float
    first_step_done: float
    first_step: int
    last_record: float
    last_step: int


def interruption_cost(run: Run, loss: Curve) -> InterruptionCost:
    """What the requeues of a run cost.

    The time between two attempts is counted from the last record of the first one to the first step
    of the second. Attempts without a step lie in between and count in full.
    """
    seconds = 0.0
    starting = 0.0
    steps = 0
    for previous, attempt in pairwise(_attempt_spans(run, loss)):
        seconds += max(0.0, attempt.first_step_done - previous.last_record)
        starting += max(0.0, attempt.first_step_done - attempt.started)
        steps += max(0, previous.last_step - attempt.first_step)
    return InterruptionCost(seconds, starting, steps)


def _attempt_spans(run: Run, loss: Curve) -> Iterator[_AttemptSpan]:
    """The attempts that did at least one step."""
    starts = [i for i, event in enumerate(run.events) if event["event"] == "start"]
    for i, end in pairwise([*starts, len(run.events)]):
        start = run.events[i]
        events = run.events[i + 1 : end]
        running = next((event for event in events if event["event"] == "running"), None)
        if running is None:
            continue
        ended = run.events[end]["time"] if end < len(run.events) else time.time()
        times = []
        steps = []
        for point in loss.all_points:
            if start["time"] <= point.time < ended:
                times.append(point.time)
                steps.append(point.step)
        for event in events:
            if event["event"] in ("running", "saved", "done"):
                times.append(event["time"])
                steps.append(event.get("step", 0))
        yield _AttemptSpan(
            started=start["time"],
            first_step_done=running["time"],
            first_step=start.get("step", 0),
            last_record=max(times),
            last_step=max(steps),
        )
