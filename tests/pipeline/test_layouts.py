"""Layout invariance: training over data x sequence ranks, under every ZeRO stage and exchange, is training on one rank.

The reference is `plain_engine` on one rank, in float64: what the numbers should be. Where ranks compute in float64 too, their
losses and gradients must be within 1e-5 of it. Under DeepSpeed they compute in float32, in which one rank's own are some 1e-5
from the reference: ranks may be no more than NOISE times as far from it as one rank of plain torch is, and their losses no more
than 1e-5 of the total where that rank's are nearer than that.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evspan.launch.local.ranks import run_ranks
from support.layout_ranks import Case
from support.small_shards import write_small_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # of the first one, which starts all ranks, on a busy machine
ROOT = Path(__file__).parents[2]
CLOSE, NOISE = 1e-5, 3
# bfloat16 keeps 8 bits, and rounding even changes which cells answer for a box: 3 % of the loss, and gradients together no more
# than so many times as far from the reference as those of one rank in bfloat16.
BF16_NOISE, BF16_LOSS = 2, 0.03

SHARDS = {  # recordings' frames; one frame of how many is labelled
    "dense": ([23, 12, 9], 2),
    "sparse": (
        [13, 9, 2],
        9,
    ),  # fewer than lanes, one shorter than a chunk; steps in which no rank has a labelled frame
    "bare": ([11, 6, 100], 100),  # a labelled frame, which no step reaches
}
dense, sparse, bare = (Case(shards=name) for name in SHARDS)

short = replace(dense, steps=3)  # two updates; the soak test has more
QUICK = [
    replace(
        short,
        ranks=2,
        sequence=2,
        exchange="transpose",
        engine="exact",
        attention=True,
        encoded=True,  # against dense frames on one rank
    ),
    replace(
        short, ranks=2, sequence=2, exchange="relay", engine="exact", attention=True, dws_conv=True
    ),
    replace(short, ranks=2, sequence=1, stage=2, gradient_accumulation_steps=2, encoded=True),
    replace(short, ranks=2, sequence=2, stage=1, exchange="relay"),
    replace(
        short, ranks=2, sequence=2, stage=3, exchange="relay", attention=True, dws_conv=True
    ),  # a module called many times
    replace(sparse, ranks=2, sequence=2, stage=0, attention=True, sampling="stream"),
    replace(bare, ranks=2, sequence=2, stage=3, attention=True, steps=2, sampling="stream"),
    replace(short, ranks=2, sequence=2, stage=2, attention=True, precision="bf16", steps=3),
    replace(short, ranks=4, sequence=2, stage=1, attention=True),
    replace(
        short, ranks=4, sequence=4, stage=3, attention=True
    ),  # two ranks never have a labelled frame
]
# The bottom, of which no gradient flows back; one that gradients pass through; some norms of those
# that run together; and other learning rates.
BOTTOM = {
    "freeze": ("backbone.stages.[01].*", "fpn.C3_p4.*", "yolox_head.stems.1.*"),
    "multipliers": (("backbone.*", 0.1), ("backbone.stages.3.*", 3.0)),
}
BACKBONE = {"freeze": ("backbone.*", "yolox_head.cls_preds.*"), "multipliers": (("fpn.*", 0.2),)}
FROZEN = [
    replace(short, ranks=2, sequence=2, engine="exact", attention=True, **BOTTOM),
    replace(short, ranks=2, sequence=2, stage=1, exchange="relay", **BOTTOM),
    replace(short, ranks=2, sequence=2, stage=3, exchange="relay", dws_conv=True, **BACKBONE),
    replace(sparse, ranks=2, sequence=2, stage=0, attention=True, sampling="stream", **BOTTOM),
    replace(short, ranks=2, stage=2, gradient_accumulation_steps=2, **BOTTOM),
    replace(short, ranks=2, stage=2, precision="bf16", steps=3, **BOTTOM),
]
KNOBS = replace(
    dense,
    ranks=2,
    sequence=2,
    stage=3,
    attention=True,
    precision="bf16",
    gradient_accumulation_steps=2,
    steps=2,
    save_memory=True,
)

WORLDS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4)]
EXCHANGES = [("transpose", False), ("relay", False), ("relay", True)]  # and dws_conv
ENGINES = [("exact", 0), *(("deepspeed", stage) for stage in range(4))]


def all_layouts():
    for (ranks, sequence), (exchange, dws_conv), attention in itertools.product(
        WORLDS, EXCHANGES, (False, True)
    ):
        for engine, stage in ENGINES:
            # Half of them accumulate, spread over all the others.
            accumulation = 1 + (ranks + sequence + stage + attention + dws_conv) % 2
            yield replace(
                dense,
                ranks=ranks,
                sequence=sequence,
                exchange=exchange,
                dws_conv=dws_conv,
                attention=attention,
                engine=engine,
                stage=stage,
                gradient_accumulation_steps=accumulation,
                **size(ranks),
            )
        yield replace(
            dense,
            ranks=ranks,
            sequence=sequence,
            exchange=exchange,
            dws_conv=dws_conv,
            attention=attention,
            stage=1 + sequence % 2,
            precision="bf16",
            steps=3,
            **size(ranks),
        )


def size(ranks):
    return {"lanes": 3, "frames": 6} if ranks == 3 else {}


def told_by_ranks(cases, folder):
    """case -> the results of its ranks; one launch per world. With every case, those that it is compared with."""
    expected = dict.fromkeys(
        [*cases, *(case.alone("exact") for case in cases), *filter(None, map(one_rank, cases))]
    )
    shards = {
        name: write_small_shards(
            folder / name, {"train": counts}, every=every, regions=name == "sparse"
        )
        for name, (counts, every) in SHARDS.items()
    }
    out = {}
    for ranks in sorted({case.ranks for case in expected}):
        here = folder / f"{ranks}-ranks"
        here.mkdir()
        own = [case for case in expected if case.ranks == ranks]
        torch.save([(case, str(shards[case.shards])) for case in own], here / "cases.pt")
        path = f"PYTHONPATH={ROOT / 'tests'}"
        assert (
            run_ranks(
                ["env", path, sys.executable, "-m", "support.layout_ranks", str(here)],
                ranks,
                threads=1,
            )
            == 0
        )
        results = [torch.load(here / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
        out |= {case: [of_rank[case] for of_rank in results] for case in own}
    return out


def one_rank(case):
    """The same in the case's precision, which shows the effect of rounding alone; None: that of float64."""
    if case.engine == "exact":
        return None
    if case.precision == "fp32":
        return case.alone("plain", steps=case.steps)
    return case.alone("deepspeed", steps=1, precision=case.precision, stage=1)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return told_by_ranks([*QUICK, *FROZEN, KNOBS], tmp_path_factory.mktemp("layouts"))


def name(case):
    parts = [
        f"{case.ranks // case.sequence}x{case.sequence}",
        case.exchange,
        f"{case.engine}{case.stage}",
        case.precision,
        "attention" * case.attention,
        "dws" * case.dws_conv,
        "gradient_accumulation_steps" * (case.gradient_accumulation_steps > 1),
        case.shards,
        "frozen" * bool(case.freeze),
    ]
    return "-".join(filter(None, parts))


@pytest.mark.parametrize("case", [*QUICK, *FROZEN], ids=name)
def test_training_is_that_of_one_rank(quick, case):
    assert_as_one_rank(case, quick)


def test_ranks_without_a_labelled_frame_took_part(quick):
    results = [sum(rank["labelled"]) for rank in quick[QUICK[-1]]]
    assert results[0] == results[2] == 0 < min(results[1], results[3])
    sparse_steps = torch.tensor(
        [rank["labelled"] for rank in quick[next(c for c in QUICK if c.shards == "sparse")]]
    ).sum(0)
    assert (sparse_steps == 0).any()
    assert (sparse_steps > 0).any()
    bare_case = next(c for c in QUICK if c.shards == "bare")
    for rank in quick[bare_case]:
        assert not rank["losses"].any()
        assert not any(g.any() for g in rank["gradients"].values())


def test_all_memory_options_together(quick):
    """ZeRO-3 with parameters and optimizer in CPU memory, bf16, activation checkpointing, few frames a call, accumulation."""
    assert_as_one_rank(KNOBS, quick)


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_every_layout(tmp_path):
    cases = list(all_layouts())
    result, failed = told_by_ranks(cases, tmp_path), []
    for case in cases:
        try:
            assert_as_one_rank(case, result)
        except AssertionError as error:
            failed.append(f"{name(case)}: {str(error).splitlines()[0]}")
    print(f"{len(cases)} layouts, {len(failed)} of them not as one rank")
    assert not failed, "\n".join(failed)


def assert_as_one_rank(case, result):
    ranks, (exact,), first = result[case], result[case.alone("exact")], result[case][0]
    for rank in ranks:
        assert rank["skipped"] == 0
        assert torch.equal(rank["losses"], first["losses"])
        assert all(torch.equal(rank["gradients"][k], g) for k, g in first["gradients"].items())
    assert first["gradients"].keys() == exact["gradients"].keys()
    full, alone = case.precision == "fp32", one_rank(case)
    loss_error, loss_bound = largest_loss_error(first, exact), CLOSE if full else BF16_LOSS
    error_of, bound = largest_error if full else distance, CLOSE
    if alone:
        bound = (NOISE if full else BF16_NOISE) * max(error_of(result[alone][0], exact), 1e-6)
    if alone and full:
        loss_bound = max(CLOSE, NOISE * largest_loss_error(result[alone][0], exact))
    assert loss_error < loss_bound, f"losses differ by {loss_error:.1e}, more than {loss_bound:.1e}"
    assert not full or torch.equal(
        first["losses"][:, -1], exact["losses"][: len(first["losses"]), -1]
    )  # positives
    error = error_of(first, exact)
    assert error <= bound, f"gradients differ by {error:.1e}, more than {bound:.1e}"


def largest_loss_error(result, exact):
    """Of any step and part of the loss, of the step's total."""
    expected = exact["losses"][: len(result["losses"])]
    return float(
        ((result["losses"] - expected)[:, :4].abs() / expected[:, :1].clamp(min=1e-3)).max()
    )


def largest_error(result, exact):
    """The largest of any parameter, of that parameter's largest gradient; below 1e-4 of all parameters' largest they are rounding
    of what is zero (a bias before a norm)."""
    expected = exact["gradients"]
    floor = 1e-4 * max(float(w.abs().max()) for w in expected.values()) or 1.0
    return max(
        float((result["gradients"][k].double() - w).abs().max()) / max(float(w.abs().max()), floor)
        for k, w in expected.items()
    )


def distance(result, exact):
    """Of all gradients together, of their length."""
    expected = torch.cat([g.flatten() for g in exact["gradients"].values()])
    return float(
        (
            torch.cat([result["gradients"][k].flatten() for k in exact["gradients"]]) - expected
        ).norm()
        / expected.norm()
    )
