"""Models the fraction of a training step on GPUs that the exchange takes.

    .venv/bin/python tests/benchmarks/exchange_model.py [--plot FILE.svg]

pipeline/parallel/exchange_fraction.svg is its plot. Bytes follow from formulas, everything else
from the assumptions below. `sequence_speed.py --rows exchange` compares the formulas with the bytes
that real ranks send. No GPU was measured. What is left out makes the modelled fraction larger than
the real one (nothing overlaps here, but kernel launches and the T steps of a scan add to the step),
or exists without sequence ranks too (gradients and statistics of BatchNorm over all ranks).
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from evspan.pipeline.parallel.relay import SLICES_PER_RANK

HEIGHT = 384
WIDTH = 640
STRIDES = (4, 8, 16, 32)
EMBED_DIM = {"micro": 16, "tiny": 32, "small": 48, "base": 64}
LABELLED = 0.5  # fraction of the frames, which neck and head process
BF16 = 2  # bytes
PEAK = 989e12  # H100 SXM, dense bfloat16 FLOP/s
UTILISATION = 0.1  # of the peak, by this network with few channels. Assumed
NODE = 8  # GPUs that NVLink connects
RANKS = (2, 4, 8, 16, 32, 64)


class ForwardGflop(NamedTuple):
    """Forward GFLOP of a frame (detector_speed.py --rows floor)."""

    backbone: float
    neck_and_head: float


FORWARD_GFLOP = {
    "tiny": ForwardGflop(5.9, 2.3),
    "small": ForwardGflop(12.1, 5.3),
    "base": ForwardGflop(20.6, 10.6),
}


class Network(NamedTuple):
    """A network between ranks. The latencies are assumed.

    Attributes:
        rate: bytes per second that a rank sends (and receives at the same time) in large messages,
            below the line's rate.
        latency: seconds of an empty collective.
        per_peer: additional seconds for every other rank.
    """

    name: str
    rate: float
    latency: float
    per_peer: float

    def seconds(self, sent: float, collectives: int, ranks: int) -> float:
        """Time to send `sent` bytes in so many collectives."""
        return sent / self.rate + collectives * (self.latency + self.per_peer * (ranks - 1))


# NCCL reaches about 370 GB/s of the 450.
NVLINK = Network("NVLink 450 GB/s", 0.82 * 450e9, 15e-6, 0.5e-6)
INFINIBAND = Network("InfiniBand 200 Gb/s", 0.9 * 25e9, 25e-6, 1e-6)


# -- bytes -----------------------------------------------------------------------------------------
class FeatureMap(NamedTuple):
    """The size of a stage's output."""

    cells: int
    channels: int


def feature_maps(size: str, height: int = HEIGHT, width: int = WIDTH) -> list[FeatureMap]:
    """The feature map of every stage."""
    maps = []
    for k, stride in enumerate(STRIDES):
        cells = height // stride * (width // stride)
        maps.append(FeatureMap(cells, EMBED_DIM[size] * 2**k))
    return maps


def transpose_bytes(
    size: str,
    frames: int,
    ranks: int,
    itemsize: int,
    *,
    lanes: int = 1,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> int:
    """Bytes that a rank with `frames` frames sends in a step of the Transpose exchange.

    Each stage sends all but the rank's own cells, there and back, forward and backward.
    """
    values = 0
    for cells, channels in feature_maps(size, height, width):
        values += (ranks - 1) * math.ceil(cells / ranks) * channels
    return 4 * frames * lanes * itemsize * values


def transpose_collectives() -> int:
    """Number of all-to-alls in a step."""
    return 4 * len(STRIDES)


def relay_bytes(
    size: str, itemsize: int, *, lanes: int = 1, height: int = HEIGHT, width: int = WIDTH
) -> int:
    """Bytes that a rank in the middle sends in a step of the Relay exchange.

    Hidden and cell state of every stage to the next rank, their gradients to the previous one.
    """
    values = sum(cells * channels for cells, channels in feature_maps(size, height, width))
    return 4 * lanes * itemsize * values


# -- seconds ---------------------------------------------------------------------------------------
def training_flop(size: str) -> float:
    """FLOP of a frame, forward and backward."""
    forward = FORWARD_GFLOP[size]
    return 3e9 * (forward.backbone + LABELLED * forward.neck_and_head)


def scan_fraction(size: str) -> float:
    """Fraction of the training FLOP in the LSTMs: 4 gates of [x, h] per cell."""
    forward = 0
    for cells, channels in feature_maps(size):
        forward += 2 * cells * 2 * channels * 4 * channels
    return 3 * forward / training_flop(size)


def compute_seconds(size: str, frames: int, utilisation: float = UTILISATION) -> float:
    """Time that a rank computes for its frames."""
    return frames * training_flop(size) / (utilisation * PEAK)


# (size, frames per rank, ranks, seconds that a rank computes) -> seconds of the exchange
ExchangeTime = Callable[[str, int, int, float], float]


def on_one_network(network: Network) -> ExchangeTime:
    """Transpose over one network."""

    def seconds(size: str, frames: int, ranks: int, _: float) -> float:
        sent = transpose_bytes(size, frames, ranks, BF16)
        return network.seconds(sent, transpose_collectives(), ranks)

    return seconds


def on_nodes(size: str, frames: int, ranks: int, _: float) -> float:
    """Transpose over nodes of 8 GPUs. Traffic inside and between nodes overlaps."""
    sent = transpose_bytes(size, frames, ranks, BF16)
    ranks_per_node = min(ranks, NODE)
    far = (ranks - ranks_per_node) / (ranks - 1)
    collectives = transpose_collectives()
    near_seconds = NVLINK.seconds(sent * (1 - far), collectives, ranks_per_node)
    if not far:
        return near_seconds
    return max(near_seconds, INFINIBAND.seconds(sent * far, collectives, ranks))


def relay(size: str, frames: int, ranks: int, compute: float) -> float:
    """Relay over InfiniBand: its messages, and the idle time before the wavefront reaches a rank.

    The last rank of a scan ends slices + ranks - 1 messages after the first one began.
    """
    slices = SLICES_PER_RANK * ranks
    idle = compute * scan_fraction(size) * (ranks - 1) / slices
    messages = 2 * len(STRIDES) * (slices + ranks - 1)
    return idle + INFINIBAND.seconds(relay_bytes(size, BF16), messages, 1)


EXCHANGES: dict[str, ExchangeTime] = {
    NVLINK.name: on_one_network(NVLINK),
    "nodes of 8: NVLink, InfiniBand between": on_nodes,
    INFINIBAND.name: on_one_network(INFINIBAND),
    "Relay, InfiniBand": relay,
}


def fraction_of_step(exchange: float, compute: float) -> float:
    """Fraction of a step without overlap that the exchange takes."""
    return exchange / (exchange + compute)


# -- all collectives of a step ---------------------------------------------------------------------
SCALES = 3
BLOCKS = {"tiny": 1, "small": 1, "base": 2}  # bottlenecks of a CSP layer
COPY = 3e-6  # seconds of a small kernel, here a copy out of a gathered buffer. Assumed


class Layout(NamedTuple):
    """Ranks of a run. batch_norm: parallel.batch_norm, or "gathered" for the former lists."""

    ranks: int
    sequence: int
    attention: bool
    batch_norm: str


class Step(NamedTuple):
    """Collectives of a step, gradients and optimizer left out, by the ranks that take part.

    exchange: all-to-alls of a sequence's ranks. sequence, world: all-reduces and gathers of norms,
    loss and labels. copies: small kernels that a gather into a list adds.
    """

    exchange: int
    sequence: int
    world: int
    copies: int

    @property
    def total(self) -> int:
        """Number of collectives."""
        return self.exchange + self.sequence + self.world


def norm_levels(size: str) -> int:
    """Norms on the longest path through neck and head: each needs the statistics of the last.

    A level of the neck is a convolution and a CSP layer, whose two first convolutions share one.
    """
    neck = 2 * (SCALES - 1) * (1 + 2 + 2 * BLOCKS[size])
    return neck + 3


def step_collectives(size: str, layout: Layout) -> Step:
    """Counts; tests/pipeline/test_gpu_step.py counts those of the real trainer."""
    levels = norm_levels(size)
    former = layout.batch_norm == "gathered"
    exchange = 0
    if layout.sequence > 1:
        exchange = transpose_collectives()
        if layout.attention:
            exchange += 4 if former else 2
    if former:
        labels = int(layout.sequence > 1 and layout.attention)
        return Step(exchange, labels, 2 * levels + 2, levels * layout.ranks)
    together = {"world": layout.ranks, "sequence": layout.sequence, "rank": 1}[layout.batch_norm]
    if together == layout.ranks:
        return Step(exchange, 0, 2 * levels + 1, 0)
    in_sequence = 2 * levels if together > 1 else 0
    return Step(exchange, in_sequence, 2, 0)  # loss, running statistics


def latency_seconds(step: Step, layout: Layout) -> float:
    """Latency of all collectives on nodes of 8 GPUs, a sequence within a node."""
    if layout.ranks > NODE:
        world = INFINIBAND.seconds(0, step.world, layout.ranks)
    else:
        world = NVLINK.seconds(0, step.world, layout.ranks)
    sequence = NVLINK.seconds(0, step.exchange + step.sequence, layout.sequence)
    return world + sequence + step.copies * COPY


def print_collectives(size: str) -> None:
    """Prints number and latency of the collectives by layout."""
    print(f"\n{size}: collectives per step without those of the optimizer, and their latency\n")
    print("| ranks | sequence ranks | attention | before | world | sequence | rank |")
    print("|---|---|---|---|---|---|---|")
    for ranks, sequence, attention in (
        (8, 1, False),
        (8, 8, False),
        (8, 8, True),
        (64, 1, False),
        (64, 8, False),
        (64, 8, True),
    ):
        cells = []
        for batch_norm in ("gathered", "world", "sequence", "rank"):
            layout = Layout(ranks, sequence, attention, batch_norm)
            step = step_collectives(size, layout)
            cells.append(f"{step.total}, {latency_seconds(step, layout) * 1e3:.1f} ms")
        answer = "yes" if attention else "no"
        print(f"| {ranks} | {sequence} | {answer} | {' | '.join(cells)} |")


# -- table and plot --------------------------------------------------------------------------------
def print_table(size: str, frames: int, utilisation: float) -> None:
    """Prints the fractions of one size by exchange and number of ranks."""
    compute = compute_seconds(size, frames, utilisation)
    sent = transpose_bytes(size, frames, 64, BF16) / 1e6
    print(
        f"\n{size}, {frames} frames a rank, bfloat16, {utilisation:.0%} of an H100's peak: "
        f"{compute * 1e3:.1f} ms of computing; {sent:.0f} MB sent at 64 ranks\n"
    )
    print(f"| fraction of the step | {' | '.join(f'{n} ranks' for n in RANKS)} |")
    print(f"|---|{'---|' * len(RANKS)}")
    for name, exchange_time in EXCHANGES.items():
        cells = []
        for ranks in RANKS:
            exchange = exchange_time(size, frames, ranks, compute)
            cells.append(f"{fraction_of_step(exchange, compute):.0%}")
        print(f"| {name} | {' | '.join(cells)} |")


COLOURS = ("#1b7f4b", "#2a6fdb", "#d1495b", "#8a6d00")
LEFT = 48
TOP = 40
PANEL_WIDTH = 300
PANEL_HEIGHT = 220
GAP = 56
PANELS: list[tuple[str, Callable[[int], int]]] = [  # title, ranks -> frames per rank
    ("base, 16 frames a rank: T grows with the ranks", lambda ranks: 16),
    ("base, 128 frames in all: 64 a rank, ..., 2 a rank", lambda ranks: 128 // ranks),
]


def plot(path: Path) -> None:
    """Draws the fractions of `base` over the number of ranks."""
    width = LEFT + 2 * PANEL_WIDTH + GAP + 16
    height = TOP + PANEL_HEIGHT + 100
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, frames) in enumerate(PANELS):
        out += _panel(LEFT + i * (PANEL_WIDTH + GAP), title, frames)
    for i, name in enumerate(EXCHANGES):
        x = LEFT + (i % 2) * (PANEL_WIDTH + GAP)
        y = TOP + PANEL_HEIGHT + 52 + 20 * (i // 2)
        out += [
            f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" {_stroke(i)}/>',
            f'<text x="{x + 30}" y="{y}">{name}</text>',
        ]
    out.append(
        f'<text x="{LEFT}" y="{height - 8}" fill="#555">Modelled: bfloat16, {UTILISATION:.0%} of '
        "an H100's dense peak, nothing overlapped</text></svg>"
    )
    path.write_text("\n".join(out) + "\n")


def _stroke(i: int) -> str:
    stroke = f'fill="none" stroke="{COLOURS[i]}" stroke-width="2"'
    if i == 3:
        stroke += ' stroke-dasharray="5 4"'
    return stroke


def _panel(left: float, title: str, frames: Callable[[int], int]) -> list[str]:
    def column(ranks: int) -> float:
        return left + PANEL_WIDTH * (math.log2(ranks) - 1) / 5

    def row(fraction: float) -> float:
        return TOP + PANEL_HEIGHT * (1 - fraction)

    out = [f'<text x="{left}" y="{TOP - 14}">{title}</text>']
    right = left + PANEL_WIDTH
    for percent in range(0, 101, 20):
        y = row(percent / 100)
        out += [
            f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>',
        ]
    label_y = TOP + PANEL_HEIGHT + 16
    for ranks in RANKS:
        out.append(
            f'<text x="{column(ranks):.1f}" y="{label_y}" text-anchor="middle">{ranks}</text>'
        )
    middle = left + PANEL_WIDTH / 2
    out.append(
        f'<text x="{middle}" y="{label_y + 16}" text-anchor="middle">'
        "ranks that share a sequence</text>"
    )
    for i, exchange_time in enumerate(EXCHANGES.values()):
        points = []
        for ranks in RANKS:
            compute = compute_seconds("base", frames(ranks))
            exchange = exchange_time("base", frames(ranks), ranks, compute)
            fraction = fraction_of_step(exchange, compute)
            points.append(f"{column(ranks):.1f},{row(fraction):.1f}")
        out.append(f'<polyline points="{" ".join(points)}" {_stroke(i)}/>')
    return out


def main() -> None:
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=FORWARD_GFLOP, default=list(FORWARD_GFLOP))
    parser.add_argument(
        "--frames", nargs="+", type=int, default=[2, 16], help="frames per rank, of all lanes"
    )
    parser.add_argument(
        "--utilisation", nargs="+", type=float, default=[UTILISATION, 3 * UTILISATION]
    )
    parser.add_argument(
        "--collectives", action="store_true", help="only the collectives of a step by layout"
    )
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.collectives:
        for size in args.sizes:
            print_collectives(size)
        return
    for size in args.sizes:
        for frames in args.frames:
            for utilisation in args.utilisation:
                print_table(size, frames, utilisation)
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main()
