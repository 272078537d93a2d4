"""The fixed recordings of `evspan bench learn`: made once, prepared, and known by what their events and boxes hash to."""

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

from evspan.conf.errors import UserError

SET, TABLE = (
    "set",
    "set.json",
)  # of a benchmark's folder: the shards, and beside them what they hash to
SIMULATE = [
    "--width",
    "256",
    "--height",
    "192",
    "--objects",
    "3,6",
    "--scales",
    "1,2",
    "--stop-share",
    "1",
    "--noise-hz",
    "0.3",
    "--seed",
    "1",
]
PREPARE = ["dataset=simulated", "frames.downsample=2"]


@dataclass(frozen=True)
class Recordings:
    """A version of the set. What it names never changes: another recipe is another name.

    digest: of events and boxes as they were made first; another machine's mathematical library may round otherwise.
    """

    name: str
    train: int
    val: int
    seconds: int
    digest: str

    def recipe(self) -> dict[str, Any]:
        return {
            "recordings": f"train={self.train},val={self.val}",
            "seconds": self.seconds,
            "simulate": SIMULATE,
            "prepare": PREPARE,
        }


FULL = Recordings("learn-v2", 24, 6, 10, "3dc661eab460ad55")
QUICK = Recordings(
    "learn-v2-quick", 4, 2, 4, "dbaba65f409a40d7"
)  # of the same simulator, for tests and first looks


@dataclass(frozen=True)
class Made:
    """shards: the folder. digest: of all events and boxes in it. first: they are bit for bit those that were made first."""

    shards: Path
    digest: str
    first: bool


def recordings_in(folder: Path, wanted: Recordings) -> Made:
    """FOLDER/set, made if it is not there.

    Raises:
        UserError: it is there, but damaged, or made by another recipe.
    """
    if not (folder / TABLE).exists():
        _make(folder, wanted)
    told = _table(folder)
    if told.get("recipe") != wanted.recipe():
        raise UserError(
            f"{folder / SET} was made by another recipe than that of {wanted.name}, so its numbers would not compare."
            f" Remove {folder}, or name another --folder"
        )
    now, was = _hashes(folder / SET), told["files"]
    wrong = sorted(name for name in was.keys() | now.keys() if now.get(name) != was.get(name))
    if wrong:
        how = (
            "was changed or damaged"
            if wrong[0] in now and wrong[0] in was
            else "is missing"
            if wrong[0] in was
            else "does not belong there"
        )
        raise UserError(
            f"{folder / SET / wrong[0]} {how} ({len(wrong)} of {len(was)} files); what is trained on it would not "
            f"compare. Remove {folder / SET} and {folder / TABLE}: it is made anew, alike"
        )
    return Made(folder / SET, told["digest"], told["digest"] == wanted.digest)


def _table(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / TABLE).read_text())
        if {"recipe", "files", "digest"} <= told.keys():
            return told
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{folder / TABLE} is damaged. Remove it and {folder / SET}: the set is made anew, alike"
    )


def _make(folder: Path, wanted: Recordings) -> None:
    """Beside, and renamed when it is whole; the table, which stands for it, comes last."""
    beside = folder / f".{SET}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(
        folder / SET, ignore_errors=True
    )  # no table: an attempt that was killed between the two
    recipe = wanted.recipe()
    raw, shards = beside / "raw", beside / SET
    _evspan(
        "simulate",
        str(raw),
        "--recordings",
        recipe["recordings"],
        "--seconds",
        str(wanted.seconds),
        *SIMULATE,
    )
    _evspan("prep", f"source={_quoted(raw)}", f"output={_quoted(shards)}", *PREPARE)
    table = {
        "name": wanted.name,
        "recipe": recipe,
        "digest": _digest(shards),
        "files": _hashes(shards),
    }
    os.replace(shards, folder / SET)
    written = beside / TABLE
    written.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(written, folder / TABLE)
    shutil.rmtree(beside)


def _quoted(path: Path) -> str:
    """For Hydra's grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _evspan(*arguments: str) -> None:
    print(f"== evspan {shlex.join(arguments)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", "evspan.launch", *arguments]).returncode:
        raise UserError(
            f"evspan {arguments[0]} ended with exit code {code}, so there is no set to learn from; what it said is "
            "above"
        )


def _digest(shards: Path) -> str:
    """Of events, boxes, and how they become frames; however these are stored."""
    told = json.loads((shards / "manifest.json").read_text())
    lines = sorted(
        " ".join(e[key] for key in ("split", "name", "source_xxh3", "boxes_xxh3"))
        for e in told["recordings"]
    )
    lines.append(told["config_hash"])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _hashes(shards: Path) -> dict[str, str]:
    """Of every file, by its name below `shards`."""
    files = sorted(
        path for path in shards.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    return {
        str(path.relative_to(shards)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in files
    }
