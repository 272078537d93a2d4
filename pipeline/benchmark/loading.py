"""Times the loader by its number of threads."""

import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from evspan.pipeline.data.device_batches import encodes_for
from evspan.pipeline.data.loader import Loader


@dataclass(frozen=True)
class LoaderSpeed:
    """Frames per second that the loader provides when nothing else runs."""

    threads: int
    frames_per_s: float


def measure_loader(
    loader: Loader, *, device: torch.device, seconds: float, threads: Sequence[int] | None = None
) -> list[LoaderSpeed]:
    """The speed with several numbers of threads.

    Args:
        device: that the batches are for: a GPU gets encoded ones.
        seconds: for all of them together; each reads its first batches however long they take.
        threads: numbers to try; None: 1, 2, 4 ... and all cores that this process may use.
    """
    numbers = list(threads or thread_numbers(usable_cores()))
    encoded = encodes_for(device)
    return [_speed(loader, number, seconds / len(numbers), encoded=encoded) for number in numbers]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def thread_numbers(cores: int) -> list[int]:
    """1, 2, 4 ... up to the number of cores, which is the last one."""
    powers = [2**k for k in range(cores.bit_length()) if 2**k < cores]
    return [*powers, cores]


def _speed(loader: Loader, threads: int, seconds: float, *, encoded: bool) -> LoaderSpeed:
    loader = copy.copy(loader)
    loader.config = replace(loader.config, num_workers=threads)
    frames_per_batch = len(loader.lanes) * len(loader.frames)
    batches = loader.batches(0, encoded=encoded)
    try:
        for _ in range(threads + 1):  # which were read ahead
            next(batches)
        started = time.perf_counter()
        num_batches = 0
        while num_batches < 2 * threads or time.perf_counter() - started < seconds:
            next(batches)
            num_batches += 1
            if time.perf_counter() - started > 4 * seconds:
                break
        elapsed = time.perf_counter() - started
    finally:
        batches.close()
    return LoaderSpeed(threads, num_batches * frames_per_batch / elapsed)


def threads_needed(speeds: Sequence[LoaderSpeed], frames_per_s: float) -> int | None:
    """The smallest number of threads that provides `frames_per_s`; None: no measured one does.

    Between two measured numbers the speed is taken to grow linearly.

    Args:
        speeds: at least one, by ascending number of threads.
    """
    below = LoaderSpeed(0, 0.0)
    for speed in speeds:
        if speed.frames_per_s >= frames_per_s:
            slope = (speed.frames_per_s - below.frames_per_s) / (speed.threads - below.threads)
            more = (frames_per_s - below.frames_per_s) / slope
            return max(1, below.threads + math.ceil(more - 1e-9))
        if speed.frames_per_s > below.frames_per_s:
            below = speed
    return None
