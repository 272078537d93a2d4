"""The step times of a run's ranks: RUN/ranks.json of `evspan.pipeline.engine.slow_ranks`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError, one_line
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import plural, printable
from evspan.launch.sweep.registry import format_duration
from evspan.launch.sweep.state import number
from evspan.pipeline.history import RANKS

MOST_RANKS = 100_000
PARTS = ("data", "forward", "backward", "update", "exchange")  # as StepPart of the engine
HEADINGS = ["rank", "node", "device", "10 %", "median", "90 %", "x median", *PARTS, ""]
RIGHT_ALIGNED = (0, *range(3, 7 + len(PARTS)))  # columns
NOTE = (
    "ms of a step without waiting for other ranks, quantiles over the last logged steps; then the "
    "median of each part (exchange: between ranks, with waiting for them)"
)


@dataclass(frozen=True)
class RankTimes:
    """Times of a rank in ms; None: not measured.

    Attributes:
        device: 'GPU 0 NVIDIA H100', or 'CPU'.
        own_ms: 10 %, median and 90 % of its steps without waiting for others.
        parts_ms: the median of each of PARTS.
        ratio: its median over that of all ranks.
        slow_since: the step since which it is named as slow; None: it is not.
    """

    rank: int
    host: str
    device: str
    own_ms: tuple[float | None, ...]
    parts_ms: dict[str, float | None]
    ratio: float | None
    slow_since: int | None


@dataclass(frozen=True)
class RanksOfRun:
    """The ranks at a logged step. time: of the record, in seconds since 1970."""

    step: int
    time: float
    ranks: list[RankTimes]


def read_ranks(run: Path) -> RanksOfRun:
    """The ranks at the last logged step.

    Raises:
        UserError: there is no such record, or it is damaged.
    """
    try:
        values = read_json_object(run / RANKS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{run} has no {RANKS}: no step was logged yet, or training.slow_rank_factor is 0"
        ) from error
    except (JsonFileError, OSError) as error:
        raise UserError(printable(one_line(error))) from error
    rows = values.get("ranks")
    if not isinstance(rows, list):
        raise UserError(f"{run / RANKS} lists no ranks; the next logged step replaces it")
    ranks = [_rank(row) for row in rows[:MOST_RANKS] if isinstance(row, dict)]
    return RanksOfRun(_integer(values.get("step")), number(values.get("time")) or 0.0, ranks)


def _rank(row: Mapping[str, Any]) -> RankTimes:
    own = row.get("own_ms")
    own_ms = [number(value) for value in own[:3]] if isinstance(own, list) else []
    parts = row.get("parts_ms")
    parts = parts if isinstance(parts, dict) else {}
    slow_since = row.get("slow_since")
    return RankTimes(
        rank=_integer(row.get("rank")),
        host=printable(str(row.get("host", ""))),
        device=printable(str(row.get("device", ""))),
        own_ms=(*own_ms, *[None] * (3 - len(own_ms))),
        parts_ms={name: number(parts.get(name)) for name in PARTS},
        ratio=number(row.get("ratio")),
        slow_since=slow_since if type(slow_since) is int else None,
    )


def _integer(value: object) -> int:
    """`value` if it is an integer, else 0."""
    return value if type(value) is int else 0


def rank_rows(ranks: Sequence[RankTimes]) -> list[list[str]]:
    """The headings and a row per rank."""
    return [HEADINGS, *(_row(rank) for rank in ranks)]


def _row(rank: RankTimes) -> list[str]:
    return [
        str(rank.rank),
        rank.host,
        rank.device,
        *(_text(value, 1) for value in rank.own_ms),
        _text(rank.ratio, 2),
        *(_text(rank.parts_ms[name], 1) for name in PARTS),
        "" if rank.slow_since is None else f"slow since step {rank.slow_since}",
    ]


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def summary(of_run: RanksOfRun) -> str:
    """'step 200, 12 s ago: 8 ranks, 1 of them slow'."""
    text = f"step {of_run.step}"
    if of_run.time:
        text += f", {format_duration(time.time() - of_run.time)} ago"
    text += f": {plural(len(of_run.ranks), 'rank')}"
    slow = sum(rank.slow_since is not None for rank in of_run.ranks)
    return f"{text}, {slow} of them slow" if slow else text


def ranks_as_json(of_run: RanksOfRun) -> dict[str, Any]:
    """As `evspan status --ranks --json` prints it."""
    return asdict(of_run)
