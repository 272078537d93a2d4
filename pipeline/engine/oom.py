"""Turns an out-of-memory error into a message that names the options which lower the memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.training import EngineKind, EvaluationConfig, Precision, TrainConfig
from evspan.conf.text import plural
from evspan.pipeline.engine.resources import peak_bytes
from evspan.pipeline.history import Activity
from evspan.pipeline.parallel.flight_recorder import current_phase
from evspan.pipeline.parallel.world import World

# Texts of errors from torch, NumPy, CUDA libraries, HDF5, C++, Python and oneDNN.
OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "Unable to allocate",
    "std::bad_alloc",
    "ALLOC_FAILED",
    "can't start new thread",
    "could not create a primitive",
)
MAX_REASON = 200  # characters of the original error in the message

# What each ZeRO stage divides over the ranks in addition to the stage before.
DIVIDED = {1: "the optimizer state", 2: "the gradients", 3: "the weights"}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError | OSError):
        return any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    return False


@contextmanager
def explain_out_of_memory(config: TrainConfig, world: World) -> Iterator[None]:
    """While open, an out-of-memory error becomes a UserError that names the options to change."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(_message(error, config, world)) from error


class _Chunk(NamedTuple):
    """What a rank computes in a micro-batch, and how the world is cut."""

    lanes: int
    frames: int
    sequence: int  # ranks per sequence
    groups: int  # data groups

    @classmethod
    def of(cls, config: TrainConfig, world: World) -> "_Chunk":
        sequence = config.parallel.sequence
        groups = world.size // sequence
        return cls(
            lanes=config.training.batch_size * sequence // world.size,
            frames=config.training.sequence_length // sequence,
            sequence=sequence,
            groups=groups,
        )


def _message(error: BaseException, config: TrainConfig, world: World) -> str:
    chunk = _Chunk.of(config, world)
    place = f"the GPU of rank {world.rank}" if _on_gpu(world) else f"rank {world.rank}"
    activity = _activity()
    size = _size_text(config, chunk, activity)
    first_line = (str(error).splitlines() or [""])[0]
    reason = " ".join(first_line.split()) or type(error).__name__
    peak_gib = peak_bytes(world.device) / 2**30
    options = "; ".join(memory_options(config, world, activity))
    return (
        f"{place} ran out of memory with {size}, after using {peak_gib:.1f} GiB "
        f"({reason[-MAX_REASON:]}). Try, in this order: {options}"
    )


def _size_text(config: TrainConfig, chunk: _Chunk, activity: Activity | None) -> str:
    """What the rank computed at a time."""
    evaluation = config.evaluation
    if activity is Activity.evaluating:
        recordings = plural(evaluation.batch_size, "recording")
        return f"{recordings} x {evaluation.sequence_length} frames in an evaluation"
    if activity is Activity.images:
        return f"{evaluation.sequence_length} frames in writing TensorBoard images"
    return f"{plural(chunk.lanes, 'lane')} x {chunk.frames} frames in a micro-batch"


def _activity() -> Activity | None:
    """What the run does now; None in a step."""
    phase = current_phase()
    return next((activity for activity in Activity if activity.value == phase), None)


def memory_options(
    config: TrainConfig, world: World, activity: Activity | None = None
) -> list[str]:
    """What lowers a rank's memory, the cheapest first; each as overrides of the command.

    Args:
        activity: in which the memory was exhausted. An evaluation and images have options of their
            own, which a run that continues may change.
    """
    chunk = _Chunk.of(config, world)
    options = [
        *_evaluation_options(config.evaluation, activity),
        *_compute_options(config, chunk),
        *_precision_and_sharding_options(config, world),
        *_batch_options(config, chunk),
    ]
    return options or [
        "a smaller model (size=tiny, or micro), or frames of lower resolution "
        "(evspan prep frames.downsample=4)"
    ]


def _evaluation_options(config: EvaluationConfig, activity: Activity | None) -> list[str]:
    """Images are of one recording at a time."""
    options = []
    if activity is Activity.evaluating and config.batch_size > 1:
        options.append(
            f"evaluation.batch_size={config.batch_size // 2} instead of {config.batch_size}"
        )
    if activity in (Activity.evaluating, Activity.images) and config.sequence_length > 1:
        options.append(
            f"evaluation.sequence_length={config.sequence_length // 2} instead of "
            f"{config.sequence_length}"
        )
    return options


def _compute_options(config: TrainConfig, chunk: _Chunk) -> list[str]:
    training = config.training
    per_call = training.frames_per_call or chunk.lanes * chunk.frames
    fewer = chunk.lanes if per_call > chunk.lanes else max(1, per_call // 2)
    if not training.activation_checkpointing:
        graphs = "training.cuda_graphs=false " if training.cuda_graphs else ""
        return [
            f"{graphs}training.activation_checkpointing=true training.frames_per_call={fewer} "
            "(backward computes the backbone again: a third more time)"
        ]
    if per_call > 1:
        return [f"training.frames_per_call={fewer} instead of {per_call}"]
    return []


def _precision_and_sharding_options(config: TrainConfig, world: World) -> list[str]:
    options = []
    if _on_gpu(world) and config.training.precision in (Precision.fp32, Precision.tf32):
        options.append("training.precision=bf16 (half of it; needs a new run_dir)")
    is_plain = config.training.engine is EngineKind.plain
    engine = "training.engine=deepspeed " if is_plain else ""
    stage = 0 if is_plain else config.deepspeed.stage
    if world.size > 1 and stage < 3:
        graphs = "training.cuda_graphs=false " if config.training.cuda_graphs and stage == 2 else ""
        options.append(
            f"{engine}{graphs}deepspeed.stage={stage + 1} ({DIVIDED[stage + 1]}, divided over "
            f"{world.size} ranks)"
        )
    if _on_gpu(world) and stage and not config.deepspeed.offload_optimizer:
        options.append("deepspeed.offload_optimizer=true (to the CPU's memory)")
    return options


def _batch_options(config: TrainConfig, chunk: _Chunk) -> list[str]:
    options = []
    training = config.training
    length = training.sequence_length
    if chunk.frames > 1 and not training.bptt_frames:  # which need a sequence on one rank
        sequence = _next_divisor(length, chunk.sequence)
        options.append(
            f"parallel.sequence={sequence} parallel.ranks={chunk.groups * sequence} "
            f"({length // sequence} frames a rank instead of {chunk.frames})"
        )
    if chunk.lanes > 1:
        factor = _next_divisor(chunk.lanes, 1)
        lanes = chunk.lanes // factor
        accumulation = training.gradient_accumulation_steps * factor
        graphs = "training.cuda_graphs=false " if training.cuda_graphs else ""
        options.append(
            f"{graphs}training.batch_size={chunk.groups * lanes} "
            f"training.gradient_accumulation_steps={accumulation} "
            f"(as many lanes a step, {lanes} instead of {chunk.lanes} at once; needs a new run_dir)"
        )
    if chunk.frames > 1:
        shorter = length // _next_divisor(chunk.frames, 1)
        options.append(
            f"training.sequence_length={shorter} "
            "(gradients reach fewer frames back; needs a new run_dir)"
        )
    return options


def _next_divisor(total: int, start: int) -> int:
    """The smallest multiple of `start` above it that divides `total`."""
    return next(n for n in range(2 * start, total + 1, start) if total % n == 0)


def _on_gpu(world: World) -> bool:
    return world.device.type == "cuda"
