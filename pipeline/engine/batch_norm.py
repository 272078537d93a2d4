"""Which ranks' samples BatchNorm normalises together."""

from functools import partial

from evspan.conf.schema.layout import BatchNormRanks
from evspan.pipeline.model.norm import RankReductions
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.reductions import add_over_ranks

# Names of the collectives.
STATISTICS = "BatchNorm statistics"
RUNNING_STATISTICS = "running statistics of BatchNorm"


def batch_norm_reductions(kind: BatchNormRanks, mesh: Mesh) -> RankReductions | None:
    """The reductions of a training run; None on one rank."""
    ranks = mesh.data_size * mesh.sequence_size
    if ranks == 1:
        return None
    over_all = partial(add_over_ranks, name=STATISTICS)
    running = partial(add_over_ranks, name=RUNNING_STATISTICS)
    if kind is BatchNormRanks.sequence:
        together = mesh.sequence_size
    else:
        together = ranks if kind is BatchNormRanks.world else 1
    if together == ranks:
        return RankReductions(over_all)
    if together == 1:
        return RankReductions(None, sum_over_all=running)
    over_sequence = partial(add_over_ranks, group=mesh.group, name=STATISTICS)
    return RankReductions(over_sequence, sum_over_all=running)
