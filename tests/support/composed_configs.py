"""Composes configs as the commands do."""

from typing import Any

import pytest
from evspan.conf.compose import PRIMARY_CONFIGS, compose
from hydra._internal.hydra import Hydra

SCHEMAS = {name: schema for schema, name in PRIMARY_CONFIGS.items()}


def composed(name: str, *overrides: str) -> tuple[Any, dict[str, str]]:
    """(typed config, group -> option taken, as Hydra reports it)."""
    choices: dict[str, str] = {}
    compose_config = Hydra.compose_config

    def compose_and_keep_choices(hydra: Hydra, *args: Any, **kwargs: Any) -> Any:
        raw = compose_config(hydra, *args, **kwargs)
        choices.update(raw.hydra.runtime.choices)
        return raw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "compose_config", compose_and_keep_choices)
        config = compose(SCHEMAS[name], overrides)
    return config, choices
