"""`evspan export`: the written step, state fed back, against the detector on all frames at once."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import BackboneConfig, FpnConfig, ModelConfig
from evspan.launch.cli.export import main
from evspan.pipeline.inference import exported_step as engine
from evspan.pipeline.inference.export import frame_shape
from evspan.pipeline.inference.options import ExportOptions
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.state import state_tensors
from evspan.pipeline.weights import Weights, load_weights, save_weights
from support.refusals import refused_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BINS, STEPS, CLASSES = 2, 6, ["ball", "box"]
ATTENTION = {"enable_small_object_attention": True}
# name -> (neck, dws_conv, batch, height, width); windows have 36 cells at 192 x 192, where the backbone attends in another way
KINDS = {
    "3scales_attention.onnx": (ATTENTION, False, 1, 190, 192),
    "4scales_attention_dws.onnx": (
        {**ATTENTION, "in_stages": [1, 2, 3, 4], "temporal_window": 4},
        True,
        2,
        64,
        90,
    ),
    "plain.pt2": ({}, False, 2, 60, 96),
}


@pytest.fixture(scope="module", autouse=True)
def threads():
    """One is quickest where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_weights(path: Path, fpn: dict, dws_conv: bool) -> Path:
    """Random; every part matters: LayerScale at 0.5, attention gates open, norms that are not the identity."""
    torch.manual_seed(0)
    backbone = BackboneConfig(
        embed_dim=16, dim_head=8, ls_init_value=0.5, partition_split_32=1, dws_conv=dws_conv
    )
    model = ModelConfig(backbone=backbone, fpn=FpnConfig(**fpn))
    detector, frames = Detector(model, 2 * BINS), FrameConfig(bins=BINS)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if name.endswith(("gate", "gamma")):
                tensor.fill_(0.5)
            if (
                name.startswith(("fpn", "yolox_head")) and tensor.ndim == 4
            ):  # that outputs differ from frame to frame
                tensor *= 0.2 if "reg_preds" in name else 2.5
            if (
                name.startswith(("yolox_head.obj_preds", "yolox_head.cls_preds"))
                and tensor.ndim == 1
            ):
                tensor.zero_()
            if name.endswith(("running_mean", "norm.bias", "bn.bias")):
                tensor.normal_(0, 0.1)
            if name.endswith("running_var"):
                tensor.uniform_(0.7, 1.4)
    save_weights(path, Weights(detector.state_dict(), model, frames, CLASSES, 7))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> its file, written once by the command; the weights are next to it."""
    folder = tmp_path_factory.mktemp("export")

    def file(name: str) -> Path:
        fpn, dws_conv, batch, height, width = KINDS[name]
        path = folder / name
        if not path.exists():
            weights = make_weights(path.with_suffix(".safetensors"), fpn, dws_conv)
            main(
                [
                    str(weights),
                    str(path),
                    "--height",
                    str(height),
                    "--width",
                    str(width),
                    "--batch",
                    str(batch),
                ]
            )
        return path

    return file


def some_frames(*shape: int) -> torch.Tensor:
    return torch.randint(
        0, 11, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def by_onnxruntime(path: Path, frames: torch.Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As a user without this code does it: decoded of every frame, and the last state."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first, *rest = session.get_inputs()
    state, out = [np.zeros(i.shape, np.float32) for i in rest], []
    for frame in frames.numpy():
        decoded, *state = session.run(
            None, {first.name: frame, **dict(zip((i.name for i in rest), state, strict=True))}
        )
        out.append(decoded)
    return out, state


def by_torch(path: Path, frames: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    program = torch.export.load(path)
    step, out = program.module(), []
    state = [
        n.meta["val"] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs
    ][1:]
    state = [torch.zeros(t.shape) for t in state]
    for frame in frames:
        decoded, *state = step(frame, *state)
        out.append(decoded)
    return out, state


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "3scales_attention.onnx",
        pytest.param("4scales_attention_dws.onnx", marks=pytest.mark.soak),
        "plain.pt2",
    ],
)
def test_the_written_step_is_the_detector(exported, name):
    path, (fpn, _, batch, height, width) = exported(name), KINDS[name]
    detector = detector_from(load_weights(path.with_suffix(".safetensors")))
    frames = some_frames(STEPS, batch, 2 * BINS, height, width)
    out, state = (by_onnxruntime if path.suffix == ".onnx" else by_torch)(path, frames)
    with torch.no_grad():
        raw, after = detector(frames, detector.initial_state(batch, height, width))
        wanted = detector.decode(raw, height, width).unflatten(0, (STEPS, batch))
        fresh, _ = detector.step(frames[-1], detector.initial_state(batch, height, width))
    assert len(out[0][0]) == sum(h * w for h, w, _ in detector.geometry(height, width))
    for decoded, expected in zip(out, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(decoded), expected, rtol=1e-4, atol=1e-4)
    for given, expected in zip(state, state_tensors(after), strict=True):
        torch.testing.assert_close(torch.as_tensor(given), expected, rtol=1e-4, atol=1e-4)
    assert len(after.previous) == 2 * (bool(fpn))
    assert (wanted[-1] - fresh).abs().max() > 0.01, "the state matters"
    assert (wanted[-1] - wanted[-2])[..., 4:].abs().max() > 0.001, "and so do the frames"


def test_an_onnx_file_tells_what_it_is(exported):
    path = exported("3scales_attention.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["evspan"])
    assert about["classes"] == CLASSES
    assert about["step"] == 7
    assert about["frames"]["bins"] == BINS
    assert about["postprocess"] == {"confidence_threshold": 0.1, "nms_threshold": 0.45}
    state = [f"stage{i}_{part}" for i in (1, 2, 3, 4) for part in ("hidden", "cell")] + [
        "previous0",
        "previous1",
    ]
    inputs, outputs = session.get_inputs(), session.get_outputs()
    assert [i.name for i in inputs] == about["inputs"] == ["frames", *state]
    assert (
        [o.name for o in outputs] == about["outputs"] == ["decoded", *(f"next_{s}" for s in state)]
    )
    assert (inputs[0].type, inputs[0].shape) == ("tensor(uint8)", [1, 4, 190, 192])
    assert [i.shape for i in inputs[1:]] == [o.shape for o in outputs[1:]]
    assert inputs[-1].shape == [2, 1, 64, 12, 12]
    assert outputs[0].shape == [1, 24 * 24 + 12 * 12 + 6 * 6, 8]


@pytest.mark.slow
def test_a_pt2_file_tells_what_it_is(exported):
    metadata = {"evspan": ""}
    torch.export.load(exported("plain.pt2"), extra_files=metadata)
    about = json.loads(metadata["evspan"])
    assert about["classes"] == CLASSES
    assert about["inputs"][:3] == [
        "frames",
        "stage1_hidden",
        "stage1_cell",
    ]


@pytest.mark.parametrize("name", ["3scales_attention.onnx", "plain.pt2"])
def test_files_keep_to_themselves(exported, name):
    """Exporters note the source line of every operation, and the inputs they were shown."""
    path, here = exported(name), Path(__file__).parents[2]
    content = path.read_bytes()
    assert str(here).encode() not in content
    assert b"site-packages" not in content
    assert len(content) < path.with_suffix(".safetensors").stat().st_size * 1.3
    assert {p.suffix for p in path.parent.iterdir()} <= {".onnx", ".pt2", ".safetensors"}
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("3scales_attention.onnx", "backbone.stages.3.lstm.conv1x1.bias"),
        ("3scales_attention.onnx", "yolox_head.cls_preds.2.bias"),
        ("3scales_attention.onnx", "fpn.small_object_attention_modules.scale_1.spatial.gate"),
        ("plain.pt2", "yolox_head.reg_preds.2.bias"),
    ],
)
def test_the_check_finds_what_is_off(exported, name, part):
    path, (_, _, batch, height, width) = exported(name), KINDS[name]
    run, size = (
        (engine.run_onnx if path.suffix == ".onnx" else engine.run_pt2)(path),
        (batch, 2 * BINS, height, width),
    )
    detector = detector_from(load_weights(path.with_suffix(".safetensors")))
    most = engine.check(run, detector, size, cutoff=10)
    assert most.worst < 0.5 and most.boxes < 1e-2 and most.scores < 1e-4 and most.states < 1e-3, (
        most
    )
    with torch.no_grad():
        detector.get_parameter(part).view(-1)[0] += 0.01
    with pytest.raises(
        UserError, match="differs from the detector over 4 frames.*nothing is written"
    ):
        engine.check(run, detector, size, cutoff=10)


refused = partial(refused_by, main)


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(exported, tmp_path, capsys):
    weights = load_weights(exported("plain.pt2").with_suffix(".safetensors"))
    weights.tensors["yolox_head.obj_preds.0.bias"][0] = float("nan")
    save_weights(tmp_path / "nan.safetensors", weights)
    (tmp_path / "out.pt2").write_text("the one before")
    command = [tmp_path / "nan.safetensors", tmp_path / "out.pt2", "--height", 64, "--width", 64]
    assert "exists already. Give --overwrite" in refused(capsys, *command)
    message = refused(capsys, *command, "--overwrite")
    assert "scores nan" in message
    assert "Export weights whose values are all finite" in message
    assert (tmp_path / "out.pt2").read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("out.onnx --height 64", "give both --height and --width of the frames, or neither"),
        ("out.onnx --height 0 --width 64", "--height is 0; give 1 or more"),
        ("out.onnx --batch 0", "--batch is 0; give 1 or more"),
        ("out.onnx --batch two", "evspan export --help"),
        ("out", "out ends in neither .onnx nor .pt2"),
    ],
)
def test_mistakes(exported, tmp_path, monkeypatch, capsys, arguments, part):
    weights = exported("plain.pt2").with_suffix(".safetensors")
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, weights, *arguments.split())
    assert not list(tmp_path.iterdir())


def test_a_ckpt_is_read_as_a_published_checkpoint(tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(b"hello")
    message = refused(capsys, tmp_path / "x.ckpt", tmp_path / "out.pt2")
    assert "x.ckpt cannot be read as a checkpoint (File is not a zip file)" in message


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_before_anything_else(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, "gone", "out.onnx")
    assert (
        f"needs the package {package}, which is not installed: "
        "pip install '.[export]' in the checkout of Evspan" in message
    )


@pytest.mark.parametrize(
    ("downsample", "size"), [(1, (720, 1280)), (2, (360, 640)), (4, (180, 320))]
)
def test_frames_are_a_gen4_sensors_unless_said(downsample, size):
    options = ExportOptions(Path("run"), Path("out.pt2"), batch=3)
    assert frame_shape(options, FrameConfig(downsample=downsample)) == (3, 20, *size)
