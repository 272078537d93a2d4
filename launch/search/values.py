"""The values by which a search compares its trials, from the runs' metrics.jsonl."""

import os
from pathlib import Path
from typing import NamedTuple

from evspan.conf.schema.search import LOSS
from evspan.launch.sweep.state import number
from evspan.pipeline.metrics_log import EVALUATION, METRICS, TRAIN, read_metrics


class _Parsed(NamedTuple):
    """The values of a file of this size and modification time."""

    size: int
    mtime_ns: int
    values: dict[int, float]


# By run, metric and loss_every: a search and `status --watch` look every few seconds.
_parsed: dict[tuple[Path, str, int], _Parsed] = {}


def metric_values(run: Path, key: str, loss_every: int) -> dict[int, float]:
    """Step -> value of a metric, in the order of the steps.

    A file that has not changed since the last call is not read again.

    Args:
        key: of an evaluation's record; or LOSS, of training.
        loss_every: steps over which a value of the loss is the mean.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        info = os.stat(run / METRICS)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    last = _parsed.get((run, key, loss_every))
    if last is None or (last.size, last.mtime_ns) != (info.st_size, info.st_mtime_ns):
        # The file may grow after `info` was taken: then the next look reads it again.
        values = _read_values(run, key, loss_every)
        last = _Parsed(info.st_size, info.st_mtime_ns, values)
        _parsed[run, key, loss_every] = last
    return last.values


def _read_values(run: Path, key: str, loss_every: int) -> dict[int, float]:
    kind = TRAIN if key == LOSS else EVALUATION
    values = {}
    for record in read_metrics(run, kind):
        value = number(record.get(key))
        if value is not None:
            values[record["step"]] = value
    return _means(values, loss_every) if key == LOSS else dict(sorted(values.items()))


def _means(losses: dict[int, float], every: int) -> dict[int, float]:
    """The mean of the losses up to each multiple of `every` that has been reached."""
    last = max(losses, default=0)
    windows: dict[int, list[float]] = {}
    for step, loss in sorted(losses.items()):
        end = -(-step // every) * every
        if end <= last:
            windows.setdefault(end, []).append(loss)
    return {end: sum(window) / len(window) for end, window in windows.items()}


def best_value(values: dict[int, float], *, maximise: bool) -> float | None:
    """The best of a trial's values; None without any."""
    if not values:
        return None
    return max(values.values()) if maximise else min(values.values())
