"""`evspan report`: the runs of a sweep by AP, as text, as a page of HTML, and as TensorBoard's HParams."""

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.cli.table import format_table as table
from evspan.launch.sweep.registry import Run, differing, read_runs, short_names, span
from evspan.launch.sweep.report.curves import Curve, read_curves, write_hparams
from evspan.launch.sweep.state import State, number

LOSS, AP = "loss/total", "evaluation/ap"
MEASURES = {"ap": "AP", "ap50": "AP50", "ap_small": "AP small"}  # of an evaluation
DESCRIPTION = """The runs of a sweep by the AP of their newest evaluation, as text; the same with curves, errors and requeues as
PATH/report.html, which needs no network and no other file; and for TensorBoard's HParams (tensorboard --logdir PATH), the
overrides that differ with AP, AP50, AP of small objects and the last loss. Told again, it replaces what it told before."""
EXAMPLES = """examples:
  evspan report sweeps/lr
  evspan report sweeps/lr --tensorboard http://login1:6006"""


@dataclass(frozen=True)
class Cost:
    """What interruptions took: seconds in which no step was done, of these so many to start again; steps done twice."""

    seconds: float = 0.0
    starting: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Row:
    """One run. best: the highest AP and its step."""

    run: Run
    loss: Curve
    ap: Curve
    cost: Cost

    @property
    def best(self) -> tuple[float, int] | None:
        points = [(p.value, p.step) for p in self.ap.points if number(p.value) is not None]
        return max(
            points, key=lambda point: point[0], default=None
        )  # of equal ones the first, as checkpoints/best has it

    @property
    def last_loss(self) -> float | None:
        return number(self.loss.points[-1].value) if self.loss.points else self.run.loss

    def metrics(self) -> dict[str, float]:
        told = {key: number(self.run.metrics.get(key)) for key in MEASURES} | {
            "final_loss": self.last_loss
        }
        return {key: value for key, value in told.items() if value is not None}


def decimals(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """By AP, best first; runs without any come last, in their order."""
    rows = []
    for run in runs:
        curves = read_curves(run.folder, (LOSS, AP))
        rows.append(Row(run, curves[LOSS], curves[AP], cost_of(run, curves[LOSS])))
    return sorted(rows, key=lambda row: -1.0 if row.run.ap is None else row.run.ap, reverse=True)


def cost_of(run: Run, loss: Curve) -> Cost:
    """From the last that was heard of an attempt's training to the next one's first step; attempts without any count in full."""
    starts = [i for i, e in enumerate(run.events) if e["event"] == "start"]
    seconds, starting, steps, before = 0.0, 0.0, 0, None
    for i, j in pairwise([*starts, len(run.events)]):
        start, events = run.events[i], run.events[i + 1 : j]
        running = next((e for e in events if e["event"] == "running"), None)
        if running is None:
            continue
        until = run.events[j]["time"] if j < len(run.events) else time.time()
        own = [(p.time, p.step) for p in loss.every if start["time"] <= p.time < until]
        own += [
            (e["time"], e.get("step", 0))
            for e in events
            if e["event"] in ("running", "saved", "done")
        ]
        if before is not None:
            seconds += max(0.0, running["time"] - before[0])
            starting += max(0.0, running["time"] - start["time"])
            steps += max(0, before[1] - start.get("step", 0))
        before = max(at for at, _ in own), max(step for _, step in own)
    return Cost(seconds, starting, steps)


def lines_of(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """keys: of the overrides that differ."""
    cells = [
        [
            "run",
            *short_names(keys),
            *MEASURES.values(),
            "best AP",
            "loss",
            "step",
            "state",
            "requeues",
        ]
    ]
    for row in rows:
        run, best = row.run, row.best
        cells.append(
            [
                run.name,
                *(run.overrides.get(key, "") for key in keys),
                *(decimals(number(run.metrics.get(key))) for key in MEASURES),
                f"{best[0]:.3f} at {best[1]}" if best else "",
                decimals(row.last_loss, 4),
                "" if run.step is None else str(run.step),
                run.state.value,
                str(run.requeues),
            ]
        )
    told = table(cells, right_aligned=range(len(keys) + 1, len(cells[0]) - 2))
    if (best_row := rows[0]).run.ap is not None and len(rows) > 1:
        told.append(
            f"best: {best_row.run.folder} ({wording(best_row.run, keys)}), AP {best_row.run.ap:.3f}"
        )
    told += [
        f"{row.run.folder}: {row.run.state.value}: {row.run.error or row.run.reason}"
        for row in rows
        if row.run.state in (State.failed, State.lost)
    ]
    told += [
        f"{row.run.folder}: requeued {row.run.requeues} times, which took {span(row.cost.seconds)} and "
        f"{row.cost.steps} steps done twice"
        for row in rows
        if row.run.requeues
    ]
    return told


def wording(run: Run, keys: Sequence[str]) -> str:
    return (
        " ".join(f"{key}={run.overrides[key]}" for key in keys if key in run.overrides)
        or "no overrides"
    )


def as_value(text: str) -> bool | float | str:
    """An override's value as TensorBoard can hold it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return text if number(value := float(text)) is None else value
    except ValueError:
        return text


def tell_tensorboard(rows: Sequence[Row], keys: Sequence[str]) -> None:
    for row in (row for row in rows if row.run.events):  # another may have no folder yet
        values = {key: as_value(row.run.overrides[key]) for key in keys if key in row.run.overrides}
        began = next((e["time"] for e in row.run.events if e["event"] == "start"), time.time())
        write_hparams(row.run.folder, values, row.metrics(), began)


def report(path: Path, tensorboard: str) -> None:
    """
    Raises:
        UserError: there is no run, or no such address.
    """
    from evspan.launch.sweep.report.html import write_page

    if not tensorboard.startswith(("http://", "https://")):
        raise UserError(
            f"--tensorboard is {tensorboard!r}; give an address such as http://login1:6006"
        )
    runs, note = read_runs(path)
    rows, keys = rows_of(runs), differing(runs)
    print("\n".join(lines_of(rows, keys)))
    tell_tensorboard(rows, keys)
    write_page(path, rows, keys, tensorboard)
    if note:
        print(f"note: {note}; the states come from the runs' files")
    print(f"{path / 'report.html'}; HParams: tensorboard --logdir {shlex.quote(str(path))}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "evspan report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder of a run or of a sweep")
    parser.add_argument(
        "--tensorboard",
        default="http://localhost:6006",
        metavar="URL",
        help="where the page's links lead (default: http://localhost:6006)",
    )
    given = parser.parse_args(argv)
    run_command(lambda: report(given.path, given.tensorboard))


if __name__ == "__main__":
    main()
