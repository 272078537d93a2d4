"""Which ranks can share lanes and frames, and by which exchange: known before any rank starts."""

from enum import Enum

from evspan.conf.errors import ConfigError, require


class ExchangeKind(Enum):
    auto = "auto"  # transpose, or relay where model.backbone.dws_conv is on
    transpose = "transpose"  # every rank scans all frames of its share of the feature cells
    relay = "relay"  # the state goes from rank to rank


def check_layout(*, ranks: int, sequence: int, sequence_length: int, batch_size: int) -> None:
    """Raises ConfigError, with what would fit, unless `ranks` make whole sequence groups that share lanes and frames equally."""
    if sequence < 1 or ranks % sequence:
        fits = [str(d) for d in range(1, ranks + 1) if ranks % d == 0]
        raise ConfigError(
            f"parallel.sequence is {sequence}, but {_ranks(ranks)} cannot be cut into groups of that size; set "
            f"parallel.sequence to {' or '.join(fits)}, or parallel.ranks={_multiple(ranks, sequence)}"
        )
    if sequence_length % sequence:
        raise ConfigError(
            f"training.sequence_length is {sequence_length} frames, which the {sequence} ranks of a sequence "
            f"cannot share equally; set training.sequence_length={_multiple(sequence_length, sequence)}"
        )
    groups = ranks // sequence
    if batch_size % groups:
        more = (
            f", or parallel.sequence={fit}"
            if (fit := _sequence_for(ranks, sequence_length, batch_size))
            else ""
        )
        raise ConfigError(
            f"training.batch_size is {batch_size} lanes, which {groups} data groups ({_ranks(ranks)} / "
            f"parallel.sequence={sequence}) cannot share equally; set training.batch_size="
            f"{_multiple(batch_size, groups)}{more}"
        )


def _ranks(count: int) -> str:
    return f"{count} rank" + "s" * (count > 1)


def _multiple(value: int, of: int) -> int:
    """The next multiple of `of`, from `value` on."""
    return -(-value // max(of, 1)) * max(of, 1)


def _sequence_for(ranks: int, sequence_length: int, batch_size: int) -> int | None:
    """The fewest ranks per sequence with which everything divides."""
    return next(
        (
            s
            for s in range(1, ranks + 1)
            if ranks % s == 0 and sequence_length % s == 0 and batch_size % (ranks // s) == 0
        ),
        None,
    )


def chosen_exchange(kind: ExchangeKind, *, dws_conv: bool) -> ExchangeKind:
    """What `kind` comes to: transpose or relay. Raises ConfigError where feature cells cannot be dealt out to ranks."""
    require(
        kind is not ExchangeKind.transpose or not dws_conv,
        "parallel.exchange=transpose deals feature cells out to ranks, but with model.backbone.dws_conv=true a cell looks at "
        "its neighbours; set parallel.exchange=relay, or model.backbone.dws_conv=false",
    )
    if kind is ExchangeKind.auto:
        return ExchangeKind.relay if dws_conv else ExchangeKind.transpose
    return kind
