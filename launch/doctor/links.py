"""What the ranks measured between each other, against what the interface should deliver."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evspan.launch.doctor.finding import PASS, WARN, Finding
from evspan.pipeline.parallel.probe_names import BETWEEN_NODES, IN_NODE

SYSFS = Path("/sys/class")
# Of the interface's speed. Large collectives reach 80 to 90 % over InfiniBand, and about half over
# TCP with one connection.
LEAST_OF_LINK = 0.3
MOST_US = {IN_NODE: 1000.0, BETWEEN_NODES: 2000.0}  # of a small collective, on a quiet network
LEAST_GB_PER_S = 0.1  # where the interface's speed is not known: about Ethernet at 1 Gbit/s
REMEDY = {
    IN_NODE: (
        "GPUs: see how they are joined (nvidia-smi topo -m), and that /dev/shm is large enough; "
        "CPUs: give the ranks cores of their own (cluster.cpus_per_task)"
    ),
    BETWEEN_NODES: (
        "name the fast interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
        "(cluster.environment); with InfiniBand, NCCL_DEBUG=INFO shows whether NCCL uses it"
    ),
}
WORDS = {"all_reduce": "all-reduce", "all_to_all": "all-to-all"}


def interface_gb_per_s(
    names: Sequence[str], sysfs: Path = SYSFS, *, with_gpus: bool
) -> float | None:
    """The speed of the fastest of these interfaces in GB/s, one direction; None: not known.

    With GPUs and InfiniBand, that of the fastest of its ports, which NCCL uses whatever the
    interfaces are. CPUs exchange by gloo, over the interfaces.
    """
    speeds: list[float | None] = []
    if with_gpus:
        speeds = [_infiniband(path) for path in sysfs.glob("infiniband/*/ports/*/rate")]
    if not any(speeds):
        speeds = [_ethernet(sysfs / "net" / name / "speed") for name in names]
    return max((speed for speed in speeds if speed), default=None)


def _infiniband(path: Path) -> float | None:
    """The file has '200 Gb/sec (4X HDR)'."""
    try:
        match = re.match(r"([\d.]+) Gb/sec", path.read_text())
    except OSError:
        return None
    return float(match[1]) / 8 if match else None


def _ethernet(path: Path) -> float | None:
    """The file has Mbit/s; -1, or no contents, where the driver does not know it."""
    try:
        speed = int(path.read_text())
    except (OSError, ValueError):
        return None
    return speed / 8000 if speed > 0 else None


def judge_links(values: Sequence[Mapping[str, Any]], interface: float | None) -> list[Finding]:
    """One finding per kind of link: the slowest rank's.

    Args:
        values: the results of `evspan.pipeline.parallel.probe` of all ranks.
        interface: GB/s that the slowest node's interface should deliver; None: not known.
    """
    findings = []
    for name in (IN_NODE, BETWEEN_NODES):
        links = [value["links"][name] for value in values if name in value.get("links", {})]
        if links:
            findings.append(_judge(name, links, interface if name == BETWEEN_NODES else None))
    return findings


def _judge(name: str, links: Sequence[Mapping[str, float]], interface: float | None) -> Finding:
    parts = []
    problems = []
    least = LEAST_GB_PER_S if interface is None else LEAST_OF_LINK * interface
    threshold = f"{least:.3g} GB/s or more, {MOST_US[name]:.0f} us or less"
    for collective, word in WORDS.items():
        speed = min(link[f"{collective}_gb_per_s"] for link in links)
        latency_us = max(link[f"{collective}_us"] for link in links)
        parts.append(f"{word} {speed:.2f} GB/s, {latency_us:.0f} us")
        if speed < least:
            problems.append(f"{word} under {least:.3g} GB/s")
        if latency_us > MOST_US[name]:
            problems.append(f"{word} over {MOST_US[name]:.0f} us")
    message = "; ".join(parts)
    if interface is not None:
        message += f" (the interface: {interface:.3g} GB/s)"
    if problems:
        message += f": {', '.join(problems)}"
    return Finding(name, WARN if problems else PASS, message, REMEDY[name], threshold=threshold)
