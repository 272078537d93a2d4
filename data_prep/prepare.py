"""A folder of recordings -> a prepared dataset. Run again, it does only what is missing or has changed."""

import json
import os
import shutil
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import xxhash
from tqdm import tqdm

from data_prep.boxes import find_boxes, recording_name
from data_prep.config import PrepConfig
from data_prep.errors import ConfigError, RecordingError, ShardError
from data_prep.formats import SUFFIXES
from data_prep.histogram import require_available
from data_prep.shards import MANIFEST, SPLITS, Manifest, RecordingEntry, load_manifest
from data_prep.store import ENTRY, file_xxh3, prepare_recording, written_whole

PARTS = ".parts"


@dataclass(frozen=True)
class Source:
    path: Path
    split: str
    name: str  # unique within the split: the group's name
    relative: str  # below the source folder

    @property
    def key(self) -> str:
        return f"{self.split}/{self.name}"


@dataclass(frozen=True)
class Report:
    """What a run did. prepared: split/recording -> why. removed: split/recording that the source no longer has."""

    manifest: Manifest
    prepared: dict[str, str]
    removed: list[str]


def find_sources(source: Path) -> list[Source]:
    """Recordings below train/ val/ test/; a folder without these, or one file, counts as test.

    Raises:
        RecordingError: nothing there, or two recordings of one name.
    """
    if not source.exists():
        raise RecordingError(f"source {source} is not there. Give a folder with {'/ '.join(SPLITS)}/ of recordings, or one "
                             "recording: source=PATH")
    found: list[Source] = []
    folders = [(s, source / s) for s in SPLITS if (source / s).is_dir()] or [("test", source)]
    for split, folder in folders:
        paths = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
        found += [Source(p, split, recording_name(p), str(p.relative_to(source)) if p != source else p.name) for p in paths]
    if not found:
        raise RecordingError(f"source {source} holds no recordings ({', '.join(SUFFIXES)}) in "
                             f"{', '.join(str(f) for _, f in folders)}")
    by_key: dict[str, Source] = {}
    for s in found:
        if (other := by_key.setdefault(s.key, s)) is not s:
            raise RecordingError(f"{other.path} and {s.path} would both be recording {s.key}. Rename one, or move it out of "
                                 f"{source}")
    return found


def config_of(config: PrepConfig) -> dict[str, Any]:
    """What decides over frames and boxes: the config without paths, processes and file sizes."""
    dataset = asdict(config.dataset)
    raw = {"frames": asdict(config.frames), "dataset": {k: dataset[k] for k in ("name", "classes", "labels")},
           "max_invalid_share": config.max_invalid_share}
    return json.loads(json.dumps(raw, default=lambda v: v.name if isinstance(v, Enum) else str(v)))


def prepare(config: PrepConfig) -> Report:
    """Prepare `config.source` into `config.output`.

    A recording goes to a part file, whole or not at all; parts are gathered into shards; manifest.json is written last. Killed
    anywhere, the next run finds the parts and shards that are whole and goes on.
    """
    source, output = Path(config.source), Path(config.output)
    if not config.source or not config.output:
        raise ConfigError("prep needs source=RECORDINGS and output=SHARDS")
    require_available(config.frames)
    if output.resolve().is_relative_to(source.resolve()) and source.is_dir():
        raise ConfigError(f"output {output} lies inside source {source}; choose a folder outside it")
    sources = find_sources(source)
    resolved = config_of(config)
    config_hash = xxhash.xxh3_64_hexdigest(json.dumps(resolved, sort_keys=True).encode())
    manifest = _start(output, resolved, config_hash, config.dataset.classes)
    known = {_key(r): r for r in manifest.recordings}
    why = {s.key: reason for s in sources if (reason := _reason(s, known.get(s.key), output))}
    parts = output / PARTS / config_hash
    entries = _prepare_parts([s for s in sources if s.key in why], config, parts)
    removed = sorted(known.keys() - {s.key for s in sources})
    if why or removed:
        if not known:  # shards of another config are replaced now: until all are, this is no prepared dataset
            (output / MANIFEST).unlink(missing_ok=True)
        kept = {key: r for key, r in known.items() if key not in why and key not in removed}
        manifest.recordings = _gather(output, kept, known, entries, parts, config.shard_mib << 20)
        _write_manifest(output, manifest)
    _clean(output, manifest)
    return Report(manifest, why, removed)


def _key(entry: RecordingEntry) -> str:
    return f"{entry.split}/{entry.name}"


def _start(output: Path, resolved: dict[str, Any], config_hash: str, classes: list[str]) -> Manifest:
    """The manifest to continue, or an empty one. Another config means that everything is prepared again."""
    if (output / MANIFEST).is_file():
        manifest = load_manifest(output)
        if manifest.config_hash == config_hash:
            return manifest
        now, then = _flat(resolved), _flat(manifest.config)
        changed = [k for k in now.keys() | then.keys() if now.get(k) != then.get(k)]
        print(f"{output} was prepared with another config ({', '.join(sorted(changed))}): everything is prepared "
              "again", flush=True)
    elif output.is_dir() and any(output.iterdir()) and not (output / PARTS).is_dir():  # parts are what an interrupted run leaves
        raise ShardError(f"output {output} holds other files but no {MANIFEST}. Choose an empty or new folder")
    try:
        software = f"evspan {version('evspan')}"
    except PackageNotFoundError:  # run from a source tree
        software = "evspan"
    return Manifest(software=software, config=resolved, config_hash=config_hash, classes=list(classes))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _reason(source: Source, entry: RecordingEntry | None, output: Path) -> str:
    """Why the recording has to be prepared; empty where what is stored is right."""
    if entry is None:
        return "new"
    about = source.path.stat()
    touched = (about.st_size, about.st_mtime_ns) != (entry.source_bytes, entry.source_mtime_ns)
    if touched and file_xxh3(source.path) != entry.source_xxh3:
        return "the recording has changed"
    boxes = find_boxes(source.path)
    if (file_xxh3(boxes) if boxes else "") != entry.boxes_xxh3:
        return "the box file has changed"
    try:
        with h5py.File(output / entry.shard, "r") as file:
            if json.loads(file[entry.group].attrs[ENTRY])["group_xxh3"] != entry.group_xxh3:
                return "the shard holds another version"
            if len(file[entry.group]["frames"]) != entry.frames:
                return "the shard is damaged"
    except (OSError, KeyError, ValueError):
        return "the shard is missing or damaged"
    return ""


def _prepare_parts(sources: list[Source], config: PrepConfig, parts: Path) -> dict[str, RecordingEntry]:
    """Part files of these recordings, those of an interrupted run used again; the largest first, one process each."""
    entries: dict[str, RecordingEntry] = {}
    todo = []
    for source in sources:
        entry = _part_entry(parts / f"{source.key}.h5", source.name)
        if entry is not None and not _stale(source, entry):
            entries[source.key] = entry
        else:
            todo.append(source)
    todo.sort(key=lambda s: (-s.path.stat().st_size, s.key))
    processes = min(config.processes or len(os.sched_getaffinity(0)), len(todo))
    if not todo:
        return entries
    # spawn: a forked child would inherit HDF5's and numba's locks in whatever state they are.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[RecordingEntry], Source] = {
            pool.submit(prepare_recording, s.path, parts / f"{s.key}.h5", config, split=s.split, name=s.name,
                        source_name=s.relative): s for s in todo}
        try:
            with tqdm(total=len(todo), desc="preparing", unit="recording", disable=None) as bar:  # None: only on a terminal
                for number, future in enumerate(as_completed(futures), 1):
                    key, entry = futures[future].key, future.result()
                    entries[key] = entry
                    bar.update()
                    if bar.disable:
                        print(f"[{number}/{len(todo)}] {key}: {entry.frames} frames, {entry.boxes} boxes, "
                              f"{entry.events / 1e6:.1f} M events", flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return entries


def _part_entry(part: Path, name: str) -> RecordingEntry | None:
    try:
        with h5py.File(part, "r") as file:
            return RecordingEntry(**json.loads(file[name].attrs[ENTRY]))
    except (OSError, KeyError, ValueError, TypeError):
        return None


def _stale(source: Source, entry: RecordingEntry) -> bool:
    about, boxes = source.path.stat(), find_boxes(source.path)
    return ((about.st_size, about.st_mtime_ns) != (entry.source_bytes, entry.source_mtime_ns)
            or (file_xxh3(boxes) if boxes else "") != entry.boxes_xxh3)


def _gather(output: Path, kept: dict[str, RecordingEntry], known: dict[str, RecordingEntry],
            fresh: dict[str, RecordingEntry], parts: Path, shard_bytes: int) -> list[RecordingEntry]:
    """Write the shards that change: a recording stays in its shard, new ones fill new shards up to `shard_bytes`."""
    placed = kept | {key: replace(entry, shard=known[key].shard) for key, entry in fresh.items() if key in known}
    for split in SPLITS:
        used = [int(Path(r.shard).stem) for r in placed.values() if r.split == split]
        number, size = max(used, default=-1) + 1, 0
        for key, entry in sorted(fresh.items()):
            if entry.split != split or key in known:
                continue
            bytes_ = (parts / f"{key}.h5").stat().st_size
            if size and size + bytes_ > shard_bytes:
                number, size = number + 1, 0
            size += bytes_
            placed[key] = replace(entry, shard=f"{split}/{number:05d}.h5")
    touched = {placed[key].shard for key in fresh} | {r.shard for key, r in known.items() if key not in placed}
    for shard in sorted(touched):
        members = [(r, parts / f"{key}.h5" if key in fresh else output / shard)
                   for key, r in sorted(placed.items()) if r.shard == shard]
        if members:
            _write_shard(output / shard, members)
    return sorted(placed.values(), key=lambda r: (SPLITS.index(r.split), r.name))


def _write_shard(path: Path, members: list[tuple[RecordingEntry, Path]]) -> None:
    """Gather groups, each from the file named beside its entry."""
    with written_whole(path) as beside, h5py.File(beside, "w") as file:
        for entry, origin in members:
            with h5py.File(origin, "r") as old:
                old.copy(entry.group, file)  # chunks are copied as they are stored
            file[entry.group].attrs[ENTRY] = json.dumps(asdict(entry))


def _write_manifest(output: Path, manifest: Manifest) -> None:
    with written_whole(output / MANIFEST) as beside:
        beside.write_text(manifest.to_json())


def _clean(output: Path, manifest: Manifest) -> None:
    """Parts that are in shards now, and shards that nothing names any more."""
    shutil.rmtree(output / PARTS, ignore_errors=True)
    named = {output / r.shard for r in manifest.recordings}
    for split in SPLITS:
        for path in (output / split).glob("*.h5"):
            if path not in named:
                path.unlink()
