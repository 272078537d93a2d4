"""Which process holds a lock on a folder, and whether that process still runs.

Only these identify a process across machines: host names and process ids are not unique (cloned
machines, containers), so the kernel's boot id, its process namespace and the start time of the
process belong to its identity. A SLURM job's attempt is identified by job id and restart count.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

SLURM_TIMEOUT_S = 15
# A job in another state may still run on a node, or is about to: waiting, suspended, requeued.
SLURM_ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
SLURM_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})


class Liveness(Enum):
    """Whether a holder's process runs."""

    running = "running"
    ended = "ended"
    unknown = "unknown"  # on another machine: the age of the lock decides


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, as stored in the lock file.

    Attributes:
        token: unique name of this lock.
        purpose: the command, for people, such as 'evspan train'.
        time: since when, in seconds since 1970.
        boot: the kernel's boot id. namespace: its namespace of process ids. Both may be empty.
        started: start time of the process, in clock ticks since boot; 0 if not known.
        job: id of the SLURM job, without an array index; empty outside of jobs.
        array_job: JOB_INDEX for an element of an array, else as `job`.
        restart: how often SLURM has requeued the job.
        cluster: SLURM's name of the cluster; may be empty.
    """

    token: str
    purpose: str
    time: float
    user: str
    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    job: str
    array_job: str
    restart: int
    cluster: str

    @staticmethod
    def current(purpose: str) -> "Holder":
        """This process."""
        pid = os.getpid()
        host = socket.gethostname()
        env = os.environ
        array_job = job = env.get("SLURM_JOB_ID", "")
        if job and "SLURM_ARRAY_JOB_ID" in env:
            array_job = f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
        restart = env.get("SLURM_RESTART_COUNT", "")
        return Holder(
            token=f"{host}-{pid}-{time.time_ns()}",
            purpose=purpose,
            time=round(time.time(), 3),
            user=_user_name(),
            host=host,
            boot=_read_text("/proc/sys/kernel/random/boot_id"),
            namespace=_pid_namespace(),
            pid=pid,
            started=start_ticks(pid),
            job=job,
            array_job=array_job,
            restart=int(restart) if restart.isdecimal() else 0,
            cluster=env.get("SLURM_CLUSTER_NAME", ""),
        )

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Holder | None":
        """The holder that `to_json` described; None if these are not the values of one."""
        arguments: dict[str, Any] = {}
        for field in fields(Holder):
            value = values.get(field.name)
            # The annotations are classes: this module has no postponed evaluation.
            if field.type is float and isinstance(value, int):
                value = float(value)
            if type(value) is not field.type:
                return None
            arguments[field.name] = value
        return Holder(**arguments)

    @staticmethod
    def unreadable(path: Path, time_s: float) -> "Holder":
        """Stands for the holder that a damaged lock file named. time_s: when it was written."""
        return Holder(
            token="",
            purpose=f"a process whose lock file {path} cannot be read",
            time=time_s,
            user="",
            host="",
            boot="",
            namespace="",
            pid=0,
            started=0,
            job="",
            array_job="",
            restart=0,
            cluster="",
        )

    def to_json(self) -> dict[str, Any]:
        """The values of the lock file."""
        return asdict(self)

    def on_machine_of(self, other: "Holder") -> bool:
        """Whether both processes see each other's process ids."""
        mine = (self.host, self.boot, self.namespace)
        return all(mine) and mine == (other.host, other.boot, other.namespace)

    def is_earlier_attempt_of(self, other: "Holder") -> bool:
        """Whether SLURM has requeued this holder's job, and `other` is a later attempt of it."""
        same_job = bool(self.job) and self.job == other.job and self.cluster == other.cluster
        return same_job and self.restart < other.restart

    def liveness(self, reader: "Holder") -> Liveness:
        """Whether the process runs, as far as `reader`, the process that asks, can find out.

        An earlier attempt of the reader's own SLURM job has ended for the reader, unless its
        process is seen on this machine.
        """
        if self.on_machine_of(reader):
            runs = self.started and start_ticks(self.pid) == self.started
            return Liveness.running if runs else Liveness.ended
        if self.is_earlier_attempt_of(reader):
            return Liveness.ended
        if self.job and _slurm_attempt_has_ended(self, reader):
            return Liveness.ended
        return Liveness.unknown

    def describe(self) -> str:
        """'evspan train by ann (process 12 on node3, SLURM job 7) since 2026-01-31 12:00:00'."""
        text = self.purpose
        if self.user:
            text += f" by {self.user}"
        if self.pid:
            text += f" (process {self.pid} on {self.host}"
            if self.job:
                text += f", SLURM job {self.array_job}"
            text += ")"
        return f"{text} since {_local_time(self.time)}"

    def how_to_end(self) -> str:
        """What a user does to end the process."""
        if self.job:
            return f"end it by scancel {self.array_job}"
        if self.pid:
            return f"end it by kill -TERM {self.pid} on {self.host}"
        return "remove that file if no such process runs"


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if there is none, or it is a zombie."""
    # The name of the program, in brackets, may contain spaces and brackets.
    words = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(words) < 20 or words[0] in ("Z", "X"):
        return 0
    return int(words[19])


def _local_time(time_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    except (ValueError, OverflowError, OSError):  # a damaged file
        return f"{time_s} s"


def _read_text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return ""


def _pid_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _user_name() -> str:
    with suppress(KeyError, OSError):  # a container may have no entry for the user
        return getpass.getuser()
    return ""


# -- SLURM -----------------------------------------------------------------------------------------
def _slurm_attempt_has_ended(holder: Holder, reader: Holder) -> bool:
    """Whether SLURM says so. False also where this machine's SLURM does not answer for the job."""
    cluster = reader.cluster or _cluster_name()
    if not holder.cluster or holder.cluster != cluster:
        return False
    answer = _run("scontrol", "show", "job", "--oneliner", holder.job)
    if answer is None:
        return False
    if "Invalid job id" in answer:  # the controller forgets a job some minutes after its end
        return True
    state = re.search(r"\bJobState=([A-Z_]+)", answer)
    restarts = re.search(r"\bRestarts=(\d+)", answer)
    if state is None:
        return False
    if state[1] in SLURM_ENDED or state[1] in SLURM_WAITING:
        return True
    return restarts is not None and int(restarts[1]) > holder.restart


def _cluster_name() -> str:
    match = re.search(r"^ClusterName\s*=\s*(\S+)", _run("scontrol", "show", "config") or "", re.M)
    return match[1] if match else ""


def _run(*command: str) -> str | None:
    """The output of a SLURM command, errors included; None where it cannot run."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SLURM_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout + result.stderr
