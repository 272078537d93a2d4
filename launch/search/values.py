"""The values by which a search compares its trials, from the runs' metrics.jsonl."""

from pathlib import Path

from evspan.conf.schema.search import LOSS
from evspan.launch.sweep.state import number
from evspan.pipeline.metrics_log import EVALUATION, TRAIN, read_metrics


def metric_values(run: Path, key: str, loss_every: int) -> dict[int, float]:
    """Step -> value of a metric, in the order of the steps.

    Args:
        key: of an evaluation's record; or LOSS, of training.
        loss_every: steps over which a value of the loss is the mean.

    Raises:
        OSError: the file cannot be read.
    """
    records = read_metrics(run)
    if key == LOSS:
        losses = {r["step"]: number(r.get(LOSS)) for r in records if r["kind"] == TRAIN}
        return _means({s: loss for s, loss in losses.items() if loss is not None}, loss_every)
    values = {}
    for record in records:
        value = number(record.get(key))
        if record["kind"] == EVALUATION and value is not None:
            values[record["step"]] = value
    return dict(sorted(values.items()))


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
