"""`evspan prep status`: what a prepared folder holds, what is missing, and who is at work on it. It changes nothing."""

import argparse
import re
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from evspan.conf.errors import ShardError
from evspan.data_prep.recordings.sources import Source, find_sources
from evspan.data_prep.shards.atomic import LOCK, UNFINISHED
from evspan.data_prep.shards.format import MANIFEST, SPLITS, load_manifest
from evspan.data_prep.shards.marks import read_marks
from evspan.data_prep.shards.pack import PARTS, shard_files, stored_groups
from evspan.data_prep.shards.write import Stored
from evspan.launch.cli.command import Parser

INCOMPLETE_EXIT_CODE = 3
LOCKS = Path("/proc/locks")  # of this machine
NAMED = 5  # recordings of a kind; of more, their number
KINDS = {
    "done": "done",
    "part": "in parts",
    "missing": "missing",
    "changed": "changed",
    "damaged": "damaged",
    "extra": "not in source",
}

DESCRIPTION = """What a folder that evspan prep writes holds, split by split, what is missing, and who is at work on it. It takes
no lock and changes nothing.

  done       in a shard            in parts   prepared, and not yet in a shard: a run is at work, or was ended
  missing    in no file            damaged    marked by evspan prep verify
  changed    the recording has another size or time than it had (with --source)

Exit code 0: complete, and nobody at work; 3: not complete; 2: no such folder."""
EXAMPLES = """examples:
  evspan prep status shards
  evspan prep status shards --source raw      also recordings that no run has begun with, and changed ones"""


@dataclass
class Status:
    """state: split/recording -> a key of KINDS. bytes_: of shards and parts, per split. last: the newest of these.

    at_work: the process that has the lock. elsewhere: one that has it on another machine, or was killed there. ended: one that
    was killed. begun: files that are being written just now.
    """

    state: dict[str, str]
    stored: dict[str, Stored]
    marks: dict[str, str]
    manifest: bool
    bytes_: dict[str, int]
    last: tuple[Path, float] | None  # and its time
    at_work: str = ""
    elsewhere: str = ""
    ended: str = ""
    begun: list[str] = field(default_factory=list)

    def of(self, kind: str, split: str = "") -> list[str]:
        return [key for key, state in self.state.items() if state == kind and key.startswith(split)]

    @property
    def complete(self) -> bool:
        return (
            self.manifest
            and set(self.state.values()) <= {"done"}
            and not (self.at_work or self.elsewhere or self.ended)
        )


def status(output: Path, source: Path | None = None) -> Status:
    """
    Raises:
        ShardError: `output` is no folder that `evspan prep` writes. RecordingError: the source cannot be read.
    """
    if not any((output / name).exists() for name in (MANIFEST, LOCK, PARTS)):
        raise ShardError(
            f"{output} holds nothing of evspan prep. Name the folder that was its output, or make one: evspan prep "
            f"source={source or 'RAW'} output={output}"
        )
    sources = {s.key: s for s in find_sources(source)} if source else None
    manifest = load_manifest(output) if (output / MANIFEST).is_file() else None
    stored, marks = stored_groups(output, manifest.config if manifest else {}), read_marks(output)
    part_files = [
        p
        for split in SPLITS
        for p in (output / PARTS / split).glob("*.h5")
        if not p.name.startswith(".")
    ]
    parts = {f"{p.parent.name}/{p.stem}" for p in part_files}
    listed = (
        {f"{r.split}/{r.name}": r.source_mtime_ns for r in manifest.recordings} if manifest else {}
    )

    def state(key: str) -> str:
        if sources is not None and key not in sources:
            return "extra"
        if key in parts:
            return "part"
        if key in marks:
            return "damaged"
        if key not in stored:
            return "missing"
        return (
            "changed"
            if sources and _changed(sources[key], stored[key], listed.get(key))
            else "done"
        )

    keys = stored.keys() | parts | listed.keys() | marks.keys() | (sources or {}).keys()
    files = {p: about for p in (*shard_files(output), *part_files) if (about := _about(p))}
    newest = max(files, key=lambda p: files[p][1], default=None)
    result = Status(
        {key: state(key) for key in sorted(keys, key=_order)},
        stored,
        marks,
        manifest is not None,
        {s: sum(size for p, (size, _) in files.items() if p.parent.name == s) for s in SPLITS},
        (newest, files[newest][1]) if newest else None,
    )
    _who(output, result)
    return result


def _order(key: str) -> tuple[int, str]:
    return SPLITS.index(key.split("/")[0]), key


def _changed(source: Source, stored: Stored, mtime_ns: int | None) -> bool:
    about, entry = source.path.stat(), stored.entry
    return (about.st_size, about.st_mtime_ns) != (
        entry.source_bytes,
        mtime_ns or entry.source_mtime_ns,
    )


def _about(path: Path) -> tuple[int, float] | None:
    """(size, time); None for a file that is gone by now."""
    with suppress(OSError):
        about = path.stat()
        return about.st_size, about.st_mtime
    return None


def _who(output: Path, result: Status) -> None:
    """Who has the lock: told by its file, which is emptied at the end, and checked in the kernel's list of locks."""
    with suppress(OSError):
        path = output / LOCK
        text = path.read_text().strip()
        about = re.match(r"process (\d+) on (\S+)", text)
        if about is None:
            return
        if about[2] != socket.gethostname() or not LOCKS.exists():
            result.elsewhere = text
        elif _has_lock(int(about[1]), path):
            result.at_work = f"{text}, since {_ago(path.stat().st_mtime)}"
        else:
            result.ended = text
            return
        folders = [output, *(output / s for s in SPLITS), *(output / PARTS / s for s in SPLITS)]
        result.begun = sorted(
            _written(p, output) for folder in folders for p in folder.glob(UNFINISHED)
        )


def _written(beside: Path, output: Path) -> str:
    """The file that it is going to be, a part told by its recording: .parts/train/.NAME.PID.writing.h5 -> train/NAME."""
    path = beside.relative_to(output).with_name(
        re.sub(r"^\.(.*)\.\d+\.writing", r"\1", beside.name)
    )
    return str(path.relative_to(PARTS).with_suffix("")) if path.parts[0] == PARTS else str(path)


def _has_lock(pid: int, path: Path) -> bool:
    inode = path.stat().st_ino
    locks = (line.split() for line in LOCKS.read_text().splitlines())
    return any(
        "FLOCK" in words and str(pid) in words and any(w.endswith(f":{inode}") for w in words)
        for words in locks
    )


def _tell(output: Path, result: Status, source: Path | None) -> None:
    kinds = [k for k in KINDS if k in ("done", "part", "missing") or k in result.state.values()]
    rows = [["", "recordings", *(KINDS[k] for k in kinds), "frames", "boxes", "size"]]
    splits = [s for s in SPLITS if any(key.startswith(f"{s}/") for key in result.state)]
    for name, prefix in [
        *((s, f"{s}/") for s in splits),
        *([("all", "")] if len(splits) > 1 else []),
    ]:
        entries = [stored.entry for key, stored in result.stored.items() if key.startswith(prefix)]
        size = sum(n for s, n in result.bytes_.items() if name in (s, "all"))
        rows.append(
            [
                name,
                str(len([k for k in result.state if k.startswith(prefix)])),
                *(str(len(result.of(k, prefix))) for k in kinds),
                str(sum(e.frames for e in entries)),
                str(sum(e.boxes for e in entries)),
                _size(size),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(output)
    for row in rows:
        print(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
                ]
            )
        )
    if result.last:
        print(f"last written: {result.last[0].relative_to(output)}, {_ago(result.last[1])} ago")
    for kind in kinds:
        if kind != "done" and (keys := result.of(kind)):
            print(
                f"{KINDS[kind]}: {_first(f'{k} ({result.marks[k]})' if kind == 'damaged' else k for k in keys)}"
            )
    now = f"; writing {_first(result.begun)}" if result.begun else ""
    if result.at_work:
        print(f"at work: {result.at_work}{now}")
    if result.elsewhere:
        print(f"at work, or killed there: {result.elsewhere}{now}")
    if result.ended:
        print(f"was killed: {result.ended}")
    if not result.manifest:
        print(f"there is no {MANIFEST}: it is written last")
    if result.complete:
        print(
            f"complete{'' if source else '; whether the source has more recordings, --source RAW tells'}"
        )
    else:
        print(f"not complete: {'wait' if result.at_work else 'run the same evspan prep again'}")


def _first(names: Iterable[str]) -> str:
    told = list(names)
    return ", ".join(told[:NAMED]) + (f" and {len(told) - NAMED} more" if len(told) > NAMED else "")


def _ago(then: float) -> str:
    seconds = max(0, int(time.time() - then))
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _size(number: int) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number} B"


def main(argv: list[str]) -> None:
    parser = Parser(
        "evspan prep status",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="what prep was given as output")
    parser.add_argument("--source", type=Path, help="what prep was given as source")
    given = parser.parse_args(argv)
    result = status(given.output, given.source)
    _tell(given.output, result, given.source)
    if not result.complete:
        sys.exit(INCOMPLETE_EXIT_CODE)
