"""What a user states about weights that the weights do not show. No torch."""

from typing import NamedTuple

from evspan.conf.schema.prep import FrameMode


class KnownFacts(NamedTuple):
    """Values that replace the ones in a weights file, inferred from its tensors, or RVT's.

    None: no statement. If size, dim_head or dataset is given, the description in a file of ours is
    ignored; the others each replace one value.
    """

    size: str | None = None  # of conf/size
    dim_head: int | None = None  # channels of an attention head
    dataset: str | None = None  # of rvt_checkpoint.DATASETS; None: gen1 with two classes, else gen4
    classes: list[str] | None = None  # names by class id
    mode: FrameMode | None = None
    downsample: int | None = None
    window_ms: int | None = None


NOTHING_KNOWN = KnownFacts()
