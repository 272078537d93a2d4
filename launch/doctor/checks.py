"""`evspan doctor`: would a run work here, and on the nodes of this cluster? Each check with what it found and what to do."""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.doctor import folder, machine, slurm
from evspan.launch.doctor.finding import FAIL, GRADES, PASS, WARN, Finding, ask
from evspan.launch.doctor.job import Job
from evspan.launch.doctor.job import run as run_job

RANK = ("RANK", "WORLD_SIZE", "SLURM_PROCID")  # what makes a process one of several ranks
IN_JOB, HERE = "in a job", "here"

DESCRIPTION = """Checks this machine, SLURM's settings where SLURM is there and, with --nodes, the nodes of a job: folder, limits,
network, clocks, software, devices, and an all-reduce over the job's tasks. Exit code 0 if no check failed."""
EXAMPLES = """examples:
  evspan doctor --folder runs                                        # this machine, and SLURM's settings
  evspan doctor --folder runs --partition gpu --nodes 2 --gpus-per-node 4
  evspan doctor --nodes 2 -- --qos=debug --constraint=a100           # further options are srun's"""


class Report:
    """Tells each finding as it comes, or all in the end as JSON."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.rows = as_json, list[tuple[str, Finding]]()

    def title(self, text: str) -> None:
        if not self.as_json:
            print(f"{text}\n", flush=True)

    def add(self, where: str, finding: Finding) -> None:
        self.rows.append((where, finding))
        if self.as_json:
            return
        print(f"  {finding.grade}  {finding.check:18}{finding.found}", flush=True)
        if finding.grade != PASS and finding.remedy:
            print(f"        {'':18}-> {finding.remedy}", flush=True)

    def end(self) -> int:
        """The exit code."""
        counts = {grade: sum(f.grade == grade for _, f in self.rows) for grade in GRADES}
        if self.as_json:
            checks = [
                {
                    "where": where,
                    "check": f.check,
                    "grade": f.grade,
                    "found": f.found,
                    "remedy": f.remedy if f.grade != PASS else "",
                }
                for where, f in self.rows
            ]
            print(
                json.dumps(
                    {"passed": not counts[FAIL], "checks": checks}, indent=1, ensure_ascii=False
                ),
                flush=True,
            )
        else:
            print(
                f"\ndoctor: {counts[FAIL]} failed, {counts[WARN]} to look at, {counts[PASS]} passed",
                flush=True,
            )
        return int(counts[FAIL] > 0)


def doctor(given: argparse.Namespace, report: Report) -> int:
    report.title(f"{HERE}, on {socket.gethostname()}")
    settings = _settings(given, report)
    opened, work = folder.open_folder(given.folder)
    report.add(HERE, opened)
    try:
        versions = _machine(report, work)
        if given.nodes:
            blocked = any(f.grade == FAIL and f.check in ("SLURM", "partition") for f in settings)
            _in_job(given, report, None if blocked else work, versions)
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
    return report.end()


def _settings(given: argparse.Namespace, report: Report) -> list[Finding]:
    if slurm.there():
        findings = [*slurm.check(given.partition, given.nodes)]
    else:
        wanted = given.nodes or given.partition
        findings = [
            Finding(
                "SLURM",
                FAIL if wanted else WARN,
                "none here: sbatch, srun and the others are not on the PATH",
                "run this where jobs are submitted, such as a login node; `evspan train` needs no SLURM",
            )
        ]
    for finding in findings:
        report.add(HERE, finding)
    return findings


def _machine(report: Report, work: Path | None) -> Finding:
    """Ask this machine; the versions."""
    alone = {name: value for name, value in os.environ.items() if name not in RANK}
    importing, probing = (
        machine.start(machine.IMPORT_DEEPSPEED, alone),
        machine.start(machine.PROBE, alone),
    )
    in_folder = (
        {
            "free space": lambda: folder.free_space(work),
            "rename": lambda: folder.renaming(work / "renamed-here"),
            "clock": lambda: folder.file_clock(work),
        }
        if work
        else {}
    )
    found = {}
    for finding in ask({**in_folder, **machine.CHECKS}):
        report.add(HERE, finding)
        found[finding.check] = finding
    for finding in machine.torch_and_all_reduce(probing, found["GPUs"].values.get("gpus", 0), 1):
        report.add(HERE, finding)
    report.add(HERE, machine.deepspeed_import(importing))
    return found["versions"]


def _in_job(
    given: argparse.Namespace, report: Report, work: Path | None, versions: Finding
) -> None:
    if work is None:
        report.add(
            IN_JOB, Finding("tasks", FAIL, "no job was started", "mend what has failed above first")
        )
        return
    job = Job(given.nodes, given.ranks_per_node or given.gpus_per_node or 1, _srun_options(given))
    report.title(f"\n{IN_JOB}, {job.nodes} node{'s' * (job.nodes > 1)} x {job.ranks_per_node}")
    token = (work / folder.TOKEN).read_text()
    for finding in run_job(
        job, work, token, versions, lambda line: print(line, file=sys.stderr, flush=True)
    ):
        report.add(IN_JOB, finding)


def _srun_options(given: argparse.Namespace) -> list[str]:
    options = [
        f"--{name}={value}"
        for name, value in (("partition", given.partition), ("account", given.account))
        if value
    ]
    options += [f"--gpus-per-node={given.gpus_per_node}"] if given.gpus_per_node else []
    inside = "SLURM_JOB_ID" in os.environ  # a step of that job, beside the one that this may be in
    return [*(["--overlap"] if inside else [f"--time={given.time}"]), *options, *given.srun]


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """By an exception: the job is to end, too, and the folder to go."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(given: argparse.Namespace) -> None:
    for name, least in (("nodes", 0), ("ranks_per_node", 0), ("gpus_per_node", 0), ("time", 1)):
        if (value := getattr(given, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if not given.nodes and (
        given.ranks_per_node or given.gpus_per_node or given.account or given.srun
    ):
        raise UserError(
            "--ranks-per-node, --gpus-per-node, --account and options of srun are of a job; give --nodes, too"
        )
    if given.gpus_per_node and given.ranks_per_node > given.gpus_per_node:
        raise UserError(
            f"--ranks-per-node is {given.ranks_per_node}, --gpus-per-node {given.gpus_per_node}; each rank needs one"
        )
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() or int(
        os.environ.get("SLURM_STEP_NUM_TASKS", 1)
    ) > 1:
        raise UserError(
            "evspan doctor starts its tasks itself; run it without torchrun, and under srun as one task (-n1)"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan doctor",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where runs are to be (default: this one)",
    )
    parser.add_argument("--partition", default="", metavar="NAME", help="default: the cluster's")
    parser.add_argument(
        "--nodes", type=int, default=0, metavar="N", help="check so many in a job (default: none)"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, default=0, metavar="N", help="default: one per GPU, or one"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="N",
        help="that the job asks for (default: none)",
    )
    parser.add_argument("--account", default="", metavar="NAME", help="that the job is charged to")
    parser.add_argument(
        "--time", type=int, default=10, metavar="MINUTES", help="limit of the job (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("srun", nargs="*", metavar="-- OPTION", help="further options of srun")
    return parser


def main(argv: list[str] | None = None) -> None:
    given, code = _parser().parse_args(argv), 0

    def run() -> None:
        nonlocal code
        check(given)
        with _leaving_on_sigterm():
            code = doctor(given, Report(given.json))

    run_command(run)
    sys.exit(code)


if __name__ == "__main__":
    main()
