"""Configures the logger `evspan`: plain lines on a terminal; timestamp, level, rank in log files.

Modules log with `logging.getLogger(__name__)`. Every process that runs a command or a rank calls
`configure_logging` once, before it does anything else. Worker processes that are not configured
print warnings only (Python's default).
"""

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

from evspan.conf.errors import ConfigError
from evspan.conf.progress import above_bars, turn_off_bars
from evspan.conf.text import printable_lines
from evspan.launch.output_streams import drop_lost_output, not_copied, open_output_streams
from evspan.pipeline.parallel.rank_env import rank_info

LOGGER = "evspan"
if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # Python 3.10 cannot subscript it

FILE_FORMAT = "%(asctime)s %(levelname)s rank %(rank)d: %(message)s"


def configure_logging(rank: int | None = None, *, log_file: bool = False) -> None:
    """Sends the records of `evspan.*` from INFO on to standard output and standard error.

    On the terminal, INFO is a plain line on standard output, of rank 0 only; from WARNING on,
    records of every rank are lines `warning: ...` or `error: ...` on standard error. Calling it
    again replaces the configuration.

    Args:
        rank: of this process; default: that of the launcher's variables, else 0.
        log_file: whether the output of this process is redirected to a log file. Every record of
            every rank is then written to standard output, each line with timestamp, level and
            rank.
    """
    open_output_streams()
    if log_file:
        drop_lost_output()
    if rank is None:
        rank = rank_from_environment()
    if log_file or rank != 0:
        turn_off_bars()
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    # Some libraries install a handler on the root logger, which would print each record again.
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handlers = _file_handlers(rank) if log_file else _terminal_handlers(rank)
    for handler in handlers:
        logger.addHandler(handler)


def ensure_logging() -> None:
    """Configures logging for the terminal unless this process has configured it already."""
    if not logging.getLogger(LOGGER).handlers:
        configure_logging()


def file_formatter(rank: int) -> logging.Formatter:
    """Of a log file: timestamp, level and rank on every line."""
    return _FileFormatter(rank)


def logs_to_file() -> bool:
    """Whether the output of this process is redirected to a log file."""
    return any(
        h.formatter.__class__ is _FileFormatter and isinstance(h, _StandardStream)
        for h in logging.getLogger(LOGGER).handlers
    )


def rank_from_environment() -> int:
    """The rank that torchrun, `evspan train` or srun gave to this process; 0 without a launcher."""
    try:
        return rank_info(os.environ).rank
    except ConfigError:  # which the command reports
        return 0


def _file_handlers(rank: int) -> list[logging.Handler]:
    handler = _StandardStream("stdout")
    handler.setFormatter(_FileFormatter(rank))
    return [handler]


def _terminal_handlers(rank: int) -> list[logging.Handler]:
    problems = _StandardStream("stderr")
    problems.setLevel(logging.WARNING)
    problems.setFormatter(_ProblemFormatter())
    if rank != 0:
        return [problems]
    progress = _StandardStream("stdout")
    progress.addFilter(_below_warning)
    progress.setFormatter(_PrintableFormatter("%(message)s"))
    return [progress, problems]


def _below_warning(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING


class _StandardStream(_StreamHandler):
    """Writes to sys.stdout or sys.stderr as they are when a record comes: they may be replaced."""

    def __init__(self, name: str) -> None:
        self._stream_name = name
        super().__init__()

    @property
    def stream(self) -> TextIO:
        stream: TextIO = getattr(sys, self._stream_name)
        return stream

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """The base class assigns its default, which is not used here."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record above the progress bars."""
        with above_bars(), not_copied():
            super().emit(record)
            self.flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  named by logging
        """Raises where the output could not be written, as `print` does; the command then ends."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise error
        super().handleError(record)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters: names in messages may come from files of other people."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _ProblemFormatter(_PrintableFormatter):
    """`warning: message`, `error: message`."""

    def format(self, record: logging.LogRecord) -> str:
        level = "warning" if record.levelno < logging.ERROR else "error"
        return f"{level}: {super().format(record)}"


class _FileFormatter(_PrintableFormatter):
    """Timestamp, level and rank on every line of a message, so that `grep` finds all of it."""

    def __init__(self, rank: int) -> None:
        super().__init__(FILE_FORMAT, defaults={"rank": rank})

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        first, *others = text.split("\n")
        if not others:
            return text
        prefix = first.removesuffix(printable_lines(record.message).split("\n")[0])
        return "\n".join([first, *(prefix + line for line in others)])
