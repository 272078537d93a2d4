"""Writes each run of a sweep as a session of TensorBoard's HParams plugin."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from evspan.conf.errors import one_line
from evspan.launch.search.summary import SearchSummary
from evspan.launch.sweep.report.results import RunResult
from evspan.launch.sweep.state import number
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

HPARAMS_FOLDER = "hparams"  # in the run folder

HParam = bool | float | str


def write_sweep_hparams(
    results: Sequence[RunResult], keys: Sequence[str], search: SearchSummary | None = None
) -> list[str]:
    """Writes RUN/hparams for all runs that have a history.

    Args:
        keys: the override keys that become hyper-parameters.
        search: whose trials the runs are: their states become one, and their values a metric.

    Returns:
        Why they could not be written, for each run where they could not.
    """
    problems = []
    names = trial_names([result.run.folder for result in results])
    for result, name in zip(results, names, strict=True):
        run = result.run
        if not run.events:  # such a run may have no folder
            continue
        values = {key: hparam_value(run.overrides[key]) for key in keys if key in run.overrides}
        metrics = result.metrics()
        if search is not None:
            values["trial"] = run.state.value
            if run.name in search.values:
                metrics[f"search/{search.info.metric}"] = search.values[run.name]
        starts = [event["time"] for event in run.events if event["event"] == "start"]
        started = starts[0] if starts else time.time()
        try:
            write_hparams(run.folder, name, values, metrics, started)
        except OSError as error:
            problems.append(one_line(error))
    return problems


def trial_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the runs' paths, as short as they can be and still differ: lr/0, lr/1.

    At least two parts: one TensorBoard may show several sweeps.
    """
    paths = [folder.absolute().parts[1:] for folder in folders]
    names: list[str] = []
    for length in range(2, max(map(len, paths), default=2) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def hparam_value(text: str) -> HParam:
    """The value of an override as a type that HParams can hold."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = number(float(text))
    except ValueError:
        return text
    return text if value is None else value


def write_hparams(
    run: Path,
    name: str,
    values: Mapping[str, HParam],
    metrics: Mapping[str, float],
    started: float,
) -> None:
    """Writes RUN/hparams, in place of an earlier one.

    Args:
        name: of the trial. TensorBoard takes runs of the same name as one.
        started: start of the run, in seconds since 1970.
    """
    folder = run / HPARAMS_FOLDER
    old_files = list(folder.glob("*tfevents*"))
    session = summary_v2.hparams_pb(dict(values), trial_id=name, start_time_secs=started)
    summaries = [session]
    for tag, value in metrics.items():
        summaries.append(Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    writer = EventFileWriter(str(folder))
    try:
        for summary in summaries:
            writer.add_event(Event(wall_time=started, step=0, summary=summary))
    finally:
        writer.close()
    for path in old_files:
        path.unlink(missing_ok=True)
