"""Datasets on disk -> recordings: our shards and RVT's tree give what was stored; the loader's batches against the plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind, FrameMode
from evspan.conf.schema.training import AugmentationConfig, Sampling, TrainingConfig
from evspan.data_prep.hdf5_files import open_hdf5_for_reading
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.data import datasets
from evspan.pipeline.data.augment import augment_boxes, augment_frames, draw_augmentation
from evspan.pipeline.data.boxes import to_center, to_corners
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from support.prepared import frames_in
from support.rvt_tree import write_rvt_tree
from support.small_shards import BINS, CLASSES, HEIGHT, WIDTH, write_small_shards

LOOKS_BACK = 3
SHARD_FRAMES = {"train": [23, 12, 9], "val": [5]}


def opened(root, split="train", **config):
    return open_dataset(DatasetConfig(root=str(root), **config), split)


def test_shards_give_what_is_stored(shards):
    data = opened(shards)
    assert (data.height, data.width, data.channels, data.classes) == (
        HEIGHT,
        WIDTH,
        2 * BINS,
        CLASSES,
    )
    assert [r.frames for r in data.recordings] == [23, 12, 9]
    with open_hdf5_for_reading(shards / "train" / "00000.h5") as file:
        for recording in data.recordings:
            group = file[recording.name]
            np.testing.assert_array_equal(recording.read(2, 7), frames_in(group)[2:7])
            np.testing.assert_array_equal(recording.labelled, group["labelled"])
            np.testing.assert_array_equal(recording.end_us, group["end_us"])
            boxes, start = group["boxes"][:], group["box_start"][:]
            for i in range(recording.frames):
                np.testing.assert_array_equal(recording.boxes(i), boxes[start[i] : start[i + 1]])
            assert recording.boxes(0).dtype == BOX


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "OPEN_FILES", 2)
    root = write_rvt_tree(tmp_path / "tree", {f"rec_{i}": 3 for i in range(5)})
    data = opened(root, kind=DatasetKind.rvt_tree, classes=CLASSES)
    for _ in range(2):
        assert [int(r.read(1, 2).max()) for r in data.recordings] == [1, 2, 3, 4, 5]


def test_rvt_tree_labels_become_pixels_of_the_stored_frames(tmp_path):
    data = opened(write_rvt_tree(tmp_path, {"a": 4}), kind=DatasetKind.rvt_tree, classes=CLASSES)
    (recording,) = data.recordings
    assert (data.height, data.width, data.frames.mode, data.frames.downsample) == (
        18,
        32,
        FrameMode.rvt,
        2,
    )
    assert recording.labelled.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(to_corners(recording.boxes(1)), [[5, 0, 25, 25], [10, 0, 30, 25]])
    np.testing.assert_array_equal(to_center(recording.boxes(2)), [[2, 25, 12.5, 20, 25]])
    assert len(recording.boxes(0)) == len(recording.boxes(3)) == 0


@pytest.mark.slow
def test_rvt_tree_of_the_published_preprocessing(parity_dir):
    root = parity_dir / "prep_fixture" / "output"
    data = opened(root, kind=DatasetKind.rvt_tree, classes=CLASSES)
    (recording,) = data.recordings
    assert (data.height, data.width, data.channels) == (360, 640, 20)
    folder = (
        root
        / "train"
        / recording.name
        / "event_representations_v2"
        / "stacked_histogram_dt=50_nbins=10"
    )
    with open_hdf5_for_reading(folder / "event_representations_ds2_nearest.h5") as file:
        np.testing.assert_array_equal(recording.read(0, recording.frames), file["data"][:])
    labels = np.load(root / "train" / recording.name / "labels_v2" / "labels.npz")["labels"]
    stored = np.concatenate([recording.boxes(i) for i in range(recording.frames)])
    np.testing.assert_array_equal(stored["t_us"], labels["t"])
    np.testing.assert_allclose(2 * stored["w"], labels["w"])
    for i in np.flatnonzero(recording.labelled):
        assert set(recording.boxes(i)["t_us"]) <= {recording.end_us[i]}
    assert [
        r.frames
        for r in opened(root, "test", kind=DatasetKind.rvt_tree, classes=CLASSES).recordings
    ]


def test_wrong_datasets_are_told(tmp_path, shards):
    for config, split, message in (
        ({"root": ""}, "train", "dataset.root=SHARDS"),
        ({"root": str(tmp_path / "none")}, "train", "is no folder"),
        ({"root": str(tmp_path)}, "train", "no manifest.json"),
        ({"root": str(shards)}, "test", "no recordings in split 'test'"),
        ({"root": str(shards), "classes": ["cat"]}, "train", "was prepared with the classes"),
        ({"root": str(shards), "kind": DatasetKind.rvt_tree}, "train", "dataset.classes is empty"),
    ):
        with pytest.raises((ConfigError, ShardError), match=message):
            open_dataset(DatasetConfig(**config), split)


def test_a_damaged_tree_is_told(tmp_path):
    root = write_rvt_tree(tmp_path, {"a": 4})
    next(root.rglob("*.h5")).write_bytes(b"no HDF5")
    with pytest.raises(ShardError, match=r"cannot give data\[0:1\]"):
        opened(root, kind=DatasetKind.rvt_tree, classes=CLASSES)
    next(root.rglob("labels.npz")).unlink()
    with pytest.raises(ShardError, match="no recording as RVT prepares it"):
        opened(root, kind=DatasetKind.rvt_tree, classes=CLASSES)


# -- the loader --------------------------------------------------------------------------------------------------
def make_loader(data, lanes, workers=0, frames=range(4)):
    config = TrainingConfig(batch_size=6, sequence_length=4, num_workers=workers)
    plan = SamplingPlan(
        [r.frames for r in data.recordings],
        [r.labelled for r in data.recordings],
        lanes=6,
        sequence_length=4,
        sampling=Sampling.mixed,
        seed=3,
    )
    return Loader(data, plan, lanes, frames, config, seed=3, looks_back=LOOKS_BACK), plan


def test_batches_hold_what_the_plan_says(shards):
    """Every lane's frames and boxes, one by one from the stored recording."""
    data = opened(shards)
    loader, plan = make_loader(data, range(6))
    for index in range(8):
        batch, row = loader.batch(index), 0
        for t in range(4):
            for lane in range(6):
                chunk = plan.chunk(lane, index)
                recording, at = data.recordings[chunk.recording], chunk.first + t
                how = draw_augmentation(
                    AugmentationConfig(), chunk, seed=3, height=HEIGHT, width=WIDTH
                )
                inside = t < chunk.frames
                expected = np.zeros((1, 2 * BINS, HEIGHT, WIDTH), np.uint8)
                if inside:
                    augment_frames(recording.read(at, at + 1), how, expected)
                np.testing.assert_array_equal(batch.frames[t, lane], expected[0])
                assert bool(batch.labelled[t, lane]) == (inside and bool(recording.labelled[at]))
                assert bool(batch.starts[lane]) == chunk.start
                if batch.labelled[t, lane]:
                    boxes = augment_boxes(
                        to_center(recording.boxes(at)), how, height=HEIGHT, width=WIDTH
                    )
                    assert batch.counts[row] == len(boxes)
                    np.testing.assert_array_equal(batch.boxes[row, : len(boxes)], boxes)
                    assert not batch.boxes[row, len(boxes) :].any()
                    row += 1
        assert row == len(batch.boxes) == len(batch.counts)


@pytest.mark.parametrize(
    ("cores", "gpu", "workers"),
    [(1, True, 1), (2, True, 1), (12, True, 8), (6, True, 5), (1, False, 2), (64, False, 2)],
)
def test_the_number_of_threads_follows_the_cores(shards, monkeypatch, cores, gpu, workers):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(
        "evspan.pipeline.data.loader.read_ahead", lambda *args: asked.append(args[2])
    )
    loader, _ = make_loader(opened(shards), range(6), workers=-1)
    loader.batches(0, encoded=gpu)
    loader.config.num_workers = 3
    loader.batches(0, encoded=gpu)
    assert asked == [workers, 3]


def by_frame(batch):
    """(t, lane) -> boxes of a labelled frame."""
    places = zip(*np.nonzero(batch.labelled.numpy()), strict=True)
    return {
        place: batch.boxes[row, : batch.counts[row]].tolist() for row, place in enumerate(places)
    }


@pytest.mark.parametrize(
    "recordings", [[23, 12, 9], [7, 3]], ids=["three", "fewer_than_lanes_and_shorter_than_a_chunk"]
)
def test_any_number_of_workers_and_any_layout_read_the_same(tmp_path, recordings):
    data = opened(write_small_shards(tmp_path, {"train": recordings}))
    whole = make_loader(data, range(6))[0]
    for workers, cut in (
        (1, 4),
        (3, 2),
        (2, 1),
    ):  # lanes over two groups, frames over the ranks of each
        layout = [
            (lanes, range(t, t + cut))
            for lanes in (range(2), range(2, 6))
            for t in range(0, 4, cut)
        ]
        parts = [
            make_loader(data, lanes, workers, frames)[0].batches(2) for lanes, frames in layout
        ]
        for index in range(2, 9):
            batch, boxes = whole.batch(index), {}
            next_chunk = torch.ones(LOOKS_BACK, 6, dtype=torch.bool)  # may be labelled
            ahead = torch.cat((batch.labelled, next_chunk))
            assert torch.equal(batch.following, next_chunk)
            for (lanes, frames), part in zip(layout, map(next, parts), strict=True):
                here = slice(frames.start, frames.stop), slice(lanes.start, lanes.stop)
                assert torch.equal(part.frames, batch.frames[here])
                assert torch.equal(part.labelled, batch.labelled[here])
                assert torch.equal(part.starts, batch.starts[here[1]])
                after = ahead[frames.stop : frames.stop + LOOKS_BACK, here[1]]
                assert torch.equal(part.following, after)
                boxes |= {
                    (t + frames.start, lane + lanes.start): rows
                    for (t, lane), rows in by_frame(part).items()
                }
            assert boxes == by_frame(batch)
        for p in parts:
            p.close()


@pytest.mark.parametrize("column", ["read_codes", "read_frames"])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_rank_reads_only_its_own_frames(shards, column, encoded):
    """read_frames: of datasets that store no codes."""
    data, asked = opened(shards), []

    def watched(recording):
        read = getattr(recording, column)
        watch = {column: lambda which: asked.append(which) or read(which)}
        return replace(recording, **{"read_codes": None, **watch})

    data = replace(data, recordings=[watched(r) for r in data.recordings])
    loader, plan = make_loader(data, range(6), frames=range(1, 3))
    read = loader.encoded_batch if encoded else loader.batch
    for index in range(12):
        asked.clear()
        read(index)
        chunks = [plan.chunk(lane, index) for lane in range(6)]
        expected = [c.first + t for c in chunks for t in range(1, min(3, c.frames))]
        assert [t for which in asked for t in range(which.start, which.stop)] == expected
