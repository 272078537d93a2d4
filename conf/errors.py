"""Errors that a user can correct, and the exit codes of all commands.

A command prints a UserError as one line and exits with code 2 (`evspan.launch.cli.command`).
"""

USER_ERROR_EXIT_CODE = 2  # also argparse's
LOST_EXIT_CODE = 69  # EX_UNAVAILABLE: another rank of the same run is gone, stuck or failed
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved on a stop signal; the same command continues
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT


class UserError(Exception):
    """The message is complete: what is wrong, where, how much of it, and what to do."""


class ConfigError(UserError, ValueError):
    """A config value that cannot work. Raised before anything is allocated."""


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
