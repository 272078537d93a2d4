"""When memory runs out: how much was short, and which knob to turn by how much."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.parallel.world import World

MARKS = (
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


def out_of_memory(error: BaseException) -> bool:
    """As torch, NumPy, CUDA's libraries, HDF5, oneDNN (which names no reason) and Python tell it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(mark in str(error) for mark in MARKS)
    )


@contextmanager
def explain_out_of_memory(config: TrainConfig, world: World) -> Iterator[None]:
    """While open, an error for want of memory becomes a UserError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(_message(error, config, world)) from error


def _message(error: BaseException, config: TrainConfig, world: World) -> str:
    training, sequence = config.training, config.parallel.sequence
    lanes = training.batch_size * sequence // world.size
    frames = training.sequence_length // sequence
    where = f"the GPU of rank {world.rank}" if world.device.type == "cuda" else f"rank {world.rank}"
    said = " ".join((str(error).splitlines() or [""])[0].split()) or type(error).__name__
    return (
        f"{where} ran out of memory with {lanes} lane{'s' * (lanes > 1)} x {frames} frames a micro-batch, having used "
        f"{_peak(world.device) / 2**30:.1f} GiB ({said[-200:]}). Try, in this order: {'; '.join(knobs(config, world))}"
    )


def knobs(config: TrainConfig, world: World) -> list[str]:
    """What lowers a rank's memory from where it stands now, that which costs least first; each as overrides of the command."""
    training, sequence = config.training, config.parallel.sequence
    lanes, frames = (
        training.batch_size * sequence // world.size,
        training.sequence_length // sequence,
    )
    at_once = training.frames_per_call or lanes * frames
    fewer_at_once = lanes if at_once > lanes else max(1, at_once // 2)
    some = []
    if not training.activation_checkpointing:
        some.append(
            f"training.activation_checkpointing=true training.frames_per_call={fewer_at_once} (backward computes the "
            "backbone anew: a third more time)"
        )
    elif at_once > 1:
        some.append(f"training.frames_per_call={fewer_at_once} instead of {at_once}")
    if training.precision.name == "fp32" and world.device.type == "cuda":
        some.append("training.precision=bf16 (half of it)")
    if world.size > 1 and config.deepspeed.stage < 3:
        some.append(
            f"deepspeed.stage={config.deepspeed.stage + 1} (the optimizer's share, over {world.size} ranks)"
        )
    if (
        world.device.type == "cuda"
        and config.deepspeed.stage
        and not config.deepspeed.offload_optimizer
    ):
        some.append("deepspeed.offload_optimizer=true (to the CPU's memory)")
    if frames > 1:
        more = _next_divisor(training.sequence_length, sequence)
        some.append(
            f"parallel.sequence={more} parallel.ranks={world.size // sequence * more} "
            f"({training.sequence_length // more} frames a rank instead of {frames})"
        )
    if lanes > 1:
        groups = world.size // sequence
        fewer = _next_divisor(lanes, 1)
        some.append(
            f"training.batch_size={groups * lanes // fewer} training.gradient_accumulation_steps={training.gradient_accumulation_steps * fewer} "
            f"(as many lanes a step, {lanes // fewer} instead of {lanes} at once; needs a run_dir of its own)"
        )
    if frames > 1:
        some.append(
            f"training.sequence_length={training.sequence_length // _next_divisor(frames, 1)} (gradients reach less far "
            "back; needs a run_dir of its own)"
        )
    return some or [
        "a smaller model (size=tiny, or micro), or frames of lower resolution (evspan prep frames.downsample=4)"
    ]


def _next_divisor(total: int, above: int) -> int:
    """The next multiple of `above` that divides `total`."""
    return next(n for n in range(2 * above, total + 1, above) if total % n == 0)


def _peak(device: torch.device) -> int:
    """Bytes, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10
