"""Every config of training and evaluation; the classes mirror `conf/`.

They hold plain values. What follows from them (strides, partition and state sizes, channel counts)
is computed, never configured. They are not frozen: OmegaConf makes frozen nodes read-only, and
Hydra's overrides would fail.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from evspan.conf.errors import require
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.schema.layout import BatchNormRanks, ExchangeKind, check_layout, chosen_exchange
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.search import SearchConfig

MAX_PATCHES = 32  # rectangles that training.augmentation erases: a bit of a mask each


class Precision(Enum):
    """Number format of the forward and backward pass. Adam and its weights are in float32."""

    auto = "auto"  # that of the checkpoint; at the start, bf16 on GPUs that have it, else fp32
    fp32 = "fp32"
    tf32 = "tf32"  # float32; a GPU rounds the inputs of products and convolutions to TF32
    bf16 = "bf16"


class EngineKind(Enum):
    """What sums gradients over ranks and updates the weights."""

    deepspeed = "deepspeed"
    plain = "plain"  # torch alone; every rank has Adam's whole state


class Sampling(Enum):
    """How chunks are chosen."""

    stream = "stream"  # lanes follow recordings, state carried
    random = "random"  # chunks anywhere, state from zero
    mixed = "mixed"  # the first half of the lanes stream, the rest are random (RVT)


class Schedule(Enum):
    """Learning rate over the steps, after the warm-up."""

    onecycle = "onecycle"
    cosine = "cosine"


class SizeWeighting(Enum):
    """Weight of the IoU loss as a function of the box area; see `size_weights`."""

    exponential = "exponential"
    step = "step"
    linear = "linear"


class WeightsKind(Enum):
    """Which weights of a checkpoint are used."""

    ema = "ema"  # their moving average where the checkpoint has one, else the raw ones
    raw = "raw"  # those that the optimizer updates


@dataclass(kw_only=True)
class BackboneConfig:
    """RVT's recurrent MaxViT (Gehrig & Scaramuzza, CVPR 2023): stages at strides 4, 8, 16, 32."""

    embed_dim: int = 32  # channels of stage 1
    dim_multiplier: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    # Pairs of window and grid attention per stage.
    num_blocks: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    dim_head: int = 32
    partition_split_32: int = 2  # attention windows per side on the stride-32 map
    mlp_ratio: int = 4
    ls_init_value: float = 1e-5  # LayerScale
    dws_conv: bool = False  # 3x3 depthwise convolution on the hidden state before the gates
    # Added to the forget gate's bias at initialization. An untrained LSTM keeps half of its cell
    # state per frame with 0, seven eighths with 2.
    forget_bias: float = 0.0

    def __post_init__(self) -> None:
        self.dim_multiplier = list(self.dim_multiplier)
        self.num_blocks = list(self.num_blocks)
        require(
            len(self.dim_multiplier) == len(self.num_blocks) == 4,
            f"model.backbone has {len(self.dim_multiplier)} dim_multiplier and "
            f"{len(self.num_blocks)} num_blocks; give 4 of each, one per stage",
        )
        require(
            self.embed_dim >= 1 and self.embed_dim % self.dim_head == 0,
            f"model.backbone.embed_dim {self.embed_dim} is not a multiple of dim_head "
            f"{self.dim_head}; change one of them",
        )
        require(
            self.partition_split_32 >= 1,
            f"model.backbone.partition_split_32 is {self.partition_split_32}; give 1 or more",
        )

    @property
    def dims(self) -> list[int]:
        """Channels of each stage."""
        return [self.embed_dim * m for m in self.dim_multiplier]


@dataclass(kw_only=True)
class FpnConfig:
    """PAFPN neck, optionally with small-object attention."""

    depth: float = 0.33
    in_stages: list[int] = field(default_factory=lambda: [2, 3, 4])
    enable_small_object_attention: bool = False
    attention_spatial: bool = True
    attention_temporal: bool = True
    temporal_window: int = 3  # frames t-2, t-1, t
    # False: the published form, which scales features from the first step.
    identity_init: bool = True

    def __post_init__(self) -> None:
        self.in_stages = list(self.in_stages)
        require(
            self.in_stages in ([2, 3, 4], [1, 2, 3, 4]),
            f"model.fpn.in_stages is {self.in_stages}; choose [2,3,4] (3 scales) or [1,2,3,4] "
            "(4 scales)",
        )
        require(
            self.temporal_window >= 2,
            f"model.fpn.temporal_window is {self.temporal_window}; give 2 frames or more, or "
            "attention_temporal=false",
        )

    @property
    def looks_back(self) -> int:
        """Number of earlier frames that temporal attention reads."""
        if self.enable_small_object_attention and self.attention_temporal:
            return self.temporal_window - 1
        return 0


@dataclass(kw_only=True)
class HeadConfig:
    """YOLOX decoupled head, SimOTA assignment and losses."""

    num_classes: int = 3
    center_radius: float = 1.5  # strides
    candidate_top_k: int = 10  # SimOTA: number of IoUs summed for dynamic k
    size_aware_loss: bool = False
    size_aware_weight: float = 2.0
    size_aware_mode: SizeWeighting = SizeWeighting.exponential
    small_threshold: float = 32.0**2  # box area, pixels of the model's input
    medium_threshold: float = 96.0**2

    def __post_init__(self) -> None:
        require(
            self.num_classes >= 1, f"model.head.num_classes is {self.num_classes}; give 1 or more"
        )
        require(
            0 < self.center_radius < math.inf,
            f"model.head.center_radius is {self.center_radius}; give a number of strides above 0",
        )
        require(
            self.candidate_top_k >= 1,
            f"model.head.candidate_top_k is {self.candidate_top_k}; give 1 or more",
        )
        require(
            self.size_aware_weight >= 1,
            f"model.head.size_aware_weight is {self.size_aware_weight}; give 1 or more (1 weights "
            "all sizes alike)",
        )
        require(
            0 < self.small_threshold < self.medium_threshold,
            f"model.head: small_threshold {self.small_threshold} must lie between 0 and "
            f"medium_threshold {self.medium_threshold}",
        )


@dataclass(kw_only=True)
class PostprocessConfig:
    """Thresholds of detections for images and inference; `evaluation` has its own."""

    confidence_threshold: float = 0.1
    nms_threshold: float = 0.45

    def __post_init__(self) -> None:
        require(
            0 <= self.confidence_threshold < 1 and 0 < self.nms_threshold <= 1,
            f"model.postprocess: confidence_threshold {self.confidence_threshold} and "
            f"nms_threshold {self.nms_threshold} must lie in [0, 1)",
        )


@dataclass(kw_only=True)
class ModelConfig:
    """The detector."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fpn: FpnConfig = field(default_factory=FpnConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)


@dataclass(kw_only=True)
class AugmentationConfig:
    """Drawn once per lane and sequence, the same for all its frames (noise differs per frame).

    Probabilities are per sequence; amounts are drawn uniformly. The defaults are the preset
    `standard`. Streamed lanes only zoom out, and nothing of their frames is erased.
    """

    hflip_prob: float = 0.5
    zoom_prob: float = 0.8  # zoom in or out; streamed lanes zoom out only
    zoom_in: float = 1.5  # largest factor
    zoom_out: float = 1.2
    zoom_in_fraction: float = 0.8  # of the zooms in random lanes
    rotate_prob: float = 0.0
    rotate_degrees: float = 30.0  # at most, either way, about the centre of the frame
    shear_prob: float = 0.0
    shear_degrees: float = 30.0  # at most, either way: columns lean by this angle
    translate_prob: float = 0.0
    translate_fraction: float = 0.1  # at most, of height and width
    # Boxes of which a smaller fraction of the area stays in the frame are dropped. 0: those of
    # which less than a pixel per side stays. Ignore regions are kept to the last pixel.
    min_visible: float = 0.0
    polarity_flip_prob: float = 0.0  # swaps ON and OFF events
    drop_prob: float = 0.0
    drop_fraction: float = 0.3  # of the events, at most
    noise_prob: float = 0.0
    noise_hz: float = 0.5  # added events per pixel of the frame and second, at most
    hot_prob: float = 0.0
    hot_pixels: int = 20  # at most; each has an event in every time bin of one polarity
    erase_prob: float = 0.0  # random lanes only
    erase_patches: int = 3  # rectangles, at most
    erase_area: float = 0.1  # of the frame, at most, per rectangle; boxes under it stay

    def __post_init__(self) -> None:
        for name in (
            "hflip_prob",
            "zoom_prob",
            "zoom_in_fraction",
            "rotate_prob",
            "shear_prob",
            "translate_prob",
            "polarity_flip_prob",
            "drop_prob",
            "noise_prob",
            "hot_prob",
            "erase_prob",
        ):
            value = getattr(self, name)
            require(
                0 <= value <= 1,
                f"training.augmentation.{name} is {value}; give a probability from 0 to 1",
            )
        require(
            self.zoom_in >= 1 and self.zoom_out >= 1,
            f"training.augmentation: zoom_in {self.zoom_in} and zoom_out {self.zoom_out} are "
            "factors of 1 or more",
        )
        for name, most in (
            ("rotate_degrees", 180),
            ("shear_degrees", 60),
            ("translate_fraction", 1),
            ("min_visible", 1),
            ("drop_fraction", 1),
            ("noise_hz", 10),
            ("hot_pixels", 10_000),
            ("erase_area", 1),
        ):
            value = getattr(self, name)
            require(
                0 <= value <= most,
                f"training.augmentation.{name} is {value}; give a value from 0 to {most}",
            )
        require(
            1 <= self.erase_patches <= MAX_PATCHES,
            f"training.augmentation.erase_patches is {self.erase_patches}; give 1 to {MAX_PATCHES} "
            "rectangles, or erase_prob=0",
        )


@dataclass(kw_only=True)
class TrainingConfig:
    """Steps, batches, and what happens between the steps."""

    max_steps: int = 100_000
    # An epoch is as many frames as the training split has. The smaller of max_steps and max_epochs
    # counts, also for the schedule of the learning rate; 0: max_steps alone.
    max_epochs: float = 0.0
    max_hours: float = 0.0  # over all attempts of the run, then it is done; 0: no limit
    patience: int = 0  # evaluations in a row without a better AP, then it is done; 0: no limit
    # Lanes, over all ranks. 0, or `auto` in the command: as many as fit, found by a short probe.
    batch_size: int = 8
    sequence_length: int = 5  # frames per chunk
    # Gradients flow back through at most this number of frames of a chunk (BPTT length); 0: all.
    bptt_frames: int = 0
    gradient_accumulation_steps: int = 1  # micro-batches per step
    sampling: Sampling = Sampling.mixed
    # Streaming lanes begin anywhere in a recording. Else all begin with a recording's first frame,
    # and where recordings are equally long, a batch has frames of one time since the start only.
    stagger_lanes: bool = True
    # Recordings and chunks with classes that are in a smaller fraction of the labelled frames are
    # read more often, by sqrt(threshold / fraction) of their rarest class (LVIS); 0: off.
    repeat_factor_threshold: float = 0.0
    precision: Precision = Precision.auto
    engine: EngineKind = EngineKind.deepspeed
    gradient_clipping: float = 1.0  # global L2 norm; 0: off
    # Patterns of parameter names that are not trained: ["backbone.stages.0.*"].
    freeze: list[str] = field(default_factory=list)
    # Frames (over the rank's lanes) per call of the backbone's spatial part; 0: the whole chunk.
    frames_per_call: int = 0
    # Backward recomputes the spatial part: less memory, a third more time.
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the spatial part
    # The spatial part runs as CUDA graphs: one launch per stage and call, at equal results. Their
    # memory holds a chunk's activations between the steps, too. Without effect on a CPU.
    cuda_graphs: bool = False
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    # Threads per rank that read frames ahead; 0: none; -1: on a GPU as many as parallel.threads but
    # one, at most 8, on a CPU 2.
    num_workers: int = -1
    log_every: int = 50  # steps
    # Dense TFLOP/s of a rank's device in training.precision, the denominator of MFU; 0: the data
    # sheet of a known GPU, a matrix product that is measured at the start on a CPU.
    peak_tflops: float = 0.0
    log_images_every: int = 1000  # steps between images and histograms, and at the last; 0: never
    # [first, last] steps to trace into run_dir/profile.
    profile: list[int] = field(default_factory=list)
    evaluate_every: int = 10_000  # steps; 0: only at the end (evaluation.at_end)
    # Of the moving average of the weights (EMA), which is evaluated and used; 0: none. Of n updates
    # it is min(ema_decay, (1 + n) / (10 + n)).
    ema_decay: float = 0.9999
    # A loss that is this many standard deviations above the mean of the last spike_window steps is
    # recorded in the history, with the recordings of its batch; 0: never.
    spike_sigmas: float = 6.0
    spike_window: int = 128  # steps
    # A rank is reported whose steps, without waiting for others, take more than this times the
    # median of all ranks, throughout slow_rank_steps steps; 0: ranks are not measured.
    slow_rank_factor: float = 1.2
    slow_rank_steps: int = 100
    max_nonfinite: int = 10  # consecutive non-finite losses before the run stops

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "sequence_length",
            "gradient_accumulation_steps",
            "log_every",
            "max_nonfinite",
        ):
            value = getattr(self, name)
            require(value >= 1, f"training.{name} is {value}; give 1 or more")
        for name, zero in (
            ("batch_size", " (auto)"),
            ("log_images_every", " (never)"),
            ("max_epochs", " (no limit)"),
            ("max_hours", " (no limit)"),
            ("patience", " (no limit)"),
            ("bptt_frames", " (all)"),
            ("frames_per_call", " (all)"),
            ("gradient_clipping", " (off)"),
        ):
            value = getattr(self, name)
            require(value >= 0, f"training.{name} is {value}; give 0{zero} or more")
        require(
            math.isfinite(self.spike_sigmas) and self.spike_sigmas >= 0,
            f"training.spike_sigmas is {self.spike_sigmas}; give standard deviations above 0, or 0 "
            "(off)",
        )
        require(
            self.slow_rank_factor == 0 or 1 < self.slow_rank_factor < math.inf,
            f"training.slow_rank_factor is {self.slow_rank_factor}; give a factor above 1, or 0 "
            "(off)",
        )
        require(
            self.slow_rank_steps >= 1,
            f"training.slow_rank_steps is {self.slow_rank_steps}; give 1 step or more",
        )
        require(
            self.spike_window >= 2,
            f"training.spike_window is {self.spike_window}; give 2 steps or more",
        )
        require(
            math.isfinite(self.peak_tflops) and self.peak_tflops >= 0,
            f"training.peak_tflops is {self.peak_tflops}; give the dense TFLOP/s of the device, or "
            "0 for the known value",
        )
        require(
            0 <= self.ema_decay < 1,
            f"training.ema_decay is {self.ema_decay}; give a decay from 0 (off) to below 1",
        )
        require(
            self.num_workers >= -1,
            f"training.num_workers is {self.num_workers}; give a number of threads, or -1: it "
            "follows the cores",
        )
        require(
            not (self.cuda_graphs and self.activation_checkpointing),
            "training.cuda_graphs keeps the activations that training.activation_checkpointing "
            "would drop; set one of them to false",
        )
        require(
            not self.cuda_graphs or self.gradient_accumulation_steps == 1,
            "training.cuda_graphs writes each micro-batch's gradients to the same memory: with "
            f"training.gradient_accumulation_steps={self.gradient_accumulation_steps} the sum "
            "would be lost; set training.cuda_graphs=false",
        )
        require(
            0 <= self.repeat_factor_threshold <= 1,
            f"training.repeat_factor_threshold is {self.repeat_factor_threshold}; give a fraction "
            "of the labelled frames, such as 0.1, or 0 (off)",
        )
        self.freeze = list(self.freeze)
        require(
            all(self.freeze),
            "training.freeze has an empty pattern; give names: training.freeze=[backbone.*]",
        )
        self.profile = list(self.profile)
        require(
            not self.profile or _is_short_span(self.profile),
            f"training.profile is {self.profile}; give [first, last], steps from 1 on, at most 20: "
            "a trace takes some MB per step",
        )


def _is_short_span(steps: list[int]) -> bool:
    """Whether `steps` is [first, last] with 1 <= first <= last and at most 20 steps."""
    return len(steps) == 2 and 1 <= steps[0] <= steps[1] < steps[0] + 20


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3  # peak
    weight_decay: float = 5e-4
    schedule: Schedule = Schedule.onecycle
    warmup_fraction: float = 0.005  # of max_steps
    start_factor: float = 0.05  # lr at step 0, as a fraction of the peak
    end_factor: float = 1e-4  # lr at the last step, as a fraction of the peak
    gate_lr_multiplier: float = 1.0  # times lr: of the gates of small-object attention
    # Pattern of parameter names -> times lr: {"backbone.*": 0.1}. Of several patterns that match,
    # the last one counts; gates are multiplied by gate_lr_multiplier, too.
    lr_multipliers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr is {self.lr}; give a learning rate above 0")
        require(
            self.gate_lr_multiplier > 0,
            f"optimizer.gate_lr_multiplier is {self.gate_lr_multiplier}; give a factor above 0",
        )
        self.lr_multipliers = dict(self.lr_multipliers)
        for pattern, factor in self.lr_multipliers.items():
            require(
                0 < factor < math.inf,
                f"optimizer.lr_multipliers has {factor} for {pattern}; give a factor above 0. "
                f"training.freeze=[{pattern}] trains it not at all",
            )
        for name in ("weight_decay", "start_factor", "end_factor"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name} is {value}; give 0 or more")
        require(
            0 <= self.warmup_fraction < 1,
            f"optimizer.warmup_fraction is {self.warmup_fraction}; give a fraction from 0 to below "
            "1",
        )


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """How DeepSpeed shards parameters, gradients and optimizer state over the ranks."""

    stage: int = 1  # ZeRO
    offload_optimizer: bool = False  # optimizer state in CPU memory; stages 1-3
    offload_parameters: bool = False  # parameters in CPU memory; stage 3

    def __post_init__(self) -> None:
        require(
            self.stage in (0, 1, 2, 3), f"deepspeed.stage is {self.stage}; ZeRO has stages 0 to 3"
        )
        require(
            self.stage >= 1 or not self.offload_optimizer,
            "deepspeed.offload_optimizer needs stage 1, 2 or 3",
        )
        require(
            self.stage == 3 or not self.offload_parameters,
            "deepspeed.offload_parameters needs stage 3",
        )


class DeviceKind(Enum):
    """What the ranks compute on."""

    auto = "auto"  # a GPU each where the machine has any, else the CPU
    gpu = "gpu"  # a machine without GPUs is refused
    cpu = "cpu"  # GPUs are left alone


@dataclass(kw_only=True)
class ParallelConfig:
    """World size = data x sequence ranks. Without torchrun or srun, the command starts them."""

    ranks: int = 1
    sequence: int = 1  # ranks per sequence, each with some of its frames; evaluation ignores it
    exchange: ExchangeKind = ExchangeKind.auto
    batch_norm: BatchNormRanks = BatchNormRanks.world  # whose samples it normalises together
    device: DeviceKind = DeviceKind.auto
    timeout_s: int = 600  # a collective that waits longer ends the run
    threads: int = 0  # CPU threads per rank; 0: its task's cores, or the cores by the ranks

    def __post_init__(self) -> None:
        require(self.ranks >= 1, f"parallel.ranks is {self.ranks}; give 1 or more")
        require(self.timeout_s >= 1, f"parallel.timeout_s is {self.timeout_s}; give 1 s or more")
        require(self.threads >= 0, f"parallel.threads is {self.threads}; give 0 or more")


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, which ones are kept, and what training starts from."""

    every: int = 1000  # steps
    keep: int = 3  # newest ones; the best by AP is kept too
    # Copy the tensors to memory, and write them in a thread while training goes on. On rank 0 the
    # copies take 12 bytes per parameter, 16 with the moving average, page-locked with a GPU.
    asynchronous: bool = True
    resume: bool = True  # continue from run_dir's newest complete checkpoint, if there is one
    # Weights to start from when nothing is resumed: a run, a checkpoint, a weights file or a .ckpt
    # of RVT. Classes, attention and scales may differ from this model's.
    init_from: str = ""

    def __post_init__(self) -> None:
        require(
            self.every >= 1 and self.keep >= 1,
            f"checkpoint.every {self.every} and checkpoint.keep {self.keep} must be 1 or more",
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    """COCO AP, of Prophesee's datasets by Prophesee's protocol.

    Box filters are in pixels of the stored frames; boxes and detections pass the same filters.
    """

    split: str = "val"
    confidence_threshold: float = 0.001
    nms_threshold: float = 0.45
    skip_first_ms: int = 500
    # Smaller boxes and detections are not scored. null: the dataset's, for gen4 10 and 30 at half
    # resolution, as in Prophesee's protocol; otherwise the sizes that prep has left out.
    min_side: float | None = None
    min_diagonal: float | None = None
    # As in Prophesee's protocol: frames without a box after the filters are not scored.
    skip_empty_frames: bool = True
    confusion_threshold: float = 0.3  # lowest score of detections in the confusion matrix
    # An object slower than still_speed (pixels of the stored frames per second) is at rest. After
    # still_s seconds at rest it counts as still.
    still_speed: float = 5.0
    still_s: float = 0.5
    # Edges of the bins: seconds since the recording's first event, pixels of the stored frames per
    # second, and seconds since the object came to rest.
    time_bins_s: list[float] = field(default_factory=lambda: [1.0, 2.0, 5.0, 10.0, 20.0, 60.0])
    speed_bins: list[float] = field(default_factory=lambda: [5.0, 25.0, 50.0, 100.0])
    rest_bins_s: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    # Recordings that are evaluated, evenly over the split; 0: all.
    limit_recordings: int = 0
    at_end: bool = True  # training evaluates its last step, whatever training.evaluate_every is
    sequence_length: int = 10  # frames per call
    batch_size: int = 4  # recordings at a time, per rank
    # Number format of the detector; auto: on a GPU that of training, on a CPU fp32.
    precision: Precision = Precision.auto
    # <recording>_bbox.npy in Prophesee's format, and frames.npz, which `evaluate compare` reads.
    write_detections: bool = True

    def __post_init__(self) -> None:
        for name in ("time_bins_s", "speed_bins", "rest_bins_s"):
            edges = [float(edge) for edge in getattr(self, name)]
            setattr(self, name, edges)
            require(
                all(low < high for low, high in pairwise([0.0, *edges])),
                f"evaluation.{name} is {edges}; give edges above 0 in ascending order",
            )
        for name in ("min_side", "min_diagonal"):
            size = getattr(self, name)
            require(
                size is None or size >= 0,
                f"evaluation.{name} is {size}; give pixels of the stored frames, 0 for boxes of "
                "any size, or null for the dataset's",
            )
        require(
            self.limit_recordings >= 0,
            f"evaluation.limit_recordings is {self.limit_recordings}; give a number of recordings, "
            "or 0: all",
        )
        require(
            0 <= self.confusion_threshold < 1,
            f"evaluation.confusion_threshold is {self.confusion_threshold}; give 0 to below 1",
        )
        require(
            self.still_speed > 0 and self.still_s >= 0,
            f"evaluation.still_speed {self.still_speed} must be above 0, and still_s "
            f"{self.still_s} not negative",
        )
        require(
            0 <= self.confidence_threshold < 1,
            f"evaluation.confidence_threshold is {self.confidence_threshold}; give 0 to below 1",
        )
        require(
            0 < self.nms_threshold <= 1,
            f"evaluation.nms_threshold is {self.nms_threshold}; give above 0 to 1",
        )
        require(
            self.sequence_length >= 1 and self.batch_size >= 1,
            "evaluation.sequence_length and evaluation.batch_size must be 1 or more",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """`evspan train`."""

    run_dir: str = ""  # empty: `evspan train` makes a new one, runs/0001, ...
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # Of `evspan submit` and `evspan sweep`.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    search: SearchConfig = field(default_factory=SearchConfig)  # of `evspan sweep`

    def __post_init__(self) -> None:
        classes = len(self.dataset.classes)
        require(
            classes <= self.model.head.num_classes,
            f"dataset {self.dataset.name} has {classes} classes but model.head.num_classes is "
            f"{self.model.head.num_classes}; set model.head.num_classes={classes} or more",
        )
        require(
            not self.training.bptt_frames or self.parallel.sequence == 1,
            f"training.bptt_frames {self.training.bptt_frames} works on one rank per sequence; set "
            "parallel.sequence=1",
        )
        require(
            not self.training.cuda_graphs or self.deepspeed.stage < 3,
            "training.cuda_graphs needs parameters that stay in place, which deepspeed.stage=3 "
            "partitions; set deepspeed.stage=2 or training.cuda_graphs=false",
        )
        check_layout(
            ranks=self.parallel.ranks,
            sequence=self.parallel.sequence,
            sequence_length=self.training.sequence_length,
            batch_size=self.training.batch_size,
        )
        chosen_exchange(self.parallel.exchange, dws_conv=self.model.backbone.dws_conv)
        offloads = self.deepspeed.offload_optimizer or self.deepspeed.offload_parameters
        require(
            self.training.engine is EngineKind.deepspeed
            or (self.deepspeed.stage <= 1 and not offloads),
            "training.engine=plain partitions and offloads nothing; set deepspeed.stage=0, or "
            "training.engine=deepspeed",
        )


@dataclass(kw_only=True)
class EvaluateConfig:
    """`evspan evaluate`. The model comes with the checkpoint."""

    # A run folder (its newest checkpoint), a checkpoint folder, a .safetensors file or RVT's .ckpt.
    checkpoint: str = ""
    weights: WeightsKind = WeightsKind.ema  # of a checkpoint
    output: str = ""  # metrics.json and detections; empty: next to the checkpoint
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
