"""`evspan submit --smoke`: two steps of a run on its real nodes, before the run itself starts.

The smoke run has its own folder, RUN/smoke, and its own job with a short time limit. It reads the
run's data with the run's layout, and saves a checkpoint. The run's job depends on it (afterok).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from evspan.conf.schema.cluster import ClusterConfig

if TYPE_CHECKING:  # `evspan cancel` reads FOLDER, and Hydra takes long to import
    from evspan.launch.sweep.plan import PlannedRun

FOLDER = "smoke"  # below the run
STEPS = 2
TIMEOUT_MIN = 15
SIGNAL_DELAY_S = 60


def smoke_run(run: "PlannedRun") -> "PlannedRun":
    """The run's smoke run: STEPS steps from the start, without evaluation."""
    folder = run.folder / FOLDER
    config = replace(
        run.config,
        run_dir=str(folder),
        training=replace(
            run.config.training,
            max_steps=STEPS,
            max_epochs=0.0,
            evaluate_every=0,
            log_every=1,
            profile=[],
        ),
        checkpoint=replace(run.config.checkpoint, keep=1, resume=False),
        evaluation=replace(run.config.evaluation, at_end=False),
        cluster=smoke_cluster(run.config.cluster),
    )
    overrides = [*run.overrides, f"training.max_steps={STEPS}"]
    return replace(run, folder=folder, overrides=overrides, config=config)


def smoke_cluster(cluster: ClusterConfig) -> ClusterConfig:
    """The cluster of a smoke run: a short job that is not tried again after a fault."""
    timeout_min = min(cluster.timeout_min, TIMEOUT_MIN)
    return replace(
        cluster,
        timeout_min=timeout_min,
        signal_delay_s=min(cluster.signal_delay_s, SIGNAL_DELAY_S, 30 * timeout_min),
        max_retries=1,
        requeue_after_fault=False,
        successor=False,
    )
