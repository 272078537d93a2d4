"""The fixed recordings of the learning study: made once, verified by hash at every use."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import UserError
from evspan.data_prep.recordings.open import open_recording, open_writer

CONF = Path(__file__).parent / "conf"  # for --config-dir: experiment/bench/*.yaml
SET = "set"  # the shards, in the study's folder
TABLE = "set.json"  # the recipe and the hashes of the set
SCENE = ("--width", "256", "--height", "192", "--objects", "3,6", "--scales", "1,2")
STOPPING = (*SCENE, "--stop-fraction", "1", "--noise-hz", "0.3", "--seed", "1")
PREPARE = ("dataset=simulated", "frames.downsample=2")


@dataclass(frozen=True)
class Recordings:
    """A version of a set. A version never changes: another recipe gets another name.

    counts: recordings by split, as `evspan simulate` takes them. seconds: of each.
    stretch: factor on the times of events and boxes before the set is prepared, so that a window of
        50 ms has the events of 50 ms / stretch.
    digest: hash of the events and boxes of the original set; empty: not known. Another machine's
        math library may round differently.
    """

    name: str
    counts: str
    seconds: int
    simulate: tuple[str, ...] = STOPPING
    prepare: tuple[str, ...] = PREPARE
    stretch: int = 1
    digest: str = ""

    def recipe(self) -> dict[str, Any]:
        """How the set is simulated and prepared."""
        recipe = {
            "recordings": self.counts,
            "seconds": self.seconds,
            "simulate": list(self.simulate),
            "prepare": list(self.prepare),
        }
        if self.stretch > 1:
            recipe["stretch"] = self.stretch
        return recipe


FULL = Recordings("learn-v2", "train=24,val=6", 10, digest="3dc661eab460ad55")
QUICK = Recordings("learn-v2-quick", "train=4,val=2", 4, digest="dbaba65f409a40d7")


@dataclass(frozen=True)
class RecordingSet:
    """A set on disk.

    Attributes:
        shards: the folder.
        digest: hash of all its events and boxes.
        original: whether they are bit-identical to the original set, or that is not known.
    """

    shards: Path
    digest: str
    original: bool


def recordings_in(folder: Path, recordings: Recordings) -> RecordingSet:
    """The set in FOLDER/set, which is made if it does not exist.

    Raises:
        UserError: it is damaged, or was made by another recipe.
    """
    if not (folder / TABLE).exists():
        _make(folder, recordings)
    table = _read_table(folder)
    if table.get("recipe") != recordings.recipe():
        raise UserError(
            f"{folder / SET} was made by another recipe than that of {recordings.name}, so its "
            f"numbers would not compare. Remove {folder}, or name another --folder"
        )
    _verify(folder, table["files"])
    original = recordings.digest in ("", table["digest"])
    return RecordingSet(folder / SET, table["digest"], original)


def _verify(folder: Path, expected: dict[str, str]) -> None:
    actual = _hashes(folder / SET)
    names = sorted(expected.keys() | actual.keys())
    wrong = [name for name in names if actual.get(name) != expected.get(name)]
    if not wrong:
        return
    first = wrong[0]
    if first not in expected:
        problem = "does not belong there"
    elif first not in actual:
        problem = "is missing"
    else:
        problem = "was changed or damaged"
    raise UserError(
        f"{folder / SET / first} {problem} ({len(wrong)} of {len(expected)} files), so runs on "
        f"this set would not compare. Remove {folder / SET} and {folder / TABLE}; the set is then "
        "made again, bit for bit"
    )


def _read_table(folder: Path) -> dict[str, Any]:
    try:
        table = json.loads((folder / TABLE).read_text())
        if {"recipe", "files", "digest"} <= table.keys():
            return table
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{folder / TABLE} is damaged. Remove it and {folder / SET}; the set is then made again, "
        "bit for bit"
    )


def _make(folder: Path, recordings: Recordings) -> None:
    """Makes the set in a temporary folder, and renames it and then the table when complete."""
    temporary = folder / f".{SET}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder / SET, ignore_errors=True)  # without a table it is an interrupted attempt
    raw = temporary / "raw"
    shards = temporary / SET
    simulated = (
        *("--recordings", recordings.counts, "--seconds", str(recordings.seconds)),
        *recordings.simulate,
    )
    _evspan("simulate", str(raw), *simulated)
    if recordings.stretch > 1:
        for path in sorted(raw.rglob("*_td.raw")):
            stretch(path, recordings.stretch)
    _evspan("prep", f"source={_quoted(raw)}", f"output={_quoted(shards)}", *recordings.prepare)
    table = {
        "name": recordings.name,
        "recipe": recordings.recipe(),
        "digest": _digest(shards),
        "files": _hashes(shards),
    }
    os.replace(shards, folder / SET)
    (temporary / TABLE).write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary / TABLE, folder / TABLE)
    shutil.rmtree(temporary)


def stretch(path: Path, factor: int) -> None:
    """Multiplies the times of a recording and its boxes: the scene runs slower by `factor`."""
    boxes_path = path.with_name(path.name.replace("_td.raw", "_bbox.npy"))
    recording = open_recording(path)
    temporary = path.with_name("stretched.raw")
    with open_writer(temporary, recording.height, recording.width) as writer:
        for events in recording.chunks():
            writer.write(events._replace(t=events.t * factor))
    temporary.replace(path)
    boxes = np.load(boxes_path)
    boxes["t"] *= factor
    np.save(boxes_path, boxes)


def _quoted(path: Path) -> str:
    """A path in Hydra's override grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _evspan(*arguments: str) -> None:
    print(f"== evspan {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "evspan.launch", *arguments]).returncode
    if code:
        raise UserError(
            f"evspan {arguments[0]} ended with exit code {code}, so there are no recordings to "
            "train on; its output is above"
        )


def _digest(shards: Path) -> str:
    """Hash of the events, the boxes and the frame config, whatever the storage format is."""
    manifest = json.loads((shards / "manifest.json").read_text())
    keys = ("split", "name", "source_xxh3", "boxes_xxh3")
    lines = sorted(" ".join(entry[key] for key in keys) for entry in manifest["recordings"])
    lines.append(manifest["config_hash"])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _hashes(shards: Path) -> dict[str, str]:
    """Path below `shards` -> hash, for every file."""
    hashes = {}
    for path in sorted(shards.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            hashes[str(path.relative_to(shards))] = digest[:16]
    return hashes
