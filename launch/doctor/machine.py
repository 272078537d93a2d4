"""Checks of a machine: limits, network, software, devices.

Nothing here imports torch: checks that need it run in processes of their own.
"""

import ipaddress
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from evspan.conf.code_version import running_code
from evspan.conf.text import plural
from evspan.launch.doctor.finding import (
    FAIL,
    PASS,
    WARN,
    Check,
    Finding,
    graded,
    python_command,
    shorten,
)
from evspan.launch.doctor.links import interface_gb_per_s
from evspan.pipeline.parallel.gpus import (
    VISIBLE_DEVICES,
    driver_version,
    gpu_count,
    gpu_files,
    visible_count,
)

OPEN_FILES = 4096  # file descriptors
LEAST_OPEN_FILES = 1024
SHARED_GB = 1.0  # NCCL exchanges data between the GPUs of a node through shared memory
LEAST_SHARED_GB = 0.1
PROCESS_S = 180  # for importing torch or DeepSpeed from a slow disk, and waiting for other ranks
COMMAND_S = 30
INTERFACES_COMPARED = 16
IMPORT_DEEPSPEED = [
    sys.executable,
    "-c",
    "import time; start = time.perf_counter(); import torch, deepspeed; "
    "print(deepspeed.__version__, time.perf_counter() - start)",
]
IMPORT_S = 30.0  # of torch and DeepSpeed; every rank of every attempt waits as long
PROBE = python_command("evspan.launch.doctor.probe_rank")
LINKS = {  # in the table of `nvidia-smi topo -m`
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "PCIe switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe within a CPU socket",
    "SYS": "PCIe across CPU sockets",
}


# -- limits ----------------------------------------------------------------------------------------
def file_descriptors() -> Finding:
    """Checks how many files a process may open."""
    soft, hard = (_as_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    grade = graded(soft, enough=OPEN_FILES, least=LEAST_OPEN_FILES)
    message = f"{soft}"
    if grade != PASS:
        message += f", less than {OPEN_FILES}"
    if hard >= OPEN_FILES:
        remedy = f"ulimit -n {OPEN_FILES}, in the shell that submits and in cluster.setup"
    else:
        remedy = f"have the hard limit of {hard} raised (limits.conf; LimitNOFILE of slurmd)"
    return Finding("file descriptors", grade, message, remedy)


def _as_number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Checks the free space of the shared memory."""
    remedy = (
        "remove files that ended processes left there, or have it enlarged; for a container: "
        "--shm-size=1g, or --ipc=host"
    )
    if not folder.is_dir():
        return Finding("shared memory", FAIL, f"{folder} does not exist", remedy)
    free_gb = shutil.disk_usage(folder).free / 1e9
    grade = graded(free_gb, enough=SHARED_GB, least=LEAST_SHARED_GB)
    message = f"{folder}: {free_gb:.2f} GB"
    if grade != PASS:
        message += f", less than {SHARED_GB:g}"
    return Finding("shared memory", grade, message, remedy, threshold=f"{SHARED_GB:g} GB or more")


# -- network ---------------------------------------------------------------------------------------
def network() -> Finding:
    """Lists the interfaces by which ranks can reach each other, and the address that gloo uses."""
    addresses = interfaces()
    own = own_address()
    listed = [f"{name} {' '.join(addresses[name])}" for name in addresses]
    message = ", ".join(listed) or "no interface but loopback"
    values = {
        "interfaces": list(addresses)[:INTERFACES_COMPARED],
        "address": own,
        "machine": _machine_id(),
        "interface_gb_per_s": interface_gb_per_s(
            _used_interfaces(addresses), with_gpus=bool(gpu_files())
        ),
    }
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if value and not selects_interface(variable, value, [*addresses, "lo"]):
            message = f"{variable} is {value!r}, but the interfaces are: {message}"
            remedy = f"name one of {', '.join(addresses) or 'lo'}, or unset it"
            return Finding("network", FAIL, message, remedy, values)
    if not addresses:
        remedy = "ranks on other machines cannot be reached; ask the machine's administrator"
        return Finding("network", WARN, message, remedy, values)
    used = os.environ.get("GLOO_SOCKET_IFNAME") or own
    message += f"; gloo uses {used}"
    if gpu_files():
        message += f"; NCCL uses {' '.join(nccl_interfaces(list(addresses)))}"
    return Finding("network", PASS, message, values=values)


def _used_interfaces(addresses: Mapping[str, Sequence[str]]) -> list[str]:
    """The interfaces of NCCL on a machine with GPUs, else those of gloo."""
    if gpu_files():
        return nccl_interfaces(list(addresses))
    configured = os.environ.get("GLOO_SOCKET_IFNAME")
    if configured:
        return configured.split(",")
    own = own_address()
    return [name for name, listed in addresses.items() if own in listed]


def selects_interface(variable: str, value: str, interface_names: Sequence[str]) -> bool:
    """Whether the value of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME selects an interface.

    gloo takes a list of names, all of which must exist. NCCL takes a list of prefixes, of names
    after `=`, or of prefixes to avoid after `^`.
    """
    names = tuple(name.split(":")[0] for name in value.lstrip("=^").split(","))
    if variable.startswith("GLOO"):
        return all(name in interface_names for name in names)
    if value.startswith("="):
        return any(name in interface_names for name in names)
    if value.startswith("^"):
        return any(not name.startswith(names) for name in interface_names)
    return any(name.startswith(names) for name in interface_names)


def nccl_interfaces(names: Sequence[str]) -> list[str]:
    """The interfaces that NCCL uses: the selected ones, else InfiniBand's, else all but Docker's.

    Between nodes, NCCL uses InfiniBand's own protocol where it can, and these to connect.
    """
    variable = "NCCL_SOCKET_IFNAME"
    value = os.environ.get(variable, "")
    if value:
        return [name for name in names if selects_interface(variable, value, [name])]
    infiniband = [name for name in names if name.startswith("ib")]
    return infiniband or [name for name in names if not name.startswith("docker")]


def interfaces() -> dict[str, list[str]]:
    """Name -> addresses of the network interfaces, without loopback and link-local addresses."""
    addresses: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        if name == "lo":
            continue
        for entry in entries:
            is_ip = entry.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and not ipaddress.ip_address(entry.address).is_link_local:
                addresses.setdefault(name, []).append(entry.address)
    return addresses


def own_address() -> str:
    """The address of this machine's name if it can be bound, else loopback, as gloo chooses it."""
    try:
        infos = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)
    except OSError:
        infos = []
    for family, kind, _, _, address in infos:
        with socket.socket(family, kind) as listener:
            try:
                listener.bind(address)
            except OSError:
                continue
            return str(address[0])
    return "127.0.0.1"


def _machine_id() -> str:
    """The same for all virtual nodes of a machine."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text().strip() if boot_id.exists() else socket.gethostname()


# -- software and devices --------------------------------------------------------------------------
def software() -> Finding:
    """Lists the versions that must be the same on all nodes of a run."""
    values = {"Python": platform.python_version()}
    for name in ("evspan", "torch", "deepspeed"):
        values[name] = _version(name)
    values["code"] = running_code().digest
    message = ", ".join(f"{name} {value}" for name, value in values.items())
    return Finding("versions", PASS, message, values=values)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def gpus() -> Finding:
    """Lists the GPUs and the links between them. Its value `gpus`: how many a rank may use."""
    if shutil.which("nvidia-smi") is None:
        return _gpus_by_device_files()
    try:
        names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
        links = gpu_links(_output("nvidia-smi", "topo", "-m"))
    except (subprocess.SubprocessError, OSError) as error:
        reason = shorten(getattr(error, "stdout", "") or str(error))
        remedy = "check the driver on machines with GPUs; elsewhere this does not matter"
        values = {"gpus": gpu_count(os.environ)}
        return Finding("GPUs", WARN, f"nvidia-smi fails: {reason}", remedy, values)
    message = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    driver = driver_version()
    if driver:
        message += f", driver {driver}"
    if links:
        message += f"; pairs joined by {_describe_links(links)}"
    if VISIBLE_DEVICES in os.environ:
        message += f"; {VISIBLE_DEVICES}={os.environ[VISIBLE_DEVICES]}"
    return Finding("GPUs", PASS, message, values={"gpus": visible_count(len(names), os.environ)})


def _gpus_by_device_files() -> Finding:
    count = len(gpu_files())
    values = {"gpus": gpu_count(os.environ)}
    if not count:
        message = "none, nvidia-smi is not installed: ranks run on the CPU"
        return Finding("GPUs", PASS, message, values=values)
    driver = driver_version() or "unknown"
    message = f"{plural(count, 'GPU')}, driver {driver}"
    message += "; nvidia-smi is not installed, which lists their models and links"
    return Finding("GPUs", PASS, message, values=values)


def _describe_links(links: Sequence[str]) -> str:
    """'SYS (PCIe across CPU sockets) x 4, NV4 (NVLink) x 2'."""
    parts = []
    for link, count in Counter(links).most_common():
        kind = LINKS.get(link.rstrip("0123456789"), "unknown")
        parts.append(f"{link} ({kind}) x {count}")
    return ", ".join(parts)


def gpu_links(matrix: str) -> list[str]:
    """The link of each pair of GPUs, from the table of `nvidia-smi topo -m`."""
    plain = re.sub(r"\x1b\[\d*m", "", matrix)
    lines = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d", line)]
    if not lines:
        return []
    header, *rows = lines
    count = sum(re.fullmatch(r"GPU\d+", name) is not None for name in header)
    links = []
    for i, row in enumerate(rows[:count]):
        links += row[2 + i : 1 + count]  # the first cell is the GPU's name
    return links


def _output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=COMMAND_S
    ).stdout


CHECKS: dict[str, Check] = {
    "file descriptors": file_descriptors,
    "shared memory": shared_memory,
    "network": network,
    "versions": software,
    "GPUs": gpus,
}


# -- checks that need torch ------------------------------------------------------------------------
class ProcessResult(NamedTuple):
    """The last line of a process's output, and why it failed (empty if it did not)."""

    last_line: str
    failure: str = ""


def start_process(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts a process whose result `wait_for` returns."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str]) -> ProcessResult:
    """Waits until the process has ended; kills it after PROCESS_S."""
    try:
        stdout, stderr = process.communicate(timeout=PROCESS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ProcessResult("", f"it has not ended within {PROCESS_S} s")
    if process.returncode == 0:
        return ProcessResult(_last_line(stdout))
    reason = shorten(_last_line(stderr).removeprefix("error: "))
    return ProcessResult("", reason or f"exit code {process.returncode}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def deepspeed_import(process: subprocess.Popen[str]) -> list[Finding]:
    """Checks that DeepSpeed can be imported, and how long it takes.

    process: runs IMPORT_DEEPSPEED.
    """
    result = wait_for(process)
    if result.failure:
        remedy = "reinstall it for this Python and this torch"
        return [Finding("DeepSpeed", FAIL, f"cannot be imported: {result.failure}", remedy)]
    release, seconds = result.last_line.split()
    return [Finding("DeepSpeed", PASS, release), import_time(float(seconds))]


def import_time(seconds: float) -> Finding:
    """Grades the time that a rank takes to import torch and DeepSpeed."""
    message = f"torch and DeepSpeed in {seconds:.1f} s"
    remedy = (
        "use a container image (cluster.container) or a virtual environment on the nodes' own "
        "disks: thousands of small files are slow on a shared file system"
    )
    grade = WARN if seconds > IMPORT_S else PASS
    threshold = f"{IMPORT_S:.0f} s or less"
    return Finding("import time", grade, message, remedy, {"import_s": seconds}, threshold)


def torch_and_all_reduce(process: subprocess.Popen[str], gpus_found: int) -> list[Finding]:
    """Checks that torch can use the GPUs, and that an all-reduce over all ranks works.

    Args:
        process: runs PROBE.
        gpus_found: number of GPUs of this machine that the process may use.
    """
    result = wait_for(process)
    if result.failure:
        remedy = (
            "if ranks do not reach each other: name an interface that all nodes have in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (cluster.environment), and open the "
            "firewall between the nodes"
        )
        return [Finding("all-reduce", FAIL, result.failure, remedy)]
    values = json.loads(result.last_line)
    if "device_error" in values:
        message, _, remedy = values["device_error"].partition("; ")
        return [
            Finding("torch", FAIL, f"{_describe_build(values)}: {message}", remedy),
            Finding("all-reduce", FAIL, "not tried", "correct torch's devices first"),
        ]
    message = f"{values['backend']} works"
    if values["ranks"] == 1:
        message += " with itself"
    return [
        _check_torch(values, gpus_found),
        Finding("all-reduce", PASS, message, values=values),
    ]


def _describe_build(values: Mapping[str, Any]) -> str:
    """'2.13.0, CUDA 13.0, NCCL 2.28.3'. values: the results of the probe."""
    if not values["cuda"]:
        return f"{values['torch']}, CPU build"
    build = f"{values['torch']}, CUDA {values['cuda']}"
    return f"{build}, NCCL {values['nccl']}" if values["nccl"] else build


def _check_torch(values: Mapping[str, Any], gpus_found: int) -> Finding:
    """values: the results of the probe."""
    gpus_seen = values["gpus"]
    message = f"{_describe_build(values)}; it sees {plural(gpus_seen, 'GPU')}"
    if gpus_seen < gpus_found:
        message += f" of {gpus_found}"
        remedy = "install torch's CUDA build on the nodes"
        if values["cuda"]:
            remedy = "its CUDA does not match the driver, or a GPU is broken: see nvidia-smi, dmesg"
        return Finding("torch", FAIL, message, remedy)
    return Finding("torch", PASS, message)
