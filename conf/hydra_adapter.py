"""The only module that uses private names of Hydra. Verified against hydra-core 1.3.8.

Hydra's public `compose` reports a value such as `a,b` without the argument, and `hydra.main` reads
sys.argv with a parser that fails on Python 3.14. Both use the class Hydra, as this module does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from evspan.conf.errors import ConfigError
from evspan.conf.omegaconf_adapter import maps_replaced
from evspan.conf.search_space import (
    Range,
    SearchSpace,
    choices,
    range_of_interval,
    range_of_values,
)
from evspan.conf.secret_values import HIDDEN, hidden_overrides, hidden_settings
from hydra import version
from hydra._internal.core_plugins import basic_sweeper
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

VERIFIED_VERSION = "1.3.8"
CONFIG_TREE = "pkg://evspan.conf"
# Keys whose mapping replaces the default one.
REPLACED_MAPS = ("class_map", "lr_multipliers")
COMMAND_LINE = "command-line"  # Hydra's name for the source of --config-dir


class Expansion(NamedTuple):
    """The runs of a sweep.

    combinations: the overrides of each run. swept_keys: keys that have several values.
    """

    combinations: list[list[str]]
    swept_keys: list[str]


def compose_tree(name: str, overrides: Sequence[str], config_dir: Path | None) -> DictConfig:
    """Compose the primary config `name` of the tree, without starting a Hydra job."""
    with _opened_hydra(config_dir) as hydra:
        config = hydra.compose_config(
            config_name=name,
            overrides=list(overrides),
            run_mode=RunMode.RUN,
            with_log_configuration=False,
        )
    with open_dict(config):
        del config["hydra"]
    return config


def run_multirun(
    name: str,
    overrides: Sequence[str],
    config_dir: Path | None,
    task: Callable[[DictConfig], object],
) -> None:
    """Run Hydra's sweeper and launcher, which call `task` with the config of each job.

    The sweeper's file multirun.yaml has no values that may be secrets.
    """
    with _opened_hydra(config_dir) as hydra, _multirun_file_without_secrets():
        hydra.multirun(config_name=name, task_function=task, overrides=list(overrides))


def expand_overrides(overrides: Sequence[str]) -> Expansion:
    """Every combination of the values in overrides such as `key=a,b`."""
    parsed = OverridesParser.create().parse_overrides(overrides=list(overrides))
    for override in parsed:
        if override.is_interval_sweep():
            raise ConfigError(
                f"{override.input_line} has no values to enumerate; a search draws them: add "
                "search=optuna to evspan sweep"
            )
    combinations = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    return Expansion(combinations, swept)


def search_space(overrides: Sequence[str]) -> SearchSpace:
    """The fixed overrides and the ranges of a search.

    Raises:
        ConfigError: a range is impossible, or is a glob.
    """
    fixed: list[str] = []
    ranges: dict[str, Range] = {}
    for override in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        text = str(override.input_line)
        if override.is_sweep_override():
            key = text.partition("=")[0]
            ranges[key] = _range(key, override)
        else:
            fixed.append(text)
    return SearchSpace(tuple(fixed), ranges)


def _range(key: str, override: Override) -> Range:
    sweep = override.value()
    if not isinstance(sweep, Sweep):
        raise ConfigError(
            f"{key} has values that a search cannot draw; name them, such as {key}=choice(a,b)"
        )
    tags = sorted(sweep.tags)
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        return range_of_interval(key, sweep.start, sweep.end, tags)
    if isinstance(sweep, RangeSweep):
        return range_of_values(key, list(sweep.range()), tags)
    return choices(key, list(override.sweep_string_iterator()), tags)


def config_dir_of(hydra_config: DictConfig) -> Path | None:
    """The folder of --config-dir, from the node `hydra` of a composed config."""
    for source in hydra_config.runtime.config_sources:
        if source.provider == COMMAND_LINE:
            return Path(source.path)
    return None


class _PublishedOmegaConf(OmegaConf):
    """OmegaConf for Hydra's sweeper, which saves the config with all overrides."""

    @staticmethod
    def save(config: Any, f: Any, resolve: bool = False) -> None:
        """Saves a copy in which values are hidden."""
        OmegaConf.save(_published(config), f, resolve)


@contextmanager
def _multirun_file_without_secrets() -> Iterator[None]:
    module: Any = basic_sweeper  # it does not export the name
    module.OmegaConf = _PublishedOmegaConf
    try:
        yield
    finally:
        module.OmegaConf = OmegaConf


def _published(config: DictConfig) -> Any:
    """A copy of a job's config, with its node `hydra`, that may be published."""
    values: Any = OmegaConf.to_container(config)  # interpolations stay
    hydra = values["hydra"]
    for name in ("hydra", "task"):
        given = hydra["overrides"][name]
        hydra["overrides"][name] = hidden_overrides(given)
        if hydra["overrides"][name] != given:
            hydra["job"]["override_dirname"] = HIDDEN
    for node in (values.get("cluster"), hydra.get("launcher")):
        if node:
            node.update(hidden_settings(node))
    return OmegaConf.create(values)


@contextmanager
def _opened_hydra(config_dir: Path | None) -> Iterator[Hydra]:
    """Hydra with our config tree, and `config_dir` searched after it. May be nested."""
    search_path = create_config_search_path(CONFIG_TREE)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir is {config_dir}, which is not a folder")
        schema = SearchPathQuery(provider="schema")
        search_path.prepend(COMMAND_LINE, f"file://{config_dir.absolute()}", anchor=schema)
    backup: Any = get_gh_backup()
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    try:
        with maps_replaced(REPLACED_MAPS):
            yield Hydra.create_main_hydra2("evspan", search_path)
    finally:
        restore_gh_from_backup(backup)
