"""Every config of training, evaluation and launch, on one page that mirrors `conf/`.

Plain values only: what follows from them (strides, partition and state sizes, channel counts) is computed, never
configured. Not frozen, since OmegaConf makes frozen nodes read-only and Hydra overrides fail.
"""

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from evspan.conf.errors import require
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.schema.layout import ExchangeKind, check_layout, chosen_exchange
from evspan.conf.schema.prep import DatasetConfig


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Sampling(Enum):
    stream = "stream"  # lanes follow recordings, state carried
    random = "random"  # chunks anywhere, state from zero
    mixed = "mixed"  # the first half of the lanes stream, the rest are random (RVT)


class Schedule(Enum):
    onecycle = "onecycle"
    cosine = "cosine"


class SizeWeighting(Enum):
    exponential = "exponential"
    step = "step"
    linear = "linear"


@dataclass(kw_only=True)
class BackboneConfig:
    """RVT's recurrent MaxViT (Gehrig & Scaramuzza, CVPR 2023): four stages, strides 4, 8, 16, 32."""

    name: str = "MaxViTRNN"
    embed_dim: int = 32  # channels of stage 1
    dim_multiplier: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    num_blocks: list[int] = field(
        default_factory=lambda: [1, 1, 1, 1]
    )  # window + grid attention pairs per stage
    dim_head: int = 32
    partition_split_32: int = 2  # attention windows per side on the stride-32 map
    mlp_ratio: int = 4
    ls_init_value: float = 1e-5  # LayerScale
    dws_conv: bool = False  # 3x3 depthwise convolution on the hidden state before the gates
    forget_bias: float = 0.0  # added to the forget gates' at the start; 0: half of a memory is gone after a frame, 2: an eighth

    def __post_init__(self) -> None:
        self.dim_multiplier, self.num_blocks = list(self.dim_multiplier), list(self.num_blocks)
        require(
            len(self.dim_multiplier) == len(self.num_blocks) == 4,
            f"model.backbone has {len(self.dim_multiplier)} dim_multiplier and {len(self.num_blocks)} num_blocks; "
            "give 4 of each, one per stage",
        )
        require(
            self.embed_dim >= 1 and self.embed_dim % self.dim_head == 0,
            f"model.backbone.embed_dim {self.embed_dim} is no multiple of dim_head {self.dim_head}; change one of them",
        )
        require(
            self.partition_split_32 >= 1,
            f"model.backbone.partition_split_32 is {self.partition_split_32}; give 1 or more",
        )

    @property
    def dims(self) -> list[int]:
        return [self.embed_dim * m for m in self.dim_multiplier]


@dataclass(kw_only=True)
class FpnConfig:
    """PAFPN neck; with small-object attention where enabled."""

    name: str = "PAFPN"
    depth: float = 0.33
    in_stages: list[int] = field(default_factory=lambda: [2, 3, 4])
    enable_small_object_attention: bool = False
    attention_spatial: bool = True
    attention_temporal: bool = True
    temporal_window: int = 3  # frames t-2, t-1, t
    identity_init: bool = (
        True  # False: the published form, which scales features from the first step
    )
    mix_lanes: bool = False  # an ablation: every lane looks back at its neighbour's frames, as a buffer that lanes share does

    def __post_init__(self) -> None:
        self.in_stages = list(self.in_stages)
        require(
            self.in_stages in ([2, 3, 4], [1, 2, 3, 4]),
            f"model.fpn.in_stages is {self.in_stages}; choose [2,3,4] (3 scales) or [1,2,3,4] (4 scales)",
        )
        require(
            self.temporal_window >= 2,
            f"model.fpn.temporal_window is {self.temporal_window}; give 2 frames or more, or attention_temporal=false",
        )

    @property
    def looks_back(self) -> int:
        """How many earlier frames the neck needs."""
        return (
            self.temporal_window - 1
            if self.enable_small_object_attention and self.attention_temporal
            else 0
        )


@dataclass(kw_only=True)
class HeadConfig:
    """YOLOX decoupled head, SimOTA assignment and losses."""

    name: str = "YoloX"
    num_classes: int = 3
    center_radius: float = 1.5  # strides
    candidate_top_k: int = 10  # SimOTA: IoUs summed for dynamic k
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
            self.size_aware_weight >= 1,
            f"model.head.size_aware_weight is {self.size_aware_weight}; give 1 or more (1 weights all sizes alike)",
        )
        require(
            0 < self.small_threshold < self.medium_threshold,
            f"model.head: small_threshold {self.small_threshold} must lie between 0 and medium_threshold "
            f"{self.medium_threshold}",
        )


@dataclass(kw_only=True)
class PostprocessConfig:
    confidence_threshold: float = (
        0.1  # for pictures; reported numbers use evaluation.confidence_threshold
    )
    nms_threshold: float = 0.45

    def __post_init__(self) -> None:
        require(
            0 <= self.confidence_threshold < 1 and 0 < self.nms_threshold <= 1,
            f"model.postprocess: confidence_threshold {self.confidence_threshold} and nms_threshold "
            f"{self.nms_threshold} must lie in [0, 1)",
        )


@dataclass(kw_only=True)
class ModelConfig:
    name: str = "rnndet"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fpn: FpnConfig = field(default_factory=FpnConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)

    def __post_init__(self) -> None:
        require(
            self.name == "rnndet", f"model.name is {self.name!r}; the only detector is 'rnndet'"
        )


@dataclass(kw_only=True)
class AugmentationConfig:
    """Drawn once per lane and sequence, alike for all its frames."""

    hflip_prob: float = 0.5  # probability
    zoom_prob: float = 0.8  # probability of zooming at all; streamed lanes zoom out only
    zoom_in: float = 1.5  # largest factor
    zoom_out: float = 1.2
    zoom_in_fraction: float = 0.8  # of the zooms in random lanes

    def __post_init__(self) -> None:
        for name in ("hflip_prob", "zoom_prob", "zoom_in_fraction"):
            require(
                0 <= getattr(self, name) <= 1,
                f"training.augmentation.{name} is {getattr(self, name)}; give a probability from 0 to 1",
            )
        require(
            self.zoom_in >= 1 and self.zoom_out >= 1,
            f"training.augmentation: zoom_in {self.zoom_in} and zoom_out {self.zoom_out} are factors of 1 or more",
        )


@dataclass(kw_only=True)
class TrainingConfig:
    max_steps: int = 100_000
    batch_size: int = 8  # lanes of the whole world
    sequence_length: int = 5  # frames a chunk
    bptt_frames: int = 0  # of a chunk, that gradients flow back through at most; 0: all. What longer chunks are worth
    gradient_accumulation_steps: int = 1  # micro-batches a step
    sampling: Sampling = Sampling.mixed
    precision: Precision = Precision.fp32
    gradient_clipping: float = 1.0  # global L2 norm; 0: off
    frames_per_call: int = 0  # frames (of a rank's lanes) in one call of the backbone's spatial part; 0: all of a chunk
    activation_checkpointing: bool = (
        False  # backward makes the spatial part anew: less memory, a third more time
    )
    compile: bool = False  # torch.compile of the spatial part
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    num_workers: int = 2  # threads that read and decode frames ahead, per rank
    log_every: int = 50
    log_images_every: int = 1000  # steps between pictures and histograms, and at the last; 0: never
    profile: list[int] = field(
        default_factory=list
    )  # [first, last] steps to trace into run_dir/profile
    evaluate_every: int = 10_000  # steps; 0: never
    max_nonfinite: int = 10  # non-finite losses in a row before the run stops

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "sequence_length",
            "gradient_accumulation_steps",
            "log_every",
            "max_nonfinite",
        ):
            require(
                getattr(self, name) >= 1,
                f"training.{name} is {getattr(self, name)}; give 1 or more",
            )
        require(
            self.log_images_every >= 0,
            f"training.log_images_every is {self.log_images_every}; give 0 (never) or more",
        )
        self.profile = list(self.profile)
        require(
            not self.profile
            or (
                len(self.profile) == 2
                and 1 <= self.profile[0] <= self.profile[1] < self.profile[0] + 20
            ),
            f"training.profile is {self.profile}; give [first, last], steps from 1 on, at most 20: a trace is some MB a step",
        )
        require(
            self.bptt_frames >= 0,
            f"training.bptt_frames is {self.bptt_frames}; give 0 (all) or more",
        )
        require(
            self.frames_per_call >= 0,
            f"training.frames_per_call is {self.frames_per_call}; give 0 (all) or more",
        )
        require(
            self.num_workers >= 0,
            f"training.num_workers is {self.num_workers}; give 0 or more",
        )
        require(
            self.gradient_clipping >= 0,
            f"training.gradient_clipping is {self.gradient_clipping}; give 0 (off) or more",
        )


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3  # at the peak
    weight_decay: float = 5e-4
    schedule: Schedule = Schedule.onecycle
    warmup_fraction: float = 0.005  # of max_steps
    start_factor: float = 0.05  # lr before the warm-up, as a share of the peak
    end_factor: float = 1e-4  # lr at the last step
    gate_lr_multiplier: float = 1.0  # times lr: of the gates of small-object attention

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr is {self.lr}; give a learning rate above 0")
        require(
            self.gate_lr_multiplier > 0,
            f"optimizer.gate_lr_multiplier is {self.gate_lr_multiplier}; give a factor above 0",
        )
        require(
            self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; give 0 or more"
        )
        require(
            0 <= self.warmup_fraction < 1,
            f"optimizer.warmup_fraction is {self.warmup_fraction}; give a share from 0 to below 1",
        )


@dataclass(kw_only=True)
class DeepSpeedConfig:
    stage: int = 1  # ZeRO
    offload_optimizer: bool = False  # optimizer state in CPU memory; stages 1-3
    offload_parameters: bool = False  # stage 3

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


@dataclass(kw_only=True)
class ParallelConfig:
    """World = data x sequence. Without a launcher, `evspan train` starts `ranks` processes on this machine."""

    ranks: int = 1
    sequence: int = 1  # ranks that share one sequence, each with its part of the frames; evaluation has no use for it
    exchange: ExchangeKind = ExchangeKind.auto
    timeout_s: int = 600  # a collective that waits longer ends the run
    threads: int = 0  # CPU threads per rank; 0: the cores divided by the ranks

    def __post_init__(self) -> None:
        require(self.ranks >= 1, f"parallel.ranks is {self.ranks}; give 1 or more")
        require(self.timeout_s >= 1, f"parallel.timeout_s is {self.timeout_s}; give 1 s or more")
        require(self.threads >= 0, f"parallel.threads is {self.threads}; give 0 or more")


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 1000  # steps
    keep: int = 3  # newest ones; the best by AP stays too
    resume: bool = True  # continue from run_dir's newest complete checkpoint, if there is one
    init_from: str = ""  # weights (.safetensors) to start from, when nothing is resumed

    def __post_init__(self) -> None:
        require(
            self.every >= 1 and self.keep >= 1,
            f"checkpoint.every {self.every} and checkpoint.keep {self.keep} must be 1 or more",
        )


@dataclass(kw_only=True)
class EvaluationConfig:
    """COCO AP by Prophesee's protocol. Box filters in pixels of the stored frames; both sides are filtered alike."""

    split: str = "val"
    confidence_threshold: float = 0.001
    nms_threshold: float = 0.45
    skip_first_ms: int = 500
    min_side: float = 0.0  # Prophesee: 10 at half resolution
    min_diagonal: float = 0.0  # Prophesee: 30 at half resolution
    skip_empty_frames: bool = (
        True  # as Prophesee's protocol does: frames without a box (left) are not scored
    )
    confusion_threshold: float = 0.3  # score from which detections are in the confusion matrix
    still_speed: float = (
        5.0  # pixels of the stored frames per second: a slower object is at rest ...
    )
    still_s: float = 0.5  # ... and counts as still when it has been for so long
    time_bins_s: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 5.0, 10.0, 20.0, 60.0]
    )  # edges, since the start
    speed_bins: list[float] = field(
        default_factory=lambda: [5.0, 25.0, 50.0, 100.0]
    )  # pixels of the stored frames per second
    rest_bins_s: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0]
    )  # since the object came to rest
    sequence_length: int = 10  # frames a call
    batch_size: int = 4  # recordings at once, per rank
    write_detections: bool = (
        True  # <recording>_bbox.npy, in Prophesee's form, and frames.npz, which `compare` reads
    )

    def __post_init__(self) -> None:
        for name in ("time_bins_s", "speed_bins", "rest_bins_s"):
            edges = [float(edge) for edge in getattr(self, name)]
            setattr(self, name, edges)
            require(
                all(low < high for low, high in pairwise([0.0, *edges])),
                f"evaluation.{name} is {edges}; give edges above 0, the lowest first",
            )
        require(
            0 <= self.confusion_threshold < 1,
            f"evaluation.confusion_threshold is {self.confusion_threshold}; give 0 to below 1",
        )
        require(
            self.still_speed > 0 and self.still_s >= 0,
            f"evaluation.still_speed {self.still_speed} must be above 0, and still_s {self.still_s} not negative",
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

    run_dir: str = "runs/default"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(
        default_factory=ClusterConfig
    )  # of `evspan submit` and `evspan sweep`

    def __post_init__(self) -> None:
        require(
            len(self.dataset.classes) <= self.model.head.num_classes,
            f"dataset {self.dataset.name} has {len(self.dataset.classes)} classes but model.head.num_classes is "
            f"{self.model.head.num_classes}; set model.head.num_classes={len(self.dataset.classes)} or more",
        )
        require(
            not self.training.bptt_frames or self.parallel.sequence == 1,
            f"training.bptt_frames {self.training.bptt_frames} cuts sequences of one rank; set parallel.sequence=1",
        )
        check_layout(
            ranks=self.parallel.ranks,
            sequence=self.parallel.sequence,
            sequence_length=self.training.sequence_length,
            batch_size=self.training.batch_size,
        )
        chosen_exchange(self.parallel.exchange, dws_conv=self.model.backbone.dws_conv)


@dataclass(kw_only=True)
class EvaluateConfig:
    """`evspan evaluate`. The model comes with the checkpoint."""

    checkpoint: str = ""  # a .safetensors file, a checkpoint folder, or a run folder (its newest)
    output: str = ""  # metrics.json and detections; empty: beside the checkpoint
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
