"""One rank of `sequence_speed.py`.

    python sequence_ranks.py FOLDER JSON

Started by evspan.launch.local.ranks. JSON holds the fields of Task; the result is FOLDER/RANK.json.
"""

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
from typing import Any, NamedTuple
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
    add_over_ranks,
    barrier,
    gather_json,
    sum_over_ranks,
)
from evspan.pipeline.parallel.world import open_world
from torch import Tensor

CHANNELS = 20
CLASSES = 3
MOST_BOXES = 10  # of a frame
SIZES = {  # embed_dim, dim_head, depth of the neck
    "micro": (16, 8, 0.33),
    "tiny": (32, 32, 0.33),
    "small": (48, 24, 0.33),
    "base": (64, 32, 0.67),
}
WARM_UP_SIZE = (96, 128)  # of the frames of a first step, in which libraries initialize
TIMEOUT_S = 600
ALL_TO_ALL = dist.all_to_all_single  # the original, also while it is patched


@dataclass
class Task:
    """What the ranks measure, and on which network and frames."""

    name: str  # of TASKS
    size: str = "tiny"
    frames: int = 4  # of the chunk, over all ranks
    kinds: list[str] = field(default_factory=lambda: ["transpose"])  # exchanges; "alone": none
    height: int = 360  # padded to 384 x 640
    width: int = 640
    attention: bool = False
    checkpointed: bool = False
    frames_per_call: int = 0
    repeats: int = 2


# -- a training step -------------------------------------------------------------------------------
def model_of(size: str, *, attention: bool = False) -> ModelConfig:
    """LayerScale is 0.1 instead of 1e-5, so that every difference changes the loss."""
    embed_dim, dim_head, depth = SIZES[size]
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=embed_dim, dim_head=dim_head, ls_init_value=0.1),
        fpn=FpnConfig(depth=depth, enable_small_object_attention=attention),
    )


class Inputs(NamedTuple):
    """The frames of a rank and their boxes."""

    frames: Tensor  # (T, 1, 20, H, W) uint8, 3 % of it not zero
    labelled: Tensor  # (T, 1) bool, every second frame
    boxes: Tensor  # (n, 10, 5) of the n labelled frames
    counts: Tensor  # (n,) int64


def inputs(numbers: range, height: int, width: int) -> Inputs:
    """Draws each frame from its number, so that all layouts get the same frames."""
    frames = torch.empty(len(numbers), 1, CHANNELS, height, width, dtype=torch.uint8)
    boxes = []
    counts = []
    for t, frame in zip(numbers, frames, strict=True):
        g = torch.Generator().manual_seed(t)
        frame.copy_((torch.rand(frame.shape, generator=g) * 100 - 96).clamp(min=0).ceil())
        if t % 2 == 0:
            count = int(torch.randint(3, MOST_BOXES + 1, (), generator=g))
            position = torch.rand(MOST_BOXES, 4, generator=g)
            class_id = torch.randint(0, CLASSES, (MOST_BOXES, 1), generator=g)
            centre = position[:, :2] * torch.tensor([width, height])
            row = torch.cat((class_id, centre, 10 + position[:, 2:] * 90), 1)
            boxes.append(row * (torch.arange(MOST_BOXES) < count)[:, None])
            counts.append(count)
    return Inputs(
        frames,
        torch.tensor([[t % 2 == 0] for t in numbers]),
        torch.stack(boxes) if boxes else torch.zeros(0, MOST_BOXES, 5),
        torch.tensor(counts, dtype=torch.int64),
    )


class Side:
    """The detector and this rank's frames of a chunk under one exchange.

    kind: "alone" keeps the whole chunk on this rank.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        kind: str,
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        length = frames or task.frames
        height, width = size or (task.height, task.width)
        torch.manual_seed(0)
        execution = Execution(
            frames_per_call=task.frames_per_call, activation_checkpointing=task.checkpointed
        )
        self.detector = Detector(
            model_of(task.size, attention=task.attention), CHANNELS, execution=execution
        )
        self.state = self.detector.initial_state(1, height, width)
        self.over_ranks: Callable[[Tensor], Tensor] | None = None
        mine = range(length)
        if kind == "alone":
            self.detector.exchange = LocalExchange()
        else:
            exchange = open_exchange(
                ExchangeKind[kind], mesh, sequence_length=length, dws_conv=False
            )
            global_batch_norms(self.detector, RankReductions(add_over_ranks))
            self.detector.exchange = exchange
            self.over_ranks = sum_over_ranks
            self.state = exchange.scatter(self.state)
            mine = mesh.frames(length)
        self.inputs = inputs(mine, height, width)
        looks_back = self.detector.config.fpn.looks_back
        after = range(mine.stop, mine.stop + looks_back)
        following = [[t >= length or t % 2 == 0] for t in after]
        self.following = torch.tensor(following, dtype=torch.bool).view(looks_back, 1)
        self.loss = 0.0

    def train(self) -> None:
        """Forward, loss and backward."""
        self.detector.zero_grad(set_to_none=True)
        frames, labelled, boxes, counts = self.inputs
        height, width = frames.shape[-2:]
        starts = torch.ones(1, dtype=torch.bool)
        raw, _ = self.detector(
            frames, self.state, starts=starts, labelled=labelled, following=self.following
        )
        losses = detection_loss(
            raw,
            boxes,
            counts,
            self.detector.geometry(height, width),
            self.detector.config.head,
            sum_over_ranks=self.over_ranks,
        )
        losses.total.backward()
        self.loss = float(losses.total.detach())


def warm_up(task: Task, mesh: Mesh, kind: str, *, works: bool = True) -> None:
    """Runs a small step first. works: False on ranks that are idle under this kind."""
    if works:
        side = Side(task, mesh, kind, frames=2 * mesh.sequence_size, size=WARM_UP_SIZE)
        side.train()
    # An exchange that is freed drops its unsent messages: it lives until all ranks have theirs.
    barrier()


# -- communication ---------------------------------------------------------------------------------
def _per_kind() -> dict[str, float]:
    return {"exchange": 0.0, "reductions": 0.0}


@dataclass
class Traffic:
    """Communication of one rank's step, by kind: `exchange` and `reductions`.

    exchange: all-to-alls and messages. reductions: of BatchNorm and the loss.

    Attributes:
        calls: number of calls.
        bytes: sent to other ranks.
        moved: seconds of the calls.
        waited: seconds until the last rank arrived. The wait of a message between two ranks cannot
            be separated: it is in `moved`.
        replays: repeat the all-to-alls with empty tensors.
    """

    calls: dict[str, float] = field(default_factory=_per_kind)
    bytes: dict[str, float] = field(default_factory=_per_kind)
    moved: dict[str, float] = field(default_factory=_per_kind)
    waited: dict[str, float] = field(default_factory=_per_kind)
    replays: list[Callable[[], object]] = field(default_factory=list)

    def collective(self, kind: str, function: Callable, sent: Callable[..., float]) -> Callable:
        """Wraps a collective: a barrier comes first. sent: arguments -> bytes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            arrival = time.perf_counter()
            dist.barrier()
            start = time.perf_counter()
            out = function(*args, **kwargs)
            self._count(kind, sent(*args), time.perf_counter() - start, start - arrival)
            return out

        return call

    def message(self, function: Callable, sent: Callable[..., float]) -> Callable:
        """Wraps a method of P2PChannel. sent: arguments -> bytes."""

        def call(channel: P2PChannel, *args: Any) -> Any:
            start = time.perf_counter()
            out = function(channel, *args)
            self._count("exchange", sent(*args), time.perf_counter() - start, 0.0)
            return out

        return call

    def _count(self, kind: str, sent: float, moved: float, waited: float) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += sent
        self.moved[kind] += moved
        self.waited[kind] += waited

    def all_to_all_bytes(
        self, out: Tensor, x: Tensor, receive: list[int] | None, send: list[int] | None
    ) -> float:
        """Bytes of an all-to-all to other ranks. Records the call in `replays`."""
        self.replays.append(
            partial(ALL_TO_ALL, torch.empty_like(out), torch.empty_like(x), receive, send)
        )
        if send is None:
            return x.nbytes * (1 - 1 / dist.get_world_size())
        if not len(x):
            return 0.0
        return x[0].nbytes * (sum(send) - send[dist.get_rank()])

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts this process's collectives, with a barrier before each."""
        ranks = dist.get_world_size()
        others = ranks - 1
        collectives = {
            "all_to_all_single": self.collective("exchange", ALL_TO_ALL, self.all_to_all_bytes),
            "all_reduce": self.collective(
                "reductions", dist.all_reduce, lambda x, *_: 2 * x.nbytes * others / ranks
            ),
        }
        messages = {
            "send": self.message(
                P2PChannel.send, lambda tensors, _: sum(t.nbytes for t in tensors)
            ),
            "receive": self.message(P2PChannel.receive, lambda *_: 0.0),
        }
        with patch.multiple(dist, **collectives), patch.multiple(P2PChannel, **messages):
            yield

    def bare_seconds(self, repeats: int = 3) -> float:
        """Time of the same all-to-alls one after the other, without computing."""
        times = []
        for _ in range(repeats + 1):
            dist.barrier()
            start = time.perf_counter()
            for replay in self.replays:
                replay()
            times.append(time.perf_counter() - start)
        return min(times[1:])


# -- tasks -----------------------------------------------------------------------------------------
def rounds(task: Task, mesh: Mesh) -> dict[str, Any]:
    """Seconds of every kind's step in every round, until the last rank ends.

    The order of the kinds alternates. While rank 0 works alone, the others wait in a barrier.
    """
    times: dict[str, list[float]] = {kind: [] for kind in task.kinds}
    losses = {}
    works = {kind: kind != "alone" or mesh.sequence == 0 for kind in task.kinds}
    for kind in task.kinds:
        warm_up(task, mesh, kind, works=works[kind])
    sides = {kind: Side(task, mesh, kind) for kind in task.kinds if works[kind]}
    for i in range(task.repeats):
        for kind in task.kinds if i % 2 == 0 else reversed(task.kinds):
            barrier()
            start = time.perf_counter()
            if works[kind]:
                sides[kind].train()
            barrier()
            times[kind].append(time.perf_counter() - start)
            losses[kind] = sum(gather_json(sides[kind].loss if works[kind] else 0.0))
            if works[kind]:
                sides[kind].detector.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in sides[task.kinds[-1]].detector.parameters())
    return {"times": times, "losses": losses, "gradients": _all_reduce_seconds(parameters)}


def _all_reduce_seconds(num_values: int) -> float:
    """Time of an all-reduce of that many float32."""
    x = torch.zeros(num_values)
    times = []
    for _ in range(3):
        barrier()
        start = time.perf_counter()
        if dist.get_world_size() > 1:
            dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    return min(times)


def exchange(task: Task, mesh: Mesh) -> dict[str, Any]:
    """Times of unchanged steps, the traffic of a counted step, and the time of bare all-to-alls."""
    kind = task.kinds[0]
    warm_up(task, mesh, kind)
    side = Side(task, mesh, kind)
    times = []
    for _ in range(task.repeats):
        barrier()
        start = time.perf_counter()
        side.train()
        barrier()
        times.append(time.perf_counter() - start)
    traffic = Traffic()
    start = time.perf_counter()
    with traffic.counted():
        side.train()
    barrier()  # a rank that ends drops its unsent messages
    counted = time.perf_counter() - start
    return {
        "step": median(times),
        "counted": counted,
        "calls": traffic.calls,
        "bytes": traffic.bytes,
        "moved": traffic.moved,
        "waited": traffic.waited,
        "bare": traffic.bare_seconds() if traffic.replays else None,
    }


def peak(task: Task, mesh: Mesh) -> dict[str, Any]:
    """Peak resident bytes during a step, above those before it (weights, frames, libraries)."""
    kind = task.kinds[0]
    warm_up(task, mesh, kind)
    side = Side(task, mesh, kind)
    ctypes.CDLL(None).malloc_trim(0)  # returns the memory of the first step
    barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_kb("VmRSS")
    side.train()
    barrier()
    gradients = sum(p.numel() * p.element_size() for p in side.detector.parameters())
    return {
        "peak": 1024 * (_status_kb("VmHWM") - before),
        "gradients": gradients,
        "losses": sum(gather_json(side.loss)),
    }


def _status_kb(name: str) -> int:
    """A memory field of /proc/self/status. (common.py is not on the path of ranks.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise KeyError(name)


TASKS = {"rounds": rounds, "exchange": exchange, "peak": peak}


def main(folder: str, task_json: str) -> None:
    """Runs the task on one core and writes its result."""
    task = Task(**json.loads(task_json))
    ranks = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    config = ParallelConfig(ranks=ranks, sequence=ranks, threads=1, timeout_s=TIMEOUT_S)
    with open_world(config) as world:
        mesh = open_mesh(world, sequence=ranks, timeout_s=TIMEOUT_S)
        result = TASKS[task.name](task, mesh)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
