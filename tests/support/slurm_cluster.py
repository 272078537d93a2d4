"""A throw-away SLURM on this machine: virtual nodes, no accounting, nothing left when it ends.

    python tests/support/slurm_cluster.py

prints the setting of SLURM_CONF, and ends the cluster when its standard input ends (Ctrl-D).
"""

import ctypes
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
REQUIRED = "EVSPAN_REQUIRE_SLURM"  # set: a missing cluster fails the tests instead of skipping them
NODES = 2  # n1, n2: of the partitions low and high
CANCELLING = "cancelling"  # partition of n1 and n2 whose preempted jobs are cancelled
ASIDE = "aside"  # partition of as many further nodes
UP_S = 120
DOWN_S = 90
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PR_SET_CHILD_SUBREAPER = 36
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """\
ClusterName=evspan
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
# Ports of runs follow from job numbers; clusters side by side on one machine should not share them.
FirstJobId={first_job}
AuthType=auth/munge
# A requeued job waits as long as a credential lives; 120 s by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# Works in a container: no cgroups, no binding to cores, which the virtual nodes share.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters={scheduler}
KillWait=2
# A test may ask for a job minutes after its end; 300 s by default.
MinJobAge=3600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# The shell of salloc is a step of one task on the first node, as on many clusters.
LaunchParameters=use_interactive_step
{nodes}
PartitionName=low {partition} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high {partition} PriorityTier=10 PreemptMode=OFF
PartitionName={cancelling} {partition} PriorityTier=1 PreemptMode=CANCEL GraceTime=10
# For jobs that no test preempts, cancels with its own, or takes a node from.
PartitionName={aside} {nodes_aside} PriorityTier=1 PreemptMode=OFF
"""
SCHEDULER = {
    "bf_interval": 1,
    "bf_resolution": 1,
    "sched_interval": 1,
    "batch_sched_delay": 0,
    "sched_min_interval": 0,
}


@dataclass(frozen=True)
class Cluster:
    """A running cluster. conf: its slurm.conf."""

    conf: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment of SLURM's commands."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def ask(self, *command: str) -> str:
        """Runs a SLURM command. Returns its output."""
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=120
        ).stdout

    def jobs(self) -> dict[str, str]:
        """State by id of the tasks in SLURM's queue, in the order of submission."""
        output = self.ask(
            "squeue", "--noheader", "--array", "--states=all", "--sort=i", "--format=%i %T"
        )
        return dict(line.split() for line in output.splitlines())

    def submitted_since(self, before: dict[str, str]) -> set[str]:
        """Ids of the tasks that joined the queue after `before`, an earlier answer of `jobs`."""
        return self.jobs().keys() - before.keys()

    def end_jobs(self) -> None:
        """Cancels all jobs but those in ASIDE, and waits for their end."""
        partitions = f"--partition=low,high,{CANCELLING}"
        for partition in ("low", "high", CANCELLING):
            self.ask("scancel", f"--partition={partition}", "--user=root")
        end = time.monotonic() + DOWN_S
        while self.ask("squeue", "--noheader", partitions):
            assert time.monotonic() < end, "cancelled jobs are still running"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Ends with the tests' process in any case: the process that keeps it reads from a pipe."""
    obstacle = unavailable()
    if obstacle:
        refuse = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
        refuse(f"no throw-away SLURM: {obstacle}")
    # A session of its own: Ctrl-C reaches the tests alone, and they end the cluster.
    keeper = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert keeper.stdin
    assert keeper.stdout
    try:
        ready, _, _ = select.select([keeper.stdout], [], [], UP_S)
        line = keeper.stdout.readline().strip() if ready else ""
        if not line.startswith("export SLURM_CONF="):
            pytest.fail(f"the throw-away SLURM has not come up: {line!r}")
        yield Cluster(Path(line.partition("=")[2]))
    finally:
        keeper.stdin.close()
        try:
            keeper.wait(DOWN_S + 10)
        finally:
            keeper.kill()


def unavailable() -> str:
    """Why this machine cannot run it, and the remedy; empty if it can."""
    missing = [c for c in COMMANDS if shutil.which(c, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found; as root: {INSTALL}"
    if os.geteuid() != 0:
        return "it needs root"
    return ""


# -- the process that keeps it ---------------------------------------------------------------------
def keep() -> None:
    """Brings a cluster up, waits for the end of standard input or a signal, takes it down."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of daemons become children
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    os.environ["PATH"] = PATH
    # Not in pytest's folder: munge requires folders that all users can enter.
    folder = Path(tempfile.mkdtemp(prefix="evspan-slurm-"))
    try:
        folder.chmod(0o755)
        print(f"export SLURM_CONF={bring_up(folder)}", flush=True)
        sys.stdin.read()
    except Exception as error:
        print(f"{error}", flush=True)
    finally:
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def bring_up(folder: Path) -> Path:
    """Starts the daemons. Returns the path of slurm.conf when both nodes are idle."""
    host = socket.gethostname().split(".")[0]
    ports = free_ports(2 * NODES + 1)
    nodes = []
    for i in range(1, 2 * NODES + 1):
        address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]}"
        nodes.append(f"NodeName=n{i} {address} CPUs=2 RealMemory=8000")
    text = CONF.format(
        first_job=random.randrange(1, 60_000),
        host=host,
        ports=ports,
        folder=folder,
        nodes="\n".join(nodes),
        partition=f"Nodes=n[1-{NODES}] MaxTime=INFINITE State=UP",
        cancelling=CANCELLING,
        aside=ASIDE,
        nodes_aside=f"Nodes=n[{NODES + 1}-{2 * NODES}] MaxTime=INFINITE State=UP",
        scheduler=",".join(f"{key}={value}" for key, value in SCHEDULER.items()),
    )
    conf = folder / "slurm.conf"
    conf.write_text(text)
    os.environ["SLURM_CONF"] = str(conf)
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    start(
        folder,
        "munged",
        "--foreground",
        f"--socket={munge}/socket",
        f"--key-file={munge}/key",
        f"--pid-file={munge}/pid",
        f"--log-file={munge}/log",
        f"--seed-file={munge}/seed",
        "--num-threads=2",
    )
    wait_until((munge / "socket").exists, "munged has not opened its socket", folder)
    start(folder, "slurmctld", "-D", "-c")
    for i in range(1, 2 * NODES + 1):
        (folder / f"spool.n{i}").mkdir()
        start(folder, "slurmd", "-D", "-N", f"n{i}")
    wait_until(lambda: idle() == NODES, "its nodes have not come up", folder)
    return conf


def start(folder: Path, *command: str) -> None:
    """Starts a daemon that ends with this process."""
    libc = ctypes.CDLL(None)
    with (folder / f"{command[0]}.out").open("a") as out:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )


def idle() -> int:
    """Number of idle nodes."""
    result = subprocess.run(
        ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if result.returncode:
        return 0
    return int(result.stdout.strip() or 0)


def wait_until(condition, otherwise: str, folder: Path) -> None:
    """Waits for a condition; its error contains the ends of all logs."""
    end = time.monotonic() + UP_S - 10
    while not condition():
        if time.monotonic() > end:
            logs = []
            for path in sorted(folder.glob("*.log")):
                logs += path.read_text(errors="replace").splitlines()[-3:]
            raise RuntimeError(f"{otherwise}: {' | '.join(logs)}")
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Different ports that are free now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def end_descendants() -> None:
    """Ends all children until none is left: the children of ended ones become children."""
    end = time.monotonic() + DOWN_S
    children = child_pids()
    while children and time.monotonic() < end:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
        children = child_pids()


def child_pids() -> list[int]:
    """Pids of this process's children."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


if __name__ == "__main__":
    keep()
