"""Measures training step, loader and inference of a config in one process."""

import copy
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from evspan.conf.presets import size_of
from evspan.conf.schema.benchmark import BenchConfig, check_one_rank
from evspan.conf.schema.training import EngineKind
from evspan.conf.text import plural
from evspan.pipeline.benchmark.limits import Limit, StepBalance, limiting_resource
from evspan.pipeline.benchmark.loading import (
    LoaderSpeed,
    measure_loader,
    threads_needed,
    usable_cores,
)
from evspan.pipeline.benchmark.peaks import Peak, device_peak
from evspan.pipeline.benchmark.simulated import simulated_dataset
from evspan.pipeline.benchmark.step import (
    DATA_WAIT,
    TO_DEVICE,
    StepMeasurement,
    measure_steps,
)
from evspan.pipeline.benchmark.streaming import (
    EvaluationMeasurement,
    StreamingMeasurement,
    measure_evaluation,
    measure_streaming,
)
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data.device_batches import encodes_for
from evspan.pipeline.engine.layout_comparison import device_info
from evspan.pipeline.engine.oom import explain_out_of_memory
from evspan.pipeline.engine.precision import resolve_precision
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.inference.trained_detector import TrainedDetector, detector_from
from evspan.pipeline.parallel.world import open_world
from evspan.pipeline.weights import Weights, plain

logger = logging.getLogger(__name__)

UNREACHED = 2**31 - 1  # a step that no run of the benchmark comes to


@dataclass(frozen=True)
class Setting:
    """What was measured where.

    Attributes:
        device: its name, and the number of threads on a CPU.
        cores: that the process may use.
        torch: version, with CUDA's.
        model: name of its size, 'custom' if it has none.
        data: the dataset's folder, or 'simulated', and its training recordings.
        batch_size, sequence_length: lanes and frames of a micro-batch.
        frame: (channels, height, width).
        parameters: of the detector.
        engine: that steps it.
    """

    device: str
    cores: int
    torch: str
    precision: str
    model: str
    data: str
    batch_size: int
    sequence_length: int
    frame: tuple[int, int, int]
    parameters: int
    engine: str


@dataclass(frozen=True)
class BenchmarkResult:
    """All measurements. mfu: of the peak. threads_needed: None if more than there are cores."""

    setting: Setting
    peak: Peak
    step: StepMeasurement
    mfu: float
    num_workers: int
    loader: list[LoaderSpeed]
    threads_needed: int | None
    streaming: StreamingMeasurement
    evaluation: EvaluationMeasurement
    limit: Limit

    def to_json(self) -> dict[str, Any]:
        """All values, enums by name."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def run_benchmark(config: BenchConfig) -> BenchmarkResult:
    """Measures on this machine. Nothing is written outside of a temporary folder.

    Raises:
        ConfigError: more than one rank, or a GPU without a known peak.
        UserError: the dataset or the weights cannot be used, or memory does not suffice.
    """
    check_one_rank(config)
    with TemporaryDirectory(prefix="evspan-bench-") as name, open_world(config.parallel) as world:
        folder = Path(name)
        config = resolve_precision(config, world, None)
        peak = device_peak(world.device, config.training.precision, config.training.peak_tflops)
        prepared = _without_run(config, folder)
        with explain_out_of_memory(prepared, world):
            trainer = Trainer(prepared, world)
            try:
                return _measure(trainer, prepared, peak)
            finally:
                trainer.close()


def _without_run(config: BenchConfig, folder: Path) -> BenchConfig:
    """The config with a dataset, and with a run in `folder` that saves and evaluates nothing."""
    prepared = copy.deepcopy(config)
    if not config.dataset.sources:
        logger.info("simulating recordings: dataset.root is empty")
        prepared.dataset = simulated_dataset(
            folder,
            height=config.bench.height,
            width=config.bench.width,
            frames=config.training.sequence_length,
            split=config.evaluation.split,
            num_classes=config.model.head.num_classes,
        )
    prepared.run_dir = str(folder / "run")
    prepared.checkpoint.resume = False
    prepared.training.profile = []
    # The schedule of the learning rate must not end within the measured steps.
    prepared.training.max_steps = UNREACHED
    return prepared


def _measure(trainer: Trainer, config: BenchConfig, peak: Peak) -> BenchmarkResult:
    options = config.bench
    device = trainer.world.device
    logger.info("measuring the training step")
    step = measure_steps(trainer, steps=options.steps, seconds=options.seconds)
    logger.info("measuring the loader")
    loader = measure_loader(trainer.loader, device=device, seconds=options.seconds)
    needed = threads_needed(loader, step.frames_per_s_needed)
    logger.info("measuring inference")
    detector = _trained(trainer)
    data = open_dataset(config.dataset, config.evaluation.split)
    threshold = None
    if config.checkpoint.init_from:
        threshold = config.model.postprocess.confidence_threshold
    streaming = measure_streaming(
        detector,
        data,
        device=device,
        seconds=options.seconds / 2,
        confidence_threshold=threshold,
    )
    evaluation = measure_evaluation(
        detector, data, config.evaluation, device=device, seconds=options.seconds / 2
    )
    return BenchmarkResult(
        setting=_setting(trainer, config, detector),
        peak=peak,
        step=step,
        mfu=step.flops_per_s / peak.flops,
        num_workers=trainer.loader.workers(encoded=encodes_for(device)),
        loader=loader,
        threads_needed=needed,
        streaming=streaming,
        evaluation=evaluation,
        limit=limiting_resource(_balance(trainer, step, loader, needed)),
    )


def _trained(trainer: Trainer) -> TrainedDetector:
    """The trainer's detector as it is evaluated."""
    data = trainer.dataset
    weights = Weights(
        trainer.engine.full_state(),
        trainer.config.model,
        data.frames,
        data.classes,
        trainer.step,
        trainer.config.training.precision,
    )
    precision = trainer.config.evaluation.precision
    return detector_from(weights, device=trainer.world.device, precision=precision)


def _balance(
    trainer: Trainer, step: StepMeasurement, loader: list[LoaderSpeed], needed: int | None
) -> StepBalance:
    device = trainer.world.device
    operations = step.operations
    memory_fraction = None
    busy_ms = None
    if device.type == "cuda":
        busy_ms = operations.busy_ms
        memory_fraction = step.peak_bytes / torch.cuda.get_device_properties(device).total_memory
    return StepBalance(
        step_ms=step.step.median,
        data_wait_ms=step.parts[DATA_WAIT].median,
        to_device_ms=step.parts[TO_DEVICE].median,
        exchange_ms=0.0,  # one rank
        busy_ms=busy_ms,
        product_fraction=operations.product_fraction,
        launches=operations.launches,
        waits=operations.waits,
        memory_fraction=memory_fraction,
        threads=trainer.loader.workers(encoded=encodes_for(device)),
        threads_needed=needed,
        loader_frames_per_s=max(speed.frames_per_s for speed in loader),
        frames_per_s_needed=step.frames_per_s_needed,
    )


def _engine(config: BenchConfig) -> str:
    if config.training.engine is EngineKind.plain:
        return "plain"
    return f"ZeRO-{config.deepspeed.stage}"


def _setting(trainer: Trainer, config: BenchConfig, detector: TrainedDetector) -> Setting:
    data = trainer.dataset
    place = config.dataset.place
    is_temporary = Path(place).is_relative_to(Path(config.run_dir).parent)
    source = "simulated" if is_temporary else place
    recordings = plural(len(data.recordings), "recording")
    threads = torch.get_num_threads()
    cuda = f", CUDA {torch.version.cuda}" if trainer.world.device.type == "cuda" else ""
    return Setting(
        device=device_info(trainer.world, threads).name,
        cores=usable_cores(),
        torch=f"{torch.__version__}{cuda}",
        precision=trainer.config.training.precision.name,
        model=size_of(config.model),
        data=f"{source}, {recordings}",
        batch_size=config.training.batch_size,
        sequence_length=config.training.sequence_length,
        frame=(data.channels, data.height, data.width),
        parameters=sum(p.numel() for p in detector.parameters()),
        engine=_engine(config),
    )
