"""Real ranks that hang on gloo: each kind is diagnosed by name, before the timeout and by `evspan logs --hang`."""

import multiprocessing
import os
import re
import signal
import socket
import time

import pytest
from evspan.conf.compose import save_config
from evspan.conf.schema.training import CheckpointConfig
from evspan.launch.hang import hang_lines
from evspan.pipeline.parallel import hang_files, hang_ring
from support.checkpoint_ranks import Case, config
from support.hang_ranks import RANKS, TIMEOUT_S, be_rank, be_trainer
from support.processes import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SHARD_FRAMES = {"train": [23, 12, 9], "val": [12, 11]}
PRELOADED = ["evspan.launch.local.rank", "evspan.pipeline.engine.trainer"]
OVER_S = 60  # for ranks to end after their timeout, on a busy machine


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def start(processes):
    """Starts ranks: target, number, further arguments. Kills those that are left."""
    started = []

    def start_ranks(target, ranks, *args):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
        for rank in range(ranks):
            process = processes.Process(target=target, args=(rank, port, *args))
            process.start()
            started.append(process)
        return started

    yield start_ranks
    for process in started:
        process.kill()
        process.join(120)


def is_stopped(process):
    return hang_files.process_state(socket.gethostname(), process.pid) == "T"


def outputs(run):
    """What each rank has printed."""
    return [run.with_name(f"{run.name}-{rank}.log").read_text() for rank in range(RANKS)]


CAUSES = {
    "skip": r"rank 1 called 'gradients' \(all-reduce (\d+), 1,000 float32\) in optimizer step where "
    r"ranks 0, 2 called 'sums of the loss' \(all-reduce \1, 20 float32\) in forward: rank 1 "
    r"skipped 'sums of the loss' \(all-reduce \1\)",
    "sizes": r"rank 1 has 999 float32 in 'gradients' \(all-reduce \d+\), where ranks 0, 2 have 1,000",
    "SIGSTOP": r"rank 1 \(process \d+ on \S+\) is stopped \(SIGSTOP\).*; its last phase was "
    r"'optimizer step', after 'sums of the loss' \(all-reduce \d+\); `kill -CONT \d+` there",
    "SIGKILL": r"rank 1 \(process \d+ on \S+\) has ended.*; its last phase was 'optimizer step'",
    "sleep": r"rank 1 waits in no collective, in evaluating, at \S*hang_ranks.py:\d+ in _steps; "
    r"its last one is 'sums of the loss'",
}
SHORT = ("skip", "SIGSTOP")


def check_kind(start, run, kind):
    """The ranks end, their message names the collective, and the reports name the cause."""
    run.mkdir()
    (run / "config.json").write_text('{"parallel": {"ranks": 3}}')
    ranks = start(be_rank, RANKS, run, kind)
    deadline = time.monotonic() + TIMEOUT_S + OVER_S
    waiting = [rank for i, rank in enumerate(ranks) if i != 1 or kind not in ("SIGSTOP", "sleep")]
    for process in waiting:
        process.join(max(0.0, deadline - time.monotonic()))
    texts = outputs(run)
    assert all(process.exitcode not in (None, 0) for process in waiting), texts
    lines = list(hang_lines(run))
    cause = next(line for line in lines if line.startswith("cause: "))
    assert re.match(f"cause: {CAUSES[kind]}", cause), "\n".join([*lines, *texts])
    errors = [line for text in texts for line in text.splitlines() if "So rank " in line]
    assert errors, texts
    for text in errors:
        named = (
            CAUSES[kind] if kind in ("skip", "sizes") else r"rank \d (waits|failed) in 'gradients'"
        )
        assert re.search(rf": {named}", text), text
        assert f"(`evspan logs {run} --hang` shows all ranks)" in text


@pytest.mark.parametrize("kind", SHORT)
def test_ranks_that_hang_name_the_collective(start, tmp_path, kind):
    check_kind(start, tmp_path / "run", kind)


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(set(CAUSES) - set(SHORT)))
def test_every_kind_of_hang_is_named(start, tmp_path, kind):
    check_kind(start, tmp_path / "run", kind)


# What rank 1 stops in: function, calls before, its phase, what rank 0 waits in.
STOPS = {
    "forward": (
        "evspan.pipeline.engine.trainer:detection_loss:3",
        "forward",
        r"'sums of the loss' \(all-reduce \d+, 6 float32\) in forward",
    ),
    "backward": (
        "evspan.pipeline.model.rank_norm:_local_gradients:30",
        "backward",
        r"'BatchNorm statistics' \(all-reduce \d+, [\d,]+ \w+\) in backward",
    ),
    "save": (
        "evspan.pipeline.engine.checkpoints:Checkpoints._write:0",
        "saving",
        r"'sizes of whether all ranks have saved' \(all-gather \d+, 1 int64\) in saving",
    ),
    "evaluation": (
        "evspan.pipeline.inference.streaming:_add_results:0",
        "evaluating",
        r"'whether all recordings were evaluated' \(all-reduce \d+, 1 float32\) in evaluating",
    ),
}


def check_stop(start, shards, tmp_path, phase):
    """`evspan logs --hang` while one of two ranks of a training is stopped; then it continues."""
    place, last_phase, wait = STOPS[phase]
    run = tmp_path / "run"
    train = config(Case(ranks=2, stage=0), shards.parent, run)
    train.training.max_steps = 6
    train.training.evaluate_every = 4
    train.evaluation.skip_first_ms = 0
    train.checkpoint = CheckpointConfig(every=2, keep=2, asynchronous=False)
    train.parallel.timeout_s = 100
    train.parallel.threads = 1
    file = tmp_path / "config.yaml"
    save_config(train, file)
    ranks = start(be_trainer, 2, file, place)
    eventually(lambda: is_stopped(ranks[1]), 120)
    # Rank 0 comes to the collective; the stopped rank is silent for some beats.
    waits_in = re.compile(rf"  rank 0 waits in {wait}, for rank 1, since \d+ s")

    def lines_of_wait():
        lines = list(hang_lines(run))
        return lines if any(waits_in.match(line) for line in lines) else []

    lines = eventually(lines_of_wait, 120)
    cause = next(line for line in lines if line.startswith("cause: "))
    assert re.match(rf"cause: rank 1 \(process {ranks[1].pid} on \S+\) is stopped", cause), lines
    assert f"its last phase was '{last_phase}'" in cause
    assert "stack of rank 0, innermost call last:" in lines
    assert any("  torch/distributed/distributed_c10d.py:" in line for line in lines)
    assert any("  evspan/pipeline/engine/trainer.py:" in line for line in lines)
    os.kill(ranks[1].pid, signal.SIGCONT)
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        assert not (hang_ring.FOLDER / hang_files.read_rank_process(run, rank).ring).exists()


def test_a_rank_of_a_training_that_is_stopped_is_named(start, shards, tmp_path):
    check_stop(start, shards, tmp_path, "save")


@pytest.mark.soak
@pytest.mark.parametrize("phase", sorted(set(STOPS) - {"save"}))
def test_a_rank_that_is_stopped_in_any_phase_is_named(start, shards, tmp_path, phase):
    check_stop(start, shards, tmp_path, phase)
