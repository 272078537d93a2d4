"""`evspan sweep`: a run for each combination of values, as an array of SLURM jobs or here."""

import sys

from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import exit_unless_zero, reported_errors
from evspan.launch.cli.config_arguments import config_information, parse_config_arguments
from evspan.launch.cli.submit import refuse_train_options

HELP = """evspan sweep: a run for each combination of comma-separated values

  evspan sweep run_dir=SWEEP KEY=A,B KEY=C,D KEY=VALUE ...
      runs SWEEP/0, SWEEP/1, ..., as an array of SLURM jobs

  examples
      evspan sweep run_dir=sweeps/lr dataset.root=/data/gen4 experiment=gen4/3scale_baseline \\
          optimizer.lr=1e-4,3e-4,1e-3 cluster=gpu_nodes
      evspan sweep run_dir=sweeps/lr ... cluster.array_parallelism=4 cluster.detach=true
      evspan sweep run_dir=sweeps/lr ... cluster=local      sequentially on this machine

  A run whose overrides are wrong fails alone. The same command continues the runs that are not
  done; further values add runs. evspan status SWEEP and evspan report SWEEP show them all.
  Other keys: evspan submit --help
"""


def main(argv: list[str] | None = None) -> None:
    """Submit a run for each combination of values; sys.argv for None."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        _sweep(arguments)


def _sweep(argv: list[str]) -> None:
    arguments = parse_config_arguments(argv, prog="evspan sweep")
    refuse_train_options(arguments)
    information = config_information(arguments, TrainConfig, HELP)
    if information is not None:
        print(information)
        return
    from evspan.conf.compose import config_dir_options, expand_sweep
    from evspan.launch.sweep.submit import submit_sweep

    expansion = expand_sweep(arguments.argv)
    exit_unless_zero(submit_sweep(expansion, config_dir_options(arguments.argv)))


if __name__ == "__main__":
    main()
