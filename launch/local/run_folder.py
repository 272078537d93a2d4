"""Numbered folders for runs and sweeps that were started without `run_dir`: runs/0001, ..."""

import logging
from pathlib import Path

from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import TrainConfig

logger = logging.getLogger(__name__)
RUNS = Path("runs")
SWEEPS = Path("sweeps")


def name_run_folder(config: TrainConfig, *, create: bool = True) -> None:
    """Sets `run_dir` to a new folder below `runs`, unless it is set.

    Args:
        create: False: the folder is only named, as for a dry run.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if config.run_dir:
        return
    config.run_dir = str(numbered_folder(RUNS, create=create))


def numbered_folder(parent: Path, *, create: bool = True) -> Path:
    """The next folder `parent/NNNN`. Of several commands that start at once, each gets its own.

    It logs the name, and how the newest earlier one is continued.

    Args:
        create: makes it, which claims the number.

    Raises:
        ConfigError: it cannot be made.
    """
    numbers = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdecimal()]
    last = max(numbers, default=0)
    number = last + 1
    while create:
        folder = _folder(parent, number)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made: {error}; name one: run_dir=DIR") from error
    folder = _folder(parent, number)
    message = f"new folder {folder}"
    if last:
        message += f"; to continue the one before: run_dir={_folder(parent, last)}"
    logger.info("%s", message)
    return folder


def _folder(parent: Path, number: int) -> Path:
    return parent / f"{number:04d}"


def require_run_dir(config: TrainConfig) -> None:
    """For ranks of another launcher, each of which composes the config itself.

    Raises:
        ConfigError: there is no run_dir, so each rank would choose another one.
    """
    if not config.run_dir:
        raise ConfigError(
            "run_dir is empty; with torchrun or srun, name a folder: run_dir=runs/NAME"
        )
