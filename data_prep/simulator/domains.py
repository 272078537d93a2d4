"""Named domains: kinds of recordings that differ in sensor, objects and background.

A domain gives some values of `SimulatorConfig` a range. Each recording draws its own value in it,
evenly in the logarithm (from 0 on: evenly), by the seed of the recording.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from evspan.conf.errors import UserError
from evspan.data_prep.simulator.config import SimulatorConfig

Range = tuple[float, float]  # smallest and largest value; equal: the value itself

DOMAINS: dict[str, dict[str, Range]] = {
    "default": {},
    # Little light: a sensor with much noise and high thresholds, faint objects.
    "night": {
        "noise_hz": (1.0, 4.0),
        "contrast_threshold": (0.28, 0.45),
        "threshold_mismatch": (0.06, 0.12),
        "refractory_us": (500, 2000),
        "hot_pixels": (50, 400),
        "object_contrast": (0.55, 0.8),
        "background_contrast": (0.3, 0.7),
    },
    # A camera that moves over a textured background full of things.
    "driving": {
        "ego_speed": (40.0, 160.0),
        "background_texture": (0.1, 0.25),
        "background_contrast": (1.0, 2.0),
        "clutter": (40, 120),
        "speed": (1.0, 1.5),
    },
    # Fast and small objects before a strong background, few of which stop.
    "fast": {
        "speed": (1.8, 3.0),
        "min_scale": (0.6, 0.6),
        "max_scale": (1.0, 1.0),
        "stop_fraction": (0.1, 0.1),
        "background_contrast": (1.5, 3.0),
        "clutter": (10, 40),
    },
}


@dataclass(frozen=True)
class Domain:
    """A kind of recordings.

    Attributes:
        name: of DOMAINS.
        base: the values without a range.
        ranges: SimulatorConfig's names -> range; some of DOMAINS[name] may be replaced.
    """

    name: str = "default"
    base: SimulatorConfig = field(default_factory=SimulatorConfig)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def config(self, seed: int) -> SimulatorConfig:
        """The values of a recording.

        Args:
            seed: of the recording.

        Raises:
            ConfigError: a value that cannot be simulated.
        """
        rng = np.random.default_rng([seed, 1])
        values: dict[str, Any] = {}
        for parameter in fields(SimulatorConfig):
            # One draw for each, so that a range leaves the values of the others as they are.
            position = rng.random()
            if parameter.name in self.ranges:
                value = _between(*self.ranges[parameter.name], position)
                is_whole = isinstance(getattr(self.base, parameter.name), int)
                values[parameter.name] = round(value) if is_whole else value
        return replace(self.base, **values)

    def check(self) -> None:
        """Raises ConfigError if an end of a range cannot be simulated."""
        for end in (0, 1):
            values: dict[str, Any] = {name: limits[end] for name, limits in self.ranges.items()}
            replace(self.base, **values)

    def to_json(self) -> dict[str, Any]:
        """Name, ranges and other values, as JSON values."""
        ranges = {name: list(limits) for name, limits in sorted(self.ranges.items())}
        base = {key: value for key, value in asdict(self.base).items() if key not in ranges}
        return {"domain": self.name, "ranges": ranges, "values": base}


def domain_of(name: str, base: SimulatorConfig, ranges: Mapping[str, Range]) -> Domain:
    """A named domain with some values or ranges of its own.

    Args:
        base: of the values without a range.
        ranges: replace those of the domain.

    Raises:
        UserError: no such domain, or a range from the larger to the smaller value.
        ConfigError: a value that cannot be simulated.
    """
    if name not in DOMAINS:
        raise UserError(f"there is no domain {name!r}. There are: {', '.join(DOMAINS)}")
    for key, (low, high) in ranges.items():
        if low > high:
            raise UserError(f"{key} {low:g},{high:g}: give the smaller value first")
    domain = Domain(name, base, {**DOMAINS[name], **ranges})
    domain.check()
    return domain


def _between(low: float, high: float, position: float) -> float:
    if low == high:
        return low
    if low <= 0:
        return float(f"{low + position * (high - low):.4g}")
    return float(f"{low * (high / low) ** position:.4g}")
