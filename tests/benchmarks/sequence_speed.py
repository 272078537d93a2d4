"""One long sequence over several ranks (gloo), row by row with what is to be reached.

    .venv/bin/python tests/benchmarks/sequence_speed.py [--rows speed share memory length] [--sizes tiny base]

A step is forward, loss and backward of one lane of uint8 frames of 360 x 640, padded to 384 x 640, labels on every second one,
with the statistics of BatchNorm and the loss over all ranks; the sum of gradients, which any data parallelism has, is told apart.
A rank is a process of one thread on a core of its own (with more ranks than cores they take turns: that is for memory alone).

speed: rounds in which the same processes run the chunk on one rank, the other core idle, then shared by Transpose, then by Relay.
The rank that works alone has the cache that cores share, and the memory's bandwidth, to itself.
share: a barrier stands before every collective of a step of its own, so that waiting for the slower rank is not taken for moving
bytes; `bare` is the time of the same all-to-alls with nothing else in the step. Relay's waiting cannot be told from its moving.
memory, length: peaks resident in processes that run one step, above what they held before it (libraries, weights, frames).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from evspan.launch.local.ranks import run_ranks
from exchange_model import relay_bytes, transpose_bytes
from sequence_ranks import CHANNELS, SIZES, Asked

PROGRAM = Path(__file__).with_name("sequence_ranks.py")
PADDED = 64  # frames become multiples of it


@dataclass
class Bench:
    """What was asked for, and the table as it grows."""

    given: argparse.Namespace
    missed: int = 0

    def head(self) -> None:
        print(
            f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, frames of "
            f"{self.given.height} x {self.given.width}, {self.given.repeats} rounds\n"
        )
        print(
            "| what | one rank | shared | ratio | to reach | reached |\n|---|---|---|---|---|---|"
        )

    def row(
        self,
        what: str,
        one: str = "",
        shared: str = "",
        ratio: float | None = None,
        *,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        goal, reached = "", None
        if ratio is not None and (least or most):
            goal, reached = (
                (f">= x {least:g}", ratio >= least)
                if least
                else (f"<= x {most:g}", ratio <= (most or 0))
            )
        self.missed += reached is False
        told = "" if reached is None else "yes" if reached else "NO"
        print(
            f"| {what} | {one} | {shared} | {'' if ratio is None else f'x {ratio:.2f}'} | {goal} | {told} |",
            flush=True,
        )

    def run(self, ranks: int, task: str, **wanted: object) -> list[dict]:
        """What each rank of a launch tells."""
        asked = Asked(
            task,
            height=self.given.height,
            width=self.given.width,
            repeats=self.given.repeats,
            frames_per_call=self.given.frames_per_call,
            **wanted,
        )  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory(prefix="evspan-") as folder:
            command = [sys.executable, str(PROGRAM), folder, json.dumps(asdict(asked))]
            if code := run_ranks(command, ranks, threads=1):
                raise SystemExit(code)
            return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]

    @property
    def padded(self) -> tuple[int, int]:
        return -(-self.given.height // PADDED) * PADDED, -(-self.given.width // PADDED) * PADDED


# -- rows ------------------------------------------------------------------------------------------------------------
def speed(bench: Bench) -> None:
    frames = bench.given.frames
    for size in bench.given.sizes:
        kinds = ["alone", *bench.given.kinds]
        told = bench.run(2, "rounds", size=size, frames=frames, kinds=kinds)[0]
        one = told["took"]["alone"]
        for kind in kinds[1:]:
            same_loss(told["losses"]["alone"], told["losses"][kind])
            two = told["took"][kind]
            bench.row(
                f"a step, {size}, T = {frames}, 2 ranks, {kind}",
                *(f"{median(t):.2f} s" for t in (one, two)),
                median(a / b for a, b in zip(one, two, strict=True)),
                least=1.9 if kind == "transpose" else None,
            )
        bench.row(
            f"sum of gradients, {size}, not in these", "", f"{told['gradients'] * 1e3:.0f} ms"
        )


def same_loss(one: float, other: float) -> None:
    if abs(one - other) > 1e-4 * abs(one):
        raise SystemExit(f"error: the loss is {one:.7g} on one rank and {other:.7g} on several")


def share(bench: Bench) -> None:
    for size in bench.given.sizes:
        for each in bench.given.frames_a_rank:
            for kind in bench.given.kinds:
                share_of(bench, size, each, kind)


def share_of(bench: Bench, size: str, each: int, kind: str) -> None:
    every, (height, width) = (
        bench.run(2, "share", size=size, frames=2 * each, kinds=[kind]),
        bench.padded,
    )
    # Relay: there and back over the one border; and the states of the chunk before go from the last rank to the first.
    formula = (
        2 * transpose_bytes(size, each, 2, 4, height=height, width=width)
        if kind == "transpose"
        else 1.5 * relay_bytes(size, 4, height=height, width=width)
    )
    if (sent := sum(t["bytes"]["exchange"] for t in every)) != formula:
        raise SystemExit(f"error: the ranks sent {sent:.0f} bytes, the formula says {formula:.0f}")
    told = max(every, key=lambda t: t["moved"]["exchange"])
    step, moved, waited, counted = (
        told["step"],
        told["moved"],
        told["waited"],
        told["bytes"]["exchange"],
    )
    bare = (
        ""
        if told["bare"] is None
        else f"; bare {told['bare'] * 1e3:.0f} ms, {counted / told['bare'] / 1e9:.2f} GB/s"
    )
    bench.row(
        f"exchange, {size}, {each} frames a rank, {kind}: {told['calls']['exchange']} calls, {counted / 1e6:.1f} MB sent"
        f"{bare}",
        f"of {step:.2f} s",
        f"{moved['exchange'] * 1e3:.0f} ms ({moved['exchange'] / step:.1%})",
    )
    bench.row(
        f"waiting for the other rank before these; before {told['calls']['reductions']} reductions; reductions",
        "",
        " ".join(
            f"{t * 1e3:.0f} ms ({t / step:.1%})"
            for t in (waited["exchange"], waited["reductions"], moved["reductions"])
        ),
    )


def memory(bench: Bench) -> None:
    frames = bench.given.frames
    for size in bench.given.sizes:
        one = most(bench.run(1, "peak", size=size, frames=frames, kinds=["alone"]))
        for ranks, bound in ((2, 0.6), (4, 0.35)):
            for kind in bench.given.kinds:
                shared = most(bench.run(ranks, "peak", size=size, frames=frames, kinds=[kind]))
                bench.row(
                    f"peak of a rank, {size}, T = {frames}, {ranks} ranks, {kind}",
                    mb(one),
                    mb(shared),
                    shared["peak"] / one["peak"],
                    most=bound,
                )


def most(told: Sequence[dict]) -> dict:
    return max(told, key=lambda t: t["peak"])


def mb(told: dict) -> str:
    return f"{told['peak'] / 1e6:.0f} MB (gradients {told['gradients'] / 1e6:.0f})"


def length(bench: Bench) -> None:
    size, frames = bench.given.length_size, bench.given.length_frames
    for checkpointed in (False, True):
        how = "activation checkpointing" if checkpointed else "everything kept"
        wanted = {"size": size, "checkpointed": checkpointed}
        began = time.perf_counter()
        one = most(bench.run(1, "peak", frames=frames, kinds=["alone"], **wanted))
        four = most(bench.run(4, "peak", frames=4 * frames, kinds=["transpose"], **wanted))
        bench.row(
            f"peak of a rank, {size}, T = {4 * frames} on 4 ranks, T = {frames} on one, {how} "
            f"({time.perf_counter() - began:.0f} s)",
            mb(one),
            mb(four),
            four["peak"] / one["peak"],
            most=1.05,
        )


ROWS = {"speed": speed, "share": share, "memory": memory, "length": length}


def check_memory(given: argparse.Namespace) -> None:
    """All frames of the longest chunk lie in memory, uint8; activations are ten and more times that."""
    frames = 4 * given.length_frames if "length" in given.rows else given.frames
    needed = frames * CHANNELS * given.height * given.width * 2
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > there:
        raise SystemExit(
            f"error: {frames} frames take {needed / 1e9:.1f} GB and {there / 1e9:.1f} GB are free; lower --frames"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "base"])
    parser.add_argument(
        "--kinds", nargs="+", choices=["transpose", "relay"], default=["transpose", "relay"]
    )
    parser.add_argument("--frames", type=int, default=32, help="T of speed and memory")
    parser.add_argument("--frames-a-rank", nargs="+", type=int, default=[1, 4, 16], help="of share")
    parser.add_argument("--length-size", choices=SIZES, default="micro")
    parser.add_argument("--length-frames", type=int, default=50, help="T of one rank")
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--frames-per-call", type=int, default=0, help="training.frames_per_call")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    bench = Bench(parser.parse_args())
    check_memory(bench.given)
    bench.head()
    for name in bench.given.rows:
        ROWS[name](bench)
    sys.exit(1 if bench.missed else 0)


if __name__ == "__main__":
    main()
