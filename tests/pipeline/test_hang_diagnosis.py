"""What is concluded from reports of ranks that hang; reports and shared memory that others may have written."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from evspan.pipeline.parallel import flight_recorder, hang_files, hang_ring
from evspan.pipeline.parallel.flight_recorder import recorded, set_phase
from evspan.pipeline.parallel.hang_diagnosis import compare, diagnose, time_text
from evspan.pipeline.parallel.hang_files import (
    Collective,
    CollectiveState,
    Frame,
    Peer,
    RankProcess,
    Report,
    ThreadStack,
)
from evspan.pipeline.parallel.hang_watch import HangWatch
from evspan.pipeline.parallel.rank_env import RankInfo

NAMES = ["BatchNorm statistics", "sums of the loss", "gradients"]
REQUEST = "0123456789abcdef"
NOW = 1_800_000_000.0


def called(names, *, state="waiting", sizes=None, ranks=(0, 1, 2), group="0", start=1):
    """Collectives of one rank in order; the last one has the state."""
    collectives = []
    for number, name in enumerate(names, start):
        last = number == start + len(names) - 1
        collectives.append(
            Collective(
                group=group,
                ranks=ranks,
                number=number,
                name=name,
                kind="all-reduce",
                phase="forward",
                shape=(sizes or {}).get(number, (10,)),
                dtype="float32",
                state=CollectiveState(state if last else "ended"),
                started=NOW - 30 + number / 100,
            )
        )
    return tuple(collectives)


def report(rank, collectives, *, size=3, peers=None, frames=(), phase="forward"):
    stack = ThreadStack("main", True, tuple(frames))
    return Report(
        REQUEST,
        "test",
        rank,
        size,
        "node",
        100 + rank,
        NOW,
        phase,
        collectives,
        (stack,) if frames else (),
        peers=peers or {},
    )


def reports_of(*by_rank):
    return {rank: report(rank, collectives) for rank, collectives in enumerate(by_rank)}


def test_a_rank_that_has_not_come_is_named_with_its_place():
    frames = [Frame("evspan/pipeline/x.py", 12, "read"), Frame("h5py/y.py", 3, "get")]
    reports = reports_of(called(NAMES), called(NAMES[:2], state="ended"), called(NAMES))
    reports[1] = report(1, reports[1].collectives, frames=frames, phase="evaluating")
    result = compare(reports, 3, {})
    assert not result.ranks_differ
    assert result.sentences[0] == (
        "rank 0 waits in 'gradients' (all-reduce 3, 10 float32) in forward, for rank 1, since 30 s"
    )
    assert result.cause == result.sentences[1]
    assert result.cause == (
        "rank 1 waits in no collective, in evaluating, at evspan/pipeline/x.py:12 in read; "
        "its last one is 'sums of the loss' (all-reduce 2)"
    )


def test_ranks_that_wait_for_each_other_lead_to_the_one_that_waits_for_none():
    """Rank 0 waits in the world for 1, which waits in a group for 2, which is idle."""
    in_group = called(["exchange"], ranks=(1, 2), group="1")
    reports = reports_of(called(NAMES), called(NAMES[:2], state="ended") + in_group, ())
    result = compare(reports, 3, {})
    assert "for ranks 1, 2," in result.sentences[0]
    assert "'exchange'" in result.sentences[1]
    assert "for rank 2," in result.sentences[1]
    assert result.cause.startswith("rank 2 waits in no collective")


@pytest.mark.parametrize("rest", [[], NAMES])
def test_a_skipped_collective_is_named(rest):
    """Known from what the others call next, or from what followed in earlier steps."""
    usual = called([*NAMES, *NAMES[:2], *(["gradients", *rest] if rest else [])])
    odd = called([*NAMES, "BatchNorm statistics", "gradients"])
    result = compare(reports_of(usual, odd, usual), 3, {})
    assert result.ranks_differ
    assert result.cause == result.sentences[1]
    assert result.cause == (
        "rank 1 called 'gradients' (all-reduce 5, 10 float32) in forward where ranks 0, 2 called "
        "'sums of the loss' (all-reduce 5, 10 float32) in forward: rank 1 skipped "
        "'sums of the loss' (all-reduce 5)"
    )


def test_with_two_ranks_the_one_that_is_ahead_has_skipped():
    usual = called([*NAMES, *NAMES])
    odd = called([*NAMES, *NAMES[1:]])
    for first, second, named in ((usual, odd, 1), (odd, usual, 0)):
        result = compare(reports_of(first, second), 2, {})
        assert result.cause.startswith(f"rank {named} called 'sums of the loss'"), result.cause
        assert f"rank {named} skipped 'BatchNorm statistics'" in result.cause


def test_another_size_is_named():
    other = called(NAMES, sizes={3: (9, 2)})
    result = compare(reports_of(called(NAMES), called(NAMES), other), 3, {})
    assert result.cause == (
        "rank 2 has 18 float32 in 'gradients' (all-reduce 3), where ranks 0, 1 have 10 float32"
    )


def test_a_rank_that_does_not_answer_is_described_by_its_node():
    """From its shared memory, in which it had called another size; else from its heartbeat."""
    silent = Peer("node", 101, 34.0, "backward, after 'x'", "T", "backward", ())
    reports = {rank: report(rank, called(NAMES), peers={1: silent}) for rank in (0, 2)}
    processes = {1: RankProcess(1, "another-node", 101, NOW)}
    result = compare(reports, 3, processes)
    assert result.cause == (
        "rank 1 (process 101 on another-node) is stopped (SIGSTOP); its last heartbeat was 34 s "
        "ago; its last phase was backward, after 'x'; `kill -CONT 101` there continues it"
    )
    in_memory = tuple(called(NAMES[:2], state="ended", ranks=()))
    peers = {1: silent._replace(collectives=in_memory, process_state="gone")}
    reports = {rank: report(rank, called(NAMES), peers=peers) for rank in (0, 2)}
    result = compare(reports, 3, {})
    assert "for rank 1, since" in result.sentences[0]
    assert result.cause == (
        "rank 1 has ended; its last heartbeat was 34 s ago; its last phase was 'backward', "
        "after 'sums of the loss' (all-reduce 2)"
    )
    peers = {1: peers[1]._replace(collectives=called(NAMES, sizes={3: (9,)}, ranks=()))}
    reports = {rank: report(rank, called(NAMES), peers=peers) for rank in (0, 2)}
    assert compare(reports, 3, {}).cause.startswith("rank 1 has 9 float32 in 'gradients'")


def test_ranks_that_work_have_no_cause():
    ended = called(NAMES, state="ended")
    assert compare(reports_of(ended, ended, ended[:2]), 3, {}).cause == ""


def test_ranks_that_wait_as_in_every_step_have_no_cause():
    waiting = tuple(replace(item, started=NOW - 1) for item in called(NAMES))
    reports = reports_of(waiting, called(NAMES[:2], state="ended"))
    assert compare(reports, 2, {}).cause == ""  # of three ranks, which the size does not have
    longer = tuple(replace(item, started=NOW - 10) for item in waiting)
    assert compare({**reports, 0: report(0, longer)}, 2, {}).cause.startswith("rank 1 waits in no")


def test_collectives_of_libraries_are_compared_by_torchs_numbers():
    def of_library(numel):
        return Collective(
            "0",
            (0, 1, 2),
            0,
            "gradients",
            "all-reduce",
            "backward",
            (numel,),
            "float32",
            CollectiveState.waiting,
            NOW,
            torch_number=7,
        )

    result = compare(reports_of((of_library(4),), (of_library(5),), (of_library(4),)), 3, {})
    assert result.cause == (
        "rank 1 has 5 float32 in 'gradients' (all-reduce 7), where ranks 0, 2 have 4 float32"
    )


# -- files -------------------------------------------------------------------------------------------------------
def test_a_report_is_read_as_it_was_written(tmp_path):
    request = hang_files.write_request(tmp_path, "why")
    assert hang_files.read_request(tmp_path) == request
    peers = {0: Peer("node", 1, 2.0, "x", "T", "backward", called(NAMES[:1], state="failed"))}
    written = report(1, called(NAMES), peers=peers, frames=[Frame("a.py", 1, "f")])
    hang_files.write_report(tmp_path, written)
    assert hang_files.read_report(tmp_path, 1) == written
    assert diagnose(tmp_path, 3).reports == {1: written}
    assert hang_files.read_reports(tmp_path, 3, request.id) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"rank": 1}',
        '{"rank": 1, "collectives": 3}',
        "7" * 6_000_000,
        "\xff",
    ],
    ids=range(8),
)
def test_files_that_others_have_written_are_left_out(tmp_path, text):
    folder = tmp_path / hang_files.FOLDER
    folder.mkdir()
    for name in ("request.json", "rank-01.json", "rank-01.stacks"):
        (folder / name).write_bytes(text.encode("latin-1"))
    assert hang_files.read_request(tmp_path) is None
    assert hang_files.read_reports(tmp_path, 3) == {}
    assert hang_files.read_rank_process(tmp_path, 1) is None
    assert hang_files.read_stacks(tmp_path, 1) == ""


@pytest.mark.parametrize(
    "values",
    [
        {"time": 1e300},
        {"time": float("nan")},
        {"time": float("inf")},
        {"pid": float("inf")},
        {"peers": [1]},
        {"peers": []},
        {"collectives": [{"shape": [10**4000] * 16}]},
        {"collectives": [{"started": 1e300}]},
        {"collectives": [{"shape": [10**9] * 1000}]},
    ],
    ids=range(9),
)
def test_numbers_of_reports_that_cannot_be_are_refused_or_shown(tmp_path, values):
    hang_files.write_report(tmp_path, report(0, called(NAMES[:1])))
    path = hang_files.report_file(tmp_path, 0)
    content = json.loads(path.read_text())
    if "collectives" in values:
        values = {"collectives": [{**content["collectives"][0], **values["collectives"][0]}]}
    path.write_text(json.dumps({**content, **values}))
    diagnosis = diagnose(tmp_path, 1)
    assert len(diagnosis.sentences[0]) < 1000
    assert time_text(diagnosis.time)


def test_a_rank_does_not_take_the_request_of_a_user_for_that_of_a_rank(tmp_path):
    """Its reports show what the ranks did when the user asked, which may be a minute ago."""
    watch = HangWatch(tmp_path, RankInfo(0, 2, 0, 2, "", 0), 60.0)
    asked = hang_files.write_request(tmp_path, hang_files.ASKED)
    watch._answer(asked)
    own = watch._open_request("a collective failed")
    assert own.id != asked.id
    assert hang_files.read_request(tmp_path) == own
    assert watch._open_request("a collective failed") == own  # as other ranks do


def test_texts_of_reports_reach_no_terminal_as_they_are(tmp_path):
    bad = called(["\x1b[2Jname" + "x" * 1000])
    hang_files.write_report(tmp_path, report(0, bad))
    (read,) = hang_files.read_report(tmp_path, 0).collectives
    assert read.name.startswith("\\x1b[2Jname")
    assert len(read.name) < 250


def test_a_link_or_a_pipe_in_place_of_a_file_is_not_used(tmp_path):
    folder = tmp_path / hang_files.FOLDER
    folder.mkdir()
    target = tmp_path / "mine"
    target.write_text("kept")
    (folder / "rank-00.stacks").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        hang_files.open_stacks_file(tmp_path, 0)
    assert target.read_text() == "kept"
    os.mkfifo(folder / "request.json")
    os.mkfifo(folder / "rank-01.stacks")
    assert hang_files.read_request(tmp_path) is None
    assert hang_files.read_rank_process(tmp_path, 1) is None


def test_shared_memory_is_read_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(hang_ring, "FOLDER", tmp_path)
    ring = hang_ring.RingFile()
    for number in range(1, 101):  # more than it holds
        values = ["0", number, "gradients", "all-reduce", "backward", [3, 4], "float32", number, -1]
        place = ring.begin(json.dumps(values))
        ring.end(place, failed=False)
    ring.begin(json.dumps(["0", 101, "x" * 900, "all-reduce", "", [], "", 101, -1]))  # does not fit
    ring.begin(json.dumps(["0", 102, "last", "broadcast", "", [], "", 102, -1]))
    ring.set_phase("saving")
    result = hang_ring.read_ring(ring.name)
    assert result.phase == "saving"
    assert [c.number for c in result.collectives] == [*range(39, 101), 102]
    assert result.collectives[0].shape == (3, 4)
    assert result.collectives[0].state is CollectiveState.ended
    assert result.collectives[-1].state is CollectiveState.waiting
    hang_ring.remove_ring(ring.name)
    assert hang_ring.read_ring(ring.name) == hang_ring.Ring()
    for name in ("../evspan-0123456789abcdef", "", "evspan-x"):
        assert hang_ring.read_ring(name) == hang_ring.Ring()
    (tmp_path / "evspan-0123456789abcdef").write_bytes(b"w[[[[" * 10_000)
    assert hang_ring.read_ring("evspan-0123456789abcdef") == hang_ring.Ring("w[[[[" * 51 + "w")


# -- the recorder ------------------------------------------------------------------------------------------------
def test_old_rings_of_ended_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(hang_ring, "FOLDER", tmp_path)
    ring = hang_ring.RingFile()
    names = {"used": ring.name, "other": "evspan-data", "old": f"evspan-{'0' * 16}"}
    new = tmp_path / f"evspan-{'1' * 16}"
    for name in (names["other"], names["old"], new.name):
        (tmp_path / name).write_bytes(b"")
    for name in names.values():
        os.utime(tmp_path / name, (1.0, 1.0))
    hang_ring.remove_old_rings()
    expected = {names["used"], names["other"], new.name}
    assert {path.name for path in tmp_path.iterdir()} == expected
    del ring  # as at the end of its process
    hang_ring.remove_old_rings()
    assert not (tmp_path / names["used"]).exists()


def test_the_ring_keeps_names_phases_and_failures(monkeypatch):
    monkeypatch.setattr(flight_recorder, "_torch_entries", list)
    flight_recorder.start_recording()
    set_phase("forward")
    with recorded("sums of the loss", "all-reduce", torch.ones(2, 3)):
        assert flight_recorder.waits_since() == pytest.approx(time.time(), abs=60)
    with pytest.raises(ValueError, match="of all things"), recorded("metrics", "barrier"):
        raise ValueError("of all things")
    first, second = flight_recorder.latest_collectives()
    assert (first.number, first.name, first.phase) == (1, "sums of the loss", "forward")
    assert (first.shape, first.dtype) == ((2, 3), "float32")
    assert first.state is CollectiveState.ended
    assert (second.number, second.state) == (2, CollectiveState.failed)
    assert flight_recorder.waits_since() == float("inf")
    for _ in range(1000):
        with recorded("many", "barrier"):
            pass
    assert len(flight_recorder.latest_collectives()) == flight_recorder.RING_SIZE
    json.dumps(hang_files._plain(first))


def test_every_collective_of_the_product_has_a_name():
    """A call without `name=` would be one without a name in the diagnosis."""
    import ast
    from pathlib import Path

    functions = {"sum_over_ranks", "gather_over_ranks", "gather_json", "broadcast_json"}
    functions |= {"gather_bytes", "any_rank", "all_to_all"}
    root = Path(__file__).parents[2]
    unnamed = []
    for path in (root / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in functions and "name" not in {k.arg for k in node.keywords}:
                unnamed.append(f"{path.relative_to(root)}:{node.lineno}")
            if node.func.id == "barrier" and not node.args:
                unnamed.append(f"{path.relative_to(root)}:{node.lineno}")
    unnamed = [place for place in unnamed if not place.startswith("pipeline/model/")]
    assert not unnamed, "give name= (barrier: the name), what the collective is for"
