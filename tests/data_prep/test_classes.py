"""Class names come from the user, the source or the shards, never from a default; ids without a name are refused."""

import numpy as np
import pytest
from evspan.conf.compose import compose, expand_sweep, load_config, save_config
from evspan.conf.errors import BoxesError, ConfigError, RecordingError, ShardError
from evspan.conf.schema.prep import DatasetConfig, LabelConfig, PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes, write_boxes
from evspan.data_prep.labels.classes import read_classes, require_named, with_classes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.simulator import simulate
from evspan.data_prep.simulator.recording_set import SimulatedSet
from evspan.pipeline.data.requirements import open_scored, open_training
from support.prepared import SCENE, entries, manifest
from support.small_shards import write_small_shards


# -- maps replace ---------------------------------------------------------------------------------
def class_map(*overrides: str, schema: type = PrepConfig) -> dict[int, int]:
    return compose(schema, list(overrides)).dataset.labels.class_map


@pytest.mark.parametrize("schema", [PrepConfig, TrainConfig, EvaluateConfig])
def test_a_given_map_replaces_the_datasets(schema):
    given = "dataset.labels.class_map"
    assert class_map("dataset=gen4", f"{given}={{0:2}}", schema=schema) == {0: 2}
    assert class_map("dataset=gen4", f"+{given}={{5:1,6:0}}", schema=schema) == {5: 1, 6: 0}
    both = ("dataset.labels.class_map={9:0}", "dataset.labels.class_map={7:1}")
    assert class_map("dataset=gen4", *both, schema=schema) == {7: 1}


def test_the_form_that_the_help_shows():
    config = compose(PrepConfig, ["dataset.classes=[a,b]", "dataset.labels.class_map={0:0,3:1}"])
    assert config.dataset.classes == ["a", "b"]
    assert config.dataset.labels.class_map == {0: 0, 3: 1}


def test_the_map_of_a_file_replaces_that_of_the_file_before(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text(
        "defaults: [etram]\nclasses: [one, two]\nlabels:\n  class_map: {4: 1, 11: 0}\n"
    )
    options = ["--config-dir", str(tmp_path), "dataset=mine"]
    config = compose(PrepConfig, options)
    assert config.dataset.labels.class_map == {4: 1, 11: 0}
    assert config.dataset.classes == ["one", "two"]
    assert class_map(*options, "dataset.labels.class_map={3:0}") == {3: 0}


def test_every_run_of_a_sweep_has_its_own_map():
    sweep = ["dataset=gen4", "dataset.labels.class_map={0:0},{3:1}"]
    runs = expand_sweep(sweep).combinations
    assert [class_map(*run, schema=TrainConfig) for run in runs] == [{0: 0}, {3: 1}]


def test_a_stored_map_is_read_as_it_was(tmp_path):
    config = compose(PrepConfig, ["dataset=etram", "dataset.labels.class_map={0:3}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PrepConfig, tmp_path / "config.yaml").dataset == config.dataset


def test_other_mappings_are_merged_as_before():
    config = compose(PrepConfig, ["frames={bins: 3}", "dataset.labels={min_side: 4}"])
    assert (config.frames.bins, config.frames.window_ms) == (3, 50)
    assert config.dataset.labels.min_side == 4


# -- prep -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A recording whose boxes have the class ids 0, 1 and 7."""
    folder = tmp_path_factory.mktemp("own")
    path = folder / "train" / "a_td.h5"
    simulate(path, seconds=0.12, seed=3, config=SCENE)
    boxes = np.repeat(read_boxes(path.with_name("a_bbox.npy")), 2)
    boxes["class_id"] = np.resize([0, 1, 1, 7], boxes.size)
    write_boxes(path.with_name("a_bbox.npy"), boxes)
    return folder


def own_config(source, output, *overrides: str) -> PrepConfig:
    arguments = [f"source={source}", f"output={output}", "processes=1", "frames.bins=2"]
    return compose(PrepConfig, [*arguments, *overrides])


@pytest.mark.slow
def test_without_names_prep_lists_the_ids_and_a_remedy_that_works(own, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ConfigError) as caught:
        prepare(own_config(own, output))
    message = str(caught.value)
    assert "contain class ids 0 (" in message
    assert "'dataset.classes=[class_0,class_1,class_7]'" in message
    assert not output.exists()
    remedy = [word.strip("'") for word in message.split() if word.startswith("'dataset.")]
    prepare(own_config(own, output, *(word.rstrip("',") for word in remedy)))
    per_class = entries(output)["train/a"]["boxes_per_class"]
    assert list(per_class) == ["class_0", "class_1", "class_7"]
    with pytest.raises(ConfigError, match=r"was prepared with dataset=own, classes \['class_0'"):
        prepare(own_config(own, output))


def test_names_in_the_source_are_used(own, tmp_path):
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    for path in (own / "train").iterdir():
        (source / "train" / path.name).write_bytes(path.read_bytes())
    (source / "classes.txt").write_text("\ufeffcar\r\nbus\r\n\r\n")
    with pytest.raises(RecordingError, match=r"a_bbox\.npy: \d+ of \d+ boxes .*: 7 \(\d+ boxes?\)"):
        prepare(own_config(source, tmp_path / "out"))
    names = ["car", "bus", *"cdefg", "tram"]
    (source / "classes.txt").write_text("\n".join(names))
    prepare(own_config(source, tmp_path / "out"))
    assert manifest(tmp_path / "out")["classes"] == names
    assert manifest(tmp_path / "out")["config"]["dataset"]["classes"] == names


def test_recordings_without_boxes_need_no_names(own, tmp_path):
    source = tmp_path / "a_td.h5"
    source.write_bytes((own / "train" / "a_td.h5").read_bytes())
    prepare(own_config(source, tmp_path / "out"))
    assert manifest(tmp_path / "out")["classes"] == []


def test_simulated_recordings_bring_their_names(tmp_path):
    simulated = SimulatedSet(tmp_path, {"train": 1}, seconds=0.1)
    simulated.write_classes()
    assert read_classes(tmp_path) == ["ball", "box", "bar"]
    assert read_classes(tmp_path / "list.txt") == ["ball", "box", "bar"]
    (tmp_path / "classes.txt").write_text("mine\n")
    simulated.write_classes()
    assert read_classes(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"car\n\nbus\n", "has empty lines"),
        (b"car\nbus\ncar\n", "names 'car' twice"),
        (b"caf\xe9\n", "is not UTF-8"),
        (b"a\n" * 40_000, "80000 bytes"),
    ],
)
def test_files_that_are_no_list_of_names(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_classes(tmp_path)


def test_an_id_without_a_name_is_refused_with_its_file_and_a_map_selects_ids(tmp_path):
    boxes = np.zeros(6, RAW_BOX)
    boxes["class_id"] = [0, 1, 5, 5, 300, 0]
    path = tmp_path / "a_bbox.npy"
    with pytest.raises(BoxesError) as caught:
        require_named(path, boxes, LabelConfig(), ["a", "b"])
    message = str(caught.value)
    assert message.startswith(f"{path}: 3 of 6 boxes have a class_id without a name: 5 (2 boxes), ")
    assert "300 (1 box)" in message
    assert "dataset.labels.class_map={0:0,1:1}" in message
    require_named(path, boxes, LabelConfig(class_map={0: 0, 1: 1}), ["a", "b"])
    require_named(path, boxes[:2], LabelConfig(), ["a", "b"])


# -- training and evaluation ----------------------------------------------------------------------
def test_training_takes_the_classes_of_the_shards(tmp_path):
    root = write_small_shards(tmp_path / "shards", {"train": [4], "val": [4]})
    names = manifest(root)["classes"]
    config = compose(TrainConfig, ["experiment=demo", f"dataset.root={root}"])
    assert config.dataset.classes == []
    assert open_training(config.dataset, len(names)).classes == names
    with pytest.raises(ConfigError, match=rf"{len(names)} classes .*num_classes=.*{len(names)} or"):
        open_training(config.dataset, len(names) - 1)
    other = DatasetConfig(name="mine", root=str(root), classes=["x"])
    with pytest.raises(ConfigError) as caught:
        open_training(other, 3)
    for part in (str(names), "['x'] (dataset=mine)"):
        assert part in str(caught.value)


def test_without_a_labelled_frame_nothing_is_trained_or_scored(own, tmp_path):
    source = tmp_path / "source"
    for split in ("train", "val"):
        (source / split).mkdir(parents=True)
        (source / split / "a_td.h5").write_bytes((own / "train" / "a_td.h5").read_bytes())
    root = tmp_path / "out"
    prepare(own_config(source, root))
    dataset = DatasetConfig(root=str(root))
    with pytest.raises(ShardError, match=r"split train: none of \d+ frames in 1 recording is lab"):
        open_training(dataset, 3)
    with pytest.raises(ShardError, match="nothing can be scored"):
        open_scored(dataset, "val")


def test_a_map_goes_with_the_names_of_classes_txt(tmp_path):
    (tmp_path / "classes.txt").write_text("car\nbus\n")
    labels = LabelConfig(class_map={4: 0, 7: 1})
    config = PrepConfig(source=str(tmp_path), dataset=DatasetConfig(labels=labels))
    assert with_classes(config, []).dataset.classes == ["car", "bus"]
    labels.class_map[9] = 2
    with pytest.raises(ConfigError, match=r"names class \[2\] but dataset.classes has 2 entries"):
        with_classes(config, [])


@pytest.mark.parametrize("classes", [["a", "b", "a"], ["a", ""]])
def test_each_class_has_a_name_of_its_own(classes):
    with pytest.raises(ConfigError, match="give each class a name of its own"):
        DatasetConfig(classes=classes)
