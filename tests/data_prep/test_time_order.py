"""Times that jump ahead or run backwards: what is dropped, raised or refused."""

import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.events import Events, no_events
from evspan.data_prep.recordings.open import open_recording, open_writer
from evspan.data_prep.recordings.time_order import LONGEST_SPIKE, SPIKE_US, TimeOrder
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.validity import is_acceptable, refuse_invalid
from support.event_files import concatenated, corrected_times, read_by, write_raw


def events_at(times) -> Events:
    """Events whose x and y contain their index."""
    t = np.array(times, np.int64)
    index = np.arange(t.size)
    low = (index & 0xFFFF).astype(np.uint16)
    return Events(t, low, (index >> 16).astype(np.uint16), np.zeros(t.size, np.uint8))


def settled(times, block: int) -> tuple[list[tuple[int, int]], TimeOrder]:
    """(index, time) of the events that are kept, and the object that did it."""
    order = TimeOrder()
    events = events_at(times)
    before = events.t.copy()
    parts = [
        order.settle(events.take(slice(first, first + block)))
        for first in range(0, events.t.size, block)
    ]
    parts.append(order.settle(no_events(), is_last=True))
    assert (events.t == before).all()
    kept = concatenated(parts)
    index = kept.x + (kept.y.astype(np.int64) << 16)
    return list(zip(index.tolist(), kept.t.tolist(), strict=True)), order


def random_times(rng: np.random.Generator) -> list[int]:
    """Dense, sparse or in jumps, with runs that are ahead or behind."""
    size = int(rng.integers(1, 80))
    times = np.cumsum(rng.integers(0, rng.choice([50, 5_000, 30_000]), size)) + 1_000_000
    for _ in range(int(rng.integers(0, 5))):
        first = int(rng.integers(size))
        length = int(rng.integers(1, 6))
        times[first : first + length] += int(rng.integers(-1_000_000, 1_000_000))
    return times.tolist()


def test_times_are_corrected_by_the_definition_whatever_the_blocks():
    rng = np.random.default_rng(0)
    seen_spikes = 0
    seen_late = 0
    for _ in range(400):
        times = random_times(rng)
        expected, spikes, late = corrected_times(times)
        seen_spikes += spikes > 0
        seen_late += late > 0
        for block in (1, 7, 1000):
            kept, order = settled(times, block)
            assert kept == expected
            assert (order.spikes, order.late) == (spikes, late)
    assert min(seen_spikes, seen_late) > 50


@pytest.mark.parametrize("block", [1000, 3000, 1 << 20])
@pytest.mark.parametrize("length", [LONGEST_SPIKE, LONGEST_SPIKE + 1])
def test_a_run_that_is_longer_than_a_spike_is_a_gap(block, length):
    ahead = [10_000_000 + i for i in range(length)]
    times = [*range(100), *ahead, *range(100, 100 + 3 * LONGEST_SPIKE)]
    kept, order = settled(times, block)
    expected, spikes, late = corrected_times(times)
    assert kept == expected
    assert (order.spikes, order.late) == (spikes, late)
    if length == LONGEST_SPIKE:
        assert spikes == length
        assert not late
    else:
        assert not spikes
        assert late == 3 * LONGEST_SPIKE


def test_events_in_order_pass_without_being_held_back_or_copied():
    order = TimeOrder()
    beginning = order.settle(events_at([0] * LONGEST_SPIKE))
    assert not beginning.t.size  # the first event may be a spike
    assert order.settle(events_at([5, 5])).t.size == LONGEST_SPIKE + 2
    assert order.passes(np.array([6, 6, 9_000]), is_last=False)
    jump = events_at([9_001, 9_001 + SPIKE_US, 9_002 + SPIKE_US])
    assert not order.passes(jump.t, is_last=False)
    assert order.settle(jump).t.tolist() == [9_001]
    assert not order.passes(np.array([9_003 + SPIKE_US]), is_last=False)  # others are held back
    rest = order.settle(no_events(), is_last=True)
    assert rest.t.tolist() == [9_001 + SPIKE_US, 9_002 + SPIKE_US]
    assert order.passes(np.array([9_000_000]), is_last=True)


def test_the_largest_step_back_has_its_place():
    _, order = settled([100, 90, 200, 150, 300, 299], 2)
    step = order.largest_step_back
    assert (step.event, step.time_us, step.by_us) == (3, 150, 50)
    assert settled([1, 2, 3], 2)[1].largest_step_back is None


@pytest.mark.parametrize("suffix", ["raw", "dat", "h5"])
def test_one_event_far_ahead_is_dropped_in_every_format(tmp_path, suffix):
    times = np.arange(2000) * 100
    path = tmp_path / f"a.{suffix}"
    with open_writer(path, 480, 640) as writer:
        writer.write(events_at(times)._replace(x=np.zeros(2000, "u2")))
        writer.last_us = 0  # what a flipped bit makes of it
        writer._write(events_at([1_700_000])._replace(x=np.full(1, 7, "u2")))
        writer.write(events_at(times + 200_000)._replace(x=np.zeros(2000, "u2")))
    for at_once in (None, 64):
        events, recording = read_by(path, at_once)
        assert events.t.tolist() == [*times.tolist(), *(times + 200_000).tolist()]
        assert 7 not in events.x
        assert recording.dropped["time_spikes"] == 1
        assert recording.dropped["late_timestamps_raised"] == 0
        assert "dropped as spikes: 1 event far ahead" in recording.warnings()["time_order"]


def entry(**dropped: int) -> RecordingEntry:
    names = ("frames", "labelled_frames", "boxes", "height", "width", "first_us", "last_us")
    return RecordingEntry(
        name="a",
        split="test",
        shard="",
        group="a",
        sensor_height=480,
        sensor_width=640,
        events=1000 - dropped.get("time_spikes", 0),
        dropped_events=dropped,
        event_warnings={"time_order": "the largest step is at event 500, at 75 us"},
        **dict.fromkeys(names, 1),
    )


def test_a_recording_of_which_too_much_would_move_is_refused_with_place_and_amount(tmp_path):
    assert is_acceptable(entry(late_timestamps_raised=10), 0.01)  # of an earlier version
    assert is_acceptable(entry(late_timestamps_raised=900, late_by_1_ms_or_more=10), 0.01)
    assert is_acceptable(entry(time_spikes=100, late_by_1_ms_or_more=9), 0.01)
    assert not is_acceptable(entry(time_spikes=101), 0.01)
    assert is_acceptable(entry(time_spikes=101), 0.102)
    for dropped in (
        {"late_timestamps_raised": 11},
        {"late_timestamps_raised": 900, "late_by_1_ms_or_more": 11},
    ):
        assert not is_acceptable(entry(**dropped), 0.01)
        with pytest.raises(RecordingError) as caught:
            refuse_invalid(tmp_path / "a.raw", entry(**dropped), 0.01)
        for part in ("a.raw: 11 of 1000 events (1.1%)", "event 500", "max_invalid_fraction=0.012"):
            assert part in str(caught.value)
        refuse_invalid(tmp_path / "a.raw", entry(**dropped), 0.012)


def test_a_disorder_of_some_100_us_is_no_wrong_time():
    times = np.arange(1000) * 50
    times[::4] += 200  # the three after each are late
    _, order = settled(times.tolist(), 64)
    assert order.late > 700
    assert order.far_late == 0
    _, order = settled([0, 2000, 1001, 1000, 999], 2)
    assert (order.late, order.far_late) == (3, 2)


def test_sparse_events_in_disorder_are_no_spikes():
    kept, order = settled([0, 15_000, 8_000, 9_000, 25_000], 2)
    assert [time for _, time in kept] == [0, 15_000, 15_000, 15_000, 25_000]
    assert (order.spikes, order.late, order.far_late) == (0, 2, 2)
    _, order = settled([0, 15_000, 5_000, 6_000, 25_000], 2)  # SPIKE_US back
    assert (order.spikes, order.late) == (1, 0)


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_a_single_event_far_from_all_others_is_reported(tmp_path, at_once):
    path = tmp_path / "a.h5"
    times = [0, *range(5_000_000, 5_000_100), 9_000_000]
    with open_writer(path, 480, 640) as writer:
        writer.write(events_at(times))
    events, recording = read_by(path, at_once)
    assert events.t.tolist() == times
    warning = recording.warnings()["lonely_events"]
    assert "2 events far from all others (the first, at 0 us, 5000000 us before" in warning
    assert "the last, at 9000000 us, 3999901 us after" in warning
    with open_writer(path, 480, 640) as writer:
        writer.write(events_at([0, 1, 2_000_000, 2_000_001]))
    assert "lonely_events" not in read_by(path, at_once)[1].warnings()


def test_two_joined_recordings_are_counted_with_the_place_where_they_meet(tmp_path):
    time = [0x8001, 0x6000]
    one = [*time, *([0x2001] * 400), 0x8050, *([0x2001] * 400)]
    path = write_raw(tmp_path / "a.raw", "evt3", one + one)
    recording = open_recording(path)
    assert sum(events.t.size for events in recording.chunks()) == 1600
    assert recording.dropped["late_timestamps_raised"] == 400
    warning = recording.warnings()["time_order"]
    assert "400 events were moved" in warning
    assert f"event 800, at 4096 us, {(0x50 - 1) << 12} us back" in warning
