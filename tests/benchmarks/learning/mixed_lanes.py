"""The lane-mixing ablation: temporal attention reads the frames of the next lane, not of its own.

As published, small-object attention keeps earlier frames in a buffer that all lanes share. Here every lane
reads its neighbour's frames, everything else stays the same.

    python tests/benchmarks/learning/mixed_lanes.py train RUN/config.yaml
    python tests/benchmarks/learning/mixed_lanes.py evaluate RUN dataset.root=SHARDS ...

train and evaluate as `evspan` does, on one rank, with every detector of the process changed.
"""

import sys
from pathlib import Path

import torch
from evspan.conf.compose import CONFIG_FILE, load_config
from evspan.conf.errors import require
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli.command import run_command
from evspan.launch.cli.main import main as evspan
from evspan.launch.local import sequential
from evspan.launch.local.run import run_training
from evspan.launch.sweep.plan import PlannedRun
from evspan.pipeline.model.detector import Detector, LookBackRows, look_back_rows
from evspan.pipeline.model.state import DetectorState
from torch import Tensor


def mixed_look_back_rows(labelled: Tensor, following: Tensor, frames: int) -> LookBackRows:
    """`look_back_rows` with the frames of lane b + 1 before a labelled frame of lane b.

    Args:
        labelled: (T, B) bool.
        following: (frames, B) bool.
        frames: number of earlier frames that a labelled frame reads.
    """
    if not frames:
        return look_back_rows(labelled, following, frames)
    steps, lanes = labelled.shape
    labelled_rows = labelled.flatten().nonzero()[:, 0]
    needed = labelled.clone()
    ahead = torch.cat((labelled, following))
    for k in range(1, frames + 1):
        needed |= ahead[k : k + steps].roll(1, 1)
    num_carried = frames * lanes
    carried_rows = torch.arange(num_carried, device=labelled.device)
    row = torch.cat((carried_rows, needed.flatten().cumsum(0) - 1 + num_carried))
    neighbours = labelled_rows // lanes * lanes + (labelled_rows + 1) % lanes
    return LookBackRows(
        needed=needed.flatten().nonzero()[:, 0],
        labelled=row[labelled_rows + num_carried] - num_carried,
        before=torch.stack([row[neighbours + k * lanes] for k in range(frames)], 1),
        last=row[steps * lanes :],
    )


PLAIN_FORWARD = Detector.forward
PLAIN_COMMAND = sequential.train_command


def mixed_forward(
    self: Detector,
    frames: Tensor,
    state: DetectorState,
    *,
    starts: Tensor | None = None,
    labelled: Tensor | None = None,
    following: Tensor | None = None,
) -> tuple[Tensor, DetectorState]:
    """`Detector.forward` that always finds earlier frames by `look_back_rows`."""
    if labelled is None:
        labelled = torch.ones(frames.shape[:2], dtype=torch.bool)
    return PLAIN_FORWARD(self, frames, state, starts=starts, labelled=labelled, following=following)


class MixedLanesDetector(Detector):
    """A detector whose temporal attention reads the frames of the next lane."""

    look_back_rows = staticmethod(mixed_look_back_rows)
    forward = mixed_forward


def is_mixed(experiment: str) -> bool:
    """Whether a variant, bench/NAME, mixes lanes."""
    return experiment.endswith("_mixed")


def train_command(run: PlannedRun) -> list[str]:
    """`local.sequential.train_command`, with mixed lanes where the variant has them."""
    experiments = [override for override in run.overrides if override.startswith("experiment=")]
    if experiments and is_mixed(experiments[0]):
        return [sys.executable, __file__, "train", str(run.folder / CONFIG_FILE)]
    return PLAIN_COMMAND(run)


def main(argv: list[str]) -> None:
    """Trains or evaluates in this process, with lanes mixed in all detectors."""
    Detector.look_back_rows = staticmethod(mixed_look_back_rows)
    Detector.forward = mixed_forward  # type: ignore[method-assign]  # detectors made anywhere below
    if argv[0] == "train":
        run_command(lambda: _train(Path(argv[1])))
    else:
        evspan(argv)


def _train(path: Path) -> None:
    config = load_config(TrainConfig, path)
    require(config.parallel.ranks == 1, "lanes are mixed on one rank only: parallel.ranks=1")
    sys.exit(run_training(config))


if __name__ == "__main__":
    main(sys.argv[1:])
