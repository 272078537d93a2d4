"""Detectors that only the study trains: options that the product does not have.

    python tests/benchmarks/learning/other_detectors.py NAME train ...
    python tests/benchmarks/learning/other_detectors.py NAME evaluate ...

train and evaluate are those of `evspan`, on one rank, with every detector of the process changed. A
run's config says nothing of it: its checkpoints are scored with the detector's name.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from evspan.launch.cli.main import main as evspan
from evspan.pipeline.model import attention, detector
from evspan.pipeline.model.attention import EventTemporalAttention
from evspan.pipeline.model.neck import YOLOPAFPN, LookBack
from torch import Tensor

PLAIN_NECK = YOLOPAFPN
PLAIN_TEMPORAL = EventTemporalAttention


class AttentionBeforePyramid(YOLOPAFPN):
    """A neck whose attention is on the backbone's features instead of the pyramid's.

    The pyramid passes on what attention did to the finest scales, to all scales.
    """

    def forward(self, features: Sequence[Tensor], look_back: LookBack) -> list[Tensor]:
        """See `YOLOPAFPN.forward`; the pyramid runs on the labelled frames alone."""
        return self.pyramid(self.attended(features, look_back))


class DifferenceTemporalAttention(EventTemporalAttention):
    """Temporal attention that weighs the difference to the previous frame.

    out = x + (x - previous frame) * motion * weights, with motion and weights as in the plain one.
    """

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """See `EventTemporalAttention.forward`."""
        older = torch.cat((previous.flatten(1, 2), x), dim=1)
        over_time = self.temporal_conv.weight[..., 0, 0].transpose(1, 2).flatten(1)
        temporal = F.conv2d(older, over_time[..., None, None], self.temporal_conv.bias)
        motion = self.motion_conv(torch.cat((x, previous[:, -1]), dim=1)).sigmoid()
        weights = self.temporal_fc(temporal.mean((2, 3))).sigmoid()
        if self.gate is not None:
            weights = weights * self.gate
        return x + (x - previous[:, -1]) * motion * weights[..., None, None]


DETECTORS = ("before_pyramid", "temporal_difference")


def use(name: str) -> None:
    """Changes all detectors that this process makes; '' changes them back."""
    neck = AttentionBeforePyramid if name == "before_pyramid" else PLAIN_NECK
    temporal = DifferenceTemporalAttention if name == "temporal_difference" else PLAIN_TEMPORAL
    vars(detector)["YOLOPAFPN"] = neck
    vars(attention)["EventTemporalAttention"] = temporal


def command(name: str) -> list[str]:
    """The beginning of a command that does as `evspan`, with such a detector; '': without one."""
    if name:
        return [sys.executable, str(Path(__file__)), name]
    return [sys.executable, "-m", "evspan.launch"]


if __name__ == "__main__":
    use(sys.argv[1])
    evspan(sys.argv[2:])
