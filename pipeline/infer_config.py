"""Infers the model config from a state dict."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from evspan.conf.errors import UserError
from evspan.conf.presets import Preset, size_names, size_preset
from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "backbone.stages.{}."
DOWNSAMPLE = STAGE + "downsample_cf2cl.conv.weight"
MLP_HIDDEN = STAGE + "att_blocks.0.att_window.mlp.net.0.0.weight"
ATTENTION = "fpn.small_object_attention_modules."
NUM_STAGES = 4
TINY_EMBED_DIM = 32
TINY_DEPTH = 0.33
DEFAULT_CHANNELS = 20  # 2 polarities x 10 bins


class InferredModel(NamedTuple):
    """A model config, and the number of channels of its frames."""

    model: ModelConfig
    channels: int


def infer_model(
    tensors: Mapping[str, "Tensor"], *, size: str | None = None, dim_head: int | None = None
) -> InferredModel:
    """Infers the model from names and shapes of its tensors.

    Values that no tensor shows are RVT's tiny. So tensors of another network also give a model,
    which they can be compared with.

    Args:
        tensors: parameters and buffers by name.
        size: a preset of conf/size; its widths and depth replace the inferred ones.
        dim_head: of the attention, which no shape shows. None: that of the size with the same
            embed_dim.

    Raises:
        UserError: dim_head is not given, and no size has this embed_dim.
    """
    state = _StateDict(tensors)
    fpn_enabled = state.num_children("fpn.scale_aware_attention_modules.") > 0
    widths = _widths(state, size=size, dim_head=dim_head)
    model = ModelConfig(
        backbone=_backbone(state, widths),
        fpn=_fpn(state, widths, attention=fpn_enabled),
        head=HeadConfig(num_classes=state.length("yolox_head.cls_preds.0.weight", 0, default=3)),
    )
    channels = state.length(DOWNSAMPLE.format(0), 1, default=DEFAULT_CHANNELS)
    return InferredModel(model, channels)


class _StateDict:
    """Questions about a state dict."""

    def __init__(self, tensors: Mapping[str, "Tensor"]) -> None:
        self.tensors = tensors

    def length(self, name: str, dim: int, *, default: int) -> int:
        """Of dimension `dim` of a tensor."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dim() <= dim:
            return default
        return int(tensor.shape[dim])

    def children(self, prefix: str) -> set[str]:
        """The path elements that follow `prefix` in names."""
        names = (name[len(prefix) :] for name in self.tensors if name.startswith(prefix))
        return {name.split(".")[0] for name in names}

    def num_children(self, prefix: str) -> int:
        """How many different path elements follow `prefix`."""
        return len(self.children(prefix))


def _embed_dim(state: _StateDict) -> int:
    return max(1, state.length(DOWNSAMPLE.format(0), 0, default=TINY_EMBED_DIM))


def _widths(state: _StateDict, *, size: str | None, dim_head: int | None) -> Preset:
    """embed_dim, dim_head and depth, as in a preset of conf/size."""
    embed_dim = _embed_dim(state)
    widths = size_preset(size) if size else _preset_of_width(embed_dim)
    bottlenecks = state.num_children("fpn.C3_p4.m.")  # every CSP layer has the same number
    has_neck = state.num_children("fpn.C3_p4.") > 0
    if not size and has_neck and bottlenecks != round(3 * widths["fpn"]["depth"]):
        widths["fpn"]["depth"] = round(bottlenecks / 3, 2)
    if dim_head:
        widths["backbone"]["dim_head"] = dim_head
    if "dim_head" not in widths["backbone"]:
        raise UserError(
            f"the network's embed_dim is {embed_dim}, which no preset in conf/size has "
            f"({', '.join(size_names())}), and the weights do not show dim_head: give the value "
            "that it was trained with, evspan convert --dim-head N"
        )
    return widths


def _preset_of_width(embed_dim: int) -> Preset:
    """The size with this embed_dim; without a dim_head if there is none."""
    for name in size_names():
        preset = size_preset(name)
        if preset["backbone"]["embed_dim"] == embed_dim:
            return preset
    return {"backbone": {"embed_dim": embed_dim}, "fpn": {"depth": TINY_DEPTH}}


def _backbone(state: _StateDict, widths: Preset) -> BackboneConfig:
    embed_dim = _embed_dim(state)
    multipliers = []
    num_blocks = []
    for stage in range(NUM_STAGES):
        default = embed_dim * 2**stage
        dim = state.length(DOWNSAMPLE.format(stage), 0, default=default)
        multipliers.append(max(1, dim // embed_dim))
        num_blocks.append(max(1, state.num_children(f"{STAGE.format(stage)}att_blocks.")))
    hidden = state.length(MLP_HIDDEN.format(0), 0, default=4 * embed_dim)
    return BackboneConfig(
        **widths["backbone"],
        dim_multiplier=multipliers,
        num_blocks=num_blocks,
        mlp_ratio=max(1, hidden // embed_dim),
        dws_conv=f"{STAGE.format(0)}lstm.conv3x3_dws.weight" in state.tensors,
    )


def _fpn(state: _StateDict, widths: Preset, *, attention: bool) -> FpnConfig:
    parts = set()
    for scale in state.children(ATTENTION):
        parts |= state.children(f"{ATTENTION}{scale}.")
    has_gates = any(name.startswith("fpn.") and name.endswith(".gate") for name in state.tensors)
    has_four_scales = state.num_children("yolox_head.stems.") == NUM_STAGES
    window = state.length(f"{ATTENTION}scale_0.temporal.temporal_conv.weight", 2, default=3)
    return FpnConfig(
        **widths["fpn"],
        in_stages=[1, 2, 3, 4] if has_four_scales else [2, 3, 4],
        enable_small_object_attention=attention,
        attention_spatial="spatial" in parts or not attention,
        attention_temporal="temporal" in parts or not attention,
        temporal_window=window,
        identity_init=has_gates or not attention,
    )
