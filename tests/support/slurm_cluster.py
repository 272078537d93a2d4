"""A throw-away SLURM on this machine: two virtual nodes, no accounting, nothing left when it ends.

python tests/support/slurm_cluster.py    brings one up, says how to reach it, and ends it with its standard input (Ctrl-D)
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
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
REQUIRED = "EVSPAN_REQUIRE_SLURM"  # set: a missing cluster fails the tests instead of skipping them
NODES = 2
UP_S, DOWN_S = 60, 20
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
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
# Works in a container: no cgroups, no binding to cores, which two virtual nodes share.
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
SchedulerParameters=bf_interval=1,bf_resolution=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
KillWait=2
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=n[1-{count}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    conf: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def ask(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=30
        ).stdout

    def jobs(self) -> dict[str, str]:
        """State by id, of the tasks that SLURM still knows, in the order of submission."""
        told = self.ask(
            "squeue", "--noheader", "--array", "--states=all", "--sort=i", "--format=%i %T"
        ).split()
        return dict(zip(told[::2], told[1::2], strict=True))

    def end_jobs(self) -> None:
        self.ask("scancel", "--user=root")
        end = time.monotonic() + DOWN_S
        while self.ask("squeue", "--noheader"):
            assert time.monotonic() < end, "cancelled jobs go on"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Ends with the tests' process, however that ends: the process that keeps it reads from a pipe."""
    if missing := unavailable():
        reason = f"no throw-away SLURM: {missing}"
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(reason)
    keeper = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # Ctrl-C is for the tests, which then end it
    assert keeper.stdin
    assert keeper.stdout
    try:
        ready, _, _ = select.select([keeper.stdout], [], [], UP_S)
        line = keeper.stdout.readline().strip() if ready else ""
        if not line.startswith("export SLURM_CONF="):
            pytest.fail(f"the throw-away SLURM has not come up: {line or 'it says nothing'}")
        yield Cluster(Path(line.partition("=")[2]))
    finally:
        keeper.stdin.close()
        try:
            keeper.wait(DOWN_S + 10)
        finally:
            keeper.kill()


def unavailable() -> str:
    """What keeps this machine from it, and the remedy; nothing if nothing does."""
    if missing := [c for c in COMMANDS if shutil.which(c, path=PATH) is None]:
        return f"{', '.join(missing)} not found; as root: {INSTALL}"
    if os.geteuid() != 0:
        return "it needs root"
    return ""


# -- the process that keeps it -----------------------------------------------------------------------------------
def keep() -> None:
    """Bring a cluster up, wait for the end of standard input or a signal, take it down."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what daemons leave behind is ours, to be ended
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    os.environ["PATH"] = PATH
    folder = Path(
        tempfile.mkdtemp(prefix="evspan-slurm-")
    )  # not below pytest's: munge wants folders that all may enter
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
    """The path of its slurm.conf, when both nodes wait for work."""
    host, ports, conf = (
        socket.gethostname().split(".")[0],
        free_ports(NODES + 1),
        folder / "slurm.conf",
    )
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=2 RealMemory=8000"
        for i in range(1, NODES + 1)
    )
    first_job = random.randrange(1, 60_000)
    conf.write_text(
        CONF.format(
            first_job=first_job, host=host, ports=ports, folder=folder, nodes=nodes, count=NODES
        )
    )
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
    for i in range(1, NODES + 1):
        (folder / f"spool.n{i}").mkdir()
        start(folder, "slurmd", "-D", "-N", f"n{i}")
    wait_until(lambda: idle() == NODES, "its nodes have not come up", folder)
    return conf


def start(folder: Path, *command: str) -> None:
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
    done = subprocess.run(
        ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def wait_until(condition, otherwise: str, folder: Path) -> None:
    end = time.monotonic() + UP_S - 10
    while not condition():
        if time.monotonic() > end:
            logs = [
                line
                for path in sorted(folder.glob("*.log"))
                for line in path.read_text(errors="replace").splitlines()[-3:]
            ]
            raise RuntimeError(f"{otherwise}: {' | '.join(logs)}")
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            with closing(s):
                pass


def end_descendants() -> None:
    """Again and again: ended ones hand their children to this process."""
    end = time.monotonic() + DOWN_S
    while (
        children := [
            int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        ]
    ) and time.monotonic() < end:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


if __name__ == "__main__":
    keep()
