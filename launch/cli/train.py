"""`evspan train`: shards -> a trained detector."""

import sys
from pathlib import Path

from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import exit_unless_zero, reported_errors, run_command
from evspan.launch.cli.config_arguments import config_information, parse_config_arguments
from evspan.launch.output_streams import drop_lost_output

HELP = """evspan train: shards -> a trained detector, its checkpoints and TensorBoard curves

  evspan train dataset.root=SHARDS [run_dir=RUN] [experiment=NAME] [key=value ...]
      SHARDS is what `evspan prep` wrote. Without run_dir, a new folder: runs/0001, runs/0002, ...
      With the run_dir of a run, the same command continues from its newest checkpoint; the number
      of ranks, parallel.sequence and deepspeed.stage may change.
      Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save at the next step and end with exit code 75; a
      second Ctrl-C ends at once.
      RUN/config.yaml has the resolved config, which the ranks read; RUN/logs what each rank
      printed; RUN/metrics.jsonl losses, speed and AP.

  evspan train --multirun KEY=A,B ...
      Hydra's sweeper and launcher, one run after the other: RUN/0, RUN/1, ...

  examples
      evspan train experiment=demo dataset.root=shards run_dir=runs/demo
      evspan train experiment=gen4/3scale_baseline dataset.root=/data/gen4 parallel.ranks=4

  choices (each a file in conf/GROUP/)
      experiment=null            demo | gen4/{small,base} | gen4/{3scale_baseline,3scale_sizeaware,
                                 3scale_sizeaware_attention,4scale_sizeaware_attention} |
                                 {gen4,etram}/{rvt_tiny,rvt_small,rvt_base}: RVT's published
                                 values, not run here; rvt: the same for another dataset or size
      model=maxvit_yolox/default     also maxvit_yolox/size_aware, maxvit_yolox/size_aware_attention
      size=tiny                  micro | tiny | small | base
      dataset=own                own: the classes of the shards | simulated | gen4 | etram |
                                 etram3 | gen4_rvt: refused where the shards have others | rvt_tree
      augmentation=standard      none | standard: flip and zoom as RVT | light: fewer zooms, as the
                                 demo | strong: rotation, shear, translation, noise, lost events
                                 and erased patches, too
      deepspeed=zero1            zero0 | zero1 | zero2 | zero3

  keys
      dataset.roots=[]           several datasets instead of dataset.root, conf/README.md:
                                 '[{root: A, weight: 2}, {root: B, class_map: {lorry: truck}}]'
      training.max_steps=100000  optimizer updates
      training.max_epochs=0      passes over the training split; the smaller of both counts. 0: off
      training.max_hours=0       over all attempts; then the run is done. 0: no limit
      training.patience=0        evaluations in a row without a better AP; then it is done. 0: off
      training.batch_size=8      lanes (recordings in parallel) over all ranks; auto: as many as fit
      training.sequence_length=5     frames per chunk, through which gradients flow
      training.sampling=mixed    stream | random | mixed
      training.stagger_lanes=true    streaming lanes begin anywhere in a recording
      training.repeat_factor_threshold=0   rare classes are read more often (LVIS); 0: off
      training.precision=auto    fp32 | tf32 | bf16; auto: bf16 on GPUs that have it, else fp32
      training.log_images_every=1000   steps between images and histograms; 0: never
      training.profile=[]        [first,last] steps to trace into run_dir/profile
      training.evaluate_every=10000  steps between evaluations; 0: at the end only
      training.ema_decay=0.9999  of the moving average of the weights, which is evaluated; 0: none
      evaluation.at_end=true     evaluate the last step
      evaluation.limit_recordings=0  evaluate this many, evenly over the split; 0: all
      optimizer.lr=0.001         at the peak of the schedule
      checkpoint.every=1000      steps
      checkpoint.resume=true     false: start at step 0
      checkpoint.init_from=      weights to start from: a run, a checkpoint, a .safetensors file
                                 or RVT's .ckpt; other classes or added attention are fine
      optimizer.lr_multipliers={}    'optimizer.lr_multipliers={"backbone.*": 0.1}'
      training.freeze=[]         'training.freeze=["backbone.stages.0.*"]': not trained
      parallel.ranks=1           processes, one per GPU (or several on CPU cores); torchrun and srun
                                 start their own
      parallel.device=auto       auto: GPUs where there are any | gpu | cpu
      seed=0

  evspan train --cfg job ...       shows the resulting config; conf/schema/training.py explains
                                   every key
  evspan train --hydra-help        how overrides work
"""


def main(argv: list[str] | None = None) -> None:
    """Train with the config that the arguments make; sys.argv for None.

    Under torchrun, each rank is started with the same arguments and composes the config itself:
    torchrun --nproc-per-node 2 -m evspan.launch train run_dir=RUN parallel.ranks=2 KEY=VALUE ...
    """
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        _train(arguments)


def _train(argv: list[str]) -> None:
    arguments = parse_config_arguments(argv, prog="evspan train")
    information = config_information(arguments, TrainConfig, HELP)
    if information is not None:
        print(information)
        return
    drop_lost_output()
    if arguments.multirun:
        _multirun(arguments.argv)
        return
    from evspan.conf.compose import compose
    from evspan.launch.cli.submit import refuse_search
    from evspan.launch.local.run import run_training

    config = compose(TrainConfig, arguments.argv)
    refuse_search(config, argv)
    exit_unless_zero(run_training(config))


def _multirun(argv: tuple[str, ...]) -> None:
    from evspan.conf.compose import multirun
    from evspan.launch.local.run_folder import SWEEPS, numbered_folder
    from evspan.launch.slurm.hydra_plugin import register

    if any(argument.startswith("hydra/launcher=") for argument in argv):
        register()
    if not any(argument.lstrip("+").startswith("run_dir=") for argument in argv):
        argv = (*argv, f"run_dir={numbered_folder(SWEEPS)}")
    # Hydra reports every Exception of a job itself; run_command ends the job before that.
    multirun(TrainConfig, argv, lambda config, job: run_command(lambda: _train_job(config, job)))


def _train_job(config: TrainConfig, number: int) -> None:
    """One job of --multirun, in a folder of its own below run_dir."""
    from evspan.launch.local.run import check_sweep_folder, run_training

    check_sweep_folder(Path(config.run_dir))
    config.run_dir = str(Path(config.run_dir, str(number)))
    exit_unless_zero(run_training(config, own_process=True))


if __name__ == "__main__":
    main()
