"""How much of a training step on GPUs its exchange would take: bytes by formula, everything else by the assumptions below.

    .venv/bin/python tests/benchmarks/exchange_model.py [--plot pipeline/parallel/exchange_fraction.svg]

`sequence_speed.py --rows share` holds the formulas to the bytes that real ranks send. No GPU was measured. What is left out makes
the share smaller than it will be (nothing overlaps here, but kernels' launches and the T steps of a scan add to the step) or is
there without sequence ranks, too (gradients over all ranks, statistics of BatchNorm over all ranks).
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from evspan.pipeline.parallel.relay import SLICES_PER_RANK

HEIGHT, WIDTH, STRIDES = 384, 640, (4, 8, 16, 32)
EMBED_DIM = {"micro": 16, "tiny": 32, "small": 48, "base": 64}
# Of a frame: backbone; neck and head (detector_speed.py --rows floor).
FORWARD_GFLOP = {"tiny": (5.9, 2.3), "small": (12.1, 5.3), "base": (20.6, 10.6)}
LABELLED = 0.5  # of the frames, which neck and head see
BF16 = 2  # bytes
PEAK = 989e12  # H100 SXM, dense bfloat16 products a second
UTILISATION = 0.1  # of it, by this network: small channels. Assumed
NODE = 8  # GPUs that NVLink joins


class Network(NamedTuple):
    """rate: bytes a second that a rank sends (and at once receives) in large messages, below the line's rate.
    latency, per_peer: seconds of a collective of nothing, and more of it for every other rank. Assumed."""

    name: str
    rate: float
    latency: float
    per_peer: float

    def seconds(self, sent: float, collectives: int, ranks: int) -> float:
        return sent / self.rate + collectives * (self.latency + self.per_peer * (ranks - 1))


NVLINK = Network(
    "NVLink 450 GB/s", 0.82 * 450e9, 15e-6, 0.5e-6
)  # NCCL reaches about 370 GB/s of the 450
INFINIBAND = Network("InfiniBand 200 Gb/s", 0.9 * 25e9, 25e-6, 1e-6)


# -- bytes ---------------------------------------------------------------------------------------------------------
def maps(size: str, height: int = HEIGHT, width: int = WIDTH) -> list[tuple[int, int]]:
    """(cells, channels) of every stage."""
    return [(height // s * (width // s), EMBED_DIM[size] * 2**k) for k, s in enumerate(STRIDES)]


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
    """That a rank with `frames` frames sends in a step: per stage there and back, forward and backward, all but its own cells."""
    return (
        4
        * frames
        * lanes
        * itemsize
        * sum(
            (ranks - 1) * math.ceil(cells / ranks) * channels
            for cells, channels in maps(size, height, width)
        )
    )


def transpose_collectives() -> int:
    return 4 * len(STRIDES)


def relay_bytes(
    size: str, itemsize: int, *, lanes: int = 1, height: int = HEIGHT, width: int = WIDTH
) -> int:
    """That a rank in the middle sends: hidden and cell of every stage to the next, their gradients to the one before."""
    return (
        4
        * lanes
        * itemsize
        * sum(cells * channels for cells, channels in maps(size, height, width))
    )


# -- seconds -------------------------------------------------------------------------------------------------------
def training_flop(size: str) -> float:
    """Of a frame, forward and backward."""
    backbone, rest = FORWARD_GFLOP[size]
    return 3e9 * (backbone + LABELLED * rest)


def scan_fraction(size: str) -> float:
    """Of those, the LSTMs': 4 gates of [x, h] per cell."""
    return (
        3
        * sum(2 * cells * 2 * channels * 4 * channels for cells, channels in maps(size))
        / training_flop(size)
    )


def compute_seconds(size: str, frames: int, utilisation: float = UTILISATION) -> float:
    return frames * training_flop(size) / (utilisation * PEAK)


Way = Callable[
    [str, int, int, float], float
]  # size, frames a rank, ranks, seconds that a rank computes -> those of its exchange


def on_one_network(network: Network) -> Way:
    def seconds(size: str, frames: int, ranks: int, _: float) -> float:
        return network.seconds(
            transpose_bytes(size, frames, ranks, BF16), transpose_collectives(), ranks
        )

    return seconds


def on_nodes(size: str, frames: int, ranks: int, _: float) -> float:
    """Nodes of 8: what goes to the same node and what goes to others go at the same time."""
    sent, inside = transpose_bytes(size, frames, ranks, BF16), min(ranks, NODE)
    far = (ranks - inside) / (ranks - 1)
    calls = transpose_collectives()
    near = NVLINK.seconds(sent * (1 - far), calls, inside)
    return max(near, INFINIBAND.seconds(sent * far, calls, ranks)) if far else near


def relay(size: str, frames: int, ranks: int, compute: float) -> float:
    """Over InfiniBand: the states that are handed on, and the time in which the wavefront has not reached a rank. A scan's last
    rank ends slices + ranks - 1 hand-overs after the first began."""
    slices = SLICES_PER_RANK * ranks
    idle = compute * scan_fraction(size) * (ranks - 1) / slices
    return idle + INFINIBAND.seconds(
        relay_bytes(size, BF16), 2 * len(STRIDES) * (slices + ranks - 1), 1
    )


WAYS: dict[str, Way] = {
    NVLINK.name: on_one_network(NVLINK),
    "nodes of 8: NVLink, InfiniBand between": on_nodes,
    INFINIBAND.name: on_one_network(INFINIBAND),
    "Relay, InfiniBand": relay,
}


def share_of_step(exchange: float, compute: float) -> float:
    return exchange / (exchange + compute)


# -- table and plot ------------------------------------------------------------------------------------------------
RANKS = (2, 4, 8, 16, 32, 64)


def table(size: str, frames: int, utilisation: float) -> None:
    compute = compute_seconds(size, frames, utilisation)
    sent = transpose_bytes(size, frames, 64, BF16) / 1e6
    print(
        f"\n{size}, {frames} frames a rank, bfloat16, {utilisation:.0%} of an H100's peak: {compute * 1e3:.1f} ms of "
        f"computing; {sent:.0f} MB sent at 64 ranks\n"
    )
    print(
        f"| share of the step | {' | '.join(f'{n} ranks' for n in RANKS)} |\n|---|{'---|' * len(RANKS)}"
    )
    for name, way in WAYS.items():
        shares = [share_of_step(way(size, frames, n, compute), compute) for n in RANKS]
        print(f"| {name} | {' | '.join(f'{s:.0%}' for s in shares)} |")


COLOURS = ("#1b7f4b", "#2a6fdb", "#d1495b", "#8a6d00")
LEFT, TOP, WIDE, HIGH, GAP, MOST = 48, 40, 300, 220, 56, 1.0


def plot(path: Path) -> None:
    panels = [
        ("base, 16 frames a rank: T grows with the ranks", lambda ranks: 16),
        ("base, 128 frames in all: 64 a rank, ..., 2 a rank", lambda ranks: 128 // ranks),
    ]
    width, height = LEFT + 2 * WIDE + GAP + 16, TOP + HIGH + 100
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, frames) in enumerate(panels):
        out += _panel(LEFT + i * (WIDE + GAP), title, frames)
    for i, name in enumerate(WAYS):
        x, y = LEFT + (i % 2) * (WIDE + GAP), TOP + HIGH + 52 + 20 * (i // 2)
        out += [
            f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" {_stroke(i)}/>',
            f'<text x="{x + 30}" y="{y}">{name}</text>',
        ]
    out.append(
        f'<text x="{LEFT}" y="{height - 8}" fill="#555">Modelled: bfloat16, {UTILISATION:.0%} of an H100\'s dense peak, '
        "nothing overlapped</text></svg>"
    )
    path.write_text("\n".join(out) + "\n")


def _stroke(i: int) -> str:
    return f'fill="none" stroke="{COLOURS[i]}" stroke-width="2"' + (
        ' stroke-dasharray="5 4"' if i == 3 else ""
    )


def _panel(left: float, title: str, frames: Callable[[int], int]) -> list[str]:
    def at(ranks: int, share: float) -> tuple[float, float]:
        return left + WIDE * (math.log2(ranks) - 1) / 5, TOP + HIGH * (1 - share / MOST)

    out = [f'<text x="{left}" y="{TOP - 14}">{title}</text>']
    for percent in range(0, round(100 * MOST) + 1, 20):
        y = at(2, percent / 100)[1]
        out += [
            f'<line x1="{left}" x2="{left + WIDE}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>',
        ]
    out += [
        f'<text x="{at(n, 0)[0]:.1f}" y="{TOP + HIGH + 16}" text-anchor="middle">{n}</text>'
        for n in RANKS
    ]
    out.append(
        f'<text x="{left + WIDE / 2}" y="{TOP + HIGH + 32}" text-anchor="middle">ranks that share a sequence</text>'
    )
    for i, way in enumerate(WAYS.values()):
        computing = {n: compute_seconds("base", frames(n)) for n in RANKS}
        points = [
            at(n, share_of_step(way("base", frames(n), n, computing[n]), computing[n]))
            for n in RANKS
        ]
        out.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {_stroke(i)}/>'
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=FORWARD_GFLOP, default=list(FORWARD_GFLOP))
    parser.add_argument(
        "--frames", nargs="+", type=int, default=[2, 16], help="of a rank, all lanes together"
    )
    parser.add_argument(
        "--utilisation", nargs="+", type=float, default=[UTILISATION, 3 * UTILISATION]
    )
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    for size in given.sizes:
        for frames in given.frames:
            for utilisation in given.utilisation:
                table(size, frames, utilisation)
    if given.plot:
        plot(given.plot)


if __name__ == "__main__":
    main()
