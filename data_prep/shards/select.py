"""Selects recordings of a prepared dataset by split, name or shard."""

from pathlib import Path

from evspan.conf.errors import ShardError
from evspan.data_prep.shards.format import Manifest, RecordingEntry

LISTED = 10  # recordings that the error message names


def select_recordings(
    manifest: Manifest,
    root: Path,
    *,
    split: str | None = None,
    name: str | None = None,
    shard: str | None = None,
) -> list[RecordingEntry]:
    """Returns the recordings that match, in the order of the manifest; None matches all.

    Args:
        shard: path of a shard below `root`, as in `RecordingEntry.shard`.

    Raises:
        ShardError: no recording matches; the message lists the first ones that exist.
    """
    entries = [
        entry
        for entry in manifest.recordings
        if split in (None, entry.split)
        and name in (None, entry.name)
        and shard in (None, entry.shard)
    ]
    if not entries:
        existing = [f"{entry.split}/{entry.name}" for entry in manifest.recordings[:LISTED]]
        where = root / shard if shard else root
        searched = f"recording {name!r}" if name else "recording"
        searched_split = f"split {split}" if split else "any split"
        raise ShardError(
            f"{where} has no {searched} in {searched_split}; there are: "
            f"{', '.join(existing) or 'none'}"
        )
    return entries
