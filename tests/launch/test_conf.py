"""Every config composes through the real schemas to typed objects; what is misspelt or impossible is refused."""

import importlib.resources
import math
from pathlib import Path

import pytest
from evspan.conf.errors import ConfigError
from evspan.conf.schema.benchmark import BenchConfig
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.schema.training import EvaluateConfig, Precision, Sampling, Schedule, TrainConfig
from support.composed_configs import composed

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
PRIMARY = {
    "prep": PrepConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "bench": BenchConfig,
}
GROUPS = {
    "dataset": ("prep", "train", "evaluate"),
    "model": ("train",),
    "size": ("train",),
    "augmentation": ("train", "bench"),
    "deepspeed": ("train",),
    "cluster": ("prep", "train"),
    "search": ("train",),
    "experiment": ("train",),
}
HYDRAS = {
    "hydra/launcher/slurm.yaml"
}  # needs what `evspan train --multirun` registers (tests/launch/test_submit_slurm.py)
REFUSED = ConfigError


def options(group: str) -> list[str]:
    return sorted(
        str(p.relative_to(CONF / group).with_suffix("")) for p in (CONF / group).rglob("*.yaml")
    )


def test_every_file_is_a_command_or_an_option_of_a_group():
    reached = {f"{name}.yaml" for name in PRIMARY} | {
        f"{group}/{option}.yaml" for group in GROUPS for option in options(group)
    }
    assert reached | HYDRAS == {str(p.relative_to(CONF)) for p in CONF.rglob("*.yaml")}


@pytest.mark.parametrize("name", PRIMARY)
def test_commands_compose(name):
    assert type(composed(name)[0]) is PRIMARY[name]


@pytest.mark.parametrize(
    ("name", "group", "option"),
    [
        (n, g, o)
        for g, names in GROUPS.items()
        for n in names
        for o in options(g)
        if (n, o) != ("prep", "gpu_nodes")
    ],
)
def test_options_compose(name, group, option):
    # The default head has 3 classes.
    num_classes = ["model.head.num_classes=8"] if (name, option) == ("train", "etram") else []
    config, choices = composed(name, f"{group}={option}", *num_classes)
    assert type(config) is PRIMARY[name]
    assert choices[group] == option
    if group == "dataset":
        assert config.dataset.name == option  # type: ignore[attr-defined]
    if group == "deepspeed":
        assert config.deepspeed.stage == int(option.removeprefix("zero"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", options("experiment"))
def test_experiments_take_the_other_groups_and_any_value(option):
    config, choices = composed(
        "train",
        f"experiment={option}",
        "size=micro",
        "deepspeed=zero3",
        "model=maxvit_yolox/size_aware",
        "dataset=gen4",
        "training.max_steps=7",
        "model.head.num_classes=5",
        "dataset.root='a b=c'",
    )
    assert (choices["size"], choices["deepspeed"]) == ("micro", "zero3")
    assert config.model.backbone.embed_dim == 16
    assert config.deepspeed.stage == 3
    assert config.model.head.size_aware_loss
    assert config.training.max_steps == 7
    assert config.model.head.num_classes == 5
    assert config.dataset.root == "a b=c"


# -- the seed's experiments ------------------------------------------------------------------------------------------
GEN4 = {  # experiment -> embed_dim, depth of the neck, stages that feed it, size-aware loss, attention
    "small": (48, 0.33, [2, 3, 4], False, False),
    "base": (64, 0.67, [2, 3, 4], False, False),
    "3scale_baseline": (32, 0.33, [2, 3, 4], False, False),
    "3scale_sizeaware": (32, 0.33, [2, 3, 4], True, False),
    "3scale_sizeaware_attention": (32, 0.33, [2, 3, 4], True, True),
    "4scale_sizeaware_attention": (32, 0.33, [1, 2, 3, 4], True, True),
}


def test_there_are_no_other_gen4_experiments():
    assert {f"gen4/{name}" for name in GEN4} == {
        o for o in options("experiment") if o.startswith("gen4/") and not o.startswith("gen4/rvt_")
    }


@pytest.mark.parametrize("name", GEN4)
def test_gen4_experiments_have_the_seeds_values(name):
    config, _ = composed("train", f"experiment=gen4/{name}")
    embed_dim, depth, stages, size_aware, attention = GEN4[name]
    assert config.dataset.name == "gen4"
    assert config.model.head.num_classes == 8
    assert len(config.dataset.classes) == 3
    assert config.training.max_steps == 100_000
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-3, 5e-4)
    assert (
        config.model.backbone.embed_dim,
        config.model.fpn.depth,
        config.model.fpn.in_stages,
    ) == (embed_dim, depth, stages)
    assert config.model.head.size_aware_loss is size_aware
    assert config.model.head.size_aware_weight == 2.0
    fpn = config.model.fpn
    assert fpn.enable_small_object_attention is attention
    assert fpn.attention_spatial
    assert fpn.attention_temporal
    assert fpn.temporal_window == 3
    assert fpn.identity_init


@pytest.mark.parametrize(("dataset", "classes"), [("gen4", 3), ("etram", 8)])
@pytest.mark.parametrize(("size", "dim"), [("tiny", 32), ("small", 48), ("base", 64)])
def test_rvt_recipes_have_the_published_values(dataset, classes, size, dim):
    config, choices = composed("train", f"experiment={dataset}/rvt_{size}")
    training, optimizer = config.training, config.optimizer
    assert (choices["size"], config.model.backbone.embed_dim, config.model.head.num_classes) == (
        size,
        dim,
        classes,
    )
    assert config.dataset.name == dataset
    assert len(config.dataset.classes) == classes
    assert not config.model.head.size_aware_loss
    assert not config.model.fpn.enable_small_object_attention
    assert config.model.backbone.ls_init_value == 1e-5
    assert config.model.backbone.forget_bias == 0
    assert (
        training.batch_size * training.gradient_accumulation_steps,
        training.max_steps,
        training.sequence_length,
    ) == (24, 400_000, 5)
    assert (training.sampling, training.precision, training.gradient_clipping) == (
        Sampling.mixed,
        Precision.bf16,
        1.0,
    )
    assert training.ema_decay == 0
    assert (
        training.augmentation.hflip_prob,
        training.augmentation.zoom_prob,
        training.augmentation.zoom_in,
        training.augmentation.zoom_out,
        training.augmentation.zoom_in_fraction,
    ) == (0.5, 0.8, 1.5, 1.2, 0.8)
    assert optimizer.lr == pytest.approx(2e-4 * math.sqrt(24 / 8), rel=2e-3)
    assert optimizer.weight_decay == 0
    assert (optimizer.schedule, optimizer.warmup_fraction) == (Schedule.onecycle, 0.005)
    assert (optimizer.start_factor, optimizer.end_factor) == (1 / 20, 1 / 10_000)
    assert (config.evaluation.confidence_threshold, config.evaluation.nms_threshold) == (
        0.001,
        0.45,
    )
    if dataset == "gen4":  # Prophesee's filters, at half resolution
        assert (config.evaluation.min_side, config.evaluation.min_diagonal) == (10, 30)


def test_the_seeds_keys_stand_in_the_model_files():
    for name, size_aware, attention in (
        ("default", False, False),
        ("size_aware", True, False),
        ("size_aware_attention", True, True),
    ):
        model = composed("train", f"model=maxvit_yolox/{name}")[0].model
        assert model.head.size_aware_loss is size_aware
        assert model.fpn.enable_small_object_attention is attention


def test_gen4_keeps_the_published_label_filters():
    labels = composed("prep", "dataset=gen4")[0].dataset.labels
    assert (labels.class_map, labels.min_side, labels.min_diagonal, labels.max_width_fraction) == (
        {0: 0, 1: 1, 2: 2},
        20,
        60,
        0.9,
    )


# -- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("train", "training.max_step=7"),
        ("train", "+training.max_step=7"),
        ("train", "trainnig.max_steps=7"),
        ("train", "model.fpn.attention_spacial=true"),
        ("train", "model.backbone.embed=32"),
        ("train", "experiment=gen4/smal"),
        ("train", "size=huge"),
        ("train", "deepspeed=zero4"),
        ("train", "datset=gen4"),
        ("prep", "frames.downsampel=2"),
        ("prep", "dataset.labels.min_sides=3"),
        ("prep", "training.max_steps=7"),
        ("evaluate", "evaluation.spilt=val"),
        ("evaluate", "model.head.num_classes=3"),
    ],
)
def test_misspelt_keys_and_options_are_refused(name, override):
    with pytest.raises(
        REFUSED, match=override.lstrip("+").split("=")[0].split(".")[-1] + "|Could not"
    ):
        composed(name, override)


@pytest.mark.parametrize(
    ("name", "overrides", "part"),
    [
        ("train", ["training.max_steps=many"], "max_steps"),
        ("train", ["training.precision=fp8"], "precision"),
        ("train", ["training.batch_size=-1"], "batch_size"),
        ("train", ["model.fpn.in_stages=[3,4]"], "in_stages"),
        ("train", ["model.backbone.embed_dim=33"], "embed_dim"),
        ("train", ["dataset=etram", "model.head.num_classes=3"], "num_classes"),
        ("train", ["deepspeed=zero0", "deepspeed.offload_optimizer=true"], "offload_optimizer"),
        ("prep", ["frames.downsample=3"], "downsample"),
        ("prep", ["dataset=gen4", "dataset.classes=[one]"], "class_map"),
        ("evaluate", ["evaluation.nms_threshold=2"], "nms_threshold"),
    ],
)
def test_impossible_values_are_refused_by_name(name, overrides, part):
    with pytest.raises(REFUSED, match=part):
        composed(name, *overrides)


# -- the package -----------------------------------------------------------------------------------------------------
def test_the_installed_package_finds_it():
    conf = importlib.resources.files("evspan.conf")
    assert all(conf.joinpath(f"{name}.yaml").is_file() for name in PRIMARY)
