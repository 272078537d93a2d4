"""One rank of `sequence_speed.py`: python sequence_ranks.py FOLDER JSON, started by evspan.launch.local.ranks; leaves FOLDER/<rank>.json."""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from evspan.conf.schema.layout import ExchangeKind
from evspan.conf.schema.training import BackboneConfig, FpnConfig, ModelConfig, ParallelConfig
from evspan.pipeline.model.backbone import Execution
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.norm import RankReductions, global_batch_norms
from evspan.pipeline.model.sequence_protocol import LocalExchange
from evspan.pipeline.parallel.collectives import P2PChannel
from evspan.pipeline.parallel.exchange import open_exchange
from evspan.pipeline.parallel.mesh import Mesh, open_mesh
from evspan.pipeline.parallel.reductions import (
    barrier,
    gather_objects,
    gather_over_ranks,
    sum_over_ranks,
)
from evspan.pipeline.parallel.world import open_world
from torch import Tensor

CHANNELS, CLASSES, MOST = 20, 3, 10
SIZES = {
    "micro": (16, 8, 0.33),
    "tiny": (32, 32, 0.33),
    "small": (48, 24, 0.33),
    "base": (64, 32, 0.67),
}
WARM_SIZE = (96, 128)  # of a first step's frames: what libraries set up once is no step's
TIMEOUT_S = 600
ALL_TO_ALL = dist.all_to_all_single  # itself, also while it is tapped


@dataclass
class Asked:
    task: str  # of TASKS
    size: str = "tiny"
    frames: int = 4  # of the chunk, over all ranks
    kinds: list[str] = field(default_factory=lambda: ["transpose"])  # or relay, alone
    height: int = 360  # padded to 384 x 640
    width: int = 640
    attention: bool = False
    checkpointed: bool = False
    frames_per_call: int = 0
    repeats: int = 2


# -- a training step -------------------------------------------------------------------------------------------------
def model_of(size: str, *, attention: bool = False) -> ModelConfig:
    """LayerScale at 0.1 instead of 1e-5, so that a difference anywhere reaches the loss."""
    embed_dim, dim_head, depth = SIZES[size]
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=embed_dim, dim_head=dim_head, ls_init_value=0.1),
        fpn=FpnConfig(depth=depth, enable_small_object_attention=attention),
    )


def inputs(which: range, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames (T, 1, 20, H, W) uint8, 3 % of it not zero; labelled (T, 1), every second; boxes (n, 10, 5), counts (n,).

    Each frame is drawn from its number, so all layouts get the same.
    """
    frames, boxes, counts = (
        torch.empty(len(which), 1, CHANNELS, height, width, dtype=torch.uint8),
        [],
        [],
    )
    for t, frame in zip(which, frames, strict=True):
        g = torch.Generator().manual_seed(t)
        frame.copy_((torch.rand(frame.shape, generator=g) * 100 - 96).clamp(min=0).ceil())
        if t % 2 == 0:
            count = int(torch.randint(3, MOST + 1, (), generator=g))
            place = torch.rand(MOST, 4, generator=g)
            kind = torch.randint(0, CLASSES, (MOST, 1), generator=g)
            row = torch.cat(
                (kind, place[:, :2] * torch.tensor([width, height]), 10 + place[:, 2:] * 90), 1
            )
            boxes.append(row * (torch.arange(MOST) < count)[:, None])
            counts.append(count)
    labelled = torch.tensor([[t % 2 == 0] for t in which])
    return (
        frames,
        labelled,
        torch.stack(boxes) if boxes else torch.zeros(0, MOST, 5),
        torch.tensor(counts, dtype=torch.int64),
    )


class Side:
    """The detector and this rank's frames of a chunk, under one exchange; `alone`: the whole chunk on this rank."""

    def __init__(
        self,
        asked: Asked,
        mesh: Mesh,
        kind: str,
        *,
        frames: int = 0,
        size: tuple[int, int] = (0, 0),
    ) -> None:
        length, (height, width) = (
            frames or asked.frames,
            size if size[0] else (asked.height, asked.width),
        )
        torch.manual_seed(0)
        execution = Execution(
            frames_per_call=asked.frames_per_call, activation_checkpointing=asked.checkpointed
        )
        self.detector = Detector(
            model_of(asked.size, attention=asked.attention), CHANNELS, execution=execution
        )
        state, mine = self.detector.initial_state(1, height, width), range(length)
        self.over_ranks: Callable[[Tensor], Tensor] | None = None
        if kind == "alone":
            self.detector.exchange, self.state = LocalExchange(), state
        else:
            exchange = open_exchange(
                ExchangeKind[kind], mesh, sequence_length=length, dws_conv=False
            )
            global_batch_norms(self.detector, RankReductions(gather_over_ranks, sum_over_ranks))
            self.detector.exchange, self.over_ranks = exchange, sum_over_ranks
            self.state, mine = exchange.scatter(state), mesh.frames(length)
        self.frames, self.labelled, self.boxes, self.counts = inputs(mine, height, width)
        self.loss = 0.0

    def train(self) -> None:
        """Forward, loss and backward."""
        self.detector.zero_grad(set_to_none=True)
        height, width = self.frames.shape[-2:]
        raw, _ = self.detector(
            self.frames, self.state, starts=torch.ones(1, dtype=torch.bool), labelled=self.labelled
        )
        losses = detection_loss(
            raw,
            self.boxes,
            self.counts,
            self.detector.geometry(height, width),
            self.detector.config.head,
            sum_over_ranks=self.over_ranks,
        )
        losses.total.backward()
        self.loss = float(losses.total.detach())


def warm(asked: Asked, mesh: Mesh, kind: str, *, works: bool = True) -> None:
    """A small step first."""
    side = Side(asked, mesh, kind, frames=2 * mesh.sequence_size, size=WARM_SIZE) if works else None
    if side:
        side.train()
    barrier()  # an exchange that goes takes the messages with it that it has not sent yet: it stays until all have theirs


# -- what goes over the wire -----------------------------------------------------------------------------------------
@dataclass
class Wire:
    """Of one rank's step: calls, bytes sent to other ranks, seconds. `waited`: until the last rank had come, where that
    can be told from moving (messages between two ranks cannot: their waiting is in `moved`).

    exchange: all-to-alls and messages. reductions: of BatchNorm and the loss.
    """

    calls: dict[str, int] = field(default_factory=lambda: {"exchange": 0, "reductions": 0})
    bytes: dict[str, float] = field(default_factory=lambda: {"exchange": 0.0, "reductions": 0.0})
    moved: dict[str, float] = field(default_factory=lambda: {"exchange": 0.0, "reductions": 0.0})
    waited: dict[str, float] = field(default_factory=lambda: {"exchange": 0.0, "reductions": 0.0})
    replays: list[Callable[[], object]] = field(
        default_factory=list
    )  # the all-to-alls, of memory that holds nothing

    def collective(self, what: str, function: Callable, sent: Callable[..., float]) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            dist.barrier()
            met = time.perf_counter()
            out = function(*args, **kwargs)
            self._count(what, sent(*args), time.perf_counter() - met, met - began)
            return out

        return call

    def message(self, function: Callable, sent: Callable[..., float]) -> Callable:
        def call(channel: P2PChannel, *args: Any) -> Any:
            began = time.perf_counter()
            out = function(channel, *args)
            self._count("exchange", sent(*args), time.perf_counter() - began, 0.0)
            return out

        return call

    def _count(self, what: str, sent: float, moved: float, waited: float) -> None:
        self.calls[what] += 1
        self.bytes[what] += sent
        self.moved[what] += moved
        self.waited[what] += waited

    def all_to_all(
        self, out: Tensor, x: Tensor, receive: list[int] | None, send: list[int] | None, **_: Any
    ) -> float:
        ranks, me = dist.get_world_size(), dist.get_rank()
        empty = torch.empty_like(out), torch.empty_like(x)
        self.replays.append(partial(ALL_TO_ALL, *empty, receive, send))
        return (
            x.nbytes * (1 - 1 / ranks)
            if send is None
            else x[0].nbytes * (sum(send) - send[me])
            if len(x)
            else 0.0
        )

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Counts this process's collectives, a barrier before each."""
        others = dist.get_world_size() - 1
        with (
            patch.object(
                dist, "all_to_all_single", self.collective("exchange", ALL_TO_ALL, self.all_to_all)
            ),
            patch.object(
                dist,
                "all_reduce",
                self.collective(
                    "reductions",
                    dist.all_reduce,
                    lambda x, *_: 2 * x.nbytes * others / (others + 1),
                ),
            ),
            patch.object(
                dist,
                "all_gather",
                self.collective("reductions", dist.all_gather, lambda _, x: x.nbytes * others),
            ),
            patch.object(
                P2PChannel,
                "send",
                self.message(P2PChannel.send, lambda message, _: sum(t.nbytes for t in message)),
            ),
            patch.object(P2PChannel, "receive", self.message(P2PChannel.receive, lambda *_: 0.0)),
        ):
            yield

    def bare(self, repeats: int = 3) -> float:
        """Seconds of the same all-to-alls one after the other, nothing computed between."""
        took = []
        for _ in range(repeats + 1):
            dist.barrier()
            began = time.perf_counter()
            for replay in self.replays:
                replay()
            took.append(time.perf_counter() - began)
        return min(took[1:])


# -- tasks -----------------------------------------------------------------------------------------------------------
def rounds(asked: Asked, mesh: Mesh) -> dict[str, Any]:
    """Seconds of every kind's step in every round, until the last rank is done; the ranks' order of kinds turns round by round.

    While rank 0 works alone the others wait in a barrier, their cores idle.
    """
    took: dict[str, list[float]] = {kind: [] for kind in asked.kinds}
    losses = {}
    works = {kind: kind != "alone" or mesh.sequence == 0 for kind in asked.kinds}
    for kind in asked.kinds:
        warm(asked, mesh, kind, works=works[kind])
    sides = {kind: Side(asked, mesh, kind) for kind in asked.kinds if works[kind]}
    for i in range(asked.repeats):
        for kind in asked.kinds if i % 2 == 0 else reversed(asked.kinds):
            barrier()
            began = time.perf_counter()
            if works[kind]:
                sides[kind].train()
            barrier()
            took[kind].append(time.perf_counter() - began)
            losses[kind] = sum(gather_objects(sides[kind].loss if works[kind] else 0.0))
            if works[kind]:
                sides[kind].detector.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in sides[asked.kinds[-1]].detector.parameters())
    return {"took": took, "losses": losses, "gradients": _reduced(parameters)}


def _reduced(values: int) -> float:
    """Seconds of a bare all-reduce of that many float32."""
    x, took = torch.zeros(values), []
    for _ in range(3):
        barrier()
        began = time.perf_counter()
        if dist.get_world_size() > 1:
            dist.all_reduce(x)
        took.append(time.perf_counter() - began)
    return min(took)


def share(asked: Asked, mesh: Mesh) -> dict[str, Any]:
    """What of a step is spent in collectives: steps as they are, then one that is tapped, then the bare all-to-alls."""
    kind = asked.kinds[0]
    warm(asked, mesh, kind)
    side, took = Side(asked, mesh, kind), []
    for _ in range(asked.repeats):
        barrier()
        began = time.perf_counter()
        side.train()
        barrier()
        took.append(time.perf_counter() - began)
    wire = Wire()
    began = time.perf_counter()
    with wire.tapped():
        side.train()
    barrier()  # a rank that ends takes the messages with it that it has not sent yet
    tapped = time.perf_counter() - began
    return {
        "step": median(took),
        "tapped": tapped,
        "calls": wire.calls,
        "bytes": wire.bytes,
        "moved": wire.moved,
        "waited": wire.waited,
        "bare": wire.bare() if wire.replays else None,
    }


def peak(asked: Asked, mesh: Mesh) -> dict[str, Any]:
    """Bytes resident at the most during a step, above what the process held before it (weights, frames, libraries)."""
    kind = asked.kinds[0]
    warm(asked, mesh, kind)
    side = Side(asked, mesh, kind)
    ctypes.CDLL(None).malloc_trim(0)  # what the first step left
    barrier()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _kilobytes("VmRSS")
    side.train()
    barrier()
    gradients = sum(p.numel() * p.element_size() for p in side.detector.parameters())
    return {
        "peak": 1024 * (_kilobytes("VmHWM") - before),
        "gradients": gradients,
        "losses": sum(gather_objects(side.loss)),
    }


def _kilobytes(name: str) -> int:
    told = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(told.split()[1])


TASKS = {"rounds": rounds, "share": share, "peak": peak}


def main(folder: str, told: str) -> None:
    asked, ranks, rank = (
        Asked(**json.loads(told)),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ["RANK"]),
    )
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with open_world(
        ParallelConfig(ranks=ranks, sequence=ranks, threads=1, timeout_s=TIMEOUT_S)
    ) as world:
        out = TASKS[asked.task](asked, open_mesh(world, sequence=ranks, timeout_s=TIMEOUT_S))
    Path(folder, f"{rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
