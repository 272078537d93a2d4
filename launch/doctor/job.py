"""The checks of a machine by every task of a SLURM job.

python -m evspan.launch.doctor.job WORK TOKEN     a task: WORK is a folder in that of the runs, TOKEN what the file `token` in it holds
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from evspan.launch.doctor import folder, machine
from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding, ask, complaint, module, one_line
from evspan.launch.doctor.verdict import LAST, Told, judge

MARK = "evspan-doctor "  # before what a task tells on its standard output


class Job(NamedTuple):
    nodes: int
    ranks_per_node: int
    options: Sequence[str] = ()  # further ones of srun


# -- a task --------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> None:
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank = int(os.environ["SLURM_PROCID"])
    for finding in task(Path(argv[0]), argv[1], os.environ):
        # A line of its own and under 1 KB: srun may put longer ones of several tasks into one another.
        shown = finding._replace(found=one_line(finding.found), remedy=one_line(finding.remedy))
        print(MARK + json.dumps([rank, node, *shown], ensure_ascii=False), flush=True)


def task(work: Path, token: str, env: Mapping[str, str]) -> Iterator[Finding]:
    from evspan.pipeline.parallel.rank_env import place

    rank, size, local, local_size, _, _ = place(env)
    seen = 0
    for finding in ask(machine.CHECKS):
        yield finding
        seen = finding.values.get("gpus", seen)
    met, notes = folder.meet(
        work, token, rank, size, _address_towards(env.get("SLURM_LAUNCH_NODE_IPADDR", ""))
    )
    yield met
    if met.grade != PASS:
        yield Finding(
            LAST, FAIL, "not tried: the tasks have not met in the shared folder", "mend that first"
        )
        return
    yield from ask(
        {
            "rename": lambda: folder.renaming(work / "renamed", write=rank == 0),
            "clock": lambda: folder.file_clock(work),
        }
    )
    first, variables = first_rank(env, notes[0])
    yield first
    probing = machine.start(machine.PROBE, {**env, **variables})
    if local == 0:  # once per node
        yield machine.deepspeed_import(machine.start(machine.IMPORT_DEEPSPEED, env))
    yield from machine.torch_and_all_reduce(probing, seen, local_size)


def _address_towards(launcher: str) -> str:
    """This machine's on the way to that one; where a batch script started the tasks, rank 0 is there itself."""
    family = socket.AF_INET6 if ":" in launcher else socket.AF_INET
    if not launcher:
        return ""
    with socket.socket(family, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect((launcher, 9))  # sends nothing
        except OSError:
            return ""
        return str(any_socket.getsockname()[0])


def first_rank(env: Mapping[str, str], address: str) -> tuple[Finding, dict[str, str]]:
    """Whether the first node's name means something here, and the variables by which ranks find each other if it does not.

    address: rank 0's, which a run has from its batch script.
    """
    from evspan.pipeline.parallel.rank_env import first_host

    given = env.get("MASTER_ADDR")
    name = given or first_host(env.get("SLURM_STEP_NODELIST", ""))
    try:
        found = sorted({str(told[4][0]) for told in socket.getaddrinfo(name, None)})
        return Finding("MASTER_ADDR", PASS, f"{name} is {' '.join(found)}"), {}
    except OSError as error:
        why = f"{name} means nothing here ({error.strerror})"
    if given or not address:
        return Finding(
            "MASTER_ADDR", FAIL, why, "set MASTER_ADDR to the address of the first node"
        ), {}
    return Finding(
        "MASTER_ADDR",
        WARN,
        f"{why}; the node's address {address} is used instead",
        "runs do the same; better have the nodes' names resolved (DNS, /etc/hosts)",
    ), {"MASTER_ADDR": address}


# -- whoever starts them -------------------------------------------------------------------------------------------
def run(
    job: Job, work: Path, token: str, here: Finding, say: Callable[[str], object]
) -> list[Finding]:
    """Start the tasks, wait for their end, judge.

    here: this machine's versions. say: gets what srun says, such as that the job waits.
    """
    size = job.nodes * job.ranks_per_node
    command = [
        "srun",
        "--job-name=evspan-doctor",
        f"--nodes={job.nodes}",
        f"--ntasks={size}",
        f"--ntasks-per-node={job.ranks_per_node}",
        "--input=none",
        "--quit-on-interrupt",
        "--kill-on-bad-exit=1",
        *job.options,
        *module("evspan.launch.doctor.job", str(work), token),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stdout
    assert process.stderr
    complaints: list[str] = []
    told: list[Told] = []

    def listen(stream: Iterator[str]) -> None:
        for line in stream:
            complaints.append(line)
            say(line.rstrip())

    listener = Thread(target=listen, args=(process.stderr,), daemon=True)
    listener.start()
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                rank, node, *finding = json.loads(line[len(MARK) :])
                told.append(Told(rank, node, Finding(*finding)))
    except BaseException:
        process.terminate()  # srun takes the job with it
        raise
    finally:
        process.wait()
    listener.join(5)
    return judge(told, size, here, complaint(complaints), folder.not_seen(work, token, size))


if __name__ == "__main__":
    main(sys.argv[1:])
