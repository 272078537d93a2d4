"""One rank of `evspan smoke`.

python -m evspan.launch.smoke_rank FOLDER RANKS STEPS THREADS

runs with torchrun's variables; FOLDER/shards exists. A world of one rank trains the reference; a
world of RANKS ranks trains every layout of that many ranks. Rank 0 writes the results to a file.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import evspan.pipeline.engine.layout_comparison as comparison
from evspan.conf.schema.training import ParallelConfig
from evspan.launch.cli.command import run_command
from evspan.launch.smoke import results_file
from evspan.pipeline.engine.layout_comparison import ComparisonConfig, LayoutComparison
from evspan.pipeline.engine.layouts import SINGLE_RANK, DeviceInfo, Layout, LayoutResult, layouts_of
from evspan.pipeline.parallel.rank_env import rank_info
from evspan.pipeline.parallel.world import open_world

TRAINING_LOG = "training.log"
logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Trains the layouts of this world and writes their results."""
    folder, ranks, steps, threads = argv
    config = ComparisonConfig(Path(folder), int(ranks), int(steps), int(threads))
    size = rank_info(os.environ).size
    parallel = ParallelConfig(ranks=size, timeout_s=comparison.TIMEOUT_S, threads=config.threads)
    with (
        open_world(parallel) as world,
        (config.folder / TRAINING_LOG).open("a") as log,
        _results(config.folder, size, world.is_main) as results,
    ):
        _write(results, comparison.device_info(world, config.threads))
        layouts = LayoutComparison(world, config)
        for layout in _layouts_of_world(size, config.ranks):
            started = time.perf_counter()
            with redirect_stdout(log):
                result = layouts.run(layout)
            _write(results, result)
            seconds = time.perf_counter() - started
            logger.info("  %s, ZeRO %d: %.1f s", layout.name, layout.stage, seconds)


def _layouts_of_world(size: int, ranks: int) -> list[Layout]:
    layouts: list[Layout] = []
    if size == 1:
        layouts += SINGLE_RANK
    if size == ranks:
        layouts += layouts_of(ranks)
    return layouts


@contextmanager
def _results(folder: Path, size: int, is_main: bool) -> Iterator[TextIO | None]:
    """The file of results on rank 0, None on the others."""
    if not is_main:
        yield None
        return
    with results_file(folder, size).open("a") as file:
        yield file


def _write(file: TextIO | None, record: DeviceInfo | LayoutResult) -> None:
    if file is not None:
        file.write(json.dumps(asdict(record)) + "\n")
        file.flush()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
