"""Models the time of a training step on an H100 from what the step asks of the device.

    .venv/bin/python tests/benchmarks/step_model.py [--cases NAME...] [--json FILE]

Counts are exact: the real trainer with DeepSpeed (ZeRO-1, bfloat16, `base`, 360 x 640) runs on the
emulated GPU (`tests/support/emulated_device.py`) without values, as rank 0 of its world. BEFORE has
the counts of commit 4b37d94, made with the same tool. Times are modelled, and no GPU was measured:

- The host queues an operator in 6 us (torch in eager mode with autograd; an assumption).
- A wait of the host leaves the device idle for 30 us: the result travels back, and the queue fills.
- Matrix products, convolutions, attention and LSTMs run at 35 % of the dense peak of 989 TFLOP/s
  (channels are 64 to 512), or at the memory's speed if that is slower. All other operators run at
  the memory's speed, 80 % of 3.35 TB/s; every operator reads its inputs and writes its outputs
  there (nothing stays in the L2 cache), and an operator takes at least 2 us.
- Pageable memory is copied to the device at 8 GB/s while the host waits. Pinned memory is copied at
  25 GB/s while the step runs, and counts only where that takes longer than the step.
- Collectives do not overlap with computing. They have the latencies and rates of exchange_model.py
  (NVLink within a node of 8); an all-reduce sends 2 (n-1)/n of its bytes, an all-to-all (n-1)/n.
- Host and device work at the same time: a step takes as long as the slower one, plus waits and
  blocking copies. The loader feeds one step while another is computed.

Utilisation (MFU) is the FLOP of the matrix products over the step's time and the dense peak.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from exchange_model import INFINIBAND, NODE, NVLINK, PEAK
from support.counted_step import StepOptions, step_counts, write_shards
from support.emulated_device import Counts

HOST_PER_OPERATOR = 6e-6  # seconds
WAIT = 30e-6
MATRIX_FRACTION = 0.35  # of the peak
MEMORY = 0.8 * 3.35e12  # bytes per second
SHORTEST_KERNEL = 2e-6
PAGEABLE = 8e9  # bytes per second
PINNED = 25e9


@dataclass(frozen=True)
class CollectiveSum:
    """The collectives of one kind: their number, and the bytes of this rank's tensors."""

    number: int
    num_bytes: int


@dataclass(frozen=True)
class StepCounts:
    """Counts of one rank's step.

    Attributes:
        matrix_flop, matrix_bytes: of matrix products, convolutions, attention and LSTMs.
        other_bytes: that all other operators read and write.
        pageable, pinned: bytes to the device.
        collectives: by name of torch's operator.
    """

    operators: int
    waits: int
    matrix_flop: int
    matrix_bytes: int
    other_bytes: int
    pageable: int
    pinned: int
    collectives: Mapping[str, CollectiveSum] = field(default_factory=dict)

    @property
    def num_collectives(self) -> int:
        """All of them, without messages between two ranks."""
        return sum(c.number for name, c in self.collectives.items() if name not in MESSAGES)


MESSAGES = ("send", "recv_")


@dataclass(frozen=True)
class Case:
    """A step whose time is modelled. before: of commit 4b37d94."""

    title: str
    options: StepOptions
    before: StepCounts

    @property
    def frames(self) -> int:
        """Of one rank, over its lanes."""
        return self.options.lanes * self.options.frames


FULL = StepOptions(
    size="base", precision="bf16", full_frames=True, values=False, lanes=24, frames=5
)
# The counts before: commit 4b37d94.
CASES = {
    "1 GPU": Case(
        "base bf16, B = 24, T = 5, 1 GPU",
        FULL,
        StepCounts(
            operators=9_363,
            waits=58,
            matrix_flop=9_457_597_765_440,
            matrix_bytes=69_429_778_858,
            other_bytes=183_730_252_089,
            pageable=552_964_888,
            pinned=0,
            collectives={
                "allreduce_": CollectiveSum(4, 37_073_721),
            },
        ),
    ),
    "8 GPUs": Case(
        "base bf16, B = 24, T = 5, 8 GPUs (3 lanes each)",
        replace(FULL, world=8, lanes=3),
        StepCounts(
            operators=6_178,
            waits=58,
            matrix_flop=1_186_190_804_160,
            matrix_bytes=8_789_774_626,
            other_bytes=23_530_513_549,
            pageable=69_120_794,
            pinned=0,
            collectives={
                "allgather_": CollectiveSum(31, 58_556),
                "allreduce_": CollectiveSum(37, 37_132_117),
                "_allgather_base_": CollectiveSum(2, 4_634_216),
            },
        ),
    ),
    "8 sequence ranks": Case(
        "base bf16, B = 4, T = 40, 8 sequence ranks (5 frames each)",
        replace(FULL, world=8, sequence=8, lanes=4),
        StepCounts(
            operators=6_191,
            waits=58,
            matrix_flop=1_453_873_067_520,
            matrix_bytes=11_075_220_834,
            other_bytes=25_775_853_325,
            pageable=92_160_736,
            pinned=0,
            collectives={
                "alltoall_base_": CollectiveSum(16, 294_912_000),
                "allgather_": CollectiveSum(31, 58_556),
                "allreduce_": CollectiveSum(37, 37_132_117),
                "_allgather_base_": CollectiveSum(2, 4_634_216),
            },
        ),
    ),
    "64 ranks": Case(
        "base bf16, B = 192, T = 5, 64 ranks (3 lanes each)",
        replace(FULL, world=64, lanes=3),
        StepCounts(
            operators=7_130,
            waits=58,
            matrix_flop=1_186_190_804_160,
            matrix_bytes=8_789_774_626,
            other_bytes=23_278_361_477,
            pageable=69_120_794,
            pinned=0,
            collectives={
                "allgather_": CollectiveSum(31, 58_556),
                "allreduce_": CollectiveSum(37, 37_132_117),
                "_allgather_base_": CollectiveSum(2, 579_280),
            },
        ),
    ),
    "64 ranks, sequence": Case(
        "base bf16 with attention, B = 32, T = 40, 64 ranks, 8 per sequence",
        replace(FULL, world=64, sequence=8, lanes=4, attention=True),
        StepCounts(
            operators=7_552,
            waits=66,
            matrix_flop=1_666_105_176_576,
            matrix_bytes=12_088_512_392,
            other_bytes=34_918_583_149,
            pageable=92_161_012,
            pinned=0,
            collectives={
                "alltoall_base_": CollectiveSum(20, 342_097_920),
                "allgather_": CollectiveSum(32, 58_576),
                "allreduce_": CollectiveSum(37, 39_562_103),
                "_allgather_base_": CollectiveSum(2, 617_248),
            },
        ),
    ),
}


@dataclass(frozen=True)
class Loader:
    """threads: per rank. frames_per_s: of one thread."""

    threads: int
    frames_per_s: float

    def seconds(self, frames: int) -> float:
        """To read this number of frames."""
        return frames / (self.threads * self.frames_per_s)


# loader_speed.py, random chunks of 24 lanes, all augmentations, CPU time of 2 cores of an AMD EPYC:
# dense frames at commit 4b37d94 with the two threads that were the default; encoded frames now.
LOADER_BEFORE = Loader(threads=2, frames_per_s=303)
LOADER_AFTER = Loader(threads=1, frames_per_s=6800)


@dataclass(frozen=True)
class StepTime:
    """Modelled seconds of a step, by part."""

    host: float
    matrix: float
    memory: float
    collectives: float
    waits: float
    blocking_copies: float
    copies: float
    loader: float
    flop: int

    @property
    def device(self) -> float:
        """Time in which the device is busy."""
        return self.matrix + self.memory + self.collectives

    @property
    def step(self) -> float:
        """If the loader keeps up."""
        work = max(self.host, self.device) + self.waits + self.blocking_copies
        return max(work, self.copies)

    @property
    def utilisation(self) -> float:
        """Of the dense peak, if the loader keeps up."""
        return self.flop / self.step / PEAK

    @property
    def utilisation_with_loader(self) -> float:
        """Of the dense peak."""
        return self.flop / max(self.step, self.loader) / PEAK


def collective_seconds(name: str, total: CollectiveSum, options: StepOptions) -> float:
    """Of all collectives of a name: over NVLink within a node, else over InfiniBand.

    All-to-alls and messages stay among the ranks of a sequence, which share a node.
    """
    of_sequence = name in MESSAGES or name == "alltoall_base_"
    ranks = options.sequence if of_sequence else options.world
    if ranks == 1:
        return 0.0
    network = NVLINK if ranks <= NODE else INFINIBAND
    if name in MESSAGES:
        return network.seconds(total.num_bytes, total.number, 1)
    peers = ranks - 1
    sent_per_byte = {"allreduce_": 2 * peers / ranks, "alltoall_base_": peers / ranks}
    sent = sent_per_byte.get(name, peers) * total.num_bytes
    return network.seconds(sent, total.number, ranks)


def model(counts: StepCounts, case: Case, loader: Loader) -> StepTime:
    """The time of a step of the case with these counts."""
    matrix = max(
        counts.matrix_flop / (MATRIX_FRACTION * PEAK),
        counts.matrix_bytes / MEMORY,
    )
    collectives = 0.0
    for name, total in counts.collectives.items():
        collectives += collective_seconds(name, total, case.options)
    busy = max(matrix + counts.other_bytes / MEMORY, counts.operators * SHORTEST_KERNEL)
    return StepTime(
        host=counts.operators * HOST_PER_OPERATOR,
        matrix=matrix,
        memory=busy - matrix,
        collectives=collectives,
        waits=counts.waits * WAIT,
        blocking_copies=counts.pageable / PAGEABLE,
        copies=counts.pinned / PINNED,
        loader=loader.seconds(case.frames),
        flop=counts.matrix_flop,
    )


def summed(counts: Counts) -> StepCounts:
    """What the model needs of a step's counts."""
    matrix_bytes = sum(counts.num_bytes[name] for name in counts.flop)
    collectives: dict[str, CollectiveSum] = {}
    for c in counts.collectives:
        name = c.name.removeprefix("c10d::")
        before = collectives.get(name, CollectiveSum(0, 0))
        collectives[name] = CollectiveSum(before.number + 1, before.num_bytes + c.num_bytes)
    return StepCounts(
        operators=counts.operators.total(),
        waits=counts.waits.total(),
        matrix_flop=counts.flop.total(),
        matrix_bytes=matrix_bytes,
        other_bytes=counts.num_bytes.total() - matrix_bytes,
        pageable=counts.copied_bytes("H2D", pinned=False),
        pinned=counts.copied_bytes("H2D", pinned=True),
        collectives=collectives,
    )


def count(case: Case, shards: Path) -> StepCounts:
    """The counts of a case's step now."""
    with tempfile.TemporaryDirectory() as run_dir:
        return summed(step_counts(case.options, shards, Path(run_dir)))


def print_case(case: Case, now: StepCounts) -> None:
    """Prints counts and modelled times before and after."""
    before = model(case.before, case, LOADER_BEFORE)
    after = model(now, case, LOADER_AFTER)
    print(f"\n{case.title}\n\n| | before | after |\n|---|---|---|")
    rows: list[tuple[str, float, float, str]] = [
        ("operators", case.before.operators, now.operators, ",.0f"),
        ("host waits", case.before.waits, now.waits, ".0f"),
        ("collectives", case.before.num_collectives, now.num_collectives, ".0f"),
        ("to the device, pageable (MB)", case.before.pageable / 1e6, now.pageable / 1e6, ".2f"),
        ("to the device, pinned (MB)", case.before.pinned / 1e6, now.pinned / 1e6, ".2f"),
        ("matrix products (GFLOP)", case.before.matrix_flop / 1e9, now.matrix_flop / 1e9, ",.0f"),
        (
            "memory traffic of the others (GB)",
            case.before.other_bytes / 1e9,
            now.other_bytes / 1e9,
            ".1f",
        ),
    ]
    for part in ("host", "matrix", "memory", "collectives", "waits", "blocking_copies", "copies"):
        name = f"{part.replace('_', ' ')} (ms)"
        rows.append((name, getattr(before, part) * 1e3, getattr(after, part) * 1e3, ".1f"))
    rows += [
        ("loader (ms)", before.loader * 1e3, after.loader * 1e3, ".1f"),
        ("step (ms)", before.step * 1e3, after.step * 1e3, ".1f"),
        ("MFU", before.utilisation, after.utilisation, ".1%"),
        (
            "MFU with the loader",
            before.utilisation_with_loader,
            after.utilisation_with_loader,
            ".1%",
        ),
    ]
    for name, old, new, form in rows:
        print(f"| {name} | {old:{form}} | {new:{form}} |")


def main() -> None:
    """Counts the cases and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    counted = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder, "shards"), FULL)
        for name in args.cases:
            now = count(CASES[name], shards)
            counted[name] = asdict(now)
            print_case(CASES[name], now)
    if args.json:
        args.json.write_text(json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main()
