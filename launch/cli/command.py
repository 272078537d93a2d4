"""Runs commands: a user's mistake ends in one line and exit code 2, not in a traceback."""

import argparse
import contextvars
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from evspan.conf.errors import (
    CLOSED_OUTPUT_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    LostRanksError,
    exit_code_of,
    is_user_error,
    one_line,
)
from evspan.conf.failure_notes import report_lost_ranks, write_failure_note
from evspan.launch.logging_config import ensure_logging
from evspan.launch.output_streams import drop_lost_output, give_up_output, stdout_error
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
        with checked_output():
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
        fail(one_line(error), exit_code_of(error))


def run_command(main: Callable[[], object]) -> None:
    """Call `main`, whose results are files, with `reported_errors`."""
    drop_lost_output()
    with reported_errors():
        main()


@contextmanager
def checked_output() -> Iterator[None]:
    """Ends the process where standard output could not be written.

    `evspan status ... | head -1` ends quietly, with the exit code of SIGPIPE. A full disk is an
    error. After `drop_lost_output` neither happens. An exit code other than 0 is kept.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where the caller has closed it
                sys.stdout.flush()
    except (OSError, SystemExit) as error:
        lost = stdout_error()
        if lost is None or (isinstance(error, OSError) and error is not lost):
            raise
        if isinstance(error, SystemExit) and error.code:
            raise
        _exit_without_output(lost)
    if lost := stdout_error():  # raised where no one passes it on: argparse, handlers of libraries
        _exit_without_output(lost)


def _exit_without_output(lost: OSError) -> NoReturn:
    give_up_output()  # Python flushes standard output once more at exit
    if isinstance(lost, BrokenPipeError):
        sys.exit(CLOSED_OUTPUT_EXIT_CODE)
    fail(f"standard output could not be written: {os.strerror(lost.errno or 0)}")


def fail(message: str, code: int = USER_ERROR_EXIT_CODE) -> NoReturn:
    """Log `error: message` and exit."""
    report_error(message)
    sys.exit(code)


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
