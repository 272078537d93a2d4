"""Runs the checks of a machine in every task of a SLURM job.

python -m evspan.launch.doctor.job WORK TOKEN [NODES RANKS_PER_NODE DATASET [KEY=VALUE ...]]

runs one task. WORK is a folder in the run folder; TOKEN is the contents of its file `token`. With a
dataset, the first task of each node measures how fast it is read and what training consumes.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread

from evspan.launch.doctor import folder, machine
from evspan.launch.doctor.data_speed import data_findings, start_measuring
from evspan.launch.doctor.finding import (
    FAIL,
    PASS,
    WARN,
    Finding,
    error_summary,
    python_command,
    run_checks,
    shorten,
)
from evspan.launch.doctor.verdict import LAST_CHECK, TaskFinding, judge
from evspan.pipeline.parallel.rank_env import first_host, rank_info

LINE_PREFIX = "evspan-doctor "  # marks a task's findings on its standard output
ANY_PORT = 9  # nothing is sent to it


@dataclass(frozen=True)
class Job:
    """The shape of the job.

    Attributes:
        srun_options: further options of srun.
        dataset: that is read on all nodes; None: none.
        overrides: of the config whose training consumes it.
    """

    nodes: int
    ranks_per_node: int
    srun_options: Sequence[str] = ()
    dataset: Path | None = None
    overrides: Sequence[str] = ()

    @property
    def size(self) -> int:
        """Number of tasks."""
        return self.nodes * self.ranks_per_node


# -- a task ----------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> None:
    """Prints the findings of this task, each as a line of JSON."""
    work, token, *data = argv
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank = int(os.environ["SLURM_PROCID"])
    for finding in check_task(Path(work), token, os.environ, data):
        # srun may interleave lines of several tasks if they are longer than about 1 KB.
        short = replace(finding, message=shorten(finding.message), remedy=shorten(finding.remedy))
        line = json.dumps({"rank": rank, "node": node, **asdict(short)}, ensure_ascii=False)
        print(LINE_PREFIX + line, flush=True)


def check_task(
    work: Path, token: str, env: Mapping[str, str], data: Sequence[str] = ()
) -> Iterator[Finding]:
    """The checks of one task, in step with the others.

    data: nodes, ranks per node, dataset and overrides of the measurement of the dataset, or empty.
    """
    info = rank_info(env)
    gpus = 0
    for finding in run_checks(machine.CHECKS):
        yield finding
        gpus = finding.values.get("gpus", gpus)
    own_address = _address_towards(env.get("SLURM_LAUNCH_NODE_IPADDR", ""))
    shared_folder, addresses = folder.exchange_notes(work, token, info.rank, info.size, own_address)
    yield shared_folder
    if shared_folder.grade != PASS:
        message = "not tried: the tasks do not see each other's files in the shared folder"
        yield Finding(LAST_CHECK, FAIL, message, "correct the shared folder first")
        return
    is_writer = info.rank == 0
    yield from run_checks(
        {
            "rename": lambda: folder.atomic_replacement(work / "renamed", write=is_writer),
            "clock": lambda: folder.file_clock(work),
        }
    )
    master_address, variables = check_master_address(env, addresses[0])
    yield master_address
    probe = machine.start_process(machine.PROBE, {**env, **variables})
    if info.local == 0:  # once per node
        yield from machine.deepspeed_import(machine.start_process(machine.IMPORT_DEEPSPEED, env))
    last = machine.torch_and_all_reduce(probe, gpus)
    if data and info.local == 0 and last[-1].grade == PASS:
        nodes, ranks_per_node, dataset, *overrides = data
        process = start_measuring(work, int(nodes), Path(dataset), overrides, env)
        yield from data_findings(process, int(ranks_per_node), int(nodes))
    yield from last


def _address_towards(launcher: str) -> str:
    """This machine's address on the way to the launching node.

    Empty if a batch script started the tasks: rank 0 is then on the launching node.
    """
    if not launcher:
        return ""
    family = socket.AF_INET6 if ":" in launcher else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect((launcher, ANY_PORT))
        except OSError:
            return ""
        return str(udp.getsockname()[0])


def check_master_address(
    env: Mapping[str, str], rank_0_address: str
) -> tuple[Finding, dict[str, str]]:
    """Checks that the name of the first node can be resolved on this machine.

    Args:
        rank_0_address: used if the name cannot be resolved; empty if unknown. A run gets it from
            its batch script.

    Returns:
        The finding, and the variables that the ranks need to find rank 0.
    """
    configured = env.get("MASTER_ADDR")
    name = configured or first_host(env.get("SLURM_STEP_NODELIST", ""))
    try:
        infos = socket.getaddrinfo(name, None)
    except OSError as error:
        message = f"{name} cannot be resolved here ({error.strerror})"
    else:
        addresses = sorted({str(info[4][0]) for info in infos})
        return Finding("MASTER_ADDR", PASS, f"{name} is {' '.join(addresses)}"), {}
    if configured or not rank_0_address:
        remedy = "set MASTER_ADDR to the address of the first node"
        return Finding("MASTER_ADDR", FAIL, message, remedy), {}
    message += f"; the node's address {rank_0_address} is used instead"
    remedy = "runs do the same; better make the nodes' names resolvable (DNS, /etc/hosts)"
    return Finding("MASTER_ADDR", WARN, message, remedy), {"MASTER_ADDR": rank_0_address}


# -- the process that starts the tasks -------------------------------------------------------------
def run_job(
    job: Job,
    work: Path,
    token: str,
    versions: Finding,
    on_srun_line: Callable[[str], object],
) -> list[Finding]:
    """Runs the tasks and combines their findings.

    Args:
        versions: the versions on this machine.
        on_srun_line: called with each line that srun writes to stderr, for example while the job
            waits.
    """
    srun_lines: list[str] = []
    task_findings: list[TaskFinding] = []

    def read_stderr(stream: Iterable[str]) -> None:
        for line in stream:
            srun_lines.append(line)
            on_srun_line(line.rstrip())

    process = subprocess.Popen(
        _srun_command(job, work, token),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stdout
    assert process.stderr
    reader = Thread(target=read_stderr, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        for line in process.stdout:
            if line.startswith(LINE_PREFIX):
                task_findings.append(_parse_finding(line))
    except BaseException:
        process.terminate()  # srun cancels the job
        raise
    finally:
        process.wait()
    reader.join(5)
    unreadable = folder.count_unreadable_notes(work, token, job.size)
    return judge(task_findings, job.size, versions, error_summary(srun_lines), unreadable)


def _srun_command(job: Job, work: Path, token: str) -> list[str]:
    return [
        "srun",
        "--job-name=evspan-doctor",
        f"--nodes={job.nodes}",
        f"--ntasks={job.size}",
        f"--ntasks-per-node={job.ranks_per_node}",
        "--export=ALL",  # as in a batch script of ours, whatever SLURM_EXPORT_ENV is
        "--input=none",
        "--quit-on-interrupt",
        "--kill-on-bad-exit=1",
        "--wait=0",  # tasks without a dataset to measure end long before the others
        *job.srun_options,
        *python_command("evspan.launch.doctor.job", str(work), token, *_data_arguments(job)),
    ]


def _data_arguments(job: Job) -> list[str]:
    if job.dataset is None:
        return []
    return [str(job.nodes), str(job.ranks_per_node), str(job.dataset), *job.overrides]


def _parse_finding(line: str) -> TaskFinding:
    fields = json.loads(line.removeprefix(LINE_PREFIX))
    rank = fields.pop("rank")
    node = fields.pop("node")
    return TaskFinding(rank, node, Finding(**fields))


if __name__ == "__main__":
    main(sys.argv[1:])
