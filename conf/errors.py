"""Errors that a user can mend. A command prints them as one line and exits with code 2 (`evspan.launch.cli.command`)."""


class UserError(Exception):
    """What is wrong, where, how much of it, and what to do: all in the message, which stands alone."""


class ConfigError(UserError, ValueError):
    """A config value that cannot work; raised before anything is allocated."""


class RecordingError(UserError):
    """A recording that cannot be read as it stands."""


class BoxesError(UserError):
    """A box file that cannot be read as it stands."""


class ShardError(UserError):
    """A prepared dataset that is missing, damaged, or made by another schema."""


class LostRanks(Exception):
    """Other processes of the same run are gone, stuck or failed; names them. A traceback would tell no more."""
