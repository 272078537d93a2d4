"""A rank that steps a small network and skips some micro-batches, in every engine and in plain torch.

python -m skip_ranks FOLDER    with torchrun's variables

Writes RANK.pt: (stage, pattern) -> weights, and ("average", stage, pattern) -> (their moving
average, the same by its definition).
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evspan.conf.schema.training import (
    DeepSpeedConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.engine.deepspeed_engine import DeepSpeedEngine
from evspan.pipeline.engine.ema import MovingAverage
from evspan.pipeline.engine.plain_engine import PlainEngine
from evspan.pipeline.engine.running_statistics import RunningStatistics
from evspan.pipeline.parallel.world import open_world
from support.plain_engine import PlainEngine as OracleEngine
from torch import nn

ACCUMULATION = 3
PATTERNS = [
    "+++ +++",
    "-++ +++",
    "+-+ +++",
    "++- +++",
    "--+ -+-",
    "--- +++",
    "+++ --- ++-",
]  # -: skipped
PLAIN = "plain engine"
STAGES = (None, PLAIN, 0, 1, 2, 3)  # of ZeRO; None: the oracle


DECAY = 0.25  # the third update is the first beyond the warm-up


class SlowAverage:
    """The moving average by its definition, element by element, in float32."""

    def __init__(self, weights):
        self.values = {name: tensor.numpy().copy() for name, tensor in weights.items()}
        self.updates = 0

    def update(self, weights):
        """After an update that was applied."""
        decay = min(DECAY, (1 + self.updates) / (10 + self.updates))
        weight = np.float32(1 - decay)
        for name, tensor in weights.items():
            average = self.values[name].reshape(-1)
            for i, value in enumerate(tensor.numpy().reshape(-1)):
                average[i] += weight * (value - average[i])
        self.updates += 1


def stepped(stage, pattern, world) -> dict[Any, Any]:
    """The weights after the micro-batches of a pattern, and their average."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    config = TrainConfig(
        training=TrainingConfig(
            gradient_accumulation_steps=ACCUMULATION,
            batch_size=2,
            max_steps=9,
            gradient_clipping=0.5,
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        deepspeed=DeepSpeedConfig(stage=stage if isinstance(stage, int) else 0),
        parallel=ParallelConfig(ranks=world.size),
    )
    classes = {None: OracleEngine, PLAIN: PlainEngine}
    engine: Any = classes.get(stage, DeepSpeedEngine)(model, config, world, lanes=1)
    if stage is not None:
        average = MovingAverage(DECAY, engine, RunningStatistics(engine.module))
        slow = SlowAverage(engine.full_state())
    for number, sign in enumerate(pattern.replace(" ", "")):
        torch.manual_seed(100 * number + world.rank)
        loss = engine(torch.randn(4, 5)).pow(2).sum()
        counts = sign == "+"
        # DeepSpeed's engine gets gradients that are not finite and must keep them out.
        engine.backward(loss if counts else loss * torch.nan, torch.tensor(counts))
        update = engine.step()
        if update is not None and stage is not None:
            average.update(update.applied)
        if update is not None and update.applied:
            engine.advance()
            if stage is not None:
                average.advance()
                slow.update(engine.full_state())
    if stage is None:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {(None, pattern): weights}
    weights = engine.full_state()
    expected = {name: torch.from_numpy(values) for name, values in slow.values.items()}
    averages = (average.state(weights), expected)
    engine.close()
    return {(stage, pattern): weights, ("average", stage, pattern): averages}


def main(folder: Path) -> None:
    """Runs all stages and patterns."""
    config = ParallelConfig(ranks=int(os.environ["WORLD_SIZE"]), timeout_s=60, threads=1)
    with open_world(config) as world:
        weights = {}
        for stage in STAGES:
            for pattern in PATTERNS:
                weights |= stepped(stage, pattern, world)
        torch.save(weights, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
