"""Decides what an update of a prepared folder has to do. A pure function: it reads no file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.validity import is_acceptable
from evspan.data_prep.shards.write import Stored

NEW = "new"
MISSING = "its shard is missing or damaged"
MARKED = "evspan prep verify found it damaged"
SOURCE_CHANGED = "the recording has changed"
BOXES_CHANGED = "the box file has changed"
BOXES_GONE = "it has no box file any more"
CONFIG_CHANGED = "the config has changed"
REFUSED = "max_invalid_fraction is lower now"
NO_REUSE = (MARKED, SOURCE_CHANGED)  # the stored frames are wrong


@dataclass(frozen=True)
class RecordingState:
    """One recording before the update. The caller has compared its files.

    Attributes:
        in_source: the source folder has it.
        stored: its group in a shard; None where that is missing or damaged.
        listed: its entry in the manifest; None where the manifest does not name it.
        source_changed: the recording differs from the one that `stored` was prepared from.
        boxes_changed: the same of its box file.
        boxes_gone: it had a box file, and has none now.
        marked: `evspan prep verify` found it damaged.
    """

    in_source: bool = True
    stored: Stored | None = None
    listed: RecordingEntry | None = None
    source_changed: bool = False
    boxes_changed: bool = False
    boxes_gone: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Target:
    """What the folder contains after the update.

    Attributes:
        config: the resolved config (`evspan.data_prep.shards.write.resolved_config`).
        max_invalid_fraction: of events outside the sensor or of a wrong time, per recording.
    """

    config: dict[str, Any]
    max_invalid_fraction: float


@dataclass(frozen=True)
class Redo:
    """A recording to prepare.

    Attributes:
        reason: why.
        reuse: an older group of it. Where its windows are still right, its frames are copied.
        shard: the shard where it lies now and stays; empty: it goes to a new shard.
    """

    reason: str
    reuse: Stored | None = None
    shard: str = ""


@dataclass
class UpdatePlan:
    """What an update does, by split/recording.

    Attributes:
        kept: recordings that are right as they are stored.
        redo: recordings to prepare.
        removed: recordings that the source no longer has, sorted.
        shards_left: shards that recordings leave, and that are written again without them.
        drop_manifest: the manifest names shards that are about to change.
    """

    kept: dict[str, Stored] = field(default_factory=dict)
    redo: dict[str, Redo] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    shards_left: set[str] = field(default_factory=set)
    drop_manifest: bool = False


def plan_update(
    states: Mapping[str, RecordingState], target: Target, listed_frames: dict[str, Any]
) -> UpdatePlan:
    """Compares the stored recordings with those of the source and the target config.

    A recording that is prepared again returns to its shard, unless the frame config has changed:
    frames then have another size, and all shards are filled again.

    Args:
        states: all recordings of the source, the shards and the manifest, by split/recording.
        listed_frames: the frame config of the manifest; empty without a manifest.
    """
    plan = UpdatePlan()
    frames = target.config["frames"]
    for key, state in sorted(states.items()):
        stored = state.stored
        if not state.in_source:
            plan.removed.append(key)
            if stored:
                plan.shards_left.add(stored.entry.shard)
            continue
        reason = reason_to_redo(state, target)
        if stored and not reason:
            plan.kept[key] = stored
            continue
        same_frames = stored is not None and stored.config["frames"] == frames
        shard = ""
        if stored and same_frames:
            shard = stored.entry.shard
        elif state.listed and listed_frames == frames:
            shard = state.listed.shard
        elif stored:
            plan.shards_left.add(stored.entry.shard)
        reuse = stored if same_frames and reason not in NO_REUSE else None
        plan.redo[key] = Redo(reason, reuse, shard)
    changing = plan.shards_left | {redo.shard for redo in plan.redo.values()}
    plan.drop_manifest = any(
        state.listed.shard in changing for state in states.values() if state.listed
    )
    return plan


def reason_to_redo(state: RecordingState, target: Target) -> str:
    """Why a recording of the source has to be prepared; empty where what is stored is right."""
    if state.marked:
        return MARKED
    if state.stored is None:
        return MISSING if state.listed else NEW
    if state.source_changed:
        return SOURCE_CHANGED
    if state.boxes_gone:
        return BOXES_GONE
    if state.boxes_changed:
        return BOXES_CHANGED
    if state.stored.config != target.config:
        return CONFIG_CHANGED
    if not is_acceptable(state.stored.entry, target.max_invalid_fraction):
        return REFUSED
    return ""
