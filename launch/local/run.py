"""Trains or evaluates in this process, or in as many ranks on this machine as the config has.

python -m evspan.launch.local.run CONFIG     trains with the config of a file

The config is resolved before a rank starts, and written to a file that the ranks read. Under
torchrun or in a SLURM step of several tasks, this process is itself one of the ranks.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.errors import require
from evspan.conf.schema.training import EvaluateConfig, ParallelConfig, TrainConfig
from evspan.launch.cli.command import run_command
from evspan.launch.local.rank import evaluate_rank, train_rank
from evspan.launch.local.ranks import run_ranks
from evspan.launch.local.run_folder import name_run_folder, require_run_dir
from evspan.launch.sweep.queued import refuse_queued
from evspan.launch.sweep.registry import SWEEP, is_run
from evspan.pipeline.parallel.rank_env import started_as_rank
from evspan.pipeline.run_lock import training_lock


def run_training(config: TrainConfig, *, own_process: bool = False) -> int:
    """Train to the end or to a stop signal.

    Args:
        own_process: start a process for a single rank too: DeepSpeed starts only once in a process.

    Returns:
        The exit code.

    Raises:
        UserError: something that is known before any rank starts. FolderInUseError, before anything
            is written: another process uses the folder.
    """
    if under_launcher():
        require_run_dir(config)
        train_rank(config)
        return 0
    if config.run_dir:
        check_run_folder(Path(config.run_dir))
    check_training(config)
    name_run_folder(config)
    with training_lock(config.run_dir) as lock:
        refuse_queued([Path(config.run_dir)])
        path = Path(config.run_dir, CONFIG_FILE)
        save_config(config, path)
        if config.parallel.ranks == 1 and not own_process:
            train_rank(config)
            return 0
        remedy = (
            f"The same command with run_dir={config.run_dir} continues from its newest checkpoint, "
            "if there is one"
        )
        return _run_ranks("train", path, config.parallel, remedy, lock.environment())


def run_evaluation(config: EvaluateConfig) -> int:
    """Evaluate a checkpoint. Returns the exit code.

    Raises:
        UserError: something that is known before any rank starts.
    """
    if under_launcher():
        evaluate_rank(config)
        return 0
    check_evaluation(config)
    if config.parallel.ranks == 1:
        evaluate_rank(config)
        return 0
    with TemporaryDirectory(prefix="evspan-") as folder:
        path = Path(folder, CONFIG_FILE)
        save_config(config, path)
        return _run_ranks("evaluate", path, config.parallel, "Run the same command again", {})


def under_launcher() -> bool:
    """Whether torchrun or a SLURM step of several tasks has started this process as a rank.

    Raises:
        ConfigError: variables of a launcher are left over from another program.
    """
    return started_as_rank(os.environ)


def check_training(config: TrainConfig) -> None:
    """Check what can be known before any rank starts.

    Raises:
        UserError: run_dir, init_from or the dataset cannot be used.
    """
    from evspan.pipeline.data.requirements import open_scored, open_training

    run_dir = Path(config.run_dir)
    require(
        not run_dir.exists() or run_dir.is_dir(),
        f"run_dir is {run_dir}, which is a file; name a folder: run_dir=runs/NAME",
    )
    init_from = config.checkpoint.init_from
    require(
        not init_from or Path(init_from).exists(),
        f"checkpoint.init_from is {init_from}, where there is nothing; name a run folder, "
        "a checkpoint, a weights file or a published .ckpt",
    )
    dataset = open_training(config.dataset, config.model.head.num_classes)
    if init_from:
        from evspan.pipeline.engine.initial_weights import Target, check_initial_weights

        check_initial_weights(config, Target(config.model, dataset.classes, dataset.frames))
    if config.training.freeze or config.optimizer.lr_multipliers:
        from evspan.pipeline.engine.parameter_patterns import check_patterns

        check_patterns(config, dataset.channels)
    training = config.training
    if training.evaluate_every or training.log_images_every or config.evaluation.at_end:
        # It may be read days later, when training is done.
        open_scored(config.dataset, config.evaluation.split)


def check_run_folder(folder: Path) -> None:
    """Refuse a run in the folder of a sweep, among whose runs its own files would lie.

    Raises:
        ConfigError: it is one.
    """
    require(
        not (folder / SWEEP).exists(),
        f"run_dir is {folder}, which is the folder of a sweep; name another one, or one of its "
        f"runs: run_dir={folder / '0'}",
    )


def check_sweep_folder(folder: Path) -> None:
    """Refuse a folder for the runs of a sweep that is itself a run.

    Raises:
        ConfigError: it is one.
    """
    require(
        not is_run(folder),
        f"run_dir is {folder}, which is a run; the runs of a sweep would be written into it. Name "
        "another folder for the sweep: run_dir=sweeps/NAME",
    )


def check_evaluation(config: EvaluateConfig) -> None:
    """Check what can be known before any rank starts.

    Raises:
        UserError: the checkpoint or the dataset cannot be used.
    """
    from evspan.pipeline.data.requirements import open_scored

    remedy = (
        "name a run folder, a checkpoint, a .safetensors file or a .ckpt of RVT: "
        "evspan evaluate runs/NAME ..."
    )
    require(bool(config.checkpoint), f"the checkpoint is missing; {remedy}")
    require(
        Path(config.checkpoint).exists(), f"there is no checkpoint {config.checkpoint}; {remedy}"
    )
    open_scored(config.dataset, config.evaluation.split)


def _run_ranks(
    kind: str, path: Path, parallel: ParallelConfig, remedy: str, variables: Mapping[str, str]
) -> int:
    """variables: further environment variables of the ranks."""
    command = [sys.executable, "-m", "evspan.launch.local.rank", kind, str(path)]
    return run_ranks(
        command,
        parallel.ranks,
        threads=parallel.threads,
        remedy=remedy,
        variables=variables,
        saves_on_interrupt=kind == "train",
    )


def _train_from_file(path: Path) -> None:
    sys.exit(run_training(load_config(TrainConfig, path)))


if __name__ == "__main__":
    run_command(lambda: _train_from_file(Path(sys.argv[1])))
