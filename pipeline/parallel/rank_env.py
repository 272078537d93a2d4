"""This process's rank from the environment of its launcher.

torchrun (and `evspan train`), SLURM (and Submitit), or none.
"""

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from evspan.conf.errors import ConfigError

# Below the range from which Linux assigns free ports.
FIRST_PORT = 10_000
PORTS = 20_000


class RankInfo(NamedTuple):
    """Rank `rank` of `size`, number `local` of `local_size` on its machine.

    Rank 0 listens at address:port.
    """

    rank: int
    size: int
    local: int
    local_size: int
    address: str
    port: int


def rank_info(env: Mapping[str, str]) -> RankInfo:
    """Reads torchrun's variables, else those of a SLURM step of several tasks, else a single rank.

    MASTER_ADDR and MASTER_PORT have priority in all cases.
    """
    address = env.get("MASTER_ADDR", "127.0.0.1")
    port = int(env.get("MASTER_PORT", 0))
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankInfo(
            rank=int(env["RANK"]),
            size=int(env["WORLD_SIZE"]),
            local=int(env.get("LOCAL_RANK", 0)),
            local_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
            address=address,
            port=port,
        )
    # A batch script has a number of tasks too, but it is not a step.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if "MASTER_ADDR" not in env and nodes:
            address = first_host(nodes)
        return RankInfo(
            rank=int(env["SLURM_PROCID"]),
            size=int(env["SLURM_NTASKS"]),
            local=int(env["SLURM_LOCALID"]),
            local_size=_tasks_on_node(env),
            address=address,
            port=port or _port_of_step(env),
        )
    return RankInfo(rank=0, size=1, local=0, local_size=1, address=address, port=port)


def check_address(address: str) -> None:
    """Checks that the name can be resolved; joining a process group would wait for its timeout.

    Raises:
        ConfigError: it cannot.
    """
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"rank 0 is at {address!r} (from MASTER_ADDR, or SLURM's list of nodes), a name that "
            f"{socket.gethostname()} cannot resolve ({error}); "
            "set MASTER_ADDR to the IP address of the first node"
        ) from error


def first_host(nodes: str) -> str:
    """The first name of SLURM's list of nodes: node[07-09,12],other -> node07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)  # up to a comma outside brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """This node's number of tasks from SLURM_STEP_TASKS_PER_NODE, for example 4(x2),1."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(env.get("SLURM_NODEID", 0))
    if node < len(counts):
        return counts[node]
    return int(env.get("SLURM_NTASKS_PER_NODE", env["SLURM_NTASKS"]))


def _port_of_step(env: Mapping[str, str]) -> int:
    """A port that all ranks of a step compute without communication.

    Concurrent steps on a node and a requeued job get other ports.
    """
    step = (
        31 * int(env.get("SLURM_JOB_ID", 0))
        + 7 * int(env.get("SLURM_RESTART_COUNT", 0))
        + int(env.get("SLURM_STEP_ID", 0))
    )
    return FIRST_PORT + step % PORTS
