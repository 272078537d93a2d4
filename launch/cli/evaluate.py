"""`evspan evaluate`, one rank of it: a checkpoint and a prepared split in, COCO AP out."""

import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from evspan.conf.errors import require
from evspan.conf.schema.training import EvaluateConfig
from evspan.launch.cli.command import hydra_task, run_hydra
from evspan.launch.cli.grammar import evaluate_overrides
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)

HELP = """evspan evaluate: a checkpoint and a prepared split -> COCO AP (Prophesee's protocol) and detections

  evspan evaluate compare A B      two evaluations side by side, with intervals; compare --help tells more

  evspan evaluate RUN dataset.root=SHARDS [dataset=NAME] [key=value ...]
      RUN is a run folder (its newest checkpoint), one of its checkpoints, or a .safetensors file. The model comes with it.
      RUN/checkpoints/best is the checkpoint that had the highest AP while it trained.
      metrics.json, one <recording>_bbox.npy per recording, and frames.npz, which compare reads, go to RUN/evaluation-SPLIT.
      AP is told by class, size, recording, time since the start, and by speed and rest of the object: does memory hold it?

  examples
      evspan evaluate runs/demo dataset.root=shards
      evspan evaluate runs/tiny dataset=gen4 dataset.root=/data/gen4 evaluation.split=test parallel.ranks=4
      evspan evaluate compare runs/demo/evaluation-val runs/other/evaluation-val

  keys
      dataset=simulated          simulated | gen4 | etram | etram3 | gen4_rvt | rvt_tree: files in conf/dataset/
      output=                    another folder for the results
      evaluation.split=val       train | val | test
      evaluation.confidence_threshold=0.001
      evaluation.nms_threshold=0.45
      evaluation.skip_first_ms=500   leave out the start of each recording, where the detector has no memory yet
      evaluation.min_side=0      leave out smaller boxes and detections, pixels of the stored frames
      evaluation.min_diagonal=0
      evaluation.confusion_threshold=0.3  score from which detections are in the confusion matrix
      evaluation.still_speed=5   pixels of the stored frames per second: an object that was slower ...
      evaluation.still_s=0.5     ... for so long is still
      evaluation.time_bins_s=[1,2,5,10,20,60]   likewise speed_bins, rest_bins_s
      evaluation.batch_size=4    recordings at once, per rank
      evaluation.write_detections=true
      parallel.ranks=1           processes, one per GPU (or several on CPU cores); started here unless a launcher did

  evspan evaluate --cfg job ...    shows the config that these arguments make; conf/schema/training.py explains every key
  evspan evaluate --hydra-help     how overrides work
"""


def evaluate_here(config: EvaluateConfig) -> None:
    """Evaluate as the rank that this process is."""
    from evspan.pipeline.engine.evaluator import described, evaluate_weights, write_results
    from evspan.pipeline.evaluation.breakdown import breakdown
    from evspan.pipeline.inference.streaming import labelled
    from evspan.pipeline.parallel.world import open_world
    from evspan.pipeline.weights import load_weights

    with open_world(config.parallel) as world:
        weights = load_weights(config.checkpoint)
        metrics, results, data = evaluate_weights(weights, config.dataset, config.evaluation, world)
        if world.is_main:
            output = Path(
                config.output
                or f"{_folder(config.checkpoint)}/evaluation-{config.evaluation.split}"
            )
            parts = breakdown(labelled(results, data), data.classes, config.evaluation)
            about = described(config.checkpoint, weights, config.dataset, config.evaluation)
            write_results(
                output,
                metrics,
                results,
                data,
                config.evaluation,
                {**about, "breakdown": parts.to_json()},
            )
            print(
                f"{config.checkpoint} (step {weights.step}) on {config.dataset.root} {config.evaluation.split}\n"
                f"{metrics.table()}\n\n{parts.table()}\n\nwritten to {output}"
            )


def _folder(checkpoint: str) -> Path:
    path = Path(checkpoint)
    return path.parent if path.is_file() else path


def check(config: EvaluateConfig) -> None:
    """Raises UserError for what can be known to fail before any rank starts."""
    from evspan.pipeline.data.datasets import open_dataset

    remedy = "name a run folder, a checkpoint or a .safetensors file: evspan evaluate runs/NAME ..."
    require(bool(config.checkpoint), f"the checkpoint is missing; {remedy}")
    require(
        Path(config.checkpoint).exists(), f"there is no checkpoint {config.checkpoint}; {remedy}"
    )
    open_dataset(config.dataset, config.evaluation.split)


def main(
    argv: list[str] | None = None, run: Callable[[EvaluateConfig], object] = evaluate_here
) -> None:
    """python -m evspan.launch.cli.evaluate RUN dataset.root=SHARDS

    run: called with the checked config.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        from evspan.pipeline.evaluation import compare

        compare.main(argv[1:])
        return

    @hydra.main(version_base="1.3", config_path="pkg://evspan.conf", config_name="evaluate")
    @hydra_task
    def task(raw: DictConfig) -> None:
        run(OmegaConf.to_object(raw))  # type: ignore[arg-type]  # __post_init__ checks run here

    run_hydra(task, evaluate_overrides(argv), prog="evspan evaluate", help=HELP)


if __name__ == "__main__":
    main()
