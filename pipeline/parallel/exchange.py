"""Creates the exchange of a run."""

from evspan.conf.schema.layout import ExchangeKind, chosen_exchange
from evspan.pipeline.parallel.all_to_all import TransposeExchange
from evspan.pipeline.parallel.mesh import Mesh
from evspan.pipeline.parallel.relay import RelayExchange
from evspan.pipeline.parallel.sequence import SequenceExchange


def open_exchange(
    kind: ExchangeKind, mesh: Mesh, *, sequence_length: int, dws_conv: bool
) -> SequenceExchange:
    """Creates this rank's exchange.

    Args:
        sequence_length: frames of a chunk, over all ranks of the sequence.
        dws_conv: the backbone's.

    Raises:
        ConfigError: transpose with dws_conv, which couples neighbouring cells.
    """
    frames = len(mesh.frames(sequence_length))
    if chosen_exchange(kind, dws_conv=dws_conv) is ExchangeKind.relay:
        return RelayExchange(mesh, frames=frames, whole_maps=dws_conv)
    return TransposeExchange(mesh, frames=frames)
