"""A rank of an evaluation in which one rank works longer than a collective may wait.

python -m support.uneven_ranks WEIGHTS SHARDS OUTPUT    with torchrun's variables
"""

import json
import sys
import time
from pathlib import Path

from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import EvaluationConfig, ParallelConfig
from evspan.pipeline.engine import evaluator
from evspan.pipeline.inference.streaming import evaluate_split
from evspan.pipeline.parallel.world import open_world
from evspan.pipeline.weights import load_weights

RANKS = 2
TIMEOUT_S = 10
CHUNK_S = 2.5  # that a chunk takes longer on the rank that has one


def main(weights: str, shards: str, output: str) -> None:
    """Evaluates; rank 0 writes the metrics."""

    def slowly(*args, between_chunks, **kwargs):
        def wait() -> None:
            time.sleep(CHUNK_S)
            between_chunks()

        return evaluate_split(*args, between_chunks=wait, **kwargs)

    vars(evaluator)["evaluate_split"] = slowly
    dataset = DatasetConfig(root=shards)
    config = EvaluationConfig(skip_first_ms=0, sequence_length=3, limit_recordings=1)
    with open_world(ParallelConfig(ranks=RANKS, threads=1, timeout_s=TIMEOUT_S)) as world:
        metrics = evaluator.evaluate_weights(load_weights(weights), dataset, config, world).metrics
        if world.is_main:
            Path(output).write_text(json.dumps(metrics.to_json()))


if __name__ == "__main__":
    main(*sys.argv[1:])
