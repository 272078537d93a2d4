"""Collectives and point-to-point messages that gradients flow back through.

Autograd runs a rank's backward nodes in the reverse of the order in which its forward created them.
Ranks that call these functions in one order in forward therefore also meet in one order in
backward. A node that the loss does not depend on never runs, and the other ranks wait for it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from evspan.pipeline.model.autograd import run_function
from evspan.pipeline.parallel.collective_time import collective
from evspan.pipeline.parallel.flight_recorder import recorded
from torch import Tensor
from torch.autograd.function import once_differentiable

TensorSpec = tuple[torch.Size, torch.dtype]  # of a tensor to receive


class Clock:
    """Time that this rank spends in a sequence's collectives, forward and backward.

    Waiting for the other ranks is included.
    """

    def __init__(self) -> None:
        self.spent = 0.0  # seconds
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measures the collectives issued inside."""
        if device.type == "cuda":  # the host only queues them, so the device takes the times
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self.spent += time.perf_counter() - start

    def read(self) -> float:
        """Seconds since the last call. On a GPU it waits until all collectives have run."""
        if self.events:
            torch.cuda.synchronize()
        on_device: float = sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        seconds = self.spent + on_device
        self.spent = 0.0
        self.events.clear()
        return seconds


def all_to_all(
    x: Tensor,
    group: dist.ProcessGroup | None,
    clock: Clock,
    *,
    name: str,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Tensor:
    """Sends blocks of rows to each rank of `group`, and returns the rows received, in rank order.

    Args:
        x: (n, ...) rows, those for rank 0 first.
        group: None when the rank is alone; x is then returned as it is.
        clock: measures the collective, forward and backward.
        name: what it is for, in the diagnosis of a run that hangs.
        send, receive: number of rows for and from each rank; None: equal blocks.

    Returns:
        (sum(receive), ...), or the shape of x for equal blocks.
    """
    if group is None:
        return x
    out: Tensor = run_function(_AllToAll, x, group, clock, name, send, receive)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        clock: Clock,
        name: str,
        send: list[int] | None,
        receive: list[int] | None,
    ) -> Tensor:
        ctx.group = group
        ctx.clock = clock
        ctx.name = name
        ctx.send = send
        ctx.receive = receive
        return _exchange_rows(x, group, clock, name, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx = _exchange_rows(gradient, ctx.group, ctx.clock, ctx.name, ctx.receive, ctx.send)
        return dx, None, None, None, None, None


def _exchange_rows(
    x: Tensor,
    group: dist.ProcessGroup,
    clock: Clock,
    name: str,
    send: list[int] | None,
    receive: list[int] | None,
) -> Tensor:
    kind = "all-to-all" if send is None else "all-to-all of unequal blocks"
    shape = x.shape if receive is None else (sum(receive), *x.shape[1:])
    out = x.new_empty(shape)
    x = x.contiguous()
    with collective(), clock.running(x.device), recorded(name, kind, x, group=group):
        dist.all_to_all_single(out, x, receive, send, group=group)
    return out


class P2PChannel:
    """Messages between ranks: sent without blocking, received in the order of sending.

    name: what they are for, in the diagnosis of a run that hangs.
    """

    def __init__(self, group: dist.ProcessGroup | None, clock: Clock, *, name: str) -> None:
        self.name = name
        self.group = group
        self.clock = clock
        self.pending: list[tuple[dist.Work, Tensor]] = []

    def send(self, message: Sequence[Tensor], to: int) -> None:
        """Starts sending tensors of any shapes.

        Args:
            to: rank of the world.
        """
        for part in message:
            part = part.detach().contiguous()
            with recorded(self.name, "send", part, group=self.group, peer=to):
                work = dist.isend(part, to, group=self.group)
            assert work is not None
            self.pending.append((work, part))  # the tensor must live until it is sent

    def receive(
        self, specs: Sequence[TensorSpec], sender: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Waits for a message.

        Args:
            specs: shape and dtype of each tensor.
            sender: rank of the world.
        """
        parts = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs)
        with collective(), self.clock.running(device):
            works = [dist.irecv(part, sender, group=self.group) for part in parts]
            for work, part in zip(works, parts, strict=True):
                assert work is not None
                with recorded(self.name, "receive", part, group=self.group, peer=sender):
                    work.wait()
        return parts

    def wait(self) -> None:
        """Waits until all messages are sent."""
        with collective():
            for work, _ in self.pending:
                work.wait()
        self.pending.clear()


def send_along(carrier: Tensor, message: Sequence[Tensor], channel: P2PChannel, to: int) -> Tensor:
    """Sends `message`.

    Args:
        carrier: a tensor that this rank's loss depends on.
        to: rank of the world.

    Returns:
        `carrier`, whose backward receives the message's gradients: no loss of this rank depends on
        what is sent, so without it that node would not run.
    """
    out: Tensor = run_function(_Send, channel, to, carrier, *message)
    return out


def receive_along(
    carrier: Tensor, specs: Sequence[TensorSpec], channel: P2PChannel, sender: int
) -> tuple[Tensor, ...]:
    """Receives a message, whose gradients are sent back to its sender in backward.

    Args:
        carrier: any tensor; it must require gradients where the message's should flow.
        specs: shape and dtype of each tensor of the message.
        sender: rank of the world.

    Returns:
        `carrier`, then the message's tensors.
    """
    out: tuple[Tensor, ...] = run_function(_Receive, channel, sender, specs, carrier)
    return out


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, channel: P2PChannel, to: int, carrier: Tensor, *message: Tensor
    ) -> Tensor:
        ctx.channel = channel
        ctx.to = to
        ctx.specs = [(t.shape, t.dtype) for t in message]
        channel.send(message, to)
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, gradient, *ctx.channel.receive(ctx.specs, ctx.to, gradient.device)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, channel: P2PChannel, sender: int, specs: Sequence[TensorSpec], carrier: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.channel = channel
        ctx.sender = sender
        return carrier.view_as(carrier), *channel.receive(specs, sender, carrier.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *message: Tensor) -> tuple[Tensor | None, ...]:
        ctx.channel.send(message, ctx.sender)
        return None, None, None, gradient
