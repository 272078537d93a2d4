"""The engine that a config names."""

from evspan.conf.schema.training import EngineKind, TrainConfig
from evspan.pipeline.engine.training_engine import TrainingEngine


def engine_class(config: TrainConfig) -> type[TrainingEngine]:
    """The class that `training.engine` names. DeepSpeed is imported only if it is used."""
    if config.training.engine is EngineKind.plain:
        from evspan.pipeline.engine.plain_engine import PlainEngine

        return PlainEngine
    from evspan.pipeline.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine
