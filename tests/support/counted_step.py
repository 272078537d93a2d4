"""A training step of the real trainer on an emulated GPU, and what it asks of the device."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.schema.layout import BatchNormRanks, ExchangeKind
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    EngineKind,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    Sampling,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from support.emulated_deepspeed import deepspeed_on_emulated_gpu
from support.emulated_device import Counts, Emulation, emulated_gpu
from support.small_shards import write_small_shards

WARM_UP_STEPS = 2  # the first two steps are reported
RECORDING_FRAMES = 96
FULL_DENSITY = 0.018  # events per value: 83 kB per frame, as the recordings at hand have


@dataclass(frozen=True)
class Size:
    """Of a detector."""

    embed_dim: int
    dim_head: int
    depth: float


SIZES = {
    "micro": Size(16, 8, 0.33),
    "tiny": Size(32, 32, 0.33),
    "small": Size(48, 24, 0.33),
    "base": Size(64, 32, 0.67),
}


@dataclass(frozen=True)
class StepOptions:
    """A layout, a model and a batch.

    Attributes:
        sequence: ranks per sequence.
        exchange: auto, transpose or relay; relay takes the depthwise convolution, if `dws_conv`.
        batch_norm: parallel.batch_norm.
        engine: training.engine. zero: stage of DeepSpeed.
        lanes, frames: of one rank.
        full_frames: 360 x 640 pixels and 10 bins instead of the 60 x 100 and 2 of the tests.
        values: see `emulated_gpu`.
    """

    world: int = 1
    rank: int = 0
    sequence: int = 1
    exchange: str = "auto"
    batch_norm: str = "world"
    dws_conv: bool = False
    attention: bool = False
    precision: str = "fp32"
    engine: str = "deepspeed"
    zero: int = 1
    size: str = "micro"
    lanes: int = 2
    frames: int = 4
    full_frames: bool = False
    values: bool = True


def write_shards(folder: Path, options: StepOptions) -> Path:
    """A dataset with the frame size of the options."""
    counts = {"train": [RECORDING_FRAMES] * 2}
    if not options.full_frames:
        return write_small_shards(folder, counts)
    return write_small_shards(folder, counts, height=360, width=640, bins=10, density=FULL_DENSITY)


def train_config(options: StepOptions, shards: Path, run_dir: Path) -> TrainConfig:
    """The config of a run with these options."""
    size = SIZES[options.size]
    groups = options.world // options.sequence
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            backbone=BackboneConfig(
                embed_dim=size.embed_dim, dim_head=size.dim_head, dws_conv=options.dws_conv
            ),
            fpn=FpnConfig(depth=size.depth, enable_small_object_attention=options.attention),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            max_steps=100,
            batch_size=options.lanes * groups,
            sequence_length=options.frames * options.sequence,
            precision=Precision[options.precision],
            engine=EngineKind[options.engine],
            sampling=Sampling.random,
            num_workers=0,
            log_every=50,
            evaluate_every=0,
            log_images_every=0,
        ),
        deepspeed=DeepSpeedConfig(stage=options.zero),
        parallel=ParallelConfig(
            ranks=options.world,
            sequence=options.sequence,
            exchange=ExchangeKind[options.exchange],
            batch_norm=BatchNormRanks[options.batch_norm],
        ),
        checkpoint=CheckpointConfig(resume=False),
    )


def set_launcher_variables(*, rank: int, world: int) -> None:
    """torchrun's, which DeepSpeed reads."""
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = "0"
    os.environ["WORLD_SIZE"] = str(world)


@contextmanager
def open_trainer(
    options: StepOptions, shards: Path, run_dir: Path
) -> Iterator[tuple[Emulation, Trainer]]:
    """The trainer of one rank on an emulated GPU."""
    gc.collect()  # an engine of before would otherwise be destroyed during a counted step, and wait
    set_launcher_variables(rank=options.rank, world=options.world)
    emulation = emulated_gpu(world=options.world, rank=options.rank, values=options.values)
    with emulation as gpu, deepspeed_on_emulated_gpu():
        config = train_config(options, shards, run_dir)
        trainer = Trainer(config, gpu.world)
        try:
            yield gpu, trainer
        finally:
            trainer.close()


class _CountedError(Exception):
    """The counted step is over."""


class _StepCounter:
    """In the place of the trainer's profiler, which is called at the start of each step."""

    def __init__(self, gpu: Emulation) -> None:
        self.gpu = gpu
        self.counts = Counts()

    def before(self, step: int) -> None:
        """Counts the step after the warm-up, and ends the run after it."""
        self.gpu.next_step()
        if step == WARM_UP_STEPS + 1:
            self.gpu.counts = self.counts
        elif step > WARM_UP_STEPS + 1:
            self.gpu.counts = None
            raise _CountedError

    def after(self) -> None:
        """The step's work is queued; what the trainer does until the next one counts, too."""

    def close(self) -> None:
        """Nothing is open."""


def step_counts(options: StepOptions, shards: Path, run_dir: Path) -> Counts:
    """Counts the third step of a run, from its start to that of the fourth."""
    with open_trainer(options, shards, run_dir) as (gpu, trainer):
        counter = _StepCounter(gpu)
        trainer.profiler = counter
        with suppress(_CountedError):
            trainer.run(StopFlag())
        return counter.counts
