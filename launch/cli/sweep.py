"""`evspan sweep`: a run for each combination of values, or a search; as SLURM jobs or here."""

import sys
from collections.abc import Sequence

from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import exit_unless_zero, reported_errors
from evspan.launch.cli.config_arguments import config_information, parse_config_arguments
from evspan.launch.cli.submit import after_overrides, refuse_train_options

HELP = """evspan sweep: a run for each combination of comma-separated values

  evspan sweep run_dir=SWEEP KEY=A,B KEY=C,D KEY=VALUE ...
      runs SWEEP/0, SWEEP/1, ..., as an array of SLURM jobs

  examples
      evspan sweep run_dir=sweeps/lr dataset.root=/data/gen4 experiment=gen4/3scale_baseline \\
          optimizer.lr=1e-4,3e-4,1e-3 cluster=gpu_nodes
      evspan sweep run_dir=sweeps/lr ... cluster.array_parallelism=4 cluster.detach=true
      evspan sweep run_dir=sweeps/lr ... cluster=local      sequentially on this machine
      evspan sweep run_dir=sweeps/lr ... after=FOLDER       when a run, a sweep or shards are done

  search
      evspan sweep search=optuna search.trials=64 run_dir=sweeps/tune dataset.root=/data/gen4 \\
          'optimizer.lr=tag(log,interval(1e-5,1e-3))' size=tiny,small training.evaluate_every=2000
      search.metric=AP               AP50 | AP_small | AP_class/NAME | loss, ...
      search.sampler=tpe             tpe | random
      search.pruner=asha             none | asha: only the best third of the trials goes on at
                                     search.min_steps (default: training.evaluate_every), 3, 9, ...
                                     times as many steps; search.reduction_factor=3
      search.resume=[7]              trains the pruned trial 7 to its end
      cluster.detach=true            the controller is a job, too; search.partition is its partition
      The same command continues a search, also with more search.trials. Ranges: conf/README.md.

  A run whose overrides are wrong fails alone. The same command continues the runs that are not
  done; further values add runs. evspan status SWEEP and evspan report SWEEP show them all.
  cluster.fail_fast=true ends a sweep whose first runs fail with the same error.
  Other keys: evspan submit --help
"""


def main(argv: list[str] | None = None) -> None:
    """Submit a run for each combination of values; sys.argv for None."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        _sweep(arguments)


def _sweep(argv: list[str]) -> None:
    arguments = parse_config_arguments(after_overrides(argv), prog="evspan sweep")
    refuse_train_options(arguments)
    information = config_information(arguments, TrainConfig, HELP)
    if information is not None:
        print(information)
        return
    from evspan.conf.compose import config_dir_options, expand_sweep
    from evspan.launch.sweep.submit import submit_sweep

    if is_search(arguments.argv):
        from evspan.launch.search.start import start_search

        exit_unless_zero(start_search(arguments.argv))
        return
    expansion = expand_sweep(arguments.argv)
    exit_unless_zero(submit_sweep(expansion, config_dir_options(arguments.argv)))


def is_search(argv: Sequence[str]) -> bool:
    """Whether the arguments choose a search instead of a grid."""
    chosen = [word.partition("=")[2] for word in argv if word.lstrip("+").startswith("search=")]
    return bool(chosen) and chosen[-1] != "none"


if __name__ == "__main__":
    main()
