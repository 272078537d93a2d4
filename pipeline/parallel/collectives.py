"""Collectives that gradients flow back through.

Autograd runs a rank's backward nodes in the reverse of the order in which its forward made them, whatever else lies between,
so ranks that call these in one order forward also meet in one order backward. A node that the loss does not reach never runs,
and the others wait for it: see `touch`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = tuple[torch.Size, torch.dtype]  # of a tensor to receive


class Clock:
    """Time that collectives of a sequence take here, forward and backward; waiting for the other ranks is part of it."""

    def __init__(self) -> None:
        self.spent, self.events = 0.0, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":  # the host only queues them: events tell when they ran
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self.events.append(events)
        else:
            began = time.perf_counter()
            yield
            self.spent += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since it was read last. On a GPU it waits until all of them have run."""
        if self.events:
            torch.cuda.synchronize()
        spent = self.spent + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        self.spent = 0.0
        self.events.clear()
        return spent


def all_to_all(
    x: Tensor,
    group: dist.ProcessGroup | None,
    clock: Clock,
    *,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Tensor:
    """Row blocks of x, one for each rank of `group`, to those ranks; theirs for this one come back, in rank order.

    Args:
        send, receive: rows for and from each rank; None: equal blocks. group: None when the rank is alone.
    """
    return x if group is None else _AllToAll.apply(x, group, clock, send, receive)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        clock: Clock,
        send: list[int] | None,
        receive: list[int] | None,
    ) -> Tensor:
        ctx.group, ctx.clock, ctx.send, ctx.receive = group, clock, send, receive
        return _exchange_rows(x, group, clock, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (
            _exchange_rows(gradient, ctx.group, ctx.clock, ctx.receive, ctx.send),
            None,
            None,
            None,
            None,
        )


def _exchange_rows(
    x: Tensor,
    group: dist.ProcessGroup,
    clock: Clock,
    send: list[int] | None,
    receive: list[int] | None,
) -> Tensor:
    out, x = (
        x.new_empty(x.shape if receive is None else (sum(receive), *x.shape[1:])),
        x.contiguous(),
    )
    with clock.running(x.device):
        dist.all_to_all_single(out, x, receive, send, group=group)
    return out


def touch(loss: Tensor, *others: Tensor) -> Tensor:
    """`loss`, whose backward also runs through `others`, with zero gradients.

    A rank whose loss does not depend on what it sent or received still has to take part in backward. Nothing is multiplied:
    0 * inf would be nan.
    """
    return _Touch.apply(loss, *(t for t in others if t.requires_grad))


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.new_zeros(())) for t in others]
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(zero.expand(shape) for shape, zero in ctx.like)


class Mail:
    """Messages between two ranks of a group: sent without waiting, received in the order they were sent."""

    def __init__(self, group: dist.ProcessGroup | None, clock: Clock) -> None:
        self.group, self.clock = group, clock
        self.under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, message: Sequence[Tensor], to: int) -> None:
        """`to`: a rank of the world."""
        for part in message:
            part = part.detach().contiguous()
            work = dist.isend(part, to, group=self.group)
            assert work is not None
            self.under_way.append((work, part))  # kept until it is gone

    def receive(
        self, forms: Sequence[Form], sender: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        parts = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms)
        with self.clock.running(device):
            works = [dist.irecv(part, sender, group=self.group) for part in parts]
            for work in works:
                assert work is not None
                work.wait()
        return parts

    def settle(self) -> None:
        """Wait for all that is under way."""
        for work, _ in self.under_way:
            work.wait()
        self.under_way.clear()


def send_along(ride: Tensor, message: Sequence[Tensor], mail: Mail, to: int) -> Tensor:
    """Send `message`. Returns `ride`, whose backward waits for the message's gradients: no loss here depends on what is sent."""
    return _Send.apply(mail, to, ride, *message)


def receive_along(
    ride: Tensor, forms: Sequence[Form], mail: Mail, sender: int
) -> tuple[Tensor, ...]:
    """`ride`, and a message of these forms, whose gradients go back to its sender. `ride` must require gradients if it may."""
    return _Receive.apply(mail, sender, forms, ride)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mail: Mail, to: int, ride: Tensor, *message: Tensor) -> Tensor:
        ctx.mail, ctx.to, ctx.forms = mail, to, [(t.shape, t.dtype) for t in message]
        mail.send(message, to)
        return ride.view_as(ride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, gradient, *ctx.mail.receive(ctx.forms, ctx.to, gradient.device)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mail: Mail, sender: int, forms: Sequence[Form], ride: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.mail, ctx.sender = mail, sender
        return ride.view_as(ride), *mail.receive(forms, sender, ride.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *message: Tensor) -> tuple[Tensor | None, ...]:
        ctx.mail.send(message, ctx.sender)
        return None, None, None, gradient
