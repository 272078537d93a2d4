"""A stranger who reaches the ranks' ports runs no code, and changes no result."""

import json
import os
import pickle
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from evspan.conf.errors import ConfigError, LostRanksError
from evspan.conf.private_files import ForeignFileError, create_private_file, read_private_file
from evspan.conf.secret_values import RUN_SECRET
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.inference import gathered_results
from evspan.pipeline.inference.streaming import RecordingResult
from evspan.pipeline.parallel import reductions, run_secret
from evspan.pipeline.parallel.heartbeat import Beat, _parsed
from evspan.pipeline.parallel.run_secret import RunSecret, shared_secret
from support.processes import all_ready, eventually
from support.slurm_cluster import free_ports

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, pathlib, sys, time
from evspan.launch.cli.command import run_command
here = pathlib.Path(sys.argv[1])
def work():
    import torch
    from evspan.conf.schema.training import ParallelConfig
    from evspan.pipeline.parallel.reductions import broadcast_json, gather_json, sum_over_ranks
    from evspan.pipeline.parallel.world import open_world
    parallel = ParallelConfig(ranks=2, timeout_s=20, threads=1)
    with open_world(parallel, run=here / "run") as world:
        (here / f"pid-{world.rank}").write_text(str(os.getpid()))
        while not sum_over_ranks(torch.tensor((here / "enough").exists()).float()):
            time.sleep(0.02)
        assert gather_json([world.rank]) == [[0], [1]]
        assert broadcast_json(f"from {world.rank}") == "from 0"
run_command(work)
"""


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def rank_process(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    """A rank as `srun evspan train` starts it: without a launcher of ours, so without a secret."""
    environment = {k: v for k, v in os.environ.items() if k != RUN_SECRET}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, str(folder / "program.py"), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_stranger_at_the_store_runs_no_code_and_the_run_goes_on(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (port,) = free_ports(1)
    ranks = [rank_process(tmp_path, rank, port) for rank in range(2)]
    try:
        all_ready(tmp_path, 2)
        assert not list((tmp_path / "run").iterdir())  # the secret's file is gone
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=9)
        )
        eventually(lambda: any("heartbeats" in key for key in store.list_keys()))
        keys = store.list_keys()
        # Only torch's own counter of connections is not below the prefix.
        assert len({key.split("/")[0] for key in keys} - {"init", "evspan"}) == 1, keys
        canary = tmp_path / "canary"
        hostile = [
            pickle.dumps(Malicious(canary)),
            b"\xff\xfe" + bytes(range(256)),
            b"[" * 100_000,
            b"7" * 6_000_000,
            json.dumps(Beat("node", 1, 9, "stopped by a stranger")).encode(),
        ]
        for value in hostile:
            for key in keys:
                if "heartbeats" in key:
                    store.set(key, value)
            time.sleep(1.1)
        (tmp_path / "enough").touch()
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
        assert not canary.exists()
    finally:
        for rank in ranks:
            rank.kill()


def test_a_value_counts_only_under_its_own_key_and_secret():
    secret = RunSecret("a")
    signed = secret.sign("1", "hello").encode()
    assert secret.verified("1", signed) == "hello"
    assert secret.verified("2", signed) is None
    assert RunSecret("b").verified("1", signed) is None
    assert secret.verified("1", signed[:-1]) is None
    assert secret.verified("1", b"") is None
    assert secret.verified("1", signed + b"x" * 100_000) is None
    assert RunSecret("b").prefix != secret.prefix
    assert "a" not in repr(secret).removeprefix("RunSecret")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[]",
        "[1,2,3,4]",
        '["a","b",3,"",""]',
        '["a",1,3,""]',
        '{"host": 1}',
        "[" * 5000,
        "1" * 9999,
    ],
)
def test_a_malformed_beat_is_none(text):
    assert _parsed(text) is None


def test_a_beat_reaches_the_terminal_without_control_characters():
    assert _parsed(json.dumps(["node\x1b[2J", 7, 9, "a\nb", "c\rd"])) == Beat(
        "node\\x1b[2J", 7, 9, "a\\x0ab", "c\\x0dd"
    )


def test_ranks_without_a_launcher_read_a_file_that_only_they_can_read(tmp_path, monkeypatch):
    monkeypatch.delenv(RUN_SECRET, raising=False)
    store = dist.HashStore()
    with shared_secret(store, 0, tmp_path) as first:
        (file,) = tmp_path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with shared_secret(store, 1, tmp_path) as second:
            assert second.prefix == first.prefix != RunSecret().prefix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [b"../../etc/passwd", b"\xff" * 99, b"x" * 5000, b""])
def test_a_name_that_a_stranger_announces_is_not_read(tmp_path, monkeypatch, name):
    monkeypatch.delenv(RUN_SECRET, raising=False)
    store = dist.HashStore()
    store.set("evspan/secret/0", name)
    with (
        pytest.raises(ConfigError, match="no rank of this run has written"),
        shared_secret(store, 1, tmp_path),
    ):
        pass


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(RUN_SECRET, raising=False)
    monkeypatch.setattr(run_secret, "FILE_S", 0.0)
    store = dist.HashStore()
    store.set("evspan/secret/0", ".rendezvous-0123456789abcdef")
    with pytest.raises(ConfigError, match="same folder on all"), shared_secret(store, 1, tmp_path):
        pass


def test_a_private_file_must_be_ours_and_plain(tmp_path):
    path = tmp_path / "file"
    create_private_file(path, "secret")
    assert read_private_file(path, most_bytes=10) == b"secret"
    with pytest.raises(ForeignFileError, match="6 bytes"):
        read_private_file(path, most_bytes=5)
    path.chmod(0o620)
    with pytest.raises(ForeignFileError, match="changed by other users"):
        read_private_file(path, most_bytes=10)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ForeignFileError, match="is a link"):
        read_private_file(link, most_bytes=10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignFileError, match="no plain file"):
        read_private_file(tmp_path / "pipe", most_bytes=10)


# -- what a rank receives --------------------------------------------------------------------------
@pytest.fixture
def received(monkeypatch):
    """Makes a world of two, in which both ranks are said to have sent the texts."""

    def receive(*texts: bytes) -> None:
        waiting = iter(texts)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(reductions, "gather_bytes", lambda *_, **__: [next(waiting)] * 2)
        monkeypatch.setattr(
            gathered_results, "gather_bytes", lambda *_, **__: [next(waiting), next(waiting)]
        )

    return receive


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"1" * 5000, pickle.dumps([1])])
def test_what_is_no_json_ends_the_rank_in_one_line(received, text):
    received(text)
    with pytest.raises(LostRanksError, match="no JSON"):
        reductions.gather_json("mine")


def result(name: str, frames: list[int]) -> RecordingResult:
    boxes = [np.full(k, 7, BOX) for k in range(len(frames))]
    detections = [np.full((k + 1, 7), k, np.float32) for k in range(len(frames))]
    return RecordingResult(name, frames, boxes, detections)


def packed(*results: RecordingResult) -> tuple[bytes, bytes, bytes]:
    header = [gathered_results._header(item) for item in results]
    boxes = b"".join(rows.tobytes() for item in results for rows in item.boxes)
    detections = b"".join(rows.tobytes() for item in results for rows in item.detections)
    return json.dumps(header).encode(), boxes, detections


def test_results_of_two_ranks_arrive_as_they_were(received):
    own = [result("a", [0, 5]), result("empty", []), result("b", [2])]
    header, boxes, detections = packed(*own)
    received(header, boxes, boxes, detections, detections)
    for got, sent in zip(gathered_results.gather_results(own), [*own, *own], strict=True):
        assert got.name == sent.name
        assert got.frames == sent.frames
        assert all(np.array_equal(*pair) for pair in zip(got.boxes, sent.boxes, strict=True))
        pairs = zip(got.detections, sent.detections, strict=True)
        assert all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "header",
    [
        "7",
        "[7]",
        '[{"name": "a"}]',
        '[{"name": "a", "frames": [1], "boxes": [1e9], "detections": [1]}]',
        '[{"name": "a", "frames": [1], "boxes": [-1], "detections": [1]}]',
        '[{"name": "a", "frames": [1], "boxes": [0], "detections": [301]}]',
        '[{"name": "a", "frames": [1, 2], "boxes": [0], "detections": [0]}]',
        '[{"name": "a", "frames": "12", "boxes": [0], "detections": [0]}]',
    ],
)
def test_results_that_do_not_fit_their_sizes_are_refused(received, header):
    received(header.encode(), b"", b"", b"", b"")
    with pytest.raises(LostRanksError):
        gathered_results.gather_results([])
