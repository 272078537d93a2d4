"""The config of a run from the words of a command line, without starting it: Hydra's grammar, and its errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evspan.conf.hydra_errors import refuse_unknown_keys
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import fail
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.main import get_args_parser
from omegaconf import OmegaConf


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options for Hydra, of which only --config-dir makes sense here, with an absolute folder; overrides)."""
    parser = get_args_parser()
    parser.error = lambda message: fail(f"{message}; --help shows how")  # type: ignore[method-assign]
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        fail(
            f"{unknown[0]} is no option; keys have no dashes: {unknown[0].lstrip('-')}; --help shows how"
        )
    for name in ("cfg", "info", "config_name", "config_path", "package", "shell_completion"):
        if getattr(given, name, None):
            fail(
                f"--{name.replace('_', '-')} is for evspan train, where the same keys show the config; here "
                "cluster.dry_run=true shows the batch script"
            )
    options = ["--config-dir", str(Path(given.config_dir).absolute())] if given.config_dir else []
    return options, list(given.overrides)


def expanded(
    options: Sequence[str], overrides: Sequence[str]
) -> tuple[list[list[str]], dict[str, bool]]:
    """(the overrides of each combination of values; whether a key has several)."""
    parsed = OverridesParser.create().parse_overrides(overrides=list(overrides))
    combinations = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    return combinations, {
        override.get_key_element(): override.is_sweep_override() for override in parsed
    }


def compose_train(options: Sequence[str], overrides: Sequence[str]) -> TrainConfig:
    """Raises ConfigError, or what Hydra raises, where it cannot be composed."""
    import evspan.launch.cli.train  # noqa: F401  which registers the schema

    searched = [f"hydra.searchpath=[file://{options[1]}]"] if options else []
    with initialize_config_module("evspan.conf", version_base="1.3"):
        raw = compose("train", overrides=[*overrides, *searched])
    refuse_unknown_keys(raw)
    return OmegaConf.to_object(raw)  # type: ignore[return-value]  # __post_init__ checks run here


def replaced(overrides: Sequence[str], key: str, value: str) -> list[str]:
    """With key=value instead of what was said of it; quoted for Hydra's grammar."""
    kept = [override for override in overrides if override.partition("=")[0].lstrip("+") != key]
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return [*kept, f"{key}='{escaped}'"]


def config_dir(hydra: Any) -> list[str]:
    """--config-dir as a command line that composed `hydra` had it."""
    folders = [
        source.path for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    return ["--config-dir", str(Path(folders[0]).absolute())] if folders else []


def this_of_many(config: TrainConfig) -> list[str]:
    """One run of Hydra's --multirun: gives it a folder of its own, below run_dir, and returns its arguments."""
    hydra = HydraConfig.get()
    config.run_dir = str(Path(config.run_dir, str(hydra.job.num)))
    return [*config_dir(hydra), *replaced(hydra.overrides.task, "run_dir", config.run_dir)]
