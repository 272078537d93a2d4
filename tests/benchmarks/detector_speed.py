"""The detector against a frame-by-frame version of the same network (`frame_by_frame.py`), row by row with what is to be reached.

    .venv/bin/python tests/benchmarks/detector_speed.py [--rows train ...] [--threads 1 2] [--frames 5 10] [--sizes tiny base]

Both sides have the same weights and inputs: sparse uint8 frames of 360 x 640, which each side pads to 384 x 640, one lane, labels
on every second frame, 3 to 10 boxes each. A step is forward, loss and backward. Times are medians over rounds in which the sides
take turns in one process; a ratio is the median of the rounds' ratios. Peaks of memory are those of a process each, above what it
held before the step. It runs on a GPU where there is one; threads do not matter then.

Memory is the C library's affair unless --keep-memory, which lets a process keep what it frees: touching pages anew costs neither
side anything then, which shows how much of a difference it makes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from detector_sides import Batch, Clock, Ours, Rates, Theirs, batch, count, ratio, rounds, train
from torch.utils.flop_counter import FlopCounterMode

PUBLISHED_OPERATORS = {5: 4282, 20: 14768}  # of a training step of tiny, by T
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass
class Bench:
    """What was asked for, and the table as it grows."""

    device: torch.device
    threads: list[int]
    frames: list[int]
    sizes: list[str]
    precisions: list[str]
    repeats: int
    missed: int = 0
    notes: list[str] = field(default_factory=list)

    def head(self) -> None:
        card = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "no GPU was used"
        )
        print(
            f"Device: {self.device.type} ({card}), torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, load "
            f"{os.getloadavg()[0]:.1f}, {self.repeats} rounds of "
            f"{'wall' if Clock.now is time.perf_counter else 'processor'} time, memory "
            f"{'kept' if kept() else 'as the C library does'}\n"
        )
        print(
            "| what | ours | frame by frame | ratio | to reach | reached |\n|---|---|---|---|---|---|"
        )

    def row(
        self,
        what: str,
        ours: str,
        theirs: str = "",
        ratio: float | None = None,
        *,
        least: float | None = None,
        most: float | None = None,
        goal: str = "",
        reached: bool | None = None,
    ) -> None:
        """least, most: of the ratio; or `goal` in words and whether it is `reached`."""
        if ratio is not None and (least or most):
            goal, reached = (
                (f">= x {least:g}", ratio >= least)
                if least
                else (f"<= x {most:g}", ratio <= (most or 0))
            )
        self.missed += reached is False
        told = "" if reached is None else "yes" if reached else "NO"
        print(
            f"| {what} | {ours} | {theirs} | {'' if ratio is None else f'x {ratio:.2f}'} | {goal} | {told} |",
            flush=True,
        )

    def each_threads(self) -> Iterator[str]:
        """Sets the threads and tells them, for the row's name."""
        for number in self.threads if self.device.type == "cpu" else [1]:
            torch.set_num_threads(number)
            yield f"{number} thread{'s' * (number > 1)}" if self.device.type == "cpu" else "GPU"

    def race(
        self,
        what: str,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        per: int,
        unit: str,
        least: float | None = None,
        most: float | None = None,
    ) -> list[float]:
        """A row of times; `per` units are in a call. The ratio is theirs / ours, or ours / theirs where `most` is given."""
        took = rounds(self.repeats, self.device, ours=ours, theirs=theirs)
        times = [f"{median(took[side]) / per * 1e3:.0f} ms/{unit}" for side in ("ours", "theirs")]
        pair = (took["ours"], took["theirs"]) if most else (took["theirs"], took["ours"])
        self.row(what, *times, ratio(*pair), least=least, most=most)
        return took["ours"]


def kept() -> bool:
    return KEEP_MEMORY.items() <= os.environ.items()


# -- rows ------------------------------------------------------------------------------------------------------------
def operators(bench: Bench) -> None:
    ours, theirs, cpu = (
        Ours("tiny", bench.device),
        Theirs("tiny", bench.device),
        bench.device.type == "cpu",
    )
    for side in (ours, theirs):
        train(side, batch(2, bench.device))  # what is made once is not the step's
    mine = {steps: count(ours, batch(steps, bench.device), path_of_gpu=cpu) for steps in (20, 40)}
    other = {steps: count(theirs, batch(steps, bench.device)) for steps in (5, 20)}
    for side, counted in (("ours", mine[20]), ("frame by frame", other[20])):
        bench.notes.append(
            f"T = 20, {side}: {dict(counted.operators.most_common(12))}; waits {dict(counted.waits)}"
        )
    told = {steps: c.operators.total() for steps, c in other.items()}
    near = all(
        abs(told[steps] / published - 1) < 0.05 for steps, published in PUBLISHED_OPERATORS.items()
    )
    bench.row(
        "operators of the frame-by-frame version, tiny, T = 5 and 20",
        "",
        f"{told[5]} and {told[20]}",
        goal=f"published: {' and '.join(map(str, PUBLISHED_OPERATORS.values()))}",
        reached=near,
    )
    at20, at40, waits = (
        mine[20].operators.total(),
        mine[40].operators.total(),
        mine[20].waits.total(),
    )
    path = ", on the path of a GPU" if cpu else ""
    bench.row(
        f"operators of a training step, tiny, T = 20{path}",
        str(at20),
        str(told[20]),
        at20 / told[20],
        goal="<= 1800",
        reached=at20 <= 1800,
    )
    bench.row(
        f"operators, T = 40 against T = 20{path}", f"{at40} and {at20}", "", at40 / at20, most=1.15
    )
    bench.row(
        f"waits of the host, tiny, T = 20{path}",
        str(waits),
        str(other[20].waits.total()),
        goal="<= 2",
        reached=waits <= 2,
    )
    if cpu:
        here = count(ours, batch(20, bench.device)).operators.total()
        bench.row(
            "operators of a training step, tiny, T = 20, as on this CPU",
            str(here),
            str(told[20]),
            here / told[20],
        )


def training(bench: Bench) -> None:
    for threads in bench.each_threads():
        for size in bench.sizes:
            theirs = Theirs(size, bench.device)
            for precision in bench.precisions:
                ours = Ours(size, bench.device, dtype=KINDS[precision])
                for steps in bench.frames:
                    b = batch(steps, bench.device)
                    same_loss(ours, theirs, b, 1e-4 if precision == "fp32" else 3e-2)
                    least = 2.0 if precision == "bf16" else {"tiny": 1.25}.get(size, 1.2)
                    bench.race(
                        f"training step, {size}, T = {steps}, {precision} against fp32, {threads}",
                        partial(train, ours, b),
                        partial(train, theirs, b),
                        steps,
                        "frame",
                        least,
                    )


def same_loss(ours: Ours, theirs: Theirs, b: Batch, tolerance: float) -> None:
    mine, other = (train(side, b).item() for side in (ours, theirs))
    if abs(mine - other) > tolerance * abs(other):
        raise SystemExit(
            f"error: the sides disagree: the loss is {mine:.6g} in ours and {other:.6g} frame by frame"
        )


def compiled(bench: Bench) -> None:
    for threads in bench.each_threads():
        for size in bench.sizes:
            theirs = Theirs(size, bench.device)
            for precision in bench.precisions:
                for steps in bench.frames:
                    b, ours = (
                        batch(steps, bench.device),
                        Ours(size, bench.device, dtype=KINDS[precision], compiled=True),
                    )
                    bench.race(
                        f"training step with torch.compile, {size}, T = {steps}, {precision} against fp32, {threads}",
                        partial(train, ours, b),
                        partial(train, theirs, b),
                        steps,
                        "frame",
                    )


def stream(bench: Bench) -> None:
    for threads in bench.each_threads():
        for size in bench.sizes:
            frame = batch(1, bench.device).frames[0]
            bench.race(
                f"streaming inference, {size}, one frame, {threads}",
                Ours(size, bench.device).stream(frame),
                Theirs(size, bench.device).stream(frame),
                1,
                "frame",
                1.25,
            )


def memory(bench: Bench) -> None:
    for size in bench.sizes:
        for steps in bench.frames:
            ours, theirs, name = (
                *(peak(bench.device, side, size, steps) for side in ("ours", "theirs")),
                f"{size}, T = {steps}",
            )
            bench.row(
                f"peak memory of a training step, {name}",
                f"{ours:.0f} MB",
                f"{theirs:.0f} MB",
                ours / theirs,
                most=1.0,
            )
            least = peak(bench.device, "checkpointed", size, steps)
            bench.row(
                f"peak memory with activation checkpointing, {name}",
                f"{least:.0f} MB",
                f"{theirs:.0f} MB",
                least / theirs,
                most=0.5,
            )


def peak(device: torch.device, side: str, size: str, steps: int) -> float:
    """MB above what a process of its own holds before the step."""
    environment = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY}
    told = subprocess.run(
        [sys.executable, __file__, "--peak", side, size, str(steps), device.type],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return json.loads(told.stdout.splitlines()[-1])


def print_peak(side: str, size: str, steps: str, kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind)
    model = (
        Theirs(size, device)
        if side == "theirs"
        else Ours(size, device, checkpointed=side == "checkpointed")
    )
    b = batch(int(steps), device)
    # A small step first: what libraries set up once is not the step's.
    train(model, batch(2, device, size=(96, 128)))
    model.model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(model, b)
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    train(model, b)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print((most - pages * resource.getpagesize()) / 1e6)


def attention(bench: Bench) -> None:
    for threads in bench.each_threads():
        for size in bench.sizes:
            for steps in bench.frames:
                b, on, off = (
                    batch(steps, bench.device),
                    Ours(size, bench.device, attention=True),
                    Ours(size, bench.device),
                )
                bench.race(
                    f"attention on against off, {size}, T = {steps}, {threads}",
                    partial(train, on, b),
                    partial(train, off, b),
                    steps,
                    "frame",
                    most=1.25,
                )


def length(bench: Bench) -> None:
    """Half of the frames is labelled: where T is odd, the halves above and below take turns."""
    ours, steps = Ours("tiny", bench.device), (5, 10, 20, 40)
    inputs = {t: [batch(t, bench.device, first=k) for k in range(2)] for t in steps}

    def work(t: int) -> Callable[[], object]:
        def both() -> None:
            for b in inputs[t][: 2 if t % 2 else 1]:
                train(ours, b)

        return both

    for threads in bench.each_threads():
        took = rounds(bench.repeats, bench.device, warm=1, **{str(t): work(t) for t in steps})
        frame = {t: [s / t / (2 if t % 2 else 1) for s in took[str(t)]] for t in steps}
        for t in steps[1:]:
            change = ratio(frame[t], frame[5])
            bench.row(
                f"a frame at T = {t} against T = 5, tiny, {threads}",
                *(f"{median(frame[k]) * 1e3:.0f} ms" for k in (t, 5)),
                change,
                goal="within 10 %",
                reached=0.9 <= change <= 1.1,
            )


def floor(bench: Bench) -> None:
    """Three times the products of a forward pass (neck and head on half of the frames) at the rate of a plain one."""
    for threads in bench.each_threads():
        for size in bench.sizes:
            backbone, rest = forward_flops(size)
            ours, b, rates = Ours(size, bench.device), batch(10, bench.device), Rates(bench.device)
            took = (
                median(
                    rounds(bench.repeats, bench.device, step=partial(train, ours, b), rate=rates)[
                        "step"
                    ]
                )
                / 10
            )
            rate = median(rates.measured[-bench.repeats :])
            least = 3 * (backbone + rest / 2) / rate
            products = f"{backbone / 1e9:.1f} + {rest / 1e9:.1f} / 2 GFLOP forward, {rate / 1e9:.0f} GFLOP/s"
            bench.row(
                f"distance to the floor, {size}, T = 10, {threads}; {products}",
                f"{took * 1e3:.0f} ms/frame",
                f"floor: {least * 1e3:.0f}",
                took / least,
                most=1.5,
            )


def forward_flops(size: str) -> tuple[float, float]:
    """Of a frame: backbone; neck and head."""
    cpu = torch.device("cpu")
    model, frame = Theirs(size, cpu).model.eval(), batch(1, cpu).frames[0]
    with torch.inference_mode():
        with FlopCounterMode(display=False) as backbone:
            state = model.backbone(model.padded(frame), None)
        with FlopCounterMode(display=False) as rest:
            model.yolox_head(model.fpn([hidden for hidden, _ in state[1:]]))
    return backbone.get_total_flops(), rest.get_total_flops()


ROWS = {
    "operators": operators,
    "train": training,
    "compile": compiled,
    "stream": stream,
    "memory": memory,
    "attention": attention,
    "length": length,
    "floor": floor,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=[name for name in ROWS if name != "compile"]
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--frames", nargs="+", type=int, default=[5, 10], help="T")
    parser.add_argument(
        "--sizes", nargs="+", choices=["tiny", "small", "base"], default=["tiny", "base"]
    )
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"]
    )
    parser.add_argument("--compile", action="store_true", help="the rows with torch.compile too")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="let a process keep the memory that it frees"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the processor's time instead of wall time, for 1 thread on a "
        "machine that others use too",
    )
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        return print_peak(*given.peak)
    if given.keep_memory and not kept():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    if given.cpu_time:
        Clock.now = staticmethod(time.process_time)
    bench = Bench(
        torch.device(given.device),
        given.threads,
        given.frames,
        given.sizes,
        given.precision,
        given.repeats,
    )
    bench.head()
    for name in [
        *given.rows,
        *(["compile"] if given.compile and "compile" not in given.rows else []),
    ]:
        ROWS[name](bench)
    print("", *bench.notes, sep="\n")
    sys.exit(1 if bench.missed else 0)


if __name__ == "__main__":
    main()
