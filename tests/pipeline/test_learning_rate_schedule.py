"""The learning-rate schedule against torch's OneCycleLR and against the formula of the cosine."""

import math

import pytest
import torch
from evspan.conf.schema.training import OptimizerConfig, Schedule
from evspan.pipeline.engine.adam import learning_rate_factor

# (max_steps, warmup_fraction, warm-up steps); the last one is 1 at least.
RUNS = [(400, 0.005, 2), (40, 0.25, 10), (37, 0.3, 11), (20, 0.0, 1)]


def config(schedule: Schedule, warmup_fraction: float) -> OptimizerConfig:
    return OptimizerConfig(
        lr=1.0,
        schedule=schedule,
        warmup_fraction=warmup_fraction,
        start_factor=0.05,
        end_factor=0.002,
    )


def factors(config: OptimizerConfig, max_steps: int) -> list[float]:
    factor = learning_rate_factor(config, max_steps)
    return [factor(step) for step in range(max_steps)]


def factors_of_torch(config: OptimizerConfig, max_steps: int, warmup_steps: int) -> list[float]:
    """Of OneCycleLR. Its peak is at step pct_start * max_steps - 1, ours at step warmup_steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=max_steps,
        pct_start=(warmup_steps + 1) / max_steps,
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=1 / config.start_factor,
        final_div_factor=config.start_factor / config.end_factor,  # from the first one
    )
    result = []
    for _ in range(max_steps):
        result.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(result) < max_steps:
            schedule.step()
    return result


@pytest.mark.parametrize(("max_steps", "warmup_fraction", "warmup_steps"), RUNS)
def test_onecycle_agrees_with_torch_in_every_step(max_steps, warmup_fraction, warmup_steps):
    onecycle = config(Schedule.onecycle, warmup_fraction)
    expected = factors_of_torch(onecycle, max_steps, warmup_steps)
    assert factors(onecycle, max_steps) == pytest.approx(expected, rel=1e-9)
    assert expected.index(max(expected)) == warmup_steps


@pytest.mark.parametrize(("max_steps", "warmup_fraction", "warmup_steps"), RUNS)
def test_cosine_agrees_with_its_formula_in_every_step(max_steps, warmup_fraction, warmup_steps):
    cosine = config(Schedule.cosine, warmup_fraction)
    expected = []
    for step in range(warmup_steps):
        expected.append(0.05 + 0.95 * step / warmup_steps)
    for step in range(warmup_steps, max_steps):
        angle = math.pi * (step - warmup_steps) / (max_steps - 1 - warmup_steps)
        expected.append(0.002 + (1 - 0.002) * (1 + math.cos(angle)) / 2)
    assert factors(cosine, max_steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", Schedule)
def test_after_the_last_step_the_factor_stays(schedule):
    factor = learning_rate_factor(config(schedule, 0.25), 40)
    assert [factor(step) for step in (39, 40, 100)] == pytest.approx([0.002] * 3)
