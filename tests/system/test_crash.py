"""Training that is killed at any moment, or cannot save: the newest checkpoint continues it."""

import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import CheckpointConfig, ModelConfig
from evspan.pipeline.checkpoint_files import find_newest_intact, find_weights
from evspan.pipeline.engine.checkpoints import Checkpoints, Snapshot
from evspan.pipeline.weights import Weights, read_description
from safetensors.torch import load_file
from support.checkpoint_ranks import Case, config
from support.crash_ranks import be_rank
from support.training_runs import LOSSES, scalars

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # on a busy machine
STEPS, EVERY, KEEP, EVALUATE = 10, 2, 2, 4
SHARD_FRAMES = {"train": [23, 12, 9], "val": [12]}
PRELOADED = [
    "evspan.launch.local.rank",
    "evspan.pipeline.engine.trainer",
    "evspan.pipeline.engine.deepspeed_engine",
]


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Run:
    """Two ranks that train in one run folder and are started repeatedly."""

    def __init__(self, processes, shards: Path, folder: Path, *, asynchronous: bool = True) -> None:
        self.processes, self.folder, self.checkpoints = processes, folder, folder / "checkpoints"
        self.config = config(Case(ranks=2, stage=1), shards.parent, folder)
        self.config.training.max_steps, self.config.training.evaluate_every = STEPS, EVALUATE
        self.config.evaluation.skip_first_ms = 0
        # A new detector gives all predictions about 1e-4.
        self.config.evaluation.confidence_threshold = 1e-5
        self.config.checkpoint = CheckpointConfig(every=EVERY, keep=KEEP, asynchronous=asynchronous)
        self.config.parallel.timeout_s, self.config.parallel.threads = 60, 1
        self.ranks: list = []

    def log(self, rank: int) -> str:
        return self.folder.with_name(f"{self.folder.name}-rank-{rank}.log").read_text()

    def start(self) -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
        logs = [self.folder.with_name(f"{self.folder.name}-rank-{rank}.log") for rank in (0, 1)]
        self.ranks = [
            self.processes.Process(target=be_rank, args=(rank, port, self.config, logs[rank]))
            for rank in (0, 1)
        ]
        for log in logs:
            # Else a rank that is killed early would show the previous log.
            log.write_text("")
        for rank in self.ranks:
            rank.start()

    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def kill(self, victims: list[int]) -> bool:
        """Whether they were running. The other ranks get time to notice, as from a launcher."""
        working = self.alive()
        for victim in victims:
            self.ranks[victim].kill()
        for rank in self.ranks:
            rank.join(5)
            rank.kill()
            rank.join(120)
        return working and any(self.ranks[victim].exitcode == -signal.SIGKILL for victim in victims)

    def finish(self) -> None:
        for rank in self.ranks:
            rank.join(120)
        assert [rank.exitcode for rank in self.ranks] == [0, 0], self.log(0) + self.log(1)

    def resumed_at(self) -> int:
        match = re.search(r": (?:resumes|starts) at step (\d+) of", self.log(0))
        return int(match[1]) if match else -1  # -1: killed before it logged a step

    def saving(self) -> bool:
        return any(self.checkpoints.glob(".[wd]*-step-*"))

    def committing(self) -> bool:
        return any(self.checkpoints.glob(".writing-*/meta.json"))

    def complete(self) -> int:
        """The step that must be resumed at. Checks that the named checkpoint is complete."""
        search = find_newest_intact(self.folder)
        assert search.damaged == []
        if search.name is None:
            return 0
        newest = search.folder
        for file in newest.glob("*.safetensors"):
            load_file(file)
        assert json.loads((newest / "meta.json").read_text())["step"] == int(
            newest.name.split("-")[1]
        )
        assert len(list(newest.glob("rank-*"))) == len(list(newest.glob("lanes-*"))) == 2
        return int(newest.name.split("-")[1])


def last_detections(run: Run) -> np.ndarray:
    """Of the last evaluation, in the only recording of the split."""
    (path,) = (run.folder / "evaluation").glob("*_bbox.npy")
    return np.load(path)


@pytest.fixture(scope="module")
def undisturbed(processes, shards, tmp_path_factory):
    """Saves synchronously; the runs that are killed save in threads."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run = Run(processes, shards, folder, asynchronous=False)
    began = time.monotonic()
    run.start()
    run.finish()
    took = time.monotonic() - began
    assert len(last_detections(run)) > 0
    return run, took


def assert_as_undisturbed(run: Run, reference: Run) -> None:
    for tag in LOSSES:
        assert sorted(expected := scalars(reference.folder, tag)) == list(range(1, STEPS + 1))
        assert scalars(run.folder, tag) == expected, tag
    assert scalars(run.folder, "evaluation/ap") == scalars(reference.folder, "evaluation/ap")
    np.testing.assert_array_equal(last_detections(run), last_detections(reference))
    names = sorted(path.name for path in reference.checkpoints.iterdir())
    assert sorted(path.name for path in run.checkpoints.iterdir()) == names
    for pointer in ("latest", "best"):
        assert (run.checkpoints / pointer).read_text() == (
            reference.checkpoints / pointer
        ).read_text()
    for file in reference.checkpoints.rglob("*.safetensors"):
        same = run.checkpoints / file.relative_to(reference.checkpoints)
        assert same.read_bytes() == file.read_bytes(), file


def campaign(
    run: Run, moments: list[str], whole: float, reference: Run, seed: int
) -> dict[str, int]:
    """Kills at each of `moments`, each time continuing from the newest checkpoint; then lets it finish."""
    rng, done = random.Random(seed), dict.fromkeys(moments, 0)
    moments = list(moments)
    while moments:
        expected = run.complete()
        run.start()
        began = time.monotonic()
        if moments[0] == "saving":
            for _ in range(rng.randrange(2)):  # the next, or the one after
                while run.alive() and not run.saving():
                    time.sleep(0.0005)
                while run.alive() and run.saving():
                    time.sleep(0.0005)
            while run.alive() and not run.saving():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.1))
        elif moments[0] == "committing":
            while run.alive() and not run.committing():
                pass
            time.sleep(rng.uniform(0, 0.005))
        else:
            time.sleep(rng.uniform(0, whole))
        killed = run.kill(rng.choice([[0], [1], [0, 1]]))
        assert run.resumed_at() in (expected, -1), run.log(0)
        if killed:
            done[moments.pop(0)] += 1
        elif run.complete() == STEPS:
            reference_check(run, reference)
            shutil.rmtree(run.folder)
        else:
            raise AssertionError(
                f"ended by itself after {time.monotonic() - began:.1f} s: {run.log(0)} {run.log(1)}"
            )
    expected = run.complete()
    run.start()
    run.finish()
    assert run.resumed_at() == expected
    assert_as_undisturbed(run, reference)
    return done


def reference_check(run: Run, reference: Run) -> None:
    run.start()  # repeats an evaluation that was killed
    run.finish()
    assert_as_undisturbed(run, reference)


def test_a_run_that_is_killed_four_times_gives_the_same_result(
    undisturbed, processes, shards, tmp_path
):
    reference, whole = undisturbed
    run = Run(processes, shards, tmp_path / "run")
    campaign(run, ["saving", "anywhere", "saving", "saving"], whole, reference, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_forty_moments(undisturbed, processes, shards, tmp_path):
    reference, whole = undisturbed
    run = Run(processes, shards, tmp_path / "run")
    print(
        campaign(run, ["saving", "anywhere", "committing", "saving"] * 10, whole, reference, seed=2)
    )


# -- the folder of one rank: what is kept, what is reported ----------------------------
@pytest.fixture
def alone():
    """This process as the only rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def snapshot(step: int, size: int = 8) -> Snapshot:
    weights = Weights(
        {"w": torch.full((size,), float(step))}, ModelConfig(), FrameConfig(), ["ball"], step
    )
    carry = [torch.zeros(2, 3, 1, 1)]
    return Snapshot(
        {"skipped": 0, "counters": {}, "config": {}},
        weights,
        {"exp_avg/w": torch.zeros(size)},
        range(2),
        carry,
    )


def saved_step(path: Path) -> int:
    """The step in the weights file that a command would read. Its tensors are those of no detector."""
    return read_description(find_weights(path).file)["step"]


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted(checkpoints.folder.glob("step-*"))]


def test_the_newest_and_the_best_stay(alone, tmp_path):
    checkpoints = Checkpoints(tmp_path, rank=0, keep=2)
    reached = {1: 0.1, 2: 0.4, 3: None, 4: 0.4, 5: 0.2}
    for step, ap in reached.items():
        checkpoints.save(step, snapshot(step))
        assert not checkpoints.evaluated(step)
        checkpoints.record(step, {"ap": ap})
        assert checkpoints.evaluated(step)
    assert steps(checkpoints) == [2, 4, 5]
    assert saved_step(checkpoints.folder / "best") == 2
    assert saved_step(checkpoints.folder / "latest") == 5
    assert saved_step(tmp_path) == 5
    checkpoints.save(6, snapshot(6))
    checkpoints.record(6, {"ap": 0.5})
    checkpoints.save(7, snapshot(7))
    assert steps(checkpoints) == [6, 7]
    assert saved_step(checkpoints.folder / "best") == 6
    checkpoints.save(7, snapshot(7))  # again, after a resume from an older one
    assert steps(checkpoints) == [6, 7]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "best",
        "latest",
        "step-00000006",
        "step-00000007",
    ]


def test_a_run_that_starts_again_in_its_folder_has_its_own_best(alone, tmp_path):
    before = Checkpoints(tmp_path, rank=0, keep=2)
    before.save(9, snapshot(9))
    before.record(9, {"ap": 0.9})
    again = Checkpoints(tmp_path, rank=0, keep=2, start_over=True)
    again.save(1, snapshot(1))
    again.record(1, {"ap": 0.1})
    assert saved_step(tmp_path) == saved_step(again.folder / "best") == 1
    assert saved_step(again.folder / "former-1" / "best") == 9


def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_one_before_stays(alone, tmp_path):
    """Past a limit on the size of files, as past the end of a disk, writing fails."""
    checkpoints = Checkpoints(tmp_path, rank=0, keep=1)
    checkpoints.save(1, snapshot(1))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            UserError,
            match="could not be saved: .*File too large. "
            f"Earlier checkpoints are still in {checkpoints.folder}",
        ):
            checkpoints.save(2, snapshot(2, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step-00000001"]
    assert find_newest_intact(tmp_path).folder == checkpoints.folder / "step-00000001"
    checkpoints.save(2, snapshot(2, 100_000))
    assert saved_step(tmp_path) == 2


def test_a_full_disk_and_one_that_may_not_be_written_to(alone, tmp_path):
    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(tmp_path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small tmpfs is not permitted here ({done.stderr.strip()})")

    mount("-t", "tmpfs", "-o", "size=400k", "tmpfs")
    try:
        checkpoints = Checkpoints(tmp_path, rank=0, keep=1)
        checkpoints.save(1, snapshot(1))
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.save(2, snapshot(2, 100_000))
        mount("-o", "remount,ro")
        with pytest.raises(UserError, match="Read-only file system"):
            checkpoints.save(2, snapshot(2))
        assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
            "latest",
            "step-00000001",
        ]
        mount("-o", "remount,rw,size=4m")
        checkpoints.save(2, snapshot(2, 100_000))
        assert saved_step(tmp_path) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_a_killed_run_left_is_cleared(alone, tmp_path):
    checkpoints = Checkpoints(tmp_path, rank=0, keep=2)
    checkpoints.save(1, snapshot(1))
    for left in (".writing-step-00000002", ".deleting-step-00000000"):
        shutil.copytree(checkpoints.folder / "step-00000001", checkpoints.folder / left)
    assert find_newest_intact(tmp_path).folder == checkpoints.folder / "step-00000001"
    (checkpoints.folder / "latest").unlink()  # killed before the first was named
    assert find_newest_intact(tmp_path).folder == checkpoints.folder / "step-00000001"
    checkpoints.save(2, snapshot(2))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000002",
    ]
