"""The ranks of tests/pipeline/test_checkpoint_layouts.py: parts of runs, from any checkpoint.

    python tests/support/checkpoint_ranks.py FOLDER NAME...

with torchrun's variables. Stretch NAME trains in FOLDER/NAME and writes {step: losses} to
FOLDER/NAME.json.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.step_report import StepReport
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.parallel.reductions import barrier
from evspan.pipeline.parallel.world import open_world

STEPS = 6  # of a whole run
CUT = 2  # the step at which a run is cut in two


@dataclass(frozen=True)
class Case:
    """A layout and its options."""

    ranks: int = 1
    sequence: int = 1
    stage: int = 0
    precision: str = "fp32"
    gradient_accumulation_steps: int = 1
    attention: bool = False
    dws_conv: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Stretch:
    """A part of a run.

    after: stretch and step to continue from. damaged: a file of rank 1 in the next checkpoint of
    that stretch, which is then there, too, with a flipped bit.
    """

    case: Case
    until: int = STEPS
    after: tuple[str, int] | None = None
    damaged: str = ""


SAME = {  # two ranks that continue as they were, to the last bit
    "stage 0, bf16": {"stage": 0, "precision": "bf16"},
    "stage 1, bf16, accumulation": {
        "stage": 1,
        "precision": "bf16",
        "gradient_accumulation_steps": 2,
    },
    "stage 2, relay": {"stage": 2, "sequence": 2, "dws_conv": True},
    "stage 3, offload": {"stage": 3, "offload": True},
    "stage 3, bf16, attention over ranks": {
        "stage": 3,
        "precision": "bf16",
        "sequence": 2,
        "attention": True,
    },
}
QUICK = ("stage 0, bf16",)
WALK = [  # data x sequence, ZeRO stage, last step; each continues the previous one
    ("walk 2x1", {"ranks": 2, "stage": 1}, 2),
    ("walk 1x2", {"ranks": 2, "sequence": 2, "stage": 3}, 3),
    ("walk 4x1", {"ranks": 4, "stage": 0}, 5),
    ("walk 1x1", {"ranks": 1, "stage": 2}, STEPS),
]
BACK = [
    ("back 1x1", {"ranks": 1, "stage": 0}, 2),
    ("back 2x1", {"ranks": 2, "stage": 3, "offload": True}, 4),
    ("back 1x2", {"ranks": 2, "sequence": 2, "stage": 1}, STEPS),
]


def stretches() -> dict[str, Stretch]:
    """All stretches by name, in an order in which they can run."""
    out = {"whole": Stretch(Case(stage=1, attention=True))}
    for name, form in SAME.items():
        case = Case(**{"ranks": 2, **form})
        damaged = "lanes-0002-0004.safetensors" if name in QUICK else ""
        resumed = Stretch(case, after=(name, CUT), damaged=damaged)
        out |= {name: Stretch(case), f"{name}, resumed": resumed}
    for walk in (WALK, BACK):
        before = None
        for name, form, until in walk:
            out[name] = Stretch(Case(**{"attention": True, **form}), until, before)
            before = (name, until)
    return out


def config(case: Case, folder: Path, run_dir: Path) -> TrainConfig:
    """A micro detector whose state and attention matter; learning rates that move its gates."""
    return TrainConfig(
        run_dir=str(run_dir),
        seed=5,
        model=ModelConfig(
            backbone=BackboneConfig(
                embed_dim=8,
                dim_head=4,
                ls_init_value=0.5,
                dws_conv=case.dws_conv,
                partition_split_32=1,
            ),
            fpn=FpnConfig(enable_small_object_attention=case.attention),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(folder / "shards")),
        training=TrainingConfig(
            max_steps=2 * STEPS,
            batch_size=4,
            sequence_length=4,
            gradient_accumulation_steps=case.gradient_accumulation_steps,
            precision=Precision[case.precision],
            num_workers=1,
            log_every=1,
            peak_tflops=1.0,  # otherwise each rank measures one
        ),
        optimizer=OptimizerConfig(lr=1e-3, warmup_fraction=0.2, gate_lr_multiplier=100),
        deepspeed=DeepSpeedConfig(
            stage=case.stage,
            offload_optimizer=case.offload,
            offload_parameters=case.offload and case.stage == 3,
        ),
        parallel=ParallelConfig(ranks=case.ranks, sequence=case.sequence),
        checkpoint=CheckpointConfig(every=CUT, keep=9),
    )


def flip_bit(path: Path) -> None:
    """In the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def run(folder: Path, name: str, stretch: Stretch, world) -> None:
    """Trains a stretch and writes its losses."""
    if stretch.after and world.is_main:
        previous, number = stretch.after
        steps = [number, 2 * number] if stretch.damaged else [number]
        for step in steps:
            path = Path("checkpoints", f"step-{step:08d}")
            shutil.copytree(folder / previous / path, folder / name / path)
        if stretch.damaged:
            flip_bit(folder / name / path / stretch.damaged)
    barrier()
    losses = {}

    def on_step(report: StepReport) -> None:
        losses[report.step] = [*report.losses, report.learning_rate]
        if report.step >= stretch.until:
            trainer.end_after_step()

    trainer = Trainer(config(stretch.case, folder, folder / name), world, on_step=on_step)
    try:
        trainer.run(StopFlag())
    except SystemExit as end:
        assert end.code == STOPPED_EXIT_CODE
    trainer.engine.close()
    if world.is_main:
        (folder / f"{name}.json").write_text(json.dumps(losses))


def main(folder: Path, names: list[str]) -> None:
    """Trains the stretches one after the other."""
    config = ParallelConfig(ranks=int(os.environ["WORLD_SIZE"]), timeout_s=60, threads=1)
    with open_world(config) as world:
        for name in names:
            run(folder, name, stretches()[name], world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
