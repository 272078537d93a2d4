"""What the ranks of `evspan smoke` do: train a few steps under one layout after the other, and compare with one rank.

    python -m evspan.launch.smoke_rank FOLDER RANKS STEPS    with torchrun's variables; FOLDER/shards is there

One rank trains the reference, RANKS ranks every layout that so many have. Rank 0 adds a line of JSON per layout to
FOLDER/told-WORLD.jsonl.
"""

import ctypes
import json
import math
import os
import shutil
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.conf.schema.layout import ExchangeKind
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    FpnConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.launch.cli.command import run_command
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.step_report import LossSummary, StepReport
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.parallel.rank_env import place
from evspan.pipeline.parallel.reductions import barrier, gather_objects
from evspan.pipeline.parallel.world import World, open_world
from torch import Tensor

TIMEOUT_S = 120  # a collective among ranks of one machine that waits longer never ends
REFERENCE = "reference.pt"


@dataclass(frozen=True)
class Layout:
    """data x sequence ranks with a ZeRO stage. frames_per_call: as in the config."""

    ranks: int
    sequence: int = 1
    exchange: ExchangeKind = ExchangeKind.auto
    stage: int = 0
    frames_per_call: int = 0

    @property
    def name(self) -> str:
        exchange = f" {self.exchange.name}" if self.sequence > 1 else ""
        return f"{self.ranks // self.sequence}x{self.sequence}{exchange}{' frame by frame' if self.frames_per_call else ''}"


ALONE = [Layout(1), Layout(1, frames_per_call=1)]  # the reference; the same but for rounding


def layouts(ranks: int) -> list[Layout]:
    """All cuts of so many ranks into data x sequence, under both exchanges, with the ZeRO stages in turn."""
    if ranks == 1:
        return [Layout(1, stage=stage) for stage in (1, 2, 3)]
    cuts = [
        (sequence, exchange)
        for sequence in range(2, ranks + 1)
        if ranks % sequence == 0
        for exchange in (ExchangeKind.transpose, ExchangeKind.relay)
    ]
    return [
        Layout(ranks, stage=1),
        *(Layout(ranks, *cut, stage=(2, 3, 1)[i % 3]) for i, cut in enumerate(cuts)),
    ]


def config(
    layout: Layout, folder: Path, run: Path, *, ranks: int, steps: int, threads: int
) -> TrainConfig:
    """A micro detector whose carry and attention matter from the first step; lanes and frames that `ranks` ranks can share."""
    return TrainConfig(
        run_dir=str(run),
        seed=1,
        model=ModelConfig(
            backbone=BackboneConfig(
                embed_dim=16, dim_head=8, ls_init_value=0.5, partition_split_32=1
            ),
            fpn=FpnConfig(enable_small_object_attention=True, identity_init=False),
        ),
        dataset=DatasetConfig(root=str(folder / "shards")),
        training=TrainingConfig(
            max_steps=10 * steps,
            batch_size=max(2, ranks),
            sequence_length=ranks * math.ceil(4 / ranks),
            num_workers=1,
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
            threads=threads,
        ),
        checkpoint=CheckpointConfig(every=steps // 2, keep=9),
    )


# -- training, observed --------------------------------------------------------------------------
class ObservedRun:
    """Trains until step `until` and stops there as a stop signal makes it.

    losses: by step. gradients: of step 1. fastest_s: of a step, without the first of the process,
    data waits and checkpoints.
    """

    def __init__(self, config: TrainConfig, world: World, until: int) -> None:
        self.until = until
        self.stop_flag = StopFlag()
        self.losses: dict[int, LossSummary] = {}
        self.gradients: dict[str, Tensor] = {}
        self.fastest_s = math.inf
        self.trainer = Trainer(config, world, on_step=self._on_step, gradient_steps={1})

    def _on_step(self, report: StepReport) -> None:
        device = self.trainer.world.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if self.losses:
            self.fastest_s = min(self.fastest_s, time.perf_counter() - report.started)
        self.losses[report.step] = report.losses
        self.gradients |= report.gradients
        self._stop_in_time(report.step)

    def _stop_in_time(self, step: int) -> None:
        if step + 1 >= self.until:
            self.stop_flag.request()

    def train(self) -> "ObservedRun":
        self._stop_in_time(self.trainer.step)
        try:
            self.trainer.run(self.stop_flag)
        except SystemExit as end:
            if end.code != STOPPED_EXIT_CODE:
                raise
        finally:
            self.trainer.close()
            self.trainer.engine.close()
        return self


def trained(
    config: TrainConfig, world: World, until: int, after: Path | None = None
) -> ObservedRun:
    """Trained to step `until`, from nothing or from a copy of checkpoint `after`."""
    if after and world.is_main:
        shutil.copytree(after, Path(config.run_dir) / "checkpoints" / after.name)
    barrier()
    return ObservedRun(config, world, until).train()


# -- comparing -----------------------------------------------------------------------------------------------------
def loss_distance(losses: dict[int, LossSummary], wanted: dict[int, LossSummary]) -> float:
    """The largest relative one of any step and part (positives are one); nan where a step is missing or skipped."""
    if not losses or not losses.keys() <= wanted.keys():
        return math.nan
    mine = torch.tensor([losses[step] for step in losses], dtype=torch.float64)
    theirs = torch.tensor([wanted[step] for step in losses], dtype=torch.float64)
    return float(((mine - theirs).abs() / theirs.abs().clamp(min=1e-3)).max())


def gradient_distance(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest of any parameter, relative to that parameter's largest gradient; nan where others have one.

    A parameter whose gradients are below 1e-4 of the largest of all (a bias before a norm: rounding of what is zero) is taken
    relative to that.
    """
    if gradients.keys() != wanted.keys():
        return math.nan
    floor = 1e-4 * max(float(w.abs().max()) for w in wanted.values())
    each = [
        float((gradients[name] - w).abs().max()) / max(float(w.abs().max()), floor)
        for name, w in wanted.items()
    ]
    return math.nan if any(map(math.isnan, each)) else max(each)


# -- memory --------------------------------------------------------------------------------------------------------
def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # else what the layout before has freed would count
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then that of all layouts so far


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10


def device_name(world: World, threads: int) -> str:
    if world.device.type == "cuda":
        return f"{torch.cuda.get_device_name(world.device)}, NCCL"
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"CPU ({models[0] if models else 'unknown'}), {threads} thread{'s' * (threads > 1)} a rank, gloo"


# -- one rank ------------------------------------------------------------------------------------------------------
class Smoke:
    """The layouts of this world, one after the other.

    ranks: how many the whole smoke test is for; they decide the batch and the threads, so that all its worlds compute the same.
    """

    def __init__(self, world: World, folder: Path, *, ranks: int, steps: int, threads: int) -> None:
        self.world, self.folder, self.ranks, self.steps, self.threads = (
            world,
            folder,
            ranks,
            steps,
            threads,
        )
        self.cut = steps // 2
        self.before: tuple[str, Path] | None = (
            None  # the layout before, and its checkpoint at `cut`
        )
        if world.size > 1:
            found = torch.load(folder / REFERENCE, weights_only=True)
            self.reference: tuple[dict[int, LossSummary], dict[str, Tensor]] = (
                {step: LossSummary(*losses) for step, losses in found["losses"].items()},
                found["gradients"],
            )
            self.before = (found["name"], Path(found["checkpoint"]))

    def run(self, layout: Layout) -> dict[str, Any]:
        """What the layout's line tells. Distances: of the losses and the first gradients from the reference's, and of the losses
        after resuming from the layout's own checkpoint and from another's."""
        forget_peak(self.world.device)
        whole = trained(self._config(layout, "whole"), self.world, self.steps)
        trainer = whole.trainer
        checkpoint = trainer.checkpoints.folder / f"step-{self.cut:08d}"
        if self.before is None:
            self.reference = whole.losses, whole.gradients
            torch.save(
                {
                    "losses": {step: [*losses] for step, losses in whole.losses.items()},
                    "gradients": whole.gradients,
                    "name": layout.name,
                    "checkpoint": str(checkpoint),
                },
                self.folder / REFERENCE,
            )
        peak = max(gather_objects(peak_bytes(self.world.device)))
        frames = trainer.config.training.batch_size * trainer.config.training.sequence_length
        told = {
            "layout": layout.name,
            "stage": layout.stage,
            "skipped": trainer.skipped,
            "peak": peak,
            "speed": frames / whole.fastest_s,
            "loss": loss_distance(whole.losses, self.reference[0])
            if len(whole.losses) == self.steps
            else math.nan,
            "gradients": gradient_distance(whole.gradients, self.reference[1]),
            "resumed": self._resumed(layout, "resumed", checkpoint, whole.losses),
        }
        if self.before:
            told["other"] = self.before[0]
            told["resumed_other"] = self._resumed(
                layout, "other", self.before[1], self.reference[0]
            )
        self.before = layout.name, checkpoint
        return told

    def _resumed(
        self, layout: Layout, name: str, checkpoint: Path, wanted: dict[int, LossSummary]
    ) -> float:
        losses = trained(self._config(layout, name), self.world, self.steps, checkpoint).losses
        return (
            loss_distance(losses, wanted)
            if set(losses) == set(range(self.cut + 1, self.steps + 1))
            else math.nan
        )

    def _config(self, layout: Layout, name: str) -> TrainConfig:
        run = self.folder / "runs" / f"{layout.name} zero{layout.stage}".replace(" ", "-") / name
        return config(
            layout, self.folder, run, ranks=self.ranks, steps=self.steps, threads=self.threads
        )


def main(folder: Path, ranks: int, steps: int, threads: int) -> None:
    size = place(os.environ).size
    torch.backends.cudnn.allow_tf32 = False  # 10 bits would hide what is compared
    with open_world(ParallelConfig(ranks=size, timeout_s=TIMEOUT_S, threads=threads)) as world:
        smoke = Smoke(world, folder, ranks=ranks, steps=steps, threads=threads)
        with (
            (folder / f"told-{size}.jsonl").open("a") as told,
            (folder / "training.log").open("a") as log,
        ):
            tell(
                told,
                {"device": device_name(world, threads), "gpus": torch.cuda.device_count()},
                world,
            )
            for layout in (ALONE if size == 1 else []) + (layouts(ranks) if size == ranks else []):
                began = time.perf_counter()
                with redirect_stdout(log):
                    row = smoke.run(layout)
                tell(told, row, world)
                if world.is_main:
                    print(
                        f"  {layout.name}, ZeRO {layout.stage}: {time.perf_counter() - began:.1f} s",
                        flush=True,
                    )


def tell(file: Any, row: dict[str, Any], world: World) -> None:
    if world.is_main:
        file.write(json.dumps(row) + "\n")
        file.flush()


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), *map(int, sys.argv[2:5])))
