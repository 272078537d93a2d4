"""`evspan train` and `evspan evaluate`: in this process, or in as many ranks on this machine as the config asks for."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from evspan.conf.errors import UserError
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.launch.local.ranks import run_ranks

Config = TypeVar("Config", TrainConfig, EvaluateConfig)


def train(argv: list[str]) -> None:
    from evspan.launch.cli.train import check, main, train_here

    many = bool({"-m", "--multirun"} & set(argv))
    if many and any(word.startswith("hydra/launcher=") for word in argv):
        from evspan.launch.slurm.hydra_plugin import register

        register()

    def run(config: TrainConfig) -> None:
        from evspan.conf.compose import this_of_many

        _start(
            "evspan.launch.cli.train",
            this_of_many(config) if many else argv,
            config,
            check,
            train_here,
            one_of_many=many,
            after=f"The same command continues from the newest checkpoint in {config.run_dir}, if there is one",
        )

    main(argv, run)


def evaluate(argv: list[str]) -> None:
    from evspan.launch.cli.evaluate import check, evaluate_here, main

    main(
        argv,
        lambda config: _start(
            "evspan.launch.cli.evaluate",
            argv,
            config,
            check,
            evaluate_here,
            after="Run the same command again",
        ),
    )


def under_launcher() -> bool:
    """torchrun, or a SLURM step of several tasks, has started the ranks; this process is one of them."""
    env = os.environ
    # A batch script has a number of tasks, too, but is not a step: what it starts is no rank.
    return {"RANK", "WORLD_SIZE"} <= env.keys() or (
        "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1
    )


def _start(
    module: str,
    argv: list[str],
    config: Config,
    check: Callable[[Config], None],
    here: Callable[[Config], None],
    *,
    after: str,
    one_of_many: bool = False,
) -> None:
    if under_launcher():
        here(config)
        return
    ranks = config.parallel.ranks
    if ranks > 1 and {"-m", "--multirun"} & set(argv):
        raise UserError(
            f"--multirun cannot evaluate by several ranks (parallel.ranks={ranks}); give each a command of its own"
        )
    check(config)
    if ranks == 1 and not one_of_many:  # DeepSpeed begins only once in a process
        here(config)
    elif code := run_ranks(
        [sys.executable, "-m", module, *argv], ranks, threads=config.parallel.threads, after=after
    ):
        sys.exit(code)
