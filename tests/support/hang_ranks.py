"""Ranks that hang in a chosen way: a child process that runs small steps of named collectives, and training.

They are forked by a server that has imported torch, so a test starts them within milliseconds.
"""

import os
import signal
import time
from pathlib import Path

RANKS = 3
TIMEOUT_S = 8
STEP = 5  # in which rank 1 misbehaves
SIZE = 1000  # of the gradients


def _connect(rank: int, ranks: int, port: int, log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )


def be_rank(rank: int, port: int, run: Path, kind: str) -> None:
    """Steps of three collectives. In the step STEP, rank 1 does what `kind` says."""
    from evspan.launch.cli.command import run_command

    _connect(rank, RANKS, port, run.with_name(f"{run.name}-{rank}.log"))
    run_command(lambda: _steps(rank, run, kind))


def _steps(rank: int, run: Path, kind: str) -> None:
    import torch
    from evspan.conf.schema.training import ParallelConfig
    from evspan.pipeline.parallel.flight_recorder import set_phase
    from evspan.pipeline.parallel.reductions import broadcast_json, sum_over_ranks
    from evspan.pipeline.parallel.world import open_world

    parallel = ParallelConfig(ranks=RANKS, timeout_s=TIMEOUT_S, threads=1)
    with open_world(parallel, run=run) as world:
        assert world.hang is not None
        world.hang.start()
        for step in range(2 * STEP):
            odd = kind if rank == 1 and step == STEP else ""
            set_phase("forward")
            sum_over_ranks(torch.ones(10), name="BatchNorm statistics")
            if odd != "skip":
                sum_over_ranks(torch.ones(20), name="sums of the loss")
            set_phase("optimizer step")
            if odd in ("SIGSTOP", "SIGKILL"):
                os.kill(os.getpid(), getattr(signal, odd))
            if odd == "sleep":
                set_phase("evaluating")
                time.sleep(600)
            size = SIZE - 1 if odd == "sizes" else SIZE
            sum_over_ranks(torch.ones(size), name="gradients")
            broadcast_json({"step": step}, name="metrics")


def be_trainer(rank: int, port: int, config_file: Path, place: str) -> None:
    """Trains as one of two ranks. Rank 1 stops itself when it comes to the function `place`.

    place: module:function:calls, the number of calls before.
    """
    from evspan.conf.compose import load_config
    from evspan.conf.schema.training import TrainConfig
    from evspan.launch.cli.command import run_command
    from evspan.launch.local.rank import train_rank

    config = load_config(TrainConfig, config_file)
    _connect(rank, 2, port, config_file.with_name(f"{config_file.stem}-{rank}.log"))
    if rank == 1:
        _stop_at(place)
    run_command(lambda: train_rank(config))


def _stop_at(place: str) -> None:
    import importlib

    module_name, path, calls = place.split(":")
    owner = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    real = getattr(owner, name)
    left = [int(calls)]

    def function(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **kwargs)

    setattr(owner, name, function)
