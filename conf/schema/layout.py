"""Checks, before any rank starts, that ranks can divide lanes and frames, and by which exchange."""

from enum import Enum

from evspan.conf.errors import ConfigError, require
from evspan.conf.text import plural


class ExchangeKind(Enum):
    """How the ranks of a sequence run the recurrence."""

    auto = "auto"  # transpose, or relay where model.backbone.dws_conv is on
    transpose = "transpose"  # every rank scans all frames of its part of the feature cells
    relay = "relay"  # the state is sent from rank to rank


class BatchNormRanks(Enum):
    """Whose samples BatchNorm normalises together in training.

    The running statistics, which evaluation uses, are those of all ranks in any case.
    """

    world = "world"  # all ranks': exact, the numbers do not depend on the layout
    sequence = "sequence"  # of a sequence's ranks: results depend on the number of data groups
    rank = "rank"  # each rank's own: results depend on the layout


def check_layout(*, ranks: int, sequence: int, sequence_length: int, batch_size: int) -> None:
    """Checks that `ranks` form whole sequence groups with equal numbers of lanes and frames.

    Args:
        ranks: processes of the run.
        sequence: ranks per sequence.
        sequence_length: frames of a chunk, over all ranks of a sequence.
        batch_size: lanes, over all ranks.

    Raises:
        ConfigError: they do not. The message contains values that fit.
    """
    num_ranks = plural(ranks, "rank")
    if sequence < 1 or ranks % sequence:
        divisors = [str(d) for d in range(1, ranks + 1) if ranks % d == 0]
        raise ConfigError(
            f"parallel.sequence is {sequence}, but {num_ranks} cannot be cut into groups of "
            f"that size; set parallel.sequence to {' or '.join(divisors)}, or "
            f"parallel.ranks={_next_multiple(ranks, sequence)}"
        )
    if sequence_length % sequence:
        raise ConfigError(
            f"training.sequence_length is {sequence_length} frames, which the {sequence} ranks of "
            "a sequence cannot share equally; set "
            f"training.sequence_length={_next_multiple(sequence_length, sequence)}"
        )
    groups = ranks // sequence
    if batch_size % groups:
        remedy = f"set training.batch_size={_next_multiple(batch_size, groups)}"
        alternative = _sequence_for(ranks, sequence_length, batch_size)
        if alternative:
            remedy += f", or parallel.sequence={alternative}"
        raise ConfigError(
            f"training.batch_size is {batch_size} lanes, which {groups} data groups "
            f"({num_ranks} / parallel.sequence={sequence}) cannot share equally; {remedy}"
        )


def _next_multiple(value: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `value`."""
    factor = max(of, 1)
    return -(-value // factor) * factor


def _sequence_for(ranks: int, sequence_length: int, batch_size: int) -> int | None:
    """The fewest ranks per sequence with which everything divides."""
    for sequence in range(1, ranks + 1):
        if ranks % sequence or sequence_length % sequence:
            continue
        if batch_size % (ranks // sequence) == 0:
            return sequence
    return None


def chosen_exchange(kind: ExchangeKind, *, dws_conv: bool) -> ExchangeKind:
    """Resolves `auto`: returns transpose or relay.

    Args:
        dws_conv: the backbone's.

    Raises:
        ConfigError: transpose with dws_conv, which couples neighbouring feature cells.
    """
    require(
        kind is not ExchangeKind.transpose or not dws_conv,
        "parallel.exchange=transpose gives each rank its own feature cells, but with "
        "model.backbone.dws_conv=true a cell reads its neighbours; set parallel.exchange=relay, or "
        "model.backbone.dws_conv=false",
    )
    if kind is ExchangeKind.auto:
        return ExchangeKind.relay if dws_conv else ExchangeKind.transpose
    return kind
