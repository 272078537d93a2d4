"""Sequences over real ranks (gloo) against one rank: scans, looking back, the whole detector, and the state between chunks."""

import socket
import sys
from pathlib import Path

import pytest
import torch
from evspan.conf.errors import ConfigError
from evspan.conf.schema.layout import ExchangeKind, check_layout
from evspan.launch.local.ranks import run_ranks
from evspan.pipeline.parallel.exchange import open_exchange
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.rank_env import check_address, check_interfaces, first_host, rank_info
from support import exchange_ranks as cases
from support.anchor_grad import anchor_grad

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
]  # of a launch that runs all cases of a world, on a busy machine
ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYOUTS = list(cases.DETECTORS)  # (world, ranks per sequence)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """world -> the results of its ranks; each world is started once."""
    result = {}

    def launch(ranks):
        if ranks not in result:
            folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
            assert (
                run_ranks(
                    [
                        "env",
                        f"PYTHONPATH={ROOT / 'tests'}",
                        sys.executable,
                        "-m",
                        "support.exchange_ranks",
                        str(folder),
                    ],
                    ranks,
                    threads=1,
                )
                == 0
            )
            result[ranks] = [
                torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)
            ]
        return result[ranks]

    return launch


def groups(result, sequence):
    return [result[i : i + sequence] for i in range(0, len(result), sequence)]


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()) + 1e-12
        )


# -- scans -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", cases.SCANS)
@pytest.mark.parametrize(("world", "sequence"), LAYOUTS)
def test_scan_is_that_of_one_rank(launched, world, sequence, name):
    case = cases.SCANS[name]
    expected = cases.scan(case, cases.Alone(), range(case.frames), sequence)
    close = TOLERANCE[case.dtype]
    for group in groups(launched(world), sequence):
        results = [rank["scan", sequence, name] for rank in group]
        for key in ("y", "x"):  # (chunk, T, ...)
            assert_close(torch.cat([t[key] for t in results], dim=1), expected[key], close)
        for key in ("state", "first"):  # every rank of a group has the canonical one
            for t in results:
                for actual, one in zip(t[key], expected[key], strict=True):
                    assert_close(actual, one, close)
        for parts, one in zip(
            zip(*(t["weights"] for t in results), strict=True), expected["weights"], strict=True
        ):
            assert_close(sum(parts), one, close)


@pytest.mark.parametrize(("world", "sequence"), LAYOUTS)
def test_state_moves_to_another_exchange(launched, world, sequence):
    lstm, chunks, state = cases.moving_case()
    with torch.no_grad():
        y, stage = lstm(torch.cat(chunks), state.stages[0])
    for group in groups(launched(world), sequence):
        results = [rank["moved", sequence] for rank in group]
        actual = torch.cat([torch.cat([t["y"][chunk] for t in results]) for chunk in range(2)])
        torch.testing.assert_close(actual, y, rtol=1e-10, atol=1e-12)
        for t in results:
            torch.testing.assert_close(t["state"], list(stage), rtol=1e-10, atol=1e-12)


# -- looking back ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", cases.LOOKS)
@pytest.mark.parametrize(("world", "sequence"), LAYOUTS)
def test_previous_frames_are_those_of_the_whole_timeline(launched, world, sequence, name):
    back, each = cases.LOOKS[name]
    frames = each * sequence
    timeline, weights = cases.timeline(back, frames)  # the carry, then all chunks
    starts = [
        [chunk * frames + rank * each for chunk in range(cases.CHUNKS)] for rank in range(sequence)
    ]
    timeline.requires_grad_()
    sum(
        (timeline[at : at + back] * weights[chunk, rank * each]).sum()
        for rank in range(sequence)
        for chunk, at in enumerate(starts[rank])
    ).backward()
    for group in groups(launched(world), sequence):
        for rank, result in enumerate(r["look", sequence, name] for r in group):
            expected = torch.stack([timeline[at : at + back] for at in starts[rank]]).detach()
            assert torch.equal(result["before"], expected)
            assert torch.equal(result["carry"], timeline[-back:].detach())
            assert_close(result["first"], timeline.grad[:back], 1e-12)
            gradients = torch.stack(
                [timeline.grad[back + at : back + at + each] for at in starts[rank]]
            )
            assert_close(result["features"], gradients, 1e-12)


# -- the detector ------------------------------------------------------------------------------------------------
WHOLE = [
    (world, sequence, *case) for (world, sequence), row in cases.DETECTORS.items() for case in row
]


@pytest.mark.parametrize(("world", "sequence", "model", "kind", "labels", "dtype"), WHOLE)
def test_detector_is_that_of_one_rank(launched, world, sequence, model, kind, labels, dtype):
    frames, lanes = cases.detector_size(world)

    def one_rank(dtype):
        return cases.detect(
            model,
            labels,
            dtype,
            cases.Alone(),
            range(frames),
            range(lanes),
            frames=frames,
            lanes=lanes,
        )

    expected = one_rank(dtype)
    exact = (
        one_rank(torch.float64)["gradients"] if dtype is torch.float32 else expected["gradients"]
    )
    results = [rank["detect", sequence, model, kind, labels, dtype] for rank in launched(world)]
    for t in results:
        assert t["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-9)
        for name, statistic in expected["statistics"].items():
            assert_close(t["statistics"][name], statistic, 1e-5)
        own = slice(*t["lanes"])
        for actual, one in zip(t["carry"], expected["carry"], strict=True):
            assert_close(actual, one[..., own, :, :, :], 1e-5)
        for actual, one, true in zip(t["gradients"], expected["gradients"], exact, strict=True):
            if dtype is torch.float64:
                assert_gradients_close(actual, one)
            else:  # float32 of one rank is 5e-6 to 3e-5 from float64; ranks may be no further
                assert distance(actual, true) <= 3 * distance(one, true)


def assert_gradients_close(actual, expected):
    """Each parameter's within 1e-5, but for those that are nothing but rounding."""
    largest = max(float(w.abs().max()) for w in expected.values())
    for name, one in expected.items():
        error = float((actual[name] - one).abs().max())
        assert error <= 1e-5 * float(one.abs().max()) + 1e-8 * largest, name


def distance(actual, expected):
    return float(
        sum((actual[name] - w).double().square().sum() for name, w in expected.items()).sqrt()
    )


def test_anchored_gradients_are_not_multiplied():
    x, other = (
        torch.tensor(2.0, requires_grad=True),
        torch.tensor([float("inf"), 3.0], requires_grad=True),
    )
    anchor_grad(x * x, other * 1, torch.ones(3)).backward()
    assert x.grad == 4
    assert other.grad.tolist() == [0, 0]


# -- meshes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("world", "sequence"), LAYOUTS)
def test_consecutive_ranks_share_a_sequence(launched, world, sequence):
    lanes, frames = set(), set()
    for rank, result in enumerate(launched(world)):
        mesh = result["mesh", sequence]
        assert mesh.ranks == tuple(range(rank - rank % sequence, rank - rank % sequence + sequence))
        assert mesh.ranks[mesh.sequence] == rank
        own = {(lane, frame) for lane in mesh.lanes(12) for frame in mesh.frames(24)}
        assert not own & lanes
        lanes |= own
        frames |= set(mesh.frames(24))
    assert len(lanes) == 12 * 24
    assert frames == set(range(24))


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ((4, 3, 6, 4), ["parallel.sequence is 3", "4 ranks", "1 or 2 or 4", "parallel.ranks=6"]),
        ((2, 4, 8, 4), ["parallel.sequence is 4", "2 ranks", "1 or 2", "parallel.ranks=4"]),
        ((1, 0, 8, 4), ["parallel.sequence is 0", "parallel.ranks=1"]),
        ((4, 2, 5, 4), ["training.sequence_length is 5", "training.sequence_length=6"]),
        (
            (4, 1, 4, 6),
            [
                "training.batch_size is 6",
                "4 data groups",
                "training.batch_size=8",
                "parallel.sequence=2",
            ],
        ),
        (
            (4, 2, 4, 1),
            [
                "training.batch_size is 1",
                "2 data groups",
                "training.batch_size=2",
                "parallel.sequence=4",
            ],
        ),
    ],
)
def test_layouts_that_do_not_fit_are_told_with_what_fits(layout, parts):
    ranks, sequence, frames, lanes = layout
    with pytest.raises(ConfigError) as raised:
        check_layout(ranks=ranks, sequence=sequence, sequence_length=frames, batch_size=lanes)
    for part in parts:
        assert part in str(raised.value)


def test_layouts_that_fit_pass():
    for ranks, sequence in ((1, 1), (4, 1), (4, 2), (4, 4), (3, 3)):
        check_layout(
            ranks=ranks,
            sequence=sequence,
            sequence_length=sequence * 2,
            batch_size=ranks // sequence * 3,
        )


def test_exchanges_that_do_not_fit_are_told():
    mesh = Mesh(0, 1, 0, 2, (0, 1), None)
    with pytest.raises(ConfigError, match="parallel.exchange=relay"):
        open_exchange(ExchangeKind.transpose, mesh, sequence_length=4, dws_conv=True)
    exchange = open_exchange(ExchangeKind.auto, mesh, sequence_length=4, dws_conv=False)
    with pytest.raises(
        ValueError, match="received 4 frames, but every rank of its sequence holds 2"
    ):
        exchange.scan(None, torch.zeros(4, 1, 2, 2, 3), None)


# -- launchers ---------------------------------------------------------------------------------------------------
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "77",
}


def test_every_launcher_is_understood():
    assert rank_info({}) == (0, 1, 0, 1, "127.0.0.1", 0)
    assert rank_info(TORCHRUN) == (3, 4, 1, 2, "head", 77)
    assert rank_info(SLURM | TORCHRUN) == (3, 4, 1, 2, "head", 77)  # torchrun inside a SLURM step
    rank, size, local, local_size, address, port = rank_info(SLURM)
    assert (rank, size, local, local_size, address) == (5, 7, 1, 3, "gpu07")
    assert (
        port
        == rank_info(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}).port
    )
    assert port != rank_info(SLURM | {"SLURM_STEP_ID": "1"}).port
    assert 10_000 <= port < 32_768
    assert rank_info(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})[4:] == (
        "10.0.0.1",
        99,
    )
    assert rank_info({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"})[:2] == (0, 1)
    interactive = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}  # the shell of salloc
    assert rank_info(SLURM | interactive)[:2] == (0, 1)
    assert rank_info(SLURM | {"SLURM_STEP_NUM_TASKS": "6"})[:2] == (5, 6)  # of the job's 7


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; give a port from 1 to 65535, or unset it"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; give a port"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is '-1'; give a port"),
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x', which is no number"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID is missing in a SLURM step"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "unset RANK WORLD_SIZE"),
    ],
)
def test_a_variable_that_cannot_be_right_is_named(environment, message):
    with pytest.raises(ConfigError, match=message):
        rank_info(environment)


def test_interfaces_of_gloo_exist():
    existing = [name for _, name in socket.if_nameindex()]
    check_interfaces({})
    check_interfaces({"GLOO_SOCKET_IFNAME": ",".join(existing)})
    for value in (f"{existing[0]}, {existing[0]}", f"{existing[0]},nope0", "^lo"):
        with pytest.raises(ConfigError, match="has no interface '(nope0| lo|.*)'; its interfaces"):
            check_interfaces({"GLOO_SOCKET_IFNAME": value})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3-5,9],m", "n3"),
        ("n[03,05]", "n03"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("a,n[1-2]", "a"),
        ("n[1-2]-ib,x", "n1-ib"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


def test_an_address_without_meaning_is_told():
    check_address("127.0.0.1")
    with pytest.raises(ConfigError, match="no-such-host.invalid.*MASTER_ADDR"):
        check_address("no-such-host.invalid")
