"""The layouts that a number of ranks can have, and how one compares with a single rank.

Nothing here imports torch; `evspan.pipeline.engine.layout_comparison` trains them.
"""

from dataclasses import dataclass

from evspan.conf.schema.layout import ExchangeKind

EXCHANGES = (ExchangeKind.transpose, ExchangeKind.relay)


@dataclass(frozen=True)
class Layout:
    """data x sequence ranks with a ZeRO stage.

    frames_per_call: as training.frames_per_call; 0 for all frames of a chunk at once.
    """

    ranks: int
    sequence: int = 1
    exchange: ExchangeKind = ExchangeKind.auto
    stage: int = 0
    frames_per_call: int = 0

    @property
    def name(self) -> str:
        """'2x2 relay'."""
        name = f"{self.ranks // self.sequence}x{self.sequence}"
        if self.sequence > 1:
            name += f" {self.exchange.name}"
        if self.frames_per_call:
            name += " frame by frame"
        return name


REFERENCE = Layout(1)
ROUNDING = Layout(1, frames_per_call=1)  # differs from the reference by rounding only
SINGLE_RANK = (REFERENCE, ROUNDING)


def layouts_of(ranks: int) -> list[Layout]:
    """All data x sequence layouts of `ranks` ranks, with both exchanges and ZeRO 1 to 3 in turn."""
    if ranks == 1:
        return [Layout(1, stage=stage) for stage in (1, 2, 3)]
    layouts = [Layout(ranks, stage=1)]
    for sequence in range(2, ranks + 1):
        if ranks % sequence:
            continue
        for exchange in EXCHANGES:
            stage = len(layouts) % 3 + 1
            layouts.append(Layout(ranks, sequence, exchange, stage))
    return layouts


@dataclass(frozen=True)
class DeviceInfo:
    """The device that the ranks train on. gpus: number of GPUs of this machine; 0 for the CPU."""

    name: str
    gpus: int


@dataclass(frozen=True)
class LayoutResult:
    """A layout compared with the reference. Differences are relative; NaN if a step is missing.

    Attributes:
        layout: its name. stage: of ZeRO.
        skipped: steps without a finite loss.
        peak_bytes: memory of the rank that used most.
        frames_per_s: of the fastest step.
        loss: largest difference of any loss of any step.
        gradients: largest difference of any gradient of the first step.
        resumed: largest difference of any loss after resuming from the layout's own checkpoint.
        other: name of the layout whose checkpoint was resumed, too; empty if there was none.
        resumed_other: the same difference after resuming from that checkpoint.
    """

    layout: str
    stage: int
    skipped: int
    peak_bytes: int
    frames_per_s: float
    loss: float
    gradients: float
    resumed: float
    other: str = ""
    resumed_other: float = 0.0
