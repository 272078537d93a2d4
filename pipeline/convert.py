"""Converts weights between RVT's checkpoints and weights files."""

from pathlib import Path

from evspan.conf.errors import UserError
from evspan.data_prep.shards.atomic import atomic_write
from evspan.pipeline.inference.trained_detector import check_fit
from evspan.pipeline.known_facts import NOTHING_KNOWN, KnownFacts
from evspan.pipeline.rvt_checkpoint import SUFFIX, open_weights, save_published
from evspan.pipeline.weights import Weights, save_weights


def convert_weights(source: Path, output: Path, facts: KnownFacts = NOTHING_KNOWN) -> Weights:
    """Reads weights in either format and writes them in the one that the output's suffix names.

    Args:
        source: a published .ckpt, a run folder, a checkpoint folder or a .safetensors file.
        output: a name ending in .ckpt or .safetensors. An existing file is replaced.
        facts: values that the weights do not show.

    Raises:
        UserError: there is no such source, it is no checkpoint, `facts` contradict it, or its
            tensors do not fit the model.
    """
    weights = open_weights(source, facts)
    try:
        check_fit(weights)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    save = save_published if output.suffix == SUFFIX else save_weights
    with atomic_write(output) as temporary:
        save(temporary, weights)
    return weights
