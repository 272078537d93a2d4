"""Counts the detector's products with torch's FlopCounterMode, by part, forward and backward.

The oracle of `evspan.pipeline.model.flops`. The detector runs on the meta device, where nothing is computed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from evspan.conf.schema.training import ModelConfig
from evspan.pipeline.model.backbone import Stage
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.flops import (
    HEAD,
    NECK,
    DetectorFlops,
    PartFlops,
    lstm_name,
    spatial_name,
)
from evspan.pipeline.model.sequence_protocol import LocalExchange, Recurrence
from evspan.pipeline.model.state import StageState
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]
_aten = torch.ops.aten


def detector_flops(
    model: ModelConfig,
    frames: Sequence[int],
    labelled: Tensor | None = None,
    freeze: Sequence[str] = (),
) -> DetectorFlops:
    """Counts one chunk of training. The neck's count includes small-object attention.

    Args:
        model: the detector.
        frames: (T, B, C, H, W), the shape of the frames.
        labelled: (T, B) bool, the frames that are predicted; None: all.
        freeze: starts of the names of parameters that are not trained.
    """
    steps, lanes, channels, height, width = frames
    if labelled is None:
        labelled = torch.ones(steps, lanes, dtype=torch.bool)
    counter = flop_counter()
    meter = _PartMeter(counter)
    with torch.device("meta"):
        detector = Detector(model, channels, _MeteredExchange(meter)).train()
        inputs = torch.empty(steps, lanes, channels, height, width, dtype=torch.uint8)
        state = detector.initial_state(lanes, height, width)
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
    meter.watch(detector)
    with counter:
        raw, _ = detector(inputs, state, labelled=labelled.cpu())
        meter.begin_backward(raw)
        raw.sum().backward()
        meter.end()
    return DetectorFlops(meter.parts(), steps * lanes, int(labelled.sum()))


def flop_counter() -> FlopCounterMode:
    """A counter of all products of the detector, on every device.

    torch's own counter has no formulas for fused LSTMs, attention on CPUs, products that are
    written into an existing tensor, and products with a vector.
    """
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


class _PartMeter:
    """Assigns what a counter counts to the part that runs.

    Backward runs in the reverse order of forward. A part's backward begins when the gradient of its
    output is complete.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.names: list[str] = []  # in the order of the forward pass
        self.counts: Counter[tuple[str, str]] = Counter()
        self.running = ("", "forward")
        self.counted = 0

    def watch(self, detector: Detector) -> None:
        """Begins a part where a module of the detector begins; the exchange begins the LSTMs."""
        for number, stage in enumerate(detector.backbone.stages, 1):
            assert isinstance(stage, Stage)
            self._begin_at(stage.downsample_cf2cl, spatial_name(number))
        self._begin_at(detector.fpn, NECK)
        self._begin_at(detector.yolox_head, HEAD)
        detector.fpn.register_forward_hook(lambda _, __, outputs: self.ends(NECK, *outputs))

    def _begin_at(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.begin(name))

    def begin(self, name: str) -> None:
        """The forward pass of a part begins."""
        if name not in self.names:
            self.names.append(name)
        self._switch(name, "forward")

    def ends(self, name: str, *outputs: Tensor) -> None:
        """The forward pass of a part has ended with these outputs."""
        for output in outputs:
            if output.requires_grad:
                register: Any = output.register_hook
                register(lambda _: self._switch(name, "backward"))

    def begin_backward(self, raw: Tensor) -> None:
        """The forward pass of the last part, the head, has ended with `raw`."""
        self.ends(self.names[-1], raw)

    def end(self) -> None:
        """Everything has run."""
        self._switch("", "forward")

    def _switch(self, name: str, direction: str) -> None:
        total = self.counter.get_total_flops()
        self.counts[self.running] += total - self.counted
        self.counted = total
        self.running = (name, direction)

    def parts(self) -> tuple[PartFlops, ...]:
        """What was counted, in the order of the forward pass."""
        return tuple(
            PartFlops(name, self.counts[name, "forward"], self.counts[name, "backward"])
            for name in self.names
        )


class _MeteredExchange(LocalExchange):
    """Begins a part at each scan: the LSTMs of the stages, in their order."""

    def __init__(self, meter: _PartMeter) -> None:
        self.meter = meter
        self.stage = 0

    def scan(
        self, recurrence: Recurrence, x: Tensor, state: StageState
    ) -> tuple[Tensor, StageState]:
        self.stage += 1
        self.meter.ends(spatial_name(self.stage), x)
        self.meter.begin(lstm_name(self.stage))
        y, next_state = super().scan(recurrence, x, state)
        self.meter.ends(lstm_name(self.stage), y)
        return y, next_state


# -- formulas: shapes of an operator's tensors -> FLOPs ------------------------------------------
def _product(_: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    """addmm_, baddbmm_, addbmm: a (..., m, k) times b (..., k, n)."""
    return 2 * math.prod(a) * b[-1]


def _matrix_vector(matrix: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _add_matrix_vector(_: Shape, matrix: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _onednn_lstm(x: Shape, of_input: Shape, of_hidden: Shape, *args: Any, **kwargs: Any) -> int:
    """One layer: x (T, N, inputs), weights (4 * hidden, inputs) and (4 * hidden, hidden)."""
    return 2 * math.prod(x[:-1]) * (math.prod(of_input) + math.prod(of_hidden))


def _cudnn_lstm(x: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    """Any number of layers; biases have one dim."""
    matrices = [math.prod(shape) for shape in weights if len(shape) == 2]
    return 2 * math.prod(x[:-1]) * sum(matrices)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Scores and weighted values: query (..., n, c), key (..., m, c), value (..., m, d)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    _: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    """Two products for each of the forward pass; that the kernel recomputes scores is left out."""
    return 2 * _attention(query, key, value)


def _twice_onednn(*args: Any, **kwargs: Any) -> int:
    return 2 * _onednn_lstm(*args, **kwargs)


def _twice_cudnn(*args: Any, **kwargs: Any) -> int:
    return 2 * _cudnn_lstm(*args, **kwargs)


_FORMULAS: dict[Any, Any] = {
    _aten.addmm_: _product,
    _aten.baddbmm_: _product,
    _aten.addbmm: _product,
    _aten.addbmm_: _product,
    _aten.mv: _matrix_vector,
    _aten.addmv: _add_matrix_vector,
    _aten.mkldnn_rnn_layer: _onednn_lstm,
    _aten.mkldnn_rnn_layer_backward: _twice_onednn,
    _aten._cudnn_rnn: _cudnn_lstm,
    _aten._cudnn_rnn_backward: _twice_cudnn,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
