"""This process's rank from the environment of its launcher.

torchrun (and `evspan train`), SLURM (and Submitit), or none.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evspan.conf.errors import ConfigError

# Below the range from which Linux assigns free ports.
FIRST_PORT = 10_000
PORTS = 20_000
MAX_PORT = 65_535
# SLURM's step ids of an interactive step (...FA), a batch script, and processes outside of steps.
FIRST_SPECIAL_STEP = 0xFFFFFFFA
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # without them no ranks meet


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


def started_as_rank(env: Mapping[str, str]) -> bool:
    """Whether torchrun, `evspan train` or a SLURM step of several tasks has started this process.

    A batch script and the shell of an interactive step (`salloc` on many sites) are no such step:
    they belong to a job of several tasks, and start ranks only if they call srun.

    Raises:
        ConfigError: some of torchrun's variables are set, and others are missing.
    """
    return _has_torchrun_variables(env) or _tasks_of_step(env) > 1


def rank_info(env: Mapping[str, str]) -> RankInfo:
    """Reads torchrun's variables, else those of a SLURM step of several tasks, else a single rank.

    MASTER_ADDR and MASTER_PORT have priority in all cases.

    Raises:
        ConfigError: a variable cannot be read, or some of torchrun's variables are missing.
    """
    address = env.get("MASTER_ADDR", "127.0.0.1")
    port = _port(env)
    if _has_torchrun_variables(env):
        return RankInfo(
            rank=_number(env, "RANK"),
            size=_number(env, "WORLD_SIZE"),
            local=_number(env, "LOCAL_RANK", 0),
            local_size=_number(env, "LOCAL_WORLD_SIZE", 1),
            address=address,
            port=port,
        )
    tasks = _tasks_of_step(env)
    if tasks > 1:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if "MASTER_ADDR" not in env and nodes:
            address = first_host(nodes)
        return RankInfo(
            rank=_number(env, "SLURM_PROCID"),
            size=tasks,
            local=_number(env, "SLURM_LOCALID"),
            local_size=_tasks_on_node(env, tasks),
            address=address,
            port=port or _port_of_step(env),
        )
    local = _number(env, "LOCAL_RANK", 0) if "RANK" in env else 0
    return RankInfo(rank=0, size=1, local=local, local_size=1, address=address, port=port)


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


def check_interfaces(env: Mapping[str, str]) -> None:
    """Checks the interfaces in GLOO_SOCKET_IFNAME, a list of names without spaces.

    Raises:
        ConfigError: this machine does not have one of them.
    """
    value = env.get("GLOO_SOCKET_IFNAME", "")
    existing = [name for _, name in socket.if_nameindex()]
    missing = [name for name in value.split(",") if name not in existing]
    if value and missing:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME is {value!r}, and {socket.gethostname()} has no interface "
            f"{missing[0]!r}; its interfaces are {', '.join(existing)}. Give names with commas "
            "and no spaces, or unset it"
        )


def first_host(nodes: str) -> str:
    """The first name of SLURM's list of nodes: node[07-09,12],other -> node07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)  # up to a comma outside brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)


def _has_torchrun_variables(env: Mapping[str, str]) -> bool:
    """Whether torchrun's variables are complete.

    RANK=0 and WORLD_SIZE=1 without the rest are what a single process is in any case.
    """
    if all(name in env for name in TORCHRUN):
        return True
    if env.get("RANK", "0") == "0" and env.get("WORLD_SIZE", "1") == "1":
        return False
    present = [name for name in TORCHRUN[:2] if name in env]
    missing = [name for name in TORCHRUN if name not in env]
    values = " and ".join(f"{name}={env[name]}" for name in present)
    raise ConfigError(
        f"{values} make this process one of several ranks, but {', '.join(missing)} "
        f"{_is_or_are(missing)} missing: left over from another program? To start without a "
        f"launcher: unset {' '.join(present)}"
    )


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _tasks_of_step(env: Mapping[str, str]) -> int:
    """Number of tasks of the SLURM step that started this process; 1 without one.

    SLURM_NTASKS is the job's, unless srun changes it.
    """
    if "SLURM_STEP_ID" not in env or _number(env, "SLURM_STEP_ID") >= FIRST_SPECIAL_STEP:
        return 1
    return _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if value is None:
        if default is not None:
            return default
        raise ConfigError(f"{name} is missing in a SLURM step of several tasks; start it with srun")
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, which is no number; set it, or unset {name}")
    return int(value)


def _port(env: Mapping[str, str]) -> int:
    """MASTER_PORT; 0: not set."""
    value = env.get("MASTER_PORT", "")
    if not value:
        return 0
    if not value.isdecimal() or not 1 <= int(value) <= MAX_PORT:
        raise ConfigError(
            f"MASTER_PORT is {value!r}; give a port from 1 to {MAX_PORT}, or unset it"
        )
    return int(value)


def _tasks_on_node(env: Mapping[str, str], tasks: int) -> int:
    """This node's number of tasks from SLURM_STEP_TASKS_PER_NODE, for example 4(x2),1."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    if node < len(counts):
        return counts[node]
    return _number(env, "SLURM_NTASKS_PER_NODE", tasks)


def _port_of_step(env: Mapping[str, str]) -> int:
    """A port that all ranks of a step compute without communication.

    Concurrent steps on a node and a requeued job get other ports.
    """
    step = (
        31 * _number(env, "SLURM_JOB_ID", 0)
        + 7 * _number(env, "SLURM_RESTART_COUNT", 0)
        + _number(env, "SLURM_STEP_ID", 0)
    )
    return FIRST_PORT + step % PORTS
