"""A skipped micro-batch has no gradients; the rest of its accumulation updates as in torch."""

import sys
from pathlib import Path

import pytest
import torch
from evspan.launch.local.ranks import run_ranks
from support.skip_ranks import PATTERNS, STAGES

pytestmark = pytest.mark.slow

ROOT, RANKS = Path(__file__).parents[2], 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipped")
    path = f"PYTHONPATH={ROOT / 'tests'}"
    assert (
        run_ranks(
            ["env", path, sys.executable, "-m", "support.skip_ranks", str(folder)], RANKS, threads=1
        )
        == 0
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage is not None])
def test_an_update_uses_what_was_not_skipped(weights, stage, pattern):
    for of_rank in weights:
        for name, expected in of_rank[None, pattern].items():
            torch.testing.assert_close(
                of_rank[stage, pattern][name],
                expected,
                rtol=1e-5,
                atol=1e-6,
                msg=f"{name}, ZeRO {stage}",
            )


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage is not None])
def test_the_average_of_the_weights_is_that_of_its_definition_to_the_bit(weights, stage):
    for of_rank in weights:
        for pattern in PATTERNS:
            actual, expected = of_rank["average", stage, pattern]
            assert actual.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(actual[name], tensor), (name, pattern)
                assert not torch.equal(actual[name], of_rank[stage, pattern][name])


def test_the_patterns_differ(weights):
    first = next(iter(weights[0][None, PATTERNS[0]]))
    assert len(
        {tuple(weights[0][None, pattern][first].flatten().tolist()) for pattern in PATTERNS}
    ) == len(PATTERNS)
