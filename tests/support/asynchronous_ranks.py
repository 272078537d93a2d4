"""The ranks of tests/pipeline/test_asynchronous_layouts.py: runs that save in a thread, and not.

    python -m support.asynchronous_ranks FOLDER NAME...

with torchrun's variables. Trains each layout in FOLDER/NAME/synchronous and /asynchronous; then
trains once with a disk of rank 1 that is full, and writes every rank's error to FOLDER.
"""

import os
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from evspan.conf.errors import UserError
from evspan.conf.schema.training import EngineKind, ParallelConfig, TrainConfig
from evspan.pipeline.engine.checkpoints import THREAD, Checkpoints
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.parallel.reductions import barrier
from evspan.pipeline.parallel.world import World, open_world
from support.checkpoint_ranks import Case, config

STEPS = 3
EVERY = 2
FULL = "full disk"
COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_to_all_single",
    "broadcast",
    "barrier",
)


@dataclass(frozen=True)
class Layout:
    """A case and the engine that steps it."""

    case: Case
    engine: EngineKind = EngineKind.deepspeed


LAYOUTS = {
    "plain": Layout(Case(ranks=2), EngineKind.plain),
    "zero 0": Layout(Case(ranks=2, stage=0, precision="bf16")),
    "zero 1, sequence": Layout(Case(ranks=2, sequence=2, stage=1, attention=True)),
    "zero 2, accumulation": Layout(Case(ranks=2, stage=2, gradient_accumulation_steps=2)),
    "zero 3, offload": Layout(Case(ranks=2, stage=3, offload=True)),
}


def train_config(layout: Layout, folder: Path, run: Path, *, asynchronous: bool) -> TrainConfig:
    """A short run that saves every second step."""
    built = config(layout.case, folder, run)
    built.training = replace(built.training, max_steps=STEPS, engine=layout.engine)
    built.evaluation = replace(built.evaluation, at_end=False)
    built.checkpoint = replace(built.checkpoint, every=EVERY, asynchronous=asynchronous)
    return built


def train(run_config: TrainConfig, world: World) -> None:
    """Trains to the end, in this process."""
    trainer = Trainer(run_config, world)
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()
        trainer.engine.close()


def train_with_a_full_disk(folder: Path, world: World) -> str:
    """Returns this rank's error; only rank 1 fails, in its thread."""
    real = Checkpoints._write

    def write(checkpoints, temporary, snapshot):
        if world.rank == 1:
            raise OSError(28, "No space left on device", str(temporary))
        return real(checkpoints, temporary, snapshot)

    layout = LAYOUTS["plain"]
    run_config = train_config(layout, folder, folder / FULL, asynchronous=True)
    run_config.checkpoint.every = 1
    run_config.training.max_steps = 20
    Checkpoints._write = write
    try:
        train(run_config, world)
    except UserError as error:
        return str(error)
    finally:
        Checkpoints._write = real
    return ""


def refuse_threads(name: str) -> None:
    """Makes a collective of torch.distributed fail in the thread that writes."""
    real = getattr(dist, name, None)
    if real is None:
        return

    def collective(*args, **kwargs):
        assert threading.current_thread().name != THREAD, name
        return real(*args, **kwargs)

    setattr(dist, name, collective)


def main(folder: Path, names: list[str]) -> None:
    """Trains the layouts one after the other."""
    for name in COLLECTIVES:
        refuse_threads(name)
    rank_config = ParallelConfig(ranks=int(os.environ["WORLD_SIZE"]), timeout_s=60, threads=1)
    with open_world(rank_config) as world:
        for name in names:
            for asynchronous in (False, True):
                run = folder / name / ("asynchronous" if asynchronous else "synchronous")
                layout = LAYOUTS[name]
                train(train_config(layout, folder, run, asynchronous=asynchronous), world)
                if layout.case.stage < 3:  # whose hooks need it
                    assert "torch._dynamo" not in sys.modules, "torch's compiler was imported"
        error = train_with_a_full_disk(folder, world)
        (folder / f"error-{world.rank}").write_text(error)
        barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
