"""The two sides of `detector_speed.py`, operator counts, and timing.

Both sides have the same weights and inputs.
"""

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

HEIGHT = 360  # padded to 384
WIDTH = 640
CHANNELS = 20
CLASSES = 3
SIZES = {  # embed_dim, dim_head, depth of the neck
    "tiny": (32, 32, 0.33),
    "small": (48, 24, 0.33),
    "base": (64, 32, 0.67),
}


# -- inputs ----------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Inputs of a training step, for either side."""

    frames: Tensor  # (T, B, 20, 360, 640) uint8, 3 % of it not zero
    starts: Tensor  # (B,) bool
    labelled: Tensor  # (T, B) bool
    lanes: list[list[int]]  # per frame, the lanes that are labelled
    boxes: Tensor  # (n, 10, 5), 3 to 10 in a labelled frame
    counts: Tensor  # (n,)


def make_batch(
    steps: int,
    device: torch.device,
    *,
    lanes: int = 1,
    first: int = 0,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> Batch:
    """Draws a batch. Frames first, first + 2, ... are labelled."""
    g = torch.Generator().manual_seed(steps)
    height, width = size
    frames = torch.zeros(steps, lanes, CHANNELS, height, width, dtype=torch.uint8)
    for frame in frames:  # one at a time: all of them as float32 would set the peak of memory
        frame.copy_((torch.rand(frame.shape, generator=g) * 100 - 96).clamp(min=0).ceil())
    labelled = torch.zeros(steps, lanes, dtype=torch.bool)
    labelled[first::2] = True
    n = int(labelled.sum())
    counts = torch.randint(3, 11, (n,), generator=g)
    position = torch.rand(n, 10, 4, generator=g)
    class_id = torch.randint(0, CLASSES, (n, 10, 1), generator=g)
    centre = position[..., :2] * torch.tensor([width, height])
    boxes = torch.cat((class_id, centre, 10 + position[..., 2:] * 90), -1)
    boxes *= (torch.arange(10) < counts[:, None])[..., None]
    return Batch(
        frames.to(device),
        torch.ones(lanes, dtype=torch.bool, device=device),
        labelled.to(device),
        [row.nonzero().flatten().tolist() for row in labelled],
        boxes.to(device),
        counts.to(device),
    )


# -- sides -----------------------------------------------------------------------------------------
def model_config(size: str, *, attention: bool = False) -> ModelConfig:
    """The config of a size with 3 scales."""
    embed_dim, dim_head, depth = SIZES[size]
    return ModelConfig(
        backbone=BackboneConfig(embed_dim=embed_dim, dim_head=dim_head),
        fpn=FpnConfig(depth=depth, enable_small_object_attention=attention),
    )


def weights(size: str) -> dict[str, Tensor]:
    """Random weights. LayerScale is 0.1, not 1e-5: every difference changes the loss."""
    torch.manual_seed(0)
    tensors = Detector(model_config(size), CHANNELS).state_dict()
    for name, tensor in tensors.items():
        if name.endswith("gamma"):
            tensor.fill_(0.1)
    return tensors


class Ours:
    """The detector."""

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
        self.device = device
        self.dtype = dtype
        self.detection_loss: Callable = detection_loss

    def loss(self, batch: Batch) -> Tensor:
        """Forward pass and total loss."""
        lanes = batch.frames.shape[1]
        height, width = batch.frames.shape[-2:]
        state = self.model.initial_state(lanes, height, width, device=self.device, dtype=self.dtype)
        raw, _ = self.model(batch.frames, state, starts=batch.starts, labelled=batch.labelled)
        losses = self.detection_loss(
            raw,
            batch.boxes,
            batch.counts,
            self.model.geometry(height, width),
            self.model.config.head,
        )
        return losses.total

    def stream(self, frame: Tensor) -> Callable[[], None]:
        """A function that processes the frame (B, C, H, W) and carries the state between calls."""
        state = self.model.eval().initial_state(
            len(frame), *frame.shape[-2:], device=self.device, dtype=self.dtype
        )

        def step() -> None:
            nonlocal state
            with torch.inference_mode():
                _, state = self.model.step(frame, state)

        return step


class Theirs:
    """The frame-by-frame version."""

    def __init__(self, size: str, device: torch.device) -> None:
        self.model = FrameByFrame(model_config(size), CHANNELS)
        self.model.load_state_dict(weights(size))
        self.model.to(device)

    def loss(self, batch: Batch) -> Tensor:
        """Forward pass and total loss."""
        losses, _ = self.model.losses(batch.frames, None, batch.lanes, batch.boxes)
        return losses["loss"]

    def stream(self, frame: Tensor) -> Callable[[], None]:
        """As of Ours."""
        state = None
        self.model.eval()

        def step() -> None:
            nonlocal state
            with torch.inference_mode():
                _, state = self.model.step(frame, state)

        return step


def train(side: Ours | Theirs, batch: Batch) -> Tensor:
    """Forward, loss and backward. Returns the loss on its device."""
    side.model.zero_grad(set_to_none=True)
    loss = side.loss(batch)
    loss.backward()
    return loss.detach()


# -- counting --------------------------------------------------------------------------------------
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
}
VIEWS = {"aten::_unsafe_view", "aten::detach", "aten::lift_fresh", "aten::alias"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class OperatorCounter(TorchDispatchMode):
    """Counts operators by name.

    Attributes:
        operators: those that do work. Views launch nothing on a GPU.
        waits: those that make the host wait for a GPU: they read a value, or turn a mask into
            indices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema
        aliases = [out.alias_info for out in schema.returns if out.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        if not is_view and schema.name not in VIEWS:
            self.operators[schema.name] += 1
        if schema.name in WAITS or (schema.name in INDEXING and has_mask(args[1])):
            self.waits[schema.name] += 1
        return function(*args, **(kwargs or {}))


def has_mask(indices) -> bool:
    """Whether one of the indices is a mask."""
    masks = (torch.bool, torch.uint8)
    return any(index is not None and index.dtype in masks for index in indices)


class GpuPath(TorchFunctionMode):
    """Makes the code take the path of a GPU on a CPU.

    `Tensor.is_cpu` is false, and as many frames are cast at a time as on a GPU. The kernels are a
    CPU's (oneDNN's LSTM instead of cuDNN's: one operator each).
    """

    def __enter__(self) -> "GpuPath":
        self.cast_at_once = CAST_AT_ONCE["cpu"]
        CAST_AT_ONCE["cpu"] = CAST_AT_ONCE["cuda"]
        return super().__enter__()

    def __exit__(self, *error) -> None:
        CAST_AT_ONCE["cpu"] = self.cast_at_once
        super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]  # a C descriptor
            return False
        return function(*args, **(kwargs or {}))


def count_operators(
    side: Ours | Theirs, batch: Batch, *, gpu_path: bool = False
) -> OperatorCounter:
    """Counts the operators of a training step."""
    path = GpuPath() if gpu_path else nullcontext()
    with path, OperatorCounter() as counter:
        train(side, batch)
    return counter


# -- timing ----------------------------------------------------------------------------------------
class Clock:
    """Wall time by default.

    Processor time suits one thread on a machine that other processes use.
    """

    now = staticmethod(time.perf_counter)


def rounds(
    repeats: int, device: torch.device, *, warm_up: int = 2, **contenders: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each contender in every round, after rounds of warm-up.

    They take turns in alternating order, so that load affects all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(-warm_up, repeats):
        for name in contenders if i % 2 else reversed(contenders):
            synchronize(device)
            start = Clock.now()
            contenders[name]()
            synchronize(device)
            if i >= 0:
                times[name].append(Clock.now() - start)
    return times


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios theirs / ours."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


class MatmulRate:
    """A call measures FLOP/s of a float32 matrix product that fits in the caches."""

    def __init__(self, device: torch.device) -> None:
        n = 8192 if device.type == "cuda" else 1024
        self.device = device
        self.rates: list[float] = []
        self.a, self.b, self.out = (torch.randn(n, n, device=device) for _ in range(3))

    def __call__(self) -> None:
        """Measures once."""
        product = partial(torch.mm, self.a, self.b, out=self.out)
        times = rounds(5, self.device, product=product)["product"]
        self.rates.append(2 * len(self.a) ** 3 / min(times))
