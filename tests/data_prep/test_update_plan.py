"""What an update does with a recording, for everything that can be known of it."""

from pathlib import Path
from typing import NamedTuple

import pytest
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.write import Stored
from evspan.data_prep.update_plan import (
    BOXES_CHANGED,
    CONFIG_CHANGED,
    MARKED,
    MISSING,
    NEW,
    REFUSED,
    SOURCE_CHANGED,
    RecordingState,
    Redo,
    Target,
    plan_update,
)

FRAMES = {"bins": 10}
CONFIG = {"frames": FRAMES, "dataset": {"labels": {"min_side": 0}}}
OTHER_LABELS = {"frames": FRAMES, "dataset": {"labels": {"min_side": 9}}}
OTHER_FRAMES = {"frames": {"bins": 3}, "dataset": {"labels": {"min_side": 0}}}
TARGET = Target(CONFIG, max_invalid_fraction=0.01)
OLD_SHARD = "train/00000.h5"


def entry(shard: str = OLD_SHARD, outside: int = 0) -> RecordingEntry:
    return RecordingEntry(
        name="a",
        split="train",
        shard=shard,
        group="a",
        frames=2,
        labelled_frames=1,
        boxes=1,
        height=4,
        width=4,
        sensor_height=8,
        sensor_width=8,
        first_us=0,
        last_us=99,
        events=100,
        dropped_events={"outside_sensor": outside},
    )


def stored(config: dict = CONFIG, outside: int = 0) -> Stored:
    return Stored(entry(outside=outside), config, Path(OLD_SHARD))


class Expected(NamedTuple):
    """reason: "" where the recording is kept. reuse, stays: of a recording that is prepared again."""

    reason: str
    reuse: bool = False
    stays: bool = False  # in its shard
    removed: bool = False
    leaves: bool = False  # its shard is written again without it
    drops_manifest: bool = False


LISTED = {"stored": stored(), "listed": entry()}
CASES = {
    "new": (RecordingState(), FRAMES, Expected(NEW)),
    "right": (RecordingState(**LISTED), FRAMES, Expected("")),
    "right, and not in a manifest": (RecordingState(stored=stored()), {}, Expected("")),
    "its shard is gone": (
        RecordingState(listed=entry()),
        FRAMES,
        Expected(MISSING, stays=True, drops_manifest=True),
    ),
    "its shard is gone and frames change": (
        RecordingState(listed=entry()),
        OTHER_FRAMES["frames"],
        Expected(MISSING),
    ),
    "the recording has changed": (
        RecordingState(**LISTED, source_changed=True),
        FRAMES,
        Expected(SOURCE_CHANGED, stays=True, drops_manifest=True),
    ),
    "the boxes have changed": (
        RecordingState(**LISTED, boxes_changed=True),
        FRAMES,
        Expected(BOXES_CHANGED, reuse=True, stays=True, drops_manifest=True),
    ),
    "both have changed": (
        RecordingState(**LISTED, source_changed=True, boxes_changed=True),
        FRAMES,
        Expected(SOURCE_CHANGED, stays=True, drops_manifest=True),
    ),
    "labels have another config": (
        RecordingState(stored=stored(OTHER_LABELS), listed=entry()),
        FRAMES,
        Expected(CONFIG_CHANGED, reuse=True, stays=True, drops_manifest=True),
    ),
    "frames have another config": (
        RecordingState(stored=stored(OTHER_FRAMES), listed=entry()),
        OTHER_FRAMES["frames"],
        Expected(CONFIG_CHANGED, leaves=True, drops_manifest=True),
    ),
    "too many events outside": (
        RecordingState(stored=stored(outside=2), listed=entry(outside=2)),
        FRAMES,
        Expected(REFUSED, reuse=True, stays=True, drops_manifest=True),
    ),
    "marked as damaged": (
        RecordingState(**LISTED, marked=True),
        FRAMES,
        Expected(MARKED, stays=True, drops_manifest=True),
    ),
    "marked, and its shard is gone": (
        RecordingState(listed=entry(), marked=True),
        FRAMES,
        Expected(MARKED, stays=True, drops_manifest=True),
    ),
    "removed from the source": (
        RecordingState(in_source=False, **LISTED),
        FRAMES,
        Expected("", removed=True, leaves=True, drops_manifest=True),
    ),
    "removed, and its shard is gone": (
        RecordingState(in_source=False, listed=entry()),
        FRAMES,
        Expected("", removed=True),
    ),
}


@pytest.mark.parametrize(("state", "listed_frames", "expected"), CASES.values(), ids=CASES)
def test_each_recording_is_kept_redone_or_removed(state, listed_frames, expected):
    plan = plan_update({"train/a": state}, TARGET, listed_frames)
    redo = {}
    if expected.reason:
        reuse = state.stored if expected.reuse else None
        redo = {"train/a": Redo(expected.reason, reuse, OLD_SHARD if expected.stays else "")}
    assert plan.redo == redo
    assert plan.removed == (["train/a"] if expected.removed else [])
    kept = not expected.reason and not expected.removed
    assert plan.kept == ({"train/a": state.stored} if kept else {})
    assert plan.shards_left == ({OLD_SHARD} if expected.leaves else set())
    assert plan.drop_manifest is expected.drops_manifest


def test_the_manifest_stays_while_no_shard_that_it_names_changes():
    states = {"train/a": RecordingState(**LISTED), "train/b": RecordingState()}
    plan = plan_update(states, TARGET, FRAMES)
    assert list(plan.kept) == ["train/a"]
    assert plan.redo == {"train/b": Redo(NEW)}
    assert not plan.drop_manifest
