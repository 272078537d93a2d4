"""What a training step asks of a GPU, counted on an emulated one, against the step's budget.

The real trainer runs with DeepSpeed as one rank of a world whose other ranks are fake. A failure
prints the responsible lines. `tests/benchmarks/step_counts.py` prints them at any time.
"""

import functools
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import pytest
from support.counted_step import StepOptions, step_counts, write_shards
from support.emulated_device import Counts, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch before 2.9")

MICRO = StepOptions(precision="bf16")
SEQUENCE = replace(MICRO, world=8, sequence=8, attention=True)
CASES = {
    "one rank": MICRO,
    "one rank, ZeRO 0, fp32": replace(MICRO, zero=0, precision="fp32"),
    "2 ranks, ZeRO 0": replace(MICRO, world=2, zero=0),
    "8 sequence ranks, attention": SEQUENCE,
    "64 ranks, 8 per sequence, attention, relay": replace(
        SEQUENCE, world=64, rank=9, exchange="relay"
    ),
    "64 ranks": replace(MICRO, world=64),
    "64 ranks, norms of a rank": replace(MICRO, world=64, batch_norm="rank"),
    "64 ranks, 8 per sequence, attention, norms of a rank": replace(
        SEQUENCE, world=64, batch_norm="rank"
    ),
}
LABELS = 4096  # bytes: boxes, counts and masks of a small batch


def cross_product() -> list[StepOptions]:
    """Every layout, model and engine that the budget holds for."""
    cases = []
    for world, attention, zero in product((1, 2, 8, 64), (False, True), (0, 1)):
        base = replace(MICRO, world=world, attention=attention, zero=zero)
        cases.append(base)
        if world >= 8:
            cases += [replace(base, sequence=8, exchange=e) for e in ("transpose", "relay")]
            cases.append(replace(base, sequence=8, dws_conv=True, rank=3))
    return cases


@dataclass(frozen=True)
class Budget:
    """The largest counts of a step."""

    operators: int
    waits: int
    collectives: int
    list_gathers: int


def budget(options: StepOptions) -> Budget:
    """Of a step with these options."""
    # Statistics of the global batch take two collectives per serial level of norms.
    collectives = 24 if options.batch_norm == "rank" else 90
    return Budget(operators=4500, waits=45, collectives=collectives, list_gathers=0)


@pytest.fixture(scope="module")
def counts_of(tmp_path_factory):
    """options -> counts of their step, each counted once."""
    shards = write_shards(tmp_path_factory.mktemp("counted") / "shards", MICRO)

    @functools.cache
    def count(options: StepOptions) -> Counts:
        return step_counts(options, shards, tmp_path_factory.mktemp("run"))

    return count


def listed(counter: Counter[str], rows: int = 20) -> str:
    return "".join(f"\n{n:6,}  {what}" for what, n in counter.most_common(rows))


def check(counts: Counts, limits: Budget) -> None:
    """Raises where a count is above its limit."""
    waits = counts.waits.total()
    assert waits <= limits.waits, f"{waits} host waits:{listed(counts.waits)}"
    gathers = counts.list_gathers()
    number = gathers.total()
    assert number <= limits.list_gathers, f"all-gathers that copy per rank:{listed(gathers)}"
    collectives = Counter(f"{c.name} {c.line}" for c in counts.collectives if not c.is_message)
    number = collectives.total()
    assert number <= limits.collectives, f"{number} collectives:{listed(collectives)}"
    operators = counts.operators.total()
    assert operators <= limits.operators, f"{operators} operators:{listed(counts.operator_lines)}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_keeps_to_its_budget(counts_of, case):
    check(counts_of(CASES[case]), budget(CASES[case]))


@pytest.mark.soak
@pytest.mark.parametrize("options", cross_product(), ids=str)
def test_every_layout_keeps_to_the_budget(counts_of, options):
    check(counts_of(options), budget(options))
