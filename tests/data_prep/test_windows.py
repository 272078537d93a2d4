"""Where frames end and which are labelled: RVT's published rule, written out plainly, and what must hold for any labels."""

from itertools import islice, pairwise, takewhile

import hdf5plugin  # noqa: F401  registers the codec of the fixture's recordings
import numpy as np
import pytest
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.windows import LabelRule, window_ends
from evspan.data_prep.labels.box_files import read_boxes
from evspan.data_prep.recordings.open import open_recording
from support.slow_frames import GivenRecording, random_events

WINDOW = 50_000


def ends_until(last_us: int, labels, first: int = 0, every: int = 100_000, window: int = WINDOW):
    """(ends, labelled) of the windows up to the one that holds `last_us`."""
    windows = window_ends(np.array(labels, np.int64), first, window_us=window, label_every_us=every)
    ends = list(takewhile(lambda e: e <= last_us, windows))
    ends.append(next(islice(windows, len(ends), None)))
    return ends, [e for e in ends if e in set(windows.labelled_us.tolist())]


def rvt_labelled_times(labels) -> list[int]:
    """PEERS' rule for 30 and 60 Hz: from the first label at 100 ms or later on, multiples of about 100 ms, 2 ms off at most."""
    times = sorted(set(labels))
    gaps = sorted(b - a for a, b in pairwise(times))
    middle = len(gaps) // 2
    median = gaps[middle] if len(gaps) % 2 else (gaps[middle - 1] + gaps[middle]) / 2
    hz = round(1e6 / median)
    assert hz in (30, 60)
    base = int((6 if hz == 60 else 3) * median)
    taken = [next(t for t in times if t >= 100_000)]
    for t in times:
        distance = t - taken[-1]
        if distance > 0 and abs(distance - round(distance / base) * base) <= 2_000:
            taken.append(t)
    return taken


def regular(hz: float, seconds: float, first: int = 0, jitter: int = 0, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    times = (
        first
        + np.arange(int(hz * seconds)) * 1e6 / hz
        + rng.integers(-jitter, jitter + 1, int(hz * seconds))
    )
    return [int(t) for t in times if t >= 0]


# -- tiling ------------------------------------------------------------------------------------------------------
LABELLINGS = {
    "none": [],
    "one": [333_333],
    "10 Hz": regular(10, 3),
    "60 Hz": regular(60, 3, jitter=40),
    "before": [3, 4],
    "after": [9_000_000],
    "irregular": sorted(np.random.default_rng(0).integers(0, 3_000_000, 40).tolist()),
}


@pytest.mark.parametrize("first", [0, 1, 49_999, 50_000, 777_777])
@pytest.mark.parametrize("labels", LABELLINGS.values(), ids=LABELLINGS)
def test_windows_tile_the_recording_from_its_first_event_to_its_last(labels, first):
    """Each event lies in exactly one window, and there is none without a reason."""
    events = random_events(
        np.random.default_rng(first), 3_000, first=first, last=2_900_000, height=8, width=8
    )
    first, last = int(events.t[0]), int(events.t[-1])
    ends, labelled = ends_until(last, labels, first)
    starts = [ends[0] - WINDOW, *ends[:-1]]
    for t in events.t.tolist():
        assert sum(start <= t < end for start, end in zip(starts, ends, strict=True)) == 1
    assert starts[0] <= first < ends[0]
    assert starts[-1] <= last < ends[-1]
    assert all(48_000 <= b - a <= 52_000 for a, b in zip(starts, ends, strict=True))
    assert set(labelled) <= set(labels)
    config = FrameConfig(cutoff=255, downsample=1)
    made = list(
        frames_of(
            GivenRecording(events, 8, 8),
            lambda f: window_ends(
                np.array(labels, np.int64), f, window_us=WINDOW, label_every_us=100_000
            ),
            config,
        )
    )
    assert [end for end, _ in made] == ends
    assert sum(int(f.sum(dtype=np.int64)) for _, f in made) == 3_000


def test_without_labels_the_first_window_begins_at_the_first_event():
    assert ends_until(200_000, [], first=123)[0] == [50_123, 100_123, 150_123, 200_123]


def test_labels_up_to_the_first_event_are_ignored_and_later_ones_anchor_the_grid():
    ends, labelled = ends_until(400_000, [100_000, 130_000, 275_000], first=130_000)
    assert labelled == [275_000]
    assert ends == [175_000, 225_000, 275_000, 325_000, 375_000, 425_000]


def test_labels_after_the_last_event_do_no_harm():
    ends, labelled = ends_until(390_000, [220_000, 320_000, 420_000, 520_000, 1 << 60])
    assert labelled == [220_000, 320_000, 420_000]
    assert ends[-1] == 420_000
    ends, labelled = ends_until(390_000, [1 << 60])
    assert labelled == []
    assert len(ends) == 8


DAY_US = 86_400_000_000


@pytest.mark.parametrize(("hz", "first_label"), [(60, 110_000), (10, 40_000)])
def test_a_sensor_clock_that_has_run_for_long_makes_no_difference(hz, first_label):
    """Where every label that may anchor the grid gives the same one."""
    labels = np.array(regular(hz, 2, first=first_label, jitter=30))
    ends, labelled = ends_until(1_990_000, labels, first=20_000)
    later, later_labelled = ends_until(1_990_000 + DAY_US, labels + DAY_US, first=20_000 + DAY_US)
    assert [end - DAY_US for end in later] == ends
    assert [end - DAY_US for end in later_labelled] == labelled
    assert len(labelled) > 15


def test_a_sensor_clock_that_has_run_for_long_may_move_the_anchor():
    """RVT's first labelled frame is at 100 ms of the recording's own clock."""
    labels = np.array(regular(60, 2, first=40_000))
    _, labelled = ends_until(1_990_000, labels, first=20_000)
    _, later = ends_until(1_990_000 + DAY_US, labels + DAY_US, first=20_000 + DAY_US)
    assert labelled[0] == labels[labels >= 100_000][0]
    assert later[0] == labels[0] + DAY_US
    assert len(later) - len(labelled) in (0, 1)


# -- which labels ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hz", "every", "step"),
    [
        (10, 100, 1),
        (20, 100, 2),
        (30, 100, 3),
        (60, 100, 6),
        (20, 50, 1),
        (60, 50, 3),
        (10, 50, 1),
        (30, 50, 3),
        (25, 100, 5),
        (100, 100, 10),
        (5, 100, 1),
        (1, 50, 1),
    ],
)
@pytest.mark.parametrize("jitter", [0, 150])
def test_regular_labels_of_any_rate(hz, every, step, jitter):
    """Every step-th label has a frame that ends at its time, to the microsecond, and there are no others."""
    labels = regular(hz, 4, first=100_000, jitter=jitter)
    ends, labelled = ends_until(labels[-1], labels, first=30_000, every=1000 * every)
    assert labelled == labels[::step]
    assert max(abs(b - a - WINDOW) for a, b in pairwise(ends)) <= 2_000
    if every == 50 and hz in (20, 60):  # a label on every frame, from the first label on
        assert [e for e in ends if labels[0] <= e <= labelled[-1]] == labelled


@pytest.mark.parametrize(
    ("off", "taken"), [(0, True), (2_000, True), (-2_000, True), (2_001, False), (-2_001, False)]
)
def test_the_tolerance_is_two_milliseconds(off, taken):
    _, labelled = ends_until(1_000_000, [100_000, 200_000 + off])
    assert ((200_000 + off) in labelled) == taken


@pytest.mark.parametrize("hz", [30, 60])
@pytest.mark.parametrize("seed", range(8))
def test_the_labelled_times_are_those_of_rvt(hz, seed):
    """With jitter, a first label anywhere, and gaps of seconds, as where no object is in sight."""
    rng = np.random.default_rng(seed)
    labels = regular(hz, 12, first=int(rng.integers(0, 180_000)), jitter=60, seed=seed)
    for gap in rng.integers(0, 11_000_000, 6):
        end = gap + rng.integers(50_000, 2_000_000)
        labels = [t for t in labels if not gap < t < end]
    ends, labelled = ends_until(labels[-1], labels)
    expected = rvt_labelled_times(labels)
    assert labelled[-len(expected) :] == expected
    assert all(
        t < 100_000 and expected[0] - t > 97_000 for t in labelled[: -len(expected)]
    )  # RVT begins at 100 ms
    assert set(labelled) <= set(ends)


def test_a_label_before_the_anchor_that_fits_is_taken():
    assert ends_until(300_000, [50_000, 100_000, 150_000], every=50_000)[1] == [
        50_000,
        100_000,
        150_000,
    ]
    assert ends_until(300_000, [50_000, 100_000, 150_000], every=100_000)[1] == [100_000]
    assert ends_until(300_000, [20_000, 80_000])[1] == [80_000]  # none at 100 ms or later


@pytest.mark.parametrize("every", [50, 100])
@pytest.mark.parametrize("mean_ms", [15, 60, 300, 1_500])
def test_irregular_labels_are_used_as_far_as_windows_can_be_moved(mean_ms, every):
    rng = np.random.default_rng(mean_ms)
    labels = np.cumsum(rng.exponential(1000 * mean_ms, 400).astype(np.int64) + 1).tolist()
    ends, labelled = ends_until(labels[-1], labels, every=1000 * every)
    assert labelled == sorted(set(labelled) & set(labels) & set(ends))
    assert (
        max(abs(b - a - WINDOW) for a, b in pairwise(ends)) <= 2_001
    )  # ends are whole microseconds
    assert min(b - a for a, b in pairwise(labelled)) >= 1000 * every - 2_000
    for before, after in pairwise(labelled):  # 13 windows of 48 to 52 ms reach any time
        assert all(
            t - before < 650_000 or after - t <= 100_000 for t in labels if before < t < after
        )
    if mean_ms == 1_500:
        assert len(labelled) > 0.5 * len(labels)


def test_the_windows_between_two_labels_share_the_difference():
    ends, _ = ends_until(400_000, [100_000, 301_700])
    between = [e for e in ends if 100_000 <= e <= 301_700]
    assert between == [100_000, 150_425, 200_850, 251_275, 301_700]


@pytest.mark.parametrize("window", [1_000, 5_000, 20_000, 200_000])
def test_windows_of_another_length(window):
    labels = regular(60, 6, first=110_000, jitter=100)
    ends, labelled = ends_until(5_000_000, labels, first=3, every=100_000, window=window)
    assert labelled
    assert labelled[0] == labels[0]
    assert set(labelled) <= set(labels)
    assert max(abs(b - a - window) for a, b in pairwise(ends)) <= min(2_000, window / 4) + 1
    expected = max(100_000, window)
    assert np.median(np.diff(labelled)) == pytest.approx(expected, abs=2_000)


def test_the_published_preprocessing_labels_the_same_frames(parity_dir):
    checked = 0
    for path in sorted(
        (parity_dir / "prep_fixture" / "output").glob("*/*/labels_v2/timestamps_us.npy")
    ):
        split, name = path.parts[-4], path.parts[-3]
        source = parity_dir / "prep_fixture" / "input" / split
        boxes, recording = (
            read_boxes(source / f"{name}_bbox.npy"),
            open_recording(source / f"{name}_td.h5"),
        )
        first = int(next(recording.chunks()).t[0])
        expected = np.load(path).tolist()
        ends, labelled = ends_until(expected[-1], boxes["t"], first)
        assert labelled[-len(expected) :] == expected
        theirs = np.load(
            next((path.parent.parent / "event_representations_v2").glob("*/timestamps_us.npy"))
        )
        assert set(theirs[theirs >= expected[0]].tolist()) <= set(
            ends
        )  # before it, each counts back in its own way
        checked += 1
    assert checked == 3


def test_the_worked_example_of_the_module():
    ends, labelled = ends_until(900_000, [100_000, 133_000, 201_000, 340_000, 860_000], 12_000)
    assert labelled == [100_000, 201_000, 860_000]
    assert ends[:6] == [50_000, 100_000, 150_500, 201_000, 251_692, 302_384]
    assert ends[-3:] == [809_307, 860_000, 910_000]
    rule = LabelRule(window_us=50_000, label_every_us=100_000, step_us=100_000)
    assert rule.taken([33_000, 101_000, 240_000, 760_000]) == [101_000, 760_000]
