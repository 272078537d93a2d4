"""The device of each rank, on machines with GPUs that are emulated: torch.cuda's answers and the driver's files."""

import math
import os
import re
import socket
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from evspan.conf.errors import DeviceError
from evspan.conf.schema.training import DeviceKind, ParallelConfig
from evspan.pipeline.engine.deepspeed_adapter import _set_local_rank
from evspan.pipeline.engine.resources import Resources
from evspan.pipeline.parallel import devices, gpus
from evspan.pipeline.parallel.devices import RankDevice, check_devices, choose_device
from evspan.pipeline.parallel.rank_env import RankInfo
from evspan.pipeline.parallel.run_secret import RunSecret
from evspan.pipeline.parallel.world import open_world

HOST = socket.gethostname()
AUTO, GPU, CPU = DeviceKind.auto, DeviceKind.gpu, DeviceKind.cpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that gives this machine GPUs: those with device files, and those that torch can use."""

    def set_gpus(files: int, usable: int, *, cuda: str | None = "12.9", error: str = ""):
        for i in range(files):
            (tmp_path / f"nvidia{i}").touch()
        for other in ("nvidiactl", "nvidia-uvm", "nvidia-caps"):
            (tmp_path / other).touch()
        found = gpus.gpu_files(tmp_path)
        monkeypatch.setattr(devices, "gpu_files", lambda: found)
        monkeypatch.setattr(gpus, "gpu_files", lambda: found)
        monkeypatch.setattr(devices, "driver_version", lambda: "470.82.01")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(torch.version, "cuda", cuda)

        def fail():
            raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "init", fail)

    return set_gpus


# -- the driver's files --------------------------------------------------------------------------------------------
def test_device_files_and_those_of_other_jobs(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / name).touch()
    assert [path.name for path in gpus.gpu_files(tmp_path)] == ["nvidia0", "nvidia1"]
    real_open = os.open

    def open_in_control_group(path, flags):
        if path.name == "nvidia1":
            raise PermissionError(1, "Operation not permitted")
        if path.name == "nvidia0":
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", open_in_control_group)
    assert [path.name for path in gpus.gpu_files(tmp_path)] == ["nvidia0"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
            "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35  Release Build  (dvs-builder)\n",
            "560.35",
        ),
        ("", ""),
    ],
)
def test_the_driver_version(tmp_path, text, version):
    file = tmp_path / "version"
    assert gpus.driver_version(file) == ""
    file.write_text(text)
    assert gpus.driver_version(file) == version


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("2", 1),
        ("0, 3", 2),
        ("1,-1,2", 1),
        ("GPU-8932f937,GPU-aa", 2),
        ("MIG-GPU-8932f937/1/0", 1),
        ("0,1,2,3,4,5,6,7", 4),
    ],
)
def test_visible_gpus(machine, value, count):
    machine(4, 4)
    env = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert gpus.gpu_count(env) == count
    assert gpus.gpus_hidden(env) == (count == 0)


# -- one rank ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "usable", "local", "kind", "env", "device"),
    [
        (0, 0, 0, AUTO, {}, "cpu"),
        (8, 8, 3, AUTO, {}, "cuda:3"),
        (8, 8, 3, GPU, {}, "cuda:3"),
        (8, 1, 3, AUTO, {"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"),  # gpu-bind=single:1
        (8, 4, 6, AUTO, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "cuda:2"),  # gpu-bind=closest
        (8, 0, 3, AUTO, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (8, 8, 3, CPU, {}, "cpu"),
        (8, 0, 3, CPU, {}, "cpu"),
    ],
)
def test_the_device_of_a_rank(machine, files, usable, local, kind, env, device):
    machine(files, usable)
    assert str(choose_device(kind, local, env)) == device


OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


@pytest.mark.parametrize(
    ("cuda", "error", "env", "parts"),
    [
        (
            "12.9",
            OLD,
            {},
            [
                "built for CUDA 12.9, cannot use them (The NVIDIA driver on your system is too old "
                "(found version 11040))",
                "update the driver, or install a build of torch for the driver's CUDA version",
            ],
        ),
        (None, "", {}, ["is a build without CUDA", "install a build of torch for CUDA"]),
        ("12.9", "", {"CUDA_VISIBLE_DEVICES": "9"}, ["with CUDA_VISIBLE_DEVICES=9"]),
    ],
)
def test_gpus_that_torch_cannot_use_are_refused(machine, cuda, error, env, parts):
    machine(2, 0, cuda=cuda, error=error)
    with pytest.raises(DeviceError) as refused:
        choose_device(AUTO, 0, env)
    message = str(refused.value)
    assert message.startswith(
        f"{HOST} has 2 GPUs (driver 470.82.01), but torch {torch.__version__}"
    )
    assert "\n" not in message
    for part in (*parts, "or use the CPU: parallel.device=cpu, or CUDA_VISIBLE_DEVICES= (empty)"):
        assert part in message


@pytest.mark.parametrize(
    ("env", "remedy"), [({}, "cluster.gpus_per_node"), ({"CUDA_VISIBLE_DEVICES": ""}, "unset it")]
)
def test_a_gpu_that_must_be_there_and_is_not(machine, env, remedy):
    machine(0, 0)
    with pytest.raises(
        DeviceError, match=f"^parallel.device is gpu, but {HOST} has none.*{remedy}"
    ):
        choose_device(GPU, 0, env)


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("2.6.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.11.0", "PYTORCH_ALLOC_CONF"),
        ("2.13.0+cu130", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_allocator_is_configured_unless_the_user_has(monkeypatch, release, name):
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch, "__version__", release)
    devices.set_cuda_variables(AUTO)
    assert environment == {name: "expandable_segments:True"}
    for own in devices.ALLOCATOR_VARIABLES:
        environment.clear()
        environment[own] = "max_split_size_mb:64"
        devices.set_cuda_variables(AUTO)
        assert environment == {own: "max_split_size_mb:64"}


def test_gpus_are_hidden_from_libraries_if_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    devices.set_cuda_variables(CPU)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("release", "device", "ranks", "bound"),
    [
        ("2.6.0", "cuda:1", 2, True),
        ("2.7.0+cu126", "cuda:1", 2, False),
        ("2.7.1", "cuda:1", 2, True),
        ("2.13.0", "cuda:1", 2, True),
        ("2.13.0", "cuda:0", 1, False),
        ("2.13.0", "cpu", 2, False),
    ],
)
def test_nccl_is_bound_to_the_device(monkeypatch, release, device, ranks, bound):
    monkeypatch.setattr(torch, "__version__", release)
    expected = torch.device(device) if bound else None
    assert devices.nccl_device_id(torch.device(device), ranks) == expected


def test_deepspeed_takes_the_same_device(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    _set_local_rank(torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "3"
    _set_local_rank(torch.device("cuda", 0))
    # To the end: ZeRO-3 reads it in forwards, too.
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"


def test_a_world_on_a_gpu_uses_nccl_and_the_visible_gpu(machine, monkeypatch):
    machine(8, 1)
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"CUDA_VISIBLE_DEVICES": "3", "PYTORCH_ALLOC_CONF": ""}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    threads = torch.get_num_threads()
    with open_world(ParallelConfig(threads=threads)) as world:
        assert world.device == torch.device("cuda", 0)
    assert calls == ["cuda:0", "nccl", "left"]


# -- all ranks -----------------------------------------------------------------------------------------------------
def on_gpus(*uuids: str) -> list[RankDevice]:
    return [RankDevice("node1", "cuda" if uuid else "cpu", uuid) for uuid in uuids]


def test_a_gpu_each_or_none_at_all():
    check_devices(on_gpus("GPU-a", "GPU-b", "GPU-c"))
    check_devices(on_gpus("", ""))
    check_devices(on_gpus("GPU-a"))


@pytest.mark.parametrize(
    ("reports", "parts"),
    [
        (
            on_gpus("GPU-a", "GPU-b", "GPU-a", "GPU-b"),
            ["4 ranks have 2 GPUs", "ranks 0 and 2 would share one of node1", "parallel.ranks=2,"],
        ),
        (on_gpus("GPU-a", "GPU-a"), ["2 ranks have 1 GPU,", "parallel.ranks=1,"]),
        (on_gpus("GPU-a", "", ""), ["1 of 3 ranks have a GPU", "rank 1 on node1 has none"]),
        ([RankDevice("a", "cpu"), RankDevice("b", error="b is broken")], ["b is broken"]),
    ],
)
def test_ranks_that_cannot_work_together_are_refused(reports, parts):
    with pytest.raises(DeviceError) as refused:
        check_devices(reports)
    for part in parts:
        assert part in str(refused.value)


def joined(monkeypatch, chosen: list[str | DeviceError], uuids: list[str]) -> list[str]:
    """What ranks, as threads, return or raise. chosen: each rank's device on its own."""

    def choose(kind, local, env):
        if isinstance(chosen[local], DeviceError):
            raise chosen[local]
        return torch.device(chosen[local])

    monkeypatch.setattr(devices, "choose_device", choose)
    monkeypatch.setattr(devices, "gpu_uuid", lambda device: uuids[device.index])
    store = dist.HashStore()
    ends = [""] * len(chosen)

    def join(rank: int) -> None:
        info = RankInfo(rank, len(chosen), rank, len(chosen), "127.0.0.1", 1)
        try:
            ends[rank] = str(devices.join_devices(store, info, AUTO, RunSecret()))
        except DeviceError as error:
            ends[rank] = f"refused: {error}"

    threads = [Thread(target=join, args=(rank,)) for rank in range(len(chosen))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return ends


def test_all_ranks_decide_the_same(monkeypatch):
    indices: list[str | DeviceError] = ["cuda:0", "cuda:1", "cuda:2"]
    assert joined(monkeypatch, indices, ["a", "b", "c"]) == indices
    ends = joined(monkeypatch, indices, ["a", "b", "a"])
    assert len(set(ends)) == 1
    assert re.match("refused: 3 ranks have 2 GPUs", ends[0])
    ends = joined(monkeypatch, ["cuda:0", DeviceError("node7 is broken")], ["a"])
    assert ends == ["refused: node7 is broken"] * 2


# -- utilisation ---------------------------------------------------------------------------------------------------
def test_gpu_utilization_where_nvml_answers(monkeypatch):
    resources = Resources(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 << 30)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 40)
    metrics = resources.read()
    assert metrics["speed/gpu_busy_fraction"] == 0.4
    assert metrics["memory/gpu_gib"] == 3
    assert metrics["memory/gpu_peak_gib"] == 2

    def fail(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    assert math.isnan(resources.read()["speed/gpu_busy_fraction"])
