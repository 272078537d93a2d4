"""Ignore regions from box files to shards."""

import itertools
import json

import h5py
import numpy as np
import pytest
from evspan.conf.errors import BoxesError, ShardError
from evspan.conf.schema.prep import DatasetConfig, FrameMode
from evspan.data_prep.labels.box_files import (
    NO_CLASS,
    RAW_BOX,
    read_boxes,
    read_labels,
    write_boxes,
)
from evspan.data_prep.labels.filters import crop
from evspan.data_prep.prepare import prepare
from evspan.data_prep.report.survey import survey
from evspan.data_prep.shards.export_rvt import export_rvt
from evspan.data_prep.shards.format import group_digests, load_manifest
from evspan.data_prep.shards.verify import verify
from evspan.data_prep.simulator import simulate
from evspan.pipeline.data.datasets import open_dataset
from support.prepared import HEIGHT, SCENE, WIDTH, copied, prep_config
from support.sealed import seal_rows

LABELS = {"min_side": 5, "max_width_fraction": 0.9}


def rows(*values) -> np.ndarray:
    """RAW_BOX rows of (t, x, y, w, h)."""
    boxes = np.zeros(len(values), RAW_BOX)
    for name, column in zip("txywh", zip(*values, strict=True), strict=True):
        boxes[name] = column
    boxes["class_confidence"] = 1
    return boxes


def test_a_box_file_with_ignore_regions_is_read_back(tmp_path):
    boxes = rows((10, 1, 2, 3, 4), (30, 5, 6, 7, 8))
    boxes["class_id"] = [2, 1]
    regions = rows((20, 0, 0, 9, 9), (30, 1, 1, 2, 2))
    write_boxes(tmp_path / "a.npy", boxes, regions)
    stored = np.load(tmp_path / "a.npy")
    assert stored["ignore"].tolist() == [False, True, False, True]
    labels = read_labels(tmp_path / "a.npy", offset_us=5)
    for name in ("x", "y", "w", "h", "class_id"):
        np.testing.assert_array_equal(labels.boxes[name], boxes[name])
    assert labels.boxes["t"].tolist() == [15, 35]
    assert labels.regions["t"].tolist() == [25, 35]
    assert set(labels.regions["class_id"]) == {NO_CLASS}
    assert labels.times.tolist() == [15, 25, 35, 35]
    np.testing.assert_array_equal(read_boxes(tmp_path / "a.npy", offset_us=5), labels.boxes)
    write_boxes(tmp_path / "b.npy", boxes, regions[:0])
    assert np.load(tmp_path / "b.npy").dtype == RAW_BOX


@pytest.mark.parametrize("kind", ["?", "u1", "f4"])
def test_the_class_of_an_ignore_region_does_not_matter(tmp_path, kind):
    fields = [(name, "f8") for name in ("t", "x", "y", "w", "h", "class_id")]
    raw = np.zeros(3, [*fields, ("ignore", kind)])
    raw["t"] = [1, 2, 3]
    raw["class_id"] = [1, np.nan, -1]
    raw["ignore"] = [0, 1, 1]
    np.save(tmp_path / "a.npy", raw)
    labels = read_labels(tmp_path / "a.npy")
    assert labels.boxes["class_id"].tolist() == [1]
    assert labels.regions.size == 2


def test_a_field_ignore_of_other_values_is_refused(tmp_path):
    raw = np.zeros(2, [*RAW_BOX.descr, ("ignore", "i4")])
    raw["ignore"] = [0, 7]
    np.save(tmp_path / "a.npy", raw)
    with pytest.raises(BoxesError, match="'ignore'"):
        read_labels(tmp_path / "a.npy")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two recordings; a has ignore regions, at three of its label times and between two others."""
    folder = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(("a", "b")):
        simulate(folder / "train" / f"{name}_td.raw", seconds=0.5, seed=seed, config=SCENE)
    path = folder / "train" / "a_bbox.npy"
    boxes = read_boxes(path)
    write_boxes(path, boxes, regions_of(boxes))
    return folder


def regions_of(boxes: np.ndarray) -> np.ndarray:
    """Ignore regions of all sizes and places, at times that are thinned out, too."""
    times = np.unique(boxes["t"])
    return rows(
        (times[5], 1, 2, 3, 4),  # smaller than any minimum
        (times[5], -20, 30, WIDTH + 100, 50),  # wider than the sensor
        (times[6], 1, 1, 50, 50),  # 60 Hz: thinned out
        (times[11], 2 * WIDTH, 0, 10, 10),  # outside of the sensor
        (times[11], 10, 20, 30, 40),
    )


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    prepare(prep_config(source, output, labels=LABELS))
    return output


def stored_regions(group: h5py.Group) -> list[list[np.ndarray]]:
    start = group["ignore_start"][:]
    return [group["ignore"][a:b] for a, b in itertools.pairwise(start)]


def test_shards_contain_the_regions_of_the_labelled_frames(source, prepared):
    by_name = {entry.name: entry for entry in load_manifest(prepared).recordings}
    labels = read_labels(source / "train" / "a_bbox.npy")
    with h5py.File(prepared / by_name["a"].shard) as file:
        group = file["a"]
        ends = group["end_us"][group["labelled"][:]]
        expected = labels.regions[np.isin(labels.regions["t"], ends)]
        expected = crop(expected, HEIGHT, WIDTH)
        expected = expected[(expected["w"] > 0) & (expected["h"] > 0)]
        assert expected.size == 3
        found = np.concatenate(stored_regions(group))
        for i, of_frame in enumerate(stored_regions(group)):
            assert set(of_frame["t_us"]) <= {group["end_us"][i]}
        np.testing.assert_array_equal(found["t_us"], expected["t"])
        for side in "xywh":
            np.testing.assert_array_equal(found[side], expected[side] / 2)
        assert set(found["class_id"]) == {-1}
        assert group_digests(group)[1] == by_name["a"].group_xxh3
        assert set(file.get("b", ())).isdisjoint({"ignore", "ignore_start"})
    dropped = by_name["a"].dropped_boxes
    assert by_name["a"].ignore_regions == 3
    assert dropped["ignore_regions_outside_the_labelled_frames"] == 2
    assert by_name["a"].boxes + 3 + sum(dropped.values()) == labels.boxes.size + 5
    assert by_name["b"].ignore_regions == 0


def test_a_frame_with_nothing_but_a_region_is_labelled(tmp_path):
    simulate(tmp_path / "s" / "train" / "a_td.raw", seconds=0.4, seed=0, config=SCENE)
    path = tmp_path / "s" / "train" / "a_bbox.npy"
    times = np.unique(read_boxes(path)["t"])
    write_boxes(path, read_boxes(path)[:0], rows((times[12], 10, 10, 20, 20)))
    prepare(prep_config(tmp_path / "s", tmp_path / "out"))
    (entry,) = load_manifest(tmp_path / "out").recordings
    assert (entry.labelled_frames, entry.boxes, entry.ignore_regions) == (1, 0, 1)
    data = open_dataset(DatasetConfig(root=str(tmp_path / "out")), "train").recordings[0]
    frame = int(np.flatnonzero(data.labelled)[0])
    assert data.boxes(frame).size == 0
    assert data.boxes_of(frame, frame + 1)[0]["class_id"].tolist() == [-1]
    assert data.end_us[frame] + data.clock_us == times[12]


def test_regions_after_the_last_window_are_left_out(tmp_path):
    """Labels of a longer recording, from which this one was cut."""
    source = tmp_path / "s" / "train"
    simulate(source / "a_td.raw", seconds=0.4, seed=0, config=SCENE)
    every_100_ms = rows(*((50_000 + 100_000 * k, 10, 10, 20, 20) for k in range(7)))
    write_boxes(source / "a_bbox.npy", every_100_ms, every_100_ms)
    prepare(prep_config(tmp_path / "s", tmp_path / "out"))
    (entry,) = load_manifest(tmp_path / "out").recordings
    assert (entry.boxes, entry.ignore_regions) == (4, 4)
    assert entry.dropped_boxes["ignore_regions_outside_the_labelled_frames"] == 3
    assert not verify(tmp_path / "out", source=tmp_path / "s").damaged


@pytest.mark.slow
def test_preparing_again_does_nothing_and_new_regions_are_taken_up(source, prepared, tmp_path):
    config = prep_config(source, prepared, labels=LABELS)
    assert prepare(config).prepared == {}
    copy = tmp_path / "source"
    (copy / "train").mkdir(parents=True)
    for path in (source / "train").iterdir():
        (copy / "train" / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "out"
    prepare(prep_config(copy, output))
    before = {entry.name: entry.frames_xxh3 for entry in load_manifest(output).recordings}
    labels = read_labels(copy / "train" / "b_bbox.npy")
    write_boxes(copy / "train" / "b_bbox.npy", labels.boxes, regions_of(labels.boxes))
    assert list(prepare(prep_config(copy, output)).prepared) == ["train/b"]
    after = {entry.name: entry for entry in load_manifest(output).recordings}
    assert after["b"].ignore_regions == 3
    assert {name: entry.frames_xxh3 for name, entry in after.items()} == before
    assert not verify(output, source=copy).damaged


def test_report_and_export_take_no_notice(prepared, tmp_path, source):
    stats = {r.entry.name: r for r in survey(prepared).recordings}
    assert int(stats["a"].per_class.sum()) == stats["a"].entry.boxes > 0
    prepare(prep_config(source, tmp_path / "rvt", frames={"mode": FrameMode.rvt, "bins": 10}))
    report = export_rvt(tmp_path / "rvt", tmp_path / "tree")
    assert len(report.written) == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["value", "class", "start", "missing", "unstated"])
def test_damaged_regions_are_found(source, prepared, tmp_path, damage):
    copied(prepared, tmp_path / "copy")
    tmp_path = tmp_path / "copy"
    (entry,) = [e for e in load_manifest(tmp_path).recordings if e.name == "a"]
    with h5py.File(tmp_path / entry.shard, "a") as file:
        group = file["a"]
        if damage == "missing":
            del group["ignore"]
        elif damage == "unstated":
            group.copy("ignore", file["b"])
        elif damage == "start":
            group["ignore_start"][-2] += 1 if group["ignore_start"][-2] == 0 else -1
        else:
            regions = group["ignore"][:]
            regions["x" if damage == "value" else "class_id"] = 1
            group["ignore"][:] = regions
    assert len(verify(tmp_path, source=source).damaged) == 1
    with pytest.raises(ShardError):
        for recording in open_dataset(DatasetConfig(root=str(tmp_path)), "train").recordings:
            recording.boxes_of(0, recording.frames)
    if damage == "missing":
        config = prep_config(source, tmp_path, labels=LABELS)
        assert list(prepare(config).prepared) == ["train/a"]
        assert not verify(tmp_path, source=source).damaged


@pytest.mark.slow
def test_resealed_regions_with_a_class_are_found_by_verify(source, prepared, tmp_path):
    copied(prepared, tmp_path / "copy")
    tmp_path = tmp_path / "copy"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    entry = next(e for e in manifest["recordings"] if e["name"] == "a")
    with h5py.File(tmp_path / entry["shard"], "a") as file:
        group = file["a"]
        regions = group["ignore"][:]
        regions["class_id"] = 0
        group["ignore"][:] = regions
        entry["group_xxh3"] = group_digests(group)[1]
        group.attrs["entry"] = np.bytes_(json.dumps(entry))
        seal_rows(group, entry)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert any("class" in text for text in verify(tmp_path, source=source).damaged.values())
