"""Runs the checks of `evspan doctor`: this machine, SLURM's settings, the tasks of a job."""

import os
import shutil
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.launch.doctor import folder, machine, slurm
from evspan.launch.doctor.finding import FAIL, WARN, Check, Finding, run_checks
from evspan.launch.doctor.job import Job, run_job
from evspan.pipeline.parallel.rank_env import started_as_rank

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID")  # mark a process as one of several ranks
HERE = "here"
IN_JOB = "in a job"


@dataclass(frozen=True)
class DoctorOptions:
    """What to check.

    Attributes:
        folder: the run folder.
        partition: empty for the cluster's default.
        nodes: number of nodes that a job checks; 0 for no job.
        ranks_per_node, gpus_per_node, cpus_per_task: 0 for the default.
        account: account that the job is charged to; may be empty.
        time_min: time limit of the job in minutes.
        srun_options: further options of srun.
        dataset: shards that the nodes read; None: none.
        overrides: of the config whose training is measured on them.
    """

    folder: Path = Path(".")
    partition: str = ""
    nodes: int = 0
    ranks_per_node: int = 0
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    account: str = ""
    time_min: int = 10
    srun_options: Sequence[str] = ()
    dataset: Path | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_minimum("--nodes", self.nodes, 0)
        _check_minimum("--ranks-per-node", self.ranks_per_node, 0)
        _check_minimum("--gpus-per-node", self.gpus_per_node, 0)
        _check_minimum("--cpus-per-task", self.cpus_per_task, 0)
        _check_minimum("--time", self.time_min, 1)
        needs_job = (
            self.ranks_per_node,
            self.gpus_per_node,
            self.cpus_per_task,
            self.account,
            self.srun_options,
            self.dataset,
        )
        if not self.nodes and any(needs_job):
            raise UserError(
                "--ranks-per-node, --gpus-per-node, --cpus-per-task, --account, --dataset and "
                "options of srun apply to a job; give --nodes, too"
            )
        if self.overrides and self.dataset is None:
            raise UserError(
                "--config describes the training that is measured on --dataset DIR; give that, too"
            )
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise UserError(
                f"--ranks-per-node is {self.ranks_per_node}, --gpus-per-node {self.gpus_per_node}; "
                "each rank needs one"
            )

    def job(self) -> Job:
        """The job that runs the checks on the nodes."""
        ranks_per_node = self.ranks_per_node or self.gpus_per_node or 1
        dataset = self.dataset and self.dataset.absolute()
        srun_options = self._all_srun_options()
        return Job(self.nodes, ranks_per_node, srun_options, dataset, self.overrides)

    def _all_srun_options(self) -> list[str]:
        options = [f"--time={self.time_min}"]
        if "SLURM_JOB_ID" in os.environ:  # a step of that job, at the same time as this one
            options = ["--overlap"]
        if self.partition:
            options.append(f"--partition={self.partition}")
        if self.account:
            options.append(f"--account={self.account}")
        if self.gpus_per_node:
            options.append(f"--gpus-per-node={self.gpus_per_node}")
        if self.cpus_per_task:
            options.append(f"--cpus-per-task={self.cpus_per_task}")
        return [*options, *self.srun_options]


def _check_minimum(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{option} is {value}; give {least} or more")


class Section(NamedTuple):
    """The start of a group of findings. where: HERE or IN_JOB."""

    where: str
    title: str


def run_doctor(
    options: DoctorOptions, on_srun_line: Callable[[str], object]
) -> Generator[Section | Finding, None, None]:
    """Runs all checks; each finding follows the section that it belongs to.

    Args:
        on_srun_line: called with each line that srun writes to stderr.

    Raises:
        UserError: this process is one of several ranks.
    """
    _refuse_ranks()
    yield Section(HERE, f"{HERE}, on {socket.gethostname()}")
    settings = []
    for finding in _check_slurm(options):
        settings.append(finding)
        yield finding
    opened, work = folder.open_folder(options.folder)
    yield opened
    try:
        versions = yield from _check_machine(work)
        if options.nodes:
            yield from _check_job(options, settings, work, versions, on_srun_line)
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _refuse_ranks() -> None:
    if started_as_rank(os.environ):
        raise UserError(
            "evspan doctor starts its tasks itself; run it without torchrun, and under srun as one "
            "task (-n1)"
        )


def _check_slurm(options: DoctorOptions) -> Iterator[Finding]:
    if slurm.is_installed():
        yield from slurm.check_settings(options.partition, options.nodes)
        return
    yield Finding(
        "SLURM",
        FAIL if options.nodes or options.partition else WARN,
        "none here: sbatch, srun and the others are not on the PATH",
        "run this where jobs are submitted, such as a login node; `evspan train` needs no SLURM",
    )


def _check_machine(work: Path | None) -> Generator[Finding, None, Finding]:
    """The checks of this machine; returns the versions.

    work: None if the folder cannot be written.
    """
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    # Importing takes long, so both processes run during the other checks.
    deepspeed = machine.start_process(machine.IMPORT_DEEPSPEED, environment)
    probe = machine.start_process(machine.PROBE, environment)
    findings = {}
    for finding in run_checks({**_folder_checks(work), **machine.CHECKS}):
        yield finding
        findings[finding.check] = finding
    gpus = findings["GPUs"].values.get("gpus", 0)
    yield from machine.torch_and_all_reduce(probe, gpus)
    yield from machine.deepspeed_import(deepspeed)
    return findings["versions"]


def _folder_checks(work: Path | None) -> Mapping[str, Check]:
    if work is None:
        return {}
    return {
        "free space": lambda: folder.free_space(work),
        "rename": lambda: folder.atomic_replacement(work / "renamed-here"),
        "clock": lambda: folder.file_clock(work),
    }


def _check_job(
    options: DoctorOptions,
    settings: Sequence[Finding],
    work: Path | None,
    versions: Finding,
    on_srun_line: Callable[[str], object],
) -> Iterator[Section | Finding]:
    """The checks of the nodes. settings: the findings on SLURM. versions: those of this machine."""
    job = options.job()
    yield Section(IN_JOB, f"{IN_JOB}, {plural(job.nodes, 'node')} x {job.ranks_per_node}")
    failed = {finding.check for finding in settings if finding.grade == FAIL}
    if work is None or failed & {"SLURM", "partition"}:
        yield Finding("tasks", FAIL, "no job was started", "correct what has failed above first")
        return
    token = (work / folder.TOKEN).read_text()
    yield from run_job(job, work, token, versions, on_srun_line)
