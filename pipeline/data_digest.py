"""A digest of the data that a run is trained on, as JSON values, and what differs between two.

frames, classes, height, width    as of `Dataset`
kind                              shards or rvt_tree
recordings                        of the training split, in order: [name, frames, checksum]
evaluation                        the checksum of the same list for the evaluated split
roots                             of several roots, or one with a class map: of each its fraction of
                                  the weights, its kind, its class map and, of RVT's tree, its
                                  classes. The names of the recordings of several roots begin with
                                  the number of theirs, `1:`

The checksum of a recording is the manifest's `group_xxh3` (frames, boxes and labels), with the
numbers of frames and boxes; in RVT's tree the xxh3-64 of the names and sizes of its files and of
the contents of the small ones. The folder of the dataset is not part of it: data may be moved.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from evspan.conf.schema.prep import DatasetConfig, DatasetKind, DatasetRoot
from evspan.conf.text import plural, printable
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.npy import read_npy
from evspan.data_prep.shards.rvt_tree import LABELS, recording_files, recording_folders
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.weights import plain

SHOWN_NAMES = 3  # of recordings, in a message
SAME_FRACTION = 1e-9  # of the weights, apart from rounding
Recording = list[Any]  # [name, frames, checksum]


def data_digest(dataset: Dataset, config: DatasetConfig, evaluation_split: str) -> dict[str, Any]:
    """The digest of a dataset.

    Args:
        dataset: the training split. config: of the dataset.

    Raises:
        ShardError: the manifest cannot be read, or a recording of RVT's tree is incomplete.
        ArrayFileError: an array of RVT's tree is damaged.
        OSError: a file of RVT's tree cannot be read.
    """
    evaluated = json.dumps(_recordings(config, evaluation_split))
    kinds = sorted({_kind(source, config).name for source in config.sources})
    digest = {
        "kind": ",".join(kinds),
        "frames": plain(asdict(dataset.frames)),
        "classes": list(dataset.classes),
        "height": int(dataset.height),
        "width": int(dataset.width),
        "recordings": _recordings(config, "train"),
        "evaluation": xxhash.xxh3_64_hexdigest(evaluated.encode()),
    }
    roots = _roots(config)
    if roots:
        digest["roots"] = roots
    return digest


def _kind(source: DatasetRoot, config: DatasetConfig) -> DatasetKind:
    return source.kind or config.kind


def _roots(config: DatasetConfig) -> list[dict[str, Any]]:
    """What a run does with each root; empty where it is what one root without a map means."""
    sources = config.sources
    if len(sources) == 1 and not sources[0].class_map:
        return []
    total = sum(source.weight for source in sources)
    roots = []
    for source in sources:
        kind = _kind(source, config)
        root: dict[str, Any] = {
            "kind": kind.name,
            "fraction": source.weight / total,
            "class_map": dict(source.class_map),
        }
        if kind is DatasetKind.rvt_tree:
            root["classes"] = source.classes or config.classes
        roots.append(root)
    return roots


def _recordings(config: DatasetConfig, split: str) -> list[Recording]:
    sources = config.sources
    recordings = []
    for number, source in enumerate(sources, 1):
        prefix = f"{number}:" if len(sources) > 1 else ""
        for name, *rest in _recordings_of(source, config, split):
            recordings.append([prefix + name, *rest])
    return recordings


def _recordings_of(source: DatasetRoot, config: DatasetConfig, split: str) -> list[Recording]:
    root = Path(source.root)
    if _kind(source, config) is DatasetKind.rvt_tree:
        return [_rvt_recording(folder) for folder in recording_folders(root, split)]
    recordings = []
    for entry in load_manifest(root).split(split):
        counts = f"{entry.labelled_frames}/{entry.boxes}"
        recordings.append([entry.name, entry.frames, f"{entry.group_xxh3}/{counts}"])
    return recordings


def _rvt_recording(folder: Path) -> Recording:
    digest = xxhash.xxh3_64()
    frames = 0
    for path in recording_files(folder):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if path.suffix != ".h5":
            digest.update(path.read_bytes())
        if path.name == "timestamps_us.npy" and path.parent.name != LABELS:
            frames = len(read_npy(path))
    return [folder.name, frames, digest.hexdigest()]


def data_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What makes two digests those of different training data, as parts of a sentence."""
    differences = []
    for name, value in saved["frames"].items():
        # A setting that only one version knows describes nothing that the other could have changed.
        if name in current["frames"] and current["frames"][name] != value:
            differences.append(f"frames.{name} was {value}, is {current['frames'][name]}")
    for name in ("kind", "classes", "height", "width"):
        if saved[name] != current[name]:
            differences.append(f"{name} was {saved[name]}, is {current[name]}")
    differences += _root_differences(saved.get("roots", []), current.get("roots", []))
    return differences + _recording_differences(saved["recordings"], current["recordings"])


def _root_differences(
    saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]
) -> list[str]:
    if len(saved) != len(current):
        return [f"dataset.roots had {max(1, len(saved))}, has {max(1, len(current))}"]
    differences = []
    for number, (before, now) in enumerate(zip(saved, current, strict=True), 1):
        if abs(before["fraction"] - now["fraction"]) > SAME_FRACTION:
            differences.append(
                f"root {number} was {before['fraction']:.3g} of the data, is {now['fraction']:.3g}"
            )
        for key in ("kind", "class_map", "classes"):
            if before.get(key) != now.get(key):
                change = f"was {before.get(key)}, is {now.get(key)}"
                differences.append(f"{key} of root {number} {change}")
    return differences


def _recording_differences(saved: Sequence[Recording], current: Sequence[Recording]) -> list[str]:
    before = {name: rest for name, *rest in saved}
    now = {name: rest for name, *rest in current}
    missing = [name for name in before if name not in now]
    added = [name for name in now if name not in before]
    changed = [name for name, rest in before.items() if now.get(name, rest) != rest]
    differences = []
    for names, what in ((missing, "missing"), (added, "new"), (changed, "changed")):
        if names:
            amount = f"{len(names)} of {plural(len(before), 'recording')}"
            if names is added:
                amount = plural(len(names), "recording")
            verb = "is" if len(names) == 1 else "are"
            differences.append(f"{amount} {verb} {what} ({_shown(names)})")
    if not differences and list(before) != list(now):
        differences.append("the recordings are in another order")
    return differences


def _shown(names: Sequence[str]) -> str:
    shown = [printable(str(name)) for name in names[:SHOWN_NAMES]]
    if len(names) > SHOWN_NAMES:
        shown.append("...")
    return ", ".join(shown)
