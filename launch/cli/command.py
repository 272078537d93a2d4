"""What every command does around its work: mistakes end in one readable line, not in a traceback."""

import argparse
import contextvars
import errno
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from evspan.conf.errors import (
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    LostRanksError,
    UserError,
)
from evspan.conf.failure_notes import report_lost_ranks, write_failure_note
from evspan.launch.logging_config import ensure_logging

USERS_ERRNOS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
)


def debugging() -> bool:
    return os.environ.get("EVSPAN_DEBUG", "") not in ("", "0")


def run_command(main: Callable[[], object]) -> None:
    """Call `main`; print the user's mistakes as `error: ...` on stderr and exit with code 2.

    EVSPAN_DEBUG=1 lets the traceback through. Defects of the program itself always show theirs.
    """
    # Torch, which is imported later, warns with stacks of C++ where another rank is gone; what matters is raised as well.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ensure_logging()
    try:
        try:
            main()
        except _FromTask as carrier:
            raise carrier.error from None
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except LostRanksError as error:
        if debugging():
            raise
        sys.exit(report_lost_ranks(str(error)))
    except Exception as error:
        if not users_mistake(error):
            write_failure_note(f"{type(error).__name__}: {error}")
            raise
        write_failure_note(one_line(error))
        if debugging():
            raise
        fail(one_line(error))


def fail(message: str) -> NoReturn:
    report_error(message)
    sys.exit(USER_ERROR_EXIT_CODE)


def report_error(message: str) -> None:
    """Writes `error: message` to standard error, or to this rank's log file."""
    ensure_logging()
    logging.getLogger(__name__).error("%s", message)


class _FromTask(BaseException):
    """Carries a task's error through Hydra, which catches every Exception and prints lines and frames of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Parser(argparse.ArgumentParser):
    """Reports a mistake as one `error:` line that names the help. All commands with options use it."""

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


def hydra_task(task: Callable[[Any], object]) -> Callable[[Any], None]:
    """Between @hydra.main and the task: refuses keys that nothing reads, and lets errors reach `run_command` as they are."""

    @functools.wraps(task)
    def checked(raw: Any) -> None:
        from evspan.conf.hydra_errors import refuse_unknown_keys

        try:
            refuse_unknown_keys(raw)
            task(raw)
        except Exception as error:
            raise _FromTask(error) from None

    return checked


def run_hydra(main: Callable[[], object], argv: list[str], *, prog: str, help: str) -> None:
    """Call `main`, decorated by @hydra.main and @hydra_task, with the arguments `argv`; --help prints `help`."""
    if {"-h", "--help"} & set(argv):
        print(help.strip())
        return
    _check_options(argv, prog)
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # else Hydra prints composition errors by itself and exits with code 1
    )
    sys.argv = [prog, *argv]
    run_command(main)


def _check_options(argv: list[str], prog: str) -> None:
    """What Hydra's parser would refuse with its usage, in one line."""
    from hydra.main import get_args_parser

    parser = get_args_parser()
    parser.error = lambda message: fail(f"{message}; {prog} --help shows how")  # type: ignore[method-assign]
    unknown = parser.parse_known_args(argv)[1]
    if unknown:
        name = unknown[0].lstrip("-")
        form = name if "=" in name else f"{name}=VALUE"
        fail(f"{unknown[0]} is no option; keys have no dashes: {form}; {prog} --help shows how")


def users_mistake(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in USERS_ERRNOS:
        return True
    return isinstance(error, UserError) or _is_composition(error)


def _is_composition(error: Exception) -> bool:
    """A config that cannot be composed: told by Hydra and OmegaConf, which most commands never import, so go by name."""
    # By where it was raised, too: some bad overrides end in a plain ValueError inside the library.
    raised_in = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ][-1:]
    return any(
        name.split(".")[0] in ("hydra", "omegaconf", "antlr4")
        for name in (type(error).__module__, *raised_in)
    )


def one_line(error: Exception) -> str:
    if _is_composition(error) and not isinstance(error, UserError):
        from evspan.conf.hydra_errors import explain

        return explain(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
