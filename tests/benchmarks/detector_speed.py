"""Compares the detector with a frame-by-frame version of its network (`frame_by_frame.py`).

    .venv/bin/python tests/benchmarks/detector_speed.py [--rows train ...] [--threads 1 2]

Both sides have the same weights and inputs: sparse uint8 frames of 360 x 640, which each side pads
to 384 x 640, one lane, every second frame labelled, 3 to 10 boxes each. A step is forward, loss and
backward. Times are medians over rounds in which the sides take turns in one process; a ratio is the
median of the rounds' ratios. Peaks of memory are those of separate processes, above the memory
before the step. It runs on a GPU if there is one; threads have no effect then.

With --keep-memory, the C library keeps the memory that a process frees. Neither side then pays for
touching new pages, which shows how much of a difference that makes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from common import as_ratio, ratio_target, status_kb, yes_or_no
from detector_sides import (
    Batch,
    Clock,
    MatmulRate,
    Ours,
    Theirs,
    count_operators,
    make_batch,
    median_ratio,
    rounds,
    train,
)
from torch.utils.flop_counter import FlopCounterMode

PUBLISHED_OPERATORS = {5: 4282, 20: 14768}  # of a training step of tiny, by T
MOST_OPERATORS = 1800  # of a training step of tiny, T = 20
MOST_WAITS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass
class Bench:
    """The options and the table."""

    device: torch.device
    threads: list[int]
    frames: list[int]
    sizes: list[str]
    precisions: list[str]
    repeats: int
    missed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def on_cpu(self) -> bool:
        """Whether the sides run on a CPU."""
        return self.device.type == "cpu"

    def head(self) -> None:
        """Prints the machine, the options and the table's head."""
        gpu = "no GPU was used" if self.on_cpu else torch.cuda.get_device_name(self.device)
        clock = "wall" if Clock.now is time.perf_counter else "processor"
        memory = "kept" if keeps_memory() else "as the C library does"
        print(
            f"Device: {self.device.type} ({gpu}), torch {torch.__version__}, "
            f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
            f"{self.repeats} rounds of {clock} time, memory {memory}\n"
        )
        print("| what | ours | frame by frame | ratio | target | reached |")
        print("|---|---|---|---|---|---|")

    def row(
        self,
        what: str,
        ours: str,
        theirs: str = "",
        ratio: float | None = None,
        *,
        least: float | None = None,
        most: float | None = None,
        target: str = "",
        reached: bool | None = None,
    ) -> None:
        """Prints a row.

        Args:
            least, most: bounds of the ratio. Without them:
            target, reached: another target in words, and whether it is reached.
        """
        if least or most:
            target, reached = ratio_target(ratio, least, most)
        self.missed += reached is False
        cells = [what, ours, theirs, as_ratio(ratio), target, yes_or_no(reached)]
        print(f"| {' | '.join(cells)} |", flush=True)

    def each_threads(self) -> Iterator[str]:
        """Sets each number of threads and yields its name for a row."""
        if not self.on_cpu:
            yield "GPU"
            return
        for number in self.threads:
            torch.set_num_threads(number)
            yield "1 thread" if number == 1 else f"{number} threads"

    def cases(self) -> Iterator["Case"]:
        """All combinations of threads, size and number of frames."""
        for threads in self.each_threads():
            for size in self.sizes:
                for steps in self.frames:
                    yield Case(threads, size, steps)

    def race(
        self,
        what: str,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        frames: int,
        *,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """Prints a row of times per frame.

        Args:
            frames: number of frames in a call.
            least: bound of theirs / ours.
            most: bound of ours / theirs.
        """
        times = rounds(self.repeats, self.device, ours=ours, theirs=theirs)
        cells = [f"{median(times[side]) / frames * 1e3:.0f} ms/frame" for side in times]
        if most:
            ratio = median_ratio(times["ours"], times["theirs"])
        else:
            ratio = median_ratio(times["theirs"], times["ours"])
        self.row(what, *cells, ratio, least=least, most=most)


class Case(NamedTuple):
    """A combination to measure. threads: for the row's name. steps: T."""

    threads: str
    size: str
    steps: int


def keeps_memory() -> bool:
    """Whether this process runs under --keep-memory."""
    return KEEP_MEMORY.items() <= os.environ.items()


# -- rows ------------------------------------------------------------------------------------------
def operators(bench: Bench) -> None:
    """Numbers of operators and host waits of a training step."""
    ours = Ours("tiny", bench.device)
    theirs = Theirs("tiny", bench.device)
    for side in (ours, theirs):
        train(side, make_batch(2, bench.device))  # initializes what later steps reuse
    our_counts = {}
    for steps in (20, 40):
        batch = make_batch(steps, bench.device)
        our_counts[steps] = count_operators(ours, batch, gpu_path=bench.on_cpu)
    their_counts = {}
    for steps in PUBLISHED_OPERATORS:
        their_counts[steps] = count_operators(theirs, make_batch(steps, bench.device))
    for name, counter in (("ours", our_counts[20]), ("frame by frame", their_counts[20])):
        most_common = dict(counter.operators.most_common(12))
        bench.notes.append(f"T = 20, {name}: {most_common}; waits {dict(counter.waits)}")

    their_totals = {steps: counter.operators.total() for steps, counter in their_counts.items()}
    deviations = [
        abs(their_totals[steps] / published - 1) for steps, published in PUBLISHED_OPERATORS.items()
    ]
    bench.row(
        "operators of the frame-by-frame version, tiny, T = 5 and 20",
        "",
        " and ".join(map(str, their_totals.values())),
        target=f"published: {' and '.join(map(str, PUBLISHED_OPERATORS.values()))}",
        reached=max(deviations) < 0.05,
    )
    at20 = our_counts[20].operators.total()
    at40 = our_counts[40].operators.total()
    waits = our_counts[20].waits.total()
    path = ", on the path of a GPU" if bench.on_cpu else ""
    bench.row(
        f"operators of a training step, tiny, T = 20{path}",
        str(at20),
        str(their_totals[20]),
        at20 / their_totals[20],
        target=f"<= {MOST_OPERATORS}",
        reached=at20 <= MOST_OPERATORS,
    )
    bench.row(
        f"operators, T = 40 against T = 20{path}", f"{at40} and {at20}", "", at40 / at20, most=1.15
    )
    bench.row(
        f"waits of the host, tiny, T = 20{path}",
        str(waits),
        str(their_counts[20].waits.total()),
        target=f"<= {MOST_WAITS}",
        reached=waits <= MOST_WAITS,
    )
    if bench.on_cpu:
        on_cpu = count_operators(ours, make_batch(20, bench.device)).operators.total()
        bench.row(
            "operators of a training step, tiny, T = 20, as on this CPU",
            str(on_cpu),
            str(their_totals[20]),
            on_cpu / their_totals[20],
        )


def training(bench: Bench) -> None:
    """Time of a training step."""
    for threads, size, steps in bench.cases():
        theirs = Theirs(size, bench.device)
        batch = make_batch(steps, bench.device)
        for precision in bench.precisions:
            ours = Ours(size, bench.device, dtype=DTYPES[precision])
            require_same_loss(ours, theirs, batch, 1e-4 if precision == "fp32" else 3e-2)
            least = 1.25 if size == "tiny" else 1.2
            bench.race(
                f"training step, {size}, T = {steps}, {precision} against fp32, {threads}",
                partial(train, ours, batch),
                partial(train, theirs, batch),
                steps,
                least=2.0 if precision == "bf16" else least,
            )


def require_same_loss(ours: Ours, theirs: Theirs, batch: Batch, tolerance: float) -> None:
    """Ends the program when the losses differ."""
    our_loss = train(ours, batch).item()
    their_loss = train(theirs, batch).item()
    if abs(our_loss - their_loss) > tolerance * abs(their_loss):
        raise SystemExit(
            f"error: the sides disagree: the loss is {our_loss:.6g} in ours and "
            f"{their_loss:.6g} frame by frame"
        )


def compiled(bench: Bench) -> None:
    """Time of a training step with torch.compile."""
    for threads, size, steps in bench.cases():
        theirs = Theirs(size, bench.device)
        batch = make_batch(steps, bench.device)
        for precision in bench.precisions:
            ours = Ours(size, bench.device, dtype=DTYPES[precision], compiled=True)
            bench.race(
                f"training step with torch.compile, {size}, T = {steps}, {precision} against fp32, "
                f"{threads}",
                partial(train, ours, batch),
                partial(train, theirs, batch),
                steps,
            )


def stream(bench: Bench) -> None:
    """Time of inference, frame by frame."""
    for threads in bench.each_threads():
        for size in bench.sizes:
            frame = make_batch(1, bench.device).frames[0]
            bench.race(
                f"streaming inference, {size}, one frame, {threads}",
                Ours(size, bench.device).stream(frame),
                Theirs(size, bench.device).stream(frame),
                1,
                least=1.25,
            )


def memory(bench: Bench) -> None:
    """Peak memory of a training step."""
    for size in bench.sizes:
        for steps in bench.frames:
            theirs = peak_mb(bench.device, "theirs", size, steps)
            for side, title, most in (
                ("ours", "peak memory of a training step", 1.0),
                ("checkpointed", "peak memory with activation checkpointing", 0.5),
            ):
                ours = peak_mb(bench.device, side, size, steps)
                bench.row(
                    f"{title}, {size}, T = {steps}",
                    f"{ours:.0f} MB",
                    f"{theirs:.0f} MB",
                    ours / theirs,
                    most=most,
                )


def peak_mb(device: torch.device, side: str, size: str, steps: int) -> float:
    """MB above what a separate process holds before the step."""
    environment = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY}
    result = subprocess.run(
        [sys.executable, __file__, "--peak", side, size, str(steps), device.type],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return json.loads(result.stdout.splitlines()[-1])


def print_peak(side_name: str, size: str, steps: str, device_type: str) -> None:
    """The process of `peak_mb`: prints the peak."""
    torch.set_num_threads(1)
    device = torch.device(device_type)
    side: Ours | Theirs
    if side_name == "theirs":
        side = Theirs(size, device)
    else:
        side = Ours(size, device, checkpointed=side_name == "checkpointed")
    batch = make_batch(int(steps), device)
    # A small step comes first, in which libraries initialize.
    train(side, make_batch(2, device, size=(96, 128)))
    side.model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(side, batch)
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    before_kb = status_kb("VmRSS")
    train(side, batch)
    # Not ru_maxrss: it starts at the memory of the parent process.
    print((status_kb("VmHWM") - before_kb) * 1024 / 1e6)


def attention(bench: Bench) -> None:
    """Time of a training step with small-object attention."""
    for threads, size, steps in bench.cases():
        batch = make_batch(steps, bench.device)
        bench.race(
            f"attention on against off, {size}, T = {steps}, {threads}",
            partial(train, Ours(size, bench.device, attention=True), batch),
            partial(train, Ours(size, bench.device), batch),
            steps,
            most=1.25,
        )


def length(bench: Bench) -> None:
    """Time per frame by T.

    Half of the frames are labelled: for odd T, batches with more and with fewer labelled frames
    than half take turns.
    """
    ours = Ours("tiny", bench.device)
    lengths = (5, 10, 20, 40)
    batches = {}
    for steps in lengths:
        firsts = (0, 1) if steps % 2 else (0,)
        batches[steps] = [make_batch(steps, bench.device, first=first) for first in firsts]

    def train_all(steps: int) -> None:
        for batch in batches[steps]:
            train(ours, batch)

    contenders = {str(steps): partial(train_all, steps) for steps in lengths}
    for threads in bench.each_threads():
        times = rounds(bench.repeats, bench.device, warm_up=1, **contenders)
        per_frame = {}
        for steps in lengths:
            frames = steps * len(batches[steps])
            per_frame[steps] = [seconds / frames for seconds in times[str(steps)]]
        for steps in lengths[1:]:
            change = median_ratio(per_frame[steps], per_frame[5])
            bench.row(
                f"a frame at T = {steps} against T = 5, tiny, {threads}",
                f"{median(per_frame[steps]) * 1e3:.0f} ms",
                f"{median(per_frame[5]) * 1e3:.0f} ms",
                change,
                target="within 10 %",
                reached=0.9 <= change <= 1.1,
            )


def floor(bench: Bench) -> None:
    """Time of a step against the time of its matrix products at the rate of a plain product.

    The products are three times those of a forward pass (neck and head on half of the frames).
    """
    steps = 10
    for threads in bench.each_threads():
        for size in bench.sizes:
            flops = forward_flops(size)
            step = partial(train, Ours(size, bench.device), make_batch(steps, bench.device))
            matmul = MatmulRate(bench.device)
            times = rounds(bench.repeats, bench.device, step=step, rate=matmul)["step"]
            seconds = median(times) / steps
            rate = median(matmul.rates[-bench.repeats :])
            least = 3 * (flops.backbone + flops.neck_and_head / 2) / rate
            products = (
                f"{flops.backbone / 1e9:.1f} + {flops.neck_and_head / 1e9:.1f} / 2 GFLOP forward, "
                f"{rate / 1e9:.0f} GFLOP/s"
            )
            bench.row(
                f"distance to the floor, {size}, T = {steps}, {threads}; {products}",
                f"{seconds * 1e3:.0f} ms/frame",
                f"floor: {least * 1e3:.0f}",
                seconds / least,
                most=1.5,
            )


class ForwardFlops(NamedTuple):
    """FLOP of a frame."""

    backbone: float
    neck_and_head: float


def forward_flops(size: str) -> ForwardFlops:
    """Counts the FLOP of a forward pass of one frame."""
    cpu = torch.device("cpu")
    model = Theirs(size, cpu).model.eval()
    frame = make_batch(1, cpu).frames[0]
    with torch.inference_mode():
        with FlopCounterMode(display=False) as backbone:
            state = model.backbone(model.padded(frame), None)
        with FlopCounterMode(display=False) as neck_and_head:
            model.yolox_head(model.fpn([hidden for hidden, _ in state[1:]]))
    return ForwardFlops(backbone.get_total_flops(), neck_and_head.get_total_flops())


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
    """Prints the table; exit code 1 if a target is not reached."""
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
    parser.add_argument("--compile", action="store_true", help="adds the rows with torch.compile")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="processes keep the memory that they free"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall time, for 1 thread on a machine with other load",
    )
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(*args.peak)
    if args.keep_memory and not keeps_memory():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    if args.cpu_time:
        Clock.now = staticmethod(time.process_time)
    bench = Bench(
        torch.device(args.device),
        args.threads,
        args.frames,
        args.sizes,
        args.precision,
        args.repeats,
    )
    bench.head()
    names = list(args.rows)
    if args.compile and "compile" not in names:
        names.append("compile")
    for name in names:
        ROWS[name](bench)
    print("", *bench.notes, sep="\n")
    sys.exit(1 if bench.missed else 0)


if __name__ == "__main__":
    main()
