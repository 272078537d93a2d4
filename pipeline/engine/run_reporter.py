"""What a run reports while it trains: log lines, TensorBoard scalars, progress, resources."""

import logging
from pathlib import Path
from typing import NamedTuple

from evspan.conf.schema.layout import chosen_exchange
from evspan.conf.schema.training import EvaluationConfig, TrainConfig
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.engine.profiling import Profiler
from evspan.pipeline.engine.resources import Resources, over_ranks
from evspan.pipeline.engine.step_report import LossSummary, StepReport, ThroughputMeter
from evspan.pipeline.evaluation.coco import Metrics
from evspan.pipeline.history import write_progress
from evspan.pipeline.inference.streaming import RecordingResult
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.sequence import SequenceExchange
from evspan.pipeline.parallel.world import World
from evspan.pipeline.tensorboard.run_info import environment
from evspan.pipeline.tensorboard.summaries import write_evaluation, write_run_info
from evspan.pipeline.tensorboard.writer import TensorBoardWriter

logger = logging.getLogger(__name__)
PROFILE_REQUEST = "profile"  # the number of steps to trace, among the metrics that ranks exchange


class Evaluated(NamedTuple):
    """One evaluation of a run: its metrics, and what they were computed from.

    config: with the minimum sizes by which the results were scored.
    weights: 'raw', or 'ema (decay 0.9999, 400 updates)'.
    """

    metrics: Metrics
    results: list[RecordingResult]
    data: Dataset
    config: EvaluationConfig
    seconds: float
    weights: str


class RunReporter:
    """Reports for one rank of a run. Some methods are collectives; rank 0 writes.

    Args:
        writer: of the run's TensorBoard event file.
        profiler: starts a trace that was requested while the run goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        mesh: Mesh,
        exchange: SequenceExchange,
        writer: TensorBoardWriter,
        profiler: Profiler,
    ) -> None:
        self.config = config
        self.world = world
        self.mesh = mesh
        self.exchange = exchange
        self.writer = writer
        self.profiler = profiler
        self.run_dir = Path(config.run_dir)
        self.resources = Resources(world.device)
        self.throughput = ThroughputMeter()

    def log(self, message: str) -> None:
        """Rank 0 logs for all ranks."""
        if self.world.is_main:
            logger.info(message)

    def start(self, dataset: Dataset, detector: Detector, step: int) -> None:
        """Reports what is about to be trained, and starts to measure. A collective.

        Args:
            step: that the run starts or resumes at.
        """
        self._log_start(dataset, detector, step)
        ranks = environment(self.world)
        if self.world.is_main:
            write_run_info(
                self.writer,
                self.config,
                dataset.classes,
                [name for name, _ in detector.named_parameters()],
                ranks,
                step,
                gpu=self.world.device.type == "cuda",
            )
        self.throughput = ThroughputMeter()

    def _log_start(self, dataset: Dataset, detector: Detector, step: int) -> None:
        frames = sum(recording.frames for recording in dataset.recordings)
        position = f"resumes at step {step}" if step else "starts"
        message = (
            f"{self.run_dir}: {position} of {self.config.training.max_steps}; {self._layout()}, "
            f"{len(dataset.recordings)} recordings, {frames} frames"
        )
        if self.config.deepspeed.stage < 3:  # in stage 3 a rank holds a part of each parameter
            parameters = sum(p.numel() for p in detector.parameters())
            message += f", {parameters:,} parameters"
        self.log(f"{message}, {self.config.training.precision.name}")
        if self.config.training.cuda_graphs and self.world.device.type != "cuda":
            self.log("training.cuda_graphs has no effect on a CPU")
        self.log(f"watch it: tensorboard --logdir {self.run_dir}")

    def _layout(self) -> str:
        if self.world.size == 1:
            return "1 rank"
        text = f"{self.world.size} ranks = {self.mesh.data_size} data"
        if self.mesh.sequence_size > 1:
            kind = chosen_exchange(
                self.config.parallel.exchange, dws_conv=self.config.model.backbone.dws_conv
            )
            text += f" x {self.mesh.sequence_size} sequence, exchange {kind.name}"
        return text

    def step(self, report: StepReport, *, skipped: int) -> None:
        """Reports the step, and the speed since the last one that was reported. A collective.

        Args:
            skipped: micro-batches since the run's first step.
        """
        training = self.config.training
        exchange_s = self.exchange.clock.read()
        speed = self.throughput.read()
        metrics = self._rank_metrics(
            report.step,
            data_wait_fraction=speed.data_wait_fraction,
            exchange_fraction=exchange_s / speed.seconds,
        )
        frames_per_step = (
            training.batch_size * training.sequence_length * training.gradient_accumulation_steps
        )
        self.writer.write_scalars(
            {
                **_step_scalars(report),
                "train/skipped_steps": skipped,
                "speed/frames_per_s": speed.frames_per_s,
                "speed/step_ms": 1000 * frames_per_step / speed.frames_per_s,
                **metrics,
            },
            report.step,
        )
        losses = report.losses
        self.log(
            f"step {report.step:6d}  loss {losses.total:8.4f}  iou {losses.iou:7.4f}  "
            f"obj {losses.objectness:7.4f}  cls {losses.classes:7.4f}  "
            f"lr {report.learning_rate:.2e}  |g| {report.gradient_norm:7.3f}  "
            f"{speed.frames_per_s:6.1f} frames/s  "
            f"data wait {metrics['speed/data_wait_fraction']:4.0%}"
        )
        if self.world.is_main:
            self._write_progress(report.step, losses, speed.frames_per_s, frames_per_step)

    def _write_progress(
        self, step: int, losses: LossSummary, frames_per_s: float, frames_per_step: int
    ) -> None:
        write_progress(
            self.run_dir,
            {
                "step": step,
                "of": self.config.training.max_steps,
                "loss": losses.total,
                "frames_per_s": frames_per_s,
                "seconds_per_step": frames_per_step / frames_per_s if frames_per_s else None,
            },
        )

    def _rank_metrics(
        self, step: int, *, data_wait_fraction: float, exchange_fraction: float
    ) -> dict[str, float]:
        """Times and memory over all ranks; starts a trace that was requested. A collective."""
        metrics = {
            "speed/data_wait_fraction": data_wait_fraction,
            PROFILE_REQUEST: float(self.profiler.requested()),
            **self.resources.read(),
        }
        if self.mesh.sequence_size > 1:
            metrics["speed/exchange_fraction"] = exchange_fraction
        metrics = over_ranks(metrics, self.world.device)
        requested_steps = int(metrics.pop(PROFILE_REQUEST))
        if requested_steps:
            self.profiler.request(step + 2, requested_steps)
        return metrics

    def evaluation(self, evaluated: Evaluated, step: int) -> None:
        """Reports an evaluation. Only rank 0 calls it."""
        metrics = evaluated.metrics
        scalars = {f"evaluation/{name}": v for name, v in metrics.scalars().items()}
        self.writer.write_scalars(scalars, step)
        write_evaluation(self.writer, evaluated.results, evaluated.data, evaluated.config, step)
        self.log(
            f"evaluation at step {step} ({evaluated.seconds:.0f} s), weights: {evaluated.weights}\n"
            f"{metrics.table()}"
        )


def _step_scalars(report: StepReport) -> dict[str, float]:
    losses = report.losses
    return {
        "loss/total": losses.total,
        "loss/iou": losses.iou,
        "loss/objectness": losses.objectness,
        "loss/class": losses.classes,
        "train/positives": losses.positives,
        "train/learning_rate": report.learning_rate,
        "train/gradient_norm": report.gradient_norm,
    }
