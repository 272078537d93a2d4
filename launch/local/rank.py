"""One rank of a training or an evaluation.

python -m evspan.launch.local.rank train|evaluate CONFIG

CONFIG is the file that the launcher wrote with `evspan.conf.compose.save_config`.
"""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evspan.conf.compose import load_config
from evspan.conf.schema.training import EvaluateConfig, TrainConfig, WeightsKind
from evspan.launch.cli.command import run_command
from evspan.launch.logging_config import logs_to_file
from evspan.launch.run_log import RunLog
from evspan.pipeline.engine.time_account import TimeAccount
from evspan.pipeline.history import attempts, read
from evspan.pipeline.time_records import Part

logger = logging.getLogger("evspan.launch.local.rank")  # __name__ is __main__ in a rank


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For imports of large modules: a seventh of their time would be collections without effect."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def train_rank(config: TrainConfig) -> None:
    """Train as the rank that this process is."""
    account = TimeAccount(Part.imports, since_process_start=True)
    with garbage_collection_paused():
        from evspan.pipeline.parallel.world import open_world

    account.enter(Part.process_groups)
    with open_world(config.parallel, run=config.run_dir) as world:
        account.enter(Part.imports)
        # Importing DeepSpeed takes seconds, and chooses GPU or CPU as `open_world` has.
        with garbage_collection_paused():
            from evspan.pipeline.engine.trainer import train

        account.enter(Part.setup)
        if logs_to_file():  # of SLURM's ranks, which have the same log
            train(config, world, account=account)
            return
        log = RunLog(Path(config.run_dir), world.rank, config.cluster)

        def open_log() -> None:
            attempt = attempts(read(config.run_dir)) + 1
            log.open(attempt=attempt, rank=world.rank, ranks=world.size)

        train(config, world, on_start=open_log, account=account)
        # After an error it stays open: the command reports the error, and ends the process.
        log.close()


def evaluate_rank(config: EvaluateConfig) -> None:
    """Evaluate as the rank that this process is. Rank 0 writes and prints the results."""
    with garbage_collection_paused():
        from evspan.pipeline.engine.checkpoints import load_same_weights
        from evspan.pipeline.engine.evaluator import (
            describe_evaluation,
            evaluate_weights,
            write_results,
        )
        from evspan.pipeline.evaluation.breakdown import breakdown
        from evspan.pipeline.evaluation.protocol import protocol_line
        from evspan.pipeline.inference.streaming import labelled
        from evspan.pipeline.parallel.world import open_world
        from evspan.pipeline.run_lock import results_lock

    output = evaluation_output(config)
    with open_world(config.parallel) as world, results_lock(output, is_main=world.is_main):
        weights = load_same_weights(
            config.checkpoint, world.rank, raw=config.weights is WeightsKind.raw
        )
        metrics, results, data, protocol = evaluate_weights(
            weights, config.dataset, config.evaluation, world
        )
        if not world.is_main:
            return
        parts = breakdown(labelled(results, data), data.classes, protocol)
        summary = describe_evaluation(
            config.checkpoint,
            weights,
            config.dataset,
            protocol,
            world.device,
            data=data,
        )
        summary["breakdown"] = parts.to_json()
        write_results(output, metrics, results, data, protocol, summary)
        logger.info(
            "%s (step %s) on %s %s\nweights: %s\n%s\n\n%s\n\n%s\n\nwritten to %s",
            config.checkpoint,
            weights.step,
            config.dataset.place,
            config.evaluation.split,
            weights.kind,
            protocol_line(protocol, data),
            metrics.table(),
            parts.table(),
            output,
        )


def evaluation_output(config: EvaluateConfig) -> Path:
    """The folder of the results: `output`, or next to the checkpoint.

    Those of raw weights do not replace those of the average.
    """
    if config.output:
        return Path(config.output)
    checkpoint = Path(config.checkpoint)
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    name = f"evaluation-{config.evaluation.split}"
    if config.weights is WeightsKind.raw:
        name += "-raw"
    return folder / name


def run_rank(kind: str, path: Path) -> None:
    """Train or evaluate as this rank, with the config in the file `path`.

    Args:
        kind: 'train' or 'evaluate'.
    """
    if kind == "train":
        train_rank(load_config(TrainConfig, path))
    else:
        evaluate_rank(load_config(EvaluateConfig, path))


if __name__ == "__main__":
    run_command(lambda: run_rank(sys.argv[1], Path(sys.argv[2])))
