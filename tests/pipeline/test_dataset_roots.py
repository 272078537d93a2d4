"""Several datasets in one run: classes, frames, names, and how often each is read."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from evspan.conf.compose import compose
from evspan.conf.errors import ConfigError, ShardError, UserError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind, DatasetRoot
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EngineKind,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    Precision,
    Sampling,
    TrainConfig,
    TrainingConfig,
)
from evspan.data_prep.shards.format import MANIFEST
from evspan.pipeline.data.datasets import IGNORED, open_dataset, root_labels
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import Part, SamplingPlan
from evspan.pipeline.data.requirements import open_scored, open_training
from evspan.pipeline.data.sampling import sampling_plan
from evspan.pipeline.data_digest import data_differences, data_digest
from evspan.pipeline.engine import start_lines
from evspan.pipeline.engine.evaluator import (
    describe_evaluation,
    evaluate_weights,
    write_results,
)
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.evaluation.breakdown import breakdown
from evspan.pipeline.inference.streaming import labelled
from evspan.pipeline.tensorboard.run_info import config_lines
from evspan.pipeline.weights import load_weights
from support.one_rank import open_one_rank
from support.rvt_tree import write_rvt_tree
from support.small_shards import CLASSES, write_small_shards

T = 4


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "night" / "shards"
    root.parent.mkdir()
    return write_small_shards(root, {"train": [23, 9], "val": [5]}, seed=1)


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "day" / "shards"
    root.parent.mkdir()
    return write_small_shards(root, {"train": [13, 6, 30]}, seed=2)


def roots(*entries, **config):
    return DatasetConfig(roots=[DatasetRoot(**entry) for entry in entries], **config)


# -- one dataset of several ------------------------------------------------------------------------
def test_recordings_of_all_roots_one_after_the_other(night, day):
    data = open_dataset(roots({"root": str(night)}, {"root": str(day), "weight": 3}), "train")
    assert [(r.name, r.frames) for r in data.recordings] == [
        ("night/train_000", 23),
        ("night/train_001", 9),
        ("day/train_000", 13),
        ("day/train_001", 6),
        ("day/train_002", 30),
    ]
    assert data.parts == [Part("night", 1, range(2)), Part("day", 3, range(2, 5))]
    assert data.classes == CLASSES
    alone = open_dataset(DatasetConfig(root=str(day)), "train")
    for recording, expected in zip(data.recordings[2:], alone.recordings, strict=True):
        assert np.array_equal(recording.read(0, 6), expected.read(0, 6))
        assert np.array_equal(recording.box_rows(0, 6)[0], expected.box_rows(0, 6)[0])


def test_a_root_may_lack_another_split_than_train(night, day):
    config = roots({"root": str(day)}, {"root": str(night)})
    data = open_scored(config, "val")
    assert [r.name for r in data.recordings] == ["night/val_000"]
    assert (data.height, data.width) == (60, 100)
    with pytest.raises(ShardError, match=rf"{day} has no recordings in split 'test'"):
        open_dataset(config, "test")


def test_one_root_is_what_dataset_root_is(night):
    single = DatasetConfig(root=str(night))
    listed = roots({"root": str(night), "weight": 7})
    data = open_training(listed, 3)
    assert [r.name for r in data.recordings] == ["train_000", "train_001"]
    expected = open_training(single, 3)
    assert data_digest(data, listed, "val") == data_digest(expected, single, "val")
    config = TrainingConfig(batch_size=4, sequence_length=T)
    plan, other = (sampling_plan(d, config, seed=3) for d in (data, expected))
    for lane in range(4):
        chunks = [plan.chunk(lane, i) for i in range(40)]
        assert chunks == [other.chunk(lane, i) for i in range(40)]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/a/night/shards", "/b/day/shards"], ["night", "day"]),
        (["x/shards", "x/other"], ["shards", "other"]),
        (["/a", "/a/b/a"], ["1", "2"]),
        (["/only"], [""]),
    ],
)
def test_labels_tell_folders_apart(paths, labels):
    assert root_labels(paths) == labels


# -- classes ---------------------------------------------------------------------------------------
def boxes_of(config, split="train"):
    data = open_dataset(config, split)
    rows = [r.box_rows(0, r.frames)[0] for r in data.recordings]
    return data.classes, np.concatenate(rows)


def test_classes_are_renamed_left_out_and_ignored(day, monkeypatch):
    _, plain = boxes_of(DatasetConfig(root=str(day)))
    names = np.array(CLASSES)[plain["class_id"]]
    class_map = {"ball": "round", "box": None, "bar": "ignore"}
    for kept_in_memory in (4_000_000, 0):
        monkeypatch.setattr("evspan.pipeline.data.datasets.BOXES_IN_MEMORY", kept_in_memory)
        classes, rows = boxes_of(roots({"root": str(day), "class_map": class_map}))
        assert classes == ["round"]
        expected = plain[names != "box"].copy()
        expected["class_id"] = np.where(names[names != "box"] == "ball", 0, IGNORED)
        assert np.array_equal(rows, expected)
    recording = open_dataset(roots({"root": str(day), "class_map": class_map}), "train").recordings[
        0
    ]
    frames, whole = recording.boxes_of(2, 9), recording.boxes_of(0, recording.frames)
    assert [f.tolist() for f in frames] == [f.tolist() for f in whole[2:9]]
    assert len({len(frame) for frame in whole}) > 1
    assert recording.labelled.sum() == 6  # a frame whose boxes are left out stays a labelled one


def test_the_boxes_that_a_run_starts_with_are_those_that_the_class_map_leaves(day):
    _, plain = boxes_of(DatasetConfig(root=str(day)))
    class_map = {"box": None, "bar": "ignore"}
    data = open_dataset(roots({"root": str(day), "class_map": class_map}), "train")
    number = int((plain["class_id"] == CLASSES.index("ball")).sum())
    assert 0 < number < len(plain)
    assert start_lines._boxes(data) == f"{number} of 1 class: ball {number}"


def test_the_classes_are_the_union_in_the_order_of_the_roots(night, day):
    entries = (
        {"root": str(night), "class_map": {"ball": None}},
        {"root": str(day), "class_map": {"ball": "vehicle", "box": "bar"}},
    )
    classes, rows = boxes_of(roots(*entries))
    assert classes == ["box", "bar", "vehicle"]
    _, of_day = boxes_of(DatasetConfig(root=str(day)))
    assert rows["class_id"][-len(of_day) :].tolist() == [
        {"ball": 2, "box": 1, "bar": 1}[CLASSES[k]] for k in of_day["class_id"]
    ]
    classes, other = boxes_of(roots(*entries, classes=["vehicle", "bar", "box"]))
    assert classes == ["vehicle", "bar", "box"]
    assert (other["class_id"] == 2 - rows["class_id"] + (rows["class_id"] == -1)).all()


def test_trees_of_rvt_with_their_own_classes(tmp_path):
    trees = [write_rvt_tree(tmp_path / name, {"r": 5}) for name in ("a", "b")]
    config = roots(
        {"root": str(trees[0]), "classes": ["a", "b", "c"]},
        {"root": str(trees[1]), "classes": ["c", "x", "b"], "class_map": {"x": None}},
        kind=DatasetKind.rvt_tree,
    )
    classes, rows = boxes_of(config)
    assert classes == ["a", "b", "c"]
    assert rows["class_id"].tolist() == [0, 1, 2, 2, 1]
    mixed = replace(config, kind=DatasetKind.shards)
    mixed.roots[0].kind = mixed.roots[1].kind = DatasetKind.rvt_tree
    assert boxes_of(mixed)[1].tolist() == rows.tolist()


def test_class_maps_that_name_no_class_are_refused(night, day):
    with pytest.raises(
        ConfigError, match=rf"class_map of {night} names \['bal'\], but its classes"
    ):
        boxes_of(roots({"root": str(night), "class_map": {"bal": "x"}}))
    with pytest.raises(ConfigError, match=rf"'bar' of {day} is 'bar', which is none of .*\['ball'"):
        boxes_of(roots({"root": str(day)}, classes=["ball", "box"]))
    with pytest.raises(ConfigError, match="leave no class at all"):
        boxes_of(roots({"root": str(day), "class_map": dict.fromkeys(CLASSES)}))
    with pytest.raises(ConfigError, match="model.head.num_classes=4 or more"):
        open_training(
            roots({"root": str(night)}, {"root": str(day), "class_map": {"ball": "x"}}), 3
        )


# -- frames ----------------------------------------------------------------------------------------
def test_roots_with_other_frames_are_refused_in_one_line(night, tmp_path):
    other = write_small_shards(tmp_path / "other", {"train": [4]}, height=64)
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["config"]["frames"] |= {"window_ms": 25, "cutoff": 3}
    config = json.dumps(manifest["config"], sort_keys=True)
    manifest["config_hash"] = xxhash.xxh3_64_hexdigest(config.encode())
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError) as error:
        open_dataset(roots({"root": str(night)}, {"root": str(other)}), "train")
    assert str(error.value) == (
        f"{night} and {other} have different frames: frames.window_ms 50 and 25; frames.cutoff 10 "
        "and 3; frames of 60 x 100 and of 64 x 100 pixels. Prepare one of them again with the "
        "settings of the other"
    )


def test_the_root_of_an_error_is_named(night, tmp_path):
    with pytest.raises(ShardError, match=rf"root {tmp_path}/no is no folder"):
        open_dataset(roots({"root": str(night)}, {"root": str(tmp_path / "no")}), "train")
    unlabelled = write_small_shards(tmp_path / "empty", {"train": [3]}, every=9)
    with pytest.raises(ShardError, match=rf"{unlabelled}, split train: none of 3 frames"):
        open_training(roots({"root": str(night)}, {"root": str(unlabelled)}), 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"root": "a", "roots": [DatasetRoot(root="b")]}, "give one of the two"),
        ({"roots": [DatasetRoot(root="b"), DatasetRoot(root="./b")]}, "the same folder"),
    ],
)
def test_configs_that_cannot_work_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(**config)


def test_weights_are_above_zero():
    with pytest.raises(ConfigError, match="the weight of a is 0"):
        DatasetRoot(root="a", weight=0)


# -- how often each is read ------------------------------------------------------------------------
FRAMES = [23, 9, 13, 6, 30, 41]
PARTS = [Part("a", 1, range(2)), Part("b", 2.5, range(2, 5)), Part("c", 0.5, range(5, 6))]
FRACTIONS = [0.25, 0.625, 0.125]


def plan(sampling, parts=PARTS, lanes=3, seed=5):
    labelled = [np.arange(n) % 3 == 1 for n in FRAMES]
    return SamplingPlan(
        FRAMES,
        labelled,
        lanes=lanes,
        sequence_length=T,
        sampling=sampling,
        seed=seed,
        parts=parts,
    )


def part_of(recording):
    return next(i for i, part in enumerate(PARTS) if recording in part.recordings)


def test_streamed_frames_have_the_fractions_of_the_weights():
    p = plan(Sampling.stream)
    counts = np.zeros(3)
    of_recordings = Counter()
    for lane in range(3):
        for i in range(6000):
            chunk = p.chunk(lane, i)
            counts[part_of(chunk.recording)] += chunk.frames
            of_recordings[chunk.recording] += chunk.frames
    np.testing.assert_allclose(counts / counts.sum(), FRACTIONS, atol=0.015)
    # Within a part each frame is read as often as any other.
    passes = [of_recordings[i] / FRAMES[i] for i in range(2, 5)]
    np.testing.assert_allclose(passes, np.mean(passes), rtol=0.05)


def test_random_chunks_have_the_fractions_of_the_weights():
    p = plan(Sampling.random)
    counts = np.zeros(3)
    for lane in range(3):
        for i in range(3000):
            counts[part_of(p.chunk(lane, i).recording)] += 1
    np.testing.assert_allclose(counts / counts.sum(), FRACTIONS, atol=0.015)


def test_streamed_recordings_are_whole_and_their_draws_differ():
    p = plan(Sampling.stream)
    before = p.chunk(0, 0)
    draws = [before.draw]
    for i in range(1, 400):
        chunk = p.chunk(0, i)
        if chunk.start:
            assert before.first + T >= FRAMES[before.recording]
            draws.append(chunk.draw)
        else:
            assert chunk.recording == before.recording
            assert (chunk.first, chunk.draw) == (before.first + T, before.draw)
        before = chunk
    assert len(set(draws)) == len(draws)


def test_weights_as_the_frames_give_the_plan_of_one_dataset():
    total = sum(FRAMES)
    parts = [
        replace(part, weight=7 * sum(FRAMES[i] for i in part.recordings) / total) for part in PARTS
    ]
    weighted, plain = plan(Sampling.stream, parts), plan(Sampling.stream, None)
    chunks = [plain.chunk(lane, i) for lane in range(3) for i in range(80)]
    assert [weighted.chunk(lane, i) for lane in range(3) for i in range(80)] == chunks


@pytest.mark.parametrize("sampling", Sampling)
def test_the_plan_does_not_depend_on_what_was_asked_before(sampling):
    order = [(lane, i) for lane in range(3) for i in range(150)]
    one, two, late = plan(sampling), plan(sampling), plan(sampling)
    chunks = {key: one.chunk(*key) for key in order}
    assert {key: two.chunk(*key) for key in order[::-1]} == chunks
    assert late.chunk(2, 149) == chunks[2, 149]  # as a resumed run asks
    other = plan(sampling, seed=6)
    assert {key: other.chunk(*key) for key in order} != chunks


def test_ranks_read_slices_of_the_same_batch(night, day):
    data = open_dataset(roots({"root": str(night)}, {"root": str(day), "weight": 3}), "train")
    config = TrainingConfig(
        batch_size=4, sequence_length=T, num_workers=0, repeat_factor_threshold=0.9
    )

    def batch(lanes, frames, index):
        p = sampling_plan(data, config, seed=1)
        return Loader(data, p, lanes, frames, config, seed=1).batch(index)

    for index in (0, 17):
        whole = batch(range(4), range(T), index)
        part = batch(range(2, 4), range(2, T), index)
        assert torch.equal(part.frames, whole.frames[2:, 2:])
        assert torch.equal(part.labelled, whole.labelled[2:, 2:])


def test_a_part_without_frames_is_named():
    with pytest.raises(ShardError, match="the split of b has no frames"):
        SamplingPlan(
            [3, 0],
            [np.ones(3, bool), np.ones(0, bool)],
            lanes=1,
            sequence_length=2,
            sampling=Sampling.stream,
            seed=0,
            parts=[Part("a", 1, range(1)), Part("b", 1, range(1, 2))],
        )


# -- continuation ----------------------------------------------------------------------------------
def test_the_digest_covers_weights_and_class_maps_but_not_the_place(night, day, tmp_path):
    def digest(*entries):
        config = roots(*entries)
        return data_digest(open_dataset(config, "train"), config, "val")

    a, b = {"root": str(night)}, {"root": str(day)}
    saved = digest(a, {**b, "weight": 2})
    assert json.loads(json.dumps(saved)) == saved
    assert data_differences(saved, digest({**a, "weight": 2}, {**b, "weight": 4})) == []
    link = tmp_path / "elsewhere"
    link.symlink_to(day)
    assert data_differences(saved, digest(a, {"root": str(link), "weight": 2})) == []
    assert data_differences(saved, digest(a, b)) == [
        "root 1 was 0.333 of the data, is 0.5",
        "root 2 was 0.667 of the data, is 0.5",
    ]
    swapped = data_differences(saved, digest({**b, "weight": 1}, {**a, "weight": 2}))
    assert any("recordings are changed" in difference for difference in swapped)
    one_map = data_differences(saved, digest(a, {**b, "weight": 2, "class_map": {"box": None}}))
    assert one_map == ["class_map of root 2 was {}, is {'box': None}"]
    assert "dataset.roots had 2, has 1" in data_differences(saved, digest(a))


# -- a run -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world(one_thread):
    with open_one_rank() as world:
        yield world


def run_config(run, *entries, **training):
    return TrainConfig(
        run_dir=str(run),
        model=ModelConfig(
            backbone=BackboneConfig(embed_dim=8, dim_head=4, partition_split_32=1),
            head=HeadConfig(num_classes=3),
        ),
        dataset=roots(*entries),
        training=TrainingConfig(
            max_steps=4,
            batch_size=2,
            sequence_length=2,
            precision=Precision.fp32,
            engine=EngineKind.plain,
            evaluate_every=0,
            log_images_every=0,
            num_workers=0,
            repeat_factor_threshold=0.9,
            **training,
        ),
        checkpoint=CheckpointConfig(every=2, keep=9),
        evaluation=EvaluationConfig(skip_first_ms=0),
    )


def losses(config, world):
    values = {}
    train_run(config, world, lambda report: values.update({report.step: report.losses.total}))
    return values


def test_the_config_in_tensorboard_is_one_that_train_accepts(tmp_path):
    entries = ({"root": "ü, b", "class_map": {"a: b": None, "c": "1e3"}}, {"root": "2024_1"})
    config = run_config(tmp_path / "run", *entries)
    assert compose(TrainConfig, config_lines(config).splitlines()).dataset == config.dataset


def train_run(config, world, on_step=None):
    trainer = Trainer(config, world, on_step=on_step)
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()


@pytest.mark.slow
def test_a_run_on_two_roots_continues_only_with_the_same_weights(night, day, world, tmp_path):
    entries = ({"root": str(night)}, {"root": str(day), "weight": 3})
    undisturbed = losses(run_config(tmp_path / "run", *entries), world)
    assert sorted(undisturbed) == [1, 2, 3, 4]
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002\n")
    with pytest.raises(UserError, match=r"root 1 was 0.25 of the data, is 0.5"):
        train_run(run_config(tmp_path / "run", entries[0], {"root": str(day)}), world)
    other = run_config(tmp_path / "run", *entries)
    other.training.repeat_factor_threshold = 0.1
    with pytest.raises(UserError, match="repeat_factor_threshold=0.9"):
        train_run(other, world)
    resumed = losses(run_config(tmp_path / "run", *entries), world)
    assert resumed == {step: undisturbed[step] for step in (3, 4)}
    # Its evaluation has the metrics of each root.
    both = roots(*entries[:1], {"root": str(write_small_shards(tmp_path / "b", {"val": [4, 3]}))})
    settings = EvaluationConfig(skip_first_ms=0, batch_size=1, confidence_threshold=0.1)
    weights = load_weights(tmp_path / "run")
    metrics, results, data, settings = evaluate_weights(weights, both, settings, world)
    parts = breakdown(labelled(results, data), data.classes, settings)
    description = describe_evaluation("run", weights, both, settings, world.device, data=data)
    write_results(tmp_path / "out", metrics, results, data, settings, description)
    per_root = parts.to_json()["per_root"]
    labels = root_labels([source.root for source in both.roots])
    assert {name: values["frames"] for name, values in per_root.items()} == dict(
        zip(labels, (2, 3), strict=True)
    )
    assert f"{labels[1]} " in parts.table()
    assert description["root"] == f"{night}, {tmp_path / 'b'}"
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.npy"))
    assert [str(path) for path in files] == sorted(
        [
            f"{labels[0]}/val_000_bbox.npy",
            f"{labels[1]}/val_000_bbox.npy",
            f"{labels[1]}/val_001_bbox.npy",
        ]
    )
