"""The dataset and the protocol of a run, as the defaults of an evaluation of its checkpoints."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from evspan.conf.compose import CONFIG_FILE, load_config, override_key
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import EvaluateConfig, TrainConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

RUN_CONFIGS = (CONFIG_FILE, "config.json")  # the second one where torchrun started the run
LEVELS = 4  # RUN/checkpoints/step-N/weights.safetensors
# What concerns the evaluations during training alone.
NOT_INHERITED = (
    "evaluation.at_end",
    "evaluation.limit_recordings",
    "evaluation.write_detections",
)
EITHER = ("dataset.root", "dataset.roots")  # where one is given, the run's other one is not taken


def with_run_config(config: EvaluateConfig, argv: Sequence[str]) -> EvaluateConfig:
    """The config with `dataset` and `evaluation` of the checkpoint's run where argv sets nothing.

    Args:
        config: composed from argv.
        argv: overrides; a key that is set there keeps its value, `dataset=NAME` the whole dataset.
    """
    path = run_config(Path(config.checkpoint)) if config.checkpoint else None
    if path is None:
        return config
    try:
        run = load_config(TrainConfig, path)
    except ConfigError as error:
        logger.warning("the dataset and the protocol are not those of the run: %s", error)
        return config
    given = {override_key(word) for word in argv}
    if given & set(EITHER):
        given |= set(EITHER)
    inherited = replace(
        config,
        dataset=_inherit(config.dataset, run.dataset, "dataset", given),
        evaluation=_inherit(config.evaluation, run.evaluation, "evaluation", given),
    )
    if inherited != config:
        logger.info("dataset and protocol where not given: those of %s", path)
    return inherited


def run_config(checkpoint: Path) -> Path | None:
    """The resolved config of the run that a checkpoint is in."""
    folders = [checkpoint, *checkpoint.absolute().parents]
    for folder in folders[:LEVELS]:
        for name in RUN_CONFIGS:
            if (folder / name).is_file():
                return folder / name
    return None


def _inherit(own: T, run: T, key: str, given: Collection[str]) -> T:
    """`own`, a config dataclass, with the values of `run` for keys that are not given."""
    if key in given:
        return own
    values: dict[str, Any] = {}
    config: Any = own
    for field in fields(config):
        name = f"{key}.{field.name}"
        value = getattr(run, field.name)
        is_given = any(other == name or other.startswith(f"{name}.") for other in given)
        if is_dataclass(value):
            values[field.name] = _inherit(getattr(own, field.name), value, name, given)
        elif not is_given and name not in NOT_INHERITED:
            values[field.name] = value
    result: T = replace(config, **values)
    return result
