"""`evspan prep status`: what a prepared folder contains, what is missing, who writes to it."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.text import plural
from evspan.data_prep.shards.format import MANIFEST, SPLITS
from evspan.data_prep.shards.status import State, Status, age, status
from evspan.launch.cli.command import Parser
from evspan.launch.cli.table import format_table

INCOMPLETE_EXIT_CODE = 3
NAMED = 5  # recordings of a state that are named; of the others, their number
TITLES = {
    State.done: "done",
    State.part: "in parts",
    State.missing: "missing",
    State.changed: "changed",
    State.damaged: "damaged",
    State.extra: "not in source",
}
ALWAYS_SHOWN = (State.done, State.part, State.missing)
UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))

DESCRIPTION = """\
Shows what a folder that evspan prep writes contains, split by split, what is missing, and which
process works on it. It takes no lock and changes nothing.

  done       in a shard
  in parts   prepared, and not yet in a shard: a run is at work, or was ended
  missing    in no file
  damaged    marked by evspan prep verify
  changed    the recording has another size or time than it had, or its box file has changed,
             appeared or gone (with --source)

Exit code 0: complete, and no process at work; 3: not complete; 2: no such folder."""
EXAMPLES = """examples:
  evspan prep status shards
  evspan prep status shards --source raw      also recordings that are new, changed or removed"""


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    output: Path
    source: Path | None


def _parse(argv: Sequence[str]) -> Options:
    parser = Parser(
        "evspan prep status",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="the output folder of prep")
    parser.add_argument("--source", type=Path, help="the source of prep")
    return Options(**vars(parser.parse_args(argv)))


def _table(result: Status) -> list[str]:
    """Lines of a table with a row per split."""
    states = _shown_states(result)
    titles = [TITLES[state] for state in states]
    rows = [["", "recordings", *titles, "frames", "boxes", "size"]]
    present = {key.split("/")[0] for key in result.state}
    splits = [split for split in SPLITS if split in present]
    for split in splits:
        rows.append(_row(result, states, split, f"{split}/", result.bytes_per_split[split]))
    if len(splits) > 1:
        rows.append(_row(result, states, "all", "", sum(result.bytes_per_split.values())))
    return format_table(rows, right_aligned=range(1, len(rows[0])))


def _row(
    result: Status, states: Sequence[State], name: str, prefix: str, size_bytes: int
) -> list[str]:
    entries = [group.entry for key, group in result.stored.items() if key.startswith(prefix)]
    recordings = sum(key.startswith(prefix) for key in result.state)
    counts = [str(len(result.with_state(state, prefix))) for state in states]
    frames = sum(entry.frames for entry in entries)
    boxes = sum(entry.boxes for entry in entries)
    return [name, str(recordings), *counts, str(frames), str(boxes), _size(size_bytes)]


def _shown_states(result: Status) -> list[State]:
    present = set(result.state.values())
    return [state for state in State if state in ALWAYS_SHOWN or state in present]


def _notes(output: Path, result: Status, has_source: bool) -> list[str]:
    """Lines below the table."""
    lines: list[str] = []
    if result.last_written:
        path = result.last_written.path.relative_to(output)
        lines.append(f"last written: {path}, {age(result.last_written.time)} ago")
    for state in _shown_states(result):
        keys = result.with_state(state)
        if state is State.damaged:
            keys = [f"{key} ({result.marks[key]})" for key in keys]
        if keys and state is not State.done:
            lines.append(f"{TITLES[state]}: {_first(keys)}")
    unchecked = sum(not stored.checksums for stored in result.stored.values())
    if unchecked:
        lines.append(
            f"{plural(unchecked, 'recording')} without checksums that training verifies, of an "
            "earlier version: evspan prep into a new folder adds them"
        )
    lines += _lock_lines(result)
    if not result.has_manifest:
        lines.append(f"there is no {MANIFEST}: it is written last")
    lines.append(_verdict(result, has_source))
    return lines


def _lock_lines(result: Status) -> list[str]:
    lock = result.lock
    writing = f"; writing {_first(lock.writing)}" if lock.writing else ""
    lines: list[str] = []
    if lock.at_work:
        lines.append(f"at work: {lock.at_work}{writing}")
    if lock.remote:
        lines.append(f"at work, or killed there: {lock.remote}{writing}")
    if lock.killed:
        lines.append(f"was killed: {lock.killed}")
    return lines


def _verdict(result: Status, has_source: bool) -> str:
    if result.complete and has_source:
        return "complete"
    if result.complete:
        return "complete; --source RAW also shows whether the source has more recordings"
    if result.lock.at_work:
        return "not complete: wait"
    return "not complete: run the same evspan prep again"


def _first(names: Sequence[str]) -> str:
    text = ", ".join(names[:NAMED])
    if len(names) > NAMED:
        text += f" and {len(names) - NAMED} more"
    return text


def _size(number: int) -> str:
    for unit, length in UNITS:
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number} B"


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    options = _parse(argv)
    result = status(options.output, options.source)
    print(options.output)
    for line in _table(result) + _notes(options.output, result, options.source is not None):
        print(line)
    if not result.complete:
        sys.exit(INCOMPLETE_EXIT_CODE)
