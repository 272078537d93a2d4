"""Damaged and hostile weights files, RVT checkpoints and run folders: read, or refused in one line."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    TrainConfig,
)
from evspan.pipeline import history, load_detector
from evspan.pipeline.checkpoint_files import META, find_newest_intact, read_meta
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights, load_weights, read_description, save_weights
from support import fuzz
from support.rvt_checkpoints import publish

MODEL = ModelConfig(
    backbone=BackboneConfig(embed_dim=8, dim_head=8, partition_split_32=1),
    fpn=FpnConfig(enable_small_object_attention=True),
    head=HeadConfig(num_classes=2),
)
FRAMES = FrameConfig(bins=2)
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    10**6,
    2**31,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 2000,
    "\x1b[2J\n",
    "../../canary",
    [],
    [10**9] * 4,
    [[[]]],
    {},
    {"a": 1},
]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Detector(MODEL, FRAMES.channels).state_dict()


def some_weights() -> Weights:
    return Weights(tensors(), MODEL, FRAMES, ["a", "b"], 7)


def any_of(rng: np.random.Generator, values: list[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def change_json(values: Any, rng: np.random.Generator) -> Any:
    """Replaces, removes or adds a value somewhere in JSON values."""
    if isinstance(values, dict) and values and rng.random() < 0.85:
        key = any_of(rng, list(values))
        change = rng.random()
        if change < 0.1:
            return {k: v for k, v in values.items() if k != key}
        if change < 0.2:
            return {**values, str(any_of(rng, HOSTILE)): any_of(rng, HOSTILE)}
        return {**values, key: change_json(values[key], rng)}
    if isinstance(values, list) and values and rng.random() < 0.6:
        i = int(rng.integers(len(values)))
        return [*values[:i], change_json(values[i], rng), *values[i + 1 :]]
    return any_of(rng, HOSTILE)


def json_text(values: Any, rng: np.random.Generator) -> str:
    """JSON text, one time in ten nested deeply or with very long numbers."""
    if rng.random() < 0.1:
        return any_of(rng, ["[" * 50_000, '{"a":' * 50_000, "7" * 10_000, "[" * 90 + "]" * 90])
    return json.dumps(values)


# -- weights files ---------------------------------------------------------------------------------
def damage_weights(folder: Path, rng: np.random.Generator) -> None:
    """Half of the cases: bytes. The others: the description, or the header of the tensors."""
    if rng.random() < 0.4:
        fuzz.damage_bytes(folder, KINDS["weights"], rng)
        return
    path = folder / "w.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.7:
        description = json.loads(header["__metadata__"]["evspan"])
        for _ in range(int(rng.integers(1, 3))):
            description = change_json(description, rng)
        header["__metadata__"]["evspan"] = json_text(description, rng)
    else:
        header = change_json(header, rng)
    text = json_text(header, rng) if rng.random() < 0.1 else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data[8 + size :])


def check_weights(folder: Path) -> None:
    path = folder / "w.safetensors"
    read_description(path)
    detector = load_detector(path)
    assert sum(p.numel() for p in detector.parameters()) * 4 <= path.stat().st_size


# -- RVT's checkpoints -----------------------------------------------------------------------------
class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def damage_checkpoint(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "x.ckpt"
    if rng.random() < 0.4:
        fuzz.damage_bytes(folder, KINDS["rvt_ckpt"], rng)
        return
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change = int(rng.integers(6))
    if change == 0:
        other = any_of(rng, [*HOSTILE, Malicious(f"touch {fuzz.canary(folder)}2")])
        key = any_of(rng, ["state_dict", "global_step", "evspan", "callbacks"])
        torch.save({"state_dict": {"mdl.a": torch.ones(3)}, key: other}, path)
        return
    if change == 1:  # views that repeat one value
        size = int(any_of(rng, [10, 10**6, 10**12]))
        name = "mdl.backbone.stages.0.downsample_cf2cl.conv.weight"
        torch.save({"state_dict": {name: torch.ones(1).expand(8, 4, 7, size)}}, path)
        return
    name = any_of(rng, list(records))
    if change == 2:
        records[name] = bytes(fuzz.damaged(records[name], 200, rng))
    elif change == 3:
        records[name] = bytes(int(any_of(rng, [10**4, 10**7])))
    elif change == 4:
        pickled = next(name for name in records if name.endswith("data.pkl"))
        records[pickled] = pickle.dumps(Malicious(f"touch {fuzz.canary(folder)}2"), 2)
    compression = zipfile.ZIP_DEFLATED if change in (3, 5) else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def check_checkpoint(folder: Path) -> None:
    load_detector(folder / "x.ckpt")


# -- run folders -----------------------------------------------------------------------------------
def make_run(folder: Path) -> None:
    save_config(TrainConfig(run_dir="runs/a"), folder / CONFIG_FILE)
    history.append(folder, "start", step=0, of=9, attempt=1, host="a", pid=1, job="7")
    history.append(folder, "running", step=0, seconds=3.0)
    history.append(folder, "fault", step=3, message="x", code=1)
    history.write_progress(folder, {"step": 3, "of": 9, "loss": 1.5})
    checkpoints = folder / "checkpoints"
    step = checkpoints / "step-00000007"
    step.mkdir(parents=True)
    save_weights(step / "weights.safetensors", some_weights())
    meta = {"form": 2, "step": 7, "skipped": 0, "counters": {}, "config": {"training": {}}}
    (step / META).write_text(json.dumps(meta))
    (step / "metrics.json").write_text(json.dumps({"ap": 0.5}))
    (checkpoints / "latest").write_text(step.name + "\n")
    (checkpoints / "best").write_text(step.name + "\n")


YAML_BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a]\n" for i in range(9))
YAMLS = [
    YAML_BOMB,
    "run_dir: !!python/object/apply:os.system [touch x]\n",
    "run_dir: !!python/name:os.system\n",
    "[" * 5000,
    "a: " * 500,
    "- 1\n- 2\n",
    "run_dir: ${oc.env:HOME}\n",
    "training: 7\n",
    "training:\n  max_steps: " + "9" * 5000,
    "? [a]\n: b\n",
    "",
    "\x00",
]


def damage_run(folder: Path, rng: np.random.Generator) -> None:
    if rng.random() < 0.4:
        fuzz.damage_bytes(folder, KINDS["run_folder"], rng)
        return
    checkpoints = folder / "checkpoints"
    change = int(rng.integers(5))
    if change == 0:
        (folder / CONFIG_FILE).write_text(any_of(rng, YAMLS))
    elif change == 1:
        names = ["../../../canary", "..", "", "x" * 5000, "step-00000009", "\x00", "/etc/passwd"]
        (checkpoints / any_of(rng, ["latest", "best"])).write_text(any_of(rng, names))
    elif change == 2:
        path = folder / any_of(rng, [history.PROGRESS, history.HISTORY])
        lines = [json_text(any_of(rng, HOSTILE), rng) for _ in range(3)]
        event = change_json({"event": "start", "time": 1.0, "step": 3, "attempt": 1}, rng)
        path.write_text("\n".join([*lines, json.dumps(event)]))
    else:
        path = checkpoints / "step-00000007" / any_of(rng, [META, "metrics.json"])
        path.write_text(json_text(change_json(json.loads(path.read_text()), rng), rng))


def check_run(folder: Path) -> None:
    """All readers of the pipeline; raises what the first one that refuses raises."""
    readers = (
        lambda: load_config(TrainConfig, folder / CONFIG_FILE),
        lambda: load_weights(folder),
        lambda: load_weights(folder / "checkpoints" / "best"),
        lambda: read_meta(folder / "checkpoints" / "step-00000007"),
        lambda: find_newest_intact(folder, ()).require(),
        lambda: history.read_progress(folder),
        lambda: history.faults_in_a_row(history.read(folder)),
        lambda: history.record_start(folder, 7, 9),
    )
    refusals = []
    for reader in readers:
        try:
            reader()
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


KINDS = {
    "weights": fuzz.Kind(
        make=lambda folder: save_weights(folder / "w.safetensors", some_weights()),
        check=check_weights,
        header=3000,
        damage=damage_weights,
    ),
    "rvt_ckpt": fuzz.Kind(
        make=lambda folder: publish(folder / "x.ckpt", published()),
        check=check_checkpoint,
        header=3000,
        damage=damage_checkpoint,
    ),
    "run_folder": fuzz.Kind(make=make_run, check=check_run, files="**/*", damage=damage_run),
}


def published() -> dict[str, torch.Tensor]:
    """Of a width that a preset has: others need --dim-head."""
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=8), head=HeadConfig(num_classes=3)
    )
    torch.manual_seed(0)
    return Detector(model, 20).state_dict()


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_damaged_files_are_read_or_refused():
    fuzz.run_all(__file__, KINDS, 15, least=0)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused(kind):
    fuzz.run_many(__file__, KINDS, kind)


@pytest.mark.parametrize("text", YAMLS)
def test_a_hostile_config_is_one_error(tmp_path, text):
    (tmp_path / CONFIG_FILE).write_text(text)
    try:
        load_config(TrainConfig, tmp_path / CONFIG_FILE)
    except ConfigError as error:
        assert str(tmp_path) in str(error)
        assert "\n" not in str(error)
    else:
        assert text in ("", YAMLS[6])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embed_dim", 10**6, "embed_dim is 1000000, and the first layer has 8"),
        ("num_blocks", [10**8] * 4, "num_blocks needs 400000000 layers"),
        ("mlp_ratio", 10**6, "mlp_ratio needs width"),
        ("partition_split_32", 10**6, "partition_split_32 is 1000000, at most 64"),
        ("dim_multiplier", [1, 2, 4, 10**5], "embed_dim needs width 800000"),
        ("ls_init_value", float("nan"), "ls_init_value is nan"),
        ("dim_head", "8", "dim_head is of type str"),
        ("forget_bias", True, "forget_bias is of type bool"),
        ("unknown", 1, "unknown is no key"),
    ],
)
def test_a_header_of_a_model_larger_than_its_file_is_refused(tmp_path, key, value, message):
    path = tmp_path / "w.safetensors"
    save_weights(path, some_weights())
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    description = json.loads(header["__metadata__"]["evspan"])
    description["model"]["backbone"][key] = value
    header["__metadata__"]["evspan"] = json.dumps(description)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(UserError, match=message):
        load_weights(path)


if __name__ == "__main__":
    fuzz.main(KINDS)
