"""The trials of a search for `status` and `report`, from the runs' files. Does without Optuna."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evspan.launch.search.files import SearchInfo, read_info
from evspan.launch.search.values import best_value, metric_values
from evspan.launch.sweep.registry import Run
from evspan.launch.sweep.state import State

ENDED = (State.done, State.pruned, State.failed, State.cancelled)


@dataclass(frozen=True)
class SearchSummary:
    """A search and its trials.

    Attributes:
        values: name of a run -> the best value of the metric so far.
        importance: key -> fraction of the metric's variation; empty where it is not known.
        importance_basis: at which step, and of how many trials.
    """

    info: SearchInfo
    runs: Sequence[Run]
    values: dict[str, float]
    importance: dict[str, float]
    importance_basis: str = ""

    @property
    def best(self) -> Run | None:
        """The run with the best value; the first one where several are equal."""
        runs = [run for run in self.runs if run.name in self.values]
        return min(runs, key=self.order, default=None)

    @property
    def value_heading(self) -> str:
        """The heading of a column with the trials' values."""
        return f"{'best' if self.info.maximise else 'lowest'} {self.info.metric_name}"

    def value_text(self, run: Run) -> str:
        """The best value of a run; empty if it has none."""
        value = self.values.get(run.name)
        return "" if value is None else f"{value:.4g}"

    def order(self, run: Run) -> float:
        """Sort key: the best value first, runs without one last."""
        value = self.values.get(run.name)
        if value is None:
            return math.inf
        return -value if self.info.maximise else value

    def lines(self) -> list[str]:
        """What the search is, how far it is, the best trial so far, and the importance of keys."""
        lines = [self.info.describe()]
        states = Counter(run.state for run in self.runs)
        num_ended = sum(states[state] for state in ENDED)
        counts = [f"{states[state]} {state.value}" for state in State if states[state]]
        line = f"{num_ended} of {self.info.trials} trials have ended"
        lines.append(f"{line}: {', '.join(counts)}" if counts else line)
        best = self.best
        if best is not None:
            overrides = [f"{key}={best.overrides.get(key, '')}" for key in self.info.ranges]
            value = f"{self.info.metric_name} {self.value_text(best)}"
            lines.append(f"best so far: {best.name}, {value}: {' '.join(overrides)}")
        if self.importance:
            parts = [f"{key} {100 * part:.0f} %" for key, part in self.importance.items()]
            lines.append(f"importance for {self.importance_basis}: {', '.join(parts)}")
        if self.info.job:
            lines.append(f"controller: SLURM job {self.info.job}, log: logs/search.log")
        return lines


def summarise(path: Path, runs: Sequence[Run], *, with_importance: bool) -> SearchSummary | None:
    """The search in a folder; None if it is not the folder of one.

    Args:
        runs: of the sweep.
        with_importance: whether to compute the importance of keys, which takes Optuna and a second.

    Raises:
        UserError: search.json is damaged.
    """
    info = read_info(path)
    if info is None:
        return None
    values = {}
    for run in runs:
        value = _value(run, info)
        if value is not None:
            values[run.name] = value
    summary = SearchSummary(info, runs, values, {})
    if with_importance:
        from evspan.launch.search.study import importance

        computed = importance(path)
        if computed is not None:
            basis = f"{info.metric_name} at step {computed.step} of {computed.trials} trials"
            by_key = {key.lstrip("+"): part for key, part in computed.by_key.items()}
            summary = replace(summary, importance=by_key, importance_basis=basis)
    return summary


def has_value_column(summary: SearchSummary) -> bool:
    """Whether a report shows the trials' values in a column: `best AP` is one of every report."""
    return bool(summary.values) and summary.info.metric != "ap"


def search_as_json(summary: SearchSummary) -> dict[str, Any]:
    """The search as `status` and `report` print it with --json."""
    best = summary.best
    return {
        **asdict(summary.info),
        "values": summary.values,
        "best": None if best is None else best.name,
        "importance": summary.importance,
    }


def _value(run: Run, info: SearchInfo) -> float | None:
    try:
        values = metric_values(run.folder, info.metric, info.first_rung)
    except OSError:
        return None
    return best_value(values, maximise=info.maximise)
