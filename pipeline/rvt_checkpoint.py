"""Checkpoints as RVT publishes them, in Lightning's form: read without running anything that is in them, and written.

A torch file {'state_dict': {'mdl.' + name: tensor}, 'global_step': ..., optimizer, schedule, callbacks, hyper-parameters}. The
latter are objects of whatever the training used (OmegaConf, functions of torch.optim), which pickle makes by calling what the
file names. Here nothing that a file names is called but torch's own building of tensors.
"""

import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig, FrameMode
from evspan.pipeline.infer_config import gen4_classes, recognise
from evspan.pipeline.weights import Weights, describe, described, load_weights
from torch import Tensor

PREFIX = "mdl."  # RVT's Lightning module has the network in its attribute `mdl`
ABOUT = "evspan"  # what our weights files tell of themselves, so that a way there and back loses nothing
LIGHTNING_VERSION = "1.8.6"  # RVT's; Lightning refuses a checkpoint without one
SUFFIX = ".ckpt"


class Trained(NamedTuple):
    """How RVT trained on a dataset, of what weights do not tell."""

    downsample: int
    partition_split_32: int


DATASETS = {
    "gen4": Trained(downsample=2, partition_split_32=2),
    "gen1": Trained(downsample=1, partition_split_32=1),
}
GEN1_CLASSES = ["car", "pedestrian"]


class Told(NamedTuple):
    """What the user says of weights; None: what the file says or shows, else what RVT has."""

    # Any of these: what a file of ours says of itself is left aside.
    size: str | None = None  # of conf/size
    dim_head: int | None = None
    dataset: str | None = None  # of DATASETS; None: gen1 where there are two classes, else gen4
    # One by one:
    classes: list[str] | None = None
    mode: FrameMode | None = None
    downsample: int | None = None
    window_ms: int | None = None


def open_weights(path: str | Path, told: Told = Told()) -> Weights:  # noqa: B008  immutable
    """Weights of a published checkpoint, or of whatever `load_weights` reads. Whether they fit is not checked here.

    Raises:
        UserError: nothing there, a file that is none of these, or something told that cannot be.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} is not there. Name a published {SUFFIX}, a run folder, one of its checkpoints, or a "
            ".safetensors file"
        )
    weights = (
        load_weights(path) if path.is_dir() or path.suffix == ".safetensors" else _read(path, told)
    )
    if told.size or told.dim_head or told.dataset:
        weights = _as_published(weights.tensors, weights.step, told)
    if told.classes and len(told.classes) != weights.model.head.num_classes:
        raise UserError(
            f"{len(told.classes)} classes are named ({', '.join(told.classes)}), but {path} has "
            f"{weights.model.head.num_classes}; name them all, in the order of their ids"
        )
    frames = {
        name: value
        for name in ("mode", "downsample", "window_ms")
        if (value := getattr(told, name)) is not None
    }
    return replace(
        weights, classes=told.classes or weights.classes, frames=replace(weights.frames, **frames)
    )


def _as_published(tensors: dict[str, Tensor], step: int, told: Told) -> Weights:
    model, channels = recognise(tensors, size=told.size, dim_head=told.dim_head)
    classes = model.head.num_classes
    dataset = told.dataset or ("gen1" if classes == len(GEN1_CLASSES) else "gen4")
    trained = DATASETS[dataset]
    model.backbone.partition_split_32 = trained.partition_split_32
    names = GEN1_CLASSES if dataset == "gen1" else gen4_classes()
    return Weights(
        tensors,
        model,
        FrameConfig(mode=FrameMode.rvt, bins=max(1, channels // 2), downsample=trained.downsample),
        names if len(names) == classes else [f"class_{i}" for i in range(classes)],
        step,
    )


# -- Lightning's form --------------------------------------------------------------------------------------------
class Inert:
    """Stands for whatever else a file names: takes any arguments and any state, keeps and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __new__(cls, *_: object) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


def _empty_dict(*_: object) -> dict:
    return {}


def _inert_class(*_: object) -> type[Inert]:
    return Inert


# Where an Inert will not do: what getattr finds may be called next; torch fills plain dicts alone, and OmegaConf has others.
STAND_INS = {"builtins.getattr": _inert_class, "collections.defaultdict": _empty_dict}


def _load(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look
        if damaged:
            raise UserError(
                f"{path} is damaged: {damaged} in it does not have its checksum. Fetch or copy it again"
            )
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals(
            [(STAND_INS.get(name, Inert), name) for name in unknown]
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever bytes can lead to
        # torch's own text goes on to say how to load the file without any protection.
        said = re.split(
            r"\s(?:Please|Check the doc|In PyTorch)|\n", str(error.__context__ or error)
        )[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({said or type(error).__name__}). Name a {SUFFIX} as RVT and Lightning write "
            "it. If it comes from a source that you trust, keep its tensors alone, where it was made: "
            f"torch.save({{'state_dict': checkpoint['state_dict']}}, NAME{SUFFIX})"
        ) from error


def _read(path: Path, told: Told) -> Weights:
    raw = _load(path)
    state = raw.get("state_dict") if isinstance(raw, dict) else None
    if not isinstance(state, dict) or not state:
        keys = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise UserError(
            f"{path} has no tensors under 'state_dict', as Lightning writes them; it has: {keys or 'nothing'}. Name "
            f"another file, or save it as {{'state_dict': ...}}"
        )
    odd = [
        str(k)
        for k, t in state.items()
        if not (
            isinstance(k, str)
            and isinstance(t, Tensor)
            and t.layout is torch.strided
            and t.device.type == "cpu"
            and not t.is_quantized
        )
    ]
    if odd:
        raise UserError(
            f"{path}: {len(odd)} of {len(state)} entries under 'state_dict' are no plain tensors: {', '.join(odd)}. "
            "Name a checkpoint of a detector"
        )
    tensors = {name.removeprefix(PREFIX): t.detach() for name, t in state.items()}
    step, about = raw.get("global_step"), raw.get(ABOUT)
    if isinstance(about, str):
        return described(tensors, about, path)
    return _as_published(tensors, step if isinstance(step, int) else 0, told)


def save_published(path: Path, weights: Weights) -> None:
    """Weights in Lightning's form, for RVT's own code: `torch.load(path)['state_dict']`, `load_from_checkpoint`."""
    # Cloned: a view would bring its whole storage along.
    state = {
        PREFIX + name: t.detach().cpu().contiguous().clone() for name, t in weights.tensors.items()
    }
    memory = io.BytesIO()  # a full disk is then an OSError as anywhere
    torch.save(
        {
            "state_dict": state,
            "epoch": 0,
            "global_step": weights.step,
            "pytorch-lightning_version": LIGHTNING_VERSION,
            ABOUT: json.dumps(describe(weights)),
        },
        memory,
    )
    path.write_bytes(memory.getbuffer())
