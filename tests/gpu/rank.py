"""A training process of the check: the real trainer on real shards.

    python -m gpu.rank steps|pair|learn JSON     JSON: fields of Settings

The last line of its output is RESULT and a JSON object.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from evspan.conf.schema.layout import ExchangeKind
from evspan.conf.schema.training import (
    CheckpointConfig,
    DeepSpeedConfig,
    EngineKind,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    Sampling,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.data.device_batches import device_batches, encodes_for
from gpu import measure, models
from gpu.simulated import dataset_config

RESULT = "RESULT "


@dataclass(frozen=True)
class Settings:
    """What one process trains.

    engine: deepspeed or plain. stage: of ZeRO, with DeepSpeed. seconds: of training, for `learn`;
    0: it trains `steps` steps.
    """

    shards: str
    run_dir: str
    device: str
    size: str = "micro"
    engine: str = "deepspeed"
    stage: int = 1
    precision: str = "fp32"
    lanes: int = 4
    frames: int = 4
    steps: int = 10
    attention: bool = False
    cuda_graphs: bool = False
    rank: int = 0
    ranks: int = 1
    sequence: int = 1
    exchange: str = "auto"
    seconds: float = 0.0

    def train_config(self) -> TrainConfig:
        """The config of a run that neither evaluates nor logs images."""
        return TrainConfig(
            run_dir=self.run_dir,
            seed=1,
            dataset=dataset_config(self.shards),
            model=models.model_config(self.size, attention=self.attention),
            training=TrainingConfig(
                max_steps=100_000,
                batch_size=self.lanes,
                sequence_length=self.frames,
                precision=Precision[self.precision],
                engine=EngineKind[self.engine],
                cuda_graphs=self.cuda_graphs,
                log_every=1000,
                evaluate_every=0,
                log_images_every=0,
            ),
            deepspeed=DeepSpeedConfig(stage=0 if self.engine == "plain" else self.stage),
            parallel=ParallelConfig(
                ranks=self.ranks,
                sequence=self.sequence,
                exchange=ExchangeKind[self.exchange],
                timeout_s=60,
            ),
            checkpoint=CheckpointConfig(resume=False),
        )


# -- steps -------------------------------------------------------------------------------------
def steps(settings: Settings) -> dict[str, Any]:
    """Steps through the trainer as `evspan train` does, then saves a checkpoint."""
    from evspan.conf.errors import ConfigError
    from evspan.pipeline.benchmark.peaks import device_peak
    from evspan.pipeline.benchmark.step import measure_steps
    from evspan.pipeline.engine.trainer import Trainer
    from evspan.pipeline.parallel.world import open_world

    config = settings.train_config()
    with open_world(config.parallel) as world:
        trainer = Trainer(config, world)
        try:
            measured = measure_steps(trainer, steps=settings.steps, seconds=60)
            runner = _Steps(trainer)
            runner.step()
            (loss,) = runner.losses()
            trainer._save()
            trainer._end_save()
        finally:
            trainer.close()
    result = {
        "ms": measured.step.median,
        "host_ms": measured.host_ms,
        "frames_per_s": measured.frames_per_s,
        "gib": measured.peak_bytes / 2**30,
        "loss": loss,
        "finite": math.isfinite(loss),
        **measure.row_values(measured.operations),
    }
    for name, spread in measured.parts.items():
        result[name.replace(" ", "_").replace(",", "") + "_ms"] = spread.median
    if settings.cuda_graphs:
        from torch._dynamo.utils import counters

        result["graphs_left_out"] = counters["inductor"]["cudagraph_skips"]
    if world.device.type == "cuda":
        try:
            peak = device_peak(world.device, Precision[settings.precision])
            result["mfu"] = measured.flops_per_s / peak.flops
        except ConfigError:
            result["mfu"] = -1.0
    return result


# -- two ranks on one device -------------------------------------------------------------------
def pair(settings: Settings) -> dict[str, Any]:
    """Losses of a few steps of one of two ranks that share a device; gloo connects them."""
    from evspan.pipeline.engine.trainer import Trainer
    from evspan.pipeline.parallel.world import World
    from support.plain_engine import PlainEngine

    class EngineOnDevice(PlainEngine):
        def __init__(self, model, config, world, *, lanes):
            super().__init__(model.to(world.device), config, world, lanes=lanes)

    device = torch.device(settings.device)
    dist.init_process_group("gloo", rank=settings.rank, world_size=settings.ranks)
    if device.type == "cuda" and settings.exchange == "relay":
        _stage_messages()
    world = World(settings.rank, settings.ranks, settings.rank, settings.ranks, device)
    trainer = Trainer(settings.train_config(), world, EngineOnDevice)
    runner = _Steps(trainer)
    for _ in range(settings.steps):
        runner.step()
    losses = runner.losses()
    trainer.close()
    dist.barrier()
    return {"losses": losses}


def _stage_messages() -> None:
    """Sends messages through the CPU: gloo has no point-to-point operations for GPU tensors."""
    send = dist.isend
    receive = dist.irecv

    class Received:
        def __init__(self, work, buffer, target):
            self.work = work
            self.buffer = buffer
            self.target = target

        def wait(self):
            self.work.wait()
            self.target.copy_(self.buffer)

    def isend(tensor, to, group=None):
        return send(tensor.cpu(), to, group=group)

    def irecv(tensor, sender, group=None):
        buffer = torch.empty_like(tensor, device="cpu")
        return Received(receive(buffer, sender, group=group), buffer, tensor)

    dist.isend = isend
    dist.irecv = irecv


class _Steps:
    """Steps of a trainer without its logging, evaluations and checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        device = trainer.world.device
        loaded = trainer.loader.batches(0, encoded=encodes_for(device))
        self.batches = device_batches(loaded, device)
        self.reports: list[Any] = []

    def step(self) -> None:
        """One step; its loss stays on the device."""
        self.reports.append(self.trainer.micro_batch(next(self.batches)))

    def losses(self) -> list[float]:
        """The losses of all steps so far."""
        return [report.losses.total for report in self.reports]


# -- learning ----------------------------------------------------------------------------------
def learn(settings: Settings) -> dict[str, Any]:
    """Trains for about `seconds`, or `steps` steps, and evaluates."""
    from evspan.pipeline.engine.trainer import train
    from evspan.pipeline.parallel.world import open_world

    config = settings.train_config()
    config.model.backbone.ls_init_value = 1.0
    config.optimizer = OptimizerConfig(lr=2e-3, warmup_fraction=0.05)
    config.training.augmentation.zoom_prob = 0.3
    config.training.sampling = Sampling.mixed
    config.training.log_images_every = 100
    config.evaluation = EvaluationConfig(write_detections=False)
    with open_world(config.parallel) as world:
        max_steps = settings.steps
        if settings.seconds:
            max_steps = max(20, int(settings.seconds / _step_seconds(config, world)))
            # The loader's own speed is not in these steps: batches were waiting.
            config.training.max_hours = settings.seconds / 3600
            config.training.log_every = 50
        config.training.max_steps = max_steps
        config.checkpoint.every = max_steps
        started = time.perf_counter()
        metrics = train(config, world)
        seconds = time.perf_counter() - started
    return {
        "ap": metrics.ap,
        "ap50": metrics.ap50,
        "steps": max_steps,
        "train_and_evaluate_s": seconds,
    }


def _step_seconds(config: TrainConfig, world: Any) -> float:
    """Median time of a step, of a trainer that is thrown away."""
    from evspan.pipeline.engine.trainer import Trainer

    trainer = Trainer(replace(config, run_dir=f"{config.run_dir}-trial"), world)
    runner = _Steps(trainer)
    seconds = measure.seconds(runner.step, world.device, repeats=5, warm_up=3)
    trainer.close()
    trainer.engine.close()
    return seconds


def main() -> None:
    """Runs the command."""
    kind = {"steps": steps, "pair": pair, "learn": learn}[sys.argv[1]]
    settings = Settings(**json.loads(sys.argv[2]))
    Path(settings.run_dir).mkdir(parents=True, exist_ok=True)
    print(RESULT + json.dumps(kind(settings)), flush=True)
    os._exit(0)  # profilers, graphs and threads of the loader may fail or hang at a normal exit


if __name__ == "__main__":
    main()
