"""Runs commands: a user's mistake ends in one line and exit code 2, not in a traceback."""

import argparse
import contextvars
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from evspan.conf.errors import (
    CLOSED_OUTPUT_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    LostRanksError,
    is_user_error,
    one_line,
)
from evspan.conf.failure_notes import report_lost_ranks, write_failure_note
from evspan.launch.logging_config import ensure_logging
from evspan.pipeline.parallel.rank_exit import prompt_exit


def debugging() -> bool:
    """Whether EVSPAN_DEBUG asks for the traceback of a user's mistake."""
    return os.environ.get("EVSPAN_DEBUG", "") not in ("", "0")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Log the user's mistakes as `error: ...` and exit with code 2.

    EVSPAN_DEBUG=1 shows their traceback. Defects of the program itself always show theirs. A rank
    that fails while other ranks wait for it ends the process at once.
    """
    with prompt_exit(), raised_errors():
        yield


@contextmanager
def raised_errors() -> Iterator[None]:
    """As `reported_errors`, for a caller that has to do more before it ends the process."""
    # Where another rank is gone, Torch warns with C++ stacks in addition to the exception.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ensure_logging()
    try:
        with quiet_closed_output():
            yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except LostRanksError as error:
        if debugging():
            raise
        sys.exit(report_lost_ranks(str(error)))
    except Exception as error:
        if not is_user_error(error):
            write_failure_note(f"{type(error).__name__}: {error}")
            raise
        write_failure_note(one_line(error))
        if debugging():
            raise
        fail(one_line(error))


def run_command(main: Callable[[], object]) -> None:
    """Call `main` with `reported_errors`."""
    with reported_errors():
        main()


@contextmanager
def quiet_closed_output() -> Iterator[None]:
    """Ends the process quietly where the reader of standard output has closed it.

    `evspan ... | head -1` then has the exit code of SIGPIPE and no traceback.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where the process was started without one
                sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():  # another pipe broke, such as that of a child process
            raise
        # Python flushes standard output once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_OUTPUT_EXIT_CODE)


def _output_is_closed() -> bool:
    """Whether standard output is a pipe or a socket whose reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def fail(message: str) -> NoReturn:
    """Log `error: message` and exit with code 2."""
    report_error(message)
    sys.exit(USER_ERROR_EXIT_CODE)


def exit_unless_zero(code: int) -> None:
    """End the process with an exit code other than 0."""
    if code:
        sys.exit(code)


def report_error(message: str) -> None:
    """Write `error: message` to standard error, or to this rank's log file."""
    ensure_logging()
    logging.getLogger(__name__).error("%s", message)


class Parser(argparse.ArgumentParser):
    """Reports a mistake as one `error:` line. All commands with options use it."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        fail(f"{message}; {self.prog} --help shows how")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; under `parser_of`, returns the parser to it instead."""
        if _inspecting.get():
            raise _ParserFoundError(self)
        return super().parse_known_args(args, namespace)


_inspecting = contextvars.ContextVar("inspecting", default=False)


class _ParserFoundError(BaseException):
    """Carries a parser to `parser_of`; no `except Exception` of a command stops it."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def parser_of(main: Callable[[list[str]], object], argv: Sequence[str] = ()) -> Parser:
    """The parser that a command would parse `argv` with. The command does not run.

    Raises:
        ValueError: the command has no Parser.
    """
    token = _inspecting.set(True)
    try:
        main([*argv, "--help"])
    except _ParserFoundError as found:
        return found.parser
    finally:
        _inspecting.reset(token)
    raise ValueError(f"{main.__module__} has no command.Parser")
