"""SWEEP/search.json: what a search is, for `status`, `report` and the next controller."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.schema.search import LOSS, Pruner, SearchConfig, metric_name
from evspan.conf.search_space import Choices, FloatRange, Range, SearchSpace
from evspan.conf.text import plural
from evspan.data_prep.shards.atomic import atomic_write

SEARCH = "search.json"
STOP = "search.stop"  # `evspan cancel` writes it; the controller ends
ANOTHER = "start the search in another folder: run_dir=sweeps/NAME"


@dataclass(frozen=True)
class SearchInfo:
    """A search.

    Attributes:
        id: in the names of its jobs, so that the queue can be searched for them.
        ranges: key -> kind (float, int or choice), and low, high, log and step, or values.
        job: SLURM job id of the controller; empty where it runs in a terminal, and at the end.
    """

    id: str
    metric: str
    maximise: bool
    trials: int
    sampler: str
    pruner: str
    first_rung: int
    reduction_factor: int
    ranges: dict[str, dict[str, Any]] = field(default_factory=dict)
    job: str = ""

    @property
    def metric_name(self) -> str:
        """The metric as search.metric names it."""
        return metric_name(self.metric)

    def describe(self) -> str:
        """'search of 64 trials by AP, sampler tpe, pruning from step 1000 on (1/3 of ...)'."""
        trials = plural(self.trials, "trial")
        line = f"search of {trials} by {self.metric_name}, sampler {self.sampler}"
        if self.pruner == Pruner.none.value:
            return f"{line}, no pruning"
        fraction = f"1/{self.reduction_factor}"
        return f"{line}, pruning from step {self.first_rung} on ({fraction} of the trials go on)"


def new_info(
    config: SearchConfig, space: SearchSpace, first_rung: int, earlier: SearchInfo | None
) -> SearchInfo:
    """What a search is now. earlier: what search.json contains; None for a new search."""
    return SearchInfo(
        id=earlier.id if earlier else secrets.token_hex(4),
        metric=config.metric_key,
        maximise=config.maximises,
        trials=config.trials,
        sampler=config.sampler.value,
        pruner=config.pruner.value,
        first_rung=first_rung,
        reduction_factor=config.reduction_factor,
        ranges={key.lstrip("+"): _plain(value) for key, value in space.ranges.items()},
        job=earlier.job if earlier else "",
    )


def check_continues(info: SearchInfo, earlier: SearchInfo, path: Path) -> None:
    """Check that a search may go on with other settings than before.

    Raises:
        UserError: its trials could not be compared with the earlier ones.
    """
    if info.metric != earlier.metric:
        raise UserError(
            f"{path} is a search by {earlier.metric_name}, and search.metric is now "
            f"{info.metric_name}; "
            f"leave it, or {ANOTHER}"
        )
    for key in sorted({*info.ranges, *earlier.ranges}):
        now = info.ranges.get(key)
        before = earlier.ranges.get(key)
        if _kind(now) != _kind(before):
            raise UserError(
                f"{path} is a search with another range for {key}; only the ends of ranges of "
                f"numbers may change. Give the same ranges, or {ANOTHER}"
            )


def _kind(range_: Mapping[str, Any] | None) -> Any:
    """What of a range must stay the same."""
    if range_ is None:
        return None
    names = ("kind", "values", "log")
    return [range_.get(name) for name in names]


def read_info(sweep: Path) -> SearchInfo | None:
    """The contents of search.json; None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = sweep / SEARCH
    try:
        values = read_json_object(path)
        info = SearchInfo(**values)
        _check(info)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (JsonFileError, TypeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}). Restore it, or {ANOTHER}") from error
    return info


def _check(info: SearchInfo) -> None:
    """Raises ValueError for values of other types than search.json has."""
    texts = (info.id, info.metric, info.sampler, info.pruner, info.job)
    numbers = (info.trials, info.first_rung, info.reduction_factor)
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("a text is none, or has control characters")
    if not info.id.isalnum():
        raise ValueError("the id is none")
    if not all(type(value) is int and value >= 0 for value in numbers):
        raise ValueError("a number is none, or negative")
    if info.metric == LOSS and not info.first_rung:
        raise ValueError("first_rung is 0")
    if not isinstance(info.ranges, dict):
        raise ValueError("ranges is no object")
    for key, range_ in info.ranges.items():
        if not key.isprintable() or not isinstance(range_, dict):
            raise ValueError("a range is no object, or its key has control characters")
        if not isinstance(range_.get("values", []), list):
            raise ValueError("the values of a choice are no list")


def write_info(sweep: Path, info: SearchInfo) -> None:
    """Writes search.json, with the lock on the sweep."""
    with atomic_write(sweep / SEARCH) as temporary:
        temporary.write_text(json.dumps(asdict(info), indent=1) + "\n")


def _plain(range_: Range) -> dict[str, Any]:
    if isinstance(range_, Choices):
        return {"kind": "choice", "values": list(range_.values)}
    kind = "float" if isinstance(range_, FloatRange) else "int"
    return {"kind": kind, **asdict(range_)}
