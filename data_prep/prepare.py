"""Prepares a folder of recordings as a dataset; run again, it does what is missing or changed."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.folder_lock import LOCKS
from evspan.conf.schema.prep import PrepConfig, split_fractions
from evspan.conf.text import plural
from evspan.data_prep.labels.checks import grouped
from evspan.data_prep.labels.classes import with_classes
from evspan.data_prep.labels.missing import LEARNING_SPLITS, missing_labels
from evspan.data_prep.recordings.sources import (
    Source,
    find_sources,
    source_readable,
    unused_files,
)
from evspan.data_prep.shards.atomic import LOCK, UNFINISHED, atomic_write, file_xxh3, locked
from evspan.data_prep.shards.format import (
    MANIFEST,
    SPLITS,
    Manifest,
    RecordingEntry,
    load_manifest,
    manifest_problem,
)
from evspan.data_prep.shards.manifest_check import hash_config
from evspan.data_prep.shards.marks import MARKS, read_marks, write_marks
from evspan.data_prep.shards.pack import (
    PARTS,
    clean,
    clean_unfinished,
    gather,
    is_shard,
    part_of,
    require_own_folders,
    stored_groups,
)
from evspan.data_prep.shards.write import Stored, resolved_config, stored_in
from evspan.data_prep.update_plan import (
    RecordingState,
    Target,
    UpdatePlan,
    plan_update,
    reason_to_redo,
)
from evspan.data_prep.workers import DryRun, LocalRunner, PrepJob, Runner, run_jobs

logger = logging.getLogger(__name__)
JOBS = ".jobs"  # below the output: what was submitted for it as a SLURM job
NAMED = 3  # files that an error message names


@dataclass(frozen=True)
class PrepReport:
    """What a run did.

    Attributes:
        prepared: split/recording -> why it was prepared.
        removed: split/recording of those that the source no longer has.
    """

    manifest: Manifest
    prepared: dict[str, str]
    removed: list[str]


def prepare(config: PrepConfig, runner: Runner | None = None) -> PrepReport:
    """Prepares `config.source` into `config.output`.

    Each recording goes to a part file, the parts are gathered into shards, and manifest.json is
    written last. Each file appears whole or not at all. After a kill, the next run continues with
    the parts and shards that are there.

    Args:
        runner: prepares the recordings; default: processes of this machine.

    Raises:
        ConfigError, RecordingError, BoxesError, ShardError: what is wrong with the config, the
            source or the output. When some recordings cannot be prepared, the others are, and all
            stay in their parts until the source is corrected.
        UserError: another process prepares into the same folder, or the disk is full.
        DryRun: cluster.dry_run is set, and nothing was written; the message is what would be done.
    """
    source, output = _checked_folders(config)
    with source_readable():
        sources = {s.key: s for s in find_sources(source, config.split)}
        config = with_classes(config, [s.boxes for s in sources.values() if s.boxes])
        _log_left_out(source, sources.values())
    _require_same_split(sources.values(), output, config)
    _log_empty_splits(sources.values(), config)
    if config.cluster.dry_run:
        raise _dry_run(sources, output, config, runner or LocalRunner())
    _make_folder(output)
    with locked(output):
        clean_unfinished(output)
        try:
            target = Target(resolved_config(config), config.max_invalid_fraction)
            with source_readable():
                plan = _plan(sources, output, target, config.source)
            _require_confirmed(plan, sources, config)
            manifest = _apply(plan, sources, output, target, config, runner or LocalRunner())
        finally:
            clean_unfinished(output)  # of workers that were killed
    _log_warnings(manifest)
    return PrepReport(manifest, {key: redo.reason for key, redo in plan.redo.items()}, plan.removed)


def _dry_run(
    sources: Mapping[str, Source], output: Path, config: PrepConfig, runner: Runner
) -> DryRun:
    """What `prepare` would do."""
    target = Target(resolved_config(config), config.max_invalid_fraction)
    with source_readable():
        plan = _plan(sources, output, target, config.source)
    _require_confirmed(plan, sources, config)
    jobs = _jobs(plan, sources, output, _finished_parts(plan, sources, output, target))
    lines = []
    if jobs:
        try:
            next(runner.run(jobs, config))
        except DryRun as description:
            lines.append(str(description))
    lines += [f"# to remove: {key}" for key in plan.removed]
    if not lines:
        lines.append(f"# {output}: no recording to prepare")
    return DryRun("\n".join(lines))


# -- folders ---------------------------------------------------------------------------------------
def _checked_folders(config: PrepConfig) -> tuple[Path, Path]:
    """(source, output)."""
    source = Path(config.source)
    output = Path(config.output)
    if not config.source or not config.output:
        raise ConfigError("prep needs source=RECORDINGS and output=SHARDS")
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"output {output} lies inside source {source}; choose a folder outside it"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; name a folder")
    if others := _other_files(output):
        named = ", ".join(others[:NAMED])
        if len(others) > NAMED:
            named += ", ..."
        raise ShardError(
            f"output {output} holds other files ({named}). Choose an empty or new folder"
        )
    return source, output


def _other_files(output: Path) -> list[str]:
    """Files that `evspan prep` does not write, such as recordings in train/."""
    if not output.is_dir():
        return []
    paths = list(output.iterdir())
    begun = (output / MANIFEST).exists() or (output / PARTS).exists()
    if not begun:
        for split in SPLITS:
            paths += (output / split).glob("*")
    own = {output / name for name in (MANIFEST, LOCK, LOCKS, PARTS, MARKS, JOBS, *SPLITS)}
    return sorted(
        str(path.relative_to(output))
        for path in paths
        if path not in own and not path.match(UNFINISHED) and not is_shard(path)
    )


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output {output} cannot be made ({error.strerror}). Choose a folder that you may "
            "write to"
        ) from error


def _log_left_out(source: Path, sources: Collection[Source]) -> None:
    for line in unused_files(source):
        logger.info("%s", line)
    unlabelled = [(s.split, s.path) for s in sources if s.boxes is None]
    any_labelled = len(unlabelled) < len(sources)
    missing = missing_labels(unlabelled, source, any_labelled=any_labelled)
    for split, line in missing.items():
        level = logging.WARNING if split in LEARNING_SPLITS else logging.INFO
        logger.log(level, "%s", line)


def _fractions(split: str) -> str:
    """The fractions of train, val and test in one way of writing; empty without any."""
    return ",".join(f"{fraction:g}" for fraction in split_fractions(split) or ())


def _require_same_split(sources: Iterable[Source], output: Path, config: PrepConfig) -> None:
    """Refuses to move recordings between train, val and test unless `allow_removal` is set."""
    if config.allow_removal or not (output / MANIFEST).is_file():
        return
    manifest = load_manifest(output)
    current = _fractions(config.split)
    if manifest.split_fractions == current:
        return
    before: dict[str, set[str]] = {}
    for recording in manifest.recordings:
        before.setdefault(recording.name, set()).add(recording.split)
    moved = [s.key for s in sources if s.name in before and s.split not in before[s.name]]
    if moved:
        earlier = manifest.split_fractions
        origin = f"with split={earlier}" if earlier else "without split="
        now = f"split={current}" if current else "prep without split="
        remedy = f"Give split={earlier} again" if earlier else "Leave split= out"
        raise ShardError(
            f"{output} was prepared {origin}; {now} would move "
            f"{plural(len(moved), 'recording')} to another split ({moved[0]}, ...). {remedy}, or "
            "set allow_removal=true to move them"
        )


def _log_empty_splits(sources: Iterable[Source], config: PrepConfig) -> None:
    fractions = split_fractions(config.split)
    if fractions is None:
        return
    counts = Counter(source.split for source in sources)
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if fraction and not counts[split]:
            logger.warning(
                "split=%s assigns none of %s to %s. Give a larger fraction, or name the split of "
                "each recording in a list: source=LIST.txt",
                config.split,
                plural(sum(counts.values()), "recording"),
                split,
            )


def _log_warnings(manifest: Manifest) -> None:
    """Warns about doubtful recordings and labels, and about splits that are of no use."""
    of_recordings = [(f"{r.split}/{r.name}", r.event_warnings) for r in manifest.recordings]
    of_recordings += [(f"{r.split}/{r.name}", r.label_warnings) for r in manifest.recordings]
    for line in grouped(of_recordings):
        logger.warning("%s", line)
    for split in LEARNING_SPLITS:
        recordings = manifest.split(split)
        if recordings and not any(r.labelled_frames for r in recordings):
            logger.warning(
                "%s has no labelled frame in %s: training and evaluation refuse it",
                split,
                plural(len(recordings), "recording"),
            )
    for split in SPLITS:
        sizes = Counter((r.height, r.width) for r in manifest.split(split))
        if len(sizes) > 1:
            logger.warning(
                "%s has frames of several sizes (%s): training and evaluation refuse it. Prepare "
                "the recordings of each sensor size into a folder of their own",
                split,
                ", ".join(
                    f"{height} x {width} in {plural(number, 'recording')}"
                    for (height, width), number in sizes.most_common()
                ),
            )


# -- plan ------------------------------------------------------------------------------------------
def _plan(sources: Mapping[str, Source], output: Path, target: Target, source: str) -> UpdatePlan:
    """Reads what the output folder holds, compares it with the source, and plans the update."""
    require_own_folders(output)
    listed, listed_frames = _listed(output)
    stored = stored_groups(output, target.config)
    known = stored.keys() | listed.keys()
    if stored and not known & sources.keys():
        raise ShardError(
            f"output {output} holds {len(stored)} other recordings ({min(stored)}, ...) and none "
            f"of source {source}. Choose an empty or new folder"
        )
    _log_config_changes(output, [group.config for group in stored.values()], target.config)
    marks = read_marks(output)
    states: dict[str, RecordingState] = {}
    for key in known | sources.keys():
        state = RecordingState(
            in_source=key in sources,
            stored=stored.get(key),
            listed=listed.get(key),
            marked=key in marks,
        )
        states[key] = _compared(state, sources[key]) if key in sources else state
    return plan_update(states, target, listed_frames)


def _listed(output: Path) -> tuple[dict[str, RecordingEntry], dict[str, Any]]:
    """The recordings of the manifest, and its frame config; both empty without a manifest."""
    if not (output / MANIFEST).is_file():
        return {}, {}
    manifest = load_manifest(output)
    return {f"{r.split}/{r.name}": r for r in manifest.recordings}, manifest.config["frames"]


def _compared(state: RecordingState, source: Source) -> RecordingState:
    """Compares what is stored with the files of the source.

    A recording whose size and time are those of the entry is not read. Where only its time has
    changed (it was touched or copied) it is read once, and the manifest gets its new time.
    """
    stored = state.stored
    if stored is None:
        return state
    entry = stored.entry
    if state.listed and state.listed.group_xxh3 == entry.group_xxh3:
        entry = replace(entry, source_mtime_ns=state.listed.source_mtime_ns)
    current = source.path.stat()
    if (current.st_size, current.st_mtime_ns) != (entry.source_bytes, entry.source_mtime_ns):
        if current.st_size != entry.source_bytes or file_xxh3(source.path) != entry.source_xxh3:
            return replace(state, source_changed=True)
        entry = replace(entry, source_mtime_ns=current.st_mtime_ns)
    boxes_xxh3 = file_xxh3(source.boxes) if source.boxes else ""
    return replace(
        state,
        stored=stored._replace(entry=entry),
        boxes_changed=boxes_xxh3 != entry.boxes_xxh3,
        boxes_gone=bool(entry.boxes_xxh3) and source.boxes is None,
    )


def _log_config_changes(
    output: Path, stored: Iterable[dict[str, Any]], config: dict[str, Any]
) -> None:
    """One line with the keys in which the stored recordings' configs differ from the new one."""
    current = _flat(config)
    changes: set[str] = set()
    for earlier in map(_flat, stored):
        for key in current.keys() | earlier.keys():
            if current.get(key) != earlier.get(key):
                changes.add(f"{key}: {earlier.get(key)} -> {current.get(key)}")
    if changes:
        logger.info("%s was prepared with another config: %s", output, ", ".join(sorted(changes)))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _require_confirmed(plan: UpdatePlan, sources: Mapping[str, Source], config: PrepConfig) -> None:
    """Refuses to remove more than half of a split's recordings unless `allow_removal` is set.

    An unmounted disk leaves an empty folder, which is no wish to remove its recordings.
    """
    if config.allow_removal:
        return
    for split in SPLITS:
        removed = [key for key in plan.removed if key.startswith(f"{split}/")]
        kept = sum(source.split == split for source in sources.values())
        if len(removed) > kept:
            named = ", ".join(removed[:NAMED])
            if len(removed) > NAMED:
                named += ", ..."
            raise ShardError(
                f"{plural(len(removed), 'recording')} of {split} in {config.output} ({named}) not "
                f"in source {config.source}, which has {kept} of {split}. Nothing was changed. "
                "Mount the disk that holds them and run the same again, or set "
                "allow_removal=true to remove them from the shards"
            )


# -- apply -----------------------------------------------------------------------------------------
def _apply(
    plan: UpdatePlan,
    sources: Mapping[str, Source],
    output: Path,
    target: Target,
    config: PrepConfig,
    runner: Runner,
) -> Manifest:
    """Prepares the parts, gathers them into shards, and writes the manifest."""
    fresh = _finished_parts(plan, sources, output, target)
    fresh |= run_jobs(_jobs(plan, sources, output, fresh), config, runner)
    listed = _listed(output)[0] if plan.drop_manifest else {}
    named = {entry.shard for entry in listed.values()}

    def before_replacing(shard: str) -> None:
        # Until all that the manifest names is right again, the folder is no prepared dataset.
        if shard in named:
            (output / MANIFEST).unlink(missing_ok=True)

    shards = {key: redo.shard for key, redo in plan.redo.items() if redo.shard}
    shard_bytes = config.shard_mib << 20
    placed = gather(
        output, plan.kept, fresh, shards, plan.shards_left, shard_bytes, before_replacing
    )
    manifest = Manifest(
        software=_software(),
        config=target.config,
        classes=list(config.dataset.classes),
        config_hash=hash_config(target.config),
        recordings=sorted(placed.values(), key=lambda r: (SPLITS.index(r.split), r.name)),
        split_fractions=_fractions(config.split),
    )
    _write_manifest(output, manifest)
    write_marks(output, {})
    clean(output, manifest.recordings)
    return manifest


def _jobs(
    plan: UpdatePlan,
    sources: Mapping[str, Source],
    output: Path,
    finished: Mapping[str, RecordingEntry],
) -> list[PrepJob]:
    """The recordings to prepare that have no finished part."""
    return [
        PrepJob(sources[key], part_of(output, key), redo.reuse)
        for key, redo in plan.redo.items()
        if key not in finished
    ]


def _finished_parts(
    plan: UpdatePlan, sources: Mapping[str, Source], output: Path, target: Target
) -> dict[str, RecordingEntry]:
    """Entries of the part files of an interrupted run that are right."""
    finished: dict[str, RecordingEntry] = {}
    for key in plan.redo:
        part: Stored | None = stored_in(part_of(output, key)).get(key)
        state = _compared(RecordingState(stored=part), sources[key])
        if state.stored and not reason_to_redo(state, target):
            finished[key] = state.stored.entry
    return finished


def _software() -> str:
    try:
        return f"evspan {version('evspan')}"
    except PackageNotFoundError:  # not installed
        return "evspan"


def _write_manifest(output: Path, manifest: Manifest) -> None:
    """Raises ShardError where the manifest is one that `load_manifest` would refuse."""
    path = output / MANIFEST
    text = manifest.to_json()
    problem = manifest_problem(text)
    if problem:
        raise ShardError(
            f"{path} was not written, because training would refuse it ({problem}). Correct the "
            "source or the config, and run the same again: what is prepared is kept"
        )
    if not path.is_file() or path.read_text() != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text)
