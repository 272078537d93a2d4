"""Exports the streaming step to a file that runs without evspan: torch.export's .pt2, or ONNX."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evspan.conf.errors import UserError
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.state import DetectorState, state_from_tensors, state_tensors
from evspan.pipeline.weights import Weights, plain
from torch import Tensor, nn
from torch.export import ExportedProgram

METADATA_KEY = "evspan"  # of JSON in the file's metadata
STEPS = 4  # frames of the check: the state that the first one writes is read three times

# Tolerances of the check: a hundred times float noise, and far below what a wrong operator causes.
# Scores: absolute. States: relative to max(1, largest value). Boxes: relative to the smaller side.
TOLERANCE = 1e-4
MIN_BOX_TOLERANCE = 1e-2  # pixels: float32 resolves 1e-4 px at 1280 px, and strides amplify noise

# Frames and state tensors -> decoded predictions and next state tensors.
Run = Callable[[list[Tensor]], list[Tensor]]
# Metadata of node objects that contain paths and lines of this machine.
DEBUG_METADATA = ("stack_trace", "nn_module_stack", "source_fn_stack")


class StreamingStep(nn.Module):
    """`Detector.step` on plain tensors instead of a DetectorState."""

    def __init__(self, detector: Detector, like: DetectorState) -> None:
        super().__init__()
        self.detector = detector
        self.like = like

    def forward(self, frames: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Frames (B, 2 * bins, H, W) uint8 and `state_tensors` -> decoded, next `state_tensors`."""
        decoded, after = self.detector.step(frames, state_from_tensors(list(state), self.like))
        return decoded, *state_tensors(after)


class Differences(NamedTuple):
    """The largest differences between the file and the detector.

    boxes: in pixels. scores, states: absolute. worst: the largest, in units of its tolerance.
    """

    boxes: float
    scores: float
    states: float
    worst: float


def input_names(state: DetectorState) -> list[str]:
    """The names of the step's inputs, in their order."""
    names = ["frames"]
    for number in range(1, len(state.stages) + 1):
        names += [f"stage{number}_hidden", f"stage{number}_cell"]
    names += [f"previous{i}" for i in range(len(state.previous))]
    return names


def output_names(state: DetectorState) -> list[str]:
    """The names of the step's outputs, in their order."""
    return ["decoded", *(f"next_{name}" for name in input_names(state)[1:])]


def file_metadata(weights: Weights, state: DetectorState) -> dict[str, Any]:
    """What a user of the file needs, as JSON values."""
    return {
        "model": "rnndet",  # the only detector there is
        "step": weights.step,
        "classes": weights.classes,
        "frames": plain(asdict(weights.frames)),
        "postprocess": plain(asdict(weights.model.postprocess)),
        "inputs": input_names(state),
        "outputs": output_names(state),
    }


def trace(detector: Detector, frames: tuple[int, int, int, int]) -> ExportedProgram:
    """Traces the step of a detector in eval mode.

    Args:
        frames: the shape (B, 2 * bins, H, W), which is fixed in the program.
    """
    state = detector.initial_state(frames[0], *frames[2:])
    inputs = (torch.zeros(frames, dtype=torch.uint8), *state_tensors(state))
    with _without_warnings(), torch.no_grad():
        program = torch.export.export(StreamingStep(detector, state), inputs, strict=False)
    program.example_inputs = None  # else they are stored, and are larger than the weights
    for node in program.graph.nodes:
        for key in DEBUG_METADATA:
            node.meta.pop(key, None)
    return program


def write_pt2(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Writes torch.export's format, with `metadata` as JSON in an extra file."""
    with _without_warnings():
        torch.export.save(program, path, extra_files={METADATA_KEY: json.dumps(metadata)})


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Writes ONNX, with `metadata` as JSON in its metadata_props."""
    with _without_warnings():
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=metadata["inputs"],
            output_names=metadata["outputs"],
        )
        assert onnx is not None
        graph = onnx.model.graph
        parts: list[Any] = [graph, *graph, *graph.inputs]
        for node in graph:
            parts += node.outputs
        for part in parts:
            part.metadata_props.clear()  # paths and lines of this machine
        onnx.model.metadata_props.clear()
        onnx.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
        onnx.save(path)


def run_pt2(path: Path) -> Run:
    """Loads a .pt2 file to run in torch."""
    with _without_warnings():
        step = torch.export.load(path).module()
    return lambda inputs: list(step(*inputs))


def run_onnx(path: Path) -> Run:
    """Loads an .onnx file to run in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@torch.no_grad()
def check(
    run: Run, detector: Detector, frames: tuple[int, int, int, int], *, cutoff: int
) -> Differences:
    """Compares a file with the detector on STEPS random frames, each with its own state.

    Args:
        run: the file. frames: the shape (B, 2 * bins, H, W). cutoff: the largest count of a frame.

    Raises:
        UserError: they differ by more than the tolerance, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    state = detector.initial_state(frames[0], *frames[2:])
    exported_state = state_tensors(state)
    differences = []
    for _ in range(STEPS):
        # Most pixels of a real frame have no event.
        counts = torch.poisson(torch.full(frames, 0.3), generator=generator)
        counts = counts.clamp(max=cutoff).to(torch.uint8)
        expected, state = detector.step(counts, state)
        decoded, *exported_state = run([counts, *exported_state])
        differences.append(_differences(decoded, expected, exported_state, state_tensors(state)))
    largest = Differences(*torch.tensor(differences).amax(0).tolist())
    if not largest.worst <= 1:  # also for NaN
        raise UserError(
            f"the exported step differs from the detector over {STEPS} frames: "
            f"{summarize(largest)}, {largest.worst:.3g} times the tolerance; nothing is written. "
            "Export weights whose values are all finite; if they are, try the other format, or "
            "another release of torch"
        )
    return largest


def summarize(differences: Differences) -> str:
    """The differences as text."""
    return (
        f"boxes {differences.boxes:.1e} px, scores {differences.scores:.1e}, "
        f"states {differences.states:.1e}"
    )


def _differences(
    decoded: Tensor,
    expected: Tensor,
    exported_state: list[Tensor],
    expected_state: list[Tensor],
) -> Differences:
    """Of one step. decoded, expected: (B, cells, 5 + classes)."""
    difference = (decoded - expected).abs()
    boxes = difference[..., :4]
    scores = difference[..., 4:]
    smaller_side = expected[..., 2:4].amin(-1, keepdim=True)
    box_tolerance = (TOLERANCE * smaller_side).clamp(min=MIN_BOX_TOLERANCE)
    in_tolerances = [(boxes / box_tolerance).max(), scores.max() / TOLERANCE]
    states = []
    for actual, expected_tensor in zip(exported_state, expected_state, strict=True):
        largest = (actual - expected_tensor).abs().max()
        states.append(largest)
        in_tolerances.append(largest / (TOLERANCE * expected_tensor.abs().max().clamp(min=1)))
    return Differences(
        boxes=float(boxes.max()),
        scores=float(scores.max()),
        states=float(torch.stack(states).max()),
        worst=float(torch.stack(in_tolerances).max()),
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides the exporters' warnings about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
