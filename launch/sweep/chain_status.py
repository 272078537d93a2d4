"""The chain that a folder is in: what its runs wait for, and commands that follow them."""

from collections.abc import Sequence
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.sweep.registry import Run, count_states, read_chain

WIDTH = 24  # of a path; the table cuts longer cells at their end
HEADINGS = ["chain", "state", "after", "job", "last error"]


def chain_rows(path: Path, runs: Sequence[Run]) -> list[list[str]]:
    """The headings and a row per link, in the order of execution; empty without a chain.

    A link is what its folder contains (all runs of a sweep are one), or a command.

    Args:
        path: of a run, a sweep or prepared shards. runs: what `read_chain` has read from it.
    """
    if not any(run.is_command or run.after for run in runs):
        return []
    rows: list[list[str]] = []
    _add_links(path, runs, rows, {path.resolve()})
    return [HEADINGS, *rows]


def _add_links(path: Path, runs: Sequence[Run], rows: list[list[str]], visited: set[Path]) -> None:
    """Adds the links of a folder, after those of the folders that they wait for."""
    for run in runs:
        for folder in map(Path, run.after):
            if folder.resolve() in visited:
                continue
            visited.add(folder.resolve())
            try:
                upstream = read_chain(folder).runs
            except UserError:  # shards that were prepared without a job, or nothing
                continue
            _add_links(folder, upstream, rows, visited)
    trained = [run for run in runs if not run.is_command]
    if trained:
        state = trained[0].state.value if len(trained) == 1 else count_states(trained)
        rows.append(_row(_short(str(path)), state, trained))
    for run in runs:
        if run.is_command:
            rows.append(_row(f"{_short(str(path))}: {run.name}", run.state.value, [run]))


def _short(folder: str) -> str:
    """The end of a path, which differs where the beginning is the same."""
    path = Path(folder)
    if path.is_relative_to(Path.cwd()):
        folder = str(path.relative_to(Path.cwd()))
    return folder if len(folder) <= WIDTH else f"…{folder[1 - WIDTH :]}"


def _row(name: str, state: str, runs: Sequence[Run]) -> list[str]:
    reason = runs[0].reason
    if len(runs) == 1 and reason and not reason.startswith("after "):  # the next column has it
        state += f" ({reason})"
    after: dict[str, None] = {}
    jobs: dict[str, None] = {}
    for run in runs:
        after |= dict.fromkeys(run.after)
        jobs[run.job.split("_")[0]] = None
    errors = [run.error for run in runs if run.error]
    waits_for = ", ".join(_short(folder) for folder in after)
    return [name, state, waits_for, ", ".join(filter(None, jobs)), "; ".join(errors[:1])]
