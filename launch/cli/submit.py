"""`evspan submit`: one run as a SLURM job, or on this machine with cluster=local."""

import sys
from collections.abc import Sequence
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.schema.search import SearchMethod
from evspan.conf.schema.training import TrainConfig
from evspan.conf.text import escape_interpolations, quote_override
from evspan.launch.cli.command import exit_unless_zero, reported_errors
from evspan.launch.cli.config_arguments import (
    ConfigArguments,
    config_information,
    parse_config_arguments,
)
from evspan.launch.cli.grammar import SUBMITTED_COMMANDS

AFTER = "after="
SMOKE_OPTION = "--smoke"
HELP = """evspan submit: one run as a SLURM job, over as many nodes as parallel.ranks needs

  evspan submit KEY=VALUE ...
      the keys of `evspan train` (evspan train --help), and cluster=NAME, cluster.KEY=VALUE

  examples
      evspan submit experiment=gen4/3scale_baseline dataset.root=/data/gen4 run_dir=runs/tiny \\
          parallel.ranks=16 training.batch_size=16 cluster=gpu_nodes
      evspan submit ... cluster.partition=gpu cluster.account=lab cluster.detach=true
      evspan submit ... cluster.dry_run=true          prints the batch script, submits nothing
      evspan submit ... cluster=local                 the same on this machine
      evspan submit --smoke ...                       two steps in a short job first; the run's job
                                                      starts only if they succeed
      evspan submit ... after=FOLDER                  when all that was submitted for a run, a sweep
                                                      or shards is done; may be repeated

  A run that reaches its time limit, is preempted, or loses its node or a rank is requeued and
  continues from its newest checkpoint. RUN/config.yaml has the resolved config, which every attempt
  reads. The command waits for the end and prints each change of state; Ctrl-C leaves the job alone.
  cluster.detach=true returns at once.

  other commands as jobs, for chains: evspan submit prep|evaluate|report ...
      evspan submit prep --help explains them

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
      'cluster.environment=["NCCL_DEBUG=INFO"]'  'cluster.sbatch_args=["reservation=spring"]'
      cluster.gres=gpu:a100:8,nvme:1   cluster.exclusive=true   cluster.nice=100
      cluster.cpu_bind=cores   cluster.mem_bind=local   cluster.gpu_bind=closest
      cluster.mail_type=END,FAIL       cluster.mail_user=NAME@SITE
      cluster.code=archive           the package as it is now, copied into the run; live: what is
                                     installed when an attempt starts
      cluster.container=none         apptainer | pyxis, with cluster.image=FILE
      cluster.array_parallelism=16   runs of a sweep at the same time
      cluster.successor=false        true: a dependent job continues the run, where preempted jobs
                                     are cancelled or cannot be requeued (evspan doctor)
      cluster.max_retries=3          failures in a row at the same step after which a run has failed
"""


def main(argv: list[str] | None = None) -> None:
    """Submit the run that the arguments make; sys.argv for None."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        _submit(arguments)


def _submit(argv: list[str]) -> None:
    if argv and argv[0] in SUBMITTED_COMMANDS:
        from evspan.launch.cli.submit_command import submit_command

        submit_command(argv)
        return
    words = [word for word in after_overrides(argv) if word != SMOKE_OPTION]
    arguments = parse_config_arguments(words, prog="evspan submit")
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
    refuse_search(config, argv)
    if config.run_dir:
        check_run_folder(Path(config.run_dir))
    check_run(config)
    name_run_folder(config, create=not config.cluster.dry_run)
    run = PlannedRun(Path(config.run_dir), expansion.combinations[0], config)
    exit_unless_zero(submit_planned([run], config.cluster, run.folder, smoke=SMOKE_OPTION in argv))


def after_overrides(argv: Sequence[str]) -> list[str]:
    """The arguments with `after=FOLDER`, which may be repeated, written as cluster.after=[...]."""
    folders = [word.removeprefix(AFTER) for word in argv if word.startswith(AFTER)]
    words = [word for word in argv if not word.startswith(AFTER)]
    if folders:
        quoted = ",".join(quote_override(escape_interpolations(folder)) for folder in folders)
        words.append(f"cluster.after=[{quoted}]")
    return words


def refuse_search(config: TrainConfig, words: Sequence[str]) -> None:
    """Refuse a search where a single run is started.

    Raises:
        UserError: the config has one; the message has the command.
    """
    if config.search.method is not SearchMethod.none:
        raise UserError(f"search is for sweeps: evspan sweep {' '.join(words)}")


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
