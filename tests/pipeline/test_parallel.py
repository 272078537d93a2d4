"""Reductions over real ranks (gloo) against one rank."""

import functools
import operator
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import ParallelConfig
from evspan.pipeline.model.norm import BatchNorm2d, RankReductions, global_batch_norms
from evspan.pipeline.parallel.reductions import (
    add_over_ranks,
    broadcast_object,
    deal,
    gather_objects,
)
from evspan.pipeline.parallel.world import open_world

RANKS = 3
SHARES = (4, 0, 3)  # samples per rank: one has none, and still takes part


def batch():
    x = torch.randn(
        sum(SHARES), 5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return x * 3 + 1


def normalised(x, norm, weight):
    """A loss that weighs every element differently, so that a wrong gradient shows."""
    y = norm(x)
    return (y.pow(2) * weight[..., : y.shape[-1]]).sum()


def rank_main(rank, folder):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["EVSPAN_TEST_PORT"])
    with open_world(ParallelConfig(ranks=RANKS, timeout_s=60)):
        own = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
        x = batch()[own].requires_grad_()
        norm = BatchNorm2d(5).double()
        global_batch_norms(norm, RankReductions(add_over_ranks))
        loss = normalised(
            x, norm, torch.arange(sum(SHARES) * 60.0, dtype=torch.float64).view(-1, 5, 4, 3)[own]
        )
        loss.backward()
        torch.save(
            {
                "loss": loss.detach(),
                "x": x.grad,
                "weight": norm.weight.grad,
                "mean": norm.running_mean,
                "var": norm.running_var,
                "gathered": gather_objects(rank * 10),
                "first": broadcast_object(f"from {rank}"),
            },
            f"{folder}/{rank}.pt",
        )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_global_batch_norm_and_agreements(tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("EVSPAN_TEST_PORT", str(s.getsockname()[1]))
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=RANKS)
    results = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(RANKS)]

    x, norm = batch().requires_grad_(), torch.nn.BatchNorm2d(5, dtype=torch.float64)
    norm.eps = BatchNorm2d(5).eps
    loss = normalised(
        x, norm, torch.arange(sum(SHARES) * 60.0, dtype=torch.float64).view(-1, 5, 4, 3)
    )
    loss.backward()
    torch.testing.assert_close(sum(t["loss"] for t in results), loss.detach())
    torch.testing.assert_close(torch.cat([t["x"] for t in results]), x.grad)
    torch.testing.assert_close(sum(t["weight"] for t in results), norm.weight.grad)
    for t in results:
        torch.testing.assert_close(t["mean"], norm.running_mean)
        torch.testing.assert_close(t["var"], norm.running_var)
        assert t["gathered"] == [0, 10, 20]
        assert t["first"] == "from 0"


def test_deal_gives_every_item_once_and_balances():
    weight = [50, 10, 10, 10, 20, 30]
    fractions = [deal(list("abcdef"), r, 3, weight=weight) for r in range(3)]
    assert sorted(functools.reduce(operator.iadd, fractions, [])) == list("abcdef")
    assert max(sum(weight["abcdef".index(i)] for i in fraction) for fraction in fractions) == 50


def test_another_number_of_processes_than_configured_is_told(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match="parallel.ranks is 2 but 1 process"),
        open_world(ParallelConfig(ranks=2)),
    ):
        pass
    assert not dist.is_initialized()
