"""`evspan submit`: one run as a SLURM job, or on this machine with cluster=local."""

import sys
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import exit_unless_zero, reported_errors
from evspan.launch.cli.config_arguments import (
    ConfigArguments,
    config_information,
    parse_config_arguments,
)

HELP = """evspan submit: one run as a SLURM job, over as many nodes as parallel.ranks needs

  evspan submit KEY=VALUE ...
      the keys of `evspan train` (evspan train --help), and cluster=NAME, cluster.KEY=VALUE

  examples
      evspan submit experiment=gen4/3scale_baseline dataset.root=/data/gen4 run_dir=runs/tiny \\
          parallel.ranks=16 cluster=gpu_nodes
      evspan submit ... cluster.partition=gpu cluster.account=lab cluster.detach=true
      evspan submit ... cluster.dry_run=true          prints the batch script, submits nothing
      evspan submit ... cluster=local                 the same on this machine

  A run that reaches its time limit, is preempted, or loses its node or a rank is requeued and
  continues from its newest checkpoint. RUN/config.yaml has the resolved config, which every attempt
  reads. The command waits for the end and prints each change of state; Ctrl-C leaves the job alone.
  cluster.detach=true returns at once.

  afterwards
      evspan status RUN | evspan logs RUN --follow | evspan cancel RUN | evspan report RUN

  keys: conf/schema/cluster.py explains them all
      cluster=slurm                  slurm | gpu_nodes | local, or your own
                                     FOLDER/cluster/NAME.yaml with --config-dir FOLDER
      cluster.partition, account, qos, constraint, exclude    empty: the cluster's defaults
      cluster.gpus_per_node=0        a rank for each GPU
      cluster.ranks_per_node=0       0: one per GPU, or 1
      cluster.cpus_per_task=1        cluster.mem_gb=0 (per node)
      cluster.timeout_min=240        cluster.signal_delay_s=120
      cluster.setup=["module load cuda"]
      'cluster.environment=["NCCL_DEBUG=INFO"]'  'cluster.sbatch_args=["mail-type=END"]'
      cluster.container=none         apptainer | pyxis, with cluster.image=FILE
      cluster.array_parallelism=16   runs of a sweep at the same time
      cluster.max_retries=3          failures in a row at the same step after which a run has failed
"""


def main(argv: list[str] | None = None) -> None:
    """Submit the run that the arguments make; sys.argv for None."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        _submit(arguments)


def _submit(argv: list[str]) -> None:
    arguments = parse_config_arguments(argv, prog="evspan submit")
    refuse_train_options(arguments)
    information = config_information(arguments, TrainConfig, HELP)
    if information is not None:
        print(information)
        return
    from evspan.conf.compose import compose, expand_sweep
    from evspan.launch.local.run import check_run_folder
    from evspan.launch.local.run_folder import name_run_folder
    from evspan.launch.sweep.plan import PlannedRun, check_run
    from evspan.launch.sweep.submit import submit_planned

    expansion = expand_sweep(arguments.argv, text=False)
    if expansion.swept_keys:
        raise UserError(
            f"{', '.join(expansion.swept_keys)} has several values; for a run each: "
            f"evspan sweep {' '.join(argv)}"
        )
    config = compose(TrainConfig, arguments.argv)
    if config.run_dir:
        check_run_folder(Path(config.run_dir))
    check_run(config)
    name_run_folder(config, create=not config.cluster.dry_run)
    run = PlannedRun(Path(config.run_dir), expansion.combinations[0], config)
    exit_unless_zero(submit_planned([run], config.cluster, run.folder))


def refuse_train_options(arguments: ConfigArguments) -> None:
    """Refuse the options that only `evspan train` has.

    Raises:
        UserError: --cfg or --multirun; the message has what to use instead.
    """
    if arguments.show_config:
        raise UserError(
            "--cfg is for evspan train, where the same keys show the config; here "
            "cluster.dry_run=true shows the batch script"
        )
    if arguments.multirun:
        raise UserError("--multirun is for evspan train; evspan sweep KEY=A,B needs no option")


if __name__ == "__main__":
    main()
