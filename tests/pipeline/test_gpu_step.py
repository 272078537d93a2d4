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
BASE = replace(MICRO, size="base", values=False)
CASES = {
    "one rank": MICRO,
    "one rank, ZeRO 0, fp32": replace(MICRO, zero=0, precision="fp32"),
    "2 ranks, ZeRO 0": replace(MICRO, world=2, zero=0),
    "8 sequence ranks, attention": SEQUENCE,
    "64 ranks, 8 per sequence, attention, relay": replace(
        SEQUENCE, world=64, rank=9, exchange="relay"
    ),
    "64 ranks, 8 per sequence, attention, norms of a rank": replace(
        SEQUENCE, world=64, batch_norm="rank"
    ),
    "base, one rank": BASE,
    "base, one rank, plain engine": replace(BASE, engine="plain", zero=0),
    "base, 64 ranks": replace(BASE, world=64),
}
SMALL_COPIES = 2**16  # bytes; the driver takes so little from pageable memory without a wait


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
    """The largest counts of a step. The host never waits, and nothing is gathered into lists."""

    operators: int
    collectives: int


def budget(options: StepOptions) -> Budget:
    """Of a step with these options: the values reached, and a few percent."""
    if options.world == 1:
        operators = 1900
        collectives = 2
    else:
        operators = 2250
        collectives = 53
    if options.size == "base":
        operators += 300
        collectives += 14  # the neck has more norms
    if options.engine == "plain":
        operators -= 780
    if options.attention:
        operators += 480
    sends_messages = options.dws_conv or options.exchange == "relay"
    if options.sequence > 1 and sends_messages:
        operators += 1100
    elif options.sequence > 1:
        collectives += 16
    if options.batch_norm == "rank":
        collectives = 24  # those of the whole batch take two per serial level of norms
    return Budget(operators, collectives)


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
    waits = counts.waits
    assert not waits, f"{waits.total()} host waits:{listed(waits)}"
    gathers = counts.list_gathers()
    assert not gathers, f"all-gathers into lists, which copy per rank:{listed(gathers)}"
    pageable = [c for c in counts.copies if c.direction == "H2D" and not c.pinned]
    num_bytes = sum(c.num_bytes for c in pageable)
    assert num_bytes < SMALL_COPIES, f"{num_bytes} bytes from pageable memory: {pageable}"
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
