"""Frames against their definition, one event at a time."""

from itertools import count

import numpy as np
import pytest
from evspan.conf.errors import ConfigError, RecordingError
from evspan.conf.schema.prep import DownsampleBy, FrameConfig
from evspan.data_prep.frames.histogram import frame_size, frames_of
from evspan.data_prep.recordings.events import Events
from support.event_files import concatenated
from support.slow_frames import GivenRecording, random_events, slow_frame

H, W = 22, 35  # neither divides by 4


def all_frames(events: Events, config: FrameConfig, cuts=None, ends=None):
    recording = GivenRecording(events, H, W, cuts)
    return list(
        frames_of(
            recording,
            ends or (lambda first: count(first + config.window_us, config.window_us)),
            config,
        )
    )


def definition(events: Events, start: int, end: int, config: FrameConfig) -> np.ndarray:
    return slow_frame(
        events,
        start,
        end,
        height=H,
        width=W,
        bins=config.bins,
        cutoff=config.cutoff,
        downsample=config.downsample,
        by=config.downsample_by.name,
    )


@pytest.mark.parametrize("by", ["sum", "nearest"])
@pytest.mark.parametrize("downsample", [1, 2, 4])
@pytest.mark.parametrize(("bins", "cutoff"), [(10, 10), (1, 255), (7, 3), (50, 1)])
def test_frames_are_the_definition(downsample, by, bins, cutoff):
    config = FrameConfig(
        bins=bins, cutoff=cutoff, downsample=downsample, downsample_by=DownsampleBy[by]
    )
    events = random_events(
        np.random.default_rng(bins), 12_000, first=1_234_567, last=1_400_000, height=H, width=W
    )
    made = all_frames(events, config)
    first = int(events.t[0])
    assert [end for end, _ in made] == [first + 50_000 * k for k in range(1, 5)]
    for end, frame in made:
        assert frame.dtype == np.uint8
        assert frame.shape == (
            config.channels,
            *frame_size(config, H, W),
        )
        np.testing.assert_array_equal(frame, definition(events, end - 50_000, end, config))


def test_windows_of_unequal_length_have_bins_of_their_own():
    config = FrameConfig(bins=7)
    events = random_events(
        np.random.default_rng(0), 5_000, first=0, last=149_000, height=H, width=W
    )
    ends = [48_001, 100_007, 151_999]
    made = all_frames(events, config, ends=lambda first: iter(ends))
    assert [end for end, _ in made] == ends
    for start, (end, frame) in zip([-1_999, *ends], made):
        np.testing.assert_array_equal(frame, definition(events, start, end, config))


def test_borders_are_half_open_and_bins_are_whole_numbers():
    """An event at a window's end is the next one's; bin k of 7 begins at the first microsecond t with 7 t >= 50000 k."""
    edges = [-(-50_000 * k // 7) for k in range(8)]
    times = sorted([0, *edges[1:], *(e - 1 for e in edges[1:])])
    n = len(times)
    events = Events(
        np.array(times), np.full(n, 3, np.uint16), np.full(n, 2, np.uint16), np.ones(n, np.uint8)
    )
    (end, first), (_, second) = all_frames(events, FrameConfig(bins=7, downsample=1))
    assert end == 50_000
    assert (
        first[:, 2, 3].tolist() == [0] * 7 + [2] * 7
    )  # in each bin its first microsecond and its last
    assert second[:, 2, 3].tolist() == [0] * 7 + [1] + [0] * 6  # the event at 50,000
    assert first.sum() + second.sum() == n


@pytest.mark.parametrize("cutoff", [1, 10, 254, 255])
@pytest.mark.parametrize("n", [1, 9, 255, 256, 257, 1000])
def test_counts_saturate_and_never_wrap(n, cutoff):
    events = Events(
        np.arange(n), np.full(n, 5, np.uint16), np.full(n, 5, np.uint16), np.zeros(n, np.uint8)
    )
    ((_, frame),) = all_frames(events, FrameConfig(cutoff=cutoff, bins=1))
    assert frame[0, 2, 2] == min(n, cutoff) == frame.sum()


def test_saturation_comes_after_the_sum_of_a_block():
    """8 events on each of a block's pixels: 10 of 32, not 4 x 8 of saturated pixels."""
    x, y = (v.ravel().repeat(8).astype(np.uint16) for v in np.meshgrid((4, 5), (6, 7)))
    events = Events(np.zeros(32, np.int64), x, y, np.ones(32, np.uint8))
    for cutoff, expected in ((10, 10), (40, 32)):
        ((_, frame),) = all_frames(events, FrameConfig(cutoff=cutoff, bins=1))
        assert frame[1, 3, 2] == expected == frame.sum()


def test_channels_are_polarity_times_bins_plus_bin():
    times = np.array([0, 4_999, 5_000, 49_999])
    for p in (0, 1):
        events = Events(
            times, np.zeros(4, np.uint16), np.zeros(4, np.uint16), np.full(4, p, np.uint8)
        )
        ((_, frame),) = all_frames(events, FrameConfig())
        expected = np.zeros(20, np.uint8)
        expected[10 * p + np.array([0, 1, 9])] = 2, 1, 1
        np.testing.assert_array_equal(frame[:, 0, 0], expected)


@pytest.mark.parametrize("seed", range(5))
def test_any_chunking_gives_the_same_frames(seed):
    rng = np.random.default_rng(seed)
    events = random_events(rng, 4_000, first=10, last=480_000, height=H, width=W)
    events = events._replace(t=events.t // 5_000 * 5_000)  # many events at once, and on the borders
    whole = all_frames(events, FrameConfig(bins=3))
    cuts = sorted(rng.integers(0, 4_001, 30).tolist())  # some chunks are empty
    border = np.flatnonzero(np.diff(events.t // 50_000))[:3] + 1
    for some in (cuts, list(range(1, 4_000, 97)), border.tolist()):
        for (end, frame), (same_end, same) in zip(
            whole, all_frames(events, FrameConfig(bins=3), some), strict=True
        ):
            assert end == same_end
            np.testing.assert_array_equal(frame, same)


def test_readers_that_cut_chunks_small_give_the_same_frames(tmp_path):
    from evspan.data_prep.recordings.open import open_recording, open_writer

    events = random_events(
        np.random.default_rng(3), 20_000, first=0, last=300_000, height=H, width=W
    )
    with open_writer(tmp_path / "a.raw", H, W) as writer:
        writer.write(events)
    recording = open_recording(tmp_path / "a.raw")
    whole = [f for _, f in all_frames(concatenated(recording.chunks()), FrameConfig())]
    small = GivenRecording(concatenated(recording.chunks(chunk_events=777)), H, W)
    again = [
        f for _, f in frames_of(small, lambda first: count(first + 50_000, 50_000), FrameConfig())
    ]
    np.testing.assert_array_equal(whole, again)


@pytest.mark.parametrize(("downsample", "height", "width"), [(1, H, W), (2, 22, 34), (4, 20, 32)])
def test_counts_add_up_to_the_events(downsample, height, width):
    events = random_events(
        np.random.default_rng(1), 8_000, first=5, last=700_000, height=height, width=width
    )
    recording = GivenRecording(events, height, width, [100, 5_000])
    config = FrameConfig(cutoff=255, downsample=downsample)
    made = [f for _, f in frames_of(recording, lambda first: count(first + 50_000, 50_000), config)]
    assert sum(int(f.sum(dtype=np.int64)) for f in made) == 8_000 == recording.events


def test_silent_windows_are_empty_frames_and_one_event_makes_one():
    events = Events(
        np.array([7, 200_007]),
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint8),
    )
    made = all_frames(events, FrameConfig())
    assert [end for end, _ in made] == [50_007, 100_007, 150_007, 200_007, 250_007]
    assert [int(f.sum()) for _, f in made] == [1, 0, 0, 0, 1]
    assert len(all_frames(events.take(slice(0, 1)), FrameConfig())) == 1
    assert all_frames(events.take(slice(0, 0)), FrameConfig()) == []


def test_a_damaged_timestamp_does_not_make_endless_frames():
    events = Events(
        np.array([0, 1 << 60]),
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint8),
    )
    with pytest.raises(
        RecordingError, match=r"given.raw: no events for .* hours, up to 1152921504606846976 us"
    ):
        all_frames(events, FrameConfig())


def test_frames_are_copies():
    events = random_events(np.random.default_rng(0), 500, first=0, last=90_000, height=H, width=W)
    recording = GivenRecording(events, H, W)
    first, second = (
        frame
        for _, frame in frames_of(
            recording, lambda _: count(50_000, 50_000), FrameConfig(downsample=1)
        )
    )
    assert first.sum() > 0
    assert second.sum() > 0
    assert not np.shares_memory(first, second)
    assert first.sum() + second.sum() == 500


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"window_ms": 0}, "window_ms"),
        ({"bins": 0}, "bins"),
        ({"bins": 51}, "bins"),
        ({"cutoff": 0}, "cutoff"),
        ({"cutoff": 256}, "cutoff"),
        ({"downsample": 3}, "downsample"),
    ],
)
def test_impossible_frames_are_refused(values, name):
    with pytest.raises(ConfigError, match=f"frames.{name} is {values[name]}.*; .*"):
        FrameConfig(**values)
