"""A rank as a process that starts within milliseconds, for tests that kill it."""

import os
from pathlib import Path

from evspan.conf.schema.training import TrainConfig


def be_rank(rank: int, port: int, config: TrainConfig, log: Path) -> None:
    """Trains as rank `rank`; its output goes to `log`."""
    from evspan.launch.cli.command import run_command
    from evspan.launch.local.rank import train_rank

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(config.parallel.ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        LOCAL_WORLD_SIZE=str(config.parallel.ranks),
        MASTER_PORT=str(port),
    )
    run_command(lambda: train_rank(config))
