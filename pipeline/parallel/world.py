"""Who this process is among the ranks, and the process group that joins them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data_prep.errors import ConfigError
from pipeline.config import ParallelConfig


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`; the `local`-th on its machine. Data parallel: a rank owns a run of the world's lanes."""

    rank: int
    size: int
    local: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def lanes(self, batch_size: int) -> range:
        """This rank's share of `batch_size` lanes. Raises ConfigError when they do not divide."""
        if batch_size % self.size:
            raise ConfigError(f"training.batch_size is {batch_size} lanes, which {self.size} ranks cannot share equally; "
                              f"set training.batch_size={-(-batch_size // self.size) * self.size}")
        per_rank = batch_size // self.size
        return range(self.rank * per_rank, (self.rank + 1) * per_rank)


def _place() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local size) from torchrun's variables, else SLURM's, else alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return (int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1)))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        per_node = env.get("SLURM_NTASKS_PER_NODE", env["SLURM_NTASKS"])
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]), int(per_node)
    return 0, 1, 0, 1


@contextmanager
def open_world(config: ParallelConfig) -> Iterator[World]:
    """Join the process group (NCCL on GPUs, gloo otherwise) and leave it on every way out.

    Raises:
        ConfigError: the launcher started another number of ranks than the config asks for.
    """
    rank, size, local, local_size = _place()
    if size != config.ranks:
        raise ConfigError(f"parallel.ranks is {config.ranks} but {size} process{'es were' if size > 1 else ' was'} started; "
                          "use `evspan train`, which starts them, or set parallel.ranks to what the launcher starts")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.threads or max(1, cores // local_size))
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them, with one rank too
    if size == 1:
        store: dist.Store | None = dist.HashStore()  # alone: no port to collide with another run's
    else:
        store = None
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size, store=store,
                            init_method=None if store else "env://", timeout=timedelta(seconds=config.timeout_s))
    try:
        yield World(rank, size, local, local_size, device)
    finally:
        dist.destroy_process_group()
