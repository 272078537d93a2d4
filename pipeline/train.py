"""`evspan train`, one rank of it: Hydra in, plain Python from there."""

import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from data_prep.command import run_command
from pipeline.config import TrainConfig

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
def _train(raw: DictConfig) -> None:
    config: TrainConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]  # __post_init__ checks run here
    from pipeline.engine.trainer import train  # after the checks: DeepSpeed takes seconds to import
    from pipeline.parallel.world import open_world

    with open_world(config.parallel) as world:
        train(config, world)


def main(argv: list[str] | None = None) -> None:
    """torchrun --nproc-per-node 2 -m pipeline.train parallel.ranks=2 dataset.root=SHARDS run_dir=RUN"""
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    run_command(_train)


if __name__ == "__main__":
    main()
