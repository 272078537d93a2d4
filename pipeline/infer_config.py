"""Which detector tensors are of, as far as their names and shapes tell."""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evspan.conf.errors import UserError
from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "backbone.stages.{}."
DOWNSAMPLE = STAGE + "downsample_cf2cl.conv.weight"
ATTENTION = "fpn.small_object_attention_modules."


def recognise(
    tensors: Mapping[str, "Tensor"], *, size: str | None = None, dim_head: int | None = None
) -> tuple[ModelConfig, int]:
    """The model and its input channels.

    What is not there to be seen is as in RVT's tiny, so that tensors of something else give a model to compare them with.

    Args:
        size: of conf/size; its widths and depth count instead of the tensors'. dim_head: of the attention, which no shape
            tells; None: that of the size with the same embed_dim.
    Raises:
        UserError: dim_head is not given and follows from no size.
    """

    def length(name: str, dim: int, otherwise: int) -> int:
        return (
            int(tensors[name].shape[dim])
            if name in tensors and tensors[name].dim() > dim
            else otherwise
        )

    def children(prefix: str) -> int:
        return len(
            {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
        )

    embed_dim = max(1, length(DOWNSAMPLE.format(0), 0, 32))
    chosen = _size(size) if size else _size_of_width(embed_dim)
    bottlenecks = children("fpn.C3_p4.m.")  # every CSP layer has as many
    if not size and children("fpn.C3_p4.") and bottlenecks != round(3 * chosen["fpn"]["depth"]):
        chosen["fpn"]["depth"] = round(bottlenecks / 3, 2)
    if dim_head:
        chosen["backbone"]["dim_head"] = dim_head
    if "dim_head" not in chosen["backbone"]:
        raise UserError(
            f"the network's embed_dim is {embed_dim}, that of no file in conf/size ({', '.join(sizes())}), and "
            "weights do not tell dim_head: give the one that it was trained with, evspan convert --dim-head N"
        )
    first = STAGE.format(0)
    backbone = BackboneConfig(
        **chosen["backbone"],
        dim_multiplier=[
            max(1, length(DOWNSAMPLE.format(i), 0, embed_dim * 2**i) // embed_dim) for i in range(4)
        ],
        num_blocks=[max(1, children(f"{STAGE.format(i)}att_blocks.")) for i in range(4)],
        mlp_ratio=max(
            1,
            length(f"{first}att_blocks.0.att_window.mlp.net.0.0.weight", 0, 4 * embed_dim)
            // embed_dim,
        ),
        dws_conv=f"{first}lstm.conv3x3_dws.weight" in tensors,
    )
    attention = {
        name[len(ATTENTION) :].split(".")[1] for name in tensors if name.startswith(ATTENTION)
    }
    enabled = children("fpn.scale_aware_attention_modules.") > 0
    fpn = FpnConfig(
        **chosen["fpn"],
        in_stages=[1, 2, 3, 4] if children("yolox_head.stems.") == 4 else [2, 3, 4],
        enable_small_object_attention=enabled,
        attention_spatial="spatial" in attention if enabled else True,
        attention_temporal="temporal" in attention if enabled else True,
        temporal_window=length(f"{ATTENTION}scale_0.temporal.temporal_conv.weight", 2, 3),
        identity_init=not enabled
        or any(name.startswith("fpn.") and name.endswith(".gate") for name in tensors),
    )
    head = HeadConfig(num_classes=length("yolox_head.cls_preds.0.weight", 0, 3))
    return ModelConfig(backbone=backbone, fpn=fpn, head=head), length(DOWNSAMPLE.format(0), 1, 20)


def size_name(model: ModelConfig) -> str:
    """The file of conf/size that has these widths and this depth; 'custom' where none has."""
    like = {
        "backbone": {"embed_dim": model.backbone.embed_dim, "dim_head": model.backbone.dim_head},
        "fpn": {"depth": model.fpn.depth},
    }
    return next((name for name in sizes() if _size(name) == like), "custom")


@cache
def sizes() -> tuple[str, ...]:
    """The names in conf/size."""
    return tuple(sorted(path.stem for path in _conf("size").glob("*.yaml")))


def _conf(path: str) -> Path:
    return Path(str(resources.files("evspan.conf"))) / path


def _plain(path: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(_conf(path)))  # type: ignore[return-value]


def _size(name: str) -> dict[str, dict[str, Any]]:
    if name not in sizes():
        raise UserError(f"{name!r} is no size in conf/size; there are {', '.join(sizes())}")
    return _plain(f"size/{name}.yaml")


def _size_of_width(embed_dim: int) -> dict[str, dict[str, Any]]:
    known = (_size(name) for name in sizes())
    return next(
        (s for s in known if s["backbone"]["embed_dim"] == embed_dim),
        {"backbone": {"embed_dim": embed_dim}, "fpn": {"depth": 0.33}},
    )


def gen4_classes() -> list[str]:
    return _plain("dataset/gen4.yaml")["classes"]
