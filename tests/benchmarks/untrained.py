"""Scores an untrained network: python tests/benchmarks/untrained.py demo/run demo/shards [val]

Takes the model config of a run, draws random weights (seed 0), and evaluates them as
`evspan evaluate` does.
"""

import sys

import torch
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.inference.streaming import evaluate_split, score
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import load_weights


def main(run: str, shards: str, split: str = "val") -> None:
    """Prints the metrics of random weights on a split of the shards."""
    model = load_weights(run).model
    config = EvaluationConfig(split=split, confidence_threshold=0.0)
    data = open_dataset(DatasetConfig(root=shards), split)
    torch.manual_seed(0)
    detector = Detector(model, data.channels).eval()
    results = evaluate_split(
        detector, data, config, device=torch.device("cpu"), recordings=data.recordings
    )
    metrics = score(results, data, config)
    print(metrics.table())
    print(f"untrained: ap={metrics.ap or 0:.3f} ap50={metrics.ap50 or 0:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
