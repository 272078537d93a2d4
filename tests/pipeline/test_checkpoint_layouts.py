"""A checkpoint continues bit for bit on the layout that saved it; on others, the same curve."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evspan.conf.errors import UserError
from evspan.launch.local.ranks import run_ranks
from evspan.pipeline.checkpoint_files import find_newest_intact
from evspan.pipeline.engine.checkpoints import load_snapshot
from evspan.pipeline.history import read
from safetensors.torch import load_file
from support import checkpoint_ranks as stretches
from support.small_shards import write_small_shards

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]  # of a launch that runs many stretches, on a busy machine


def train(folder: Path, ranks: int, *names: str) -> None:
    script = str(ROOT / "tests" / "support" / "checkpoint_ranks.py")
    assert run_ranks([sys.executable, script, str(folder), *names], ranks, threads=1) == 0


def losses_of(folder: Path, name: str) -> dict[str, list[float]]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stretches")
    write_small_shards(folder / "shards", {"train": [23, 12, 9], "val": [4]})
    train(folder, 1, "whole", "back 1x1")
    same = [name for quick in stretches.QUICK for name in (quick, f"{quick}, resumed")]
    train(folder, 2, *same, "walk 2x1", "walk 1x2", "back 2x1", "back 1x2")
    train(folder, 4, "walk 4x1")
    train(folder, 1, "walk 1x1")
    return folder


def assert_same(folder: Path, name: str) -> None:
    """The run that was cut against the one that was not."""
    whole = losses_of(folder, name)
    resumed = losses_of(folder, f"{name}, resumed")
    assert sorted(resumed) == [str(step) for step in range(stretches.CUT + 1, stretches.STEPS + 1)]
    assert resumed == {step: whole[step] for step in resumed}
    one, other = (
        folder / run / "checkpoints" / f"step-{stretches.STEPS:08d}"
        for run in (name, f"{name}, resumed")
    )
    files = sorted(file.name for file in one.glob("*.safetensors"))
    assert len(files) >= 5
    assert files == sorted(file.name for file in other.glob("*.safetensors"))
    for file in files:
        expected, actual = load_file(one / file), load_file(other / file)
        assert expected.keys() == actual.keys()
        assert [key for key in expected if not torch.equal(expected[key], actual[key])] == [], file
    counters = [json.loads((run / "meta.json").read_text())["counters"] for run in (one, other)]
    assert counters[0] == counters[1]
    assert counters[0]["updates"] == stretches.STEPS


@pytest.mark.parametrize("name", stretches.QUICK)
def test_the_same_layout_continues_to_the_last_bit(folder, name):
    assert_same(folder, name)


def test_all_ranks_pass_over_a_checkpoint_that_one_finds_damaged(folder):
    """It had a flipped bit in a file that rank 1 alone reads; the steps are those of the whole run."""
    run = folder / f"{stretches.QUICK[0]}, resumed"
    (event,) = [event for event in read(run) if event["event"] == "fallback"]
    assert event["step"] == stretches.CUT
    assert (
        "step-00000004 is damaged (lanes-0002-0004.safetensors has the checksum"
        in (event["message"])
    )
    assert (run / "checkpoints" / "damaged-step-00000004").is_dir()
    assert find_newest_intact(run).message() == ""


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in stretches.SAME if name not in stretches.QUICK])
def test_other_layouts_continue_to_the_last_bit(tmp_path, name):
    write_small_shards(tmp_path / "shards", {"train": [23, 12, 9], "val": [4]})
    train(tmp_path, 2, name, f"{name}, resumed")
    assert_same(tmp_path, name)


@pytest.mark.parametrize("walk", [stretches.WALK, stretches.BACK], ids=["walk", "back"])
def test_another_layout_continues_the_curve(folder, walk):
    whole = losses_of(folder, "whole")
    step = 0
    for name, _, until in walk:
        actual = losses_of(folder, name)
        assert list(actual) == [str(step) for step in range(step + 1, until + 1)]
        for number, losses in actual.items():
            assert losses == pytest.approx(whole[number], rel=1e-4), (name, number)
        step = until


def test_the_carry_is_that_of_one_rank(folder):
    one = load_snapshot(folder / "whole" / "checkpoints" / "step-00000002", range(4), 0)
    two = load_snapshot(folder / "walk 2x1" / "checkpoints" / "step-00000002", range(4), 0)
    assert (
        len(one.carry) == len(two.carry) == 10
    )  # hidden and cell of 4 stages, the features of 2 scales that attention looks at
    for expected, actual in zip(one.carry, two.carry, strict=True):
        assert torch.allclose(expected, actual, atol=1e-3)
        assert expected.abs().sum() > 0
    for lanes in (range(1), range(1, 3), range(3, 4)):
        for whole, part in zip(
            two.carry,
            load_snapshot(folder / "walk 2x1" / "checkpoints" / "step-00000002", lanes, 9).carry,
        ):
            assert torch.equal(part, whole.narrow(-4, lanes.start, len(lanes)))


def test_missing_and_damaged_files_are_reported(folder, tmp_path):
    complete = folder / "walk 2x1" / "checkpoints" / "step-00000002"
    damaged = tmp_path / "step"

    def copied() -> None:
        subprocess.run(["rm", "-rf", str(damaged)], check=True)
        subprocess.run(["cp", "-r", str(complete), str(damaged)], check=True)

    for file in ("moments.safetensors", "lanes-0002-0004.safetensors"):
        copied()
        (damaged / file).unlink()
        with pytest.raises(UserError, match=f"step is damaged: {file} is missing"):
            load_snapshot(damaged, range(4), 0)
        copied()
        (damaged / file).write_bytes((complete / file).read_bytes()[:-1])
        with pytest.raises(UserError, match=f"step is damaged: {file} is cut off"):
            load_snapshot(damaged, range(4), 0)


def test_a_checkpoint_of_another_form_is_refused_in_one_line(folder, tmp_path):
    older = tmp_path / "run" / "checkpoints" / "step-00000003"
    older.mkdir(parents=True)
    (older / "meta.json").write_text(json.dumps({"step": 3, "world": 1, "stage": 1, "config": {}}))
    command = [
        sys.executable,
        "-m",
        "evspan.launch",
        "train",
        "experiment=demo",
        "parallel.ranks=1",
        f"run_dir={tmp_path / 'run'}",
        f"dataset.root={folder / 'shards'}",
    ]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    errors = [line for line in completed.stderr.splitlines() if line.startswith("error: ")]
    assert completed.returncode == 2
    assert len(errors) == 1
    assert "Traceback" not in completed.stderr
    assert f"checkpoint.init_from={older}" in errors[0]
    assert "in a format that this one cannot continue" in errors[0]
