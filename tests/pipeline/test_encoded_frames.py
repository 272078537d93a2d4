"""Frames that travel encoded: expanded by torch operators, they equal those of the numpy path."""

import math
from itertools import chain, count, islice

import h5py
import numpy as np
import pytest
import torch
from evspan.conf.errors import ShardError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind, DownsampleBy, FrameConfig
from evspan.conf.schema.training import AugmentationConfig, Sampling, TrainingConfig
from evspan.data_prep.frames import codec
from evspan.data_prep.frames.codec import decode_frames, measure_frames
from evspan.data_prep.frames.histogram import frames_of
from evspan.pipeline.data.augment import Augmentation, augment_frames, decode_augmented
from evspan.pipeline.data.datasets import FrameCodes, encode_frames, open_dataset
from evspan.pipeline.data.device_batches import device_batches, encodes_for
from evspan.pipeline.data.encoded import EncodedBatch, encode_lanes, expand, pack
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from hypothesis import given, settings
from hypothesis import strategies as st
from support.emulated_device import emulated_gpu, is_supported
from support.rvt_tree import write_rvt_tree
from support.slow_frames import GivenRecording, random_events
from support.small_shards import CLASSES, write_small_shards

SHARD_FRAMES = {"train": [23, 12, 9]}
CPU = torch.device("cpu")
AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "zoom in": Augmentation(zoom=1.37, top=-4.3, left=-7.9),
    "zoom in by 3, past the border": Augmentation(zoom=3, top=2.5, left=-60.1),
    "zoom out": Augmentation(zoom=0.71, top=1.9, left=5.2),
    "flip and zoom in": Augmentation(flip=True, zoom=1.5, top=-8.25, left=-0.5),
    "flip and zoom out": Augmentation(flip=True, zoom=0.83, top=3.1, left=0.2),
}


def draw_frames(rng, shape, fraction, most):
    counts = rng.integers(1, most + 1, shape)
    return np.where(rng.random(shape) < fraction, counts, 0).astype(np.uint8)


def expanded(runs, augmentations, shape, device=CPU):
    """The frames that arrive on a device."""
    packed = pack(encode_lanes(runs, augmentations, shape), pinned=False)
    return expand(packed.to(device).tensors(), shape)


def augmented(frames, augmentation):
    """What both ways of the CPU give: from dense frames, and straight from their codes."""
    out = np.zeros_like(frames)
    augment_frames(frames, augmentation, out)
    decoded = np.zeros_like(frames)
    decode_augmented(encode_frames(frames), augmentation, decoded)
    np.testing.assert_array_equal(decoded, out)
    return out


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmented_frame_agrees_with_the_definition(name):
    how = AUGMENTATIONS[name]
    frame = draw_frames(np.random.default_rng(2), (1, 2, 14, 24), 0.3, 9)
    result = augmented(frame, how)
    for y, x in np.ndindex(14, 24):
        row = math.floor((y + 0.5 - how.top) / how.zoom)
        column = math.floor((x + 0.5 - how.left) / how.zoom)
        shown = 0 <= row < 14 and 0 <= column < 24
        if how.flip:
            column = 23 - column
        expected = frame[0, :, row, column] if shown else [0, 0]
        assert result[0, :, y, x].tolist() == list(expected), (y, x)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(24, 40), (13, 21), (1, 1)], ids=str)
def test_every_augmentation_equals_the_numpy_path(name, size):
    """Lane 0 is augmented; lane 1 otherwise, lane 2 not, and it has fewer frames."""
    rng = np.random.default_rng(5)
    augmentations = [AUGMENTATIONS[name], AUGMENTATIONS["flip and zoom in"], Augmentation()]
    lanes = [draw_frames(rng, (n, 6, *size), 0.1, 12) for n in (3, 3, 1)]
    shape = (3, 3, 6, *size)
    expected = np.zeros(shape, np.uint8)
    for lane, (frames, augmentation) in enumerate(zip(lanes, augmentations, strict=True)):
        expected[: len(frames), lane] = augmented(frames, augmentation)
    result = expanded([encode_frames(frames) for frames in lanes], augmentations, shape)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("by", DownsampleBy)
@pytest.mark.parametrize("downsample", [1, 2, 4])
@pytest.mark.parametrize("name", ["none", "flip and zoom in"])
def test_frames_of_events_at_every_resolution(downsample, by, name):
    """From events on, at a cutoff that a byte just holds; sizes that 2 and 4 do not divide."""
    config = FrameConfig(bins=3, cutoff=255, downsample=downsample, downsample_by=by)
    events = random_events(
        np.random.default_rng(8), 30_000, first=7, last=149_000, height=21, width=35
    )
    # Two pixels saturate: those that `nearest` keeps at half and at a quarter resolution.
    events.x[::3], events.y[::3] = 21, 13
    events.x[1::3], events.y[1::3] = 22, 14
    recording = GivenRecording(events, 21, 35, None)
    windows = frames_of(recording, lambda first: count(first + 50_000, 50_000), config)
    frames = np.stack([frame for _, frame in windows])
    assert frames.max() == 255
    shape = (len(frames), 1, *frames.shape[1:])
    result = expanded([encode_frames(frames)], [AUGMENTATIONS[name]], shape)
    np.testing.assert_array_equal(result[:, 0], augmented(frames, AUGMENTATIONS[name]))


CASES = {
    "all empty": (0, 1),
    "far apart, so that many cells are skipped": (0.0004, 3),
    "full": (1, 10),
    "saturated": (0.3, 255),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["none", "flip and zoom out"])
def test_empty_sparse_full_and_saturated_frames(case, name):
    frames = draw_frames(np.random.default_rng(1), (4, 4, 30, 50), *CASES[case])
    frames[1] = 0  # an empty frame between others
    frames[2, 0, 0, 0] = 255  # the first and the last cell of a frame
    frames[2, -1, -1, -1] = 255
    augmentation = AUGMENTATIONS[name]
    shape = (4, 2, 4, 30, 50)
    result = expanded([None, encode_frames(frames)], [Augmentation(), augmentation], shape)
    assert not result[:, 0].any(), "a lane without frames is zero"
    np.testing.assert_array_equal(result[:, 1], augmented(frames, augmentation))


def test_a_batch_without_any_frame():
    assert not expanded([None, None], [Augmentation(flip=True)] * 2, (2, 2, 4, 5, 6)).any()
    assert not expanded([None], [Augmentation()], (2, 1, 4, 5, 6)).any()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_frames_and_any_augmentation(data):
    """Random codes too: every code that `decode_frames` takes, not only what the encoder writes."""
    height, width = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    frames, lanes = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    shape = (frames, lanes, 2, height, width)
    byte = st.one_of(st.integers(0, 9), st.sampled_from([codec.AGAIN, codec.SKIP]))
    runs = []
    augmentations = []
    expected = np.zeros(shape, np.uint8)
    for lane in range(lanes):
        codes = data.draw(st.lists(st.lists(byte, max_size=6), max_size=frames))
        code = np.array(list(chain.from_iterable(codes)), np.uint8)
        start = np.cumsum([0, *map(len, codes)])
        augmentation = Augmentation(
            flip=data.draw(st.booleans()),
            zoom=data.draw(st.floats(0.3, 3)),
            top=data.draw(st.floats(-9, 9)),
            left=data.draw(st.floats(-9, 9)),
        )
        augmentations.append(augmentation)
        try:
            dense = decode_frames(code, start, shape[2:])
        except ValueError as error:
            with pytest.raises(ValueError, match="does not decode") as refused:
                measure_frames(code, start, shape[2:])
            assert str(refused.value) == str(error)
            runs.append(None)
            continue
        run = FrameCodes(code, start, measure_frames(code, start, shape[2:]))
        runs.append(run)
        out = expected[: len(dense), lane]
        augment_frames(dense, augmentation, out)
        decoded = np.zeros_like(dense)
        decode_augmented(run, augmentation, decoded)
        np.testing.assert_array_equal(decoded, out)
    np.testing.assert_array_equal(expanded(runs, augmentations, shape), expected)


def test_codes_that_lead_out_of_a_frame_are_refused_without_decoding():
    """As `decode_frames` refuses them: on a GPU they would write out of bounds."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        code = rng.choice([0, 1, 100, 253, 254, 255], rng.integers(0, 60)).astype(np.uint8)
        start = np.array([0, rng.integers(0, code.size + 1), code.size])
        try:
            frames = decode_frames(code, start, (8, 60))
        except ValueError as error:
            refused += 1
            with pytest.raises(ValueError, match="does not decode") as raised:
                measure_frames(code, start, (8, 60))
            assert str(raised.value) == str(error)
            continue
        cells = frames.reshape(2, -1) > 0
        last = [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in cells]
        assert measure_frames(code, start, (8, 60)).tolist() == last
    assert 20 < refused < 290
    long = np.full(3 * codec.MEASURED, 255, np.uint8)  # more than 32 bits could add
    long[-1] = 0
    cells = 254 * (long.size - 1) + 1
    assert measure_frames(long, np.array([0, long.size]), (cells,)) == cells
    with pytest.raises(ValueError, match="does not decode"):
        measure_frames(long, np.array([0, long.size]), (cells - 1,))


def test_damaged_shards_are_reported_with_their_place(tmp_path):
    root = write_small_shards(tmp_path / "shards", {"train": [6]})
    with h5py.File(root / "train" / "00000.h5", "r+") as file:
        group = file["train_000"]
        start = group["frame_start"][:]
        group["frames"][start[3] : start[4]] = codec.SKIP
    expect_damage(root, "frame 3 is damaged .* Run evspan prep verify")
    with h5py.File(root / "train" / "00000.h5", "r+") as file:  # as earlier versions wrote it
        group = file["train_000"]
        del group["frame_xxh3"], group["box_xxh3"], group.attrs["index_xxh3"]
    expect_damage(root, "frame 3 of 5 .* Run evspan prep verify")


def expect_damage(root, message):
    (recording,) = open_dataset(DatasetConfig(root=str(root)), "train").recordings
    for read in (recording.codes, recording.read):
        with pytest.raises(ShardError, match=message):
            read(0, 5)


# -- the loader ------------------------------------------------------------------------------------
def make_loader(data, *, workers=1, lanes=range(6), frames=range(4), augmentation=None):
    config = TrainingConfig(
        batch_size=6,
        sequence_length=4,
        num_workers=workers,
        augmentation=augmentation or AugmentationConfig(),
    )
    plan = SamplingPlan(
        [r.frames for r in data.recordings],
        [r.labelled for r in data.recordings],
        lanes=6,
        sequence_length=4,
        sampling=Sampling.mixed,
        seed=3,
    )
    return Loader(data, plan, lanes, frames, config, seed=3, looks_back=2)


@pytest.mark.parametrize(
    "kind", ["augmented", "as stored", "RVT's tree", "few frames, a rank of 2"]
)
def test_encoded_batches_are_the_dense_ones(tmp_path, shards, kind):
    """All tensors of every batch, from shards and from dense stored frames."""
    settings = {}
    data = open_dataset(DatasetConfig(root=str(shards)), "train")
    if kind == "RVT's tree":
        root = write_rvt_tree(tmp_path / "tree", {"a": 9, "b": 5})
        data = open_dataset(
            DatasetConfig(root=str(root), kind=DatasetKind.rvt_tree, classes=CLASSES), "train"
        )
    elif kind == "as stored":
        settings["augmentation"] = AugmentationConfig(hflip_prob=0, zoom_prob=0)
    elif kind != "augmented":
        settings |= {"lanes": range(2, 4), "frames": range(2, 4), "workers": 0}
    loader = make_loader(data, **settings)
    dense = device_batches(loader.batches(2), CPU)
    encoded = device_batches(loader.batches(2, encoded=True), CPU)
    for expected, batch in zip(islice(dense, 12), encoded, strict=False):
        for name, tensor in expected._asdict().items():
            assert torch.equal(getattr(batch, name), tensor), name
            assert getattr(batch, name).dtype == tensor.dtype
    dense.close()
    encoded.close()


def test_one_buffer_of_a_byte_an_event_travels(shards):
    data = open_dataset(DatasetConfig(root=str(shards)), "train")
    loader = make_loader(data, workers=0)
    encoded = loader.encoded_batch(5)
    assert isinstance(encoded, EncodedBatch)
    tensors = encoded.packed.tensors()
    assert {t.untyped_storage().data_ptr() for t in tensors.values()} == {
        encoded.packed.buffer.untyped_storage().data_ptr()
    }
    others = sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "code")
    events = sum(
        int((recording.codes(0, recording.frames).code != codec.SKIP).sum())
        for recording in data.recordings
    )
    num_frames = sum(recording.frames for recording in data.recordings)
    assert tensors["code"].numel() < 1.3 * 24 * events / num_frames
    assert encoded.packed.buffer.numel() <= tensors["code"].numel() + others + 16 * len(tensors)


def test_on_another_device_no_operator_mixes_devices_and_labels_stay(shards):
    """The meta device stands in for a GPU: a tensor made on the CPU would raise."""
    data = open_dataset(DatasetConfig(root=str(shards)), "train")
    loader = make_loader(data, workers=0)
    dense = loader.batch(3)
    (batch,) = islice(device_batches(loader.batches(3, encoded=True), torch.device("meta")), 1)
    for name, tensor in dense._asdict().items():
        moved = getattr(batch, name)
        assert (moved.shape, moved.dtype) == (tensor.shape, tensor.dtype), name
        assert moved.device.type == ("cpu" if name in ("labelled", "following") else "meta")


@pytest.mark.skipif(not is_supported(), reason="this torch has no device that is written in Python")
@pytest.mark.parametrize(
    ("augmentation", "operators"),
    [(None, 15), (AugmentationConfig(hflip_prob=0, zoom_prob=0), 10)],
    ids=["augmented", "as stored"],
)
def test_a_gpu_gets_one_pinned_copy_per_batch_and_the_host_never_waits(
    shards, augmentation, operators
):
    data = open_dataset(DatasetConfig(root=str(shards)), "train")
    loader = make_loader(data, workers=0, augmentation=augmentation)
    with emulated_gpu() as gpu:
        batches = device_batches(loader.batches(4, encoded=encodes_for(gpu.device)), gpu.device)
        next(batches)
        with gpu.counting() as counts:
            batch = next(batches)
        assert not counts.waits, counts.table()
        (copy,) = counts.copies
        assert copy.pinned
        assert copy.non_blocking
        assert copy.num_bytes < batch.frames.numel() / 4, "a byte an event and few more"
        assert counts.operators.total() <= operators, counts.table()
        frames = batch.frames.cpu()
        assert batch.boxes.device == batch.counts.device == batch.starts.device == gpu.device
    assert torch.equal(frames, loader.batch(5).frames)


def test_closing_ends_the_loaders_threads(shards):
    closed = []

    def batches():
        try:
            while True:
                yield make_loader(data, workers=0).batch(0)
        finally:
            closed.append(True)

    data = open_dataset(DatasetConfig(root=str(shards)), "train")
    iterator = device_batches(batches(), CPU)
    next(iterator)
    iterator.close()
    assert closed
