"""The streaming step as a file that needs none of this code: torch.export's .pt2 or ONNX, checked against the detector."""

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

ABOUT = "evspan"  # the file's metadata under this name: JSON, as in a weights file
STEPS = 4  # frames of the check: what it wrote into the state is read again three times

# What the file and the detector may differ by: a hundred times float noise, far below what a wrong operator does.
TOLERANCE = 1e-4  # of scores and states (relative to a tensor's largest value above 1); of a box, as a share of its smaller side
PIXELS = 1e-2  # but not less for a box: float32 itself tells no finer than 1e-4 px at 1280 px, and a stride multiplies noise

Run = Callable[[list[Tensor]], list[Tensor]]  # frames and state -> decoded and next state


class StreamingStep(nn.Module):
    """`Detector.step` on plain tensors: frames and `state_tensors` in, decoded and the next `state_tensors` out."""

    def __init__(self, detector: Detector, like: DetectorState) -> None:
        super().__init__()
        self.detector, self.like = detector, like

    def forward(self, frames: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        decoded, after = self.detector.step(frames, state_from_tensors(list(state), self.like))
        return decoded, *state_tensors(after)


class Differences(NamedTuple):
    """Largest ones, file against detector: boxes in pixels, scores and states as they are; and the worst in tolerances."""

    boxes: float
    scores: float
    states: float
    worst: float


def input_names(state: DetectorState) -> list[str]:
    """In the order that the step takes them. The outputs are decoded, then next_ and the state's names."""
    stages = [
        f"stage{i}_{part}" for i in range(1, len(state.stages) + 1) for part in ("hidden", "cell")
    ]
    return ["frames", *stages, *(f"previous{i}" for i in range(len(state.previous)))]


def output_names(state: DetectorState) -> list[str]:
    return ["decoded", *(f"next_{name}" for name in input_names(state)[1:])]


def about(weights: Weights, state: DetectorState) -> dict[str, Any]:
    """What a file's user has to know, as JSON values."""
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
    """The step of a detector in eval mode for frames (B, 2 * bins, H, W); every size is fixed."""
    state = detector.initial_state(frames[0], *frames[2:])
    given = (torch.zeros(frames, dtype=torch.uint8), *state_tensors(state))
    with _quiet(), torch.no_grad():
        program = torch.export.export(StreamingStep(detector, state), given, strict=False)
    program.example_inputs = None  # else they are stored, larger than the weights
    for node in program.graph.nodes:
        for key in (
            "stack_trace",
            "nn_module_stack",
            "source_fn_stack",
        ):  # this machine's paths and lines
            node.meta.pop(key, None)
    return program


def write_pt2(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    with _quiet():
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(about)})


def write_onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    with _quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=about["inputs"],
            output_names=about["outputs"],
        )
        assert written is not None
        graph = written.model.graph
        for part in (
            graph,
            *graph,
            *graph.inputs,
            *(value for node in graph for value in node.outputs),
        ):
            part.metadata_props.clear()  # this machine's paths and lines
        written.model.metadata_props.clear()
        written.model.metadata_props[ABOUT] = json.dumps(about)
        written.save(path)


def run_pt2(path: Path) -> Run:
    """The written file as torch runs it."""
    with _quiet():
        step = torch.export.load(path).module()
    return lambda given: list(step(*given))


def run_onnx(path: Path) -> Run:
    """The written file as onnxruntime runs it, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]

    def run(given: list[Tensor]) -> list[Tensor]:
        fed = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        return [torch.from_numpy(t) for t in session.run(None, fed)]

    return run


@torch.no_grad()
def check(
    run: Run, detector: Detector, frames: tuple[int, int, int, int], *, cutoff: int
) -> Differences:
    """A few steps of random frames (B, 2 * bins, H, W), each side fed its own state.

    Raises:
        UserError: they differ by more than the tolerance, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    state = detector.initial_state(frames[0], *frames[2:])
    carried, found = state_tensors(state), []
    for _ in range(STEPS):
        # Most pixels of a real frame have no event.
        counts = (
            torch.poisson(torch.full(frames, 0.3), generator=generator)
            .clamp(max=cutoff)
            .to(torch.uint8)
        )
        wanted, state = detector.step(counts, state)
        decoded, *carried = run([counts, *carried])
        found.append(_differences(decoded, wanted, carried, state_tensors(state)))
    most = Differences(*torch.tensor(found).amax(0).tolist())
    if not most.worst <= 1:  # nan too
        raise UserError(
            f"the exported step differs from the detector over {STEPS} frames: {told(most)}, {most.worst:.3g} times "
            "the tolerance; nothing is written. Export weights whose values are all finite; if they are, try the "
            "other format, or another release of torch"
        )
    return most


def told(most: Differences) -> str:
    return f"boxes {most.boxes:.1e} px, scores {most.scores:.1e}, states {most.states:.1e}"


def _differences(
    decoded: Tensor, wanted: Tensor, carried: list[Tensor], after: list[Tensor]
) -> Differences:
    off = (decoded - wanted).abs()
    size = wanted[..., 2:4].amin(-1, keepdim=True)
    worst = [
        (off[..., :4] / (TOLERANCE * size).clamp(min=PIXELS)).max(),
        off[..., 4:].max() / TOLERANCE,
    ]
    states = [(a - b).abs().max() for a, b in zip(carried, after, strict=True)]
    worst += [
        o / (TOLERANCE * b.abs().max().clamp(min=1)) for o, b in zip(states, after, strict=True)
    ]
    return Differences(
        *(
            torch.stack(v).max().item()
            for v in ([off[..., :4].max()], [off[..., 4:].max()], states, worst)
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
