"""The ranks of tests/pipeline/test_layouts.py: training in many layouts of one world.

python -m layout_ranks FOLDER    with torchrun's variables

Reads FOLDER/cases.pt, writes FOLDER/RANK.pt: the results of each case.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from evspan.conf.schema.layout import ExchangeKind
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    DeepSpeedConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    Sampling,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.data.device_batches import device_batches
from evspan.pipeline.engine.deepspeed_engine import DeepSpeedEngine
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.parallel.world import open_world
from support.plain_engine import ExactEngine, PlainEngine

ENGINES = {"deepspeed": DeepSpeedEngine, "plain": PlainEngine, "exact": ExactEngine}


@dataclass(frozen=True)
class Case:
    """A layout and what it trains on."""

    ranks: int = 1
    sequence: int = 1
    exchange: str = "auto"
    engine: str = "deepspeed"
    stage: int = 0
    dws_conv: bool = False
    attention: bool = False
    gradient_accumulation_steps: int = 1
    precision: str = "fp32"
    lanes: int = 4
    frames: int = 4
    steps: int = 5
    shards: str = "dense"
    sampling: str = "mixed"
    save_memory: bool = False  # activation checkpointing, few frames a call, CPU offload
    encoded: bool = False  # frames travel encoded, as to a GPU
    freeze: tuple[str, ...] = ()
    multipliers: tuple[tuple[str, float], ...] = ()

    def alone(self, engine: str, **changes) -> "Case":
        """The same training on one rank of this engine, without options that must not matter."""
        plain = replace(
            self,
            ranks=1,
            sequence=1,
            exchange="auto",
            engine=engine,
            stage=0,
            precision="fp32",
            save_memory=False,
            encoded=False,
        )
        # Longer than the case where it is short: cases of several lengths share a reference.
        return replace(plain, **{"steps": 5 if self.steps > 3 else 3, **changes})


def config(case: Case, shards: str, run_dir: str) -> TrainConfig:
    """A micro detector in which every part matters: LayerScale 0.5, published attention."""
    return TrainConfig(
        run_dir=run_dir,
        seed=5,
        model=ModelConfig(
            backbone=BackboneConfig(
                embed_dim=8,
                dim_head=4,
                ls_init_value=0.5,
                dws_conv=case.dws_conv,
                partition_split_32=1,
            ),
            fpn=FpnConfig(enable_small_object_attention=case.attention, identity_init=False),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=shards),
        training=TrainingConfig(
            max_steps=20,
            batch_size=case.lanes,
            sequence_length=case.frames,
            gradient_accumulation_steps=case.gradient_accumulation_steps,
            sampling=Sampling[case.sampling],
            precision=Precision[case.precision],
            num_workers=1,
            activation_checkpointing=case.save_memory,
            frames_per_call=3 if case.save_memory else 0,
            freeze=[*case.freeze],
        ),
        optimizer=OptimizerConfig(
            lr=1e-3, warmup_fraction=0.2, lr_multipliers=dict(case.multipliers)
        ),
        deepspeed=DeepSpeedConfig(
            stage=case.stage,
            offload_optimizer=case.save_memory and case.stage > 0,
            offload_parameters=case.save_memory and case.stage == 3,
        ),
        parallel=ParallelConfig(
            ranks=case.ranks, sequence=case.sequence, exchange=ExchangeKind[case.exchange]
        ),
    )


def run(case: Case, shards: str, world) -> dict:
    """Trains a case.

    Returns:
        losses (steps * accumulation, 5) over all ranks, gradients of the first step, number of
        labelled frames of this rank by micro-batch.
    """
    with TemporaryDirectory() as run_dir:
        trainer = Trainer(config(case, shards, run_dir), world, ENGINES[case.engine])
        losses = []
        gradients = {}
        labelled = []
        batches = device_batches(trainer.loader.batches(0, encoded=case.encoded), world.device)
        for number in range(1, case.steps * case.gradient_accumulation_steps + 1):
            batch = next(batches)
            result = trainer.micro_batch(
                batch, collect_gradients=number == case.gradient_accumulation_steps
            )
            losses.append(result.losses)
            gradients.update(result.gradients)
            labelled.append(len(batch.counts))
        batches.close()
        trainer.close()
        if isinstance(trainer.engine, DeepSpeedEngine):
            trainer.engine.close()
        return {
            "losses": torch.tensor(losses),
            "gradients": gradients,
            "labelled": labelled,
            "skipped": trainer.skipped,
        }


def main(folder: Path) -> None:
    """Trains all cases."""
    config = ParallelConfig(ranks=int(os.environ["WORLD_SIZE"]), timeout_s=60, threads=1)
    with open_world(config) as world:
        out = {}
        for case, shards in torch.load(folder / "cases.pt", weights_only=False):
            start = time.perf_counter()
            out[case] = run(case, shards, world)
            if world.is_main:
                print(f"{time.perf_counter() - start:6.1f} s  {case}", flush=True)
        torch.save(out, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
