"""Reductions over real ranks (gloo) against one rank."""

import functools
import operator
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from evspan.conf.errors import ConfigError
from evspan.conf.schema.layout import BatchNormRanks
from evspan.conf.schema.training import DeviceKind, ParallelConfig
from evspan.pipeline.data.loader import default_workers
from evspan.pipeline.engine.batch_norm import batch_norm_reductions
from evspan.pipeline.model.norm import (
    BatchNorm2d,
    RankReductions,
    batch_norms,
    global_batch_norms,
    shared_norm_work,
)
from evspan.pipeline.parallel import world as world_module
from evspan.pipeline.parallel.mesh import open_mesh
from evspan.pipeline.parallel.rank_env import RankInfo
from evspan.pipeline.parallel.reductions import (
    add_over_ranks,
    broadcast_json,
    deal,
    gather_json,
    gather_over_ranks,
)
from evspan.pipeline.parallel.world import cores_of_rank, open_world
from support.free_port import reserved_port

RANKS = 4
SHARES = (4, 0, 3, 2)  # samples per rank: one has none, and still takes part
OF_SEQUENCE = 2  # ranks per sequence, the first two and the last two
SIZES = ((5, 4, 3), (3, 2, 2))  # channels, height, width of two norms that run together
TOGETHER = {  # the ranks whose samples are normalised together
    BatchNormRanks.world: [range(4)],
    BatchNormRanks.sequence: [range(2), range(2, 4)],
    BatchNormRanks.rank: [range(i, i + 1) for i in range(4)],
}


def batch():
    x = torch.randn(
        sum(SHARES), 5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return x * 3 + 1


def normalised(x, norm, weight):
    """A loss that weighs every element differently, so that a wrong gradient shows."""
    y = norm(x)
    return (y.pow(2) * weight[..., : y.shape[-1]]).sum()


def samples_of(ranks):
    return slice(sum(SHARES[: ranks.start]), sum(SHARES[: ranks.stop]))


def maps_and_weights():
    """Of both norms (N, C, h, w), and weights of the outputs in the loss; far from zero."""
    g = torch.Generator().manual_seed(3)
    maps = []
    weights = []
    for size in SIZES:
        shape = (sum(SHARES), *size)
        maps.append(torch.randn(shape, generator=g, dtype=torch.float64) * 3 + 1000)
        weights.append(torch.randn(shape, generator=g, dtype=torch.float64))
    return maps, weights


def two_norms(kind=BatchNorm2d):
    norms = torch.nn.ModuleList(kind(size[0]).double() for size in SIZES)
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(5))
    return norms


def normalised_together(kind, mesh, rank):
    """Outputs, gradients and running statistics of two norms that run together, twice."""
    norms = two_norms()
    global_batch_norms(norms, batch_norm_reductions(kind, mesh))
    maps, weights = maps_and_weights()
    own = samples_of(range(rank, rank + 1))
    xs = [x[own].requires_grad_() for x in maps]
    for _ in range(2):
        norms.zero_grad()
        for x in xs:
            x.grad = None
        with shared_norm_work([*norms], num_samples=SHARES[rank]):
            ys = batch_norms([*norms], xs)
        sum((y * w[own]).sum() for y, w in zip(ys, weights, strict=True)).backward()
    return {
        "y": [y.detach() for y in ys],
        "x": [x.grad for x in xs],
        "parameters": [p.grad for p in norms.parameters()],
        "buffers": list(norms.buffers()),
    }


def rank_main(rank, folder):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["EVSPAN_TEST_PORT"])
    with open_world(ParallelConfig(ranks=RANKS, timeout_s=60)) as world:
        mesh = open_mesh(world, sequence=OF_SEQUENCE, timeout_s=60)
        again = open_mesh(world, sequence=OF_SEQUENCE, timeout_s=60)
        assert again.group is mesh.group and again.ranks == mesh.ranks  # no group is left behind
        together = {kind.name: normalised_together(kind, mesh, rank) for kind in TOGETHER}
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
                "together": together,
                "gathered": gather_json(rank * 10),
                "rows": gather_over_ranks(torch.tensor([rank, -rank])),
                "first": broadcast_json(f"from {rank}"),
            },
            f"{folder}/{rank}.pt",
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    with reserved_port() as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVSPAN_TEST_PORT", str(port))
        mp.spawn(rank_main, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(RANKS)]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", TOGETHER)
def test_samples_of_these_ranks_are_normalised_together(results, kind):
    """Against torch's BatchNorm2d on the samples of every group, one group after the other."""
    ranks = [rank["together"][kind.name] for rank in results]
    maps, weights = maps_and_weights()
    for i in range(len(SIZES)):
        gradients = torch.zeros(2, SIZES[i][0], dtype=torch.float64)
        for group in TOGETHER[kind]:
            own = samples_of(group)
            norm = two_norms(torch.nn.BatchNorm2d)[i]
            x = maps[i][own].requires_grad_()
            if len(x):
                y = norm(x)
                (y * weights[i][own]).sum().backward()
                actual = torch.cat([ranks[rank]["y"][i] for rank in group])
                torch.testing.assert_close(actual, y.detach())
                actual = torch.cat([ranks[rank]["x"][i] for rank in group])
                torch.testing.assert_close(actual, x.grad)
                gradients += torch.stack((norm.weight.grad, norm.bias.grad))
        over_ranks = [sum(rank["parameters"][2 * i + k] for rank in ranks) for k in range(2)]
        torch.testing.assert_close(torch.stack(over_ranks), gradients)
        # The running statistics are those of the whole batch, on every rank.
        whole = two_norms(torch.nn.BatchNorm2d)[i]
        for _ in range(2):
            whole(maps[i])
        for rank in ranks:
            for actual, expected in zip(
                rank["buffers"][3 * i : 3 * i + 3], whole.buffers(), strict=True
            ):
                torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_global_batch_norm_and_agreements(results):
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
        assert t["gathered"] == [0, 10, 20, 30]
        assert t["rows"].tolist() == [[rank, -rank] for rank in range(RANKS)]
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


STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TORCHRUN_8 = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "mask", "cores"),
    [
        (STEP | {"SLURM_CPUS_PER_TASK": "12"}, 12, 12),  # bound to its cores
        (STEP | {"SLURM_CPUS_PER_TASK": "12"}, 96, 12),  # not bound
        (STEP | {"SLURM_CPUS_PER_TASK": "12"}, 48, 12),  # bound to its socket
        (STEP | {"SLURM_CPUS_PER_TASK": "12"}, 1, 1),  # the job's variable, srun has one core
        (STEP | {"SLURM_CPUS_PER_TASK": ""}, 96, 12),
        (STEP, 96, 12),
        (STEP, 1, 1),
        (TORCHRUN_8, 96, 12),
        (STEP | TORCHRUN_8 | {"SLURM_CPUS_PER_TASK": "96"}, 96, 12),  # torchrun in a step
        ({"SLURM_CPUS_PER_TASK": "96"}, 96, 12),  # a batch script
    ],
)
def test_the_cores_of_a_rank(environment, mask, cores):
    assert cores_of_rank(environment, 8, mask) == cores


def test_a_rank_of_srun_and_its_loader_use_its_cores(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    monkeypatch.setattr(world_module, "rank_info", lambda env: RankInfo(0, 1, 0, 8, "", 0))
    before = torch.get_num_threads()
    try:
        with open_world(ParallelConfig(device=DeviceKind.cpu)):
            threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert threads == 3
    assert default_workers(threads, gpu=True) == 2
