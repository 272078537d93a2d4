"""A folder of recordings -> a prepared dataset. Run again, it does only what is missing or has changed."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
from evspan.conf.errors import ConfigError, RecordingError, ShardError
from evspan.conf.schema.prep import PrepConfig
from evspan.data_prep.recordings.sources import Source, find_sources, in_no_split
from evspan.data_prep.shards.atomic import LOCK, UNFINISHED, file_xxh3, locked, written_whole
from evspan.data_prep.shards.format import MANIFEST, SPLITS, Manifest, RecordingEntry, load_manifest
from evspan.data_prep.shards.marks import MARKS, read_marks, write_marks
from evspan.data_prep.shards.pack import (
    PARTS,
    clean,
    clean_unfinished,
    gather,
    is_shard,
    part_of,
    stored_groups,
)
from evspan.data_prep.shards.write import Stored, config_of, refuse_invalid, stored_in
from evspan.data_prep.workers import Elsewhere, Job, run_jobs

NEW, DAMAGED = "new", "its shard is missing or damaged"
SOURCE_CHANGED, BOXES_CHANGED, CONFIG_CHANGED = (
    "the recording has changed",
    "the box file has changed",
    "the config has changed",
)
REFUSED_NOW = "max_invalid_fraction is lower now"
MARKED = "evspan prep verify found it damaged"


@dataclass(frozen=True)
class Report:
    """What a run did. prepared: split/recording -> why. removed: split/recording that the source no longer has."""

    manifest: Manifest
    prepared: dict[str, str]
    removed: list[str]


def prepare(config: PrepConfig, elsewhere: Elsewhere | None = None) -> Report:
    """Prepare `config.source` into `config.output`, in processes of this machine or elsewhere (`workers.run_jobs`).

    A recording goes to a part file, parts are gathered into shards, manifest.json is written last; each appears whole or not at
    all. Killed anywhere, the next run goes on from the parts and shards that are there.

    Raises:
        ConfigError, RecordingError, BoxesError, ShardError: what is wrong with the config, the source or the output. A bad
            recording does not keep the others from being prepared, but all wait in their parts until it is mended or gone.
        UserError: another process prepares into the same folder, or the disk is full.
    """
    source, output = _folders(config)
    sources = find_sources(source)
    if left_out := in_no_split(source):
        print(
            f"left out, being in none of {'/, '.join(SPLITS)}/: {left_out[0].relative_to(source)}"
            f"{f' and {len(left_out) - 1} more' if len(left_out) > 1 else ''}",
            flush=True,
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output {output} cannot be made ({error.strerror}). Choose a folder that you may write to"
        ) from error
    with locked(output):
        clean_unfinished(output)
        try:
            return _update({s.key: s for s in sources}, output, config, elsewhere)
        finally:
            clean_unfinished(output)  # of workers that were ended


def _folders(config: PrepConfig) -> tuple[Path, Path]:
    source, output = Path(config.source), Path(config.output)
    if not config.source or not config.output:
        raise ConfigError("prep needs source=RECORDINGS and output=SHARDS")
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"output {output} lies inside source {source}; choose a folder outside it"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; name a folder")
    if others := _not_ours(output):
        raise ShardError(
            f"output {output} holds other files ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}). "
            "Choose an empty or new folder"
        )
    return source, output


def _not_ours(output: Path) -> list[str]:
    """Files that say that the folder serves another purpose, such as recordings in its train/."""
    if not output.is_dir():
        return []
    begun = (output / MANIFEST).exists() or (output / PARTS).exists()
    paths = [
        *output.iterdir(),
        *(() if begun else (p for split in SPLITS for p in (output / split).glob("*"))),
    ]
    ours = {output / name for name in (MANIFEST, LOCK, PARTS, MARKS, *SPLITS)}
    return sorted(
        str(p.relative_to(output))
        for p in paths
        if p not in ours and not p.match(UNFINISHED) and not is_shard(p)
    )


def _update(
    sources: dict[str, Source], output: Path, config: PrepConfig, elsewhere: Elsewhere | None
) -> Report:
    """Compare, prepare what differs, gather, write the manifest."""
    resolved = config_of(config)
    listed, listed_frames = _listed(output)
    stored = stored_groups(output, resolved)
    if stored and not (stored.keys() | listed.keys()) & sources.keys():
        raise ShardError(
            f"output {output} holds {len(stored)} other recordings ({min(stored)}, ...) and none of source "
            f"{config.source}. Choose an empty or new folder"
        )
    _tell_changes(output, [s.config for s in stored.values()], resolved)
    compared = {
        key: _compare(s, stored.get(key), listed.get(key), config, resolved)
        for key, s in sources.items()
    }
    compared |= {key: (MARKED, None) for key in read_marks(output).keys() & sources.keys()}
    kept = {key: current for key, (reason, current) in compared.items() if current and not reason}
    why = {key: reason for key, (reason, _) in compared.items() if reason}
    removed = sorted((stored.keys() | listed.keys()) - sources.keys())
    # A recording that is made anew takes its old place, unless its frames change in size: then all shards are filled anew.
    homes = {
        key: r.shard
        for key, r in listed.items()
        if key in why and listed_frames == resolved["frames"]
    }
    homes |= {
        key: s.entry.shard
        for key, s in stored.items()
        if key in why and s.config["frames"] == resolved["frames"]
    }
    fresh = _prepare_parts(
        {sources[key]: compared[key][1] for key in why}, output, config, resolved, elsewhere
    )
    left = {s.entry.shard for key, s in stored.items() if key not in kept and key not in homes}
    if (left | set(homes.values())) & {r.shard for r in listed.values()}:
        (output / MANIFEST).unlink(
            missing_ok=True
        )  # until all it names is right again, this is no prepared dataset
    placed = gather(output, kept, fresh, homes, left, config.shard_mib << 20)
    manifest = Manifest(
        software=_software(),
        config=resolved,
        classes=list(config.dataset.classes),
        config_hash=xxhash.xxh3_64_hexdigest(json.dumps(resolved, sort_keys=True).encode()),
        recordings=sorted(placed.values(), key=lambda r: (SPLITS.index(r.split), r.name)),
    )
    _write_manifest(output, manifest)
    write_marks(output, {})
    clean(output, manifest.recordings)
    return Report(manifest, why, removed)


def _listed(output: Path) -> tuple[dict[str, RecordingEntry], dict[str, Any]]:
    """Recordings that the manifest names, and the frame config they have; nothing without a manifest."""
    if not (output / MANIFEST).is_file():
        return {}, {}
    manifest = load_manifest(output)
    return {f"{r.split}/{r.name}": r for r in manifest.recordings}, manifest.config["frames"]


def _tell_changes(output: Path, made_with: list[dict[str, Any]], resolved: dict[str, Any]) -> None:
    now = _flat(resolved)
    changed = {
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for then in map(_flat, made_with)
        for key in now.keys() | then.keys()
        if now.get(key) != then.get(key)
    }
    if changed:
        print(
            f"{output} was prepared with another config: {', '.join(sorted(changed))}", flush=True
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return out


def _compare(
    source: Source,
    stored: Stored | None,
    listed: RecordingEntry | None,
    config: PrepConfig,
    resolved: dict[str, Any],
) -> tuple[str, Stored | None]:
    """Why the recording has to be prepared, empty where what is stored is right, and what is stored, brought up to date."""
    if stored is None:
        return DAMAGED if listed else NEW, None
    entry, about = stored.entry, source.path.stat()
    if (
        listed and listed.group_xxh3 == entry.group_xxh3
    ):  # a touched recording is read once, then the manifest knows its time
        entry = replace(entry, source_mtime_ns=listed.source_mtime_ns)
    if (about.st_size, about.st_mtime_ns) != (entry.source_bytes, entry.source_mtime_ns):
        if about.st_size != entry.source_bytes or file_xxh3(source.path) != entry.source_xxh3:
            return SOURCE_CHANGED, None
        entry = replace(entry, source_mtime_ns=about.st_mtime_ns)
    stored = stored._replace(entry=entry)
    if (file_xxh3(source.boxes) if source.boxes else "") != entry.boxes_xxh3:
        return BOXES_CHANGED, stored
    if stored.config != resolved:
        return CONFIG_CHANGED, stored
    try:
        refuse_invalid(source.path, entry, config.max_invalid_fraction)
    except RecordingError:
        return REFUSED_NOW, stored
    return "", stored


def _prepare_parts(
    sources: dict[Source, Stored | None],
    output: Path,
    config: PrepConfig,
    resolved: dict[str, Any],
    elsewhere: Elsewhere | None,
) -> dict[str, RecordingEntry]:
    """Part files of these recordings, given with their older groups; those of an interrupted run are used again."""
    entries: dict[str, RecordingEntry] = {}
    jobs: list[Job] = []
    for source, old in sources.items():
        part = part_of(output, source.key)
        reason, done = _compare(source, stored_in(part).get(source.key), None, config, resolved)
        if done is not None and not reason:
            entries[source.key] = done.entry
            continue
        jobs.append(
            Job(source, part, old if old and old.config["frames"] == resolved["frames"] else None)
        )
    return entries | run_jobs(jobs, config, elsewhere)


def _software() -> str:
    try:
        return f"evspan {version('evspan')}"
    except PackageNotFoundError:  # run from a source tree
        return "evspan"


def _write_manifest(output: Path, manifest: Manifest) -> None:
    path, text = output / MANIFEST, manifest.to_json()
    if not path.is_file() or path.read_text() != text:
        with written_whole(path) as beside:
            beside.write_text(text)
