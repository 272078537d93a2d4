"""The experiments of the study, as data: sets, variants, and what is compared.

An variant is trained once per seed; runs of one seed read the same frames in every variant of the same set
and layout. Every number of steps is that of `--scale 1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from learning.recordings import PREPARE, SCENE, STOPPING, Recordings
from learning.scores import LONG_REST

LONG = f"{LONG_REST:g} s"

# -- sets ------------------------------------------------------------------------------------------
EVERY_FOURTH = (*PREPARE, "dataset.labels.label_every_ms=200")
RESTS_TEST = "rests-test-v1"
RESTS_LONG = "rests-long-v1"
RESTING = (
    *("--width", "256", "--height", "192", "--objects", "4,7", "--scales", "1,2"),
    *("--stop-fraction", "1", "--rest-s", "3,10", "--clutter", "5,20", "--hot-pixels", "0,20"),
)
WIDE_DOMAIN = (  # domain randomisation: each recording draws its own values
    *("--noise-hz", "0.05,4", "--contrast-threshold", "0.15,0.45", "--hot-pixels", "0,400"),
    *("--threshold-mismatch", "0.03,0.12", "--refractory-us", "200,2000"),
    *("--object-contrast", "0.55,1.2", "--background-contrast", "0.3,2", "--clutter", "0,120"),
    *("--background-texture", "0,0.25", "--ego-speed", "0,160", "--speed", "0.8,1.8"),
)
DOMAINS = {"default": "default", "night": "night", "driving": "driving"}
WINDOWS_MS = (50, 25, 10)
SETS = {
    "learn-v3": Recordings("learn-v3", "train=24,val=16", 10),
    "rests-v1": Recordings("rests-v1", "train=32,val=12", 20, (*RESTING, "--seed", "2")),
    # Of the same kind: enough to tell lengths apart, and twice as long. What rests hardly changes
    # between frames, so every fourth one is scored.
    RESTS_TEST: Recordings(RESTS_TEST, "val=36", 20, (*RESTING, "--seed", "5"), EVERY_FOURTH),
    RESTS_LONG: Recordings(RESTS_LONG, "val=12", 40, (*RESTING, "--seed", "3"), EVERY_FOURTH),
    # The one of val is not scored.
    "domain-random-v1": Recordings(
        "domain-random-v1", "train=24,val=1", 5, (*SCENE, "--seed", "4", *WIDE_DOMAIN)
    ),
}
for _name in DOMAINS:
    SETS[f"domain-{_name}-v1"] = Recordings(
        f"domain-{_name}-v1",
        "train=24,val=12",
        5,
        (*SCENE, "--seed", "3", "--domain", _name),
    )
for _ms in WINDOWS_MS:
    SETS[f"rate-{_ms}-v1"] = Recordings(
        f"rate-{_ms}-v1",
        "train=24,val=12" if _ms == WINDOWS_MS[0] else "val=12",
        5,
        STOPPING,
        (*PREPARE, f"frames.window_ms={_ms}"),
    )
for _ms in WINDOWS_MS[1:]:
    # The frames of shorter windows, for training: a recording that runs slower.
    SETS[f"rate-{_ms}-train-v1"] = Recordings(
        f"rate-{_ms}-train-v1", "train=24", 5, STOPPING, stretch=WINDOWS_MS[0] // _ms
    )


# -- experiments -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """What is trained, once per seed.

    Attributes:
        title: in tables and figures.
        overrides: of `evspan train`, beside the experiment's.
        trained_on: names in SETS; several: `dataset.roots`, with equal weights.
        detector: of `other_detectors.py`.
        starts_from: the variant of which one run, of seed 0, gives the weights to start from.
        steps: 0: the experiment's.
        once: one run, whatever the number of seeds.
        also_scored: earlier steps that are scored too.
        ranks: of a run. frames_per_step: of all lanes together; 0: the experiment's.
        frames_per_s: of one core of an AMD EPYC, measured in CPU time, for the costs of the plan.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    trained_on: tuple[str, ...] = ()
    detector: str = ""
    starts_from: str = ""
    steps: int = 0
    once: bool = False
    also_scored: tuple[int, ...] = ()
    ranks: int = 1
    frames_per_step: int = 0
    frames_per_s: float = 120.0


@dataclass(frozen=True)
class Family:
    """Comparisons that are corrected together.

    Attributes:
        question: that they answer.
        measure: of `scores.measures`. on: the set.
        pairs: variant and the variant that it is compared with.
        intended: the effect that the number of seeds should resolve, fraction from 0 to 1.
        group: families of the same one are corrected together; empty: this one alone.
    """

    question: str
    measure: str
    on: str
    pairs: tuple[tuple[str, str], ...]
    intended: float
    group: str = ""


@dataclass(frozen=True)
class Experiment:
    """Attributes:
    method: of the page.
    overrides: of every run. frames: per step, all lanes together.
    scored_on: sets on which every variant is scored; `last_scored_on`: when all else is done.
    seeds: by default. pilot: the variants of the pilot.
    """

    name: str
    title: str
    method: str
    overrides: tuple[str, ...]
    steps: int
    frames: int
    variants: tuple[Variant, ...]
    scored_on: tuple[str, ...]
    families: tuple[Family, ...]
    seeds: int
    pilot: tuple[str, ...]
    last_scored_on: tuple[str, ...] = ()

    def corrected_with(self, family: Family) -> list[Family]:
        """The families whose comparisons are corrected together with those of one, in order."""
        if not family.group:
            return [family]
        return [other for other in self.families if other.group == family.group]

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def steps_of(self, variant: Variant, scale: float) -> int:
        """Optimizer updates of a run. An variant of one step has one at every scale."""
        steps = variant.steps or self.steps
        return steps if steps == 1 else max(2, round(steps * scale))

    def frames_of(self, variant: Variant) -> int:
        """Of an update, all lanes together."""
        return variant.frames_per_step or self.frames

    def scored_steps(self, variant: Variant, scale: float) -> list[int]:
        """All steps of a run that are scored, ascending."""
        steps = self.steps_of(variant, scale)
        return sorted({*(max(1, round(step * scale)) for step in variant.also_scored), steps})

    def sets(self, variants: Sequence[Variant]) -> list[str]:
        """The sets that these variants need."""
        trained = [name for variant in variants for name in variant.trained_on]
        return list(dict.fromkeys([*trained, *self.scored_on]))


ATTENTION_ON = "model.fpn.enable_small_object_attention=true"
PUBLISHED = "model.fpn.identity_init=false"
NO_SPATIAL = "model.fpn.attention_spatial=false"
NO_TEMPORAL = "model.fpn.attention_temporal=false"
SIZE_AWARE = "model.head.size_aware_loss=true"
FAST_GATES = "optimizer.gate_lr_multiplier=10"
MIXED = ("experiment=bench/baseline", "training.sequence_length=5")


def _branch(
    name: str,
    title: str,
    *overrides: str,
    detector: str = "",
    steps: int = 0,
    also_scored: tuple[int, ...] = (),
    frames_per_s: float = 140.0,
) -> Variant:
    return Variant(
        name,
        title,
        overrides,
        ("learn-v3",),
        detector,
        starts_from="base",
        steps=steps,
        also_scored=also_scored,
        frames_per_s=frames_per_s,
    )


BRANCHES = (
    _branch("continued", "baseline continued", also_scored=(250, 500), frames_per_s=150.0),
    _branch("identity", "attention, identity start", ATTENTION_ON, also_scored=(250, 500)),
    _branch("fast_gates", "attention, gates ten times as fast", ATTENTION_ON, FAST_GATES),
    _branch(
        "published", "attention, published start", ATTENTION_ON, PUBLISHED, also_scored=(250, 500)
    ),
    _branch("size_aware", "size-aware loss", SIZE_AWARE, frames_per_s=150.0),
    _branch(
        "size_aware_fast_gates",
        "size-aware loss and attention, fast gates",
        *(SIZE_AWARE, ATTENTION_ON, FAST_GATES),
    ),
    _branch(
        "before_pyramid",
        "attention before the pyramid, fast gates",
        *(ATTENTION_ON, FAST_GATES),
        detector="before_pyramid",
    ),
    _branch(
        "temporal_difference",
        "temporal part on the difference to the previous frame, fast gates",
        *(ATTENTION_ON, FAST_GATES, NO_SPATIAL),
        detector="temporal_difference",
    ),
    _branch("spatial", "spatial part, fast gates", ATTENTION_ON, FAST_GATES, NO_TEMPORAL),
    _branch("temporal", "temporal part, fast gates", ATTENTION_ON, FAST_GATES, NO_SPATIAL),
    _branch(
        "channel", "channel part, fast gates", ATTENTION_ON, FAST_GATES, NO_SPATIAL, NO_TEMPORAL
    ),
    # The same weights as `published` before its first step: a step that changes none of them.
    _branch(
        "published_start",
        "attention, published start, not trained",
        *(ATTENTION_ON, PUBLISHED, "optimizer.lr=1e-12"),
        steps=1,
    ),
)
COMPARED = tuple((variant.name, "continued") for variant in BRANCHES[1:-1])

ATTENTION = Experiment(
    name="attention",
    title="Does attention pay?",
    method=(
        "One baseline is trained, and every variant starts from the moving average of its weights, with "
        "new parts as its seed initialises them and a new optimizer. Runs of a seed read the same "
        "frames. Channel attention is in every variant that has attention. The intervals are for "
        "other seeds of the branches and other recordings, of this baseline."
    ),
    overrides=(*MIXED, "training.batch_size=8", "optimizer.lr=0.001"),
    steps=1000,
    frames=40,
    variants=(
        Variant(
            "base",
            "baseline",
            ("optimizer.lr=0.002",),
            ("learn-v3",),
            steps=3000,
            once=True,
            frames_per_s=160.0,
        ),
        *BRANCHES,
    ),
    scored_on=("learn-v3",),
    families=(
        Family("Small objects", "ap_small", "learn-v3", COMPARED, 0.01),
        Family("All objects", "ap", "learn-v3", COMPARED, 0.01),
        Family(
            "Small objects, one form against another",
            "ap_small",
            "learn-v3",
            (
                ("fast_gates", "identity"),
                ("before_pyramid", "fast_gates"),
                ("temporal_difference", "temporal"),
            ),
            0.01,
        ),
    ),
    seeds=5,
    pilot=("continued", "fast_gates"),
)


def _length_base(forget_bias: int) -> Variant:
    overrides = (
        "training.sequence_length=5",
        "training.batch_size=8",
        f"model.backbone.forget_bias={forget_bias}",
        "optimizer.lr=0.002",
    )
    return Variant(
        f"base_bias_{forget_bias}",
        f"baseline, T = 5, forget bias {forget_bias}",
        overrides,
        ("rests-v1",),
        steps=3000,
        once=True,
        frames_per_step=40,
        frames_per_s=160.0,
    )


def _length(frames: int, forget_bias: int) -> Variant:
    ranks = 2 if frames == 80 else 1
    overrides = (
        f"training.sequence_length={frames}",
        f"training.batch_size={160 // frames}",
        f"model.backbone.forget_bias={forget_bias}",
    )
    return Variant(
        f"frames_{frames}_bias_{forget_bias}",
        f"T = {frames}, forget bias {forget_bias}",
        overrides,
        ("rests-v1",),
        starts_from=f"base_bias_{forget_bias}",
        ranks=ranks,
        frames_per_s=160.0 if ranks == 1 else 100.0,
    )


LENGTHS = (5, 20, 80)
BIASES = (0, 2)
LENGTH_PAIRS = tuple(
    (f"frames_{frames}_bias_{bias}", f"frames_{LENGTHS[0]}_bias_{bias}")
    for bias in BIASES
    for frames in LENGTHS[1:]
)
LENGTH = Experiment(
    name="length",
    title="Do long sequences pay?",
    method=(
        "Objects rest for 3 to 10 s (60 to 200 frames) among patches of the background that look like "
        "them when something passes; others hide them. An object at rest fires no events. One that "
        "another hides in part rests anew, as what passes over it shows it again. All lanes "
        "follow recordings with their state carried, and begin anywhere in one. For each forget "
        "bias (0 is the published start), one baseline is trained with T = 5, and every variant "
        "continues it, with a new optimizer. Frames seen and steps are equal, so shorter sequences have more lanes. "
        "T = 80 runs over 2 sequence ranks. An object is found by a detection of IoU 0.5 whose "
        "confidence is such that half of all detections are right."
    ),
    overrides=("experiment=bench/length", "optimizer.lr=0.001"),
    steps=400,
    frames=160,
    # Those that take two cores last, so that no core waits for the other.
    variants=(
        *(_length_base(bias) for bias in BIASES),
        *(_length(frames, bias) for frames in LENGTHS for bias in BIASES),
    ),
    scored_on=(RESTS_TEST,),
    last_scored_on=(RESTS_LONG,),
    families=(
        Family(
            f"Objects found that have been at rest for {LONG} or more",
            "found/rest/long",
            RESTS_TEST,
            LENGTH_PAIRS,
            0.05,
        ),
        Family(
            f"AP of objects at rest for {LONG} or more",
            "ap/rest/long",
            RESTS_TEST,
            LENGTH_PAIRS,
            0.02,
        ),
        Family("All objects", "ap", RESTS_TEST, LENGTH_PAIRS, 0.02),
    ),
    seeds=3,
    pilot=("frames_5_bias_0", "frames_80_bias_0"),
)

DEFAULT_SET, NIGHT_SET, DRIVING_SET = (f"domain-{name}-v1" for name in DOMAINS)
RANDOM_SET = "domain-random-v1"
STRONG = "augmentation=strong"
NONE = "augmentation=none"
GENERALISATION = Experiment(
    name="generalisation",
    title="Does it generalise?",
    method=(
        "Simulated domains: `default`; `night` (noise, high thresholds, long refractory times, hot "
        "pixels, faint objects); `driving` (ego motion, texture, clutter, faster objects). Domain "
        "randomisation: every recording draws noise, thresholds, refractory time, hot pixels, "
        "contrasts, clutter, texture, ego motion and speed of its own; as many recordings."
    ),
    overrides=(*MIXED, "training.batch_size=4"),
    steps=800,
    frames=20,
    variants=(
        Variant("default_none", "default", (NONE,), (DEFAULT_SET,)),
        Variant("default_strong", "default, strong augmentation", (STRONG,), (DEFAULT_SET,)),
        Variant("random_none", "randomised", (NONE,), (RANDOM_SET,)),
        Variant("random_strong", "randomised, strong augmentation", (STRONG,), (RANDOM_SET,)),
        Variant("night_none", "night", (NONE,), (NIGHT_SET,)),
        Variant("night_strong", "night, strong augmentation", (STRONG,), (NIGHT_SET,)),
    ),
    scored_on=(DEFAULT_SET, NIGHT_SET, DRIVING_SET),
    families=tuple(
        Family(
            f"On {name}",
            "ap",
            f"domain-{name}-v1",
            (
                ("default_strong", "default_none"),
                ("random_none", "default_none"),
                ("random_strong", "default_none"),
                ("night_strong", "night_none"),
            ),
            0.02,
            "domains",
        )
        for name in DOMAINS
    ),
    seeds=3,
    pilot=("default_none", "default_strong"),
)

RATE_SETS = tuple(f"rate-{ms}-v1" for ms in WINDOWS_MS)
RATE_TRAINING = tuple(f"rate-{ms}-train-v1" for ms in WINDOWS_MS[1:])
RATE = Experiment(
    name="rate",
    title="Does it run at other frame rates?",
    method=(
        "Trained on windows of 50 ms, run on windows of 50, 25 and 10 ms of the same recordings, "
        "scored at the same moments. Rate augmentation: a third of the training frames each has "
        "windows of 50, 25 and 10 ms."
    ),
    overrides=(*MIXED, "training.batch_size=4"),
    steps=800,
    frames=20,
    variants=(
        Variant("one_rate", "50 ms", (), (RATE_SETS[0],)),
        Variant("all_rates", "50, 25 and 10 ms", (), (RATE_SETS[0], *RATE_TRAINING)),
    ),
    scored_on=RATE_SETS,
    families=tuple(
        Family(f"At {ms} ms", "ap", f"rate-{ms}-v1", (("all_rates", "one_rate"),), 0.02, "windows")
        for ms in WINDOWS_MS
    ),
    seeds=3,
    pilot=("one_rate", "all_rates"),
)

EXPERIMENTS = {e.name: e for e in (ATTENTION, LENGTH, GENERALISATION, RATE)}  # by value

# `--quick`: small sets of the same kinds.
QUICK_COUNTS = {"train": 2, "val": 2}


def quick_set(recordings: Recordings) -> Recordings:
    """A few seconds of it, under another name."""
    splits = [part.partition("=")[0] for part in recordings.counts.split(",")]
    counts = ",".join(f"{split}={QUICK_COUNTS[split]}" for split in splits)
    return replace(recordings, name=f"{recordings.name}-quick", counts=counts, seconds=2)
