"""A stop signal outside of a training step: the run ends at once, and continues as if undisturbed."""

import json
import logging
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.device_batches import one_ahead
from evspan.pipeline.data.loader import Loader, ReadingStoppedError, read_ahead
from evspan.pipeline.engine import run_reporter
from evspan.pipeline.engine import trainer as trainer_module
from evspan.pipeline.engine.checkpoints import Checkpoints
from evspan.pipeline.engine.plain_engine import PlainEngine
from evspan.pipeline.engine.signals import StopFlag, catch_stop_signals
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.history import ACTIVITY, read
from evspan.pipeline.inference import streaming
from safetensors.torch import load_file
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
EVALUATED = (2, 4)


@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    counts = {"train": [9, 8], "val": [7, 2, 3]}
    return write_small_shards(tmp_path_factory.mktemp("data"), counts)


def config(shards: Path, run: Path, images: bool = False) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            fpn=FpnConfig(enable_small_object_attention=True, identity_init=False),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            max_steps=STEPS,
            batch_size=2,
            sequence_length=2,
            log_every=1,
            log_images_every=3 if images else 0,
            evaluate_every=EVALUATED[0],
            num_workers=1,
        ),
        evaluation=EvaluationConfig(
            batch_size=1,
            sequence_length=2,
            skip_first_ms=0,
            confidence_threshold=1e-5,  # a new detector gives all predictions about 1e-4
        ),
        checkpoint=CheckpointConfig(every=100, keep=9),
    )


def attempt(shards: Path, run: Path, world, flag: StopFlag, *, images: bool = False) -> int:
    """The exit code of one attempt."""
    trainer = Trainer(config(shards, run, images), world, PlainEngine)
    try:
        trainer.run(flag)
    except SystemExit as end:
        return end.code
    finally:
        trainer.close()
    return 0


def losses(run: Path) -> dict[str, object]:
    """All that a run ends with."""
    checkpoints = run / "checkpoints"
    values: dict[str, object] = {}
    for step in EVALUATED:
        metrics = json.loads((checkpoints / f"step-{step:08d}" / "metrics.json").read_text())
        del metrics["checkpoint"], metrics["xxh3"]  # of the file, which names the folder
        values[f"metrics {step}"] = metrics
    for path in (run / "evaluation").glob("*_bbox.npy"):  # of the last evaluation
        values[path.name] = np.load(path).tolist()
    for name in ("weights", "moments"):
        tensors = load_file(checkpoints / f"step-{STEPS:08d}" / f"{name}.safetensors")
        values |= {key: tensor.tolist() for key, tensor in tensors.items()}
    return values


@pytest.fixture(scope="module")
def undisturbed(shards, world, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    assert attempt(shards, run, world, StopFlag()) == 0
    result = losses(run)
    for step in EVALUATED:
        assert result[f"metrics {step}"]["ap"] > 0
    return result


@contextmanager
def requesting(flag: StopFlag, owner: object, name: str, call: int, patch):
    """Requests a stop in the n-th call of a function."""
    real = getattr(owner, name)
    calls = []

    def function(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            flag.request()
        return real(*args, **kwargs)

    with patch.context() as context:
        context.setattr(owner, name, function)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call", "step", "left_out"),
    [
        (streaming, "_add_results", 1, 2, True),  # between chunks of the first evaluation
        (streaming, "_add_results", 7 + 1, 4, True),  # of the last one
        (run_reporter, "write_evaluation", 1, 2, False),  # complete but for its files
        (Checkpoints, "save", 1, 2, True),
        (trainer_module, "probe", 1, 3, False),
    ],
)
def test_it_continues_as_if_undisturbed(
    shards, world, tmp_path, monkeypatch, undisturbed, owner, name, call, step, left_out
):
    flag = StopFlag()
    with requesting(flag, owner, name, call, monkeypatch):
        code = attempt(shards, tmp_path, world, flag, images=name == "probe")
    assert code == STOPPED_EXIT_CODE
    assert read(tmp_path)[-1]["event"] == "saved"
    assert read(tmp_path)[-1]["step"] == step
    newest = (tmp_path / "checkpoints" / "latest").read_text().strip()
    assert newest == f"step-{step:08d}"
    if step in EVALUATED:
        assert (tmp_path / "checkpoints" / newest / "metrics.json").exists() is not left_out
    assert attempt(shards, tmp_path, world, StopFlag()) == 0
    assert losses(tmp_path) == undisturbed
    starts = [event["step"] for event in read(tmp_path) if event["event"] == "start"]
    assert starts == [0, step]
    assert json.loads((tmp_path / ACTIVITY).read_text())["activity"] == "training"


def three_steps(shards: Path, folder: Path, accumulation: int) -> TrainConfig:
    run_config = config(shards, folder)
    run_config.training.gradient_accumulation_steps = accumulation
    run_config.training.evaluate_every = 0
    run_config.training.max_steps = 3
    return run_config


@pytest.fixture(scope="module")
def checkpoints_by_accumulation(shards, world, tmp_path_factory) -> dict[int, Path]:
    """Micro-batches of a step -> the checkpoints after each step of a run that nothing stops."""
    folders = {}
    for accumulation in (1, 2):
        run_config = three_steps(shards, tmp_path_factory.mktemp("undisturbed"), accumulation)
        run_config.checkpoint.every = 1
        trainer = Trainer(run_config, world, PlainEngine)
        try:
            trainer.run(StopFlag())
        finally:
            trainer.close()
        folders[accumulation] = trainer.run_dir / "checkpoints"
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 100])  # the host reads a step at its end, or a step late
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ahead", [0, 1])  # batches that are requested early, as for a GPU
def test_a_step_without_its_data_is_left_out(
    shards,
    world,
    tmp_path,
    monkeypatch,
    checkpoints_by_accumulation,
    log_every,
    accumulation,
    ahead,
):
    """The loader hangs in step 3; the run is saved as it was after step 2."""
    if ahead:
        monkeypatch.setattr(trainer_module, "batches_ahead", lambda device: ahead)
        monkeypatch.setattr(trainer_module, "device_batches", lambda read, device: one_ahead(read))
    monkeypatch.setattr(trainer_module, "DATA_WAIT_S", 0.2)
    flag = StopFlag()
    release = threading.Event()
    real = Loader.batch
    micro_batches = 0

    def batch(loader: Loader, index: int) -> Batch:
        if index == 2 * accumulation and not release.is_set():
            release.wait(120)
        return real(loader, index)

    class StopInStepThree(trainer_module.DataWait):
        def start(self, *, may_end: bool) -> None:
            nonlocal micro_batches
            super().start(may_end=may_end)
            micro_batches += 1
            if micro_batches == 2 * accumulation + 1 - ahead:
                flag.request()

    def run(stop_flag: StopFlag) -> int:
        run_config = three_steps(shards, tmp_path, accumulation)
        run_config.training.log_every = log_every
        run_config.checkpoint.every = 100
        trainer = Trainer(run_config, world, PlainEngine)
        try:
            trainer.run(stop_flag)
        except SystemExit as end:
            assert trainer.skipped == 0
            return end.code
        finally:
            trainer.close()
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", batch)
        patch.setattr(trainer_module, "DataWait", StopInStepThree)
        assert run(flag) == STOPPED_EXIT_CODE
    release.set()
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000002"]
    assert run(StopFlag()) == 0
    undisturbed = checkpoints_by_accumulation[accumulation]
    for step in (2, 3):
        for path in (checkpoints / f"step-{step:08d}").glob("*.safetensors"):
            expected = load_file(undisturbed / path.parent.name / path.name)
            actual = load_file(path)
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[key], expected[key]) for key in actual), path.name


def test_what_was_requested_before_an_error_is_passed_on():
    requested = []

    def items():
        for number in range(3):
            requested.append(number)
            yield number
        raise ReadingStoppedError

    ahead = one_ahead(items())
    assert next(ahead) == 0
    assert requested == [0, 1]
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ReadingStoppedError):
        next(ahead)
    assert list(one_ahead(iter([]))) == []
    assert list(one_ahead("abc")) == ["a", "b", "c"]


def test_a_rank_that_waits_for_data_leaves_on_a_request():
    release = threading.Event()

    def read_item(item: int) -> int:
        if item == 2:
            release.wait(120)
        return item

    flag = StopFlag()
    flag.request()
    results = read_ahead(read_item, range(9), 1, flag.is_set)
    assert [next(results), next(results)] == [0, 1]  # what has arrived is used
    with pytest.raises(ReadingStoppedError):
        next(results)
    release.set()


def test_ctrl_c_while_output_is_written_is_reported_after_it(caplog):
    """A buffered stream raises where a signal handler writes inside of a write."""
    caplog.set_level(logging.INFO, "evspan")
    with catch_stop_signals() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        for thread in threading.enumerate():
            if thread.name == "evspan-ctrl-c":
                thread.join()
    (record,) = caplog.records
    assert record.message.startswith("Ctrl-C: saves at the end of this step")
    assert record.thread != threading.get_ident()
