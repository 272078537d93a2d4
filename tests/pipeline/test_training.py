"""Training over real ranks (gloo): resume, two ranks against one, stop signals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameMode
from evspan.pipeline.engine.checkpoints import load_snapshot
from evspan.pipeline.weights import load_weights
from support.rvt_tree import write_rvt_tree
from support.small_shards import BINS, write_small_shards
from support.training_runs import LOSSES, ROOT, scalars, train, train_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
PLAIN = "training.engine=plain"  # starts faster, for what is not about the engine
SHARD_FRAMES = {"train": [23, 12, 9], "val": [12, 7, 5]}


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two_ranks") / "run"
    train(shards, run_dir)
    return run_dir


def test_the_run_folder_holds_what_the_readme_says(two_ranks):
    checkpoints = two_ranks / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "best",
        "latest",
        "step-00000003",
        "step-00000006",
    ]
    assert (
        (checkpoints / "latest").read_text().strip()
        == (checkpoints / "best").read_text().strip()
        == "step-00000006"
    )
    assert set(scalars(two_ranks, "speed/frames_per_s")) == set(range(1, 7))
    assert set(scalars(two_ranks, "evaluation/ap50")) == {6}
    metrics = json.loads((two_ranks / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["ap"] <= metrics["ap50"] <= 1
    assert metrics["frames"] == 6 + 3 + 2
    weights = load_weights(two_ranks)
    assert weights.step == 6
    assert weights.frames.bins == BINS
    assert weights.classes == ["ball", "box", "bar"]
    assert sorted(p.name for p in (checkpoints / "step-00000006").iterdir()) == [
        "ema.safetensors",
        "lanes-0000-0002.safetensors",
        "lanes-0002-0004.safetensors",
        "meta.json",
        "metrics.json",
        "moments.safetensors",
        "rank-0000.safetensors",
        "rank-0001.safetensors",
        "weights.safetensors",
    ]
    carry = load_snapshot(checkpoints / "step-00000006", range(1, 4), 1).carry
    assert all(torch.isfinite(t).all() and t.shape[-4] == 3 for t in carry)
    assert any(t.abs().sum() > 0 for t in carry)


def test_resume_is_bit_for_bit_the_uninterrupted_run(shards, two_ranks, tmp_path):
    again = tmp_path / "run"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(
        two_ranks / "checkpoints" / "step-00000003", again / "checkpoints" / "step-00000003"
    )
    output = train(shards, again)
    assert "resumes at step 3" in output
    for tag in LOSSES:
        whole, resumed = scalars(two_ranks, tag), scalars(again, tag)
        assert sorted(resumed) == [4, 5, 6]
        assert resumed == {step: whole[step] for step in resumed}, tag
    one, other = load_weights(two_ranks).tensors, load_weights(again).tensors
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_two_ranks_give_the_losses_of_one(shards, two_ranks, tmp_path):
    output = train(
        shards,
        tmp_path / "run",
        "parallel.ranks=1",
        "parallel.threads=1",
        "training.cuda_graphs=true",
        "evaluation.at_end=false",
    )
    assert "training.cuda_graphs has no effect on a CPU" in output
    for tag in LOSSES:
        one, two = scalars(tmp_path / "run", tag), scalars(two_ranks, tag)
        np.testing.assert_allclose(
            [one[s] for s in sorted(one)], [two[s] for s in sorted(two)], rtol=5e-5, err_msg=tag
        )
        assert one[1] == pytest.approx(two[1], rel=1e-5), (
            tag
        )  # the first step: same weights, nothing has drifted yet


@pytest.fixture(scope="module")
def one_sequence(shards, tmp_path_factory):
    """Two ranks that share every sequence."""
    run_dir = tmp_path_factory.mktemp("one_sequence") / "run"
    output = train(shards, run_dir, "parallel.sequence=2")
    assert "2 ranks = 1 data x 2 sequence, exchange transpose" in output
    return run_dir


def test_a_shared_sequence_gives_the_losses_of_two_lanes(two_ranks, one_sequence):
    for tag in LOSSES:
        data, sequence = scalars(two_ranks, tag), scalars(one_sequence, tag)
        close = 5e-4 if tag == "train/gradient_norm" else 5e-5
        np.testing.assert_allclose(
            [data[s] for s in sorted(data)],
            [sequence[s] for s in sorted(data)],
            rtol=close,
            err_msg=tag,
        )
    assert set(scalars(one_sequence, "evaluation/ap50")) == {6}
    fractions = scalars(one_sequence, "speed/exchange_fraction")
    assert set(fractions) == set(range(1, 7))
    assert all(0 < fraction < 1 for fraction in fractions.values())


def started_by_torchrun(arguments):
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=2",
                "-m",
                "evspan.launch.cli.train",
                *arguments,
            ],
            cwd=ROOT,
        )
    ]


def started_by_slurm(arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "evspan.launch.cli.train", *arguments],
            cwd=ROOT,
            env=os.environ | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("start", [started_by_torchrun, started_by_slurm])
def test_every_launcher_gives_the_same_run(shards, one_sequence, tmp_path, start):
    arguments = train_command(
        shards,
        tmp_path / "run",
        "parallel.sequence=2",
        "evaluation.at_end=false",
    )[4:]
    ranks = start(arguments)
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * len(ranks)
    finally:
        for rank in ranks:
            rank.kill()
    for tag in LOSSES:
        assert scalars(tmp_path / "run", tag) == scalars(one_sequence, tag)


@pytest.mark.parametrize(
    "overrides",
    [  # test_layouts.py trains under all of them, too
        pytest.param(("deepspeed=zero0",), marks=pytest.mark.soak),
        pytest.param(("deepspeed=zero2", "training.precision=bf16"), marks=pytest.mark.soak),
        ("deepspeed=zero3", "training.gradient_accumulation_steps=2"),
    ],
    ids=lambda o: "-".join(o),
)
def test_other_stages_train_save_and_evaluate(shards, tmp_path, overrides):
    train(shards, tmp_path / "run", "training.max_steps=3", *overrides)
    assert all(np.isfinite(list(scalars(tmp_path / "run", tag).values())).all() for tag in LOSSES)
    assert load_weights(tmp_path / "run").step == 3


def test_rvt_tree_trains_as_it_stands(tmp_path):
    tree = write_rvt_tree(write_rvt_tree(tmp_path / "tree", {"a": 9, "b": 5}), {"c": 4}, "val")
    output = train(
        tree,
        tmp_path / "run",
        "dataset=rvt_tree",
        "training.max_steps=2",
        "parallel.ranks=1",
        PLAIN,
    )
    assert "2 recordings, 14 frames" in output
    assert np.isfinite(list(scalars(tmp_path / "run", "loss/total").values())).all()
    weights = load_weights(tmp_path / "run")
    assert weights.frames.mode is FrameMode.rvt
    assert weights.classes == [
        "pedestrian",
        "two_wheeler",
        "car",
    ]


def test_a_dataset_without_a_held_out_split_trains_without_evaluations(tmp_path):
    root = write_small_shards(tmp_path / "shards", {"train": [12, 9]})
    words = ["parallel.ranks=1", PLAIN, "training.evaluate_every=0"]
    refused = subprocess.run(
        train_command(root, tmp_path / "run", *words), cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "has no recordings in split 'val'" in refused.stderr
    remedy = "evaluation.at_end=false"
    assert remedy in refused.stderr
    words.append(remedy)  # images are off in all of these runs
    train(root, tmp_path / "run", *words, "training.max_steps=2")
    train(root, tmp_path / "run", *words, "training.max_steps=3")
    assert load_weights(tmp_path / "run").step == 3


def output_until_stopped(command, line):
    """Output of a run that gets a stop signal after a line that starts with `line`."""
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    lines = []
    for written in started.stdout:
        lines.append(written)
        if written.startswith(line):
            started.send_signal(signal.SIGTERM)
    assert started.wait(120) == 75, "".join(lines)
    return "".join(lines)


def newest_step(run_dir):
    checkpoints = run_dir / "checkpoints"
    newest = (checkpoints / "latest").read_text().strip()
    return json.loads((checkpoints / newest / "meta.json").read_text())["step"]


def test_a_stop_signal_saves_all_ranks_and_the_same_command_continues(shards, tmp_path):
    run_dir = tmp_path / "run"
    command = train_command(
        shards, run_dir, "training.max_steps=400", "checkpoint.every=1000", PLAIN
    )
    output_until_stopped(command, "step 2 of ")
    saved = newest_step(run_dir)
    assert 2 <= saved < 400
    output = output_until_stopped(command, f"step {saved + 1} of ")
    assert f"resumes at step {saved} of 400" in output
    assert saved < newest_step(run_dir) < 400
    output = train(
        shards, run_dir, "training.max_steps=400", "training.batch_size=2", PLAIN, code=2
    )
    assert "training.batch_size=4, this run has 2" in output
    assert "Traceback" not in output


def test_a_dead_rank_ends_the_run_and_is_named(shards, tmp_path):
    started = subprocess.Popen(
        train_command(shards, tmp_path / "run", "training.max_steps=4000", PLAIN),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    lines = []
    for line in started.stdout:
        lines.append(line)
        if line.startswith("step 2 of "):
            children = subprocess.run(
                ["pgrep", "-P", str(started.pid)], capture_output=True, text=True
            ).stdout.split()
            ranks = {_environment(pid).get("RANK"): int(pid) for pid in children}
            os.kill(ranks["1"], signal.SIGKILL)
    assert started.wait(120) != 0
    assert "rank 1" in "".join(lines)


def _environment(pid):
    return dict(
        p.split("=", 1) for p in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in p
    )


def test_foreign_weights_are_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="no weights file of evspan"):
        load_weights(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_weights(tmp_path / "nothing")
