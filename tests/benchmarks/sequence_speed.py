"""Measures one long sequence over several ranks (gloo).

    .venv/bin/python tests/benchmarks/sequence_speed.py [--rows speed exchange memory length]

A step is forward, loss and backward of one lane of uint8 frames of 360 x 640, padded to 384 x 640,
every second one labelled, with the statistics of BatchNorm and the loss over all ranks. The sum of
gradients, which any data parallelism needs, is a row of its own. A rank is a process of one thread
on its own core (with more ranks than cores they take turns: use that for memory only).

speed: rounds in which the same processes run the chunk on one rank, the other core idle, then by
    Transpose, then by Relay. A rank that works alone has the shared cache and the memory bandwidth
    to itself.
exchange: in a separate step, a barrier comes before every collective, so that waiting for the
    slower rank does not count as moving bytes. `bare` is the time of the same all-to-alls without
    computing. For Relay, waiting and moving cannot be separated.
memory, length: peak resident memory of processes during one step, above the memory before it
    (libraries, weights, frames).
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
from typing import Any

import torch
from common import as_ratio, ratio_target, yes_or_no
from evspan.launch.local.ranks import run_ranks
from exchange_model import relay_bytes, transpose_bytes
from sequence_ranks import CHANNELS, SIZES, Task

PROGRAM = Path(__file__).with_name("sequence_ranks.py")
PADDING = 64  # sides of frames are padded to a multiple of it
LEAST_SPEEDUP = 1.9  # of Transpose on 2 ranks
MOST_MEMORY = {2: 0.6, 4: 0.35}  # by ranks: peak of a rank / peak of one rank

Result = dict[str, Any]  # of one rank


@dataclass
class Bench:
    """The options and the table."""

    args: argparse.Namespace
    missed: int = 0

    def head(self) -> None:
        """Prints the machine and the table's head."""
        print(
            f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, "
            f"load {os.getloadavg()[0]:.1f}, frames of {self.args.height} x {self.args.width}, "
            f"{self.args.repeats} rounds\n"
        )
        print("| what | one rank | shared | ratio | target | reached |\n|---|---|---|---|---|---|")

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
        """Prints a row. least, most: bounds of the ratio."""
        target, reached = ratio_target(ratio, least, most)
        self.missed += reached is False
        cells = [what, one, shared, as_ratio(ratio), target, yes_or_no(reached)]
        print(f"| {' | '.join(cells)} |", flush=True)

    def run(self, ranks: int, name: str, **options: Any) -> list[Result]:
        """Runs a task and returns the result of each rank. options: fields of Task."""
        task = Task(
            name,
            height=self.args.height,
            width=self.args.width,
            repeats=self.args.repeats,
            frames_per_call=self.args.frames_per_call,
            **options,
        )
        with tempfile.TemporaryDirectory(prefix="evspan-") as folder:
            command = [sys.executable, str(PROGRAM), folder, json.dumps(asdict(task))]
            code = run_ranks(command, ranks, threads=1)
            if code:
                raise SystemExit(code)
            return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of the padded frames."""
        return _padded(self.args.height), _padded(self.args.width)


def _padded(side: int) -> int:
    return -(-side // PADDING) * PADDING


# -- rows ------------------------------------------------------------------------------------------
def speed(bench: Bench) -> None:
    """Steps of two ranks against one."""
    frames = bench.args.frames
    for size in bench.args.sizes:
        kinds = ["alone", *bench.args.kinds]
        result = bench.run(2, "rounds", size=size, frames=frames, kinds=kinds)[0]
        one = result["times"]["alone"]
        for kind in kinds[1:]:
            require_same_loss(result["losses"]["alone"], result["losses"][kind])
            two = result["times"][kind]
            bench.row(
                f"a step, {size}, T = {frames}, 2 ranks, {kind}",
                f"{median(one):.2f} s",
                f"{median(two):.2f} s",
                median(a / b for a, b in zip(one, two, strict=True)),
                least=LEAST_SPEEDUP if kind == "transpose" else None,
            )
        gradients_ms = result["gradients"] * 1e3
        bench.row(f"sum of gradients, {size}, not in these", "", f"{gradients_ms:.0f} ms")


def require_same_loss(one: float, other: float) -> None:
    """Ends the program when the losses differ."""
    if abs(one - other) > 1e-4 * abs(one):
        raise SystemExit(f"error: the loss is {one:.7g} on one rank and {other:.7g} on several")


def exchange(bench: Bench) -> None:
    """Time and bytes of the exchange on two ranks."""
    for size in bench.args.sizes:
        for frames in bench.args.frames_a_rank:
            for kind in bench.args.kinds:
                exchange_rows(bench, size, frames, kind)


def exchange_rows(bench: Bench, size: str, frames: int, kind: str) -> None:
    """Two rows of one exchange, and a check of its bytes. frames: of each rank."""
    results = bench.run(2, "exchange", size=size, frames=2 * frames, kinds=[kind])
    height, width = bench.padded_size
    if kind == "transpose":
        expected = 2 * transpose_bytes(size, frames, 2, 4, height=height, width=width)
    else:
        # There and back over one border; the last rank sends the chunk's states to the first.
        expected = 1.5 * relay_bytes(size, 4, height=height, width=width)
    sent = sum(result["bytes"]["exchange"] for result in results)
    if sent != expected:
        raise SystemExit(f"error: the ranks sent {sent:.0f} bytes, by formula {expected:.0f}")
    slowest = max(results, key=lambda result: result["moved"]["exchange"])
    step = slowest["step"]
    moved = slowest["moved"]
    waited = slowest["waited"]
    num_bytes = slowest["bytes"]["exchange"]
    what = f"exchange, {size}, {frames} frames a rank, {kind}: "
    what += f"{slowest['calls']['exchange']:.0f} calls, {num_bytes / 1e6:.1f} MB sent"
    bare = slowest["bare"]
    if bare is not None:
        what += f"; bare {bare * 1e3:.0f} ms, {num_bytes / bare / 1e9:.2f} GB/s"
    bench.row(what, f"of {step:.2f} s", in_step(moved["exchange"], step))
    parts = (waited["exchange"], waited["reductions"], moved["reductions"])
    bench.row(
        "waiting for the other rank before these; "
        f"before {slowest['calls']['reductions']:.0f} reductions; reductions",
        "",
        " ".join(in_step(seconds, step) for seconds in parts),
    )


def in_step(seconds: float, step: float) -> str:
    """Milliseconds, and the fraction of a step."""
    return f"{seconds * 1e3:.0f} ms ({seconds / step:.1%})"


def memory(bench: Bench) -> None:
    """Peak memory of a rank, of two and four ranks against one."""
    frames = bench.args.frames
    for size in bench.args.sizes:
        one = largest(bench.run(1, "peak", size=size, frames=frames, kinds=["alone"]))
        for ranks, most in MOST_MEMORY.items():
            for kind in bench.args.kinds:
                shared = largest(bench.run(ranks, "peak", size=size, frames=frames, kinds=[kind]))
                bench.row(
                    f"peak of a rank, {size}, T = {frames}, {ranks} ranks, {kind}",
                    megabytes(one),
                    megabytes(shared),
                    shared["peak"] / one["peak"],
                    most=most,
                )


def largest(results: Sequence[Result]) -> Result:
    """The result of the rank with the highest peak."""
    return max(results, key=lambda result: result["peak"])


def megabytes(result: Result) -> str:
    """The peak, and the gradients' part of it."""
    return f"{result['peak'] / 1e6:.0f} MB (gradients {result['gradients'] / 1e6:.0f})"


def length(bench: Bench) -> None:
    """Peak memory of four ranks with four times the frames, against one rank."""
    size = bench.args.length_size
    frames = bench.args.length_frames
    for checkpointed in (False, True):
        memory_use = "activation checkpointing" if checkpointed else "everything kept"
        options: dict[str, Any] = {"size": size, "checkpointed": checkpointed}
        start = time.perf_counter()
        one = largest(bench.run(1, "peak", frames=frames, kinds=["alone"], **options))
        four = largest(bench.run(4, "peak", frames=4 * frames, kinds=["transpose"], **options))
        seconds = time.perf_counter() - start
        bench.row(
            f"peak of a rank, {size}, T = {4 * frames} on 4 ranks, T = {frames} on one, "
            f"{memory_use} ({seconds:.0f} s)",
            megabytes(one),
            megabytes(four),
            four["peak"] / one["peak"],
            most=1.05,
        )


ROWS = {"speed": speed, "exchange": exchange, "memory": memory, "length": length}


def check_memory(args: argparse.Namespace) -> None:
    """Refuses chunks that do not fit in memory.

    All frames of the longest chunk are in memory as uint8; activations take ten times that or more.
    """
    frames = 4 * args.length_frames if "length" in args.rows else args.frames
    needed = frames * CHANNELS * args.height * args.width * 2
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > free:
        raise SystemExit(
            f"error: {frames} frames take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "lower --frames"
        )


def main() -> None:
    """Prints the table; exit code 1 if a target is not reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "base"])
    parser.add_argument(
        "--kinds", nargs="+", choices=["transpose", "relay"], default=["transpose", "relay"]
    )
    parser.add_argument("--frames", type=int, default=32, help="T of rows `speed` and `memory`")
    parser.add_argument(
        "--frames-a-rank", nargs="+", type=int, default=[1, 4, 16], help="of row `exchange`"
    )
    parser.add_argument("--length-size", choices=SIZES, default="micro")
    parser.add_argument(
        "--length-frames", type=int, default=50, help="T of one rank in row `length`"
    )
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--frames-per-call", type=int, default=0, help="training.frames_per_call")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    bench = Bench(parser.parse_args())
    check_memory(bench.args)
    bench.head()
    for name in bench.args.rows:
        ROWS[name](bench)
    sys.exit(1 if bench.missed else 0)


if __name__ == "__main__":
    main()
