"""`evspan submit` and `evspan sweep`: runs as SLURM jobs, or one after the other on this machine (cluster=local)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.compose import compose_train, expanded, replaced, split_options
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.cluster import ClusterConfig, Scheduler
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import one_line, run_command, users_mistake
from evspan.launch.sweep.registry import SWEEP
from evspan.pipeline.history import append, read

SUBMIT_HELP = """evspan submit: one run as a SLURM job, over as many nodes as parallel.ranks needs

  evspan submit KEY=VALUE ...     the keys of `evspan train` (evspan train --help), and where: cluster=NAME, cluster.KEY=VALUE

  examples
      evspan submit experiment=gen4/3scale_baseline dataset.root=/data/gen4 run_dir=runs/tiny parallel.ranks=16 cluster=gpu_nodes
      evspan submit ... cluster.partition=gpu cluster.account=lab cluster.timeout_min=720 cluster.detach=true
      evspan submit ... cluster.dry_run=true          prints the batch script, submits nothing
      evspan submit ... cluster=local                 the same on this machine

  A run that reaches its time limit, is preempted, loses its node or a rank comes back by itself and continues from its newest
  checkpoint. It waits for the end and tells what happens; Ctrl-C leaves the job alone. cluster.detach=true returns at once.

  afterwards
      evspan status RUN | evspan logs RUN --follow | evspan cancel RUN | evspan report RUN

  keys: conf/schema/cluster.py explains them all
      cluster=slurm                  slurm | gpu_nodes | local, or a file of yours in FOLDER/cluster with --config-dir FOLDER
      cluster.partition, account, qos, constraint, exclude      left to the cluster's defaults when empty
      cluster.gpus_per_node=0        a rank each;  cluster.ranks_per_node=0: one per GPU, or one
      cluster.cpus_per_task=1  cluster.mem_gb=0 (per node)  cluster.timeout_min=240  cluster.signal_delay_s=120
      cluster.setup=["module load cuda"]  'cluster.environment=["NCCL_DEBUG=INFO"]'  'cluster.sbatch_args=["mail-type=END"]'
      cluster.container=none         apptainer | pyxis, with cluster.image=FILE
      cluster.array_parallelism=16        runs of a sweep at once
      cluster.max_retries=3           a run that fails so often in a row at the same step is given up
"""
SWEEP_HELP = """evspan sweep: many runs, one for each combination of the values that are given with commas

  evspan sweep run_dir=SWEEP KEY=A,B KEY=C,D KEY=VALUE ...        runs SWEEP/0, SWEEP/1, ..., as an array of SLURM

  examples
      evspan sweep run_dir=sweeps/lr dataset.root=/data/gen4 experiment=gen4/3scale_baseline optimizer.lr=1e-4,3e-4,1e-3 cluster=gpu_nodes
      evspan sweep run_dir=sweeps/lr ... cluster.array_parallelism=4 cluster.detach=true
      evspan sweep run_dir=sweeps/lr ... cluster=local            one after the other on this machine

  A run whose overrides are wrong fails alone. The same command again goes on with what is not done; with more values, the new
  ones are added. evspan status SWEEP, evspan report SWEEP show them all. Other keys: evspan submit --help
"""


@dataclass
class Planned:
    """A run that was asked for. config: None where `error` tells why it cannot be composed."""

    run: Path
    argv: list[str]
    overrides: list[str]
    config: TrainConfig | None
    error: str = ""


def submit(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(SUBMIT_HELP.strip())
        return
    run_command(lambda: _submit(argv))


def sweep(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(SWEEP_HELP.strip())
        return
    run_command(lambda: _sweep(argv))


def _submit(argv: list[str]) -> None:
    options, overrides = split_options(argv)
    if varied := [o for o, several in expanded(options, overrides)[1].items() if several]:
        raise UserError(
            f"{', '.join(varied)} has several values; for a run each: evspan sweep {' '.join(argv)}"
        )
    config = compose_train(options, overrides)
    _check(config)
    run = Path(config.run_dir)
    sys.exit(
        place([Planned(run, argv, overrides, config)], config.cluster, run, f"evspan-{run.name}")
    )


def _sweep(argv: list[str]) -> None:
    options, overrides = split_options(argv)
    combinations, several = expanded(options, overrides)
    varied = [key for key, more in several.items() if more]
    sys.exit(place_sweep(options, combinations, varied))


def place_sweep(
    options: Sequence[str], combinations: Sequence[Sequence[str]], varied: Sequence[str]
) -> int:
    """The exit code: 0 when all runs are done, or submitted and not waited for.

    combinations: the overrides of each run. varied: keys whose values differ between them, for people to tell runs apart.
    """
    # Where it goes is not a run's affair, so the first run that composes tells it.
    plans = [_planned(options, combination, varied) for combination in combinations]
    good = next((plan.config for plan in plans if plan.config), None)
    if good is None:
        raise ConfigError(
            f"none of the {len(plans)} runs can be composed; the first: {plans[0].error}"
        )
    folder = Path(good.run_dir)
    numbered(folder, plans)
    for plan in plans:
        plan.argv = [*options, *replaced(plan.argv, "run_dir", str(plan.run))]
    if not good.cluster.dry_run:
        for plan in plans:
            if plan.error:
                append(plan.run, "failed", step=0, message=plan.error, code=2)
                print(f"{plan.run}: {plan.error}", file=sys.stderr)
    code = place(
        [plan for plan in plans if plan.config], good.cluster, folder, f"evspan-{folder.name}"
    )
    return code or int(any(plan.error for plan in plans))


def _planned(options: Sequence[str], overrides: Sequence[str], varied: Sequence[str]) -> Planned:
    told = [o for o in overrides if o.partition("=")[0] in varied]
    try:
        config = compose_train(options, overrides)
        _check(config)
    except Exception as error:
        if not users_mistake(error):
            raise
        return Planned(Path(), list(overrides), told, None, one_line(error))
    return Planned(Path(), list(overrides), told, config)


def numbered(folder: Path, plans: list[Planned]) -> None:
    """Give each run its folder: the same overrides get the one that they had, others the next number; writes sweep.json."""
    table = folder / SWEEP
    known = json.loads(table.read_text())["runs"] if table.exists() else []
    places = {tuple(run["overrides"]): run for run in known}
    for plan in plans:
        run = places.get(tuple(plan.overrides))
        if run is None:
            run = {"folder": str(len(known)), "overrides": plan.overrides}
            known.append(run)
            places[tuple(plan.overrides)] = run
        run["error"] = plan.error or None
        plan.run = folder / run["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps({"runs": known}, indent=1) + "\n")


def place(plans: Sequence[Planned], cluster: ClusterConfig, folder: Path, name: str) -> int:
    """Run them where the config says, but for those that are done; the exit code."""
    if cluster.scheduler is Scheduler.local:
        from evspan.launch.local.sequential import run_here

        return run_here(plans)
    from evspan.launch.slurm.submit_runs import submit_runs

    return submit_runs([plan for plan in plans if not _done(plan)], cluster, folder, name)


def _done(plan: Planned) -> bool:
    events = read(plan.run)
    if not events or events[-1]["event"] != "done":
        return False
    print(f"{plan.run}: done already")
    return True


def _check(config: TrainConfig) -> None:
    from evspan.launch.cli.train import check

    check(config)
    config.cluster.nodes(config.parallel.ranks)
