"""This process's rank, and the process group of all ranks."""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import ParallelConfig
from evspan.pipeline.parallel.devices import (
    choose_device,
    join_devices,
    nccl_device_id,
    set_cuda_variables,
)
from evspan.pipeline.parallel.hang_watch import HangWatch, hang_watch
from evspan.pipeline.parallel.heartbeat import heartbeat
from evspan.pipeline.parallel.rank_env import (
    TORCHRUN,
    RankInfo,
    check_address,
    check_interfaces,
    rank_info,
    started_as_rank,
)
from evspan.pipeline.parallel.rank_exit import group_is_open
from evspan.pipeline.parallel.rendezvous import joining, rendezvous
from evspan.pipeline.parallel.run_secret import RunSecret, shared_secret


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`, number `local` of `local_size` on its machine.

    The mesh decides which lanes and frames it works on.

    hang: reports what this rank does if the run hangs; None without a run's folder.
    timeout_s: seconds after which a collective that waits ends the run.
    """

    rank: int
    size: int
    local: int
    local_size: int
    device: torch.device
    hang: HangWatch | None = None
    timeout_s: float = 600.0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def keep_freed_memory() -> None:
    """Makes the C library keep what a step frees for the next step.

    Mapping pages again took a tenth of a step. Blocks above 32 MB, the library's highest threshold,
    are returned in any case.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc has it, other C libraries do not
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def cores_of_rank(env: Mapping[str, str], local_size: int, usable: int) -> int:
    """The cores that this rank computes on.

    In a SLURM step of several tasks these are SLURM_CPUS_PER_TASK, whether the step binds a task to
    its cores (`usable` are then this rank's own) or not (they are the node's or the job's). A step
    that gives its tasks fewer cores than its job's variable says binds each task to fewer.

    Elsewhere, and without the variable, the ranks of the machine divide the cores.

    Args:
        local_size: ranks on this machine.
        usable: cores in this process's affinity mask.
    """
    is_slurm_task = started_as_rank(env) and not all(name in env for name in TORCHRUN)
    per_task = env.get("SLURM_CPUS_PER_TASK", "")
    if is_slurm_task and per_task.isdecimal() and int(per_task) > 0:
        return min(int(per_task), usable)
    return max(1, usable // local_size)


@contextmanager
def open_world(config: ParallelConfig, *, run: str | Path | None = None) -> Iterator[World]:
    """Joins the process group (NCCL on GPUs, gloo otherwise), and leaves it when all ranks do.

    After an error the group stays open where there are other ranks: NCCL would wait for their
    collectives. The process should then end at once (`evspan.pipeline.parallel.rank_exit`), and the
    others end because of this rank's heartbeat.

    Args:
        run: the run's folder, by which ranks that no launcher of ours started get their common
            secret (`evspan.pipeline.parallel.run_secret`), and for reports if the run hangs.

    Raises:
        ConfigError: the launcher started another number of ranks than the config has, or the name
            of rank 0's machine cannot be resolved.
        DeviceError: a machine's GPUs cannot be used, or two ranks would share one.
        LostRanksError: other ranks did not start, or are gone, stuck or failed.
    """
    info = rank_info(os.environ)
    if info.size != config.ranks:
        processes = "1 process was" if info.size == 1 else f"{info.size} processes were"
        raise ConfigError(
            f"parallel.ranks is {config.ranks} but {processes} started; use `evspan train`, which "
            "starts them, or set parallel.ranks to what the launcher starts"
        )
    if info.size > 1:
        check_address(info.address)
    set_cuda_variables(config.device)
    cores = cores_of_rank(os.environ, info.local_size, len(os.sched_getaffinity(0)))
    torch.set_num_threads(config.threads or cores)  # the loader's threads follow from it
    folder = Path(run) if run else None
    with _launcher_variables(info), hang_watch(folder, info, config.timeout_s) as hang:
        device, secret = _join_group(config, info, folder)
        try:
            with heartbeat(info, secret, timeout_s=config.timeout_s, hang=hang):
                yield World(
                    info.rank,
                    info.size,
                    info.local,
                    info.local_size,
                    device,
                    hang,
                    config.timeout_s,
                )
        finally:
            if not group_is_open():
                dist.destroy_process_group()


def _join_group(
    config: ParallelConfig, info: RankInfo, run: Path | None
) -> tuple[torch.device, RunSecret]:
    """Joins the process group.

    Returns:
        This rank's device, selected as the current one, and the run's secret.
    """
    timeout = timedelta(seconds=config.timeout_s)
    store: dist.Store
    if info.size == 1:
        secret = RunSecret()
        store = dist.HashStore()  # no port that another run could use
        device = choose_device(config.device, info.local, os.environ)
    else:
        with joining(info, config.timeout_s) as limit:
            shared = rendezvous(info, limit)
            with shared_secret(shared, info.rank, run) as secret:
                store = dist.PrefixStore(secret.prefix, shared)
                device = join_devices(store, info, config.device, secret)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if info.size > 1:
            check_interfaces(os.environ)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=info.rank,
        world_size=info.size,
        store=dist.PrefixStore("default_pg", store),
        timeout=timeout,
        device_id=nccl_device_id(device, info.size),
    )
    return device, secret


@contextmanager
def _launcher_variables(info: RankInfo) -> Iterator[None]:
    """Sets torchrun's variables where they are missing: DeepSpeed reads them, with one rank too.

    They are removed at the end: a process that is started later is no rank of this world.
    """
    variables = {
        "RANK": info.rank,
        "WORLD_SIZE": info.size,
        "LOCAL_RANK": info.local,
        "MASTER_ADDR": info.address,
    }
    if info.port:
        variables["MASTER_PORT"] = info.port
    missing = [name for name in variables if name not in os.environ]
    for name in missing:
        os.environ[name] = str(variables[name])
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
