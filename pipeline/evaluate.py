"""`evspan evaluate`, one rank of it: a checkpoint and a prepared split in, COCO AP out."""

import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from data_prep.command import run_command
from pipeline.config import EvaluateConfig

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="evaluate")
def _evaluate(raw: DictConfig) -> None:
    config: EvaluateConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]  # __post_init__ checks run here
    from pipeline.checkpoint import load_weights
    from pipeline.engine.evaluator import evaluate_weights, write_results
    from pipeline.parallel.world import open_world

    with open_world(config.parallel) as world:
        weights = load_weights(config.checkpoint)
        metrics, results, data = evaluate_weights(weights, config.dataset, config.evaluation, world)
        if world.is_main:
            output = Path(config.output or f"{_folder(config.checkpoint)}/evaluation-{config.evaluation.split}")
            about = {"checkpoint": config.checkpoint, "step": weights.step, "split": config.evaluation.split}
            write_results(output, metrics, results, data, config.evaluation, about)
            print(f"{config.checkpoint} (step {weights.step}) on {config.dataset.root} {config.evaluation.split}\n{metrics.table()}\n"
                  f"written to {output}")


def _folder(checkpoint: str) -> Path:
    path = Path(checkpoint)
    return path.parent if path.is_file() else path


def main(argv: list[str] | None = None) -> None:
    """python -m pipeline.evaluate checkpoint=RUN dataset.root=SHARDS"""
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    run_command(_evaluate)


if __name__ == "__main__":
    main()
