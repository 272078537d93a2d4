"""Trains a micro detector with one rank layout after the other; compares each with one rank."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    FpnConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from evspan.conf.text import plural
from evspan.pipeline.checkpoint_files import LATEST
from evspan.pipeline.engine.layouts import DeviceInfo, Layout, LayoutResult
from evspan.pipeline.engine.resources import peak_bytes, reset_peak_bytes
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.step_report import LossSummary, StepReport
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.parallel.reductions import barrier, gather_json
from evspan.pipeline.parallel.world import World
from torch import Tensor

TIMEOUT_S = 120  # a collective on one machine that takes longer is stuck
REFERENCE_FILE = "reference.pt"
LEAST_LOSS = 1e-3  # differences of smaller losses are relative to this
LEAST_GRADIENT_FRACTION = 1e-4  # of the largest gradient; the same for smaller gradients


@dataclass(frozen=True)
class ComparisonConfig:
    """What all layouts have in common, so that all compute the same.

    Attributes:
        folder: contains `shards`; gets the runs and the reference.
        ranks: the largest number of ranks; it decides the batch.
        steps: optimizer steps per layout. Runs are resumed after half of them.
        threads: per rank.
    """

    folder: Path
    ranks: int
    steps: int
    threads: int

    @property
    def resume_step(self) -> int:
        """The step whose checkpoint is resumed."""
        return self.steps // 2


def train_config(layout: Layout, comparison: ComparisonConfig, run_dir: Path) -> TrainConfig:
    """A micro detector whose carry and attention matter from the first step on.

    The numbers of lanes and frames are divisible for all layouts of `comparison.ranks` ranks.
    """
    ranks = comparison.ranks
    return TrainConfig(
        run_dir=str(run_dir),
        seed=1,
        model=ModelConfig(
            backbone=BackboneConfig(
                embed_dim=16, dim_head=8, ls_init_value=0.5, partition_split_32=1
            ),
            fpn=FpnConfig(enable_small_object_attention=True, identity_init=False),
        ),
        dataset=DatasetConfig(root=str(comparison.folder / "shards")),
        training=TrainingConfig(
            max_steps=10 * comparison.steps,
            batch_size=max(2, ranks),
            sequence_length=ranks * math.ceil(4 / ranks),
            num_workers=1,
            precision=Precision.fp32,  # the bounds are those of float32
            log_every=1,
            frames_per_call=layout.frames_per_call,
            evaluate_every=0,
        ),
        optimizer=OptimizerConfig(lr=2e-4, warmup_fraction=0.2),
        deepspeed=DeepSpeedConfig(stage=layout.stage),
        parallel=ParallelConfig(
            ranks=layout.ranks,
            sequence=layout.sequence,
            exchange=layout.exchange,
            timeout_s=TIMEOUT_S,
            threads=comparison.threads,
        ),
        checkpoint=CheckpointConfig(every=comparison.resume_step, keep=9),
    )


# -- training --------------------------------------------------------------------------------------
class ObservedRun:
    """Trains until step `until` and stops there as a stop signal would stop it.

    Attributes:
        losses: by step.
        gradients: those of step 1, by parameter name; empty if the run resumed.
        fastest_s: seconds of the fastest step, without the first one of this process. Data waits
            and checkpoints are not included.
    """

    def __init__(self, config: TrainConfig, world: World, until: int) -> None:
        self.until = until
        self.losses: dict[int, LossSummary] = {}
        self.gradients: dict[str, Tensor] = {}
        self.fastest_s = math.inf
        self.trainer = Trainer(config, world, on_step=self._on_step, gradient_steps={1})

    def train(self) -> None:
        """Trains; on return the engine is closed."""
        try:
            self.trainer.run(StopFlag())
        except SystemExit as stopped:
            if stopped.code != STOPPED_EXIT_CODE:
                raise
        finally:
            self.trainer.close()
            self.trainer.engine.close()

    def _on_step(self, report: StepReport) -> None:
        device = self.trainer.world.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if self.losses:
            self.fastest_s = min(self.fastest_s, time.perf_counter() - report.started)
        self.losses[report.step] = report.losses
        self.gradients |= report.gradients
        if report.step >= self.until:
            self.trainer.end_after_step()


def train_until(
    config: TrainConfig, world: World, until: int, resume_from: Path | None = None
) -> ObservedRun:
    """Trains to step `until`, from the start or from a copy of the checkpoint `resume_from`."""
    if resume_from is not None and world.is_main:
        copy = Path(config.run_dir) / "checkpoints" / resume_from.name
        shutil.copytree(resume_from, copy)
        (copy.parent / LATEST).write_text(f"{copy.name}\n")
    barrier("end of a layout")
    run = ObservedRun(config, world, until)
    run.train()
    return run


# -- comparing -------------------------------------------------------------------------------------
def loss_difference(
    losses: Mapping[int, LossSummary], reference: Mapping[int, LossSummary]
) -> float:
    """The largest relative difference of any loss of any step.

    Args:
        losses, reference: by step.

    Returns:
        NaN if `losses` is empty or has a step that the reference lacks.
    """
    if not losses or not losses.keys() <= reference.keys():
        return math.nan
    actual = torch.tensor([losses[step] for step in losses], dtype=torch.float64)
    expected = torch.tensor([reference[step] for step in losses], dtype=torch.float64)
    relative = (actual - expected).abs() / expected.abs().clamp(min=LEAST_LOSS)
    return float(relative.max())


def gradient_difference(gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest difference of any gradient, relative to its parameter's largest gradient.

    A parameter with small gradients (a bias before a norm, whose gradient is rounding error) is
    compared relative to LEAST_GRADIENT_FRACTION of the largest gradient of all.

    Args:
        gradients, reference: by parameter name.

    Returns:
        NaN if the parameters differ or a gradient is NaN.
    """
    if gradients.keys() != reference.keys():
        return math.nan
    largest = {name: float(expected.abs().max()) for name, expected in reference.items()}
    floor = LEAST_GRADIENT_FRACTION * max(largest.values())
    result = 0.0
    for name, expected in reference.items():
        difference = float((gradients[name] - expected).abs().max())
        relative = difference / max(largest[name], floor)
        if math.isnan(relative):
            return math.nan
        result = max(result, relative)
    return result


class Reference(NamedTuple):
    """What one rank computes. losses: by step. gradients: of step 1, by parameter name."""

    losses: dict[int, LossSummary]
    gradients: dict[str, Tensor]


class SavedCheckpoint(NamedTuple):
    """A checkpoint and the name of the layout that saved it."""

    layout: str
    folder: Path


class LayoutComparison:
    """Trains the layouts of this world one after the other.

    The first layout of a world of one rank becomes the reference. It is saved in the folder, where
    larger worlds read it.
    """

    def __init__(self, world: World, config: ComparisonConfig) -> None:
        torch.backends.cudnn.allow_tf32 = False  # its 10 bits would hide small differences
        self.world = world
        self.config = config
        self._reference: Reference | None = None
        self._previous: SavedCheckpoint | None = None
        if world.size > 1:
            self._load_reference()

    def run(self, layout: Layout) -> LayoutResult:
        """Trains a layout, resumes it, and compares the losses and gradients."""
        reset_peak_bytes(self.world.device)
        steps = self.config.steps
        run = train_until(self._train_config(layout, "whole"), self.world, steps)
        peak = max(gather_json(peak_bytes(self.world.device), name="peak memory"))
        checkpoint = SavedCheckpoint(layout.name, self._checkpoint_folder(run))
        if self._reference is None:
            self._reference = Reference(run.losses, run.gradients)
            self._save_reference(self._reference, checkpoint)
        reference = self._reference
        loss = math.nan
        if len(run.losses) == steps:
            loss = loss_difference(run.losses, reference.losses)
        training = run.trainer.config.training
        previous = self._previous
        self._previous = checkpoint
        resumed = self._resume(layout, "resumed", checkpoint.folder, run.losses)
        resumed_other = 0.0
        if previous is not None:
            resumed_other = self._resume(layout, "other", previous.folder, reference.losses)
        return LayoutResult(
            layout=layout.name,
            stage=layout.stage,
            skipped=run.trainer.skipped,
            peak_bytes=peak,
            frames_per_s=training.batch_size * training.sequence_length / run.fastest_s,
            loss=loss,
            gradients=gradient_difference(run.gradients, reference.gradients),
            resumed=resumed,
            other="" if previous is None else previous.layout,
            resumed_other=resumed_other,
        )

    def _resume(
        self, layout: Layout, name: str, checkpoint: Path, expected: Mapping[int, LossSummary]
    ) -> float:
        """The difference of the losses after resuming; NaN if the run did other steps."""
        config = self._train_config(layout, name)
        run = train_until(config, self.world, self.config.steps, checkpoint)
        if set(run.losses) != set(range(self.config.resume_step + 1, self.config.steps + 1)):
            return math.nan
        return loss_difference(run.losses, expected)

    def _train_config(self, layout: Layout, name: str) -> TrainConfig:
        folder = f"{layout.name} zero{layout.stage}".replace(" ", "-")
        run_dir = self.config.folder / "runs" / folder / name
        return train_config(layout, self.config, run_dir)

    def _checkpoint_folder(self, run: ObservedRun) -> Path:
        return run.trainer.checkpoints.folder / f"step-{self.config.resume_step:08d}"

    def _save_reference(self, reference: Reference, checkpoint: SavedCheckpoint) -> None:
        contents = {
            "losses": {step: [*losses] for step, losses in reference.losses.items()},
            "gradients": reference.gradients,
            "layout": checkpoint.layout,
            "checkpoint": str(checkpoint.folder),
        }
        torch.save(contents, self.config.folder / REFERENCE_FILE)

    def _load_reference(self) -> None:
        contents = torch.load(self.config.folder / REFERENCE_FILE, weights_only=True)
        losses = {step: LossSummary(*values) for step, values in contents["losses"].items()}
        self._reference = Reference(losses, contents["gradients"])
        self._previous = SavedCheckpoint(contents["layout"], Path(contents["checkpoint"]))


# -- device ----------------------------------------------------------------------------------------


def device_info(world: World, threads: int) -> DeviceInfo:
    """The device of this rank. threads: per rank."""
    gpus = torch.cuda.device_count()
    if world.device.type == "cuda":
        return DeviceInfo(f"{torch.cuda.get_device_name(world.device)}, NCCL", gpus)
    return DeviceInfo(f"CPU ({_cpu_model()}), {plural(threads, 'thread')} per rank, gloo", gpus)


def _cpu_model() -> str:
    """The CPU's model name, which neither psutil nor `platform` reports on Linux."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"
