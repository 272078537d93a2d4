"""`training.batch_size=auto`: a short probe finds how many lanes fit into the memory.

The number of lanes doubles, then is bisected, in multiples of the data ranks, until the memory that
a run may use is nearly filled. A size that the ones before show to be too large is not tried: a
rank that runs out of memory would leave the others waiting. On a CPU the search also ends where
more lanes are no faster. All ranks decide by the same values, so they choose the same size.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.schema.training import TrainConfig
from evspan.conf.text import plural
from evspan.pipeline.checkpoint_files import FOLDER, DamagedError, read_meta, step_names
from evspan.pipeline.data.requirements import open_training
from evspan.pipeline.engine.cgroup_memory import cgroup_memory_limit
from evspan.pipeline.engine.oom import out_of_memory
from evspan.pipeline.engine.resources import (
    over_ranks,
    peak_bytes,
    reset_peak_bytes,
    resident_bytes,
)
from evspan.pipeline.parallel.reductions import broadcast_json
from evspan.pipeline.parallel.world import World

logger = logging.getLogger(__name__)
FILLED = 0.85  # of the memory that a run may use
GAIN = 1.1  # times the frames/s of half the lanes; less is not worth the memory on a CPU
MOST_LANES = 4096
MICRO_BATCHES = 3  # of a probe; the last one is timed


class Probe(NamedTuple):
    """One size. filled: of the memory that a run may use, 1 is all; the largest of all ranks."""

    lanes: int
    filled: float
    frames_per_s: float


class ProbedTrainer(Protocol):
    """What a probe needs of a trainer: to train some micro-batches, and to be closed."""

    def train_micro_batch(self) -> None:
        """Reads and trains one, and waits for it."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def with_batch_size(
    config: TrainConfig, world: World, open_trainer: Callable[[TrainConfig], ProbedTrainer]
) -> TrainConfig:
    """The config with a number of lanes, where `training.batch_size` is 0 (auto). A collective.

    A run that continues keeps the number that it has.

    Args:
        open_trainer: a trainer of a config, in a temporary folder.

    Raises:
        UserError: one lane per data rank does not fit.
    """
    if config.training.batch_size:
        return config
    stored = 0
    if world.is_main and config.checkpoint.resume:
        stored = _stored_batch_size(Path(config.run_dir))
    lanes = broadcast_json(stored, name="batch size")
    if not lanes:
        lanes = _probe(config, world, open_trainer)
        if world.is_main:
            _store(Path(config.run_dir), lanes)
    return replace(config, training=replace(config.training, batch_size=lanes))


def _stored_batch_size(run: Path) -> int:
    """That of the run's checkpoints; 0 without any.

    From the newest checkpoint whose meta.json is intact, or from config.json if there is none.
    """
    names = step_names(run / FOLDER)
    for name in names:
        try:
            return _lanes(read_meta(run / FOLDER / name).values["config"])
        except (OSError, DamagedError):
            continue
    if not names:
        return 0
    try:
        return _lanes(read_json_object(run / "config.json"))
    except (OSError, JsonFileError):
        return 0


def _lanes(config: Any) -> int:
    """training.batch_size of a config in JSON; 0 where there is none."""
    try:
        lanes = config["training"]["batch_size"]
    except (KeyError, TypeError):
        return 0
    return lanes if isinstance(lanes, int) and lanes > 0 else 0


def _store(run: Path, lanes: int) -> None:
    """Into the config that requeued attempts read."""
    path = run / CONFIG_FILE
    if not path.exists():  # the run was started by torchrun, with a config of its own
        return
    try:
        config = load_config(TrainConfig, path)
        config.training.batch_size = lanes
        save_config(config, path)
    except (ConfigError, OSError) as error:
        logger.warning("a requeued attempt will probe training.batch_size again: %s", error)


def _probe(
    config: TrainConfig, world: World, open_trainer: Callable[[TrainConfig], ProbedTrainer]
) -> int:
    started = time.perf_counter()
    groups = config.parallel.ranks // config.parallel.sequence
    data = open_training(config.dataset, config.model.head.num_classes)
    frames = sum(recording.frames for recording in data.recordings)
    most = min(MOST_LANES, max(1, frames // config.training.sequence_length))
    limit = memory_limit(world.device, world.local_size)
    probes: list[Probe] = []

    def measure(lanes: int) -> Probe:
        probe = _measured(config, world, open_trainer, lanes, limit)
        probes.append(probe)
        return probe

    lanes = search(measure, unit=groups, most=most, faster=world.device.type == "cpu")
    if world.is_main:
        filled = max(probe.filled for probe in probes if probe.lanes == lanes)
        logger.info(
            "training.batch_size=%d fills %.0f %% of the memory, after a probe of %s (%.0f s); to "
            "repeat it: training.batch_size=%d",
            lanes,
            100 * filled * FILLED,
            plural(len(probes), "size"),
            time.perf_counter() - started,
            lanes,
        )
    return lanes


def search(measure: Callable[[int], Probe], *, unit: int, most: int, faster: bool) -> int:
    """The largest number of lanes that fits.

    Args:
        measure: lanes -> how they fill the memory. Only called with sizes that seem to fit.
        unit: the lanes are a multiple of it.
        most: lanes, at most; `unit` lanes are always tried.
        faster: whether to stop doubling where the speed grows by less than GAIN.

    Raises:
        UserError: `unit` lanes do not fit.
    """
    best = measure(unit)
    if best.filled > 1:
        raise UserError(
            f"training.batch_size=auto: {plural(unit, 'lane')} need "
            f"{best.filled * FILLED:.0%} of the memory. Lower training.sequence_length or the "
            "size of the model, or give a number: training.batch_size=N"
        )
    per_lane = best.filled / unit  # at most: a part of it does not grow with the lanes
    too_large = most // unit * unit + unit
    while 2 * best.lanes < too_large:
        lanes = 2 * best.lanes
        if best.filled + per_lane * (lanes - best.lanes) > 1:
            too_large = lanes
            break
        probe = measure(lanes)
        if probe.filled > 1:
            too_large = lanes
            break
        if faster and probe.frames_per_s < GAIN * best.frames_per_s:
            return best.lanes
        per_lane = max(0.0, probe.filled - best.filled) / (lanes - best.lanes)
        best = probe
    while too_large - best.lanes > max(unit, best.lanes // 8):
        lanes = (best.lanes + too_large) // 2 // unit * unit
        if lanes == best.lanes:
            break
        if best.filled + per_lane * (lanes - best.lanes) > 1:
            too_large = lanes
            continue
        probe = measure(lanes)
        if probe.filled > 1:
            too_large = lanes
        else:
            best = probe
    return best.lanes


def memory_limit(device: torch.device, local_size: int) -> int:
    """Bytes that this process may use: of its GPU, or its part of the machine's memory.

    On a CPU the limit of a job or container counts, too.

    Args:
        local_size: ranks on this machine, which divide its memory among them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limit = resident_bytes() + psutil.virtual_memory().available // local_size
    of_group = cgroup_memory_limit()
    return limit if of_group is None else min(limit, of_group // local_size)


def _measured(
    config: TrainConfig,
    world: World,
    open_trainer: Callable[[TrainConfig], ProbedTrainer],
    lanes: int,
    limit: int,
) -> Probe:
    """A collective."""
    reset_peak_bytes(world.device)
    try:
        seconds = _seconds(open_trainer, _probed(config, lanes))
    except Exception as error:
        if not out_of_memory(error):
            raise
        if world.size == 1:
            return Probe(lanes, math.inf, 0.0)
        raise UserError(
            f"training.batch_size=auto: a rank ran out of memory with {plural(lanes, 'lane')}; "
            "give a number: training.batch_size=N"
        ) from error
    finally:
        gc.collect()
    filled = peak_bytes(world.device) / (FILLED * limit)
    combined = over_ranks({"filled": filled, "seconds": seconds}, world.device)
    frames = lanes * config.training.sequence_length
    return Probe(lanes, combined["filled"], frames / combined["seconds"])


def _seconds(open_trainer: Callable[[TrainConfig], ProbedTrainer], config: TrainConfig) -> float:
    """Trains some micro-batches in a temporary folder. The time of the last one."""
    with TemporaryDirectory(prefix="evspan-probe-") as folder, _without_information():
        trainer = open_trainer(replace(config, run_dir=folder))
        try:
            for _ in range(MICRO_BATCHES):
                started = time.perf_counter()
                trainer.train_micro_batch()
            return time.perf_counter() - started
        finally:
            trainer.close()


@contextmanager
def _without_information() -> Iterator[None]:
    """A probe logs warnings only: the run itself repeats what a trainer logs at its start."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _probed(config: TrainConfig, lanes: int) -> TrainConfig:
    """The config of a run that only trains some micro-batches."""
    training = replace(
        config.training,
        batch_size=lanes,
        gradient_accumulation_steps=1,
        max_steps=max(config.training.max_steps, 10 * MICRO_BATCHES),
        compile=False,
        num_workers=0,
        profile=[],
    )
    checkpoint = replace(config.checkpoint, resume=False, init_from="")
    return replace(config, training=training, checkpoint=checkpoint)
