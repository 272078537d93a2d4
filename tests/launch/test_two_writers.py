"""Commands that would write into one folder: one wins, the others name it and write nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evspan.conf.compose import compose
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.folder_lock import FolderInUseError
from evspan.conf.lock_holder import Holder
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli import submit, sweep
from evspan.launch.local.run import run_training
from evspan.launch.local.sequential import run_sequentially
from evspan.launch.sweep.plan import PlannedRun
from evspan.pipeline.history import append, read
from support import race_commands
from support.slurm_cluster import Cluster
from support.slurm_runs import evspan, keys
from support.slurm_shim import SlurmShim

pytestmark = pytest.mark.slow
SHARD_FRAMES = {"train": [24, 20], "val": [12]}


def tiny(shards: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run of two steps."""
    return [
        f"dataset.root={shards}",
        f"run_dir={run}",
        "size=micro",
        "training.max_steps=2",
        "training.batch_size=2",
        "training.sequence_length=2",
        "training.num_workers=1",
        "training.evaluate_every=0",
        "training.log_images_every=0",
        "checkpoint.every=1",
        *more,
    ]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder, with the contents of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if ".locks" not in path.parts
    }


@pytest.fixture
def slurm_shim(tmp_path, monkeypatch) -> SlurmShim:
    shim = SlurmShim(tmp_path / "bin")
    monkeypatch.setenv("PATH", shim.path)
    return shim


# -- refusals ------------------------------------------------------------------------------------
def test_training_is_refused_before_it_writes(shards, tmp_path):
    run = tmp_path / "run"
    config = compose(TrainConfig, tiny(shards, run))
    holder = Holder.current("evspan train")
    (run / ".locks").mkdir(parents=True)
    (run / ".locks" / "000001").write_text(
        json.dumps({**holder.to_json(), "host": "n9", "boot": "b"})
    )
    (run / "config.yaml").write_text("of the other")
    before = tree(run)
    with pytest.raises(FolderInUseError, match="on n9"):
        run_training(config)
    assert tree(run) == before


def test_training_in_the_folder_of_a_queued_run_is_refused(shards, tmp_path, slurm_shim):
    run = tmp_path / "run"
    submit.main([*tiny(shards, run), "cluster=slurm", "cluster.detach=true"])
    before = tree(run)
    with pytest.raises(UserError, match=r"SLURM already has .*run \(job 1\)"):
        run_training(compose(TrainConfig, tiny(shards, run, "optimizer.lr=1e-4")))
    with pytest.raises(SystemExit) as end:
        submit.main([*tiny(shards, run), "cluster=slurm", "cluster.detach=true"])
    assert end.value.code == 2
    assert tree(run) == before
    assert slurm_shim.jobs() == 1


def test_a_sweep_that_runs_can_be_extended(shards, tmp_path, slurm_shim, caplog):
    """Its queued runs are left alone, and the new one is submitted."""
    folder = tmp_path / "sweep"
    words = [*tiny(shards, folder), "cluster=slurm", "cluster.detach=true"]
    sweep.main([*words, "seed=1,2"])
    before = tree(folder / "0")
    sweep.main([*words, "seed=1,2,3"])
    assert slurm_shim.jobs() == 2
    assert tree(folder / "0") == before
    assert json.loads((folder / "2" / "submitted.json").read_text())["job"].startswith("2")
    assert caplog.text.count("left alone: SLURM already has") == 2
    with pytest.raises(SystemExit):  # nothing is left to submit
        sweep.main([*words, "seed=1,2,3"])
    assert slurm_shim.jobs() == 2


def test_a_run_in_use_is_left_alone_by_a_local_sweep(shards, tmp_path, caplog):
    config = compose(TrainConfig, tiny(shards, tmp_path / "0"))
    run = PlannedRun(tmp_path / "0", [], config)
    holder = {**Holder.current("evspan train").to_json(), "host": "n9", "boot": "b"}
    (run.folder / ".locks").mkdir(parents=True)
    (run.folder / ".locks" / "000001").write_text(json.dumps(holder))
    append(run.folder, "start", step=0)
    before = tree(run.folder)
    assert run_sequentially([run]) == 1
    assert tree(run.folder) == before
    assert "on n9" in caplog.text


# -- dry runs, nested runs -----------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", ["slurm", "local"])
def test_a_dry_run_writes_nothing(shards, tmp_path, scheduler, capfd):
    """Neither into its folder nor anywhere else."""
    folder = tmp_path / "out"
    before = tree(tmp_path)
    words = [f"cluster={scheduler}", "cluster.dry_run=true"]
    submit.main([*tiny(shards, folder), *words])
    sweep.main([*tiny(shards, folder), *words, "seed=1,2"])
    with pytest.raises(SystemExit):  # one of the runs is refused
        sweep.main([*tiny(shards, folder), *words, "optimizer.lr=1e-3,-1"])
    assert tree(tmp_path) == before
    assert not folder.exists()
    output, messages = capfd.readouterr()
    assert f"{folder}/1" in output
    assert "optimizer.lr" in messages


def test_a_sweep_does_not_nest_into_a_run(shards, tmp_path, monkeypatch, slurm_shim):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    append(run, "start", step=0)
    before = tree(run)
    with pytest.raises(SystemExit) as end:
        sweep.main([*tiny(shards, run), "seed=1,2", "cluster=slurm", "cluster.detach=true"])
    assert end.value.code == 2
    assert tree(run) == before
    # Nor a run into a sweep.
    sweep.main([*tiny(shards, tmp_path / "s"), "seed=1,2", "cluster=slurm", "cluster.detach=true"])
    with pytest.raises(ConfigError, match="folder of a sweep"):
        run_training(compose(TrainConfig, tiny(shards, tmp_path / "s")))
    table = json.loads((tmp_path / "s" / "sweep.json").read_text())["runs"]
    assert [row["folder"] for row in table] == ["0", "1"]


# -- races ---------------------------------------------------------------------------------------
def contest(kind: str, shards: Path, folder: Path) -> list[list[str]]:
    """Two commands that write into one folder."""
    run = tiny(shards, folder)
    queued = ["cluster=slurm", "cluster.detach=true"]
    return {
        "train": [["train", *run], ["train", *run]],
        "submit": [["submit", *run, *queued], ["submit", *run, *queued]],
        "sweep": [["sweep", *run, *queued, "seed=1,2"], ["sweep", *run, *queued, "seed=1,2"]],
        "local": [["train", *run], ["submit", *run, *queued]],
    }[kind]


def run_races(kinds: list[str], shards: Path, folder: Path, shim: SlurmShim) -> list[str]:
    """Runs a race of each kind and checks its result. Returns a line per race."""
    folders = [folder / f"{kind}-{number}" for number, kind in enumerate(kinds)]
    races = [contest(kind, shards, path) for kind, path in zip(kinds, folders, strict=True)]
    done = subprocess.run(
        [sys.executable, race_commands.__file__],
        input=json.dumps(races),
        env={**os.environ, "PATH": shim.path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = []
    jobs = 0
    for kind, path, results in zip(kinds, folders, json.loads(done.stdout), strict=True):
        codes = [code for code, _ in results]
        assert sorted(codes) == [0, 2], results
        winner, loser = results[codes.index(0)][1], results[codes.index(2)][1]
        error = next(line for line in loser.splitlines() if line.startswith("error: "))
        pid = winner.splitlines()[0]
        assert f"{pid} on " in error or re.search(r"SLURM already has .*\(job \d", error), error
        if kind in ("train", "local") and "resumes" not in winner and "starts at" in winner:
            assert [e["event"] for e in read(path)][-1] == "done"
            assert not list(path.glob("checkpoints/.writing*"))
        elif kind == "sweep":
            jobs += 1
            table = json.loads((path / "sweep.json").read_text())["runs"]
            assert [row["folder"] for row in table] == ["0", "1"]
        else:
            jobs += 1
            assert json.loads((path / "submitted.json").read_text())["job"] == str(jobs)
        lines.append(f"{kind}: {error}")
    assert shim.jobs() == jobs
    return lines


@pytest.mark.timeout(300)
def test_one_command_wins(shards, tmp_path, slurm_shim):
    run_races(["submit", "sweep"], shards, tmp_path / "runs", slurm_shim)


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_fifty_races(shards, tmp_path, slurm_shim):
    kinds = ["train"] * 13 + ["submit"] * 13 + ["sweep"] * 12 + ["local"] * 12
    lines = run_races(kinds, shards, tmp_path / "runs", slurm_shim)
    assert len(lines) == 50
    print("\n".join(lines[::6]))


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_races_on_slurm(cluster: Cluster, shards, tmp_path):
    """Simultaneous submissions, and a local run while the folder's job waits or runs."""
    for number in range(3):
        run = tmp_path / str(number)
        words = keys(shards, run, "training.max_steps=4", "cluster.detach=true")
        before = cluster.jobs()
        processes = [evspan(cluster, "submit", *words) for _ in range(2)]
        results = [(p.communicate(timeout=120)[1], p.returncode) for p in processes]
        assert sorted(code for _, code in results) == [0, 2], results
        assert len(cluster.submitted_since(before)) == 1
        local = evspan(cluster, "train", *words)
        error = local.communicate(timeout=120)[1]
        assert local.returncode == 2, error
        assert "SLURM already has" in error or "is in use by" in error
        print(error.strip())
    cluster.end_jobs()
