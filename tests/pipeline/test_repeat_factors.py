"""Repeat-factor sampling against its definition, and what is read against the factors."""

import logging
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import Sampling, TrainingConfig
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.data.plan import Part
from evspan.pipeline.data.repeat_factors import repeat_factors
from evspan.pipeline.data.sampling import sampling_plan

T = 3
THRESHOLD = 0.3
# Classes of the boxes of each frame; None: the frame is not labelled. Class -1: an ignore region.
RECORDINGS = [
    [[0], None, [0, 0], [], [0], None, [0], [0]],
    [[0], [0], [-1], [], [0, 1], None, [], [0], [0], [0]],
    [[0], None, None, [0], [0]],
    [[0, 2], [0], [0], [0, 1], None, [0], []],
]


def recording(name, frames):
    boxes = [np.zeros(len(ids or []), BOX) for ids in frames]
    for rows, ids in zip(boxes, frames, strict=True):
        rows["class_id"] = ids or []
    every = np.concatenate(boxes)
    return RecordingData(
        name=name,
        clock_us=0,
        end_us=np.arange(len(frames)),
        labelled=np.array([ids is not None for ids in frames]),
        box_start=np.cumsum([0, *map(len, boxes)]),
        read_frames=lambda rows: None,
        read_boxes=every.__getitem__,
    )


def dataset(parts=()):
    recordings = [recording(f"r{i}", frames) for i, frames in enumerate(RECORDINGS)]
    classes = ["car", "bus", "tram", "bike"]
    return Dataset(recordings, SimpleNamespace(), 4, 4, classes, parts=list(parts))


def plain_factors(weights):
    """r(c) of each class, one by one. weights: of the labelled frames of each recording."""
    factors = []
    for c in range(4):
        with_class = total = 0.0
        for frames, weight in zip(RECORDINGS, weights, strict=True):
            for ids in frames:
                if ids is not None:
                    total += weight
                    with_class += weight * (c in ids)
        frequency = with_class / total
        factors.append(max(1.0, math.sqrt(THRESHOLD / frequency)) if frequency else 1.0)
    return factors


def largest(frames, factors):
    return max([1.0] + [factors[c] for ids in frames if ids for c in ids if c >= 0])


@pytest.mark.parametrize("parts", [[], [Part("a", 3, range(2)), Part("b", 1, range(2, 4))]])
def test_factors_agree_with_the_definition(parts):
    weights = [1.0] * 4
    for part in parts:
        labelled = sum(ids is not None for i in part.recordings for ids in RECORDINGS[i])
        for i in part.recordings:
            weights[i] = part.weight / labelled
    factors = plain_factors(weights)
    assert factors[0] == factors[3] == 1 < factors[1] < factors[2]
    repeats = repeat_factors(dataset(parts), THRESHOLD, T)
    expected = [largest(frames, factors) for frames in RECORDINGS]
    np.testing.assert_allclose(repeats.recordings, expected, rtol=1e-12)
    for i, frames in enumerate(RECORDINGS):
        for end in range(len(frames)):
            first = max(0, end + 1 - T)
            expected_end = largest(frames[first : first + T], factors)
            assert repeats.ends[i][end] == pytest.approx(expected_end, rel=1e-12)


def plan(sampling, parts=(), threshold=THRESHOLD):
    config = TrainingConfig(
        batch_size=2, sequence_length=T, sampling=sampling, repeat_factor_threshold=threshold
    )
    return sampling_plan(dataset(parts), config, seed=4)


def test_streamed_recordings_are_read_as_often_as_their_factors():
    p = plan(Sampling.stream)
    starts = Counter()
    for lane in range(2):
        starts.update(c.recording for c in (p.chunk(lane, i) for i in range(6000)) if c.start)
    expected = [largest(frames, plain_factors([1] * 4)) for frames in RECORDINGS]
    assert max(expected) > 2 * min(expected)
    actual = np.array([starts[i] for i in range(4)])
    np.testing.assert_allclose(actual / actual[0], expected, rtol=0.03)


def test_a_pass_has_each_recording_as_often_as_its_factor_rounded_down_or_up():
    p = plan(Sampling.stream)
    expected = [largest(frames, plain_factors([1] * 4)) for frames in RECORDINGS]
    seen = set()
    for epoch in range(60):
        order, _ = p._draw_epoch(0, epoch)
        counts = np.bincount(order, minlength=4)
        seen.add(tuple(counts.tolist()))
        assert all(n in (math.floor(e), math.ceil(e)) for n, e in zip(counts, expected))
    assert len(seen) > 2


@pytest.mark.parametrize("parts", [(), (Part("a", 3, range(2)), Part("b", 1, range(2, 4)))])
def test_random_chunks_are_drawn_as_their_factors(parts):
    p = plan(Sampling.random, parts)
    repeats = repeat_factors(dataset(parts), THRESHOLD, T)
    expected = Counter()
    for part in parts or [Part("", 1, range(4))]:
        ends = [
            (i, end)
            for i in part.recordings
            for end, ids in enumerate(RECORDINGS[i])
            if ids is not None
        ]
        total = sum(repeats.ends[i][end] for i, end in ends)
        for i, end in ends:
            fraction = part.weight / sum(part.weight for part in parts) if parts else 1
            expected[i, max(0, end + 1 - T)] += fraction * repeats.ends[i][end] / total
    draws = 12_000
    actual = Counter()
    for i in range(draws // 2):
        for lane in range(2):
            chunk = p.chunk(lane, i)
            actual[chunk.recording, chunk.first] += 1
    assert set(actual) == set(expected)
    for key, fraction in expected.items():
        error = math.sqrt(fraction * (1 - fraction) / draws)
        assert abs(actual[key] / draws - fraction) < 5 * error, key


@pytest.mark.parametrize("sampling", Sampling)
def test_no_class_under_the_threshold_is_the_plain_plan(sampling):
    tiny, off = plan(sampling, threshold=1e-6), plan(sampling, threshold=0)
    for lane in range(2):
        streamed = [(tiny.chunk(lane, i), off.chunk(lane, i)) for i in range(40)]
        if lane < off.streaming_lanes:
            assert all(one == other for one, other in streamed)
    again = plan(sampling)
    order = [(lane, i) for lane in range(2) for i in range(60)]
    forward = [again.chunk(*key) for key in order]
    assert [plan(sampling).chunk(*key) for key in order[::-1]] == forward[::-1]


def test_one_line_names_the_factor_of_each_class(caplog):
    with caplog.at_level(logging.INFO, logger="evspan"):
        plan(Sampling.random)
    (message,) = caplog.messages
    assert "training.repeat_factor_threshold=0.3): car 1.00 (in 79 % of the frames), bus" in message
    assert "bike 1.00 (in 0 % of the frames)" in message


def test_a_threshold_that_is_no_fraction_is_refused():
    with pytest.raises(ConfigError, match="training.repeat_factor_threshold is 2"):
        TrainingConfig(repeat_factor_threshold=2)
