"""`evspan train` and `evspan evaluate`: in this process, or in as many ranks on this machine as the config asks for."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from data_prep.errors import UserError
from launch.ranks import run_ranks
from pipeline.config import EvaluateConfig, TrainConfig

Config = TypeVar("Config", TrainConfig, EvaluateConfig)


def train(argv: list[str]) -> None:
    from pipeline.train import check, main, train_here

    def run(config: TrainConfig) -> None:
        _start("pipeline.train", argv, config, check, train_here,
               after=f"The same command continues from the newest checkpoint in {config.run_dir}, if there is one")

    main(argv, run)


def evaluate(argv: list[str]) -> None:
    from pipeline.evaluate import check, evaluate_here, main

    main(argv, lambda config: _start("pipeline.evaluate", argv, config, check, evaluate_here, after="Run the same command again"))


def under_launcher() -> bool:
    """torchrun, or a SLURM step of several tasks, has started the ranks; this process is one of them."""
    env = os.environ
    return {"RANK", "WORLD_SIZE"} <= env.keys() or ("SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1)


def _start(module: str, argv: list[str], config: Config, check: Callable[[Config], None], here: Callable[[Config], None], *,
           after: str) -> None:
    if under_launcher():
        here(config)
        return
    alone = config.parallel.ranks == 1
    if not alone and {"-m", "--multirun"} & set(argv):
        raise UserError(f"--multirun cannot start runs of several ranks (parallel.ranks={config.parallel.ranks}); "
                        "give each run a command of its own")
    check(config)
    if alone:
        here(config)
        return
    command = [sys.executable, "-m", module, *argv]
    sys.exit(run_ranks(command, config.parallel.ranks, threads=config.parallel.threads, after=after))
