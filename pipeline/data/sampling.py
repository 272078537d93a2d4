"""The sampling plan of a training dataset, as its config says."""

from evspan.conf.schema.training import TrainingConfig
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.data.repeat_factors import repeat_factors


def sampling_plan(data: Dataset, config: TrainingConfig, *, seed: int) -> SamplingPlan:
    """The plan of all lanes.

    Args:
        data: the training split.
        seed: of the run.

    Raises:
        ShardError: there is no frame; or, with repeat factors, stored boxes are damaged.
    """
    repeats = None
    if config.repeat_factor_threshold:
        repeats = repeat_factors(data, config.repeat_factor_threshold, config.sequence_length)
    return SamplingPlan(
        [recording.frames for recording in data.recordings],
        [recording.labelled for recording in data.recordings],
        lanes=config.batch_size,
        sequence_length=config.sequence_length,
        sampling=config.sampling,
        seed=seed,
        parts=data.parts,
        repeats=repeats,
        staggered=config.stagger_lanes,
    )
