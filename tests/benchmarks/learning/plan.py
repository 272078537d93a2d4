"""The runs of the learning study: variants, sequence lengths and BPTT lengths, over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.sweep.registry import Run, split_overrides

CONF = Path(__file__).parent / "conf"  # for --config-dir: experiment/bench/*.yaml
RUNS = "runs"  # folder of the sweep inside the study's folder
VARIANTS = {  # name of conf/experiment/bench/NAME.yaml -> what it changes
    "baseline": "baseline",
    "size_aware": "+ size-aware loss",
    "attention": "+ attention",
    "size_aware_attention": "+ size-aware loss + attention",
    "attention_published": "+ attention with the published initialisation",
    "attention_published_mixed": "+ attention as published: its initialisation, and lanes that mix",
    # Ablations: one possible reason of a gain or loss at a time.
    "attention_mixed": "+ attention whose look-back mixes lanes",
    "attention_fast_gates": "+ attention, gates with ten times the learning rate",
    "size_aware_attention_published": "+ size-aware loss + attention, published initialisation",
    "channel": "+ attention, channel part only",
    "spatial": "+ attention, spatial and channel parts",
    "spatial_published": "+ attention, spatial and channel parts, published initialisation",
    "temporal": "+ attention, temporal and channel parts",
    "temporal_published": "+ attention, temporal and channel parts, published initialisation",
}
DEFAULT_VARIANTS = tuple(VARIANTS)[:6]
LENGTHS = (2, 5, 10, 20, 40)
VARIANT_LENGTH = 5  # frames per chunk in all variants
OWN_KEYS = {  # config key -> the option that sets it
    "experiment": "--variants",
    "seed": "--seeds",
    "training.max_steps": "--steps",
    "training.sequence_length": "--lengths",
    "training.bptt_frames": "--bptt",
    "training.batch_size": "--frames",
    "training.evaluate_every": "--evaluations",
    "dataset.root": "--folder",
    "run_dir": "--folder",
}


@dataclass(frozen=True)
class Plan:
    """What the study trains.

    Args:
        folder: of this version of the recordings; holds the set, the runs and the report.
        seeds: number of seeds for every variant and length.
        steps: optimizer updates of every run.
        frames: frames per step, all lanes together.
        evaluations: evaluations of every run, evenly spaced.
        variants: names in VARIANTS.
        lengths: frames per chunk.
        bptt_lengths: frames that gradients flow back through, in chunks of the longest length.
        extra: overrides for every run.
    """

    folder: Path
    seeds: int
    steps: int
    frames: int
    evaluations: int
    variants: tuple[str, ...]
    lengths: tuple[int, ...]
    bptt_lengths: tuple[int, ...]
    extra: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "frames", "evaluations"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give 1 or more")
        for name in self.variants:
            if name not in VARIANTS:
                choices = ", ".join(VARIANTS)
                raise UserError(f"--variants: unknown variant {name!r}; choose from {choices}")
        self._check_lengths()
        if not (self.variants or self.lengths or self.bptt_lengths):
            raise UserError("--variants none --lengths none --bptt none leaves nothing to run")
        for override in self.extra:
            if "=" not in override:
                raise UserError(f"{override!r} is not KEY=VALUE; --help shows examples")
            key = override_key(override)
            if key in OWN_KEYS:
                raise UserError(f"{key} is set by the study; use {OWN_KEYS[key]}")

    def _check_lengths(self) -> None:
        longest = LENGTHS[-1]
        for length in self.bptt_lengths:
            if length > longest:
                raise UserError(f"--bptt: {length} is more than the {longest} frames of a chunk")
        trained = list(self.lengths)
        if self.variants:
            trained.append(VARIANT_LENGTH)
        if self.bptt_lengths:
            trained.append(longest)
        for length in trained:
            if self.frames % length:
                raise UserError(
                    f"--frames {self.frames} is not a whole number of chunks of {length} frames; "
                    "give a multiple of all lengths"
                )

    def variant(self, name: str, seed: int) -> list[str]:
        """The overrides of a variant's run."""
        return self._overrides(f"bench/{name}", VARIANT_LENGTH, seed)

    def length(self, frames: int, seed: int) -> list[str]:
        """The overrides of the baseline with chunks of `frames`."""
        return self._overrides("bench/length", frames, seed)

    def bptt(self, frames: int, seed: int) -> list[str]:
        """The overrides of the longest chunks with gradients cut after `frames`."""
        longest = LENGTHS[-1]
        overrides = self._overrides("bench/length", longest, seed)
        if frames < longest:  # otherwise it is the run of the longest length
            overrides.append(f"training.bptt_frames={frames}")
        return overrides

    def _overrides(self, experiment: str, length: int, seed: int) -> list[str]:
        """Frames seen and steps are equal for every length: shorter chunks get more lanes."""
        return [
            f"experiment={experiment}",
            f"training.sequence_length={length}",
            f"training.batch_size={self.frames // length}",
            f"training.max_steps={self.steps}",
            f"seed={seed}",
            f"training.evaluate_every={max(1, self.steps // self.evaluations)}",
            *self.extra,
        ]

    def all_runs(self) -> list[list[str]]:
        """The overrides of every run, seed by seed, so that finished runs can be compared early."""
        runs: dict[tuple[str, ...], None] = {}  # ordered, without duplicates
        for seed in range(self.seeds):
            for name in self.variants:
                runs[tuple(self.variant(name, seed))] = None
            for frames in self.lengths:
                runs[tuple(self.length(frames, seed))] = None
            for frames in self.bptt_lengths:
                runs[tuple(self.bptt(frames, seed))] = None
        return [list(run) for run in runs]

    def keys(self) -> list[str]:
        """The keys of the overrides that distinguish runs. Keys of `cluster` do not."""
        extra = [override_key(override) for override in self.extra]
        return [
            "experiment",
            "training.sequence_length",
            "training.batch_size",
            "training.bptt_frames",
            "training.max_steps",
            "seed",
            *[key for key in extra if key.partition(".")[0] != "cluster"],
        ]

    def find(self, runs: Sequence[Run], overrides: Sequence[str]) -> Run | None:
        """The run with these overrides, if there is one."""
        keys = self.keys()
        expected = {key: value for key, value in split_overrides(overrides).items() if key in keys}
        return next((run for run in runs if run.overrides == expected), None)


def override_key(override: str) -> str:
    """'+optimizer.lr=0.1' -> 'optimizer.lr'."""
    return override.lstrip("+").partition("=")[0]
