"""`training.batch_size=auto`: a search over pretended memories, and a real probe."""

import math
import os
from dataclasses import replace

import pytest
import torch
from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EngineKind,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.launch.cli.config_arguments import parse_config_arguments
from evspan.pipeline.checkpoint_files import dump_with_checksum
from evspan.pipeline.engine import batch_size
from evspan.pipeline.engine.batch_size import (
    Probe,
    _stored_batch_size,
    memory_limit,
    search,
    with_batch_size,
)
from evspan.pipeline.engine.cgroup_memory import cgroup_memory_limit
from evspan.pipeline.engine.trainer import _write_config, train
from evspan.pipeline.metrics_log import read_metrics
from support.one_rank import open_one_rank
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")


def searched(fixed, per_lane, *, unit=1, most=10_000, speed=None):
    """(result, sizes that were tried) on a memory of size 1."""
    tried = []

    def measure(lanes):
        tried.append(lanes)
        frames_per_s = speed(lanes) if speed else float(lanes)
        return Probe(lanes, fixed + per_lane * lanes, frames_per_s)

    return search(measure, unit=unit, most=most, faster=speed is not None), tried


@pytest.mark.parametrize("unit", [1, 2, 3, 8])
@pytest.mark.parametrize("per_lane", [0.1, 0.03, 0.0042, 0.0007])
@pytest.mark.parametrize("fixed", [0.0, 0.15])
def test_it_nearly_fills_the_memory_and_never_exceeds_it(fixed, per_lane, unit):
    if fixed + per_lane * unit > 1:
        return
    lanes, tried = searched(fixed, per_lane, unit=unit)
    assert lanes in tried
    assert lanes % unit == 0
    assert all(fixed + per_lane * size <= 1 for size in tried)  # not even while it searches
    next_lanes = lanes + max(unit, lanes // 8) + unit
    assert fixed + per_lane * next_lanes > 1


def test_the_lanes_are_bounded_and_stop_where_more_are_no_faster():
    assert searched(0.1, 1e-6, most=100)[0] >= 88
    assert searched(0.1, 1e-6, most=100)[0] <= 100
    assert searched(0.1, 1e-6, unit=4, most=3)[0] == 4
    assert searched(0.1, 0.001, speed=lambda lanes: min(lanes, 8))[0] == 8


def test_memory_that_grows_faster_than_the_first_sizes_show_is_not_chosen():
    def measure(lanes):
        return Probe(lanes, 0.1 + 0.001 * lanes**1.6, 1.0)

    lanes = search(measure, unit=1, most=10_000, faster=False)
    assert measure(lanes).filled <= 1


def test_too_little_memory_for_one_lane_is_refused():
    with pytest.raises(UserError, match=r"2 lanes need 170% of the memory. Lower"):
        searched(0.0, 1.0, unit=2)


def test_the_word_auto_is_a_number_in_the_config():
    words = ["training.batch_size=auto", "run_dir=training.batch_size=auto"]
    assert parse_config_arguments(words, "evspan train").argv == (
        "training.batch_size=0",
        "run_dir=training.batch_size=auto",
    )


def test_a_gpu_counts_what_is_free_and_what_torch_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 30)
    assert memory_limit(torch.device("cuda", 0), 4) == 7 << 30


def test_the_ranks_of_a_machine_divide_its_memory(monkeypatch):
    monkeypatch.setattr(batch_size, "cgroup_memory_limit", lambda: None)
    one = memory_limit(torch.device("cpu"), 1)
    assert memory_limit(torch.device("cpu"), 4) < one / 2
    monkeypatch.setattr(batch_size, "cgroup_memory_limit", lambda: 4 << 20)
    assert memory_limit(torch.device("cpu"), 4) == 1 << 20


def test_the_ranks_of_a_machine_are_those_of_any_launcher(shards, tmp_path, monkeypatch):
    """SLURM does not set LOCAL_WORLD_SIZE."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    limits = []
    monkeypatch.setattr(batch_size, "cgroup_memory_limit", lambda: 4 << 20)
    monkeypatch.setattr(
        batch_size, "_measured", lambda *args: limits.append(args[-1]) or Probe(args[-2], 1.0, 1.0)
    )
    auto = small_config(shards, tmp_path / "auto", lanes=0)
    with open_one_rank() as world:
        with_batch_size(auto, replace(world, local_size=4), lambda _: pytest.fail("was opened"))
    assert set(limits) == {1 << 20}


def test_a_resume_has_the_number_of_the_newest_intact_checkpoint(tmp_path):
    """config.json may be cut off, and a checkpoint may be damaged."""
    checkpoints = tmp_path / "checkpoints"
    assert _stored_batch_size(tmp_path) == 0
    (tmp_path / "config.json").write_text('{"training": {"batch_size": 5}}')
    assert _stored_batch_size(tmp_path) == 0  # no checkpoint: of a run that saved nothing
    (checkpoints / "step-00000010").mkdir(parents=True)
    assert _stored_batch_size(tmp_path) == 5
    (tmp_path / "config.json").write_text('{"training": {"bat')
    assert _stored_batch_size(tmp_path) == 0
    for step, lanes in ((2, 3), (8, 7)):
        folder = checkpoints / f"step-{step:08d}"
        folder.mkdir()
        config = {"training": {"batch_size": lanes}}
        values = {"step": step, "config": config, "files": {}}
        (folder / "meta.json").write_bytes(dump_with_checksum(values))
    assert _stored_batch_size(tmp_path) == 7
    (checkpoints / "step-00000008" / "meta.json").write_text("{")
    assert _stored_batch_size(tmp_path) == 3


def test_the_config_is_replaced_as_a_whole(shards, tmp_path, monkeypatch):
    """A kill, or a full disk, leaves the one before."""
    config = small_config(shards, tmp_path, lanes=3)
    _write_config(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    config.training.batch_size = 2
    with pytest.raises(OSError, match="No space left"):
        _write_config(config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


V2 = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
V1 = "11:cpuset:/slurm/uid_0/job_7\n4:cpu,memory:/slurm/uid_0/job_7/step_0\n1:name=systemd:/x"


@pytest.mark.parametrize(
    ("table", "files", "limit"),
    [
        (V2, {"system.slice/slurmstepd.scope/job_7/memory.max": "300"}, 300),
        (V2, {"unified/system.slice/memory.max": "200", "memory.max": "max"}, 200),
        (V2, {"system.slice/memory.max": "500", "memory.max": "400"}, 400),
        (V2, {"other/memory.max": "100"}, None),
        (V1, {"memory/slurm/uid_0/job_7/memory.limit_in_bytes": "70"}, 70),
        (V1, {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 2**63 - 4096),
        (V1, {"cpuset/slurm/uid_0/job_7/memory.limit_in_bytes": "70"}, None),
        ("0::/../../job", {"memory.max": "60", "../memory.max": "50"}, 60),  # seen in a container
        ("", {"memory.max": "60"}, None),
    ],
)
def test_the_lowest_limit_of_all_groups_above_counts(tmp_path, table, files, limit):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    (tmp_path / "table").write_text(f"{table}\n")
    assert cgroup_memory_limit(root, tmp_path / "table") == limit
    assert cgroup_memory_limit(root, tmp_path / "none") is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return write_small_shards(folder / "shards", {"train": [23, 12, 9], "val": [12]})


def small_config(shards, run, *, lanes):
    return TrainConfig(
        run_dir=str(run),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            head=HeadConfig(num_classes=3),
        ),
        dataset=DatasetConfig(root=str(shards)),
        training=TrainingConfig(
            max_steps=2,
            batch_size=lanes,
            sequence_length=2,
            engine=EngineKind.plain,
            log_every=1,
            log_images_every=0,
            num_workers=0,
        ),
        evaluation=EvaluationConfig(batch_size=1, sequence_length=2, skip_first_ms=0),
        checkpoint=CheckpointConfig(every=100),
    )


def losses(run):
    return {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}


@pytest.mark.slow
def test_a_probed_run_equals_one_with_its_number_and_a_resume_keeps_it(
    shards, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    sizes = []
    monkeypatch.setattr(batch_size, "memory_limit", lambda *_: 100 / batch_size.FILLED)
    real = batch_size._seconds

    def seconds(open_trainer, config):
        sizes.append(config.training.batch_size)
        real(open_trainer, config)
        return 1.0

    monkeypatch.setattr(batch_size, "_seconds", seconds)
    monkeypatch.setattr(batch_size, "peak_bytes", lambda device: 20 + 25 * sizes[-1])
    auto = small_config(shards, tmp_path / "auto", lanes=0)
    auto.training.freeze = ["backbone.stages.0.*"]
    (tmp_path / "auto").mkdir()
    save_config(auto, tmp_path / "auto" / CONFIG_FILE)
    with open_one_rank() as world:
        train(auto, world)
        assert sizes == [1, 2, 3]
        assert caplog.text.count("frozen: ") == 1  # the probes log nothing of their own
        assert load_config(TrainConfig, tmp_path / "auto" / CONFIG_FILE).training.batch_size == 3
        given = small_config(shards, tmp_path / "given", lanes=3)
        given.training.freeze = auto.training.freeze
        train(given, world)
        assert losses(tmp_path / "auto") == losses(tmp_path / "given")
        assert not any(math.isnan(loss) for loss in losses(tmp_path / "auto").values())
        sizes.clear()
        again = with_batch_size(auto, world, lambda _: pytest.fail("probed again"))
        assert again.training.batch_size == 3
        over = replace(auto, checkpoint=replace(auto.checkpoint, resume=False))
        with pytest.raises(ZeroDivisionError):
            with_batch_size(over, world, lambda _: 1 // 0)
