"""Recordings -> shards: what is stored, and what is done again when something changes."""

import errno
import fcntl
import os
import re

import evspan.data_prep.shards.atomic
import evspan.data_prep.shards.write
import h5py
import numpy as np
import pytest
import xxhash
from evspan.conf.errors import ConfigError, RecordingError, ShardError, UserError
from evspan.conf.schema.cluster import PrepClusterConfig, Scheduler
from evspan.conf.schema.prep import DownsampleBy
from evspan.data_prep.labels.box_files import find_boxes, read_boxes, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.open import open_recording, open_writer
from evspan.data_prep.shards.atomic import LOCAL_FILE_SYSTEMS, LOCK, locked
from evspan.data_prep.shards.format import (
    BOX,
    Manifest,
    RecordingEntry,
    group_digests,
    load_manifest,
)
from evspan.data_prep.shards.reading import open_group, read_frames
from evspan.data_prep.shards.status import status
from evspan.data_prep.simulator import simulate
from evspan.data_prep.workers import DryRun, LocalRunner
from support.event_files import concatenated
from support.prepared import (
    COLUMNS,
    HEIGHT,
    KEYS,
    RECORDINGS,
    SCENE,
    WIDTH,
    assert_same,
    assert_sound,
    checksum,
    contents,
    copied,
    entries,
    frames_in,
    make_source,
    manifest,
    prep_config,
)
from support.slow_frames import random_events, slow_frame

ENTRY_FIELDS = {
    "name",
    "split",
    "shard",
    "group",
    "frames",
    "labelled_frames",
    "boxes",
    "height",
    "width",
    "sensor_height",
    "sensor_width",
    "first_us",
    "last_us",
    "events",
    "boxes_per_class",
    "ignore_regions",
    "dropped_events",
    "dropped_boxes",
    "event_warnings",
    "label_warnings",
    "source",
    "source_bytes",
    "source_mtime_ns",
    "source_xxh3",
    "boxes_xxh3",
    "frames_xxh3",
    "group_xxh3",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    report = prepare(prep_config(source, output))
    assert report.prepared == dict.fromkeys(KEYS, "new")
    assert report.removed == []
    return output


@pytest.fixture
def no_decoding(monkeypatch):
    """From here on, frames are made from no recording."""

    def tripwire(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(evspan.data_prep.shards.write, "open_recording", tripwire)


def file_of(source, key):
    return source / next(name for name in RECORDINGS if name.startswith(key))


def times_of(output):
    return {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != ".lock"}


# -- what is stored ----------------------------------------------------------------------------------------------
def test_the_layout_is_that_of_the_contract(prepared):
    files = sorted(str(p.relative_to(prepared)) for p in prepared.rglob("*") if p.is_file())
    assert files == [".lock", "manifest.json", "test/00000.h5", "train/00000.h5", "val/00000.h5"]
    with h5py.File(prepared / "train" / "00000.h5") as file:
        assert list(file) == ["a", "b", "c"]
        for group in file.values():
            assert set(group) == {"frames", *COLUMNS, "frame_xxh3", "box_xxh3"}
            kinds = [group.attrs.get_id(name).get_type() for name in group.attrs]
            assert not any(
                kind.is_variable_str() for kind in kinds if kind.get_class() == h5py.h5t.STRING
            )
            n, m = len(group["end_us"]), len(group["boxes"])
            frames, start = group["frames"], group["frame_start"][:]
            assert frames.ndim == 1
            assert frames.dtype == np.uint8
            assert not frames._filters
            assert start.shape == (n + 1,)
            assert start[0] == 0
            assert start[-1] == len(frames)
            assert (np.diff(start) >= 0).all()
            assert group.attrs["frame_shape"].tolist() == [6, HEIGHT // 2, WIDTH // 2]
            assert group["end_us"].dtype == np.int64
            assert (np.diff(group["end_us"][:]) > 0).all()
            assert group["boxes"].dtype == BOX
            assert m > 0
            assert group["box_start"].dtype == np.int64
            assert group["box_start"].shape == (n + 1,)
            assert group["box_start"][0] == 0
            assert group["box_start"][-1] == m
            assert (np.diff(group["box_start"][:]) >= 0).all()
            assert group["labelled"].dtype == bool
            assert group["labelled"].shape == (n,)


def test_the_manifest_tells_what_is_stored(source, prepared):
    written, stored = manifest(prepared), contents(prepared)
    assert written["schema"] == 2
    assert written["software"].startswith("evspan")
    assert written["classes"] == ["ball", "box", "bar"]
    assert written["config"]["frames"] == {
        "mode": "exact",
        "window_ms": 50,
        "bins": 3,
        "cutoff": 10,
        "downsample": 2,
        "downsample_by": "sum",
    }
    assert written["config"]["dataset"]["labels"]["class_map"] == {"0": 0, "1": 1, "2": 2}
    assert [f"{r['split']}/{r['name']}" for r in written["recordings"]] == KEYS
    for key, entry in entries(prepared).items():
        columns, path = stored[key], file_of(source, key)
        boxes, events = find_boxes(path), concatenated(open_recording(path).chunks())
        assert set(entry) == ENTRY_FIELDS
        assert (entry["frames"], entry["boxes"], entry["labelled_frames"]) == (
            len(columns["frames"]),
            len(columns["boxes"]),
            columns["labelled"].sum(),
        )
        assert (entry["height"], entry["width"]) == columns["frames"].shape[2:]
        assert (entry["sensor_height"], entry["sensor_width"]) == (HEIGHT, WIDTH)
        assert (entry["first_us"], entry["last_us"], entry["events"]) == (
            events.t[0],
            events.t[-1],
            events.t.size,
        )
        ids = columns["boxes"]["class_id"].tolist()
        assert entry["boxes_per_class"] == {
            name: ids.count(i) for i, name in enumerate(written["classes"])
        }
        assert entry["source"] == str(path.relative_to(source))
        assert entry["source_bytes"] == path.stat().st_size
        assert entry["source_xxh3"] == xxhash.xxh3_64_hexdigest(path.read_bytes())
        assert entry["boxes_xxh3"] == (
            xxhash.xxh3_64_hexdigest(boxes.read_bytes()) if boxes else ""
        )
        assert checksum(columns) == (entry["frames_xxh3"], entry["group_xxh3"])
        assert entry["dropped_events"] == {
            "outside_sensor": 0,
            "before_first_time": 0,
            "time_spikes": 0,
            "late_timestamps_raised": 0,
            "late_by_1_ms_or_more": 0,
        }
        assert entry["boxes"] + sum(entry["dropped_boxes"].values()) == (
            read_boxes(boxes).size if boxes else 0
        )


def test_a_shard_can_be_read_by_the_contract_alone(prepared):
    for entry in load_manifest(prepared).recordings:
        group = open_group(prepared, entry)
        try:
            frames = read_frames(group, 0, entry.frames)
            np.testing.assert_array_equal(frames, frames_in(group))
            np.testing.assert_array_equal(read_frames(group, 2, 4), frames[2:4])
            assert read_frames(group, 3, 3).shape == (0, *frames.shape[1:])
            assert group_digests(group) == (entry.frames_xxh3, entry.group_xxh3)
        finally:
            group.file.close()
    with pytest.raises(ShardError, match="Run the same evspan prep again"):
        open_group(prepared, RecordingEntry(**{**entries(prepared)["train/a"], "group": "x"}))


def assert_frames_by_definition(events, columns, **how):
    ends = columns["end_us"].tolist()
    starts = [ends[0] - 50_000, *ends[:-1]]
    assert starts[0] <= events.t[0] < ends[0]
    assert starts[-1] <= events.t[-1] < ends[-1]
    for start, end, frame in zip(starts, ends, columns["frames"], strict=True):
        inside = (events.t >= start) & (events.t < end)
        np.testing.assert_array_equal(
            frame, slow_frame(events.take(inside), start, end, height=HEIGHT, width=WIDTH, **how)
        )


def test_frames_are_those_of_the_definition(source, prepared):
    for key, columns in contents(prepared).items():
        events = concatenated(open_recording(file_of(source, key)).chunks())
        assert_frames_by_definition(events, columns, bins=3, cutoff=10, downsample=2, by="sum")


@pytest.mark.parametrize(
    ("downsample", "by"), [(1, "sum"), (4, "sum"), (2, "nearest"), (4, "nearest")]
)
def test_other_frames_are_too(source, tmp_path, downsample, by):
    frames = {"bins": 5, "cutoff": 255, "downsample": downsample, "downsample_by": DownsampleBy[by]}
    prepare(prep_config(source / "val", tmp_path / "out", frames=frames))
    columns = contents(tmp_path / "out")["test/d"]  # a flat folder counts as test
    events = concatenated(open_recording(source / "val" / "d_td.raw").chunks())
    assert_frames_by_definition(events, columns, bins=5, cutoff=255, downsample=downsample, by=by)
    if by == "sum":
        assert int(columns["frames"].sum(dtype=np.int64)) == events.t.size


def test_boxes_of_a_frame_are_those_at_its_end_in_its_pixels(source, prepared):
    for key, columns in contents(prepared).items():
        box_file = find_boxes(file_of(source, key))
        if box_file is None:
            assert key == "test/plain"
            assert not columns["labelled"].any()
            assert not columns["boxes"].size
            continue
        raw, labelled_ends = read_boxes(box_file), 0
        for i, end in enumerate(columns["end_us"].tolist()):
            first, last = columns["box_start"][i : i + 2]
            boxes = columns["boxes"][first:last]
            assert (boxes["t_us"] == end).all()
            if not columns["labelled"][i]:
                assert first == last
                continue
            labelled_ends += 1
            expected = raw[raw["t"] == end]
            assert len(expected) == len(boxes) > 0
            for corner, side, size in (("x", "w", WIDTH), ("y", "h", HEIGHT)):
                low, high = (
                    expected[corner].clip(0, size - 1),
                    (expected[corner] + expected[side]).clip(0, size - 1),
                )
                np.testing.assert_array_equal(boxes[corner], low / 2)
                np.testing.assert_array_equal(boxes[side], (high - low) / 2)
            np.testing.assert_array_equal(boxes["class_id"], expected["class_id"])
            np.testing.assert_array_equal(boxes["track_id"], expected["track_id"])
        ends = columns["end_us"][columns["labelled"]]
        assert labelled_ends >= 2
        assert (abs(np.diff(ends) - 100_000) <= 2_000).all()


def test_an_annotated_frame_without_boxes_is_a_negative(source, tmp_path):
    one = copied(source / "train", tmp_path / "source" / "train").parent
    box_file = one / "train" / "a_bbox.npy"
    boxes = read_boxes(box_file)
    ends = sorted(set(boxes["t"][boxes["t"] >= 100_000].tolist()))[
        :7:6
    ]  # two labelled frames' times
    boxes["class_id"][boxes["t"] == ends[0]] = 6
    write_boxes(box_file, boxes)
    prepare(prep_config(one, tmp_path / "out"))
    columns, entry = contents(tmp_path / "out")["train/a"], entries(tmp_path / "out")["train/a"]
    first, second = (columns["end_us"].tolist().index(end) for end in ends)
    assert columns["labelled"][[first, second]].all()
    per_frame = np.diff(columns["box_start"])
    assert per_frame[first] == 0 < per_frame[second]
    assert entry["dropped_boxes"]["boxes_of_other_classes"] == (boxes["t"] == ends[0]).sum() > 0


def test_box_filters_are_counted_and_those_of_training_spare_the_other_splits(source, tmp_path):
    sides = {key: contents_boxes(source, key) for key in KEYS[:4]}
    limit = float(np.median(np.concatenate([b["w"] for b in sides.values()])))
    prepare(
        prep_config(
            source, tmp_path / "out", labels={"max_width_fraction": limit / WIDTH, "min_side": 12.0}
        )
    )
    stored = contents(tmp_path / "out")
    for key in KEYS[:4]:
        entry, boxes = entries(tmp_path / "out")[key], stored[key]["boxes"]
        assert entry["boxes"] + sum(entry["dropped_boxes"].values()) == len(sides[key])
        assert boxes.size == 0 or min(boxes["w"].min(), boxes["h"].min()) >= 6
        if key.startswith("train"):
            assert boxes.size == 0 or boxes["w"].max() <= limit / 2
    assert (
        sum(
            entries(tmp_path / "out")[k]["dropped_boxes"].get("boxes_over_max_width", 0)
            for k in KEYS[:3]
        )
        > 0
    )
    assert "boxes_over_max_width" not in entries(tmp_path / "out")["val/d"]["dropped_boxes"]


@pytest.mark.parametrize("every_ms", [1, 2, 10])
def test_a_box_is_counted_once_where_labels_may_be_closer_than_the_tolerance(
    source, tmp_path, every_ms
):
    one = copied(source / "val", tmp_path / "source")
    boxes = read_boxes(one / "d_bbox.npy")
    prepare(prep_config(one, tmp_path / "out", labels={"label_every_ms": every_ms}))
    entry = entries(tmp_path / "out")["test/d"]
    assert entry["boxes"] > 0
    assert entry["boxes"] + sum(entry["dropped_boxes"].values()) == boxes.size


def contents_boxes(source, key):
    return read_boxes(find_boxes(file_of(source, key)))


@pytest.mark.slow
def test_several_processes_give_the_same_bytes_as_one(source, prepared, tmp_path):
    prepare(prep_config(source, tmp_path / "out", processes=3))
    assert_same(tmp_path / "out", prepared)
    for path in [*sorted(prepared.glob("*/*.h5")), prepared / "manifest.json"]:
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(prepared)).read_bytes()


@pytest.mark.slow
def test_recordings_share_shards_up_to_their_size(source, tmp_path):
    big = tmp_path / "source" / "train"
    big.mkdir(parents=True)
    for i in range(5):
        rng = np.random.default_rng(i)
        with open_writer(big / f"r{i}_td.h5", 480, 640) as writer:
            writer.write(random_events(rng, 600_000, first=0, last=400_000, height=480, width=640))
    prepare(
        prep_config(big.parent, tmp_path / "out", frames={"downsample": 1, "bins": 1}, shard_mib=2)
    )
    shards = {r["shard"]: [] for r in manifest(tmp_path / "out")["recordings"]}
    for r in manifest(tmp_path / "out")["recordings"]:
        shards[r["shard"]].append(r["name"])
    assert [name for names in shards.values() for name in names] == [f"r{i}" for i in range(5)]
    assert list(shards) == [f"train/{i:05d}.h5" for i in range(len(shards))]
    assert len(shards) == 2
    sizes = [(tmp_path / "out" / s).stat().st_size for s in shards]
    assert max(sizes) <= 2.05 * 2**20  # the next one would not have fit:
    assert sizes[0] + sizes[1] / len(shards["train/00001.h5"]) > 2 * 2**20
    assert_sound(tmp_path / "out")


# -- again -------------------------------------------------------------------------------------------------------
def test_a_second_run_does_nothing_and_decodes_nothing(source, prepared, no_decoding):
    before = times_of(prepared)
    report = prepare(prep_config(source, prepared))
    assert (report.prepared, report.removed) == ({}, [])
    assert times_of(prepared) == before
    assert load_manifest(prepared) == report.manifest


@pytest.fixture
def mine(source, prepared, tmp_path):
    """A source and its prepared folder, to change."""
    return copied(source, tmp_path / "source"), copied(prepared, tmp_path / "out")


def test_a_touched_recording_is_read_once_and_nothing_is_done(mine, no_decoding):
    source, output = mine
    path = source / "train" / "a_td.raw"
    os.utime(path, ns=(1, 2_000_000_000))
    assert prepare(prep_config(source, output)).prepared == {}
    assert entries(output)["train/a"]["source_mtime_ns"] == 2_000_000_000
    before = times_of(output)
    with path.open(
        "r+b"
    ) as file:  # of the same size and time: what the manifest knows it by, so it is not read again
        file.seek(-2, 2)
        word = file.read(2)
        file.seek(-2, 2)
        file.write(bytes((word[0] ^ 1, word[1])))
    os.utime(path, ns=(1, 2_000_000_000))
    assert prepare(prep_config(source, output)).prepared == {}
    assert times_of(output) == before


def test_a_changed_recording_is_done_again_alone(mine, prepared, tmp_path):
    source, output = mine
    before, old = times_of(output), contents(output)
    simulate(source / "train" / "b_td.dat", seconds=0.42, seed=77, config=SCENE)
    assert prepare(prep_config(source, output)).prepared == {"train/b": "the recording has changed"}
    after, new = times_of(output), contents(output)
    assert {p.name for p in before if before[p] != after[p]} == {"00000.h5", "manifest.json"}
    assert before[output / "val" / "00000.h5"] == after[output / "val" / "00000.h5"]
    for key in KEYS:
        same = all(np.array_equal(old[key][c], new[key][c]) for c in COLUMNS)
        assert same == (key != "train/b")
    assert_sound(output)
    prepare(prep_config(source, tmp_path / "again"))
    assert_same(output, tmp_path / "again")


def test_changed_boxes_are_done_again_alone_and_the_frames_stay(mine, no_decoding):
    source, output = mine
    box_file, old = source / "val" / "d_bbox.npy", contents(output)
    boxes = read_boxes(box_file)
    boxes["track_id"] += 100
    write_boxes(box_file, boxes)
    assert prepare(prep_config(source, output)).prepared == {"val/d": "the box file has changed"}
    new = contents(output)
    np.testing.assert_array_equal(new["val/d"]["frames"], old["val/d"]["frames"])
    np.testing.assert_array_equal(
        new["val/d"]["boxes"]["track_id"], old["val/d"]["boxes"]["track_id"] + 100
    )
    assert_sound(output)


class QueuedRunner:
    """A recording is replaced while its job waits in a queue."""

    def __init__(self, path, **simulation):
        self.path = path
        self.simulation = simulation

    def run(self, jobs, config):
        boxes = self.path.with_name("d_bbox.npy").read_bytes()
        simulate(self.path, config=SCENE, **self.simulation)
        self.path.with_name("d_bbox.npy").write_bytes(boxes)
        yield from LocalRunner().run(jobs, config)


def test_a_recording_that_is_replaced_before_its_job_runs_gets_its_own_frames(mine, tmp_path):
    source, output = mine
    box_file = source / "val" / "d_bbox.npy"
    boxes = read_boxes(box_file)
    boxes["track_id"] += 100
    write_boxes(box_file, boxes)
    runner = QueuedRunner(source / "val" / "d_td.raw", seconds=0.35, seed=88)
    report = prepare(prep_config(source, output), runner)
    assert report.prepared == {"val/d": "the box file has changed"}
    prepare(prep_config(source, tmp_path / "again"))
    assert_same(output, tmp_path / "again")


def test_boxes_at_other_times_move_the_windows(mine, tmp_path):
    source, output = mine
    box_file = source / "val" / "d_bbox.npy"
    boxes = read_boxes(box_file)
    boxes["t"] += 3_000
    write_boxes(box_file, boxes)
    assert prepare(prep_config(source, output)).prepared == {"val/d": "the box file has changed"}
    prepare(prep_config(source, tmp_path / "again"))
    assert_same(output, tmp_path / "again")


def test_boxes_that_appear_or_go_are_noticed(mine, tmp_path):
    source, output = mine
    (source / "test" / "plain_bbox.npy").write_bytes((source / "val" / "d_bbox.npy").read_bytes())
    (source / "val" / "d_bbox.npy").unlink()
    assert prepare(prep_config(source, output)).prepared == {
        "val/d": "it has no box file any more",
        "test/plain": "the box file has changed",
    }
    recordings = entries(output)
    assert (
        recordings["val/d"]["boxes"]
        == recordings["val/d"]["labelled_frames"]
        == 0
        < recordings["test/plain"]["boxes"]
    )
    prepare(prep_config(source, tmp_path / "again"))
    assert_same(output, tmp_path / "again")


def test_other_filters_make_new_boxes_and_leave_the_frames(mine, no_decoding, capsys):
    source, output = mine
    old = contents(output)
    report = prepare(prep_config(source, output, labels={"min_side": 25.0}))
    assert report.prepared == dict.fromkeys(KEYS, "the config has changed")
    assert "another config: dataset.labels.min_side: 0.0 -> 25.0\n" in capsys.readouterr().out
    new = contents(output)
    for key in KEYS:
        np.testing.assert_array_equal(new[key]["frames"], old[key]["frames"])
    assert sum(len(c["boxes"]) for c in new.values()) < sum(len(c["boxes"]) for c in old.values())
    assert_sound(output)
    assert prepare(prep_config(source, output, labels={"min_side": 25.0})).prepared == {}


def test_other_frames_are_all_prepared_again(mine, tmp_path, capsys):
    source, output = mine
    config = {"frames": {"downsample": 4, "cutoff": 7}}
    report = prepare(prep_config(source, output, **config))
    assert report.prepared == dict.fromkeys(KEYS, "the config has changed")
    assert "frames.cutoff: 10 -> 7, frames.downsample: 2 -> 4" in capsys.readouterr().out
    prepare(prep_config(source, tmp_path / "again", **config))
    assert_same(output, tmp_path / "again")


def test_a_removed_recording_goes(mine, tmp_path, no_decoding):
    source, output = mine
    (source / "train" / "c_td.h5").unlink()
    (source / "train" / "c_bbox.npy").unlink()
    (source / "test" / "plain.raw").unlink()
    before = manifest(output)
    with pytest.raises(ShardError, match=r"1 recording of test in .*\(test/plain\).*allow_removal"):
        prepare(prep_config(source, output))
    assert manifest(output) == before
    report = prepare(prep_config(source, output, allow_removal=True))
    assert (report.prepared, report.removed) == ({}, ["test/plain", "train/c"])
    assert contents(output).keys() == entries(output).keys() == {"train/a", "train/b", "val/d"}
    assert not list((output / "test").iterdir())
    assert_sound(output)


def test_a_new_recording_leaves_the_shards_that_are_there(mine):
    source, output = mine
    before = times_of(output)
    simulate(source / "train" / "aa_td.raw", seconds=0.2, seed=5, config=SCENE)
    assert prepare(prep_config(source, output)).prepared == {"train/aa": "new"}
    assert entries(output)["train/aa"]["shard"] == "train/00001.h5"
    after = times_of(output)
    assert [p.name for p in before if before[p] != after[p]] == ["manifest.json"]
    assert_sound(output)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def garble(path):
    path.write_bytes(b"garbage" * 1000)


def lose_group(path):
    with h5py.File(path, "r+") as file:
        del file["b"]


def lose_column(path):
    with h5py.File(path, "r+") as file:
        del file["a"]["labelled"]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda p: p.unlink(), "abc"),
        (truncate, "abc"),
        (garble, "abc"),
        (lose_group, "b"),
        (lose_column, "a"),
    ],
)
def test_only_a_damaged_shard_is_prepared_again(mine, prepared, damage, lost):
    source, output = mine
    damage(output / "train" / "00000.h5")
    before = times_of(output)
    report = prepare(prep_config(source, output))
    assert report.prepared == {f"train/{name}": "its shard is missing or damaged" for name in lost}
    after = times_of(output)
    assert before[output / "val" / "00000.h5"] == after[output / "val" / "00000.h5"]
    assert_same(output, prepared)


def test_a_lost_manifest_is_written_again_from_the_shards(mine, prepared, no_decoding):
    source, output = mine
    (output / "manifest.json").unlink()
    assert prepare(prep_config(source, output)).prepared == {}
    assert_same(output, prepared)


def test_a_damaged_manifest_is_refused(mine):
    source, output = mine
    (output / "manifest.json").write_text("{")
    with pytest.raises(
        ShardError, match="manifest.json is damaged .* Delete it and run the same evspan prep again"
    ):
        prepare(prep_config(source, output))


def test_a_manifest_of_another_schema_is_refused(mine):
    source, output = mine
    text = (output / "manifest.json").read_text()
    (output / "manifest.json").write_text(text.replace('"schema": 2', '"schema": 7'))
    with pytest.raises(ShardError, match="has schema 7, this version reads 2"):
        prepare(prep_config(source, output))


# -- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_one_bad_recording_is_named_and_the_work_on_the_others_is_kept(
    source, prepared, tmp_path, processes, capsys
):
    bad = copied(source, tmp_path / "source")
    whole = (bad / "train" / "b_td.dat").read_bytes()
    (bad / "train" / "b_td.dat").write_bytes(whole[:-3])
    (bad / "val" / "d_bbox.npy").write_bytes(b"no boxes")
    for _ in range(2):
        with pytest.raises(RecordingError) as error:
            prepare(prep_config(bad, tmp_path / "out", processes=processes))
        message = str(error.value)
        assert message.startswith("2 of ")
        assert "train/b: " in message
        assert "b_td.dat is cut off" in message
        assert "d_bbox.npy" in message
        assert not (tmp_path / "out" / "manifest.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines] == [f"[{i}/5]" for i in range(1, 6)] + ["[1/2]", "[2/2]"]
    assert sum("failed: " in line for line in lines) == 4
    (bad / "train" / "b_td.dat").write_bytes(whole)
    (bad / "val" / "d_bbox.npy").write_bytes((source / "val" / "d_bbox.npy").read_bytes())
    prepare(prep_config(bad, tmp_path / "out", processes=processes))
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert_same(tmp_path / "out", prepared)


def write_recording(path, *, outside: int, n: int = 2_000):
    """`outside` of n events lie outside the sensor of 40 x 30 pixels that the file states."""
    path.parent.mkdir(parents=True, exist_ok=True)
    events = random_events(np.random.default_rng(0), n, first=0, last=120_000, height=30, width=40)
    events.x[:outside] = 33_014
    with h5py.File(path, "w") as file:
        for name, column in events._asdict().items():
            file[f"events/{name}"] = column
        file["events/height"], file["events/width"] = 30, 40
    return path


def test_events_outside_the_sensor_are_counted_dropped_and_refused_where_there_are_many(tmp_path):
    few = write_recording(tmp_path / "few" / "a.h5", outside=20)
    prepare(prep_config(few, tmp_path / "out"))
    entry = entries(tmp_path / "out")["test/a"]
    assert entry["events"] == 1_980
    assert entry["dropped_events"]["outside_sensor"] == 20
    many = write_recording(tmp_path / "many" / "a.h5", outside=21)
    with pytest.raises(
        RecordingError,
        match=r"21 of 2000 events \(1.1%\) lie outside the sensor .*max_invalid_fraction=0.011",
    ):
        prepare(prep_config(many, tmp_path / "other"))
    prepare(prep_config(many, tmp_path / "other", max_invalid_fraction=0.011))
    assert (
        prepare(prep_config(many, tmp_path / "other", max_invalid_fraction=0.5)).prepared == {}
    )  # no reason to do it again
    with pytest.raises(RecordingError, match="lie outside the sensor"):
        prepare(prep_config(many, tmp_path / "other"))
    everything = write_recording(tmp_path / "all" / "a.h5", outside=2_000)
    with pytest.raises(RecordingError, match="max_invalid_fraction=1.000"):
        prepare(prep_config(everything, tmp_path / "third"))
    with pytest.raises(RecordingError, match="holds no events inside the sensor"):
        prepare(prep_config(everything, tmp_path / "third", max_invalid_fraction=1))


def test_a_recording_without_events_is_refused(tmp_path):
    path = write_recording(tmp_path / "a.h5", outside=0, n=0)
    with pytest.raises(RecordingError, match="a.h5 holds no events. Remove it"):
        prepare(prep_config(path, tmp_path / "out"))


def test_boxes_outside_the_recording_are_counted_and_refused_where_all_are(source, tmp_path):
    one = copied(source / "val", tmp_path / "source")
    boxes = read_boxes(one / "d_bbox.npy")
    later = boxes.copy()
    later["t"] += 10_000_000
    write_boxes(one / "d_bbox.npy", np.concatenate((boxes, later)))
    prepare(prep_config(one, tmp_path / "out"))
    assert (
        entries(tmp_path / "out")["test/d"]["dropped_boxes"]["boxes_outside_the_recording"]
        == boxes.size
    )
    write_boxes(one / "d_bbox.npy", later)
    with pytest.raises(
        RecordingError,
        match=rf"all {boxes.size} boxes lie outside the recording d: .* to one clock\?",
    ) as error:
        prepare(prep_config(one, tmp_path / "out"))
    assert "d_bbox.npy" in str(error.value)


def test_a_recording_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write_recording(tmp_path / "a.h5", outside=0)

    def and_append(p):
        with p.open("ab") as file:
            file.write(b"more")
        return xxhash.xxh3_64_hexdigest(p.read_bytes())

    monkeypatch.setattr(evspan.data_prep.shards.write, "file_xxh3", and_append)
    with pytest.raises(RecordingError, match="a.h5 changed while it was read"):
        prepare(prep_config(path, tmp_path / "out"))


def test_a_box_file_that_changes_while_its_recording_is_read_is_refused(
    mine, monkeypatch, tmp_path
):
    """Else its older boxes would be stored under the checksum of the newer ones, for good."""
    source, _ = mine
    box_file = source / "val" / "d_bbox.npy"
    boxes = read_boxes(box_file)
    write_frames = evspan.data_prep.shards.write._write_frames

    def and_save(*arguments):
        boxes["track_id"] += 100
        write_boxes(box_file, boxes)
        return write_frames(*arguments)

    monkeypatch.setattr(evspan.data_prep.shards.write, "_write_frames", and_save)
    with pytest.raises(RecordingError, match="d_bbox.npy changed while it was read. Run the same"):
        prepare(prep_config(source / "val", tmp_path / "new"))
    monkeypatch.undo()
    prepare(prep_config(source / "val", tmp_path / "new"))
    stored = contents(tmp_path / "new")["test/d"]["boxes"]
    assert set(stored["track_id"]) <= set(boxes["track_id"])


# -- folders -----------------------------------------------------------------------------------------------------
def test_sources_that_cannot_be(tmp_path, source):
    with pytest.raises(RecordingError, match=r"source .*nowhere is not there. Give a folder"):
        prepare(prep_config(tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(
        RecordingError, match=r"holds no recordings \(.raw, .dat, .h5, .*\) in .*empty/train"
    ):
        prepare(prep_config(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(ConfigError, match="needs source=RECORDINGS and output=SHARDS"):
        prepare(prep_config("", tmp_path / "out"))
    two = copied(source / "val", tmp_path / "two")
    (two / "d_td.dat").write_bytes((source / "train" / "b_td.dat").read_bytes())
    with pytest.raises(
        RecordingError, match="d_td.dat and .*d_td.raw would both be recording test/d"
    ):
        prepare(prep_config(two, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be(tmp_path, source, prepared):
    with pytest.raises(ConfigError, match="lies inside source"):
        prepare(prep_config(source, source / "out"))
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ConfigError,
            match=r"output .*file.* (is a file; name a folder|cannot be made \(Not a directory\))",
        ):
            prepare(prep_config(source, output))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    with pytest.raises(
        ShardError, match=r"holds other files \(thesis.tex\). Choose an empty or new folder"
    ):
        prepare(prep_config(source, tmp_path / "used"))
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.tex"]
    with pytest.raises(
        ShardError,
        match=r"holds other files \(test/plain.raw, train/a_bbox.npy, train/a_td.raw, ...\)",
    ):
        prepare(prep_config(source, copied(source, tmp_path / "raw")))
    with pytest.raises(ShardError, match="holds 5 other recordings .* and none of source"):
        prepare(prep_config(write_recording(tmp_path / "x.h5", outside=0), prepared))
    assert_sound(prepared)


def test_a_users_own_files_next_to_shards_stay(mine):
    source, output = mine
    own = output / "train" / "notes.h5"
    own.write_bytes(b"mine")
    (source / "train" / "c_td.h5").unlink()
    prepare(prep_config(source, output))
    assert own.read_bytes() == b"mine"


def test_recordings_in_no_split_are_named_and_hidden_files_are_ignored(source, tmp_path, capsys):
    tree = copied(source, tmp_path / "source")
    (tree / "val").rename(tree / "validation")
    (tree / "train" / "._a_td.raw").write_bytes(b"resource fork")
    (tree / "lonely.raw").write_bytes((tree / "test" / "plain.raw").read_bytes())
    report = prepare(prep_config(tree, tmp_path / "out"))
    assert (
        "left out, being in none of train/, val/, test/: lonely.raw and 1 more\n"
        in capsys.readouterr().out
    )
    assert sorted(report.prepared) == ["test/plain", "train/a", "train/b", "train/c"]


def test_one_file_is_a_source(source, tmp_path):
    report = prepare(prep_config(source / "train" / "a_td.raw", tmp_path / "out"))
    assert report.prepared == {"test/a": "new"}
    assert entries(tmp_path / "out")["test/a"]["boxes"] > 0


# -- dry runs, other writers -------------------------------------------------------------------------------------
class DryRunner:
    """As the runner of a cluster."""

    def run(self, jobs, config):
        raise DryRun("\n".join(f"# to prepare: {job.key}" for job in jobs))


def test_a_dry_run_writes_nothing(mine, tmp_path):
    """Neither where nothing is prepared, nor where a recording is new and another is gone."""
    source, output = mine
    dry = PrepClusterConfig(scheduler=Scheduler.slurm, dry_run=True)
    with pytest.raises(DryRun, match="train/a"):
        prepare(prep_config(source, tmp_path / "none", processes=0, cluster=dry), DryRunner())
    assert not (tmp_path / "none").exists()
    simulate(source / "train" / "new.raw", seconds=0.2, seed=9)
    (source / "train" / "c_td.h5").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(DryRun) as description:
        prepare(prep_config(source, output, processes=0, cluster=dry), DryRunner())
    assert str(description.value).splitlines() == [
        "# to prepare: train/new",
        "# to remove: train/c",
    ]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_two_writers_are_told_apart_where_flock_does_not_work(mine, monkeypatch):
    """On file systems without flock, and where it is local to a node."""
    source, output = mine

    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    for file_systems, replacement in (
        (LOCAL_FILE_SYSTEMS, missing),
        (frozenset(), lambda *_: None),
    ):
        monkeypatch.setattr(fcntl, "flock", replacement)
        monkeypatch.setattr(evspan.data_prep.shards.atomic, "LOCAL_FILE_SYSTEMS", file_systems)
        with locked(output, "evspan prep"):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on"):
                prepare(prep_config(source, output))
            assert (output / LOCK).read_text().startswith(f"process {os.getpid()} on ")
            current = status(output)
            assert f"process {os.getpid()} on" in current.lock.at_work
            assert not current.complete
        prepare(prep_config(source, output))
        assert status(output).complete


def test_a_recording_from_before_1970_gives_a_manifest_that_is_read(mine, no_decoding):
    source, output = mine
    os.utime(source / "train" / "a_td.raw", ns=(1, -1_000_000_000))
    prepare(prep_config(source, output))
    assert load_manifest(output).split("train")[0].source_mtime_ns == -1_000_000_000


def test_a_manifest_that_nothing_would_read_is_not_written(mine, monkeypatch):
    source, output = mine
    before = (output / "manifest.json").read_bytes()
    (source / "test" / "plain.raw").touch()  # its new time would be written
    written = Manifest.to_json
    text = '"source_mtime_ns": "yesterday"'
    pattern = r'"source_mtime_ns": \d+'
    monkeypatch.setattr(Manifest, "to_json", lambda m: re.sub(pattern, text, written(m), count=1))
    with pytest.raises(ShardError, match="not written, .* source_mtime_ns is not an integer"):
        prepare(prep_config(source, output))
    assert (output / "manifest.json").read_bytes() == before
