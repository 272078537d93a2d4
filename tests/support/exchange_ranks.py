"""The ranks of tests/pipeline/test_exchange.py: all cases in all layouts of a world.

    python -m support.exchange_ranks FOLDER

with torchrun's variables. Writes FOLDER/RANK.pt: {case: results}.
"""

import os
import sys
from dataclasses import dataclass, replace

import torch
from evspan.conf.schema.layout import ExchangeKind
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    ParallelConfig,
)
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.lstm import CellLSTM
from evspan.pipeline.model.norm import RankReductions, global_batch_norms
from evspan.pipeline.model.sequence_protocol import LocalExchange
from evspan.pipeline.model.state import (
    DetectorState,
    StageState,
    detach,
    forget_lanes,
    map_state,
    state_tensors,
)
from evspan.pipeline.parallel.exchange import open_exchange
from evspan.pipeline.parallel.mesh import open_mesh
from evspan.pipeline.parallel.reductions import add_over_ranks, sum_over_ranks
from evspan.pipeline.parallel.world import open_world
from support.anchor_grad import anchor_grad

TIMEOUT_S = 60
CHUNKS = 3


class Alone(LocalExchange):
    """One rank, which holds the canonical state."""

    def scatter(self, state):
        """The state itself."""
        return state

    def gather(self, state, like):
        """The state without its graph."""
        return map_state(torch.Tensor.detach, state)


def normal(generator, *shape, dtype=torch.float64):
    """Normal values, drawn in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# -- scans -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scan:
    """A scan over chunks."""

    kind: str = "transpose"
    dws_conv: bool = False
    size: tuple[int, int] = (4, 3)
    lanes: int = 3
    frames: int = 12  # of a chunk, over all ranks
    dtype: torch.dtype = torch.float64
    only_last: bool = False  # the loss depends only on the last rank's frames
    cut: bool = False  # detaches the state between chunks

    dim = 4


SCANS = {
    "transpose": Scan(),
    "transpose, cells that do not divide": Scan(size=(5, 5)),
    "transpose, fewer cells than ranks": Scan(size=(1, 2)),
    "transpose, loss on one rank": Scan(only_last=True),
    "transpose, float32": Scan(dtype=torch.float32, cut=True),
    "transpose, bfloat16": Scan(dtype=torch.bfloat16, size=(5, 5)),
    "relay": Scan(kind="relay"),
    "relay, more slices than cells": Scan(kind="relay", size=(1, 2)),
    "relay, cells that do not divide": Scan(kind="relay", size=(5, 5), cut=True),
    "relay, loss on one rank": Scan(kind="relay", only_last=True),
    "relay, float32": Scan(kind="relay", dtype=torch.float32, cut=True),
    "relay, bfloat16": Scan(kind="relay", dtype=torch.bfloat16),
    "relay, neighbours": Scan(kind="relay", dws_conv=True),
    "relay, neighbours, one lane": Scan(kind="relay", dws_conv=True, lanes=1, frames=24),
    "relay, neighbours, loss on one rank": Scan(
        kind="relay", dws_conv=True, only_last=True, cut=True
    ),
    "auto": Scan(kind="auto"),
    "auto, neighbours": Scan(kind="auto", dws_conv=True),
}


def scan(case, exchange, mine, ranks):
    """Runs an LSTM over chunks with starts. The loss weighs every output and state differently.

    Args:
        mine: this rank's frames of each chunk.
    """
    g = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    lstm = CellLSTM(case.dim, dws_conv=case.dws_conv).to(case.dtype)
    whole = case.frames, case.lanes, *case.size, case.dim
    shape = case.lanes, case.dim, *case.size
    chunks = []
    for _ in range(CHUNKS):
        x = normal(g, *whole, dtype=case.dtype)
        weights = normal(g, *whole, dtype=case.dtype)
        chunks.append((x, weights))
    starts = torch.rand(CHUNKS, case.lanes, generator=g) < 0.4

    def some_state():
        hidden = normal(g, *shape, dtype=case.dtype)
        cell = normal(g, *shape, dtype=case.dtype)
        return DetectorState((StageState(hidden, cell),), ())

    canonical = some_state()
    first = map_state(torch.Tensor.requires_grad_, exchange.scatter(canonical))
    state = first
    state_weights = exchange.scatter(some_state())
    if case.only_last:
        for _, weights in chunks:
            weights[: -case.frames // ranks] = 0
    xs = []
    ys = []
    for (x, _), begins in zip(chunks, starts, strict=True):
        xs.append(x[mine.start : mine.stop].clone().requires_grad_())
        state = forget_lanes(detach(state) if case.cut else state, begins)
        y, stage = exchange.scan(lstm, xs[-1], state.stages[0])
        ys.append(y)
        state = DetectorState((stage,), ())
    if case.only_last and mine.stop < case.frames:
        loss = anchor_grad(torch.zeros((), dtype=case.dtype, requires_grad=True) * 1, *ys)
    else:
        loss = sum(
            (y * w[mine.start : mine.stop]).sum() for y, (_, w) in zip(ys, chunks, strict=True)
        )
    if not case.only_last:
        loss = loss + sum(
            (t * w).sum()
            for t, w in zip(state_tensors(state), state_tensors(state_weights), strict=True)
        )
    loss.backward()
    by_first = map_state(lambda t: torch.zeros_like(t) if t.grad is None else t.grad, first)
    return {
        "y": torch.stack(ys).detach(),
        "x": torch.stack([x.grad for x in xs]),
        "state": state_tensors(exchange.gather(state, canonical)),
        "first": state_tensors(exchange.gather(by_first, canonical)),
        "weights": [p.grad for p in lstm.parameters()],
    }


def moving_case():
    """An LSTM, two chunks and an initial state."""
    g = torch.Generator().manual_seed(5)
    torch.manual_seed(3)
    shape = 2, 4, 5, 3
    chunks = [normal(g, 12, 2, 5, 3, 4) for _ in range(2)]
    return (
        CellLSTM(4, dws_conv=False).double(),
        chunks,
        DetectorState((StageState(normal(g, *shape), normal(g, *shape)),), ()),
    )


@torch.no_grad()
def scan_moved(mesh):
    """Scans two chunks by different exchanges, as after a checkpoint, with the canonical state."""
    lstm, chunks, canonical = moving_case()
    like = map_state(lambda t: t.to("meta"), canonical)
    mine = mesh.frames(12)
    ys = []
    for kind, x in zip(("transpose", "relay"), chunks, strict=True):
        exchange = open_exchange(ExchangeKind[kind], mesh, sequence_length=12, dws_conv=False)
        y, stage = exchange.scan(
            lstm, x[mine.start : mine.stop], exchange.scatter(canonical).stages[0]
        )
        canonical = exchange.gather(DetectorState((stage,), ()), like)
        ys.append(y)
    return {"y": ys, "state": state_tensors(canonical)}


# -- looking back ----------------------------------------------------------------------------------
LOOKS = {}
for _back in (1, 2, 3, 5):
    for _frames in (1, 2, 4):
        LOOKS[f"{_back} back, {_frames} frames a rank"] = (_back, _frames)


def timeline(back, frames):
    """Frames and the weights of their look-backs in the loss.

    Returns:
        (back + CHUNKS * frames, 2, 3, 2, 2) frames of the first carry and of all chunks.
        (CHUNKS, frames, back, ...) weights, by chunk and by first frame of a rank.
    """
    g = torch.Generator().manual_seed(9)
    shape = (2, 3, 2, 2)
    whole = normal(g, back + CHUNKS * frames, *shape)
    weights = normal(g, CHUNKS, frames, back, *shape)
    return whole, weights


def look_back(back, frames, exchange, mine):
    """Looks back over chunks, as the detector does: the carry's frames fill up a short chunk."""
    whole, weights = timeline(back, frames)
    canonical = DetectorState((), (whole[:back],))
    carry = first = exchange.scatter(canonical).previous[0].requires_grad_()
    befores = []
    features = []
    loss = torch.zeros((), dtype=torch.float64)
    for index in range(CHUNKS):
        begin = back + index * frames
        features.append(whole[begin + mine.start : begin + mine.stop].clone().requires_grad_())
        tail = torch.cat((carry, features[-1]))[-back:]
        # Two scales, of which one has the first channels, with another gradient.
        (before, fewer), (carry, fewer_carry) = exchange.previous(
            [tail, tail[:, :, :2]], [carry, carry[:, :, :2]]
        )
        assert torch.equal(fewer, before[:, :, :2])
        assert torch.equal(fewer_carry, carry[:, :, :2])
        first_channels = torch.tensor([1, 1, 0], dtype=torch.float64).view(3, 1, 1)
        weight = weights[index, mine.start]
        loss = loss + (before * weight * (1 - first_channels / 2)).sum()
        loss = loss + (fewer * weight[:, :, :2] / 2).sum()
        befores.append(before.detach())
    loss.backward()
    gradient = torch.zeros_like(first) if first.grad is None else first.grad
    return {
        "before": torch.stack(befores),
        "features": torch.stack([f.grad for f in features]),
        "carry": exchange.gather(DetectorState((), (carry,)), canonical).previous[0],
        "first": exchange.gather(DetectorState((), (gradient,)), canonical).previous[0],
    }


# -- the whole detector ----------------------------------------------------------------------------
CHANNELS, H, W = 4, 60, 120  # padded to 64 x 128
MODELS = {
    "plain": {},
    "plain, neighbours": {"dws_conv": True},
    "attention": {"attention": True},
    "attention, neighbours": {"attention": True, "dws_conv": True},
    "attention over 4 frames": {"attention": True, "window": 4},
}
F32 = torch.float32
F64 = torch.float64
# (world, ranks per sequence) -> model, exchange, labelled frames of chunk 1 (chunk 2 has some),
# dtype of the weights
DETECTORS = {
    (4, 1): [],
    (4, 2): [
        ("attention, neighbours", "auto", "few", F64),
        ("attention over 4 frames", "auto", "one", F64),
    ],
    (4, 4): [("attention", "relay", "everywhere", F64), ("plain, neighbours", "auto", "one", F64)],
    (3, 3): [
        ("plain", "auto", "none", F64),
        ("attention", "auto", "one", F64),
        ("attention", "auto", "few", F32),
    ],
}


def micro(*, dws_conv=False, attention=False, window=3):
    """A small detector whose parts all affect the output: LayerScale 0.5, open attention gates."""
    torch.manual_seed(0)
    detector = Detector(
        ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5, dws_conv=dws_conv),
            fpn=FpnConfig(depth=0, enable_small_object_attention=attention, temporal_window=window),
            head=HeadConfig(num_classes=2),
        ),
        CHANNELS,
    )
    for name, parameter in detector.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return detector


def chunk(index, labels, frames, lanes):
    """frames (T, B, ...), labelled (T, B), starts (B,), boxes (T, B, 2, 5) of the whole world."""
    g = torch.Generator().manual_seed(index)
    x = torch.randint(0, 11, (frames, lanes, CHANNELS, H, W), dtype=torch.uint8, generator=g)
    labelled = torch.rand(frames, lanes, generator=g) < 0.4
    if index == 0:
        choices = {
            "everywhere": torch.ones_like(labelled),
            "few": labelled,
            "one": torch.zeros_like(labelled),
            "none": torch.zeros_like(labelled),
        }
        labelled = choices[labels]
        labelled[-1, -1] |= labels == "one"  # on the last rank; the others have none
    scale = torch.tensor([1.0, W, H, 30, 20])
    offset = torch.tensor([0.0, 0, 0, 8, 8])
    boxes = torch.rand(frames, lanes, 2, 5, generator=g) * scale + offset
    boxes[..., 0] = (torch.rand(frames, lanes, 2, generator=g) < 0.5).float()
    starts = torch.ones(lanes, dtype=torch.bool)
    if index:
        starts = torch.rand(lanes, generator=g) < 0.3
    return x, labelled, starts, boxes


def detect(model, labels, dtype, exchange, mine, my_lanes, *, frames, lanes, over_ranks=None):
    """Trains on two chunks: losses and gradients over all ranks, canonical carry of these lanes."""
    detector = micro(**MODELS[model]).train().to(dtype)
    detector.exchange = exchange
    total = over_ranks or (lambda t: t.detach())
    if over_ranks is not None:
        global_batch_norms(detector, RankReductions(add_over_ranks))
    canonical = detector.initial_state(len(my_lanes), H, W, dtype=dtype)
    state = exchange.scatter(canonical)
    loss_values = []
    gradients = []
    looks_back = detector.config.fpn.looks_back
    rows = slice(mine.start, mine.stop)
    columns = slice(my_lanes.start, my_lanes.stop)
    for index in range(2):
        x, labelled, starts, boxes = chunk(index, labels, frames, lanes)
        ahead = torch.cat((labelled, torch.ones(looks_back, lanes, dtype=torch.bool)))
        following = ahead[mine.stop : mine.stop + looks_back, columns]
        labelled = labelled[rows, columns]
        boxes = boxes[rows, columns]
        detector.zero_grad(set_to_none=True)
        raw, state = detector(
            x[rows, columns],
            state,
            starts=starts[columns],
            labelled=labelled,
            following=following,
        )
        counts = torch.full((int(labelled.sum()),), 2)
        losses = detection_loss(
            raw,
            boxes[labelled],
            counts,
            detector.geometry(H, W),
            detector.config.head,
            sum_over_ranks=over_ranks,
        )
        losses.total.backward()
        state = detach(state)
        loss_values.append(float(total(losses.total)))
        gradients.append({name: total(p.grad) for name, p in detector.named_parameters()})
    return {
        "loss": loss_values,
        "gradients": gradients,
        "statistics": {k: v for k, v in detector.state_dict().items() if "running" in k},
        "carry": state_tensors(exchange.gather(state, canonical)),
        "lanes": [my_lanes.start, my_lanes.stop],
    }


def detector_size(ranks):
    """Frames and lanes for all layouts. Attention looks back past a rank's frames."""
    return ranks, ranks


# -- a rank ----------------------------------------------------------------------------------------
def every_case(world):
    """The results of all cases of this world."""
    out = {}
    for sequence in [s for size, s in DETECTORS if size == world.size]:
        mesh = open_mesh(world, sequence=sequence, timeout_s=TIMEOUT_S)
        for name, case in SCANS.items():
            exchange = open_exchange(
                ExchangeKind[case.kind], mesh, sequence_length=case.frames, dws_conv=case.dws_conv
            )
            out["scan", sequence, name] = scan(case, exchange, mesh.frames(case.frames), sequence)
        for name, (back, each) in LOOKS.items():
            frames = each * sequence
            exchange = open_exchange(
                ExchangeKind.auto, mesh, sequence_length=frames, dws_conv=False
            )
            out["look", sequence, name] = look_back(back, frames, exchange, mesh.frames(frames))
        frames, lanes = detector_size(world.size)
        for model, kind, labels, dtype in DETECTORS[world.size, sequence]:
            exchange = open_exchange(
                ExchangeKind[kind],
                mesh,
                sequence_length=frames,
                dws_conv=MODELS[model].get("dws_conv", False),  # type: ignore[attr-defined]
            )
            out["detect", sequence, model, kind, labels, dtype] = detect(
                model,
                labels,
                dtype,
                exchange,
                mesh.frames(frames),
                mesh.lanes(lanes),
                frames=frames,
                lanes=lanes,
                over_ranks=sum_over_ranks,
            )
        out["mesh", sequence] = replace(mesh, group=None)
        out["moved", sequence] = scan_moved(mesh)
    return out


def main(folder):
    """Runs all cases."""
    config = ParallelConfig(ranks=int(os.environ["WORLD_SIZE"]), timeout_s=TIMEOUT_S, threads=1)
    with open_world(config) as world:
        out = every_case(world)
        torch.save(out, f"{folder}/{world.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
