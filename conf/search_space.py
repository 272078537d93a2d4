"""The search space of a sweep: keys with ranges of values, in Hydra's grammar.

| override                                       | values                                         |
|------------------------------------------------|------------------------------------------------|
| key=a,b,c or key=choice(a,b,c)                 | one of them; also the options of a group       |
| key=range(1,9) or range(1,9,2)                 | 1, 2, ..., 8 or 1, 3, 5, 7                     |
| key=interval(0,0.5)                            | a real number                                  |
| key=int(interval(1,8))                         | a whole number, both ends included             |
| key=tag(log,interval(1e-5,1e-3)), log of int() | the same, uniform in its logarithm             |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evspan.conf.errors import ConfigError, require

LOG = "log"  # tag of a range


@dataclass(frozen=True)
class FloatRange:
    """Real numbers from `low` to `high`, both included. step: 0 for all of them."""

    low: float
    high: float
    log: bool = False
    step: float = 0.0

    def text(self, value: Any) -> str:
        """A value as it is written in an override."""
        return f"{float(value):.6g}"


@dataclass(frozen=True)
class IntRange:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def text(self, value: Any) -> str:
        """A value as it is written in an override."""
        return str(int(value))


@dataclass(frozen=True)
class Choices:
    """Values in Hydra's grammar, as they are written in an override."""

    values: tuple[str, ...]

    def text(self, value: Any) -> str:
        """A value as it is written in an override."""
        return str(value)


Range = FloatRange | IntRange | Choices


@dataclass(frozen=True)
class SearchSpace:
    """The overrides of a search.

    fixed: of all trials. ranges: key, with the signs in front of it, -> its values.
    """

    fixed: tuple[str, ...]
    ranges: Mapping[str, Range]

    @property
    def keys(self) -> list[str]:
        """The keys that have ranges, without signs."""
        return [key.lstrip("+") for key in self.ranges]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of the ranges for a trial. values: by key as in `ranges`."""
        return [f"{key}={range_.text(values[key])}" for key, range_ in self.ranges.items()]


def range_of_interval(key: str, start: float, end: float, tags: Sequence[str]) -> Range:
    """The range of `interval(start,end)`.

    Raises:
        ConfigError: the end is not above the start, or a tag or a logarithm is impossible.
    """
    log = _is_log(key, tags)
    require(start < end, f"{key}=interval({start},{end}) is empty; give the lower end first")
    require(
        not log or start > 0,
        f"{key}=interval({start},{end}) has the tag log; give ends above 0",
    )
    if isinstance(start, int) and isinstance(end, int):
        return IntRange(start, end, log)
    return FloatRange(float(start), float(end), log)


def range_of_values(key: str, values: Sequence[float], tags: Sequence[str]) -> Range:
    """The range of `range(start,stop,step)`. values: all of it, in equal distances.

    Raises:
        ConfigError: it has no values, or a tag is impossible.
    """
    require(bool(values), f"{key}=range(...) is empty; range(1,4) has the values 1, 2 and 3")
    require(
        not _is_log(key, tags),
        f"{key}: a range has no tag log; use interval, such as tag(log,int(interval(1,64)))",
    )
    low = min(values)
    high = max(values)
    step = abs(values[1] - values[0]) if len(values) > 1 else 1
    if all(isinstance(value, int) for value in values):
        return IntRange(int(low), int(high), step=int(step))
    return FloatRange(float(low), float(high), step=float(step))


def choices(key: str, values: Sequence[str], tags: Sequence[str]) -> Choices:
    """The range of `choice(a,b)`.

    Raises:
        ConfigError: it has a tag.
    """
    if tags:
        raise ConfigError(f"{key} has the tag {', '.join(sorted(tags))}, which choices do not have")
    return Choices(tuple(values))


def _is_log(key: str, tags: Sequence[str]) -> bool:
    unknown = sorted(set(tags) - {LOG})
    require(not unknown, f"{key} has the tag {', '.join(unknown)}; the only one is {LOG}")
    return LOG in tags
