"""Which ranks' samples BatchNorm normalises together."""

from functools import partial

from evspan.conf.schema.layout import BatchNormRanks
from evspan.pipeline.model.norm import RankReductions
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.reductions import add_over_ranks


def batch_norm_reductions(kind: BatchNormRanks, mesh: Mesh) -> RankReductions | None:
    """The reductions of a training run; None on one rank."""
    ranks = mesh.data_size * mesh.sequence_size
    if ranks == 1:
        return None
    if kind is BatchNormRanks.sequence:
        together = mesh.sequence_size
    else:
        together = ranks if kind is BatchNormRanks.world else 1
    if together == ranks:
        return RankReductions(add_over_ranks)
    if together == 1:
        return RankReductions(None, sum_over_all=add_over_ranks)
    over_sequence = partial(add_over_ranks, group=mesh.group)
    return RankReductions(over_sequence, sum_over_all=add_over_ranks)
