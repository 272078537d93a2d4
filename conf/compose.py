"""Composes a command's arguments into a typed config, and stores composed configs in files.

A config is composed once, by the command. Ranks and requeued jobs load the resolved config from
the file that `save_config` wrote.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from evspan.conf import hydra_adapter
from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import ConfigError
from evspan.conf.hydra_adapter import Expansion
from evspan.conf.hydra_errors import explain, is_composition_error, refuse_unknown_keys
from evspan.conf.quoting import quote_text
from evspan.conf.schema.benchmark import BenchConfig
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.conf.search_space import SearchSpace
from evspan.conf.secret_values import without_secrets
from evspan.conf.text import escape_interpolations, printable, quote_override
from evspan.conf.yaml_files import check_config_file, yaml_errors
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

T = TypeVar("T")

CONFIG_FILE = "config.yaml"  # the resolved config, in a run folder
CONFIG_DIR_OPTION = "--config-dir"
PRIMARY_CONFIGS: dict[type, str] = {  # schema -> file of the tree that a command starts from
    PrepConfig: "prep",
    TrainConfig: "train",
    EvaluateConfig: "evaluate",
    BenchConfig: "bench",
}


class _Arguments(NamedTuple):
    overrides: list[str]
    config_dir: Path | None


def compose(schema: type[T], argv: Sequence[str]) -> T:
    """The config of a command as an object of its dataclass, checked by `__post_init__`.

    Args:
        schema: one of PRIMARY_CONFIGS.
        argv: overrides `key=value`, and optionally `--config-dir FOLDER`, a further config tree.

    Raises:
        ConfigError: the arguments cannot be composed, or a value cannot work. One line.
    """
    with _config_errors():
        return _to_object(schema, _compose_tree(schema, argv))


def composed_yaml(schema: type, argv: Sequence[str]) -> str:
    """The composed config as YAML, with unresolved interpolations. Values are not checked.

    Raises:
        ConfigError: the arguments cannot be composed.
    """
    with _config_errors():
        raw = _compose_tree(schema, argv)
        refuse_unknown_keys(raw)
        return OmegaConf.to_yaml(raw)


# -- files ---------------------------------------------------------------------------------------
def save_config(config: PrepConfig | TrainConfig | EvaluateConfig, path: Path) -> None:
    """Write a config as YAML. The file is replaced as a whole: readers see one version.

    Values of `cluster.environment` and `cluster.setup` are hidden: only the batch script has them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, OmegaConf.to_yaml(_plain(asdict(without_secrets(config)))))


def load_config(schema: type[T], path: Path) -> T:
    """The config that `save_config` wrote, as the same typed object.

    Raises:
        ConfigError: the file is missing, or does not fit the schema of this version.
    """
    if not path.exists():
        raise ConfigError(f"{path} is missing: the resolved config, written when the run started")
    try:
        with _config_errors(), yaml_errors():
            check_config_file(path)
            stored = OmegaConf.load(path)
            return _to_object(schema, OmegaConf.merge(OmegaConf.structured(schema), stored))
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {printable(str(error))}") from error


# -- sweeps --------------------------------------------------------------------------------------
def expand_sweep(argv: Sequence[str], *, text: bool = True) -> Expansion:
    """Every combination of comma-separated values of a training config, without `--config-dir`.

    Args:
        text: whether commas separate the values of text keys too; else they belong to the text.

    Raises:
        ConfigError: an override cannot be parsed.
    """
    with _config_errors():
        overrides = quote_text(TrainConfig, _split_arguments(argv).overrides, sweep=text)
        return hydra_adapter.expand_overrides(overrides)


def search_space(argv: Sequence[str]) -> SearchSpace:
    """The ranges and the fixed overrides of a search over a training config.

    Raises:
        ConfigError: an override cannot be parsed, or a range is impossible.
    """
    with _config_errors():
        overrides = quote_text(TrainConfig, _split_arguments(argv).overrides, sweep=True)
        return hydra_adapter.search_space(overrides)


def config_dir_options(argv: Sequence[str]) -> list[str]:
    """`--config-dir FOLDER` with an absolute path where `argv` has it, else nothing."""
    return _config_dir_options(_split_arguments(argv).config_dir)


def replace_override(overrides: Sequence[str], key: str, value: str) -> list[str]:
    """`overrides` with the text `value` in place of any other value of the key."""
    kept = [override for override in overrides if override_key(override) != key]
    return [*kept, f"{key}={quote_override(escape_interpolations(value))}"]


def override_key(override: str) -> str:
    """'+a.b=1' -> 'a.b'."""
    return override.partition("=")[0].lstrip("+~")


# -- Hydra's --multirun --------------------------------------------------------------------------
def multirun(schema: type[T], argv: Sequence[str], task: Callable[[T, int], object]) -> None:
    """Let Hydra's sweeper and launcher run a job for each combination of values.

    Args:
        task: called with the config and the number of each job that runs in this process.

    Raises:
        ConfigError: the arguments cannot be composed.
    """

    def job(raw: DictConfig) -> None:
        with _config_errors():
            config = _to_object(schema, raw)
        task(config, HydraConfig.get().job.num)

    _register_schemas()
    arguments = _split_arguments(argv)
    name = PRIMARY_CONFIGS[schema]
    with _config_errors():
        overrides = quote_text(schema, arguments.overrides, sweep=True)
        hydra_adapter.run_multirun(name, overrides, arguments.config_dir, job)


def multirun_config_dir(hydra_config: DictConfig) -> list[str]:
    """`--config-dir FOLDER` of the command that composed `hydra_config`, the node `hydra`."""
    return _config_dir_options(hydra_adapter.config_dir_of(hydra_config))


# -- private -------------------------------------------------------------------------------------
@cache
def _register_schemas() -> None:
    """For the defaults lists of the tree. It takes a tenth of a second, which a rank saves."""
    for schema, name in PRIMARY_CONFIGS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def _compose_tree(schema: type, argv: Sequence[str]) -> DictConfig:
    _register_schemas()
    arguments = _split_arguments(argv)
    name = PRIMARY_CONFIGS[schema]
    overrides = quote_text(schema, arguments.overrides, sweep=False)
    return hydra_adapter.compose_tree(name, overrides, arguments.config_dir)


def _to_object(schema: type[T], raw: Any) -> T:
    refuse_unknown_keys(raw)
    config = OmegaConf.to_object(raw)  # runs __post_init__
    if not isinstance(config, schema):
        raise TypeError(f"composed {type(config).__name__} instead of {schema.__name__}")
    return config


def _plain(value: Any) -> Any:
    """Enums by name, and strings so that OmegaConf does not resolve interpolations in them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        return escape_interpolations(value)
    return value


def _split_arguments(argv: Sequence[str]) -> _Arguments:
    overrides = []
    config_dir = None
    remaining = iter(argv)
    for argument in remaining:
        if argument == CONFIG_DIR_OPTION:
            config_dir = next(remaining, "")
        else:
            overrides.append(argument)
    if config_dir == "":
        raise ConfigError(f"{CONFIG_DIR_OPTION} needs a folder")
    return _Arguments(overrides, None if config_dir is None else Path(config_dir))


def _config_dir_options(config_dir: Path | None) -> list[str]:
    if config_dir is None:
        return []
    return [CONFIG_DIR_OPTION, str(config_dir.absolute())]


@contextmanager
def _config_errors() -> Iterator[None]:
    """Raises the errors of Hydra and OmegaConf as ConfigError."""
    try:
        yield
    except Exception as error:
        if not is_composition_error(error):
            raise
        raise ConfigError(explain(error)) from error
