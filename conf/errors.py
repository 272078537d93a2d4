"""Errors that a user can correct, and the exit codes of all commands.

A command prints a UserError as one line and exits with code 2 (`evspan.launch.cli.command`).
"""

import errno
import signal

USER_ERROR_EXIT_CODE = 2  # also argparse's
IO_EXIT_CODE = 74  # EX_IOERR: a file system does not answer; the same command may succeed later
LOST_EXIT_CODE = 69  # EX_UNAVAILABLE: another rank of the same run is gone, stuck or failed
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved on a stop signal; the same command continues
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT
CLOSED_OUTPUT_EXIT_CODE = 141  # 128 + SIGPIPE: the reader of standard output has closed it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a run saves and ends
# Ranks that have saved, or were ended by the signal before they could handle it.
STOPPED_CODES = frozenset({STOPPED_EXIT_CODE, *(128 + number for number in STOP_SIGNALS)})
USER_ERRNOS = (  # of an OSError that the user can correct
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
NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)  # a full disk, or a quota that is used up
TRANSIENT_ERRNOS = (  # of a file system that does not answer now
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ESHUTDOWN,
)


class UserError(Exception):
    """The message is complete: what is wrong, where, how much of it, and what to do.

    Attributes:
        is_transient: whether the same command may succeed later, unchanged.
    """

    is_transient = False


class ConfigError(UserError, ValueError):
    """A config value that cannot work. Raised before anything is allocated."""


class DeviceError(ConfigError):
    """The GPUs of a machine cannot be used as configured."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


class RecordingError(UserError):
    """A recording cannot be read in its present state."""


class BoxesError(UserError):
    """A box file cannot be read in its present state."""


class ShardError(UserError):
    """A prepared dataset is missing, damaged, or has another schema version."""


class LostRanksError(Exception):
    """Other ranks of the same run are gone, stuck or failed; the message names them."""


def is_user_error(error: BaseException) -> bool:
    """Whether the user can correct it: a UserError, or an OSError such as a missing file."""
    if isinstance(error, OSError) and error.errno in USER_ERRNOS:
        return True
    return isinstance(error, UserError)


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that ends with a user's error."""
    if isinstance(error, UserError) and error.is_transient:
        return IO_EXIT_CODE
    return USER_ERROR_EXIT_CODE


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
