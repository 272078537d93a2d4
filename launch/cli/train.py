"""`evspan train`, one rank of it: Hydra in, plain Python from there."""

import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from evspan.conf.errors import require
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import hydra_task, run_hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ConfigStore.instance().store(name="train_schema", node=TrainConfig)

HELP = """evspan train: shards -> a trained detector, its checkpoints and TensorBoard curves

  evspan train dataset.root=SHARDS run_dir=RUN [experiment=NAME] [key=value ...]
      SHARDS is what `evspan prep` wrote. Run again, the same command continues from the newest checkpoint in RUN,
      on as many ranks, as large a parallel.sequence and whatever deepspeed.stage it says then.
      SIGTERM, SIGUSR1 and SIGUSR2 save at the next step and end with exit code 75.

  examples
      evspan train experiment=demo dataset.root=shards run_dir=runs/demo
      evspan train experiment=gen4/3scale_baseline dataset.root=/data/gen4 run_dir=runs/tiny parallel.ranks=4 training.batch_size=24

  choices (each a file in conf/GROUP/)
      experiment=null            demo | gen4/{small,base} | gen4/{3scale_baseline,3scale_sizeaware,
                                 3scale_sizeaware_attention,4scale_sizeaware_attention} |
                                 {gen4,etram}/{rvt_tiny,rvt_small,rvt_base}, RVT's published values, which were not run
                                 here; rvt: these for another dataset or size
      model=maxvit_yolox/default     also maxvit_yolox/size_aware, maxvit_yolox/size_aware_attention
      size=tiny                  micro | tiny | small | base
      dataset=simulated          simulated | gen4 | etram | etram3 | gen4_rvt | rvt_tree
      deepspeed=zero1            zero0 | zero1 | zero2 | zero3

  keys
      training.max_steps=100000  optimizer updates
      training.batch_size=8      lanes (recordings side by side) over all ranks
      training.sequence_length=5     frames a chunk, which gradients flow through
      training.sampling=mixed    stream | random | mixed
      training.precision=fp32    fp32 | bf16 | fp16
      training.log_images_every=1000   steps between pictures and histograms; 0: never
      training.profile=[]        [first,last] steps to trace into run_dir/profile
      training.evaluate_every=10000  steps between evaluations; 0: at the end only
      optimizer.lr=0.001         at its peak
      checkpoint.every=1000      steps
      checkpoint.resume=true     false: start anew
      checkpoint.init_from=      weights to start from: a run folder, a checkpoint or a .safetensors file
      parallel.ranks=1           processes, one per GPU (or several on CPU cores); started here unless a launcher did
      seed=0

  evspan train --cfg job ...       shows the config that these arguments make; conf/schema/training.py explains every key
  evspan train --hydra-help        how overrides work
"""


def train_here(config: TrainConfig) -> None:
    """Train as the rank that this process is."""
    from evspan.pipeline.engine.trainer import train  # DeepSpeed takes seconds to import
    from evspan.pipeline.parallel.world import open_world

    with open_world(config.parallel) as world:
        train(config, world)


def check(config: TrainConfig) -> None:
    """Raises UserError for what can be known to fail before any rank starts."""
    from evspan.pipeline.data.datasets import open_dataset

    run_dir, init_from = Path(config.run_dir), config.checkpoint.init_from
    require(
        not run_dir.exists() or run_dir.is_dir(),
        f"run_dir is {run_dir}, which is a file; name a folder: run_dir=runs/NAME",
    )
    require(
        not init_from or Path(init_from).exists(),
        f"checkpoint.init_from is {init_from}, where there is nothing; name a run folder, a checkpoint or a weights file",
    )
    open_dataset(config.dataset, "train")
    open_dataset(
        config.dataset, config.evaluation.split
    )  # read when training is done, which may be days later


def main(argv: list[str] | None = None, run: Callable[[TrainConfig], object] = train_here) -> None:
    """torchrun --nproc-per-node 2 -m evspan.launch.cli.train parallel.ranks=2 dataset.root=SHARDS run_dir=RUN

    run: called with the checked config.
    """

    @hydra.main(version_base="1.3", config_path="pkg://evspan.conf", config_name="train")
    @hydra_task
    def task(raw: DictConfig) -> None:
        run(OmegaConf.to_object(raw))  # type: ignore[arg-type]  # __post_init__ checks run here

    run_hydra(task, sys.argv[1:] if argv is None else argv, prog="evspan train", help=HELP)


if __name__ == "__main__":
    main()
