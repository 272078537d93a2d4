"""The time of a training step and the memory of the optimizer with frozen parts, steps interleaved.

    OMP_NUM_THREADS=1 python tests/benchmarks/freeze_speed.py [ROUNDS]

tiny on the CPU in float32, 5 frames of 192 x 320 in 2 lanes, all predicted; the plain engine.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist
from evspan.conf.schema.training import (
    BackboneConfig,
    EngineKind,
    ModelConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.engine.parameter_patterns import freeze
from evspan.pipeline.engine.plain_engine import PlainEngine
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.parallel.world import World

CASES = {"none": [], "stage 0": ["backbone.stages.0.*"], "backbone": ["backbone.*"]}
STEPS, LANES, HEIGHT, WIDTH = 5, 2, 192, 320


def build(patterns: list[str]) -> PlainEngine:
    """An engine whose model has these parameters frozen."""
    torch.manual_seed(0)
    model = ModelConfig(backbone=BackboneConfig(partition_split_32=1))
    detector = Detector(model, 20)
    freeze(detector, patterns)
    training = TrainingConfig(precision=Precision.fp32, engine=EngineKind.plain)
    config = TrainConfig(model=model, training=training)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    return PlainEngine(detector, config, world, lanes=LANES)


def step(engine: PlainEngine, frames: torch.Tensor) -> float:
    """Seconds of forward, backward and update."""
    detector = engine.module
    assert isinstance(detector, Detector)
    state = detector.initial_state(LANES, HEIGHT, WIDTH)
    engine.train()
    started = time.perf_counter()
    raw, _ = detector(frames, state, labelled=torch.ones(STEPS, LANES, dtype=torch.bool))
    engine.backward(raw.square().mean(), torch.tensor(True))
    engine.step()
    return time.perf_counter() - started


def main(rounds: int) -> None:
    """Prints a line for each case."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    frames = torch.randint(0, 5, (STEPS, LANES, 20, HEIGHT, WIDTH), dtype=torch.uint8)
    engines = {name: build(patterns) for name, patterns in CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, engine in engines.items():
            seconds[name].append(step(engine, frames))
    for name, engine in engines.items():
        # Gradient, two moments and the average: float32 of every trained parameter.
        optimizer = 4 * 4 * engine.weights.master.numel() / 2**20
        median = statistics.median(seconds[name][1:])
        print(
            f"{name:10s} {median:6.3f} s a step, {optimizer:5.1f} MiB of gradient and Adam's state"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
