"""Composes configs through Hydra as the commands do."""

import evspan.launch.cli.evaluate
import evspan.launch.cli.prep
import evspan.launch.cli.train  # noqa: F401  registers the schemas
from evspan.conf.hydra_errors import refuse_unknown_keys
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf


def composed(name: str, *overrides: str):
    """(typed config, group -> option taken)."""
    with initialize_config_module("evspan.conf", version_base="1.3"):
        raw = compose(name, list(overrides), return_hydra_config=True)
    choices = dict(raw.hydra.runtime.choices)
    OmegaConf.set_struct(raw, False)
    del raw["hydra"]
    refuse_unknown_keys(raw)  # as the commands do
    return OmegaConf.to_object(raw), choices
