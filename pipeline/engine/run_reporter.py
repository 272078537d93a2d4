"""What a run reports while it trains: log lines, TensorBoard scalars, progress, resources."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from evspan.conf.progress import ProgressBar
from evspan.conf.schema.training import EvaluationConfig, TrainConfig
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.engine.limits import RunLimits
from evspan.pipeline.engine.profiling import Profiler
from evspan.pipeline.engine.resources import Resources, combine, gather_numbers
from evspan.pipeline.engine.run_time import RunTime
from evspan.pipeline.engine.slow_ranks import SlowRanks, rank_places, rank_scalars
from evspan.pipeline.engine.start_lines import finished_lines, frames_per_step, start_lines
from evspan.pipeline.engine.step_clock import StepClock, StepTimes
from evspan.pipeline.engine.step_report import LossSummary, StepReport, ThroughputMeter
from evspan.pipeline.engine.time_account import TimeAccount
from evspan.pipeline.engine.utilization import (
    MFU,
    TERAFLOPS,
    Utilization,
    flops_line,
    flops_table,
    training_peak,
)
from evspan.pipeline.evaluation.coco import Metrics
from evspan.pipeline.history import write_progress
from evspan.pipeline.inference.streaming import RecordingResult
from evspan.pipeline.metrics_log import EVALUATION, TRAIN, MetricsLog
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.flops import FrameCounts, ModelFlops
from evspan.pipeline.parallel.collective_time import measure_with
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.sequence import SequenceExchange
from evspan.pipeline.parallel.world import World
from evspan.pipeline.tensorboard.run_info import environment
from evspan.pipeline.tensorboard.summaries import write_evaluation, write_run_info
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from evspan.pipeline.time_records import Part

logger = logging.getLogger(__name__)
FIRST_STEPS = (1, 2, 5, 10)  # of an attempt, which are reported
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
        resume_step: of the checkpoint that the run continues from; 0: it starts.
        account: of this rank's time.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        mesh: Mesh,
        exchange: SequenceExchange,
        writer: TensorBoardWriter,
        profiler: Profiler,
        *,
        resume_step: int,
        account: TimeAccount,
    ) -> None:
        self.account = account
        self.config = config
        self.world = world
        self.mesh = mesh
        self.exchange = exchange
        self.writer = writer
        self.profiler = profiler
        self.run_dir = Path(config.run_dir)
        self.resources = Resources(world.device)
        self.throughput = ThroughputMeter()
        self.metrics_log = MetricsLog(self.run_dir, enabled=world.is_main, resume_step=resume_step)
        self.first_step = resume_step + 1  # of this attempt
        self.first_step_ended = 0.0  # time.perf_counter()
        self.epochs_per_step = 0.0
        self.bar: ProgressBar | None = None
        self.run_time: RunTime | None = None
        self.utilization: Utilization | None = None  # after `start`
        self.step_clock = StepClock(
            world.device,
            log_every=config.training.log_every,
            enabled=config.training.slow_rank_factor > 0,
        )
        self.slow_ranks: SlowRanks | None = None  # after `start`, on rank 0

    def log(self, message: str) -> None:
        """Rank 0 logs for all ranks."""
        if self.world.is_main:
            logger.info(message)

    def start(self, dataset: Dataset, detector: Detector, step: int) -> None:
        """Reports what is about to be trained, and starts to measure. A collective.

        Args:
            step: that the run starts or resumes at.
        """
        for line in start_lines(self.config, dataset, detector, self.mesh, step):
            self.log(line)
        if self.config.training.cuda_graphs and self.world.device.type != "cuda":
            self.log("training.cuda_graphs has no effect on a CPU")
        ranks = environment(self.world)
        places = rank_places(self.world)
        if self.step_clock.enabled:
            measure_with(self.step_clock)
        if self.world.is_main and self.step_clock.enabled:
            self.slow_ranks = SlowRanks(
                self.run_dir,
                places,
                factor=self.config.training.slow_rank_factor,
                for_steps=self.config.training.slow_rank_steps,
                first_step=step + 1,
            )
        self.utilization = self._open_utilization(dataset, detector, step)
        if self.world.is_main:
            write_run_info(
                self.writer,
                self.config,
                dataset.classes,
                [name for name, _ in detector.named_parameters()],
                ranks,
                step,
                gpu=self.world.device.type == "cuda",
                mfu=self.utilization.peak is not None,
            )
        self.first_step = step + 1
        self.epochs_per_step = frames_per_step(self.config.training) / sum(
            recording.frames for recording in dataset.recordings
        )
        self.bar = ProgressBar("training", self.config.training.max_steps, done=step)
        self.throughput = ThroughputMeter()
        if self.world.is_main and self.account.is_recorded:
            self.run_time = RunTime(self.run_dir, self.account, self.world)

    def _open_utilization(self, dataset: Dataset, detector: Detector, step: int) -> Utilization:
        """Counts the model's FLOPs, and reports those of a frame."""
        flops = ModelFlops(detector, dataset.height, dataset.width)
        remaining = self.config.training.max_steps - step
        peak = training_peak(self.config.training, self.world, steps=remaining)
        frames = self.config.training.sequence_length
        of_chunk = flops.of(FrameCounts(frames, frames, frames, sequences=1))
        self.log(flops_line(of_chunk, peak))
        self.writer.write_text("run/flops", flops_table(of_chunk), step)
        return Utilization(flops, peak, begins=self.mesh.sequence == 0)

    def add_batch(self, batch: Batch) -> None:
        """Counts a micro-batch of this rank."""
        training = self.config.training
        self.throughput.add_frames(training.batch_size * training.sequence_length)
        if self.utilization is not None:
            self.utilization.add(batch)

    def is_due(self, step: int) -> bool:
        """Whether the step is reported: the host then waits for its values at its end.

        The first steps of an attempt are, so that one sees soon that and how fast it trains.
        """
        training = self.config.training
        return (
            step - self.first_step + 1 in FIRST_STEPS
            or step % training.log_every == 0
            or step == training.max_steps
        )

    def queued(self) -> None:
        """A step has been queued."""
        if self.bar is not None:
            self.bar.advance()

    def finished(self, step: int, limits: RunLimits) -> None:
        """Reports the result of a run that had ended before this attempt."""
        if self.world.is_main:
            for line in finished_lines(self.config, step, limits):
                self.log(line)

    def close(self) -> None:
        """Removes the progress bar."""
        measure_with(None)
        if self.bar is not None:
            self.bar.close()

    def step(self, report: StepReport, *, skipped: int) -> None:
        """Reports the step, and the speed since the last one that was reported. A collective.

        Args:
            skipped: micro-batches since the run's first step.
        """
        exchange_s = self.exchange.clock.read()
        self.account.move_from_training(Part.exchange, exchange_s)
        speed = self.throughput.read()
        metrics = self._rank_metrics(
            report.step,
            data_wait_fraction=speed.data_wait_fraction,
            exchange_fraction=exchange_s / speed.seconds,
            utilization=self._utilization(speed.seconds),
        )
        frames = frames_per_step(self.config.training)
        scalars = {
            **_step_scalars(report),
            "train/skipped_steps": skipped,
            "speed/frames_per_s": speed.frames_per_s,
            "speed/step_ms": 1000 * frames / speed.frames_per_s,
            **metrics,
        }
        self.writer.write_scalars(scalars, report.step)
        if self.run_time is not None:
            self.writer.write_scalars(self.run_time.scalars(), report.step)
        epoch = self.epochs_per_step * report.step
        self.metrics_log.write(TRAIN, report.step, {"epoch": epoch, **_record(scalars)})
        eta = self._remaining(report.step, frames / speed.frames_per_s)
        loss = f"loss {report.losses.total:.4g}"
        if self.bar is not None:
            self.bar.note(loss)
        self.log(
            f"step {report.step} of {self.config.training.max_steps}  epoch {epoch:.3g}  {loss}  "
            f"lr {report.learning_rate:.1e}  {speed.frames_per_s:.1f} frames/s  "
            f"{_mfu_text(metrics)}data wait "
            f"{100 * metrics['speed/data_wait_fraction']:.0f} %  ETA {eta}"
        )
        if report.step == self.first_step:
            self.log(self._memory(metrics))
        if self.world.is_main:
            mfu = metrics.get(MFU)
            self._write_progress(report.step, report.losses, speed.frames_per_s, frames, mfu)

    def _utilization(self, seconds: float) -> dict[str, float]:
        """FLOP/s and MFU of this rank."""
        if self.utilization is None:
            return {}
        return self.utilization.read(seconds)

    def _remaining(self, step: int, seconds_per_step: float) -> str:
        """Hours, minutes and seconds until the last step, at the mean speed of this attempt.

        The first step, which compiles and allocates, does not count; evaluations do.
        """
        now = time.perf_counter()
        if step == self.first_step:
            self.first_step_ended = now
        else:
            seconds_per_step = (now - self.first_step_ended) / (step - self.first_step)
        return clock_text(seconds_per_step * (self.config.training.max_steps - step))

    def _memory(self, metrics: dict[str, float]) -> str:
        """Of the rank that uses the most, after the first step."""
        if "memory/gpu_peak_gib" not in metrics:
            return f"memory: {metrics['memory/resident_gib']:.2f} GiB per rank"
        _, total = torch.cuda.mem_get_info(self.world.device)
        return (
            f"memory: {metrics['memory/gpu_peak_gib']:.2f} of {total / 2**30:.1f} GiB per GPU, "
            f"{metrics['memory/resident_gib']:.2f} GiB per rank on the host"
        )

    def _write_progress(
        self,
        step: int,
        losses: LossSummary,
        frames_per_s: float,
        frames_per_step: int,
        mfu: float | None,
    ) -> None:
        write_progress(
            self.run_dir,
            {
                "step": step,
                "of": self.config.training.max_steps,
                "loss": losses.total,
                "frames_per_s": frames_per_s,
                **({"mfu": mfu} if mfu is not None else {}),
                "seconds_per_step": frames_per_step / frames_per_s if frames_per_s else None,
            },
        )

    def _rank_metrics(
        self,
        step: int,
        *,
        data_wait_fraction: float,
        exchange_fraction: float,
        utilization: dict[str, float],
    ) -> dict[str, float]:
        """Times and memory over all ranks; starts a trace that was requested. A collective."""
        metrics = {
            "speed/data_wait_fraction": data_wait_fraction,
            **utilization,
            PROFILE_REQUEST: float(self.profiler.requested()),
            **self.resources.read(),
        }
        if self.mesh.sequence_size > 1:
            metrics["speed/exchange_fraction"] = exchange_fraction
        own_times = self.step_clock.read().to_numbers()
        # One collective for all.
        by_rank = gather_numbers([*metrics.values(), *own_times], self.world.device)
        times = [StepTimes.from_numbers(numbers) for numbers in by_rank[:, len(metrics) :].tolist()]
        metrics = combine(metrics, by_rank[:, : len(metrics)])
        metrics.update(rank_scalars(times))
        if self.slow_ranks is not None:
            self.slow_ranks.update(step, times)
        if TERAFLOPS in metrics:
            metrics[TERAFLOPS] *= self.world.size  # from the mean
        requested_steps = int(metrics.pop(PROFILE_REQUEST))
        if requested_steps:
            self.profiler.request(step + 2, requested_steps)
        return metrics

    def evaluation(self, evaluated: Evaluated, step: int) -> None:
        """Reports an evaluation. Only rank 0 calls it."""
        metrics = evaluated.metrics
        scalars = {f"evaluation/{name}": v for name, v in metrics.scalars().items()}
        self.writer.write_scalars(scalars, step)
        self.metrics_log.write(
            EVALUATION, step, {"epoch": self.epochs_per_step * step, **metrics.scalars()}
        )
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


def _mfu_text(metrics: Mapping[str, float]) -> str:
    """'MFU 12.3 %  '; empty where it is not known."""
    return f"MFU {100 * metrics[MFU]:.3g} %  " if MFU in metrics else ""


def _record(scalars: dict[str, float]) -> dict[str, float]:
    """The keys of a line of metrics.jsonl: the tags without their group, and `loss`."""
    record = {"loss": scalars["loss/total"]}
    for tag, value in scalars.items():
        group, name = tag.split("/", 1)
        if tag != "loss/total":
            record[f"loss_{name}" if group == "loss" else name] = value
    return record


def clock_text(seconds: float) -> str:
    """'0:05', '3:12', '1:02:03'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
