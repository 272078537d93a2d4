"""`evspan logs RUN --hang`: asks the ranks of a run what they do, and explains why it hangs."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import plural
from evspan.launch.sweep.logs import single_run
from evspan.launch.sweep.registry import CONFIG, Run, describe
from evspan.launch.sweep.state import State, number
from evspan.pipeline.parallel.hang_diagnosis import SHORT_S, Diagnosis, diagnose, time_text
from evspan.pipeline.parallel.hang_files import (
    ASKED,
    FOLDER,
    ThreadStack,
    ranks_not_running,
    read_reports,
    read_stacks,
    write_request,
)

ANSWER_S = 15.0  # for the ranks' reports, on shared file systems too
SCALE_RANKS = 32  # so many ranks look at the request per second (`hang_watch`)
POLL_S = 0.2
MOST_RANKS = 1 << 16
NOT_STARTED = (State.waiting, State.requeued)  # no rank could answer
NO_CAUSE = (
    f"none: no rank has waited for another one for {SHORT_S:.0f} s; if the run makes no progress, "
    "ask again"
)


def hang_lines(path: Path) -> Iterator[str]:
    """What every rank of a run does: one sentence each, the cause, and the Python stacks.

    The ranks of a run that has started are asked, which takes up to 15 seconds. Of another run,
    these are the reports that were written last, as before a timeout.

    Args:
        path: folder of the run.

    Raises:
        UserError: `path` is not a run, or no rank has reported.
    """
    run = single_run(path)
    is_asked = run.active and run.state not in NOT_STARTED
    if not is_asked:
        _require_reports(run)
    size = _ranks(run)
    request = _ask(run, size) if is_asked else None
    diagnosis = diagnose(run.folder, size, request)
    if not is_asked and not diagnosis.reports:
        raise UserError(f"{run.folder}: the reports of its ranks in {FOLDER}/ cannot be read")
    yield from _sentences(run, diagnosis, size, was_asked=is_asked)
    yield from _stacks(run.folder, diagnosis, size)


def _require_reports(run: Run) -> None:
    """Raises UserError where no rank has written a report."""
    if not any((run.folder / FOLDER).glob("rank-*.json")):
        raise UserError(
            f"{run.folder} has no reports of its ranks in {FOLDER}/: it is {describe(run)}, and no "
            "collective has reached its timeout"
        )


def _ranks(run: Run) -> int:
    """The number of ranks, from the run's config."""
    try:
        parallel = read_json_object(run.folder / CONFIG).get("parallel", {})
        ranks = number(parallel.get("ranks"))
    except (OSError, JsonFileError, AttributeError) as error:
        raise UserError(
            f"{run.folder}: the number of ranks is not known, since its {CONFIG} cannot be read "
            f"({error}); it is {describe(run)}"
        ) from error
    if ranks is None or not 1 <= ranks <= MOST_RANKS:
        raise UserError(f"{run.folder / CONFIG} has no number of ranks")
    return int(ranks)


def _ask(run: Run, size: int) -> str:
    """Requests reports, and waits for them. Returns the id of the request."""
    try:
        request = write_request(run.folder, ASKED)
    except OSError as error:
        raise UserError(
            f"{run.folder}: the ranks cannot be asked, as {FOLDER}/ cannot be written to "
            f"({error.strerror or error}); ask someone with write access to run it"
        ) from error
    deadline = time.monotonic() + ANSWER_S + size / SCALE_RANKS
    while time.monotonic() < deadline:
        reports = read_reports(run.folder, size, request.id)
        if len(reports) + len(ranks_not_running(reports)) >= size:
            break
        time.sleep(POLL_S)
    return request.id


def _sentences(run: Run, diagnosis: Diagnosis, size: int, *, was_asked: bool) -> Iterator[str]:
    answered = len(diagnosis.reports)
    line = f"{run.folder}: {describe(run)}; {answered} of {plural(size, 'rank')} answered"
    if diagnosis.time:
        line += f" at {time_text(diagnosis.time)}"
    if not was_asked:
        line += f" ({diagnosis.reason})"
    yield line
    for sentence in diagnosis.sentences.values():
        yield f"  {sentence}"
    yield f"cause: {diagnosis.cause or NO_CAUSE}"


def _stacks(folder: Path, diagnosis: Diagnosis, size: int) -> Iterator[str]:
    """The stack of each main thread; equal ones once."""
    ranks_of: dict[ThreadStack, list[int]] = {}
    others = 0
    for rank, report in diagnosis.reports.items():
        for stack in report.threads:
            if stack.is_main:
                ranks_of.setdefault(stack, []).append(rank)
            else:
                others += 1
    for stack, ranks in ranks_of.items():
        yield ""
        yield f"stack of {_names(ranks)}, innermost call last:"
        for frame in stack.frames:
            yield f"  {frame.file}:{frame.line} in {frame.function}"
    for rank in range(size):
        text = read_stacks(folder, rank)
        if rank not in diagnosis.reports and text:
            yield ""
            yield f"stacks of rank {rank}, written when no Python code of it could run:"
            yield from (f"  {line}" for line in text.splitlines())
    if others:
        yield ""
        yield f"{plural(others, 'other thread')}: see {folder / FOLDER}/rank-*.json"


def _names(ranks: Sequence[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(str(rank) for rank in ranks)}"
