"""What a run may change when it continues from its checkpoint.

`EFFECTS` decides it for every key of the config: a run keeps its model, seed and batch geometry.
The data is compared by its digest (`evspan.pipeline.data_digest`), wherever it lies.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError
from evspan.conf.schema.layout import BatchNormRanks
from evspan.conf.schema.training import Precision, TrainConfig
from evspan.conf.text import printable
from evspan.pipeline.checkpoint_files import FORMAT_VERSION, WEIGHTS
from evspan.pipeline.data_digest import data_differences
from evspan.pipeline.engine.adam import learning_rate_factor
from evspan.pipeline.engine.checkpoints import Checkpoints, Resumed
from evspan.pipeline.engine.limits import LIMITS, total_steps, with_total_steps
from evspan.pipeline.history import append
from evspan.pipeline.parallel.reductions import broadcast_json
from evspan.pipeline.parallel.world import World
from evspan.pipeline.weights import plain, read_description

logger = logging.getLogger(__name__)
CHANGED = "changed"  # event in the history: the run continues with other settings
DATA = "data"  # key of meta.json: the digest of the data
COMPARED_STEPS = 1000  # of two schedules


class Effect(Enum):
    """What happens if a key has another value than in the checkpoint."""

    refused = "refused"  # it would be another run
    listed = "listed"  # one line, and an event in the history
    data = "data"  # the data itself is compared
    ignored = "ignored"  # it changes no result, or only by rounding


EFFECTS = {
    "run_dir": Effect.ignored,
    "seed": Effect.refused,
    # The network and its loss.
    "model.backbone.embed_dim": Effect.refused,
    "model.backbone.dim_multiplier": Effect.refused,
    "model.backbone.num_blocks": Effect.refused,
    "model.backbone.dim_head": Effect.refused,
    "model.backbone.partition_split_32": Effect.refused,
    "model.backbone.mlp_ratio": Effect.refused,
    "model.backbone.ls_init_value": Effect.refused,
    "model.backbone.dws_conv": Effect.refused,
    "model.backbone.forget_bias": Effect.refused,
    "model.fpn.depth": Effect.refused,
    "model.fpn.in_stages": Effect.refused,
    "model.fpn.enable_small_object_attention": Effect.refused,
    "model.fpn.attention_spatial": Effect.refused,
    "model.fpn.attention_temporal": Effect.refused,
    "model.fpn.temporal_window": Effect.refused,
    "model.fpn.identity_init": Effect.refused,
    "model.head.num_classes": Effect.refused,
    "model.head.center_radius": Effect.refused,
    "model.head.candidate_top_k": Effect.refused,
    "model.head.size_aware_loss": Effect.refused,
    "model.head.size_aware_weight": Effect.refused,
    "model.head.size_aware_mode": Effect.refused,
    "model.head.small_threshold": Effect.refused,
    "model.head.medium_threshold": Effect.refused,
    "model.postprocess.confidence_threshold": Effect.listed,
    "model.postprocess.nms_threshold": Effect.listed,
    # The data.
    "dataset.name": Effect.ignored,
    "dataset.kind": Effect.data,
    "dataset.root": Effect.data,
    "dataset.roots": Effect.data,
    "dataset.classes": Effect.data,
    # Of `evspan prep`.
    "dataset.sensor_size": Effect.data,
    "dataset.time_unit": Effect.data,
    "dataset.labels.class_map": Effect.data,
    "dataset.labels.label_every_ms": Effect.data,
    "dataset.labels.offset_us": Effect.data,
    "dataset.labels.time_unit": Effect.data,
    "dataset.labels.crop": Effect.data,
    "dataset.labels.min_side": Effect.data,
    "dataset.labels.min_diagonal": Effect.data,
    "dataset.labels.max_width_fraction": Effect.data,
    # Which frames a step reads.
    "training.batch_size": Effect.refused,
    "training.sequence_length": Effect.refused,
    "training.gradient_accumulation_steps": Effect.refused,
    "training.sampling": Effect.refused,
    "training.stagger_lanes": Effect.refused,
    "training.repeat_factor_threshold": Effect.refused,
    "training.precision": Effect.refused,
    # `schedule_allows` decides.
    "training.max_steps": Effect.listed,
    # Adam has no moments of what was frozen, and its bias correction is over.
    "training.freeze": Effect.refused,
    "training.max_epochs": Effect.listed,
    "training.max_hours": Effect.listed,
    "training.patience": Effect.listed,
    "training.bptt_frames": Effect.listed,
    "training.gradient_clipping": Effect.listed,
    "training.augmentation.hflip_prob": Effect.listed,
    "training.augmentation.zoom_prob": Effect.listed,
    "training.augmentation.zoom_in": Effect.listed,
    "training.augmentation.zoom_out": Effect.listed,
    "training.augmentation.zoom_in_fraction": Effect.listed,
    "training.augmentation.rotate_prob": Effect.listed,
    "training.augmentation.rotate_degrees": Effect.listed,
    "training.augmentation.shear_prob": Effect.listed,
    "training.augmentation.shear_degrees": Effect.listed,
    "training.augmentation.translate_prob": Effect.listed,
    "training.augmentation.translate_fraction": Effect.listed,
    "training.augmentation.min_visible": Effect.listed,
    "training.augmentation.polarity_flip_prob": Effect.listed,
    "training.augmentation.drop_prob": Effect.listed,
    "training.augmentation.drop_fraction": Effect.listed,
    "training.augmentation.noise_prob": Effect.listed,
    "training.augmentation.noise_hz": Effect.listed,
    "training.augmentation.hot_prob": Effect.listed,
    "training.augmentation.hot_pixels": Effect.listed,
    "training.augmentation.erase_prob": Effect.listed,
    "training.augmentation.erase_patches": Effect.listed,
    "training.augmentation.erase_area": Effect.listed,
    "training.log_every": Effect.listed,
    "training.log_images_every": Effect.listed,
    "training.evaluate_every": Effect.listed,
    "training.max_nonfinite": Effect.listed,
    # Only what is recorded.
    "training.spike_sigmas": Effect.ignored,
    "training.spike_window": Effect.ignored,
    "training.slow_rank_factor": Effect.ignored,
    "training.slow_rank_steps": Effect.ignored,
    # 0 drops the average; from 0 to another value, it begins with the checkpoint's weights.
    "training.ema_decay": Effect.listed,
    # How a step is computed.
    "training.engine": Effect.ignored,
    "training.frames_per_call": Effect.ignored,
    "training.activation_checkpointing": Effect.ignored,
    "training.compile": Effect.ignored,
    "training.cuda_graphs": Effect.ignored,
    "training.num_workers": Effect.ignored,
    "training.profile": Effect.ignored,
    "training.peak_tflops": Effect.ignored,
    "optimizer.lr": Effect.listed,
    "optimizer.weight_decay": Effect.listed,
    "optimizer.schedule": Effect.listed,
    "optimizer.warmup_fraction": Effect.listed,
    "optimizer.start_factor": Effect.listed,
    "optimizer.end_factor": Effect.listed,
    "optimizer.gate_lr_multiplier": Effect.listed,
    "optimizer.lr_multipliers": Effect.listed,
    "deepspeed.stage": Effect.ignored,
    "deepspeed.offload_optimizer": Effect.ignored,
    "deepspeed.offload_parameters": Effect.ignored,
    # The layout changes no result, but with batch_norm=sequence or rank; see `_effect`.
    "parallel.ranks": Effect.ignored,
    "parallel.sequence": Effect.ignored,
    "parallel.exchange": Effect.ignored,
    "parallel.batch_norm": Effect.listed,
    "parallel.device": Effect.ignored,
    "parallel.timeout_s": Effect.ignored,
    "parallel.threads": Effect.ignored,
    "checkpoint.every": Effect.listed,
    "checkpoint.keep": Effect.listed,
    "checkpoint.asynchronous": Effect.ignored,
    "checkpoint.resume": Effect.ignored,
    # Without effect on a run that continues, which its user may not expect.
    "checkpoint.init_from": Effect.listed,
    "evaluation.split": Effect.listed,
    "evaluation.confidence_threshold": Effect.listed,
    "evaluation.nms_threshold": Effect.listed,
    "evaluation.skip_first_ms": Effect.listed,
    "evaluation.min_side": Effect.listed,
    "evaluation.min_diagonal": Effect.listed,
    "evaluation.skip_empty_frames": Effect.listed,
    "evaluation.confusion_threshold": Effect.listed,
    "evaluation.still_speed": Effect.listed,
    "evaluation.still_s": Effect.listed,
    "evaluation.time_bins_s": Effect.listed,
    "evaluation.speed_bins": Effect.listed,
    "evaluation.rest_bins_s": Effect.listed,
    "evaluation.limit_recordings": Effect.listed,
    "evaluation.at_end": Effect.listed,
    "evaluation.sequence_length": Effect.ignored,
    "evaluation.batch_size": Effect.ignored,
    "evaluation.precision": Effect.listed,
    "evaluation.write_detections": Effect.listed,
    # How jobs are submitted.
    "cluster.scheduler": Effect.ignored,
    "cluster.partition": Effect.ignored,
    "cluster.account": Effect.ignored,
    "cluster.qos": Effect.ignored,
    "cluster.constraint": Effect.ignored,
    "cluster.exclude": Effect.ignored,
    "cluster.gres": Effect.ignored,
    "cluster.exclusive": Effect.ignored,
    "cluster.nice": Effect.ignored,
    "cluster.mail_type": Effect.ignored,
    "cluster.mail_user": Effect.ignored,
    "cluster.cpu_bind": Effect.ignored,
    "cluster.mem_bind": Effect.ignored,
    "cluster.gpu_bind": Effect.ignored,
    "cluster.cpus_per_task": Effect.ignored,
    "cluster.mem_gb": Effect.ignored,
    "cluster.timeout_min": Effect.ignored,
    "cluster.signal_delay_s": Effect.ignored,
    "cluster.array_parallelism": Effect.ignored,
    "cluster.setup": Effect.ignored,
    "cluster.environment": Effect.ignored,
    "cluster.sbatch_args": Effect.ignored,
    "cluster.python": Effect.ignored,
    "cluster.code": Effect.ignored,
    "cluster.dry_run": Effect.ignored,
    "cluster.gpus_per_node": Effect.ignored,
    "cluster.ranks_per_node": Effect.ignored,
    "cluster.max_retries": Effect.ignored,
    "cluster.requeue_after_fault": Effect.ignored,
    "cluster.container": Effect.ignored,
    "cluster.image": Effect.ignored,
    "cluster.mounts": Effect.ignored,
    "cluster.detach": Effect.ignored,
    "cluster.successor": Effect.ignored,
    "cluster.after": Effect.ignored,
    "cluster.fail_fast": Effect.ignored,
    "search.method": Effect.ignored,
    "search.trials": Effect.ignored,
    "search.metric": Effect.ignored,
    "search.sampler": Effect.ignored,
    "search.startup_trials": Effect.ignored,
    "search.seed": Effect.ignored,
    "search.pruner": Effect.ignored,
    "search.min_steps": Effect.ignored,
    "search.reduction_factor": Effect.ignored,
    "search.resume": Effect.ignored,
    "search.partition": Effect.ignored,
}


# What a run did before its version had the key, where that is not today's default.
BEFORE_THE_KEY = {"training.stagger_lanes": False}


def config_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a config class."""
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            assert isinstance(field.default_factory, type)
            yield from config_keys(field.default_factory, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# -- the config ------------------------------------------------------------------------------------
def check_continues(folder: Path, meta: Mapping[str, Any], config: TrainConfig) -> None:
    """Checks that a run may continue from a checkpoint, as far as its config shows.

    Args:
        meta: of the checkpoint in `folder`. config: of the run; its precision may be `auto`.

    Raises:
        UserError: another format, seed, model or batch, or steps that the schedule does not allow.
    """
    if meta.get("form") != FORMAT_VERSION:
        raise UserError(
            f"{folder} was saved by another version of evspan, in a format that this one cannot "
            f"continue. Start from its weights: run_dir=NEW checkpoint.init_from={folder}"
        )
    precision = saved_precision(meta)
    if precision not in Precision.__members__:
        raise UserError(
            f"{folder} was trained with training.precision={precision}, which this version does "
            f"not have. Start from its weights: run_dir=NEW checkpoint.init_from={folder}"
        )
    refused = [
        f"{key}={_text(saved)}, this run has {_text(current)}"
        for key, saved, current in _differences(meta["config"], config)
        if _effect(key, meta, config) is Effect.refused
    ]
    if refused:
        raise UserError(
            f"{folder} was saved with {'; '.join(refused)}, so it cannot continue it. Give the old "
            f"values, or start a new run from its weights: run_dir=NEW "
            f"checkpoint.init_from={folder}"
        )


def listed_changes(meta: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """The keys with another value that the run may continue with: 'optimizer.lr 0.001 -> 0.01'."""
    return [
        f"{key} {_text(saved)} -> {_text(current)}"
        for key, saved, current in _differences(meta["config"], config)
        if _effect(key, meta, config) is Effect.listed
    ]


def _differences(saved: Mapping[str, Any], config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, saved value, value of this run), as JSON values.

    A key that the checkpoint's version did not have counts as saved with its default, or with its
    value in BEFORE_THE_KEY.
    """
    current = _as_json(config)
    defaults = _as_json(TrainConfig())
    for key in EFFECTS:
        value = _value(current, key)
        before = _value(saved, key, BEFORE_THE_KEY.get(key, _value(defaults, key)))
        if before != value and not (key == "training.precision" and value == "auto"):
            yield key, before, value


def _effect(key: str, meta: Mapping[str, Any], config: TrainConfig) -> Effect:
    if key in ("training.max_steps", "training.max_epochs"):
        return Effect.listed if _steps_allowed(meta, config) else Effect.refused
    if key in ("parallel.ranks", "parallel.sequence"):
        exact = config.parallel.batch_norm is BatchNormRanks.world
        return Effect.ignored if exact else Effect.listed
    return EFFECTS[key]


def _steps_allowed(meta: Mapping[str, Any], config: TrainConfig) -> bool:
    """`schedule_allows`, with the steps to which `training.max_epochs` limits both."""
    saved = replace(
        config.training,
        max_steps=_value(meta["config"], "training.max_steps"),
        max_epochs=_value(meta["config"], "training.max_epochs", 0.0),
    )
    frames = _value(meta, f"{LIMITS}.frames")
    if frames is None:  # a checkpoint of an earlier version
        return not config.training.max_epochs and schedule_allows(
            config, saved.max_steps, meta["step"]
        )
    limited = with_total_steps(config, frames)
    saved_steps = total_steps(saved, frames)
    return saved_steps == limited.training.max_steps or schedule_allows(
        limited, saved_steps, meta["step"]
    )


def schedule_allows(config: TrainConfig, saved_steps: int, step: int) -> bool:
    """Whether a run may have another number of steps than its checkpoint's.

    The schedule of the learning rate must not depend on it from `step` on: the warm-up is over, and
    optimizer.end_factor is 1.

    Args:
        saved_steps: training.max_steps of the checkpoint. step: of the checkpoint.
    """
    max_steps = config.training.max_steps
    if max_steps < step:
        return False
    before = learning_rate_factor(config.optimizer, saved_steps)
    now = learning_rate_factor(config.optimizer, max_steps)
    stride = max(1, (max_steps - step) // COMPARED_STEPS)
    return all(before(s) == now(s) for s in [*range(step, max_steps, stride), max_steps - 1])


def saved_precision(meta: Mapping[str, Any]) -> str | None:
    """training.precision of a checkpoint; None where there is none."""
    precision = _value(meta.get("config", {}), "training.precision", None)
    return precision if isinstance(precision, str) else None


def _as_json(config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(plain(asdict(config))))
    return values


def _value(values: Any, key: str, default: Any = None) -> Any:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) and value else json.dumps(value)


# -- the data --------------------------------------------------------------------------------------
def continue_run(
    resumed: Resumed,
    config: TrainConfig,
    digest: Mapping[str, Any],
    checkpoints: Checkpoints,
    world: World,
) -> None:
    """Checks that the data is that of the checkpoint, and reports what differs. A collective.

    Args:
        config: with the precision that was chosen. digest: of the data; read on rank 0 only.

    Raises:
        UserError: on every rank, if the data is other data.
    """
    problem = ""
    if world.is_main:
        problem = _data_problem(resumed, config, digest)
    problem = broadcast_json(problem, name="check of the data")
    if problem:
        raise UserError(problem)
    if not world.is_main:
        return
    checkpoints.accept(resumed)
    changes = listed_changes(resumed.meta, config)
    saved = resumed.meta.get(DATA)
    if saved is None:
        logger.warning(
            "%s has no digest of its data, as an earlier version saved it: whether the recordings "
            "in %s are the same could not be checked",
            resumed.folder,
            config.dataset.place,
        )
    elif saved["evaluation"] != digest["evaluation"]:
        changes.append(f"the recordings of evaluation.split={config.evaluation.split}")
    if changes:
        message = f"{checkpoints.run}: continues {resumed.folder.name} with other settings: "
        message += ", ".join(changes)
        logger.info("%s", message)
        append(checkpoints.run, CHANGED, step=resumed.meta["step"], message=message)


def _data_problem(resumed: Resumed, config: TrainConfig, digest: Mapping[str, Any]) -> str:
    """Why the run cannot continue on this data; empty where it can."""
    saved = resumed.meta.get(DATA)
    if saved is None:
        # What an earlier version's weights file contains.
        description = read_description(resumed.folder / WEIGHTS)
        saved = {**digest, "frames": description["frames"], "classes": description["classes"]}
    differences = data_differences(saved, digest)
    if not differences:
        return ""
    return (
        f"{resumed.folder} was trained on other data than {config.dataset.place} has: "
        f"{'; '.join(differences)}. Give the dataset that it was trained on, or start a new run "
        f"from its weights: run_dir=NEW checkpoint.init_from={resumed.folder}"
    )
