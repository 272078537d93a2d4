"""Composes configs as the commands do."""

from typing import Any

from evspan.conf.compose import PRIMARY_CONFIGS, compose
from hydra import compose as hydra_compose
from hydra import initialize_config_module

SCHEMAS = {name: schema for schema, name in PRIMARY_CONFIGS.items()}


def composed(name: str, *overrides: str) -> tuple[Any, dict[str, str]]:
    """(typed config, group -> option taken, as Hydra's own compose reports it)."""
    config = compose(SCHEMAS[name], overrides)
    with initialize_config_module("evspan.conf", version_base="1.3"):
        raw = hydra_compose(name, list(overrides), return_hydra_config=True)
    return config, dict(raw.hydra.runtime.choices)
