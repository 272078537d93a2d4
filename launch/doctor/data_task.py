"""Measures a node's data path for `evspan doctor --dataset`, as one line of JSON.

python -m evspan.launch.doctor.data_task WORK NODES DATASET [KEY=VALUE ...]

runs once on each node. WORK is the doctor's work folder, by which the nodes start to read at once.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evspan.conf.compose import compose
from evspan.conf.schema.benchmark import BenchConfig, check_one_rank
from evspan.conf.schema.training import ParallelConfig, TrainConfig
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.reading import shard_path
from evspan.launch.cli.command import run_command
from evspan.launch.doctor.folder import replace_file

READY = "reads"  # start of the name of a node's file in WORK
WAIT_S = 120.0  # for the other nodes
READ_S = 3.0
BLOCK_BYTES = 4 << 20
STEPS = 5
MEASURE_S = 10.0


def main(argv: Sequence[str]) -> None:
    """Prints the measurements of this node."""
    work, nodes, dataset, *overrides = argv
    run_command(lambda: _print(Path(work), int(nodes), Path(dataset), overrides))


def _print(work: Path, nodes: int, dataset: Path, overrides: Sequence[str]) -> None:
    # Values are refused before anything is measured.
    config = training_config(dataset, overrides)
    values = {
        **measure_reading(work, int(os.environ.get("SLURM_NODEID", "0")), nodes, dataset),
        **measure_training(config),
    }
    print(json.dumps(values), flush=True)


def training_config(dataset: Path, overrides: Sequence[str]) -> BenchConfig:
    """The config whose consumption is measured: one rank's share.

    Raises:
        ConfigError: the overrides cannot be composed, or describe several ranks.
    """
    config = compose(BenchConfig, [f"dataset.root={dataset}", *overrides])
    check_one_rank(config)
    config.parallel = ParallelConfig(ranks=1, threads=config.parallel.threads)
    return config


# -- reading ---------------------------------------------------------------------------------------
def measure_reading(work: Path, node: int, nodes: int, dataset: Path) -> dict[str, float]:
    """Reads shards for some seconds, while the other nodes read others.

    Returns:
        read_bytes, read_s: what was read, past the cache of this machine. frame_bytes: mean size of
        a stored frame.

    Raises:
        UserError: the dataset cannot be read.
    """
    manifest = load_manifest(dataset)
    entries = [entry for entry in manifest.recordings if entry.split == "train"]
    files = sorted({shard_path(dataset, entry) for entry in entries or manifest.recordings})
    frames = sum(entry.frames for entry in manifest.recordings)
    total = sum(shard_path(dataset, entry).stat().st_size for entry in _one_per_file(manifest))
    first = node * len(files) // nodes
    _wait_for_all(work, node, nodes)
    read_bytes, seconds = read_uncached([*files[first:], *files[:first]], READ_S)
    return {"read_bytes": read_bytes, "read_s": seconds, "frame_bytes": total / max(1, frames)}


def _one_per_file(manifest: Any) -> list[Any]:
    return list({entry.shard: entry for entry in manifest.recordings}.values())


def _wait_for_all(work: Path, node: int, nodes: int) -> None:
    """Returns when all nodes are here, or after WAIT_S."""
    replace_file(work / f"{READY}-{node}", b"1")
    end = time.monotonic() + WAIT_S
    expected = {f"{READY}-{other}" for other in range(nodes)}
    while not expected <= set(os.listdir(work)) and time.monotonic() < end:
        time.sleep(0.02)


def read_uncached(files: Sequence[Path], seconds: float) -> tuple[int, float]:
    """Reads files one after the other, at most for `seconds`: bytes read, and the time it took.

    What this machine has in its cache is dropped before (advice that a file system may ignore).
    """
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    total = 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                total += len(block)
                elapsed = time.perf_counter() - started
                if elapsed > seconds:
                    return total, elapsed
    return total, time.perf_counter() - started


# -- what training consumes ------------------------------------------------------------------------
def measure_training(config: TrainConfig) -> dict[str, Any]:
    """Trains some steps with one rank, and runs the loader with one thread.

    Returns:
        needed: frames per second that the rank's step takes. decoded: that one loader thread
        provides. cores: that the rank may use. device: its type.
    """
    from evspan.pipeline.benchmark.loading import measure_loader, usable_cores
    from evspan.pipeline.benchmark.step import measure_steps
    from evspan.pipeline.engine.precision import resolve_precision
    from evspan.pipeline.engine.trainer import Trainer
    from evspan.pipeline.parallel.world import open_world

    with TemporaryDirectory(prefix="evspan-doctor-") as run, open_world(config.parallel) as world:
        config.run_dir = run
        config.checkpoint.resume = False
        config.training.max_steps = 2**31 - 1
        trainer = Trainer(resolve_precision(config, world, None), world)
        try:
            step = measure_steps(trainer, steps=STEPS, seconds=MEASURE_S)
            (one,) = measure_loader(
                trainer.loader, device=world.device, seconds=MEASURE_S / 2, threads=[1]
            )
        finally:
            trainer.close()
        return {
            "needed": step.frames_per_s_needed,
            "decoded": one.frames_per_s,
            "cores": usable_cores(),
            "device": world.device.type,
        }


if __name__ == "__main__":
    main(sys.argv[1:])
