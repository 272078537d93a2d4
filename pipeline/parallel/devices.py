"""The device of each rank: one GPU of its own, or the CPU for all ranks."""

import json
import os
import re
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from evspan.conf.errors import DeviceError, LostRanksError
from evspan.conf.schema.training import DeviceKind
from evspan.conf.text import plural
from evspan.pipeline.parallel.gpus import (
    VISIBLE_DEVICES,
    driver_version,
    gpu_files,
    gpus_hidden,
)
from evspan.pipeline.parallel.rank_env import RankInfo
from evspan.pipeline.parallel.run_secret import RunSecret

USE_CPU = f"use the CPU: parallel.device=cpu, or {VISIBLE_DEVICES}= (empty)"
# Both variables configure torch's allocator. torch 2.9 ignores the new name for this option, and
# from 2.11 on warns about neither of the two, but prefers the new one.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
NEW_ALLOCATOR_VARIABLE_SINCE = (2, 11)
# With `device_id`, NCCL hangs at random in these releases (pytorch issue 153960).
HANGS_WITH_DEVICE_ID = ((2, 6, 1), (2, 7, 0))  # first and last one
NOTES_S = 5.0  # for the others to read an error, before rank 0 ends and its store with it


# -- before torch uses CUDA ------------------------------------------------------------------------
def set_cuda_variables(kind: DeviceKind) -> None:
    """Sets the environment variables that CUDA and torch read when they first use a GPU.

    GPUs are hidden if the ranks compute on the CPU: DeepSpeed, too, uses what it finds. Otherwise
    the allocator gets segments that grow, so that batches of different sizes do not fragment the
    memory, unless the user has configured it.
    """
    if kind is DeviceKind.cpu:
        os.environ[VISIBLE_DEVICES] = ""
    elif not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        new = torch_release() >= NEW_ALLOCATOR_VARIABLE_SINCE
        name = ALLOCATOR_VARIABLES[0 if new else 1]
        os.environ[name] = "expandable_segments:True"


def torch_release() -> tuple[int, ...]:
    """The numbers of torch's version: (2, 13, 0) for '2.13.0+cu130'."""
    release = re.match(r"[\d.]*\d", torch.__version__)
    assert release
    return tuple(int(number) for number in release[0].split("."))


def nccl_device_id(device: torch.device, ranks: int) -> torch.device | None:
    """The argument `device_id` of `init_process_group`: connects the ranks at once, by this GPU.

    None where it does not apply, or where torch's release hangs with it.
    """
    first, last = HANGS_WITH_DEVICE_ID
    if device.type != "cuda" or ranks == 1 or first <= torch_release()[:3] <= last:
        return None
    return device


# -- this rank -------------------------------------------------------------------------------------
def choose_device(kind: DeviceKind, local_rank: int, env: Mapping[str, str]) -> torch.device:
    """The device of local rank `local_rank`.

    A launcher that gives each task GPUs of its own lets it see only these: with one, the index is 0
    for each local rank. `check_devices` compares the ranks.

    Raises:
        DeviceError: the machine has GPUs, and torch cannot use them; or it has none, and
            parallel.device=gpu.
    """
    if kind is DeviceKind.cpu:
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below has its reason
        available = torch.cuda.is_available()
    if available:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    files = [] if gpus_hidden(env) else gpu_files()
    if files:
        raise DeviceError(_unusable_gpus(len(files), env))
    if kind is DeviceKind.gpu:
        raise DeviceError(_missing_gpus(env))
    return torch.device("cpu")


def _unusable_gpus(count: int, env: Mapping[str, str]) -> str:
    """Why torch cannot use the GPUs of this machine, and the remedy."""
    driver = driver_version() or "unknown"
    machine = f"{socket.gethostname()} has {plural(count, 'GPU')} (driver {driver})"
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        cause = f"{build} is a build without CUDA"
        remedy = "install a build of torch for CUDA"
    else:
        visible = env.get(VISIBLE_DEVICES)
        cause = f"{build}, built for CUDA {torch.version.cuda}, cannot use them"
        if visible is not None:
            cause += f" with {VISIBLE_DEVICES}={visible}"
        reason = _cuda_error()
        if reason:
            cause += f" ({reason})"
        remedy = "update the driver, or install a build of torch for the driver's CUDA version"
    return f"{machine}, but {cause}; {remedy}, or {USE_CPU}"


def _cuda_error() -> str:
    """The first sentence of torch's own error; empty without one."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no annotation for it
    except Exception as error:
        return " ".join(str(error).split()).split(". ")[0]
    return ""


def _missing_gpus(env: Mapping[str, str]) -> str:
    message = f"parallel.device is gpu, but {socket.gethostname()} has none that this process sees"
    if gpus_hidden(env):
        message += f": {VISIBLE_DEVICES}={env[VISIBLE_DEVICES]} hides them; unset it"
    else:
        message += "; on SLURM, ask for them: cluster.gpus_per_node, or cluster=gpu_nodes"
    return message


# -- all ranks together ----------------------------------------------------------------------------
@dataclass(frozen=True)
class RankDevice:
    """What a rank reports about its device.

    Attributes:
        host: name of its machine.
        kind: 'cpu' or 'cuda'; empty if it has failed.
        gpu: UUID of its GPU, or of its part of one (MIG); empty for a CPU.
        error: why it cannot use its machine's GPUs.
    """

    host: str
    kind: str = ""
    gpu: str = ""
    error: str = ""


def join_devices(
    store: dist.Store, info: RankInfo, kind: DeviceKind, secret: RunSecret
) -> torch.device:
    """Chooses this rank's device and compares it with those of all other ranks. A collective.

    Args:
        store: of all ranks, below the run's prefix; not yet used by a process group.
        secret: of the run.

    Raises:
        DeviceError: on every rank, if one cannot use its GPU, if two share one, or if only some
            have one.
        LostRanksError: a report is not from a rank of this run.
    """
    host = socket.gethostname()
    device = torch.device("cpu")
    own_error: DeviceError | None = None
    try:
        device = choose_device(kind, info.local, os.environ)
        own = RankDevice(host, device.type, gpu_uuid(device))
    except DeviceError as error:
        own_error = error
        own = RankDevice(host, error=str(error))
    store = dist.PrefixStore("evspan/devices", store)
    keys = [str(rank) for rank in range(info.size)]
    store.set(keys[info.rank], secret.sign(keys[info.rank], json.dumps(asdict(own))))
    reports = store.multi_get(keys)
    devices = [_verified(secret, key, report) for key, report in zip(keys, reports, strict=True)]
    try:
        if own_error:
            raise own_error
        check_devices(devices)
    except DeviceError:
        _wait_for_readers(store, info)
        raise
    return device


def _verified(secret: RunSecret, key: str, report: bytes) -> RankDevice:
    """The device that rank `key` reports.

    Raises:
        LostRanksError: the report is not signed by a rank of this run, or damaged.
    """
    text = secret.verified(key, report)
    try:
        return RankDevice(**json.loads(text or ""))
    except (ValueError, TypeError, RecursionError) as error:
        raise LostRanksError(
            f"the report of rank {key} in rank 0's store is not from a rank of this run; run the "
            "same command again, on a port that no one else uses (MASTER_PORT)"
        ) from error


def gpu_uuid(device: torch.device) -> str:
    """Identifies a GPU among all machines; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_devices(devices: Sequence[RankDevice]) -> None:
    """Checks that all ranks have a GPU of their own, or none has one. devices: by rank.

    Raises:
        DeviceError: they do not.
    """
    failed = [device for device in devices if device.error]
    if failed:
        raise DeviceError(failed[0].error)
    gpus = [device.gpu for device in devices if device.kind == "cuda"]
    if not gpus:
        return
    if len(gpus) < len(devices):
        without = next(rank for rank, device in enumerate(devices) if device.kind != "cuda")
        raise DeviceError(
            f"{len(gpus)} of {len(devices)} ranks have a GPU, and rank {without} on "
            f"{devices[without].host} has none; use machines that all have GPUs, or {USE_CPU}"
        )
    distinct = len(set(gpus))
    if distinct < len(gpus):
        sharing = _first_sharing(gpus)
        names = " and ".join(str(rank) for rank in sharing)
        raise DeviceError(
            f"{len(devices)} ranks have {plural(distinct, 'GPU')}, and NCCL needs one for each: "
            f"ranks {names} would share one of {devices[sharing[0]].host}; set "
            f"parallel.ranks={distinct}, ask for more GPUs, or {USE_CPU}"
        )


def _first_sharing(gpus: Sequence[str]) -> tuple[int, int]:
    """The first two ranks with the same GPU."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu in first:
            return first[gpu], rank
        first[gpu] = rank
    raise ValueError("all GPUs are different")


def _wait_for_readers(store: dist.Store, info: RankInfo) -> None:
    """Rank 0, whose process may host the store, waits until the others have read all reports."""
    keys = [f"read-{rank}" for rank in range(info.size)]
    store.set(keys[info.rank], "")
    if info.rank == 0:
        try:
            store.wait(keys, timedelta(seconds=NOTES_S))
        except RuntimeError:  # dist.DistStoreError: one of them is gone already
            return
