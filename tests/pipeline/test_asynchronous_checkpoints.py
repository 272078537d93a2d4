"""Checkpoints that a thread writes are those of a synchronous save, and are committed or absent."""

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from evspan.conf.errors import STOPPED_EXIT_CODE, UserError
from evspan.conf.schema.prep import DatasetConfig, FrameConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.checkpoint_files import find_newest_intact
from evspan.pipeline.engine.checkpoints import THREAD, Checkpoints, Snapshot
from evspan.pipeline.engine.plain_engine import PlainEngine
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.step_report import StepReport
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.history import read
from evspan.pipeline.weights import Weights
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8
EVERY = 3
EVALUATED = 6
WAIT_S = 60.0  # of a thread for what must happen


@pytest.fixture(scope="module")
def world() -> Iterator[object]:
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("data"), {"train": [23, 12], "val": [5]})


def config(shards: Path, run: Path, *, asynchronous: bool) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            max_steps=STEPS,
            batch_size=2,
            sequence_length=2,
            log_every=100,
            evaluate_every=EVALUATED,
            num_workers=1,
            max_nonfinite=2,
        ),
        evaluation=EvaluationConfig(batch_size=1, sequence_length=2, skip_first_ms=0, at_end=False),
        checkpoint=CheckpointConfig(every=EVERY, keep=9, asynchronous=asynchronous),
    )


def run_attempt(
    train_config: TrainConfig,
    world: object,
    on_step: Callable[[Trainer, int], None] | None = None,
    stop_flag: StopFlag | None = None,
) -> int:
    """Trains in this process. Returns the exit code."""

    def report(step: StepReport) -> None:
        if on_step is not None:
            on_step(trainer, step.step)

    trainer = Trainer(train_config, world, PlainEngine, on_step=report)
    try:
        trainer.run(stop_flag or StopFlag())
    except SystemExit as end:
        return int(end.code)
    finally:
        trainer.close()
    return 0


def contents(run: Path) -> dict[str, object]:
    """All files below the checkpoints by path, without times and the run's own folder."""
    files: dict[str, object] = {}
    for path in sorted((run / "checkpoints").rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            values.pop("xxh3")
            values.pop("checkpoint", None)
            if path.name == "meta.json":
                del values["config"]["run_dir"], values["config"]["checkpoint"]
                del values["limits"]["seconds"]
            files[name] = values
        elif path.is_file():
            files[name] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def synchronous(shards, world, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("synchronous") / "run"
    assert run_attempt(config(shards, run, asynchronous=False), world) == 0
    return run


class SlowDisk:
    """Holds the thread that writes until `release`, and notes what is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write = threading.Event()
        self.writing = threading.Event()
        self.threads: list[str] = []
        real = Checkpoints._write

        def write(checkpoints, folder, snapshot):
            self.threads.append(threading.current_thread().name)
            self.writing.set()
            assert self.may_write.wait(WAIT_S)
            return real(checkpoints, folder, snapshot)

        monkeypatch.setattr(Checkpoints, "_write", write)


@pytest.mark.slow
def test_a_thread_writes_the_files_of_a_synchronous_save(shards, world, tmp_path, synchronous):
    assert run_attempt(config(shards, tmp_path / "run", asynchronous=True), world) == 0
    expected = contents(synchronous)
    actual = contents(tmp_path / "run")
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []
    steps = {name.split("/")[1] for name in expected if "/step-" in name}
    assert len(steps) == len(range(EVERY, STEPS, EVERY)) + 1  # and the last step
    assert any(name.endswith("metrics.json") for name in expected)


@pytest.mark.slow
def test_training_goes_on_while_the_files_are_written(
    shards, world, tmp_path, synchronous, monkeypatch
):
    """The weights change meanwhile; what is written are those of the step."""
    disk = SlowDisk(monkeypatch)
    run = tmp_path / "run"
    seen: dict[int, bool] = {}

    def on_step(trainer: Trainer, step: int) -> None:
        seen[step] = (run / "checkpoints" / "latest").exists()
        if step == EVERY + 2:
            disk.may_write.set()

    assert run_attempt(config(shards, run, asynchronous=True), world, on_step) == 0
    assert not any(seen[step] for step in range(1, EVERY + 3))
    assert set(disk.threads) == {THREAD}
    assert contents(run) == contents(synchronous)


def test_it_is_committed_between_steps_once_all_ranks_have_written(shards, world, tmp_path):
    """No later save, evaluation or end is needed."""
    run = tmp_path / "run"
    train_config = config(shards, run, asynchronous=True)
    train_config.training.evaluate_every = 0
    train_config.training.max_steps = 6
    train_config.checkpoint.every = 1
    committed: list[str] = []

    def on_step(trainer: Trainer, step: int) -> None:
        trainer.config.checkpoint.every = 1 if step == 1 else 100
        if trainer.checkpoints.pending is not None:
            trainer.checkpoints.pending.task.exception(WAIT_S)  # this phase is done
        latest = run / "checkpoints" / "latest"
        committed.append(latest.read_text().strip() if latest.exists() else "")

    assert run_attempt(train_config, world, on_step) == 0
    assert committed[-1] == "step-00000001"


@pytest.mark.slow
def test_a_second_save_waits_for_the_first(shards, world, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    run = tmp_path / "run"
    saves: list[str] = []
    real = Checkpoints.wait

    def wait(checkpoints: Checkpoints) -> None:
        if checkpoints.pending is not None:
            saves.append(checkpoints.pending.name)
            assert disk.writing.wait(WAIT_S)
            disk.may_write.set()
        real(checkpoints)

    monkeypatch.setattr(Checkpoints, "wait", wait)
    assert run_attempt(config(shards, run, asynchronous=True), world) == 0
    assert saves[0] == f"step-{EVERY:08d}"
    assert find_newest_intact(run).name == f"step-{STEPS:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("at", [EVERY, EVERY + 1])  # in the step that is saved, or the next one
def test_a_stop_signal_waits_for_what_is_written(
    shards, world, tmp_path, synchronous, monkeypatch, at
):
    disk = SlowDisk(monkeypatch)
    flag = StopFlag()
    run = tmp_path / "run"
    real = Checkpoints.wait

    def wait(checkpoints: Checkpoints) -> None:
        if checkpoints.pending is not None:
            disk.may_write.set()
        real(checkpoints)

    def on_step(trainer: Trainer, step: int) -> None:
        if step == at:
            flag.request()

    monkeypatch.setattr(Checkpoints, "wait", wait)
    train_config = config(shards, run, asynchronous=True)
    assert run_attempt(train_config, world, on_step, flag) == STOPPED_EXIT_CODE
    saved = read(run)[-1]
    assert saved["event"] == "saved"
    assert find_newest_intact(run).name == f"step-{saved['step']:08d}"
    assert run_attempt(train_config, world) == 0
    expected = contents(synchronous)
    actual = contents(run)
    names = [name for name in expected if f"step-{STEPS:08d}" in name]
    assert names
    assert [name for name in names if actual[name] != expected[name]] == []


FULL = (OSError(28, "No space left on device", "weights"), "weights: No space left on device")
STALE = (OSError(116, "Stale file handle", "weights"), "weights: Stale file handle")
WRONG = (ValueError("a tensor of another dtype"), "ValueError: a tensor of another dtype")


@pytest.mark.parametrize(
    ("asynchronous", "phase", "error", "reason"),
    [
        (True, "_write", *FULL),
        (True, "_write", *WRONG),
        (True, "_commit", *FULL),
        (True, "_commit", *STALE),
        (False, "_write", *FULL),
    ],
)
def test_a_failure_ends_the_run_with_one_message(
    shards, world, tmp_path, monkeypatch, asynchronous, phase, error, reason
):
    """It is raised between steps, long before the next save."""
    real = getattr(Checkpoints, phase)
    calls: list[str] = []
    steps: list[int] = []

    def fail(checkpoints, *args):
        calls.append(threading.current_thread().name)
        if len(calls) == 2:
            raise error
        return real(checkpoints, *args)

    def on_step(trainer: Trainer, step: int) -> None:
        steps.append(step)
        trainer.config.checkpoint.every = 1 if step <= 2 else 100
        if step > 2 and trainer.checkpoints.pending is not None:
            trainer.checkpoints.pending.task.exception(WAIT_S)

    monkeypatch.setattr(Checkpoints, phase, fail)
    train_config = config(shards, tmp_path / "run", asynchronous=asynchronous)
    train_config.training.max_steps = 20
    train_config.training.evaluate_every = 0
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(
        UserError,
        match=f"^the checkpoint could not be saved: {reason}. Earlier checkpoints are still in "
        f"{folder}; .*, then run the same command again$",
    ) as raised:
        run_attempt(train_config, world, on_step)
    is_transient = error is STALE[0]
    remedy = "check the file system" if is_transient else "free space or correct the permissions"
    assert f"{folder}; {remedy}, then" in str(raised.value)
    assert raised.value.is_transient is is_transient
    assert (calls[1] == THREAD) is asynchronous
    assert steps[-1] <= 8
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    world, tmp_path, monkeypatch, caplog, asynchronous
):
    """As on NFS while a process has a file open: deleting leaves `.nfsXXXX`, and the folder."""
    real = shutil.rmtree
    is_open = True

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not is_open or not Path(path).exists():
            real(path, ignore_errors=ignore_errors)
            return
        for file in Path(path).iterdir():
            file.unlink()
        (Path(path) / ".nfs0001").touch()
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoints = Checkpoints(tmp_path, rank=0, keep=1, asynchronous=asynchronous)
    for step in (1, 2, 3, 3):  # the last one again, after a resume from an older one
        checkpoints.save(step, snapshot(step))
        checkpoints.wait()
        assert find_newest_intact(tmp_path).name == f"step-{step:08d}"
    assert caplog.text.count("an old checkpoint could not be deleted") == 1
    assert "/.deleting-step-00000001: Directory not empty" in caplog.text
    # The next attempt, which also finds the unfinished folder of a kill.
    (checkpoints.folder / ".writing-step-00000004").mkdir()
    again = Checkpoints(tmp_path, rank=0, keep=1, asynchronous=asynchronous)
    again.save(4, snapshot(4))
    again.wait()
    assert find_newest_intact(tmp_path).name == "step-00000004"
    is_open = False
    again.save(5, snapshot(5))
    again.wait()
    assert sorted(path.name for path in again.folder.iterdir()) == ["latest", "step-00000005"]


@pytest.mark.slow
def test_an_error_of_training_does_not_commit_and_too_many_nonfinite_losses_do(
    shards, world, tmp_path, monkeypatch
):
    def break_down(trainer: Trainer, step: int) -> None:
        if step == EVERY + 1:
            raise RuntimeError("out of memory")

    def poison(trainer: Trainer, step: int) -> None:
        if step == EVERY:
            with torch.no_grad():
                for parameter in trainer.engine.module.parameters():
                    parameter.fill_(torch.nan)

    held = SlowDisk(monkeypatch)
    threading.Timer(0.2, held.may_write.set).start()
    with pytest.raises(RuntimeError, match="out of memory"):
        run_attempt(config(shards, tmp_path / "a", asynchronous=True), world, break_down)
    assert find_newest_intact(tmp_path / "a").name is None
    assert not any(thread.name == THREAD for thread in threading.enumerate())
    train_config = config(shards, tmp_path / "b", asynchronous=True)
    with pytest.raises(UserError, match="not finite 2 times in a row"):
        run_attempt(train_config, world, poison)
    assert find_newest_intact(tmp_path / "b").name == f"step-{EVERY:08d}"


def test_the_folder_of_the_run_before_is_kept_until_the_commit(world, tmp_path):
    """checkpoint.resume=false: the config is changed after the checkpoint is there."""
    before = Checkpoints(tmp_path, rank=0, keep=2)
    before.save(9, snapshot(9))
    started: list[bool] = []
    again = Checkpoints(
        tmp_path,
        rank=0,
        keep=2,
        start_over=True,
        started_over=lambda: started.append((again.folder / "step-00000001").exists()),
        asynchronous=True,
    )
    again.save(1, snapshot(1))
    again.save(2, snapshot(2))
    again.wait()
    assert started == [True]
    assert find_newest_intact(tmp_path).name == "step-00000002"
    assert (again.folder / "former-1" / "step-00000009").is_dir()


def snapshot(step: int) -> Snapshot:
    weights = Weights(
        {"w": torch.full((8,), float(step))}, ModelConfig(), FrameConfig(), ["ball"], step
    )
    meta = {"skipped": 0, "counters": {}, "config": {}}
    return Snapshot(meta, weights, {}, range(2), [torch.zeros(2, 3, 1, 1)])
