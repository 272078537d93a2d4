"""A rank of tests/pipeline/test_slow_ranks.py: trains with others, one of which is slowed down.

python -m slow_rank_ranks SHARDS RUN SLOW_RANK PART    with torchrun's variables
"""

import sys
import time
from pathlib import Path

from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.launch.logging_config import configure_logging
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.parallel.world import open_world

RANKS = 3
STEPS = 12
DELAY_S = 0.5


def config_of(shards: str, run_dir: str) -> TrainConfig:
    """A lane for each rank."""
    config = TrainConfig(
        run_dir=run_dir,
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=16, dim_head=8),
            fpn=FpnConfig(depth=0.33),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=shards),
        training=TrainingConfig(
            max_steps=STEPS,
            batch_size=RANKS,
            sequence_length=4,
            num_workers=0,
            log_every=2,
            evaluate_every=0,
            log_images_every=0,
            slow_rank_steps=6,
        ),
        parallel=ParallelConfig(ranks=RANKS, threads=1, timeout_s=120),
        checkpoint=CheckpointConfig(every=STEPS),
    )
    config.evaluation.at_end = False
    return config


def slow_down(trainer: Trainer, part: str) -> None:
    """Makes each step of this rank take longer in one part, as a slow device or file system does."""
    head = trainer.engine.module.yolox_head
    if part == "forward":
        head.register_forward_pre_hook(lambda *_: time.sleep(DELAY_S))
    else:
        head.register_full_backward_pre_hook(lambda *_: time.sleep(DELAY_S))


def main(shards: str, run_dir: str, slow_rank: str, part: str) -> None:
    """Trains."""
    config = config_of(shards, run_dir)
    with open_world(config.parallel, run=run_dir) as world:
        configure_logging(world.rank, log_file=True)
        trainer = Trainer(config, world)
        if world.rank == int(slow_rank):
            slow_down(trainer, part)
        trainer.run(StopFlag())
        trainer.close()


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    main(*sys.argv[1:])
