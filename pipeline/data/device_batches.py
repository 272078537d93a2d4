"""Brings batches to the device, and expands their frames there while the last one is computed."""

from collections.abc import Generator, Iterable
from typing import NamedTuple, TypeVar

import torch
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.encoded import EncodedBatch

T = TypeVar("T")


def device_batches(
    batches: Iterable[Batch | EncodedBatch], device: torch.device
) -> Generator[Batch, None, None]:
    """The batches with all tensors on `device`, but those that the detector reads on the CPU.

    On a GPU each batch is requested, copied and expanded one batch ahead, on a stream of its own,
    and the host does not wait for it.

    Args:
        batches: dense ones, or encoded ones (`Loader.batches(..., encoded=True)`), in pinned memory
            for a GPU. Closed with this generator.
    """
    try:
        if batches_ahead(device):
            for copied in one_ahead(_copies(batches, device)):
                yield _received(copied, device)
        else:
            for batch in batches:
                yield _on_device(batch, device)
    finally:
        if isinstance(batches, Generator):
            batches.close()


def batches_ahead(device: torch.device) -> int:
    """How many batches are requested before the one that `device_batches` passes on is used."""
    return int(device.type == "cuda" and torch.cuda.is_available())


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The items; each is requested before the one before it is passed on.

    An error is raised when the item that it concerns is asked for, after the one before it.
    """
    iterator = iter(items)
    waiting: list[T] = []
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            yield from waiting
            return
        except Exception:
            yield from waiting
            raise
        yield from waiting
        waiting = [item]


def encodes_for(device: torch.device) -> bool:
    """Whether frames should travel encoded: on a CPU decoding with numba is faster."""
    return device.type != "cpu"


def _on_device(batch: Batch | EncodedBatch, device: torch.device) -> Batch:
    moved = batch.to(device)
    return moved.expand() if isinstance(moved, EncodedBatch) else moved


class _Copied(NamedTuple):
    """A batch on the GPU. ready: recorded on the copy stream after it."""

    batch: Batch
    ready: torch.cuda.Event


def _copies(
    batches: Iterable[Batch | EncodedBatch], device: torch.device
) -> Generator[_Copied, None, None]:
    """Starts the copies on a stream of their own."""
    copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
    for batch in batches:
        with torch.cuda.stream(copy_stream):
            moved = _on_device(batch, device)
            copied = _Copied(moved, copy_stream.record_event())
        yield copied


def _received(copied: _Copied, device: torch.device) -> Batch:
    """The batch, for the current stream: it waits for the copy, the host does not."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied.ready)
    for tensor in copied.batch:
        if tensor.is_cuda:
            tensor.record_stream(stream)
    return copied.batch
