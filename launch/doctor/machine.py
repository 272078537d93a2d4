"""A machine's limits, network, software and devices. Nothing here imports torch: what needs it runs in a process of its own."""

import fcntl
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evspan.launch.doctor.finding import FAIL, PASS, WARN, Check, Finding, graded, module, one_line

FILES, LEAST_FILES = 4096, 1024
SHARED_GB, LEAST_SHARED_GB = 1.0, 0.1  # NCCL passes through it what GPUs of a node exchange
PROCESS_S = 180  # of one that imports torch or DeepSpeed, from a slow disk, and waits for others
SIOCGIFADDR = 0x8915  # <linux/sockios.h>
IMPORT_DEEPSPEED = [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"]
PROBE = module("evspan.launch.doctor.probe_rank")
LINKS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "PCIe switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe within a CPU socket",
    "SYS": "PCIe across CPU sockets",
}


# -- limits --------------------------------------------------------------------------------------------------------
def file_descriptors() -> Finding:
    soft, hard = (
        float("inf") if n == resource.RLIM_INFINITY else n
        for n in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    grade = graded(soft, enough=FILES, least=LEAST_FILES)
    return Finding(
        "file descriptors",
        grade,
        f"{soft}" + (f", less than {FILES}" if grade != PASS else ""),
        f"ulimit -n {FILES}, in the shell that submits and in cluster.setup"
        if hard >= FILES
        else f"have the hard limit of {hard} raised (limits.conf; LimitNOFILE of slurmd)",
    )


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    remedy = "remove what is left over there, or have it enlarged; for a container: --shm-size=1g, or --ipc=host"
    if not folder.is_dir():
        return Finding("shared memory", FAIL, f"{folder} is not there", remedy)
    free = shutil.disk_usage(folder).free / 1e9
    grade = graded(free, enough=SHARED_GB, least=LEAST_SHARED_GB)
    few = f", less than {SHARED_GB:g}" if grade != PASS else ""
    return Finding("shared memory", grade, f"{folder}: {free:.2f} GB{few}", remedy)


# -- network -------------------------------------------------------------------------------------------------------
def network() -> Finding:
    """The interfaces by which ranks could reach others, and the address that gloo takes by itself: of the machine's name."""
    there, own = interfaces(), own_address()
    told = (
        ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in there.items())
        or "no interface but loopback"
    )
    values = {"interfaces": list(there)[:16], "address": own, "machine": _machine()}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted and not _name_one(wanted, variable, [*there, "lo"]):
            return Finding(
                "network",
                FAIL,
                f"{variable} is {wanted!r}, which no interface is: {told}",
                f"name one of {', '.join(there) or 'lo'}, or unset it",
                values,
            )
    if not there:
        return Finding(
            "network",
            WARN,
            told,
            "ranks on other machines cannot be reached; have the network looked at",
            values,
        )
    return Finding(
        "network",
        PASS,
        f"{told}; gloo takes {os.environ.get('GLOO_SOCKET_IFNAME') or own}",
        values=values,
    )


def _name_one(wanted: str, variable: str, there: list[str]) -> bool:
    """gloo wants names; NCCL beginnings of names, after = names, after ^ those not to take."""
    how = wanted[0] if variable.startswith("NCCL") else "="
    names = [name.split(":")[0] for name in wanted.lstrip("=^").split(",")]
    if how == "=":
        return (all if variable.startswith("GLOO") else any)(name in there for name in names)
    if how == "^":
        return any(not other.startswith(tuple(names)) for other in there)
    return any(other.startswith(tuple(names)) for other in there)


def interfaces() -> dict[str, list[str]]:
    """Name -> addresses, but for loopback and link-local ones."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                told = fcntl.ioctl(
                    any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
                found[name] = [socket.inet_ntoa(told[20:24])]
            except OSError:  # it has none
                pass
    six = Path("/proc/net/if_inet6")
    for line in six.read_text().splitlines() if six.exists() else ():
        address, _, _, scope, _, name = line.split()
        if scope == "00":
            found.setdefault(name, []).append(
                socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
            )
    found.pop("lo", None)
    return found


def own_address() -> str:
    """Of this machine's name, if it can be listened at; else gloo takes loopback."""
    try:
        told = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)
    except OSError:
        told = []
    for family, kind, _, _, address in told:
        with socket.socket(family, kind) as listener:
            try:
                listener.bind(address)
            except OSError:
                continue
            return str(address[0])
    return "127.0.0.1"


def _machine() -> str:
    """The same for all virtual nodes of a machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


# -- software and devices ------------------------------------------------------------------------------------------
def software() -> Finding:
    """What must be the same wherever ranks of a run are."""
    values = {
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("evspan", "torch", "deepspeed")},
        "code": _digest(),
    }
    return Finding(
        "versions",
        PASS,
        ", ".join(f"{name} {told}" for name, told in values.items()),
        values=values,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _digest() -> str:
    """Of the code: two checkouts may be of one version."""
    root, digest = Path(__file__).parents[2], hashlib.sha1()
    for room in ("conf", "data_prep", "launch", "pipeline"):
        for path in sorted(p for p in (root / room).rglob("*") if p.suffix in (".py", ".yaml")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def gpus() -> Finding:
    """How many there are, and what joins them."""
    if shutil.which("nvidia-smi") is None:
        return Finding(
            "GPUs", PASS, "none, there is no nvidia-smi: ranks run on the CPU", values={"gpus": 0}
        )
    try:
        names = _say("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
        links = between(_say("nvidia-smi", "topo", "-m"))
    except (subprocess.SubprocessError, OSError) as error:
        return Finding(
            "GPUs",
            WARN,
            f"nvidia-smi fails: {one_line(getattr(error, 'stdout', '') or str(error))}",
            "where there are GPUs, have the driver looked at; elsewhere it does not matter",
            {"gpus": 0},
        )
    joined = [
        f"{kind} ({LINKS.get(kind.rstrip('0123456789'), 'unknown')}) x {n}"
        for kind, n in Counter(links).most_common()
    ]
    return Finding(
        "GPUs",
        PASS,
        ", ".join(f"{n} x {name}" for name, n in Counter(names).items())
        + (f"; pairs joined by {', '.join(joined)}" if joined else ""),
        values={"gpus": len(names)},
    )


def between(matrix: str) -> list[str]:
    """What joins each pair of GPUs, from the table of `nvidia-smi topo -m`."""
    plain = re.sub(r"\x1b\[\d*m", "", matrix)
    header, *rows = [
        line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d", line)
    ] or [[]]
    number = sum(re.fullmatch(r"GPU\d+", name) is not None for name in header)
    return [row[1 + j] for i, row in enumerate(rows[:number]) for j in range(i + 1, number)]


def _say(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


CHECKS: dict[str, Check] = {
    "file descriptors": file_descriptors,
    "shared memory": shared_memory,
    "network": network,
    "versions": software,
    "GPUs": gpus,
}


# -- what needs torch ----------------------------------------------------------------------------------------------
def start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(the last line that it wrote, ""), or ("", how it failed)."""
    try:
        out, err = process.communicate(timeout=PROCESS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"it has not ended within {PROCESS_S} s"
    last = next(
        (
            line.strip()
            for line in reversed((err if process.returncode else out).splitlines())
            if line.strip()
        ),
        "",
    )
    return (
        ("", one_line(last.removeprefix("error: ")) or f"exit code {process.returncode}")
        if process.returncode
        else (last, "")
    )


def deepspeed_import(process: subprocess.Popen[str]) -> Finding:
    told, failed = end(process)
    return Finding(
        "DeepSpeed",
        FAIL if failed else PASS,
        f"cannot be imported: {failed}" if failed else told,
        "install it anew, for this Python and this torch",
    )


def torch_and_all_reduce(
    process: subprocess.Popen[str], seen: int, ranks_here: int
) -> list[Finding]:
    """What torch is, whether it sees the GPUs that nvidia-smi does, and its all-reduce, with other ranks if there are any."""
    told, failed = end(process)
    if failed:
        return [
            Finding(
                "all-reduce",
                FAIL,
                failed,
                "if ranks do not reach each other: name an interface that all nodes have in "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (cluster.environment), and let a firewall pass them",
            )
        ]
    values = json.loads(told)
    there, build = values["gpus"], f"CUDA {values['cuda']}" if values["cuda"] else "CPU build"
    found, remedy = f"{values['torch']}, {build}; it sees {there} GPU{'s' * (there != 1)}", ""
    if there < seen:
        found += f" of {seen}"
        remedy = (
            "its CUDA does not go with the driver, or CUDA_VISIBLE_DEVICES hides some"
            if values["cuda"]
            else "install torch's CUDA build on the nodes"
        )
    elif 0 < there < ranks_here:
        found += f" for {ranks_here} ranks"
        remedy = "each rank needs one: lower --ranks-per-node (cluster.ranks_per_node), or ask for more GPUs"
    alone = "" if values["ranks"] > 1 else " with itself"
    return [
        Finding("torch", FAIL if remedy else PASS, found, remedy),
        Finding("all-reduce", PASS, f"{values['backend']} works{alone}", values=values),
    ]
