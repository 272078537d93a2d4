"""The config of `evspan bench`: that of a training run, and what to measure."""

import math
from dataclasses import dataclass, field

from evspan.conf.errors import require
from evspan.conf.schema.training import TrainConfig


@dataclass(kw_only=True)
class BenchOptions:
    """What is measured, and on which frames."""

    steps: int = 20  # measured optimizer steps, after the warm-up
    # Limit of each of the three measurements (training step, loader, inference).
    seconds: float = 30.0
    output: str = ""  # JSON file of the results; empty: none
    # Pixels of the simulated frames that are used without dataset.root.
    height: int = 360
    width: int = 640

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"bench.steps is {self.steps}; give 1 or more")
        require(
            math.isfinite(self.seconds) and self.seconds > 0,
            f"bench.seconds is {self.seconds}; give a time above 0",
        )
        require(
            80 <= self.height <= 1024 and 80 <= self.width <= 1024,
            f"bench.height {self.height} and bench.width {self.width}: give 80 to 1024 pixels each",
        )


@dataclass(kw_only=True)
class BenchConfig(TrainConfig):
    """`evspan bench`: a training config, and how it is measured."""

    bench: BenchOptions = field(default_factory=BenchOptions)


def check_one_rank(config: BenchConfig) -> None:
    """Raises ConfigError where a config needs several ranks; names what one of them computes."""
    require(
        config.training.batch_size >= 1,
        "evspan bench measures a given number of lanes: training.batch_size=N. `auto` is for "
        "evspan train",
    )
    ranks = config.parallel.ranks
    sequence = config.parallel.sequence
    lanes = max(1, config.training.batch_size * sequence // ranks)
    frames = max(1, config.training.sequence_length // sequence)
    require(
        ranks == 1 and sequence == 1,
        f"evspan bench measures one rank, and parallel.ranks is {ranks}, parallel.sequence "
        f"{sequence}. Measure what each of them computes: parallel.ranks=1 parallel.sequence=1 "
        f"training.batch_size={lanes} training.sequence_length={frames}",
    )
