"""Who this process is among the ranks, and the process group that joins them."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import ParallelConfig
from evspan.pipeline.parallel.heartbeat import named_peers
from evspan.pipeline.parallel.rank_env import check_address, place


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`; the `local`-th on its machine. Which lanes and frames it works on is the mesh's affair."""

    rank: int
    size: int
    local: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step: touching pages anew took a tenth of it.

    Blocks above 32 MB go back all the same, the library has no higher limit.
    """
    if (
        mallopt := getattr(ctypes.CDLL(None), "mallopt", None)
    ) is not None:  # glibc has it, others do not
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


@contextmanager
def open_world(config: ParallelConfig) -> Iterator[World]:
    """Join the process group (NCCL on GPUs, gloo otherwise) and leave it on every way out.

    Raises:
        ConfigError: the launcher started another number of ranks than the config asks for, or rank 0's machine has no address.
    """
    rank, size, local, local_size, address, port = place(os.environ)
    if size != config.ranks:
        raise ConfigError(
            f"parallel.ranks is {config.ranks} but {size} process{'es were' if size > 1 else ' was'} started; "
            "use `evspan train`, which starts them, or set parallel.ranks to what the launcher starts"
        )
    if size > 1:
        check_address(address)
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.threads or max(1, cores // local_size))
    told = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "MASTER_ADDR": address,
        "MASTER_PORT": port or None,
    }
    for name, value in told.items():
        if value is not None:
            os.environ.setdefault(name, str(value))  # DeepSpeed reads them, with one rank too
    if size == 1:
        store: dist.Store | None = dist.HashStore()  # alone: no port to collide with another run's
    else:
        store = None
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=size,
        store=store,
        init_method=None if store else "env://",
        timeout=timedelta(seconds=config.timeout_s),
    )
    try:
        with named_peers(rank, size, address, port, timeout_s=config.timeout_s):
            yield World(rank, size, local, local_size, device)
    finally:
        dist.destroy_process_group()
