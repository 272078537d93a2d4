"""checkpoint.init_from: what of other weights a run's model takes, and what it refuses."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig, FrameConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.checkpoint_files import file_sum, read_meta
from evspan.pipeline.engine.initial_weights import (
    Target,
    check_initial_weights,
    fit,
    initialise,
    match_classes,
)
from evspan.pipeline.engine.signals import StopFlag
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.history import read
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights, save_weights, seed_everything
from support.one_rank import open_one_rank
from support.rvt_checkpoints import model_of, publish, random_tensors
from support.small_shards import write_small_shards

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = FrameConfig(bins=2)
NAMES = ["pedestrian", "two-wheeler", "car"]
ATTENTION = {
    "channel": {"attention_spatial": False, "attention_temporal": False},
    "spatial": {"attention_temporal": False},
    "temporal": {"attention_spatial": False},
    "spatial and temporal": {},
    "wide": {"temporal_window": 4},
}


def model(classes=3, embed_dim=8, **fpn):
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=embed_dim, dim_head=4, partition_split_32=1),
        fpn=FpnConfig(**fpn),
        head=HeadConfig(num_classes=classes),
    )


def attention(name, **more):
    return model(enable_small_object_attention=True, **ATTENTION[name], **more)


def trained(of, names=NAMES):
    """Weights with other values than any initialisation, so that every gate is open."""
    tensors = random_tensors(of, FRAMES.channels)
    scaled = {name: t if t.dtype == torch.int64 else t / 8 for name, t in tensors.items()}
    return Weights(scaled, of, FRAMES, list(names), 70)


def started(weights, of, names=NAMES, seed=3):
    """A detector that started from the weights, and the line of the log."""
    seed_everything(seed)
    detector = Detector(of, FRAMES.channels)
    initial = fit(weights, Target(of, names, FRAMES), "x")
    initial.copy_into(detector)
    return detector.eval(), initial.summary()


def outputs(detector):
    """Raw predictions of two chunks, with the state carried."""
    generator = torch.Generator().manual_seed(1)
    state = detector.initial_state(2, 32, 64)
    result = []
    with torch.no_grad():
        for _ in range(2):
            frames = torch.randint(0, 5, (3, 2, 4, 32, 64), generator=generator).to(torch.uint8)
            raw, state = detector(frames, state)
            result.append(raw)
    return torch.cat(result)


@pytest.fixture(scope="module")
def plain():
    return trained(model())


@pytest.fixture(scope="module")
def plain_outputs(plain):
    return outputs(started(plain, model())[0])


# -- what fits --------------------------------------------------------------------------------------
def test_the_same_model_takes_every_tensor(plain):
    detector, line = started(plain, model())
    number = len(plain.tensors)
    assert line == f"loaded {number} of {number} tensors; new: none; unused: none"
    state = detector.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.tensors.items())


@pytest.mark.parametrize("form", ATTENTION)
def test_added_attention_changes_no_output(plain, plain_outputs, form):
    detector, line = started(plain, attention(form))
    assert torch.equal(outputs(detector), plain_outputs)
    assert line.startswith(f"loaded {len(plain.tensors)} of ")
    assert "fpn.scale_aware_attention_modules (15 tensors)" in line
    assert line.endswith("; unused: none")
    # The new blocks are there and can learn: opened gates change the output.
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(0.5)
    assert not torch.equal(outputs(detector), plain_outputs)


@pytest.mark.parametrize("before", ["channel", "spatial", "temporal"])
def test_attention_added_to_attention_changes_no_output(before):
    weights = trained(attention(before))
    expected = outputs(started(weights, attention(before))[0])
    detector, line = started(weights, attention("spatial and temporal"))
    assert torch.equal(outputs(detector), expected)
    assert "unused: none" in line


def test_attention_that_is_left_out_is_named():
    _, line = started(trained(attention("spatial")), model())
    assert "new: none; unused: fpn.small_object_attention_modules (22 tensors), fpn.scale" in line


@pytest.mark.parametrize("form", [None, "spatial and temporal"])
def test_a_fourth_scale_leaves_each_stage_its_tensors(form):
    parts = {"enable_small_object_attention": True} if form else {}
    weights = trained(model(**parts))
    detector, line = started(weights, model(in_stages=[1, 2, 3, 4], **parts))
    state = detector.state_dict()
    for part in ("stems.{}.conv.weight", "cls_preds.{}.bias", "reg_preds.{}.weight"):
        for stage in (2, 3, 4):  # the scale is numbered from the finest
            before = weights.tensors["yolox_head." + part.format(stage - 2)]
            assert torch.equal(state["yolox_head." + part.format(stage - 1)], before)
    for name in ("fpn.C3_p3.conv1.conv.weight", "fpn.bu_conv2.conv.weight"):
        assert torch.equal(state[name], weights.tensors[name])
    for module in ("fpn.reduce_conv2", "fpn.C3_p2", "fpn.bu_conv3", "fpn.C3_n2"):
        assert module in line
    if form:  # attention is on the two finest scales: that of stage 3 has no place any more
        name = "fpn.small_object_attention_modules.scale_{}.spatial.gate"
        assert torch.equal(state[name.format(1)], weights.tensors[name.format(0)])
        assert state[name.format(0)] == 0
        assert "unused: fpn.small_object_attention_modules" in line
    else:
        assert "yolox_head.stems (6 tensors)" in line
        assert line.endswith("unused: none")


def test_classes_are_matched_by_name(plain):
    names = ["Car", "tram", "two_wheeler", "dog", "cat"]
    detector, line = started(plain, model(classes=5), names)
    number = len(plain.tensors)
    assert line == (
        f"loaded {number - 6} of {number} tensors; new: yolox_head.cls_preds (5 classes, 2 matched "
        "by name); unused: none"
    )
    fresh, _ = started(trained(model(classes=2), ["x", "y"]), model(classes=5), names)
    for scale in range(3):
        for kind in ("weight", "bias"):
            name = f"yolox_head.cls_preds.{scale}.{kind}"
            rows = detector.state_dict()[name]
            assert torch.equal(rows[0], plain.tensors[name][2])
            assert torch.equal(rows[2], plain.tensors[name][1])
            # Of the seed, the same whatever is matched.
            assert torch.equal(rows[[1, 3, 4]], fresh.state_dict()[name][[1, 3, 4]])


def test_another_order_of_the_same_classes_moves_their_rows(plain):
    order = [2, 0, 1]
    detector, line = started(plain, model(), [NAMES[row] for row in order])
    name = "yolox_head.cls_preds.1.weight"
    assert torch.equal(detector.state_dict()[name], plain.tensors[name][order])
    assert "new: none" in line
    assert "rows of 3 classes in another order, matched by name" in line


@pytest.mark.parametrize(
    ("theirs", "ours", "head", "rows"),
    [
        (["a", "b", "c"], ["d", "e", "f"], 3, []),
        (["class_0", "class_1", "class_2"], ["d", "e", "f"], 3, [(0, 0), (1, 1), (2, 2)]),
        ([], ["d", "e", "f"], 3, [(0, 0), (1, 1), (2, 2)]),
        ([], ["d", "e"], 2, []),  # no names, other numbers: nothing says which is which
        (["a"], ["a"], 3, [(0, 0), (1, 1), (2, 2)]),  # two rows that neither side names
        (["a", "b"], ["b"], 3, [(0, 1), (2, 2)]),
    ],
)
def test_rows_without_names(theirs, ours, head, rows):
    weights = Weights({}, model(), FRAMES, theirs, 0)
    assert match_classes(weights, Target(model(classes=head), ours, FRAMES)).rows == rows


def test_what_is_new_comes_from_the_seed(plain):
    def new(seed):
        return started(plain, attention("spatial and temporal", classes=4), seed=seed)[0]

    one, again, other = new(1).state_dict(), new(1).state_dict(), new(2).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    different = {name for name in one if not torch.equal(one[name], other[name])}
    assert different
    assert not different & {n for n in plain.tensors if "cls_preds" not in n}


# -- what does not ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("theirs", "ours", "frames", "problem"),
    [
        (model(embed_dim=16), model(), FRAMES, "model.backbone.embed_dim is 8, theirs 16"),
        (model(depth=0.67), model(), FRAMES, r"Train that model \(model.fpn.depth=0.67\)"),
        (model(), model(), FrameConfig(bins=3), "the frames have 3 bins, theirs 2"),
        (
            attention("temporal"),
            attention("wide"),
            FRAMES,
            "model.fpn.temporal_window is 4, theirs 3",
        ),
        (
            attention("spatial", identity_init=False),
            attention("spatial"),
            FRAMES,
            r"\(model.fpn.identity_init=false\)",
        ),
    ],
)
def test_another_size_is_refused_in_one_short_line(theirs, ours, frames, problem):
    with pytest.raises(UserError, match=problem) as refused:
        fit(trained(theirs), Target(ours, NAMES, frames), "runs/x")
    line = str(refused.value)
    assert line.startswith("checkpoint.init_from runs/x: the weights are of another model: ")
    assert "\n" not in line
    assert len(line) < 400


def test_a_published_size_is_named_as_the_remedy():
    weights = Weights(random_tensors(model_of("base")), model_of("base"), FrameConfig(), NAMES, 0)
    with pytest.raises(UserError, match=r"embed_dim is 32, theirs 64.*\(size=base\)") as refused:
        fit(weights, Target(model_of("tiny"), NAMES, FrameConfig()), "rvt-b.ckpt")
    assert len(str(refused.value)) < 400


def test_tensors_of_the_own_model_that_are_missing_are_refused(plain):
    cut = {n: t for n, t in plain.tensors.items() if not n.startswith("fpn.")}
    with pytest.raises(UserError, match="144 missing: fpn.C3_n3") as refused:
        fit(replace(plain, tensors=cut), Target(model(), NAMES, FRAMES), "x")
    assert len(str(refused.value)) < 500


# -- a run ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world():
    with open_one_rank() as world:
        yield world


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_shards(tmp_path_factory.mktemp("data"), {"train": [9, 8], "val": [3]})


def config(data, run_dir, init_from="", of=None, **checkpoint):
    return TrainConfig(
        run_dir=str(run_dir),
        model=of or model(),
        dataset=DatasetConfig(root=str(data)),
        training=TrainingConfig(
            max_steps=1,
            batch_size=1,
            sequence_length=2,
            evaluate_every=0,
            log_images_every=0,
            num_workers=0,
        ),
        checkpoint=CheckpointConfig(init_from=str(init_from), **checkpoint),
    )


def train(config, world):
    trainer = Trainer(config, world)
    trainer._evaluate = lambda flag: None
    started = trainer.engine.full_state()
    try:
        trainer.run(StopFlag())
    finally:
        trainer.close()
        trainer.engine.close()
    return started


def checkpoint_of(run):
    return run / "checkpoints" / "step-00000001"


@pytest.fixture(scope="module")
def run(data, world, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "first"
    train(config(data, run), world)
    return run


@pytest.fixture
def published(tmp_path):
    """RVT's format: three classes, no names, frames of 20 channels."""
    small = model_of("micro", partition_split_32=1)
    return publish(tmp_path / "rvt-x.ckpt", random_tensors(small))


def test_a_run_records_what_it_started_from(run, data, world, tmp_path, capsys):
    new = tmp_path / "new"
    started = train(config(data, new, run), world)
    file = checkpoint_of(run) / "ema.safetensors"
    meta = read_meta(checkpoint_of(new)).values["init_from"]
    assert meta["path"] == str(run)
    assert meta["file"] == str(file)
    assert meta["xxh3"] == file_sum(file).xxh3
    assert meta["step"] == 1
    (event,) = [event for event in read(new) if event["event"] == "initialized"]
    assert event["message"] == f"{run}: {meta['loaded']}"
    assert f"checkpoint.init_from {run}: loaded " in capsys.readouterr().out
    assert started  # all of its tensors
    assert re.match(
        r"loaded (\d+) of \1 tensors; new: none; unused: none; weights: ema", meta["loaded"]
    )


@pytest.mark.slow
def test_a_resume_keeps_what_the_run_started_from(run, data, world, tmp_path):
    new = tmp_path / "new"
    train(config(data, new, run), world)
    first = read_meta(checkpoint_of(new)).values["init_from"]
    longer = config(data, new, run)
    longer.training.max_steps = 2
    longer.optimizer.end_factor = 1.0
    longer.optimizer.warmup_fraction = 0.0
    again = config(data, new, run)
    again.optimizer = longer.optimizer
    shutil.rmtree(new)
    train(again, world)
    train(longer, world)
    assert read_meta(new / "checkpoints" / "step-00000002").values["init_from"] == first


@pytest.mark.slow
def test_a_published_checkpoint_is_a_start(published, tmp_path, data, world):
    of = model_of("micro", partition_split_32=1, classes=2)
    target = Target(of, ["car", "tram"], FrameConfig())
    this_run = config(data, tmp_path / "run", published, of)
    detector = Detector(of, 20)
    record = initialise(detector, this_run, target, 0)
    assert "new: yolox_head.cls_preds (2 classes, 1 matched by name)" in record["loaded"]
    assert "its classes are taken as pedestrian, two_wheeler, car" in record["loaded"]
    assert "trained on other frames: mode rvt, here exact" in record["loaded"]
    expected = random_tensors(model_of("micro", partition_split_32=1))
    state = detector.state_dict()
    assert torch.equal(
        state["backbone.stages.2.lstm.conv1x1.weight"],
        expected["backbone.stages.2.lstm.conv1x1.weight"],
    )
    name = "yolox_head.cls_preds.2.bias"
    assert state[name][0] == expected[name][2]


def damaged(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = checkpoint_of(copy) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return copy


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (lambda run, tmp: tmp / "gone", "is .*gone, where there is nothing; name a run folder"),
        (lambda run, tmp: damaged(run, tmp), "no intact checkpoint: step-00000001 is damaged"),
        (lambda run, tmp: checkpoint_of(damaged(run, tmp)), "is damaged: ema.safetensors is c"),
        (lambda run, tmp: tmp / "run", "run's own folder. To continue the run, leave out check"),
        (lambda run, tmp: tmp / "run/checkpoints/step-00000001", "give another run_dir"),
        (lambda run, tmp: Path(__file__), "test_initial_weights.py cannot be read as a checkpoint"),
        (lambda run, tmp: tmp, "holds no checkpoint"),
    ],
)
def test_a_start_that_is_none_is_refused_in_one_line(run, data, tmp_path, source, problem):
    own = checkpoint_of(tmp_path / "run")
    shutil.copytree(checkpoint_of(run), own)
    this_run = config(data, tmp_path / "run", source(run, tmp_path), resume=False)
    target = Target(model(), NAMES, FRAMES)
    for check in (
        lambda: check_initial_weights(this_run, target),
        lambda: initialise(Detector(model(), 4), this_run, target, 0),
    ):
        with pytest.raises(UserError, match=problem) as refused:
            check()
        assert str(refused.value).startswith("checkpoint.init_from ")
        assert "\n" not in str(refused.value)


def test_a_weights_file_is_a_start(plain, tmp_path, data):
    path = tmp_path / "own.safetensors"
    save_weights(path, plain)
    detector = Detector(model(), 4)
    initialise(detector, config(data, tmp_path / "run", path), Target(model(), NAMES, FRAMES), 0)
    state = detector.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.tensors.items())


def test_a_run_without_a_folder_starts_from_checkpoints_below_the_current_one(
    plain, data, tmp_path, monkeypatch
):
    """It will get a new folder: neither those weights nor those checkpoints are its own."""
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    save_weights(Path("checkpoints", "own.safetensors"), plain)
    target = Target(model(), NAMES, FRAMES)
    check_initial_weights(config(data, "", "checkpoints/own.safetensors"), target)
    with pytest.raises(UserError, match="there is nothing"):
        check_initial_weights(config(data, "", "checkpoints/other.safetensors"), target)
