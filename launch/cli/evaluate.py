"""`evspan evaluate`: a checkpoint and a prepared split -> COCO AP and detections."""

import os
import sys
from collections.abc import Sequence

from evspan.conf.errors import UserError
from evspan.conf.schema.training import EvaluateConfig
from evspan.launch.cli.command import exit_unless_zero, reported_errors, run_command
from evspan.launch.cli.config_arguments import config_information, parse_config_arguments
from evspan.launch.cli.grammar import evaluate_overrides
from evspan.launch.output_streams import drop_lost_output, stdout_to_stderr

JSON_OPTION = "--json"

HELP = """evspan evaluate: a checkpoint and a split -> COCO AP and detections

  evspan evaluate compare A B      compares two evaluations, with confidence intervals

  evspan evaluate RUN [dataset.root=SHARDS] [key=value ...] [--json]
      RUN is a run folder (its newest checkpoint), one of its checkpoints, a .safetensors file, or
      a .ckpt of RVT. It contains the model config. RUN/checkpoints/best has the highest AP
      during training. RUN/evaluation-SPLIT gets metrics.json, a <recording>_bbox.npy for each
      recording, and frames.npz, which compare reads. --json prints metrics.json, and all else to
      standard error.
      Keys of dataset and evaluation that are not given are those of the run's training, except
      evaluation.limit_recordings, write_detections and at_end; of a .safetensors file elsewhere,
      the defaults below.
      Datasets gen4, gen4_rvt and rvt_tree are scored by Prophesee's protocol: boxes of side 10 and
      diagonal 30 pixels or more at half resolution. The results name the protocol.
      AP is reported per class, size, recording, time since the start, and by speed and rest of
      the object: the state must remember an object at rest, which causes no events.

  examples
      evspan evaluate runs/demo
      evspan evaluate runs/tiny evaluation.split=test
      evspan evaluate rvt-t.safetensors dataset=rvt_tree dataset.root=/data/gen4_tree
      evspan evaluate compare runs/demo/evaluation-val runs/other/evaluation-val

  keys
      dataset.roots=[]           several datasets instead of dataset.root: '[{root: A}, {root: B}]'
      dataset=own                own: the classes of the shards | simulated | gen4 | etram |
                                 etram3 | gen4_rvt: refused where the shards have others | rvt_tree
      weights=ema                ema: the moving average of a checkpoint's weights, where it has one
                                 | raw: those that the optimizer updates
      output=                    another folder for the results
      evaluation.split=val       train | val | test
      evaluation.confidence_threshold=0.001
      evaluation.nms_threshold=0.45
      evaluation.skip_first_ms=500   ignore the start of each recording, when the state is empty
      evaluation.min_side=null   ignore smaller boxes and detections; pixels of the stored frames;
                                 null: those of the dataset
      evaluation.min_diagonal=null
      evaluation.confusion_threshold=0.3  lowest score of detections in the confusion matrix
      evaluation.still_speed=5   pixels of the stored frames per second: a slower object ...
      evaluation.still_s=0.5     ... for this long is still
      evaluation.time_bins_s=[1,2,5,10,20,60]   likewise speed_bins, rest_bins_s
      evaluation.limit_recordings=0  this many, evenly over the split; 0: all
      evaluation.batch_size=4    recordings in parallel, per rank
      evaluation.precision=auto  fp32 | tf32 | bf16; auto: on a GPU that of training, else fp32
      evaluation.write_detections=true
      parallel.ranks=1           processes, one per GPU (or several on CPU cores); torchrun and srun
                                 start their own

  evspan evaluate --cfg job ...    shows the resulting config; conf/schema/training.py explains
                                   every key
  evspan evaluate --hydra-help     how overrides work
"""


def main(argv: list[str] | None = None) -> None:
    """Evaluate with the config that the arguments make; sys.argv for None."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["compare"]:
        from evspan.launch.cli import evaluate_compare

        evaluate_compare.main(arguments[1:])
        return
    with reported_errors():
        _evaluate(arguments)


def _evaluate(argv: list[str]) -> None:
    as_json = JSON_OPTION in argv
    words = [word for word in argv if word != JSON_OPTION]
    arguments = parse_config_arguments(evaluate_overrides(words), prog="evspan evaluate")
    information = config_information(arguments, EvaluateConfig, HELP)
    if information is not None:
        print(information)
        return
    if arguments.multirun:
        _evaluate_several(arguments.argv, as_json=as_json)
        return
    from evspan.launch.local.rank import evaluation_output
    from evspan.launch.local.run import run_evaluation
    from evspan.pipeline.parallel.rank_env import rank_info

    if not as_json:
        drop_lost_output()
        exit_unless_zero(run_evaluation(_composed(arguments.argv)))
        return
    with stdout_to_stderr():
        config = _composed(arguments.argv)
        exit_unless_zero(run_evaluation(config))
    if rank_info(os.environ).rank == 0:
        print((evaluation_output(config) / "metrics.json").read_text(), end="")


def _composed(argv: Sequence[str]) -> EvaluateConfig:
    from evspan.conf.compose import compose
    from evspan.launch.cli.run_defaults import with_run_config

    return with_run_config(compose(EvaluateConfig, argv), argv)


def _evaluate_several(argv: Sequence[str], *, as_json: bool) -> None:
    """--multirun."""
    from evspan.conf.compose import multirun

    if as_json:
        raise UserError("--json is for one evaluation; leave out --multirun")
    drop_lost_output()
    # Hydra reports every Exception of a job itself; run_command ends the job before that.
    multirun(
        EvaluateConfig, argv, lambda config, _: run_command(lambda: _evaluate_job(config, argv))
    )


def _evaluate_job(composed: EvaluateConfig, argv: Sequence[str]) -> None:
    """One job of --multirun."""
    from evspan.launch.cli.run_defaults import with_run_config
    from evspan.launch.local.run import run_evaluation

    config = with_run_config(composed, argv)
    ranks = config.parallel.ranks
    if ranks > 1:
        raise UserError(
            f"--multirun cannot evaluate by several ranks (parallel.ranks={ranks}); give each a "
            "command of its own"
        )
    run_evaluation(config)


if __name__ == "__main__":
    main()
