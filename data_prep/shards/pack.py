"""Part files, one a recording -> shards of several recordings each, one after the other, each whole or not at all."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
from evspan.conf.errors import ShardError
from evspan.data_prep.shards.atomic import UNFINISHED, hdf5_written_whole
from evspan.data_prep.shards.format import ENTRY, SPLITS, RecordingEntry
from evspan.data_prep.shards.write import Stored, stored_in

PARTS = ".parts"
SHARD_NAME = re.compile(r"\d{5,}\.h5")


def part_of(output: Path, key: str) -> Path:
    return output / PARTS / f"{key}.h5"


def is_shard(path: Path) -> bool:
    """By its name alone."""
    return path.parent.name in SPLITS and SHARD_NAME.fullmatch(path.name) is not None


def shard_files(output: Path) -> list[Path]:
    return sorted(p for split in SPLITS for p in (output / split).glob("*.h5") if is_shard(p))


def stored_groups(output: Path, config: dict[str, Any]) -> dict[str, Stored]:
    """What the shards hold, by split/recording. Of a recording that is in two, as an interrupted run can leave it, the one
    made with `config`."""
    found: dict[str, Stored] = {}
    for path in shard_files(output):
        shard = f"{path.parent.name}/{path.name}"
        for key, stored in stored_in(path).items():
            if stored.entry.split != path.parent.name:
                continue  # a file that was put into another split's folder
            if key not in found or found[key].config != config:
                found[key] = stored._replace(entry=replace(stored.entry, shard=shard))
    return found


def gather(
    output: Path,
    kept: dict[str, Stored],
    fresh: dict[str, RecordingEntry],
    homes: dict[str, str],
    touched: set[str],
    shard_bytes: int,
) -> dict[str, RecordingEntry]:
    """Write the shards that change, and delete each one's part files.

    Args:
        kept: recordings that stay as they are. fresh: those in part files. homes: the shards of those of them that take
            their old place; the others fill new shards, in order of name, up to `shard_bytes`.
        touched: more shards to write, since recordings leave them.
    Returns:
        All recordings, by split/recording, with their shards.
    """
    placed = {key: stored.entry for key, stored in kept.items()}
    placed |= {
        key: replace(entry, shard=homes[key]) for key, entry in fresh.items() if key in homes
    }
    placed |= _fill(placed, {k: e for k, e in fresh.items() if k not in homes}, output, shard_bytes)
    for shard in sorted(touched | {placed[key].shard for key in fresh}):
        members = {key: entry for key, entry in sorted(placed.items()) if entry.shard == shard}
        if not members:
            continue  # nobody is left in it: `clean` takes it
        with hdf5_written_whole(output / shard) as (file, check_disk):
            for key, entry in members.items():
                _copy(part_of(output, key) if key in fresh else kept[key].file, entry.group, file)
                file[entry.group].attrs[ENTRY] = json.dumps(asdict(entry))
                check_disk()
        for key in members.keys() & fresh.keys():
            part_of(output, key).unlink()
    return placed


def _copy(path: Path, group: str, file: h5py.File) -> None:
    try:
        with h5py.File(path, "r") as old:
            old.copy(group, file)  # chunks are copied as they are stored
    except (OSError, RuntimeError, KeyError) as error:
        raise ShardError(
            f"{path} is damaged: recording {group} cannot be read ({error}). Delete the file and run the same "
            "again"
        ) from error


def _fill(
    placed: dict[str, RecordingEntry],
    new: dict[str, RecordingEntry],
    output: Path,
    shard_bytes: int,
) -> dict[str, RecordingEntry]:
    out: dict[str, RecordingEntry] = {}
    for split in SPLITS:
        number = (
            max((int(Path(r.shard).stem) for r in placed.values() if r.split == split), default=-1)
            + 1
        )
        size = 0
        for key, entry in sorted(new.items()):
            if entry.split != split:
                continue
            bytes_ = part_of(output, key).stat().st_size
            if size and size + bytes_ > shard_bytes:
                number, size = number + 1, 0
            size += bytes_
            out[key] = replace(entry, shard=f"{split}/{number:05d}.h5")
    return out


def clean(output: Path, recordings: list[RecordingEntry]) -> None:
    """Delete shards that nothing names any more, and the folders of parts."""
    named = {r.shard for r in recordings}
    for path in shard_files(output):
        if f"{path.parent.name}/{path.name}" not in named:
            path.unlink()
    shutil.rmtree(output / PARTS, ignore_errors=True)


def clean_unfinished(output: Path) -> None:
    """What a killed run was writing at; only for the one who has the folder's lock."""
    for folder in (output, *(output / s for s in SPLITS), *(output / PARTS / s for s in SPLITS)):
        for path in folder.glob(UNFINISHED):
            path.unlink()
