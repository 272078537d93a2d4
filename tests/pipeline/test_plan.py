"""The sampling plan: pure in (seed, micro-batch), every frame once an epoch, starts where recordings start."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from evspan.conf.errors import ShardError
from evspan.conf.schema.training import AugmentationConfig, Sampling
from evspan.pipeline.data.augment import (
    Augmentation,
    augment_boxes,
    augment_frames,
    draw_augmentation,
)
from evspan.pipeline.data.plan import Chunk, Repeats, SamplingPlan

FRAMES = [12, 3, 25, 5]
T = 5


def plan(
    sampling=Sampling.mixed,
    lanes=4,
    seed=3,
    frames=FRAMES,
    labelled=None,
    staggered=False,
    **kwargs,
):
    labelled = labelled or [np.arange(n) % 2 == 1 for n in frames]
    return SamplingPlan(
        frames,
        labelled,
        lanes=lanes,
        sequence_length=T,
        sampling=sampling,
        seed=seed,
        staggered=staggered,
        **kwargs,
    )


def test_same_seed_same_plan_whatever_was_asked_before():
    one, two = plan(), plan()
    forward = [one.chunk(lane, i) for i in range(60) for lane in range(4)]
    backward = [two.chunk(lane, i) for i in reversed(range(60)) for lane in reversed(range(4))]
    assert forward == backward[::-1]
    assert forward != [plan(seed=4).chunk(lane, i) for i in range(60) for lane in range(4)]


@pytest.mark.parametrize("lane", range(3))
def test_a_streaming_lane_reads_every_frame_once_an_epoch_in_order(lane):
    p = plan(Sampling.stream, lanes=3)
    orders = []
    for epoch in range(2):
        chunks = [p.chunk(lane, epoch * p.chunks_per_epoch + i) for i in range(p.chunks_per_epoch)]
        seen = [(c.recording, c.first + t) for c in chunks for t in range(c.frames)]
        assert sorted(seen) == [(r, f) for r, n in enumerate(FRAMES) for f in range(n)]
        for before, after in itertools.pairwise(chunks):
            follows = after.recording == before.recording and after.first == before.first + T
            assert after.start != follows
            assert (after.draw == before.draw) == follows
        orders.append([c.recording for c in chunks])
    assert orders[0] != orders[1]


# Passes are equally long; or not, as two recordings are read more than once.
@pytest.mark.parametrize("repeats", [None, [1.0, 2.5, 1.0, 1.7]])
def test_a_staggered_lane_reads_the_same_from_a_later_chunk_on(repeats):
    options = {"lanes": 64, "frames": [20] * 4}
    if repeats:
        options["repeats"] = Repeats(np.array(repeats), [np.ones(20)] * 4)
    together, staggered = plan(**options), plan(**options, staggered=True)
    first_frames = set()
    for lane in range(32):
        chunks = [staggered.chunk(lane, i) for i in range(60)]
        in_step = [together.chunk(lane, i) for i in range(90)]
        later = [replace(chunk, start=chunk.first == 0) for chunk in chunks]
        assert any(in_step[k : k + 60] == later for k in range(30))
        assert chunks[0].start
        first_frames.add(chunks[0].first)
    assert first_frames == {0, 5, 10, 15}
    for lane in range(32, 64):  # random lanes do not change
        assert staggered.chunk(lane, 7) == together.chunk(lane, 7)


def test_where_staggered_lanes_begin_is_a_function_of_the_seed():
    begins = [
        [plan(Sampling.stream, lanes=8, seed=seed, staggered=True).chunk(k, 0) for k in range(8)]
        for seed in (3, 3, 4)
    ]
    assert begins[0] == begins[1] != begins[2]


def test_random_lanes_end_at_labelled_frames_and_begin_with_zero_state():
    p = plan(Sampling.random, lanes=2)
    chunks = [p.chunk(lane, i) for i in range(300) for lane in range(2)]
    assert all(c.start and not c.streamed for c in chunks)
    assert all((c.first + c.frames - 1) % 2 == 1 or c.first == 0 for c in chunks)
    assert {c.recording for c in chunks} == set(range(4))


def test_mixed_streams_the_first_half():
    p = plan(lanes=5)
    assert [p.chunk(lane, 7).streamed for lane in range(5)] == [True, True, True, False, False]


def test_fewer_recordings_than_lanes_and_nothing_labelled():
    p = plan(lanes=6, frames=[2], labelled=[np.zeros(2, bool)], staggered=True)
    assert all(p.chunk(lane, i).frames in (1, 2) for lane in range(6) for i in range(20))


def test_no_frames_at_all_is_told():
    with pytest.raises(ShardError, match="no frames"):
        plan(frames=[0, 0])


# -- augmentation: frames and boxes move together ----------------------------------------------------------------
def blob(box, h=48, w=64):
    """Two frames in which exactly the box (cx, cy, w, h) is lit."""
    _, cx, cy, bw, bh = box
    frames = np.zeros((2, 3, h, w), np.uint8)
    frames[:, :, int(cy - bh / 2) : int(cy + bh / 2), int(cx - bw / 2) : int(cx + bw / 2)] = 7
    return frames


def augmented(frames, how):
    out = np.zeros_like(frames)
    augment_frames(frames, how, out)
    return out


@pytest.mark.parametrize("width", [64, 61])  # whole words of eight cells, or not
@pytest.mark.parametrize(
    "how",
    [
        Augmentation(zoom=1.4, top=-7, left=-11.5),
        Augmentation(zoom=0.8, top=3.3, left=5),
        Augmentation(True, 1.4, -7, -11.5),
        Augmentation(True, 0.8, 3.3, 5),
        Augmentation(flip=True),
    ],
)
def test_every_pixel_shows_what_the_definition_says(how, width):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 40, width)).astype(np.uint8)
    frames[frames < 100] = 0
    expected = np.zeros_like(frames)
    for y in range(40):
        for x in range(width):
            row, column = (
                math.floor((y + 0.5 - how.top) / how.zoom),
                math.floor((x + 0.5 - how.left) / how.zoom),
            )
            if 0 <= row < 40 and 0 <= column < width:
                expected[..., y, x] = frames[..., row, width - 1 - column if how.flip else column]
    np.testing.assert_array_equal(augmented(frames, how), expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("streamed", [True, False])
def test_boxes_follow_the_pixels(seed, streamed):
    box = np.array([[2, 30, 20, 16, 10]], np.float32)
    how = draw_augmentation(
        AugmentationConfig(), Chunk(0, 0, 2, True, streamed, (seed,)), seed=1, height=48, width=64
    )
    if streamed:
        assert how.zoom <= 1
    frames = augmented(blob(box[0]), how)
    assert frames.shape == (2, 3, 48, 64)
    lit = np.argwhere(frames[0, 0])
    moved = augment_boxes(box, how, height=48, width=64)
    if not len(moved):
        assert len(lit) <= 64
        return
    _, cx, cy, w, h = moved[0]
    edges = (cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2)
    np.testing.assert_allclose(edges, (*lit.min(0), *(lit.max(0) + 1)), atol=1.01)


def test_flip_alone_is_a_mirror_and_nothing_is_nothing():
    box = np.array([[0, 30, 20, 16, 10]], np.float32)
    frames = blob(box[0])
    np.testing.assert_array_equal(augmented(frames, Augmentation()), frames)
    np.testing.assert_array_equal(augmented(frames, Augmentation(flip=True)), frames[..., ::-1])
    np.testing.assert_allclose(
        augment_boxes(box, Augmentation(flip=True), height=48, width=64), [[0, 34, 20, 16, 10]]
    )


def test_every_frame_of_a_sequence_gets_the_same_draw():
    p = plan(Sampling.stream, lanes=1)
    draws = {}
    for i in range(p.chunks_per_epoch):
        chunk = p.chunk(0, i)
        how = draw_augmentation(AugmentationConfig(), chunk, seed=1, height=48, width=64)
        assert draws.setdefault(chunk.recording, how) == how
    assert len(set(draws.values())) == len(draws)
