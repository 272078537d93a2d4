"""Each augmentation against its definition, pixel by pixel and event by event; on the CPU and encoded for a GPU."""

import math
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch
from evspan.conf.compose import compose
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind, DatasetRoot
from evspan.conf.schema.training import (
    AugmentationConfig,
    Sampling,
    TrainConfig,
    TrainingConfig,
)
from evspan.data_prep.frames import codec
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.pipeline.data.augment import (
    Augmentation,
    augment_boxes,
    augment_frames,
    decode_augmented,
    draw_augmentation,
)
from evspan.pipeline.data.datasets import encode_frames, open_dataset
from evspan.pipeline.data.device_batches import device_batches
from evspan.pipeline.data.encoded import encode_lanes, expand, pack
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import Chunk, SamplingPlan
from evspan.pipeline.tensorboard.augmentation_images import example_tiles, first_batch_tiles
from evspan.pipeline.tensorboard.images import GREEN
from hypothesis import given, settings
from hypothesis import strategies as st
from support.emulated_device import emulated_gpu, is_supported
from support.rvt_tree import write_rvt_tree
from support.small_shards import CLASSES

SHARD_FRAMES = {"train": [23, 12, 9]}
HEIGHT, WIDTH = 22, 38
CPU = torch.device("cpu")
TURNED = Augmentation(rotation=17.3, shear=-21.9, zoom=1.31, top=-2.3, left=4.7)
AUGMENTATIONS = {
    "rotation": Augmentation(rotation=-29.3),
    "shear": Augmentation(shear=23.7),
    "turned, sheared, zoomed and moved": TURNED,
    "the same mirrored": replace(TURNED, flip=True, zoom=0.57),
    "polarity flip": Augmentation(polarity_flip=True),
    "lost events": Augmentation(drop=19_000, key=77),
    "all events lost": Augmentation(drop=65_536, key=5),
    "noise": Augmentation(noise=60, key=2**32 - 3),
    "hot pixels": Augmentation(hot=(5, HEIGHT * WIDTH + 5, 2 * HEIGHT * WIDTH - 1)),
    "erased": Augmentation(patches=((3, 4, 9, 20), (7, 15, 22, 38))),
    "erased and zoomed": Augmentation(zoom=1.317, flip=True, patches=((0, 0, 9, 20),)),
    "lost events and noise, zoomed": Augmentation(zoom=1.317, drop=30_000, noise=9, key=1),
    "all of them": replace(
        TURNED,
        flip=True,
        polarity_flip=True,
        drop=12_345,
        noise=40,
        hot=(0, 700),
        patches=((5, 5, 12, 30),),
        key=3_000_000_000,
    ),
}


def mixed(x):
    """The hash, with Python's integers."""
    x = ((x ^ x >> 16) * 0x21F0AAAD) % 2**32
    x = ((x ^ x >> 15) * 0x735A2D97) % 2**32
    return x ^ x >> 15


def key_of(how, name, frame):
    return mixed((mixed((how.key + name) % 2**32) + frame) % 2**32) // 2


def thinned(frame, how, position):
    """Byte by byte of the frame's code."""
    out = np.zeros(frame.size, np.uint8)
    key = key_of(how, 1, position)
    cell = -1
    for i, byte in enumerate(FrameEncoder()(frame).tolist()):
        if byte == codec.SKIP:
            cell += 254
            continue
        cell += 0 if byte == codec.AGAIN else byte + 1
        if mixed(key + i) // 65536 >= how.drop:
            out[cell] += 1
    return out.reshape(frame.shape)


def shown_by(how, y, x, height, width):
    """The input's row and column at the centre of an output pixel: each step undone by itself."""
    y, x = (y + 0.5 - how.top) / how.zoom, (x + 0.5 - how.left) / how.zoom
    y, x = y - height / 2, x - width / 2
    angle = math.radians(how.rotation)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    x -= y * math.tan(math.radians(how.shear))
    y, x = y + height / 2, x + width / 2
    return y, (width - x if how.flip else x)


def defined(frame, how, position):
    """The definition of an augmented frame, in plain Python."""
    channels, height, width = frame.shape
    if how.drop:
        frame = thinned(frame, how, position)
    if how.polarity_flip:
        frame = np.concatenate((frame[channels // 2 :], frame[: channels // 2]))
    out = np.zeros_like(frame)
    for y, x in np.ndindex(height, width):
        if any(top <= y < bottom and left <= x < right for top, left, bottom, right in how.patches):
            continue
        row, column = shown_by(how, y, x, height, width)
        if 0 <= row < height and 0 <= column < width:
            out[:, y, x] = frame[:, math.floor(row + 1e-9), math.floor(column + 1e-9)]
    key = key_of(how, 2, position)
    for i in range(how.noise):
        cell = np.unravel_index(mixed(key + i) * out.size // 2**32, out.shape)
        out[cell] = max(out[cell], 1)
    for hot in how.hot:
        polarity, pixel = divmod(hot, height * width)
        for b in range(channels // 2):
            cell = (polarity * channels // 2 + b, *divmod(pixel, width))
            out[cell] = max(out[cell], 1)
    return out


def draw_frames(rng, shape, fraction=0.2, most=9):
    counts = rng.integers(1, most + 1, shape)
    return np.where(rng.random(shape) < fraction, counts, 0).astype(np.uint8)


def augmented(frames, how, first=0):
    """What both ways of the CPU give: from dense frames, and straight from their codes."""
    out = np.zeros_like(frames)
    augment_frames(frames, how, out, first)
    decoded = np.zeros_like(frames)
    decode_augmented(encode_frames(frames), how, decoded, first)
    np.testing.assert_array_equal(decoded, out)
    return out


def expanded(runs, augmentations, shape, first_frames=None):
    packed = pack(encode_lanes(runs, augmentations, shape, first_frames), pinned=False)
    return expand(packed.tensors(), shape).numpy()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_frames_agree_with_the_definition(name):
    """On the CPU and expanded, beside a lane that is not augmented and one without frames."""
    how = AUGMENTATIONS[name]
    frames = draw_frames(np.random.default_rng(4), (3, 4, HEIGHT, WIDTH))
    frames[1] = 0  # an empty frame between others
    expected = np.stack([defined(frame, how, 7 + t) for t, frame in enumerate(frames)])
    result = augmented(frames, how, 7)
    np.testing.assert_array_equal(result, expected)
    assert not np.array_equal(result, frames)
    run = encode_frames(frames)
    lanes = [None, run, encode_frames(frames[:2]), run]
    how_lanes = [how, how, Augmentation(), Augmentation(flip=True, zoom=1.2, left=-3)]
    batch = expanded(lanes, how_lanes, (4, 4, 4, HEIGHT, WIDTH), [0, 7, 0, 0])
    assert not batch[:, 0].any()
    assert not batch[3].any(), "after a run's end, frames are zero"
    np.testing.assert_array_equal(batch[:3, 1], expected)
    np.testing.assert_array_equal(batch[:2, 2], frames[:2])
    np.testing.assert_array_equal(batch[:3, 3], augmented(frames, how_lanes[3]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_frames_and_any_augmentation_expand_as_on_the_cpu(data):
    height, width = data.draw(st.tuples(st.integers(1, 17), st.integers(1, 40)))
    num_frames, lanes = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = (num_frames, lanes, 4, height, width)
    offset = st.floats(-9, 9)
    runs, hows = [], []
    expected = np.zeros(shape, np.uint8)
    for lane in range(lanes):
        frames = draw_frames(rng, (data.draw(st.integers(0, num_frames)), *shape[2:]), 0.1, 4)
        top, left = int(rng.integers(height)), int(rng.integers(width))
        patch = (top, left, int(rng.integers(top, height + 1)), int(rng.integers(left, width + 1)))
        how = Augmentation(
            flip=data.draw(st.booleans()),
            zoom=data.draw(st.floats(0.3, 3)),
            top=data.draw(offset),
            left=data.draw(offset),
            rotation=data.draw(st.one_of(st.just(0.0), st.floats(-180, 180))),
            shear=data.draw(st.one_of(st.just(0.0), st.floats(-60, 60))),
            patches=data.draw(st.sampled_from(((), (patch,), (patch, (0, 0, 1, 1))))),
            polarity_flip=data.draw(st.booleans()),
            drop=data.draw(st.sampled_from((0, 1, 20_000, 65_536))),
            noise=data.draw(st.integers(0, 9)),
            hot=tuple(rng.integers(2 * height * width, size=data.draw(st.integers(0, 3))).tolist()),
            key=data.draw(st.integers(0, 2**32 - 1)),
        )
        runs.append(encode_frames(frames) if len(frames) else None)
        hows.append(how)
        expected[: len(frames), lane] = augmented(frames, how, lane)
    np.testing.assert_array_equal(expanded(runs, hows, shape, list(range(lanes))), expected)


def test_lost_events_noise_and_hot_pixels_come_as_often_as_asked():
    frames = np.full((4, 20, 60, 100), 3, np.uint8)
    kept = augmented(frames, Augmentation(drop=round(0.3 * 65_536), key=9))
    np.testing.assert_allclose(kept.mean((1, 2, 3)), 3 * 0.7, rtol=0.005)
    np.testing.assert_allclose(kept.mean((0, 2, 3)), 3 * 0.7, rtol=0.02)
    of_three = np.bincount(kept.reshape(-1)) / kept.size  # binomial
    np.testing.assert_allclose(of_three, [0.027, 0.189, 0.441, 0.343], atol=0.004)
    assert not np.array_equal(kept[0], kept[1]), "other events of each frame"
    noisy = augmented(np.zeros_like(frames), Augmentation(noise=5_000, key=9))
    assert noisy.max() == 1
    np.testing.assert_allclose(noisy.sum((1, 2, 3)), 5_000, rtol=0.05)  # some cells coincide
    np.testing.assert_allclose(noisy.sum((0, 2, 3)), 4 * 250, rtol=0.2)
    assert not np.array_equal(noisy[0], noisy[1]), "other cells of each frame"
    hot = augmented(frames // 4, Augmentation(hot=(250, 6_000 + 4_321)))
    assert hot[:, :10, 2, 50].all()
    assert hot[:, 10:, 43, 21].all()
    assert hot.sum() == 4 * 2 * 10


# -- boxes -----------------------------------------------------------------------------------------
def corners_of(box, how, height, width):
    """The four corners of a box, moved one by one."""
    _, cx, cy, w, h = box
    for x, y in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        px, py = cx + x * w / 2, cy + y * h / 2
        if how.flip:
            px = width - px
        px, py = px - width / 2, py - height / 2
        px += py * math.tan(math.radians(how.shear))
        angle = math.radians(how.rotation)
        px, py = (
            px * math.cos(angle) - py * math.sin(angle),
            px * math.sin(angle) + py * math.cos(angle),
        )
        yield (px + width / 2) * how.zoom + how.left, (py + height / 2) * how.zoom + how.top


@pytest.mark.parametrize("min_visible", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    "name",
    [
        "rotation",
        "shear",
        "turned, sheared, zoomed and moved",
        "the same mirrored",
        "erased and zoomed",
    ],
)
def test_boxes_surround_their_moved_corners(name, min_visible):
    """Cut at the border, dropped where less than `min_visible` is left, but ignore regions are kept."""
    how = AUGMENTATIONS[name]
    rng = np.random.default_rng(3)
    boxes = np.column_stack(
        (
            rng.integers(-1, 3, 200),
            rng.random((200, 2)) * (WIDTH, HEIGHT),
            1 + 15 * rng.random((200, 2)),
        )
    ).astype(np.float32)
    expected = []
    for box in boxes:
        x, y = np.array(list(corners_of(box.tolist(), how, HEIGHT, WIDTH))).T
        x0, x1 = np.clip((x.min(), x.max()), 0, WIDTH)
        y0, y1 = np.clip((y.min(), y.max()), 0, HEIGHT)
        visible = (x1 - x0) * (y1 - y0) / (np.ptp(x) * np.ptp(y))
        assert abs(visible - min_visible) > 1e-5 or not min_visible
        if x1 - x0 >= 1 and y1 - y0 >= 1 and (visible >= min_visible or box[0] < 0):
            expected.append((box[0], (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
    result = augment_boxes(boxes, how, height=HEIGHT, width=WIDTH, min_visible=min_visible)
    assert result.dtype == np.float32
    assert 20 < len(expected) < 200
    assert sum(box[0] < 0 for box in expected) > 5
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_frames_and_boxes_move_together(seed):
    """Events that fill a box fill its augmented box, to a pixel."""
    config = AugmentationConfig(rotate_prob=1, shear_prob=0, translate_prob=1, min_visible=0.1)
    chunk = Chunk(0, 0, 1, True, False, (seed,))
    how = draw_augmentation(config, chunk, seed=2, height=60, width=80)
    frame = np.zeros((1, 2, 60, 80), np.uint8)
    frame[0, :, 20:40, 30:54] = 1
    shown = np.argwhere(augmented(frame, how)[0, 0])
    (box,) = augment_boxes(
        np.array([[1, 42, 30, 24, 20]], np.float32), how, height=60, width=80, min_visible=0.1
    )
    low, high = shown.min(0), shown.max(0) + 1
    np.testing.assert_allclose(low, (box[2] - box[4] / 2, box[1] - box[3] / 2), atol=1.5)
    np.testing.assert_allclose(high, (box[2] + box[4] / 2, box[1] + box[3] / 2), atol=1.5)


# -- drawing ---------------------------------------------------------------------------------------
EVERYTHING = AugmentationConfig(
    rotate_prob=0.6,
    shear_prob=0.6,
    translate_prob=0.6,
    min_visible=0.1,
    polarity_flip_prob=0.5,
    drop_prob=0.5,
    noise_prob=0.5,
    noise_hz=2,
    hot_prob=0.5,
    erase_prob=0.5,
)


def drawn(config, streamed, count=400):
    return [
        draw_augmentation(config, Chunk(0, 0, 1, True, streamed, (i,)), seed=5, height=60, width=80)
        for i in range(count)
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_each_is_drawn_as_often_and_within_the_range_that_the_config_has(streamed):
    hows = drawn(EVERYTHING, streamed)
    for name, most in (("rotation", 30), ("shear", 30)):
        values = np.array([getattr(how, name) for how in hows])
        assert abs((values != 0).mean() - 0.6) < 0.1, name
        assert -most <= values.min() < -0.9 * most, name
        assert 0.9 * most < values.max() <= most, name
    drops = np.array([how.drop for how in hows]) / 65_536
    noise = np.array([how.noise for how in hows])
    assert abs((drops > 0).mean() - 0.5) < 0.1
    assert 0.27 < drops.max() <= 0.3
    assert abs((noise > 0).mean() - 0.5) < 0.1
    assert 0.9 * 480 < noise.max() <= 2 * 60 * 80 * 0.05
    assert abs(np.mean([how.polarity_flip for how in hows]) - 0.5) < 0.1
    assert 15 < max(len(how.hot) for how in hows) <= 20
    erased = np.array([len(how.patches) for how in hows])
    assert len({how.key for how in hows}) == len(hows)
    if streamed:
        assert not erased.any(), "a patch would cover a whole recording"
        assert max(how.zoom for how in hows) == 1
        return
    assert abs((erased > 0).mean() - 0.5) < 0.1
    assert erased.max() == 3
    assert max(how.zoom for how in hows) > 1.4
    for how in hows:
        for top, left, bottom, right in how.patches:
            assert 0 <= top <= bottom <= 60
            assert 0 <= left <= right <= 80
            assert (bottom - top) * (right - left) < 0.11 * 60 * 80


def test_what_is_drawn_for_one_does_not_depend_on_the_others():
    """Flip and zoom are those of `standard`, whatever else is on."""
    for streamed in (False, True):
        for how, standard in zip(
            drawn(EVERYTHING, streamed, 50), drawn(AugmentationConfig(), streamed, 50), strict=True
        ):
            assert (how.flip, how.zoom) == (standard.flip, standard.zoom)
            assert replace(standard, key=0) == Augmentation(
                standard.flip, standard.zoom, standard.top, standard.left
            )


@pytest.mark.parametrize(
    "setting",
    [
        {"rotate_prob": 1.5},
        {"erase_prob": -0.1},
        {"rotate_degrees": 181},
        {"shear_degrees": 61},
        {"drop_fraction": 2},
        {"noise_hz": 11},
        {"erase_patches": 33},
        {"erase_patches": 0},
        {"min_visible": float("nan")},
    ],
    ids=str,
)
def test_impossible_values_are_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"training\.augmentation\.{name} is .*; give"):
        AugmentationConfig(**setting)


def test_a_summary_names_what_is_drawn():
    assert Augmentation().summary() == "as stored"
    names = AUGMENTATIONS["all of them"].summary()
    for word in (
        "flip",
        "zoom",
        "rotation",
        "shear",
        "moved",
        "polarity",
        "lost",
        "noise",
        "hot",
        "erased",
    ):
        assert word in names
    assert len(fields(Augmentation)) == 12, "a new one belongs into the summary"


# -- the loader ------------------------------------------------------------------------------------
def make_loader(data, *, frames=range(4), length=4, lanes=range(6), sampling=Sampling.mixed):
    config = TrainingConfig(
        batch_size=6, sequence_length=length, num_workers=1, augmentation=EVERYTHING
    )
    plan = SamplingPlan(
        [r.frames for r in data.recordings],
        [r.labelled for r in data.recordings],
        lanes=6,
        sequence_length=length,
        sampling=sampling,
        seed=3,
    )
    return Loader(data, plan, lanes, frames, config, seed=3)


@pytest.fixture
def data(shards):
    return open_dataset(DatasetConfig(root=str(shards)), "train")


@pytest.mark.parametrize("kind", ["shards", "RVT's tree"])
def test_encoded_batches_are_the_dense_ones(tmp_path, data, kind):
    if kind == "RVT's tree":
        root = write_rvt_tree(tmp_path / "tree", {"a": 9, "b": 5})
        data = open_dataset(
            DatasetConfig(root=str(root), kind=DatasetKind.rvt_tree, classes=CLASSES), "train"
        )
    loader = make_loader(data)
    dense = loader.batches(2)
    encoded = device_batches(loader.batches(2, encoded=True), CPU)
    for expected, batch in zip(islice(dense, 10), encoded, strict=False):
        for name, tensor in expected._asdict().items():
            assert torch.equal(getattr(batch, name), tensor), name
    dense.close()
    encoded.close()


def test_a_long_chunk_equals_short_ones_and_ranks_of_a_sequence_equal_one(data):
    """Streamed lanes in one chunk of 20 and in four of 5; a chunk of 4 on two ranks."""
    long = make_loader(data, length=20, frames=range(20), sampling=Sampling.stream).batch(0)
    short = make_loader(data, length=5, frames=range(5), sampling=Sampling.stream)
    frames = torch.cat([short.batch(i).frames for i in range(4)])
    lengths = [short.dataset.recordings[short.plan.chunk(b, 0).recording].frames for b in range(6)]
    assert max(lengths) >= 20
    for lane, length in enumerate(lengths):
        assert torch.equal(long.frames[:length, lane], frames[: min(length, 20), lane])
    for index in range(4):
        whole = make_loader(data).batch(index).frames
        halves = [make_loader(data, frames=part).batch(index) for part in (range(2), range(2, 4))]
        assert torch.equal(torch.cat([half.frames for half in halves]), whole)
        lanes = [make_loader(data, lanes=part).batch(index) for part in (range(4), range(4, 6))]
        assert torch.equal(torch.cat([part.frames for part in lanes], dim=1), whole)


@pytest.mark.parametrize(
    ("preset", "names"),
    [("none", 1), ("standard", 4), ("strong", 12)],
)
def test_the_first_images_show_every_augmentation_of_a_preset_with_boxes(data, preset, names):
    config = compose(TrainConfig, [f"augmentation={preset}"]).training.augmentation
    tiles = example_tiles(data, config)
    assert len(tiles) == names
    assert len({tile.tobytes() for tile in tiles}) == names
    for tile in tiles:
        assert tile.shape == (180, 300, 3)
        assert (tile == GREEN).all(-1).sum() > 100
    loader = make_loader(data)
    loader.config.augmentation = config
    shown = first_batch_tiles(loader, 0)
    assert len(shown) == 6
    assert sum((tile == GREEN).all(-1).sum() > 100 for tile in shown) > 2


def test_the_first_images_show_boxes_that_the_class_map_leaves(shards, data):
    boxes, _ = data.recordings[0].all_boxes()
    names = {CLASSES[class_id] for class_id in boxes["class_id"]}
    source = DatasetRoot(root=str(shards), class_map=dict.fromkeys(names))
    rest = open_dataset(DatasetConfig(roots=[source]), "train")
    assert not len(rest.recordings[0].all_boxes()[0])
    config = compose(TrainConfig, ["augmentation=none"]).training.augmentation
    (tile,) = example_tiles(rest, config)
    assert (tile == GREEN).all(-1).sum() > 100


def test_no_operator_mixes_devices(data):
    """The meta device stands in for a GPU: a tensor made on the CPU would raise."""
    loader = make_loader(data)
    encoded = loader.encoded_batch(3)
    assert {"thin", "turned", "erased_rows", "noise_keys", "hot"} <= encoded.packed.layout.keys()
    batch = encoded.to(torch.device("meta")).expand()
    assert batch.frames.shape == loader.batch(3).frames.shape


@pytest.mark.skipif(not is_supported(), reason="this torch has no device that is written in Python")
def test_a_gpu_gets_the_same_frames_and_the_host_never_waits(data):
    loader = make_loader(data)
    encoded = loader.encoded_batch(3)
    with emulated_gpu() as gpu:
        with gpu.counting() as counts:
            batch = encoded.to(gpu.device).expand()
        assert not counts.waits, counts.table()
        assert len(counts.copies) == 1
        assert counts.operators.total() <= 78, counts.table()
        frames = batch.frames.cpu()
    assert torch.equal(frames, loader.batch(3).frames)
