"""The two sides of `detector_speed.py` on the same weights and inputs, what is counted in a step, and rounds of timing."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from evspan.conf.schema.training import BackboneConfig, FpnConfig, ModelConfig
from evspan.pipeline.model.backbone import Execution
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.layers import CAST_AT_ONCE
from evspan.pipeline.model.loss import detection_loss
from frame_by_frame import FrameByFrame
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HEIGHT, WIDTH, CHANNELS, CLASSES = 360, 640, 20, 3  # padded to 384 x 640
SIZES = {
    "tiny": (32, 32, 0.33),
    "small": (48, 24, 0.33),
    "base": (64, 32, 0.67),
}  # embed_dim, dim_head, depth of the neck


# -- inputs ----------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    frames: Tensor  # (T, B, 20, 360, 640) uint8, 3 % of it not zero
    starts: Tensor  # (B,) bool
    labelled: Tensor  # (T, B) bool
    lanes: list[list[int]]  # the same, per frame
    boxes: Tensor  # (n, 10, 5), 3 to 10 in a labelled frame
    counts: Tensor  # (n,)


def batch(
    steps: int,
    device: torch.device,
    *,
    lanes: int = 1,
    first: int = 0,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> Batch:
    """Labels on frames first, first + 2, ..."""
    g, (height, width) = torch.Generator().manual_seed(steps), size
    frames = torch.zeros(steps, lanes, CHANNELS, height, width, dtype=torch.uint8)
    for frame in frames:  # a frame at a time: the whole as float32 would be what takes most memory
        frame.copy_((torch.rand(frame.shape, generator=g) * 100 - 96).clamp(min=0).ceil())
    labelled = torch.zeros(steps, lanes, dtype=torch.bool)
    labelled[first::2] = True
    n = int(labelled.sum())
    counts = torch.randint(3, 11, (n,), generator=g)
    place = torch.rand(n, 10, 4, generator=g)
    boxes = torch.cat(
        (
            torch.randint(0, CLASSES, (n, 10, 1), generator=g),
            place[..., :2] * torch.tensor([width, height]),
            10 + place[..., 2:] * 90,
        ),
        -1,
    )
    boxes *= (torch.arange(10) < counts[:, None])[..., None]
    where = [[lane for lane in range(lanes) if row[lane]] for row in labelled.tolist()]
    return Batch(
        frames.to(device),
        torch.ones(lanes, dtype=torch.bool, device=device),
        labelled.to(device),
        where,
        boxes.to(device),
        counts.to(device),
    )


# -- sides -----------------------------------------------------------------------------------------------------------
def model_config(size: str, *, attention: bool = False) -> ModelConfig:
    embed_dim, dim_head, depth = SIZES[size]
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=embed_dim, dim_head=dim_head),
        fpn=FpnConfig(depth=depth, enable_small_object_attention=attention),
    )


def weights(size: str) -> dict[str, Tensor]:
    """Drawn once; LayerScale at 0.1 instead of 1e-5, so that a difference anywhere reaches the loss."""
    torch.manual_seed(0)
    state = Detector(model_config(size), CHANNELS).state_dict()
    return {k: torch.full_like(v, 0.1) if k.endswith("gamma") else v for k, v in state.items()}


class Ours:
    def __init__(
        self,
        size: str,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        checkpointed: bool = False,
        attention: bool = False,
    ) -> None:
        execution = Execution(
            frames_per_call=1 if checkpointed else 0,
            activation_checkpointing=checkpointed,
            compile=compiled,
        )
        self.model = Detector(
            model_config(size, attention=attention), CHANNELS, execution=execution
        )
        self.model.load_state_dict(weights(size), strict=not attention)
        self.model.to(device, dtype)
        self.device, self.dtype = device, dtype
        self.detection_loss: Callable = detection_loss

    def loss(self, b: Batch) -> Tensor:
        height, width = b.frames.shape[-2:]
        state = self.model.initial_state(
            b.frames.shape[1], height, width, device=self.device, dtype=self.dtype
        )
        raw, _ = self.model(b.frames, state, starts=b.starts, labelled=b.labelled)
        geometry = self.model.geometry(height, width)
        return self.detection_loss(raw, b.boxes, b.counts, geometry, self.model.config.head).total

    def stream(self, frame: Tensor) -> Callable[[], None]:
        """One frame after the other, the state carried."""
        state = self.model.eval().initial_state(
            len(frame), *frame.shape[-2:], device=self.device, dtype=self.dtype
        )

        def step() -> None:
            nonlocal state
            with torch.inference_mode():
                _, state = self.model.step(frame, state)

        return step


class Theirs:
    def __init__(self, size: str, device: torch.device) -> None:
        self.model = FrameByFrame(model_config(size), CHANNELS)
        self.model.load_state_dict(weights(size))
        self.model.to(device)

    def loss(self, b: Batch) -> Tensor:
        return self.model.losses(b.frames, None, b.lanes, b.boxes)[0]["loss"]

    def stream(self, frame: Tensor) -> Callable[[], None]:
        state = None
        self.model.eval()

        def step() -> None:
            nonlocal state
            with torch.inference_mode():
                _, state = self.model.step(frame, state)

        return step


def train(side: Ours | Theirs, b: Batch) -> Tensor:
    """Forward, loss and backward. The loss, still where it was computed."""
    side.model.zero_grad(set_to_none=True)
    loss = side.loss(b)
    loss.backward()
    return loss.detach()


# -- counting --------------------------------------------------------------------------------------------------------
class Dispatched(TorchDispatchMode):
    """Counts operators that do work (views, also those that only say so in their name, launch nothing), and those among them that
    make the host wait for a GPU: a value read, a mask turned into indices."""

    WAITS = {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::_unique2",
    }
    VIEWS = {"aten::_unsafe_view", "aten::detach", "aten::lift_fresh", "aten::alias"}

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        view = any(
            out.alias_info is not None and not out.alias_info.is_write
            for out in function._schema.returns
        )
        if not view and name not in self.VIEWS:
            self.operators[name] += 1
        masked = name in (
            "aten::index",
            "aten::index_put",
            "aten::index_put_",
            "aten::_index_put_impl_",
        ) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or name in self.WAITS:
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


class PathOfGpu(TorchFunctionMode):
    """Tensors say that they are not on a CPU, and frames are cast as many at a time as on a GPU, so that the code takes the path
    that it takes there. The kernels are still a CPU's (oneDNN's LSTM for cuDNN's: an operator each)."""

    def __enter__(self) -> "PathOfGpu":
        self.at_once = CAST_AT_ONCE["cpu"]
        CAST_AT_ONCE["cpu"] = CAST_AT_ONCE["cuda"]
        return super().__enter__()

    def __exit__(self, *error) -> None:
        CAST_AT_ONCE["cpu"] = self.at_once
        super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (
            False if function == torch.Tensor.is_cpu.__get__ else function(*args, **(kwargs or {}))  # type: ignore[attr-defined]
        )


def count(side: Ours | Theirs, b: Batch, *, path_of_gpu: bool = False) -> Dispatched:
    with PathOfGpu() if path_of_gpu else nullcontext(), Dispatched() as counted:
        train(side, b)
    return counted


# -- timing ----------------------------------------------------------------------------------------------------------
class Clock:
    """Wall time; or the processor's, where other processes take turns on it: true for 1 thread."""

    now = staticmethod(time.perf_counter)


def rounds(
    repeats: int, device: torch.device, *, warm: int = 2, **contenders: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each in every round, after some to warm up; in turn, forwards and backwards, so that a slow moment meets all."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(-warm, repeats):
        for name in contenders if i % 2 else reversed(contenders):
            wait = (
                partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
            )
            wait()
            began = Clock.now()
            contenders[name]()
            wait()
            if i >= 0:
                took[name].append(Clock.now() - began)
    return took


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of what each round gave."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


class Rates:
    """Called, measures float32 operations a second of a matrix product that caches hold."""

    def __init__(self, device: torch.device) -> None:
        n = 8192 if device.type == "cuda" else 1024
        self.device, self.measured = device, list[float]()
        self.a, self.b, self.out = (torch.randn(n, n, device=device) for _ in range(3))

    def __call__(self) -> None:
        took = rounds(5, self.device, product=partial(torch.mm, self.a, self.b, out=self.out))[
            "product"
        ]
        self.measured.append(2 * len(self.a) ** 3 / min(took))
