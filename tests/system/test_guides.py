"""The guides of CONTRIBUTING.md, followed in a copy of the checkout: their files are written and their commands run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from evspan.data_prep.recordings.open import open_recording
from support.small_shards import write_small_shards
from support.training_runs import scalars

ROOT = Path(__file__).parents[2]
SHARD_FRAMES = {"train": [23, 22], "val": [6]}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Block(NamedTuple):
    """A fenced block of a guide."""

    language: str
    text: str


def guide(title: str) -> list[Block]:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in blocks]


class Checkout:
    """A copy of the checkout, and a folder to work in."""

    def __init__(self, top: Path) -> None:
        self.root = top / "checkout"
        self.work = top / "work"
        self.work.mkdir()
        ignore = shutil.ignore_patterns(".*", "*.egg-info", "demo", "multirun")
        shutil.copytree(ROOT, self.root, ignore=ignore)
        (top / "import").mkdir()
        (top / "import" / "evspan").symlink_to(self.root)
        command = top / "bin" / "evspan"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m evspan.launch "$@"\n')
        command.chmod(0o755)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(top / "import"),
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def follow(self, title: str) -> str:
        """Applies every block of a guide, in order. Returns what its commands print."""
        output = ""
        for block in guide(title):
            if block.language == "sh":
                output += self.run("bash", "-euc", block.text)
            elif block.language == "diff":
                self.patch(block.text)
            else:
                name = re.match(r"# (\S+)\n", block.text)
                assert name, f"the block does not name its file: {block.text[:80]}"
                self.write(name[1], block.text)
        return output

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        assert not path.exists(), f"{name} is there already"
        path.write_text(text)
        if path.name.startswith("test_"):
            self.run(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, str(path))

    def patch(self, text: str) -> None:
        """Replaces the lines of each hunk, which stand in the file exactly once."""
        first, _, rest = text.partition("\n")
        path = self.root / first.removeprefix("--- ")
        content = path.read_text()
        for hunk in rest.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert content.count(old) == 1, (
                f"{path.name} contains {content.count(old)} times: {old}"
            )
            content = content.replace(old, new)
        path.write_text(content)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_add_an_input_format(checkout, source):
    (checkout.work / "bin").mkdir()
    packed = bytearray()
    for events in open_recording(source / "val" / "d_td.raw").chunks():
        inside = events.take((events.x < 240) & (events.y < 180) & (events.t < 1 << 23))
        for t, x, y, p in zip(*(column.tolist() for column in inside), strict=True):
            packed += bytes([x, y]) + (p << 23 | t).to_bytes(3, "big")
    (checkout.work / "bin" / "walk.bin").write_bytes(packed)
    checkout.follow("Add an input format")
    assert list((checkout.work / "bin_shards").glob("*/00000.h5"))


def test_add_a_dataset_with_its_own_classes(checkout, source):
    shutil.copytree(source, checkout.work / "recordings")
    output = checkout.follow("Add a dataset with its own classes")
    assert "- forklift" in output


def test_add_an_attention_block(checkout):
    write_small_shards(checkout.work / "shards", SHARD_FRAMES)
    checkout.follow("Add an attention block")
    assert np.isfinite(scalars(checkout.work / "context", "loss/total")[1])


def test_add_an_exchange(checkout):
    write_small_shards(checkout.work / "shards", SHARD_FRAMES)
    checkout.follow("Add an exchange")
    one = scalars(checkout.work / "one", "loss/total")
    gathered = scalars(checkout.work / "gathered", "loss/total")
    assert sorted(one) == sorted(gathered) == [1, 2, 3]
    np.testing.assert_allclose([*gathered.values()], [*one.values()], rtol=5e-5)


def test_add_a_cluster(checkout):
    write_small_shards(checkout.work / "shards", SHARD_FRAMES)
    output = checkout.follow("Add a cluster")
    for option in ("partition=gpu", "account=lab", "nodes=2", "time=720", "cpus-per-task=8"):
        assert f"#SBATCH --{option}" in output
    assert "module load cuda" in output
