"""A detector that follows recordings from call to call: it holds their state."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from evspan.conf.text import plural
from evspan.pipeline.inference.cuda_graph import capture, require_cuda_graphs
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import Frames, InputError, as_frames, check_frames
from evspan.pipeline.model.postprocess import DetectionLimits, PendingDetections, select
from evspan.pipeline.model.state import DetectorState, map_state, state_tensors
from torch import Tensor


class StreamingOptions(NamedTuple):
    """What a `StreamingDetector` runs.

    lanes: recordings side by side. height, width: of their frames, in pixels. frames_per_call:
    frames of each lane that a call usually takes. limits: which predictions are detections.
    cuda_graphs: repeat a call of `frames_per_call` frames as one CUDA graph.
    """

    lanes: int
    height: int
    width: int
    limits: DetectionLimits
    frames_per_call: int = 1
    cuda_graphs: bool = False


class StreamingDetector:
    """Runs a detector on the next frames of its lanes, from zero state on.

    With CUDA graphs, frames and state have a fixed place on the GPU, and the network, thresholds
    and NMS are one launch. A call of fewer frames than `frames_per_call`, as at the end of a
    recording, runs without the graph. The results are the same.

    Args:
        detector: in eval mode; its weights must stay where they are.

    Raises:
        UserError: CUDA graphs are requested, and the detector is not on a GPU.
    """

    def __init__(self, detector: Detector, options: StreamingOptions) -> None:
        self.detector = detector
        self.options = options
        self.device = next(detector.parameters()).device
        if options.cuda_graphs:
            require_cuda_graphs(self.device)
        with torch.inference_mode():
            self._state = detector.initial_state(
                options.lanes, options.height, options.width, device=self.device
            )
        self._graph: _Graph | None = None

    def detect(self, frames: Frames) -> list[Tensor]:
        """The detections of the next frame of every lane. Waits once for the device.

        Args:
            frames: (lanes, 2 * bins, H, W) uint8, on the CPU or on the device, or an array.

        Returns:
            Per lane (k, 7) on the CPU: x1, y1, x2, y2 in pixels of the frames, objectness, class
            score, class id; highest objectness * class score first.

        Raises:
            InputError: frames of another dtype, size, number of lanes or device.
        """
        checked = as_frames(frames, "lanes, channels, H, W", torch.device("cpu"))
        return self.start(checked[None]).read()

    @torch.inference_mode()
    def start(self, frames: Frames) -> PendingDetections:
        """Queues the next frames of every lane without waiting for the device.

        Args:
            frames: (T, lanes, 2 * bins, H, W) uint8, on the CPU or on the device, or an array of
                numpy.

        Returns:
            The detections of T * lanes frames in (t, lane) order. Read them before the next call.

        Raises:
            InputError: frames of another dtype, size, number of lanes or device.
        """
        frames = self._checked(frames)
        if not self.options.cuda_graphs or len(frames) != self.options.frames_per_call:
            decoded = self._advance(self._on_device(frames))
            return PendingDetections(decoded, self.options.limits)
        if self._graph is None:
            self._graph = self._captured(frames)
        return self._graph.run(self._on_host_or_device(frames), self.options.limits)

    @torch.inference_mode()
    def reset(self) -> None:
        """Sets the state of all lanes to zero: other recordings begin."""
        overwrite(self._state, map_state(torch.zeros_like, self._state))

    def _checked(self, frames: Frames) -> Tensor:
        """The frames as a tensor, if they are of this stream."""
        checked = as_frames(frames, "T, lanes, channels, H, W", torch.device("cpu"))
        options = self.options
        expected = (options.lanes, options.height, options.width)
        lanes, _, height, width = checked.shape[1:]
        if (lanes, height, width) != expected:
            raise InputError(
                f"frames are of {plural(lanes, 'lane')}, {height} x {width} pixels, and the stream "
                f"is of {plural(options.lanes, 'lane')}, {options.height} x {options.width}; open "
                "another stream for them"
            )
        device = checked.device if checked.is_cpu else self.device
        check_frames(checked, self.detector.in_channels, device)
        return checked

    def _advance(self, frames: Tensor) -> Tensor:
        """Frames on the device -> decoded predictions. For CUDA graphs the state stays in place."""
        labelled: Tensor | None = None
        if frames.is_cpu and not self.options.cuda_graphs:
            # The path of evaluation, bit for bit. It selects frames by index; without an index, as
            # a graph requires, a CPU rounds differently.
            labelled = torch.ones(frames.shape[:2], dtype=torch.bool)
        raw, after = self.detector(frames, self._state, labelled=labelled)
        if self.options.cuda_graphs:
            overwrite(self._state, after)
        else:
            self._state = after
        return self.detector.decode(raw, self.options.height, self.options.width)

    def _captured(self, like: Tensor) -> "_Graph":
        frames = torch.zeros(like.shape, dtype=torch.uint8, device=self.device)
        before = map_state(Tensor.clone, self._state)

        def work() -> _Outputs:
            decoded = self._advance(frames)
            return _Outputs(decoded, select(decoded, self.options.limits))

        replay, outputs = capture(work, self.device)
        overwrite(self._state, before)  # warming up has advanced it
        return _Graph(frames, replay, outputs)

    def _on_host_or_device(self, frames: Tensor) -> Tensor:
        """In page-locked memory if on the CPU, from where the GPU copies on its own."""
        return frames.pin_memory() if frames.is_cpu and self.device.type == "cuda" else frames

    def _on_device(self, frames: Tensor) -> Tensor:
        return self._on_host_or_device(frames).to(self.device, non_blocking=True)


def overwrite(state: DetectorState, values: DetectorState) -> None:
    """Copies `values` to the memory of `state`."""
    for target, value in zip(state_tensors(state), state_tensors(values), strict=True):
        target.copy_(value)


class _Outputs(NamedTuple):
    """decoded: (n, cells, 5 + classes). packed: of `select`."""

    decoded: Tensor
    packed: Tensor


class _Graph(NamedTuple):
    """frames, outputs: in the fixed memory that `replay` reads and overwrites."""

    frames: Tensor
    replay: Callable[[], object]
    outputs: _Outputs

    def run(self, frames: Tensor, limits: DetectionLimits) -> PendingDetections:
        self.frames.copy_(frames, non_blocking=True)
        self.replay()
        return PendingDetections(self.outputs.decoded, limits, packed=self.outputs.packed)
