"""The commands of the READMEs: each one runs, or is composed and checked where it would train for hours or needs a cluster."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.launch.cli.main import COMMANDS, main
from support.rvt_checkpoints import model_of, publish, random_tensors
from support.rvt_tree import write_rvt_tree

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "conf/README.md",
    "data_prep/README.md",
    "launch/README.md",
    "pipeline/README.md",
)
SENSOR = SimulatorConfig(height=240, width=320, min_objects=1, max_objects=3)
# Folders in the README -> folders of this test.
STAND_INS = {
    "source=/data/gen4": "source=recordings",
    "dataset.root=/data/gen4": "dataset.root=gen4_shards",
    "dataset.root=/scratch/gen4": "dataset.root=gen4_shards",
    "dataset.root=/scratch/shards": "dataset.root=gen4_shards",
    "after=/scratch/shards": "after=gen4_shards",
    "dataset.root=/scratch/etram": "dataset.root=etram_shards",
    "dataset.root=own_shards": "dataset.root=gen4_shards",
    "size=base": "size=micro",  # of the runs below runs/
    "output=/scratch/gen4": "output=scratch",
    "dataset.roots=[{root: gen4_shards, weight: 3}, {root: own_shards, class_map: {lorry: truck, "
    "tram: null}}]": "dataset.roots=[{root: gen4_shards, weight: 3}, {root: shards, "
    "class_map: {ball: car, box: pedestrian, bar: null}}]",
}
ENDLESS = {"--watch", "--follow"}
SMALLER = {"simulate": ["--seconds", "0.3", "--width", "320", "--height", "240"]}
ONLY_OPTIONS = ("smoke", "doctor", "export")  # other tests run them; here their options are parsed


@dataclass(frozen=True)
class Command:
    """A line of a README, without comments."""

    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.words)}"


def commands(page: Path) -> list[Command]:
    """The `evspan` commands in blocks marked ```sh."""
    found = []
    inside = False
    pending = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = line == "```sh"
            continue
        if not inside:
            continue
        pending += line
        if pending.endswith("\\"):
            pending = pending.removesuffix("\\")
            continue
        words = shlex.split(pending, comments=True)
        pending = ""
        if words and words[0] == "evspan":
            found.append(Command(number, words))
    return found


def adapted(words: list[str]) -> list[str]:
    """The arguments of a command with stand-ins for a reader's folders, and quick."""
    name, *arguments = words[1:]
    if "--cfg" in arguments:
        return words[1:]
    arguments = [STAND_INS.get(word, word) for word in arguments if word not in ENDLESS]
    is_prep_run = name == "prep" and any(word.startswith("source=") for word in arguments)
    if is_prep_run:  # the stand-in for the shards was made of other recordings
        arguments.append("allow_removal=true")
        if not any(word.startswith(("processes=", "cluster=")) for word in arguments):
            arguments.append("processes=1")  # other tests prepare in several
    if name == "train":  # composed, checked, and not started
        return ["submit", *arguments, "cluster.dry_run=true"]
    if name == "bench":  # another test runs it
        return [name, *arguments, "--cfg", "job"]
    if name in ("submit", "sweep") or "cluster=slurm" in arguments:
        return [name, *arguments, "cluster.dry_run=true"]
    if name in ONLY_OPTIONS or "--hang" in arguments:  # no rank is there to be asked
        return [name, *arguments, "--help"]
    return [name, *arguments, *SMALLER.get(name, [])]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands find in a reader's folder: recordings, shards, a trained run, an RVT tree and checkpoint."""
    folder = tmp_path_factory.mktemp("workspace")
    seeds = {"train/a": 0, "train/b": 1, "val/val_000": 2, "test/d": 3}
    for name, seed in seeds.items():
        simulate(folder / f"recordings/{name}_td.dat", seconds=0.6, seed=seed, config=SENSOR)
    simulate(folder / "drive_td.raw", seconds=0.3, seed=4, config=SENSOR)
    simulate(folder / "drive_td.dat", seconds=0.3, seed=4, config=SENSOR)
    for name in ("drive.raw", "recording.raw"):
        shutil.copy(folder / "drive_td.raw", folder / name)
    _label(folder)
    for output, name in {
        "shards": "simulated",
        "gen4_shards": "gen4",
        "etram_shards": "etram",
    }.items():
        main(
            [
                "prep",
                f"source={folder}/recordings",
                f"output={folder}/{output}",
                f"dataset={name}",
                "frames.downsample=4",
                "processes=1",
            ]
        )
    _train(folder)
    for split in ("train", "val", "test"):
        write_rvt_tree(folder / "gen4_tree", {"a": 4}, split)
    publish(folder / "rvt-t.ckpt", random_tensors(model_of("tiny", 3)))
    return folder


def _label(folder: Path) -> None:
    """Labels as a labelling tool saves them, of the images that `evspan labels export` names."""
    content = {
        "images": [{"id": 1, "file_name": "drive_000000100000us.png", "width": 320, "height": 240}],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "person"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [40, 50, 60, 30]}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "own/train").mkdir(parents=True)
    shutil.copy(folder / "drive_td.raw", folder / "own/train")


def _train(folder: Path) -> None:
    """Runs of one step, under every name that the READMEs use."""
    overrides = [
        *("parallel.ranks=1", "parallel.threads=1", "training.max_steps=1"),
        *("training.batch_size=2", "training.log_images_every=0", "training.engine=plain"),
    ]
    command = [sys.executable, "-m", "evspan.launch", "train", "experiment=demo", *overrides]
    simulated = ["dataset.root=shards", "run_dir=runs/demo"]
    gen4 = ["dataset=gen4", "dataset.root=gen4_shards", "run_dir=runs/base"]
    for arguments in (simulated, gen4):
        subprocess.run([*command, *arguments], cwd=folder, check=True, timeout=200)
    for name in ("own", "tuned"):
        shutil.copytree(folder / "runs/base", folder / "runs" / name)
    shutil.copytree(folder / "runs/base", folder / "sweeps/lr/0")
    logs = folder / "sweeps/lr/0/logs"
    logs.mkdir(exist_ok=True)
    (logs / "rank-00.log").write_text("step 1\n")
    shutil.copytree(folder / "sweeps/lr", folder / "sweeps/tune")


def run(arguments: list[str]) -> int:
    """The exit code of a command."""
    if arguments[0] == "evaluate":  # which opens process groups
        return subprocess.run(
            [sys.executable, "-m", "evspan.launch", *arguments], timeout=120
        ).returncode
    try:
        main(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_readme_works(page, workspace, tmp_path, monkeypatch, capfd):
    torch.set_num_threads(1)
    folder = tmp_path / "reader"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tried = commands(ROOT / page)
    assert tried
    for command in tried:
        code = run(adapted(command.words))
        output = capfd.readouterr()
        assert code == 0, f"{page}, {command}\n{output.out[-2000:]}{output.err[-2000:]}"


def test_every_command_is_in_a_readme():
    named = {command.words[1] for page in PAGES for command in commands(ROOT / page)}
    assert named >= COMMANDS.keys() - {"cancel"}  # which needs a job


def test_readmes_show_no_command_outside_of_tested_blocks():
    for page in PAGES:
        outside_blocks = re.sub(
            r"^```sh$.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S
        )
        assert not re.findall(r"^evspan .*", outside_blocks, flags=re.M), page
