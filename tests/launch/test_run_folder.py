"""Without run_dir, each run gets a folder of its own: runs/0001, runs/0002, ..."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.submit import main as submit
from evspan.launch.cli.train import main as train
from evspan.launch.local.run import run_training
from evspan.launch.local.run_folder import name_run_folder, numbered_folder
from support.small_shards import write_small_shards


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_numbers_go_on_from_the_highest_and_the_last_one_is_named(here, caplog):
    logging.getLogger("evspan").propagate = True
    caplog.set_level(logging.INFO, "evspan")
    assert numbered_folder(Path("runs")) == Path("runs/0001")
    assert caplog.messages == ["new folder runs/0001"]
    Path("runs/0041").mkdir()
    Path("runs/0900-old").mkdir()
    assert numbered_folder(Path("runs")) == Path("runs/0042")
    assert caplog.messages[-1] == (
        "new folder runs/0042; to continue the one before: run_dir=runs/0041"
    )


def test_commands_that_start_at_once_get_different_folders(here):
    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(lambda _: numbered_folder(Path("runs")), range(24))]
    assert sorted(folders) == [Path(f"runs/{number:04d}") for number in range(1, 25)]
    assert sorted(Path("runs").iterdir()) == sorted(folders)


def test_a_run_dir_that_is_given_is_kept_and_a_dry_run_makes_none(here):
    given = TrainConfig(run_dir="mine")
    name_run_folder(given)
    assert given.run_dir == "mine"
    dry = TrainConfig()
    name_run_folder(dry, create=False)
    assert dry.run_dir == "runs/0001"
    assert list(here.iterdir()) == []


def test_the_ranks_of_another_launcher_need_a_run_dir(here, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "77")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="with torchrun or srun, name a folder"):
        run_training(TrainConfig())


@pytest.mark.slow
def test_train_and_submit_choose_it_after_their_checks(here, monkeypatch):
    shards = write_small_shards(here / "shards", {"train": [23], "val": [12]})
    trained = []
    monkeypatch.setattr("evspan.launch.local.run.train_rank", trained.append)
    arguments = ["experiment=demo", "parallel.ranks=1"]
    for _ in range(2):
        train([*arguments, f"dataset.root={shards}"])
    assert [config.run_dir for config in trained] == ["runs/0001", "runs/0002"]
    with pytest.raises(SystemExit):
        train([*arguments, "dataset.root=missing"])
    assert sorted(path.name for path in Path("runs").iterdir()) == ["0001", "0002"]
    submitted = []
    monkeypatch.setattr(
        "evspan.launch.sweep.submit.submit_planned",
        lambda runs, *_, smoke: submitted.extend(runs) or 0,
    )
    submit([*arguments, f"dataset.root={shards}", "cluster=local"])
    assert [run.folder for run in submitted] == [Path("runs/0003")]
    assert submitted[0].config.run_dir == "runs/0003"
