"""Reads the YAML of a run's config, which may be damaged or written by others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # without annotations
from evspan.conf.errors import ConfigError

MOST_BYTES = 1 << 20
MOST_DEPTH = 32
DAMAGED = "restore it, or start the run again in another folder: run_dir=NEW"


def check_config_file(path: Path) -> None:
    """Checks a config before it is parsed.

    Aliases would repeat a value as often as one likes, and tags name types of Python; no config of
    Evspan has either.

    Raises:
        ConfigError: the file is too large, no YAML, nested too deeply, or has aliases or tags.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"it is larger than {MOST_BYTES} bytes; {DAMAGED}")
    depth = 0
    with yaml_errors():
        for event in yaml.parse(data.decode(), Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError(f"it has an alias, as no config of Evspan has; {DAMAGED}")
            if getattr(event, "tag", None):
                raise ConfigError(f"it has the tag {str(event.tag)[:60]!r}; {DAMAGED}")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise ConfigError(f"it is nested deeper than {MOST_DEPTH} levels; {DAMAGED}")


@contextmanager
def yaml_errors() -> Iterator[None]:
    """Raises errors of PyYAML as ConfigError."""
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"it is no YAML ({reason}); {DAMAGED}") from error
