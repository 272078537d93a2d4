"""Reads and writes weights files, whose header has the model, frames and classes."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from evspan.conf.errors import UserError
from evspan.conf.json_files import JsonFileError, parse_json_object
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import ModelConfig, Precision
from evspan.conf.text import printable
from evspan.pipeline.checkpoint_files import FileSum, find_weights
from evspan.pipeline.tensor_files import save_tensors
from evspan.pipeline.weights_header import (
    HeaderError,
    check_sizes,
    check_tensors,
    classes_from,
    frames_from,
    model_from,
    step_from,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

logger = logging.getLogger(__name__)
MOST_DESCRIPTION = 1 << 20  # characters
MOST_REASON = 300
MOST_UPDATES = 2**53  # as JSON readers keep integers exactly
AVERAGE_KEY = "ema"  # of a description: decay and updates of a moving average
HEADER_KEY = "evspan"  # of the description in the header of a weights file


class Average(NamedTuple):
    """Of weights that are a moving average (EMA): its decay, and the updates that it is of."""

    decay: float
    updates: int

    def __str__(self) -> str:
        return f"ema (decay {self.decay:g}, {self.updates} updates)"


@dataclass(frozen=True)
class Weights:
    """What a detector needs to run: tensors by parameter name, and what they were trained for.

    precision: of the training. The tensors are float32.
    average: None: the weights that the optimizer updates ("raw"), not their moving average.
    """

    tensors: dict[str, Tensor]
    model: ModelConfig
    frames: FrameConfig
    classes: list[str]
    step: int
    precision: Precision = Precision.fp32
    average: Average | None = None

    @property
    def kind(self) -> str:
        """'raw', or 'ema (decay 0.9999, 400 updates)'."""
        return "raw" if self.average is None else str(self.average)


def plain(config: Any) -> Any:
    """A config as JSON values; enums by name."""
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


# -- weights files -----------------------------------------------------------------------------
def describe(weights: Weights) -> dict[str, Any]:
    """All but the tensors, as JSON values."""
    description = {
        "model": plain(asdict(weights.model)),
        "frames": plain(asdict(weights.frames)),
        "classes": weights.classes,
        "step": weights.step,
        "precision": weights.precision.name,
    }
    if weights.average is not None:
        description[AVERAGE_KEY] = weights.average._asdict()
    return description


def parse_description(tensors: dict[str, Tensor], description: str, file: Path) -> Weights:
    """The inverse of `describe`.

    Args:
        description: as JSON. file: where it is from, for the error.

    Raises:
        UserError: it is not such a description.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return replace(_parsed(shapes, description, file), tensors=tensors)


def _parsed(shapes: Mapping[str, tuple[int, ...]], description: Any, file: Path) -> Weights:
    """`parse_description` from the shapes alone; the result has no tensors."""
    try:
        if not isinstance(description, str) or len(description) > MOST_DESCRIPTION:
            raise HeaderError("its description is no short text")
        values = parse_json_object(description, "its description")
        model = model_from(values.get("model"))
        frames = frames_from(values.get("frames"))
        check_sizes(model, frames, shapes)
        return Weights(
            {},
            model,
            frames,
            classes_from(values.get("classes")),
            step_from(values.get("step")),
            _trained_in(values.get("precision")),
            parse_average(values.get(AVERAGE_KEY)),
        )
    except (UserError, KeyError, ValueError, TypeError) as error:
        raise _not_a_weights_file(file, error) from error


def _trained_in(name: Any) -> Precision:
    """fp32 where a file of an older version names none, or one that is no more."""
    return Precision.__members__.get(str(name), Precision.fp32)


def parse_average(values: Any) -> Average | None:
    """The inverse of what `describe` makes of `Weights.average`; None of None.

    Raises:
        HeaderError, KeyError, TypeError: it is something else.
    """
    if values is None:
        return None
    decay = values["decay"]
    updates = values["updates"]
    if not isinstance(decay, float | int) or not 0 <= decay < 1:
        raise HeaderError(f"its {AVERAGE_KEY}.decay is no number from 0 to below 1")
    if not isinstance(updates, int) or not 0 <= updates <= MOST_UPDATES:
        raise HeaderError(f"its {AVERAGE_KEY}.updates is no number of updates")
    return Average(float(decay), int(updates))


def save_weights(path: Path, weights: Weights) -> FileSum:
    """Writes a weights file. Returns its checksum."""
    return save_tensors(path, weights.tensors, {HEADER_KEY: json.dumps(describe(weights))})


def load_weights(path: str | Path, *, raw: bool = False) -> Weights:
    """Reads a weights file. In a checkpoint, it is checked against the checksum in meta.json.

    Args:
        path: a .safetensors file, a checkpoint folder, RUN/checkpoints/best, or a run folder: its
            newest intact checkpoint; a warning names newer ones that are damaged.
        raw: of a checkpoint, the weights that the optimizer updates; False: their moving average
            (EMA) where it has one.

    Raises:
        UserError: there is none, another program wrote it, or the checkpoint is damaged.
    """
    found = find_weights(Path(path), raw=raw)
    if found.message:
        logger.warning("%s", found.message)
    return read_weights(found.file)


def read_weights(file: Path) -> Weights:
    """Reads a weights file without looking for a checkpoint around it.

    Raises:
        UserError: another program wrote it.
    """
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            slices = {name: opened.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            check_tensors(shapes, {name: part.get_dtype() for name, part in slices.items()})
            weights = _parsed(shapes, (opened.metadata() or {}).get(HEADER_KEY), file)
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, HeaderError) as error:
        raise _not_a_weights_file(file, error) from error
    return replace(weights, tensors=tensors)


def read_description(file: Path) -> dict[str, Any]:
    """What `describe` returned when a weights file was saved. Reads its header only.

    Raises:
        UserError: another program wrote it.
    """
    try:
        with safe_open(file, "pt") as opened:
            return parse_json_object((opened.metadata() or {})[HEADER_KEY], "its description")
    except (SafetensorError, KeyError, JsonFileError) as error:
        raise _not_a_weights_file(file, error) from error


def _not_a_weights_file(file: Path, error: Exception) -> UserError:
    reason = printable(str(error))[:MOST_REASON]
    return UserError(
        f"{file} is no weights file of evspan ({type(error).__name__}: {reason}). Name a run "
        "folder, a checkpoint folder, or a .safetensors file of evspan train or of evspan convert, "
        "which reads RVT's published .ckpt"
    )


# -- generators --------------------------------------------------------------------------------
def generator_states() -> dict[str, Tensor]:
    """The states of torch's generators, of the CPU and the current GPU."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch and NumPy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
