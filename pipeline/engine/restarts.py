"""`checkpoint.resume=false` in a job that its launcher starts again: it starts over once.

An attempt of `evspan submit` reads `config.yaml`, which the first checkpoint has changed. Ranks of
torchrun and srun get the same arguments in every attempt. So each checkpoint names the launchers of
its ranks, and an attempt that finds one of its own job continues.
"""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import xxhash
from evspan.conf.lock_holder import start_ticks
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.checkpoint_files import FOLDER, DamagedError, read_meta, step_names
from evspan.pipeline.parallel.reductions import broadcast_json
from evspan.pipeline.parallel.world import World

logger = logging.getLogger(__name__)
LAUNCHERS = "launchers"  # key of meta.json, from `launcher_ids`
RESTART_COUNTS = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}


def launcher_ids(env: Mapping[str, str]) -> dict[str, str]:
    """Identifies what starts this process again if it fails; the same in each of its attempts.

    Returns:
        Of torchrun, a checksum of its process; of SLURM, one of the job and the step.
    """
    parts = {}
    if "TORCHELASTIC_RUN_ID" in env:  # which is the same for all commands that do not set one
        agent = os.getppid()
        parts["torchrun"] = f"{socket.gethostname()} {agent} {start_ticks(agent)}"
    if "SLURM_JOB_ID" in env:
        names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID")
        parts["slurm"] = " ".join(env.get(name, "") for name in names)
    return {name: xxhash.xxh3_64_hexdigest(text.encode()) for name, text in parts.items()}


def continue_if_restarted(config: TrainConfig, world: World) -> TrainConfig:
    """The config with `checkpoint.resume=true` if this job has already started over.

    A collective where it is false.
    """
    if config.checkpoint.resume:
        return config
    has_started_over = world.is_main and _has_started_over(Path(config.run_dir), os.environ)
    if not broadcast_json(has_started_over, name="whether the job has started over"):
        return config
    return replace(config, checkpoint=replace(config.checkpoint, resume=True))


def _has_started_over(run: Path, env: Mapping[str, str]) -> bool:
    """Whether an earlier attempt of this job has saved a checkpoint of the run."""
    ids = launcher_ids(env)
    restarted = {
        name: ids[name]
        for name, count in RESTART_COUNTS.items()
        if name in ids and _is_set(env, count)
    }
    names = step_names(run / FOLDER)
    if not restarted or not names:
        return False
    for name in names:
        saved = _saved_ids(run / FOLDER / name)
        if any(saved.get(launcher) == own for launcher, own in restarted.items()):
            logger.info(
                "%s: an earlier attempt of this job has started over (checkpoint.resume=false) and "
                "saved %s; this attempt continues it",
                run,
                name,
            )
            return True
    logger.warning(
        "%s: this job was started again, and none of the %d checkpoints names it, so "
        "checkpoint.resume=false starts over. To continue instead: checkpoint.resume=true",
        run / FOLDER,
        len(names),
    )
    return False


def _is_set(env: Mapping[str, str], name: str) -> bool:
    """Whether a count is above 0."""
    return env.get(name, "0").strip() not in ("", "0")


def _saved_ids(folder: Path) -> Mapping[str, str]:
    """LAUNCHERS of a checkpoint; empty where it is damaged, or of an earlier version."""
    try:
        ids = read_meta(folder).values.get(LAUNCHERS)
    except DamagedError:
        return {}
    return ids if isinstance(ids, dict) else {}
