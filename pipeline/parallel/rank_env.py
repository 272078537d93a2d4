"""Who this process is, in the words of whatever started it: torchrun (and `evspan train`), SLURM (and Submitit), or nothing."""

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from evspan.conf.errors import ConfigError

FIRST_PORT, PORTS = 10_000, 20_000  # below the ports that Linux gives to anybody who asks


class Place(NamedTuple):
    """Rank `rank` of `size`, the `local`-th of `local_size` on its machine; rank 0 listens at address:port."""

    rank: int
    size: int
    local: int
    local_size: int
    address: str
    port: int


def place(env: Mapping[str, str]) -> Place:
    """torchrun's variables, else those of a SLURM step of several tasks, else alone. MASTER_ADDR and MASTER_PORT win."""
    address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", 0))
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", 1)),
            address,
            port,
        )
    if (
        "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1
    ):  # not in a batch script, which is no task
        if "MASTER_ADDR" not in env and (
            nodes := env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        ):
            address = first_host(nodes)
        return Place(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env["SLURM_LOCALID"]),
            _tasks_here(env),
            address,
            port or _port_of_step(env),
        )
    return Place(0, 1, 0, 1, address, port)


def check_address(address: str) -> None:
    """Raises ConfigError where the name means nothing here: joining a process group would only wait for it."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"rank 0 is at {address!r} (from MASTER_ADDR, or SLURM's list of nodes), a name that "
            f"{socket.gethostname()} cannot resolve ({error}); "
            "set MASTER_ADDR to the IP address of the first node"
        ) from error


def first_host(nodes: str) -> str:
    """node[07-09,12],other -> node07"""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)  # up to a comma outside brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)


def _tasks_here(env: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE, say 4(x2),1: this node's."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")).split(
        ","
    ):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return (
        counts[node]
        if node < len(counts)
        else int(env.get("SLURM_NTASKS_PER_NODE", env["SLURM_NTASKS"]))
    )


def _port_of_step(env: Mapping[str, str]) -> int:
    """All ranks of a step get the same without asking each other; steps side by side on one node, a requeued job, get others."""
    step = (
        31 * int(env.get("SLURM_JOB_ID", 0))
        + 7 * int(env.get("SLURM_RESTART_COUNT", 0))
        + int(env.get("SLURM_STEP_ID", 0))
    )
    return FIRST_PORT + step % PORTS
