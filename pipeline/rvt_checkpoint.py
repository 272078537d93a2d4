"""Reads and writes checkpoints in RVT's format, which is Lightning's.

A torch file {'state_dict': {'mdl.' + name: tensor}, 'global_step': ..., optimizer, schedule,
callbacks, hyper-parameters}. The latter are pickled objects of the libraries that the training used
(OmegaConf, functions of torch.optim); unpickling them calls what the file names. Here, a file can
call nothing but torch's own reconstruction of tensors.
"""

import errno
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evspan.conf.errors import UserError
from evspan.conf.presets import dataset_classes
from evspan.conf.schema.prep import FrameConfig, FrameMode
from evspan.conf.text import printable
from evspan.pipeline.checkpoint_files import BEST, LATEST
from evspan.pipeline.infer_config import infer_model
from evspan.pipeline.known_facts import NOTHING_KNOWN, KnownFacts
from evspan.pipeline.weights import HEADER_KEY, Weights, describe, load_weights, parse_description
from torch import Tensor

PREFIX = "mdl."  # RVT's Lightning module has the network in its attribute `mdl`
LIGHTNING_VERSION = "1.8.6"  # RVT's; Lightning refuses a checkpoint without one
SUFFIX = ".ckpt"
MOST_RECORDS = 100_000  # of an archive
MOST_PICKLE = 4 << 20  # bytes; of a published checkpoint about 100,000
MOST_REASON = 300  # characters of a message that quotes the file
GEN1_CLASSES = ["car", "pedestrian"]


class RvtTraining(NamedTuple):
    """Settings of RVT's training on a dataset that its weights do not show."""

    downsample: int
    partition_split_32: int


DATASETS = {
    "gen4": RvtTraining(downsample=2, partition_split_32=2),
    "gen1": RvtTraining(downsample=1, partition_split_32=1),
}


def is_published(path: Path) -> bool:
    """Whether a path is read as a checkpoint of RVT: a file of another kind than our own."""
    return path.is_file() and path.suffix != ".safetensors" and path.name not in (BEST, LATEST)


def open_weights(
    path: str | Path, facts: KnownFacts = NOTHING_KNOWN, *, raw: bool = False
) -> Weights:
    """Reads the weights of a published checkpoint, or of what `load_weights` reads.

    Whether the tensors fit the model is not checked; see `inference.trained_detector.check_fit`.

    Args:
        facts: values that the weights do not show.
        raw: as of `load_weights`.

    Raises:
        UserError: there is no such file, it is no checkpoint, or `facts` contradict it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} is not there. Name a published {SUFFIX}, a run folder, one of its "
            "checkpoints, or a .safetensors file"
        )
    weights = _read(path, facts) if is_published(path) else load_weights(path, raw=raw)
    if facts.size or facts.dim_head or facts.dataset:
        weights = _as_published(weights.tensors, weights.step, facts)
    num_classes = weights.model.head.num_classes
    if facts.classes and len(facts.classes) != num_classes:
        raise UserError(
            f"{len(facts.classes)} classes are named ({', '.join(facts.classes)}), but {path} has "
            f"{num_classes}; name them all, in the order of their ids"
        )
    return replace(
        weights,
        classes=facts.classes or weights.classes,
        frames=_with_facts(weights.frames, facts),
    )


def _with_facts(frames: FrameConfig, facts: KnownFacts) -> FrameConfig:
    values = {"mode": facts.mode, "downsample": facts.downsample, "window_ms": facts.window_ms}
    known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return replace(frames, **known)


def _as_published(tensors: dict[str, Tensor], step: int, facts: KnownFacts) -> Weights:
    """Weights with RVT's settings for what the tensors do not show."""
    model, channels = infer_model(tensors, size=facts.size, dim_head=facts.dim_head)
    num_classes = model.head.num_classes
    dataset = facts.dataset or ("gen1" if num_classes == len(GEN1_CLASSES) else "gen4")
    training = DATASETS[dataset]
    model.backbone.partition_split_32 = training.partition_split_32
    classes = GEN1_CLASSES if dataset == "gen1" else dataset_classes("gen4")
    if len(classes) != num_classes:
        classes = [f"class_{i}" for i in range(num_classes)]
    frames = FrameConfig(
        mode=FrameMode.rvt, bins=max(1, channels // 2), downsample=training.downsample
    )
    return Weights(tensors, model, frames, classes, step)


# -- Lightning's format ------------------------------------------------------------------------
class Inert:
    """Replaces every other object of a file: takes any arguments and any state, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __new__(cls, *_: object) -> "Inert":
        """Takes any arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


def _empty_dict(*_: object) -> dict[object, object]:
    return {}


def _inert_class(*_: object) -> type[Inert]:
    return Inert


# What getattr returns may be called next. torch fills plain dicts only, and OmegaConf has others.
REPLACEMENTS = {"builtins.getattr": _inert_class, "collections.defaultdict": _empty_dict}


def _load(path: Path) -> Any:
    """The content of a torch file, with an Inert for every object that is not torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(path, archive)
            damaged = archive.testzip()  # torch does not check
        if damaged:
            raise UserError(
                f"{path} is damaged: the checksum of {damaged} in it is wrong. "
                "Download or copy it again"
            )
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        replacements = [(REPLACEMENTS.get(name, Inert), name) for name in unknown]
        with torch.serialization.safe_globals(replacements):  # type: ignore[arg-type]  # pairs too
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of an impossible offset
            raise
        # torch's text goes on with how to load the file without protection.
        text = str(error.__context__ or error)
        reason = re.split(r"\s(?:Please|Check the doc|In PyTorch)|\n", text)[0]
        reason = printable(reason)[:MOST_REASON] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}). Name a "
            f"{SUFFIX} as RVT and Lightning write it. If you trust its source, save only its "
            "tensors, where its libraries are installed: "
            f"torch.save({{'state_dict': checkpoint['state_dict']}}, NAME{SUFFIX})"
        ) from error


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Checks the sizes in an archive before any of its contents is read.

    torch stores its records as they are. What is compressed, or overlaps, may be a thousand times
    as large as the file.

    Raises:
        UserError: a record is compressed, they are larger than the file, or the pickle is large.
    """
    records = archive.infolist()
    total = sum(record.file_size for record in records)
    size = path.stat().st_size
    problem = ""
    if len(records) > MOST_RECORDS:
        problem = f"it has {len(records)} records, at most {MOST_RECORDS} are read"
    elif any(record.compress_type != zipfile.ZIP_STORED for record in records):
        problem = "its records are compressed, which torch never does"
    elif any(record.file_size != record.compress_size for record in records) or total > size:
        problem = f"its records have {total} bytes, and the file has {size}"
    elif any(r.filename.endswith(".pkl") and r.file_size > MOST_PICKLE for r in records):
        problem = f"its pickle is larger than {MOST_PICKLE} bytes"
    if problem:
        raise UserError(f"{path} is no checkpoint of torch: {problem}. Download or copy it again")


def _check_sizes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Checks that tensors are no larger than the file: views may repeat one value.

    Raises:
        UserError: they are larger.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
    stored = sum(storage.nbytes() for storage in storages.values())
    size = path.stat().st_size
    largest = max(total, stored)
    if largest > size:
        raise UserError(
            f"{path}: its tensors have {largest} bytes, and the file has {size}. Name a checkpoint "
            "whose tensors are stored as a whole"
        )


def _read(path: Path, facts: KnownFacts) -> Weights:
    content = _load(path)
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not state_dict:
        if isinstance(content, dict):
            keys = printable(", ".join(map(str, content)))[:MOST_REASON] or "nothing"
        else:
            keys = type(content).__name__
        raise UserError(
            f"{path} has no tensors under 'state_dict', as Lightning writes them; it has: {keys}. "
            "Name another file, or save it as {'state_dict': ...}"
        )
    _check_tensors(path, state_dict)
    _check_sizes(path, state_dict)
    tensors = {name.removeprefix(PREFIX): t.detach() for name, t in state_dict.items()}
    description = content.get(HEADER_KEY)
    if isinstance(description, str):
        return parse_description(tensors, description, path)
    step = content.get("global_step")
    return _as_published(tensors, step if isinstance(step, int) and 0 <= step < 2**63 else 0, facts)


def _check_tensors(path: Path, state_dict: Mapping[Any, Any]) -> None:
    other = [
        str(name)
        for name, value in state_dict.items()
        if not (isinstance(name, str) and _is_plain_tensor(value))
    ]
    if other:
        raise UserError(
            f"{path}: {len(other)} of {len(state_dict)} entries under 'state_dict' are no plain "
            f"tensors: {printable(', '.join(other))[:MOST_REASON]}. Name a checkpoint of a detector"
        )


def _is_plain_tensor(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def save_published(path: Path, weights: Weights) -> None:
    """Writes weights in Lightning's format, for RVT's code.

    Read it with `torch.load(path)['state_dict']` or `load_from_checkpoint`. It also contains the
    description of a weights file, so that reading it back gives the same `Weights`.
    """
    # Cloned, since a view would be saved with its whole storage.
    state_dict = {
        PREFIX + name: t.detach().cpu().contiguous().clone() for name, t in weights.tensors.items()
    }
    memory = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(
        {
            "state_dict": state_dict,
            "epoch": 0,
            "global_step": weights.step,
            "pytorch-lightning_version": LIGHTNING_VERSION,
            HEADER_KEY: json.dumps(describe(weights)),
        },
        memory,
    )
    path.write_bytes(memory.getbuffer())
