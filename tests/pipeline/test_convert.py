"""`evspan convert` and `load_detector`: inferred models, exact round trips, errors, hostile files."""

import collections
import os
import pathlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DownsampleBy, FrameConfig, FrameMode
from evspan.conf.schema.training import BackboneConfig, FpnConfig, ModelConfig
from evspan.launch.cli.convert import main
from evspan.pipeline import load_detector
from evspan.pipeline.engine.checkpoints import load_same_weights
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights, load_weights, save_weights
from omegaconf import OmegaConf
from support.one_rank import open_one_rank
from support.rvt_checkpoints import SIZES, model_of, publish, random_tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[k].dtype == expected[k].dtype
        and actual[k].shape == expected[k].shape
        and actual[k].numpy().tobytes() == expected[k].numpy().tobytes()
        for k in expected
    )


def refused(capfd, *argv) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    out, err = capfd.readouterr()
    assert end.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, (
        err
    )
    return err


def rvt_reads(path: Path) -> dict[str, torch.Tensor]:
    return {
        k.removeprefix("mdl."): t
        for k, t in torch.load(path, weights_only=True)["state_dict"].items()
    }


# -- there and back ------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
def test_a_published_checkpoint_is_recognised_and_comes_back_bit_for_bit(size, tmp_path, capfd):
    model = model_of(size)
    tensors = random_tensors(model)
    ours, back = tmp_path / "x.safetensors", tmp_path / "back.ckpt"
    main([str(publish(tmp_path / "x.ckpt", tensors)), str(ours)])
    assert f"{size} (embed_dim" in capfd.readouterr().out
    weights = load_weights(ours)
    assert weights.model == model
    assert weights.step == 400_000
    assert same(weights.tensors, tensors)
    assert weights.frames == FrameConfig(mode=FrameMode.rvt)
    assert weights.frames.downsample == 2
    assert weights.classes == ["pedestrian", "two_wheeler", "car"]
    main([str(ours), str(back)])
    assert same(rvt_reads(back), tensors)
    assert all(
        name.startswith("mdl.") for name in torch.load(back, weights_only=True)["state_dict"]
    )
    assert {p.name for p in tmp_path.iterdir()} == {"x.ckpt", "x.safetensors", "back.ckpt"}


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (model_of("micro", 8, dws_conv=True, fpn={"in_stages": [1, 2, 3, 4]}), 10),
        (
            model_of(
                "micro", 3, num_blocks=[2, 1, 1, 2], fpn={"enable_small_object_attention": True}
            ),
            20,
        ),
        (
            model_of(
                "micro",
                1,
                dim_multiplier=[1, 2, 4, 6],
                mlp_ratio=2,
                fpn={
                    "enable_small_object_attention": True,
                    "attention_spatial": False,
                    "temporal_window": 4,
                },
            ),
            20,
        ),
        (
            model_of(
                "micro",
                3,
                fpn={
                    "enable_small_object_attention": True,
                    "attention_temporal": False,
                    "identity_init": False,
                    "in_stages": [1, 2, 3, 4],
                },
            ),
            6,
        ),
        (
            model_of(
                "micro",
                3,
                fpn={
                    "enable_small_object_attention": True,
                    "attention_spatial": False,
                    "attention_temporal": False,
                },
            ),
            20,
        ),
    ],
    ids=["dws 4 scales", "attention", "odd widths", "published attention", "channel attention"],
)
def test_parts_that_are_on_are_recognised(model, channels, tmp_path):
    main(
        [
            str(publish(tmp_path / "x.ckpt", random_tensors(model, channels))),
            str(tmp_path / "x.safetensors"),
        ]
    )
    weights = load_weights(tmp_path / "x.safetensors")
    assert weights.model == model
    assert weights.frames.bins == channels // 2
    assert load_detector(tmp_path / "x.ckpt").config == model


def test_a_run_loses_nothing_on_the_way_to_rvt_and_back(tmp_path):
    """Also for values that no tensor shows; dim_head 4 is that of no size."""
    model = model_of("micro", 4, fpn={"enable_small_object_attention": True})
    model.backbone.dim_head, model.head.size_aware_loss, model.postprocess.nms_threshold = (
        4,
        True,
        0.6,
    )
    frames = FrameConfig(downsample=4, bins=5, window_ms=20, downsample_by=DownsampleBy.nearest)
    weights = Weights(
        random_tensors(model, 10), model, frames, ["a", "b"], 12
    )  # two of the head's four
    step = tmp_path / "run" / "checkpoints" / "step-00000012"
    step.mkdir(parents=True)
    save_weights(step / "weights.safetensors", weights)
    (step / "meta.json").write_text('{"step": 12, "config": {}}')
    (step.parent / "latest").write_text("step-00000012\n")
    main([str(tmp_path / "run"), str(tmp_path / "x.ckpt")])
    main([str(tmp_path / "x.ckpt"), str(tmp_path / "x.safetensors")])
    assert (tmp_path / "x.safetensors").read_bytes() == (step / "weights.safetensors").read_bytes()
    back = load_weights(tmp_path / "x.safetensors")
    assert (back.model, back.frames, back.classes, back.step) == (model, frames, ["a", "b"], 12)


def test_the_published_names_are_tinys(parity_dir, tmp_path):
    tensors = {}
    for line in (parity_dir / "rvt_tiny_gen4_state_dict.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, shape, kind = line.split("\t")
            tensors[name] = torch.ones(
                [int(n) for n in re.findall(r"\d+", shape)],
                dtype=getattr(torch, kind.split(".")[1]),
            )
    main([str(publish(tmp_path / "x.ckpt", tensors)), str(tmp_path / "x.safetensors")])
    weights = load_weights(tmp_path / "x.safetensors")
    assert weights.model == model_of("tiny")
    assert same(weights.tensors, tensors)


def test_two_classes_are_gen1(tmp_path):
    source, out = (
        publish(tmp_path / "x.ckpt", random_tensors(model_of("micro", 2))),
        tmp_path / "x.safetensors",
    )
    main([str(source), str(out)])
    weights = load_weights(out)
    assert weights.classes == ["car", "pedestrian"]
    assert weights.frames.downsample == 1
    assert weights.model.backbone.partition_split_32 == 1
    main([str(source), str(out), "--overwrite", "--dataset", "gen4", "--classes", "left,right"])
    weights = load_weights(out)
    assert weights.classes == ["left", "right"]
    assert weights.frames.downsample == 2
    assert weights.model.backbone.partition_split_32 == 2


def test_options_give_what_weights_do_not_show(tmp_path):
    model = model_of("micro", 5)
    source, out = publish(tmp_path / "x.ckpt", random_tensors(model)), tmp_path / "x.safetensors"
    main([str(source), str(out)])
    assert load_weights(out).classes == [f"class_{i}" for i in range(5)]
    options = [
        "--classes",
        "a,b,c,d,e",
        "--downsample",
        "4",
        "--mode",
        "exact",
        "--window-ms",
        "20",
        "--dim-head",
        "16",
    ]
    main([str(source), str(out), "--overwrite", *options])
    weights = load_weights(out)
    assert weights.classes == list("abcde")
    assert weights.model.backbone.dim_head == 16
    assert weights.frames == FrameConfig(
        mode=FrameMode.exact, downsample=4, window_ms=20, downsample_by=DownsampleBy.nearest
    )
    main(
        [str(out), str(out), "--overwrite", "--classes", "v,w,x,y,z"]
    )  # the rest is as in the file
    again = load_weights(out)
    assert again.classes == list("vwxyz")
    assert again.frames == weights.frames
    assert again.model == weights.model


def test_a_width_of_no_size_needs_its_dim_head(tmp_path, capfd):
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=24, dim_head=12), fpn=FpnConfig(depth=0.67)
    )
    source, out = publish(tmp_path / "x.ckpt", random_tensors(model)), tmp_path / "x.safetensors"
    assert (
        "embed_dim is 24, which no preset in conf/size has (base, micro, small, tiny)"
        in refused(capfd, source, out)
    )
    main([str(source), str(out), "--dim-head", "12"])
    assert load_weights(out).model == model


# -- numbers ------------------------------------------------------------
@pytest.mark.parametrize("direct", [False, True], ids=["converted", "as published"])
def test_load_detector_gives_the_published_numbers(parity_dir, tmp_path, direct):
    folder = parity_dir / "parity_small"
    source = publish(
        tmp_path / "x.ckpt",
        {k: torch.from_numpy(v) for k, v in np.load(folder / "weights.npz").items()},
    )
    if not direct:
        main([str(source), str(tmp_path / "x.safetensors")])
        source = tmp_path / "x.safetensors"
    detector = load_detector(source)
    assert not detector.training
    assert detector.classes == ["pedestrian", "two_wheeler", "car"]
    assert detector.frames == FrameConfig(mode=FrameMode.rvt)
    frames = torch.from_numpy(np.load(folder / "eval_input.npz")["events_uint8"])
    wanted, state = (
        np.load(folder / "eval_outputs.npz"),
        detector.initial_state(1, *frames.shape[-2:]),
    )
    with torch.inference_mode():
        for t, frame in enumerate(frames):
            decoded, state = detector.step(frame, state)
            expected = wanted[f"t{t}.decoded"]
            np.testing.assert_allclose(decoded[..., 4:], expected[..., 4:], rtol=0, atol=1e-4)
            np.testing.assert_allclose(
                decoded[..., :4], expected[..., :4], rtol=1e-5, atol=1e-3
            )  # pixels; float noise is 4e-4


def test_the_readmes_example_runs(tmp_path, monkeypatch, capfd):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "pipeline" / "README.md").read_text(), re.DOTALL
    )
    block = next(b for b in blocks if "rvt-t.ckpt" in b)
    monkeypatch.chdir(tmp_path)
    tensors = random_tensors(model_of("micro"))
    for name in tensors:  # boxes of moderate size, surely there
        if name.startswith("yolox_head.") and "_preds" in name:
            tensors[name] = torch.zeros_like(tensors[name]) + (
                2.0 if name.endswith("bias") and "reg" not in name else 0.0
            )
    publish(tmp_path / "rvt-t.ckpt", tensors)
    frames = torch.randint(0, 10, (2, 1, 20, 360, 640), dtype=torch.uint8)
    names = {"frames": list(frames)}
    exec(compile(block, "README.md", "exec"), names)
    printed = capfd.readouterr().out.splitlines()
    assert printed
    assert all(re.match(r"(pedestrian|two_wheeler|car) 0\.\d+ \(", line) for line in printed)
    assert isinstance(names["detector"], Detector)
    assert names["state"].stages[0].hidden.abs().sum() > 0  # type: ignore[attr-defined]


def test_import_pipeline_loads_no_torch():
    probe = (
        "import sys, evspan.pipeline as p; assert callable(p.load_detector); print(*sys.modules)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    assert not {"torch", "numpy", "omegaconf", "safetensors"} & set(completed.stdout.split())


# -- what else a file holds ------------------------------------------------------------
class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Schedule:
    @staticmethod
    def linear(start, end, share):
        return start + (end - start) * share


class Opaque:
    """Of a module that the reader may not have."""

    __slots__ = ("value",)


def test_what_lightning_stores_next_to_the_tensors_is_ignored(tmp_path):
    config = OmegaConf.create(
        {
            "model": {"name": "rnndet", "dims": [1, 2, {"of": "${model.name}"}]},
            "path": Path("/data"),
        }
    )
    config._metadata.resolver_cache["seen"] = {
        "a": 1
    }  # as custom resolvers leave it: a defaultdict that is not empty
    opaque = Opaque()
    opaque.value = 3  # type: ignore[attr-defined]
    tensors = random_tensors(model_of("micro"))
    source = publish(
        tmp_path / "x.ckpt",
        tensors,
        epoch=3,
        hyper_parameters={"full_config": config},
        optimizer_states=[{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        lr_schedulers=[
            {"anneal_func": Schedule.linear, "mode": FrameMode.rvt}
        ],  # as torch's OneCycleLR: getattr, pickled
        callbacks={
            "ModelCheckpoint": {
                "dirpath": pathlib.Path("/x"),
                "best": np.float64(0.5),
                "seen": collections.deque(),
                "opaque": opaque,
                "kinds": {int, FrameConfig},
                "array": np.arange(3),
            }
        },
    )
    assert "builtins.getattr" in torch.serialization.get_unsafe_globals_in_checkpoint(source)
    main([str(source), str(tmp_path / "x.safetensors")])
    assert same(load_weights(tmp_path / "x.safetensors").tensors, tensors)
    with pytest.raises(
        pickle.UnpicklingError, match="Weights only load failed"
    ):  # it is such a file, and nothing stays allowed
        torch.load(source, weights_only=True)


@pytest.mark.parametrize(
    "function", [os.mkdir, Path.mkdir, exec, eval, subprocess.check_output, os.system]
)
@pytest.mark.parametrize("place", ["beside", "as a tensor", "instead of all"])
def test_nothing_in_a_file_runs(tmp_path, capfd, function, place):
    trap, out = tmp_path / "trap", tmp_path / "x.safetensors"
    argument = {
        "mkdir": str(trap) if function is os.mkdir else trap,
        "check_output": ["mkdir", str(trap)],
        "system": f"mkdir {trap}",
    }.get(function.__name__, f"__import__('os').mkdir({str(trap)!r})")
    runs, tensors, source = (
        Runs(function, argument),
        random_tensors(model_of("micro")),
        tmp_path / "x.ckpt",
    )
    if place == "beside":
        publish(source, tensors, hyper_parameters=runs)
    elif place == "as a tensor":
        publish(source, {**tensors, next(iter(tensors)): runs})
    else:
        torch.save(runs, source)
    blocked = function in (
        os.mkdir,
        os.system,
    )  # torch refuses whatever is of these modules; the rest is made inert
    if place == "beside" and not blocked:
        main([str(source), str(out)])
        assert same(load_weights(out).tensors, tensors)
    else:
        assert ("posix" if blocked else "'state_dict'") in refused(capfd, source, out)
        assert not out.exists()
    assert not trap.exists()
    torch.load(source, weights_only=False)  # the trap is one
    assert trap.exists()


def test_an_evaluation_reads_a_published_checkpoint(tmp_path):
    tensors = random_tensors(model_of("micro"))
    source = publish(tmp_path / "x.ckpt", tensors)
    with open_one_rank():
        weights = load_same_weights(source, 0)
    assert same(weights.tensors, tensors)
    assert weights.classes == ["pedestrian", "two_wheeler", "car"]


# -- refusals ------------------------------------------------------------
def test_a_wrong_file_is_refused_with_some_names(tmp_path, capfd):
    tensors = random_tensors(model_of("micro"))
    head = {k: t for k, t in tensors.items() if k.startswith("yolox_head.stems")}
    wrong = {k: t for k, t in tensors.items() if k not in head} | {
        f"extra.{i}": torch.zeros(i) for i in range(9)
    }
    wrong["backbone.stages.3.lstm.conv1x1.bias"] = torch.zeros(5)
    line = refused(capfd, publish(tmp_path / "x.ckpt", wrong), tmp_path / "x.safetensors")
    assert f"{tmp_path / 'x.ckpt'}: the weights do not fit" in line
    missing, unexpected, shapes = re.search(
        r"(\d+) missing: (.*?); (\d+) unexpected: (.*?); 1 of another shape: (.*)$", line
    ).group(2, 4, 5)
    first = [f"{k} {tuple(head[k].shape)}" for k in sorted(head)[:3]]
    assert missing == ", ".join([*first, "..."])
    assert unexpected == "extra.0 (0,), extra.1 (1,), extra.2 (2,), ..."
    assert len(line) < 800
    assert shapes == "backbone.stages.3.lstm.conv1x1.bias (5,) for (512,)"
    with pytest.raises(UserError, match="9 unexpected: extra.0"):
        load_detector(tmp_path / "x.ckpt")


def test_another_networks_file_is_refused(tmp_path, capfd):
    source = tmp_path / "resnet.ckpt"
    torch.save(
        {"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}},
        source,
    )
    line = refused(capfd, source, tmp_path / "x.safetensors")
    assert "376 missing: backbone.stages.0." in line
    assert "2 unexpected: conv1.weight (64, 3, 7, 7), fc.bias (10,)" in line


def test_model_overrides_what_is_recognised(tmp_path, capfd):
    source = publish(tmp_path / "x.ckpt", random_tensors(model_of("tiny")))
    line = refused(capfd, source, tmp_path / "x.safetensors", "--model", "base")
    assert "missing: fpn.C3_" in line
    assert (
        "backbone.stages.0.downsample_cf2cl.conv.weight (32, 20, 7, 7) for (64, 20, 7, 7)" in line
    )
    assert "choose from" in refused(capfd, source, tmp_path / "x.safetensors", "--model", "huge")
    main([str(source), str(tmp_path / "x.safetensors"), "--model", "tiny"])
    assert load_weights(tmp_path / "x.safetensors").model == model_of("tiny")


def test_files_that_are_no_checkpoint(tmp_path, capfd):
    def error_of(content) -> str:
        source = tmp_path / "x.ckpt"
        if isinstance(content, bytes):
            source.write_bytes(content)
        else:
            torch.save(content, source)
        return refused(capfd, source, tmp_path / "x.safetensors")

    for content in (b"", b"hello"):
        assert "cannot be read as a checkpoint (File is not a zip file). Name a .ckpt" in error_of(
            content
        )
    assert (
        "has no tensors under 'state_dict', as Lightning writes them; it has: model, epoch"
        in error_of({"model": 1, "epoch": 2})
    )
    assert "it has: list" in error_of([1])
    assert "1 of 2 entries under 'state_dict' are no plain tensors: b." in error_of(
        {"state_dict": {"a": torch.ones(1), "b": 3}}
    )
    assert "is no weights file of evspan" in error_of(
        {"state_dict": {"a": torch.ones(1)}, "evspan": "{}"}
    )
    whole = publish(tmp_path / "whole", random_tensors(model_of("micro"))).read_bytes()
    assert "cannot be read" in error_of(whole[: len(whole) // 2])
    middle = len(whole) // 2  # in some tensor
    assert "is damaged: " in error_of(
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"] == []


def test_outputs_that_cannot_be(tmp_path, capfd, monkeypatch):
    source, out = (
        publish(tmp_path / "x.ckpt", random_tensors(model_of("micro"))),
        tmp_path / "x.safetensors",
    )
    assert "--classes" not in refused(capfd, tmp_path / "gone.ckpt", out)
    assert "ends in none of .safetensors, .ckpt" in refused(capfd, source, tmp_path / "x.pth")
    assert "2 classes are named (a, b), but" in refused(capfd, source, out, "--classes", "a,b")
    assert "frames.downsample is 3; choose 1, 2 or 4" in refused(
        capfd, source, out, "--downsample", "3"
    )
    (tmp_path / "folder.ckpt").mkdir()
    assert "is a folder" in refused(capfd, source, tmp_path / "folder.ckpt", "--overwrite")
    before = source.read_bytes()
    assert f"{source} is there. Give another name, or --overwrite" in refused(capfd, source, source)
    assert source.read_bytes() == before

    def full(path, weights):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out.write_bytes(b"what was there")
    monkeypatch.setattr("evspan.pipeline.convert.save_weights", full)
    assert "no space left" in refused(capfd, source, out, "--overwrite")
    assert out.read_bytes() == b"what was there"
    assert {p.suffix for p in tmp_path.iterdir()} == {
        ".ckpt",
        ".safetensors",
    }


def test_other_commands_point_to_convert(tmp_path):
    with pytest.raises(UserError, match="evspan convert, which reads RVT's published .ckpt"):
        load_weights(publish(tmp_path / "x.ckpt", random_tensors(model_of("micro"))))
