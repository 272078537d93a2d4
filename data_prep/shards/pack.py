"""Gathers part files, one per recording, into shards of several recordings."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
from evspan.conf.errors import ShardError
from evspan.data_prep.hdf5_files import is_damage, unavailable
from evspan.data_prep.shards.atomic import UNFINISHED, atomic_hdf5
from evspan.data_prep.shards.attributes import CONFIG, ENTRY, read_numbers, read_text, write_text
from evspan.data_prep.shards.checksums import INDEX_XXH3
from evspan.data_prep.shards.format import FRAME_SHAPE, SPLITS, RecordingEntry, columns_of
from evspan.data_prep.shards.group_check import checksum_columns, has_checksums
from evspan.data_prep.shards.reading import (
    READ_ERRORS,
    find_group,
    open_shard,
    require_inside,
    require_readable_place,
)
from evspan.data_prep.shards.write import Stored, stored_in

PARTS = ".parts"
SHARD_NAME = re.compile(r"\d{5,}\.h5")


def part_of(output: Path, key: str) -> Path:
    """The part file of a recording, split/recording."""
    return output / PARTS / f"{key}.h5"


def is_shard(path: Path) -> bool:
    """Whether the file has the name of a shard."""
    return path.parent.name in SPLITS and SHARD_NAME.fullmatch(path.name) is not None


def shard_files(output: Path) -> list[Path]:
    """The shards of all splits, sorted by path.

    Raises:
        ShardError: one lies outside the folder and its split's, through a link.
    """
    paths: list[Path] = []
    for split in SPLITS:
        paths += filter(is_shard, (output / split).glob("*.h5"))
    for path in paths:
        require_readable_place(output, path.parent.name, path)
    return sorted(paths)


def require_own_folders(output: Path) -> None:
    """Requires that the folders of all splits lie in `output`, before anything is written there.

    Raises:
        ShardError: one is a link to another place.
    """
    for split in SPLITS:
        require_inside(output, output / split)


def stored_groups(output: Path, config: dict[str, Any]) -> dict[str, Stored]:
    """The groups of all shards, by split/recording.

    An interrupted run can leave a recording in two shards; the one prepared with `config` counts.
    """
    groups: dict[str, Stored] = {}
    for path in shard_files(output):
        shard = f"{path.parent.name}/{path.name}"
        for key, stored in stored_in(path).items():
            if stored.entry.split != path.parent.name:
                continue  # the file was moved to another split's folder
            if key not in groups or groups[key].config != config:
                groups[key] = stored._replace(entry=replace(stored.entry, shard=shard))
    return groups


def gather(
    output: Path,
    kept: dict[str, Stored],
    fresh: dict[str, RecordingEntry],
    shards: dict[str, str],
    shards_left: set[str],
    shard_bytes: int,
    before_replacing: Callable[[str], object],
) -> dict[str, RecordingEntry]:
    """Writes the shards that change, and deletes the part files of each.

    Args:
        kept: recordings that stay as they are.
        fresh: recordings in part files.
        shards: the shards of those of `fresh` that have a place; the others fill new shards, in
            the order of their names, up to `shard_bytes`.
        shards_left: more shards to write, because recordings leave them.
        before_replacing: is called with each shard when its new file is complete.

    Returns:
        All recordings, by split/recording, with their shards.
    """
    placed = {key: stored.entry for key, stored in kept.items()}
    new: dict[str, RecordingEntry] = {}
    for key, entry in fresh.items():
        if key in shards:
            placed[key] = replace(entry, shard=shards[key])
        else:
            new[key] = entry
    placed |= _fill(placed, new, output, shard_bytes)
    for shard in sorted(shards_left | {placed[key].shard for key in fresh}):
        members = {key: entry for key, entry in sorted(placed.items()) if entry.shard == shard}
        if not members:
            continue  # it is empty now, and `clean` deletes it
        require_inside(output, output / shard)
        with atomic_hdf5(output / shard, partial(before_replacing, shard)) as (file, check_disk):
            for key, entry in members.items():
                group = _copy(part_of(output, key) if key in fresh else kept[key].file, entry, file)
                write_text(group, ENTRY, json.dumps(asdict(entry)))
                check_disk()
        for key in members.keys() & fresh.keys():
            part_of(output, key).unlink()
    return placed


def _copy(path: Path, entry: RecordingEntry, file: h5py.File) -> h5py.Group:
    """Copies a recording's datasets as they are stored, with their checksums."""
    try:
        with open_shard(path) as old:
            stored = find_group(old, entry)
            group = file.create_group(entry.group)
            names = ["frames", *columns_of(stored)]
            if has_checksums(stored):
                names += checksum_columns(stored)
                write_text(group, INDEX_XXH3, read_text(stored, INDEX_XXH3))
            for name in names:
                old.copy(stored[name], group)  # copies the chunks without decoding them
            group.attrs[FRAME_SHAPE] = read_numbers(stored, FRAME_SHAPE, 3)
            write_text(group, CONFIG, read_text(stored, CONFIG))
            return group
    except (*READ_ERRORS, ShardError) as error:
        if not isinstance(error, ShardError) and not is_damage(error):
            raise unavailable(path, error) from error
        raise ShardError(
            f"{path} is damaged: recording {entry.group} cannot be read ({error}). Delete the file "
            "and run the same again"
        ) from error


def _fill(
    placed: dict[str, RecordingEntry],
    new: dict[str, RecordingEntry],
    output: Path,
    shard_bytes: int,
) -> dict[str, RecordingEntry]:
    """Gives each new recording a shard with a number above those in use."""
    filled: dict[str, RecordingEntry] = {}
    for split in SPLITS:
        used = [int(Path(r.shard).stem) for r in placed.values() if r.split == split]
        number = max(used, default=-1) + 1
        size = 0
        for key, entry in sorted(new.items()):
            if entry.split != split:
                continue
            bytes_ = part_of(output, key).stat().st_size
            if size and size + bytes_ > shard_bytes:
                number += 1
                size = 0
            size += bytes_
            filled[key] = replace(entry, shard=f"{split}/{number:05d}.h5")
    return filled


def clean(output: Path, recordings: list[RecordingEntry]) -> None:
    """Deletes shards without recordings, and the folder of part files."""
    named = {r.shard for r in recordings}
    for path in shard_files(output):
        if f"{path.parent.name}/{path.name}" not in named:
            path.unlink()
    shutil.rmtree(output / PARTS, ignore_errors=True)


def clean_unfinished(output: Path) -> None:
    """Deletes temporary files of a killed run. The caller holds the folder's lock."""
    folders = [output]
    for split in SPLITS:
        folders += [output / split, output / PARTS / split]
    for folder in folders:
        for path in folder.glob(UNFINISHED):
            path.unlink()
