"""`evspan prep`, with recordings prepared by a SLURM job array where cluster=slurm asks for it."""

import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.cluster import PrepClusterConfig
from evspan.launch.slurm.prep_task import Group, Results, Run, balanced, number_of_tasks

FOLDER = "slurm"  # beside the part files, and removed with them when all is done
REMEDY = (
    "Correct cluster.partition, account, qos, constraint, timeout_min, cpus_per_task or mem_gb; "
    "cluster.dry_run=true shows the script, sinfo the partitions"
)
END_S = 150.0  # for a cancelled task: Submitit's leave SIGTERM unheard, SIGKILL comes after SLURM's KillWait


def on_slurm(
    jobs: list[Any], run: Run, config: PrepClusterConfig, here: Callable[..., Results]
) -> Results:
    """Each job (of evspan.data_prep.workers) with a function that gives or raises what became of it, as SLURM's tasks tell.

    Args:
        run: what a task does with a job. here: does it with several, side by side.
    Raises:
        ConfigError: SLURM is not there or refuses the array. UserError: another process has an array for the same output.
        SystemExit: the batch script is printed (cluster.dry_run).
    Left before its end, for whatever reason, it cancels the array.
    """
    if not jobs:
        return
    from evspan.launch.slurm import client as slurm
    from evspan.launch.slurm.prep_wait import Watch, say  # Submitit takes a moment to import

    parts = jobs[0].part.absolute().parents[1]
    folder, told = parts / FOLDER, parts / FOLDER / "told"
    name = f"evspan-prep-{hashlib.sha256(os.fsencode(parts.resolve())).hexdigest()[:8]}"
    comment = f"process {os.getpid()} on {socket.gethostname()}"
    sizes = [job.source.path.stat().st_size for job in jobs]
    dealt = balanced(sizes, number_of_tasks(sizes, config))
    if config.dry_run:
        _print_and_leave(
            slurm.script_of(_executor(name, comment, folder, config), len(dealt)),
            jobs,
            sizes,
            dealt,
        )
    slurm.require_commands()
    _end_orphans(name)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's
    told.mkdir(parents=True)
    groups = [
        Group({i: jobs[i] for i in indices}, run, here, config.cpus_per_task, told)
        for indices in dealt
    ]
    with _left_on_signals():
        try:
            array = slurm.submit_array(_executor(name, comment, folder, config), groups, REMEDY)
            ids = [task.job_id for task in array]
            say(
                f"SLURM job {ids[0].split('_')[0]}: {len(jobs)} to prepare in {len(groups)} tasks; logs in {folder}"
            )
            watch = Watch(
                name, told, dict(enumerate(jobs)), ids, dealt, [task.paths.stderr for task in array]
            )
            yield from watch.results()
            _let_end([task.paths.result_pickle for task in array if task.job_id not in watch.ended])
        except ConfigError:  # there is no job
            raise
        except BaseException:
            _cancel(name)
            raise


def _executor(name: str, comment: str, folder: Path, config: PrepClusterConfig) -> Any:
    from evspan.launch.slurm.client import Executor, python_path_lines
    from evspan.launch.slurm.parameters import sbatch_parameters, setup_lines

    python = shlex.quote(config.python or sys.executable)
    executor = Executor(folder, max_num_timeout=config.max_num_timeout, python=python)
    executor.update_parameters(
        job_name=name,
        comment=comment,
        ntasks_per_node=1,
        setup=[*setup_lines(config), *python_path_lines()],
        **sbatch_parameters(config),
    )
    return executor


def _print_and_leave(
    script: str, jobs: list[Any], sizes: list[int], dealt: list[list[int]]
) -> NoReturn:
    print(script)
    for number, indices in enumerate(dealt):
        print(
            f"# task {number}, {sum(sizes[i] for i in indices) / 1e9:.2f} GB: {', '.join(jobs[i].source.key for i in indices)}"
        )
    sys.stdout.flush()
    sys.exit(0)


def _end_orphans(name: str) -> None:
    """Cancel what a killed run has left in SLURM's queue: two tasks would write the same parts.

    Raises:
        UserError: it may not be an orphan. (The lock on the output tells two runs apart only where its file system does.)
    """
    from evspan.launch.slurm.client import cancel, queue, wait_until_gone
    from evspan.launch.slurm.prep_wait import say

    alive = [task for task in queue(name) if task.alive]
    for task in alive:
        process = re.fullmatch(r"process (\d+) on (\S+)", task.comment)
        if process and (process[2] != socket.gethostname() or _runs(int(process[1]))):
            raise UserError(
                f"SLURM job {task.job} prepares into the same output for {task.comment}. Wait until it is done; if "
                f"that process is gone, run scancel {task.job} and then the same again"
            )
    if alive:
        say(
            f"cancelling SLURM job {alive[0].job}, left by a run that was killed; what it has done is kept"
        )
        cancel(name)
        if not wait_until_gone(name, END_S):
            raise UserError(
                f"SLURM job {alive[0].job} was cancelled {END_S:.0f} s ago and has not ended. Run the same again "
                f"when squeue --name={name} lists nothing"
            )


def _runs(pid: int) -> bool:
    return pid != os.getpid() and Path(f"/proc/{pid}").exists()


def _let_end(results: list[Path]) -> None:
    """Tasks that have told everything write Submitit's result yet, into a folder that is about to be removed."""
    from evspan.launch.slurm.prep_wait import GRACE_S

    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and not all(path.exists() for path in results):
        time.sleep(0.1)


def _cancel(name: str) -> None:
    from evspan.launch.slurm.client import cancel
    from evspan.launch.slurm.prep_wait import say

    try:
        cancel(name)
    except UserError as error:
        say(f"{error}. The SLURM job may go on; to end it: scancel --name={name}")
    else:
        say("cancelled the SLURM job; what is done is kept for the next run")


@contextmanager
def _left_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP, of a terminal that goes away, leave by an exception as Ctrl-C does. What nohup ignores stays so."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    if current_thread() is not main_thread():  # where Python lets nobody set handlers
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    changed = {s: handler for s, handler in before.items() if handler is signal.SIG_DFL}
    for s in changed:
        signal.signal(s, leave)
    try:
        yield
    finally:
        for s, handler in changed.items():
            signal.signal(s, handler)
