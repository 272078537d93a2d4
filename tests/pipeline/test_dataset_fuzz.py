"""Damaged manifests, shards and RVT trees: training reads what was written, or a UserError names the folder."""

import io
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import ShardError, UserError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind
from evspan.data_prep import hdf5_texts
from evspan.data_prep.shards.check import Task, verify_recording
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.rvt_tree import frame_problems, open_recording, recording_folders
from evspan.data_prep.shards.write import stored_in
from evspan.pipeline.data.datasets import Dataset, open_dataset
from support import fuzz
from support.rvt_tree import write_rvt_tree
from support.small_shards import CLASSES, write_small_shards

SHARD = Path("train", "00000.h5")
whole: dict[str, list[bytes]] = {}  # what the undamaged folder gives, by kind
outcomes: Counter[str] = Counter()
ODD = [-1, 0, 1, 2**31, 2**62, 2**63, 10**30, 1.5, None, True, "", "x", "\x1b[2J", [], {}, "../x"]


def content(data: Dataset) -> list[bytes]:
    """All that training reads."""
    values = [repr((data.classes, data.frames, data.height, data.width)).encode()]
    for recording in data.recordings:
        values.append(recording.name.encode("utf-8", "surrogatepass"))
        values += [recording.end_us.tobytes(), recording.labelled.tobytes()]
        values.append(recording.read(0, recording.frames).tobytes())
        values.append(recording.codes(0, recording.frames).code.tobytes())
        values += [boxes.tobytes() for boxes in recording.boxes_of(0, recording.frames)]
    return values


def compared(kind: str, values: list[bytes]) -> bool:
    """Whether the values are those of the undamaged folder; counts what was accepted."""
    same = values == whole.setdefault(kind, values)
    outcomes["same" if same else "changed"] += 1
    return same


# -- shards ----------------------------------------------------------------------------------------
def make_shards(folder: Path) -> None:
    write_small_shards(folder, {"train": [5, 4]}, height=12, width=16)


def check_shards(folder: Path) -> None:
    manifest = load_manifest(folder)
    for entry in manifest.recordings:
        verify_recording(Task(folder, entry, manifest.config, None, "", 2, 0))
    stored_in(folder / SHARD)
    values = content(open_dataset(DatasetConfig(root=str(folder)), "train"))
    assert compared("shards", values), "other values were accepted"


def damage_manifest(folder: Path, rng: np.random.Generator) -> None:
    """Bytes, or a value of the JSON."""
    path = folder / "manifest.json"
    if rng.random() < 0.3:
        fuzz.damage_bytes(folder, fuzz.Kind(make_shards, check_shards, "manifest.json"), rng)
        return
    raw = json.loads(path.read_text())
    target = raw
    for _ in range(int(rng.integers(1, 5))):
        inner = list(target.items()) if isinstance(target, dict) else list(enumerate(target))
        inner = [item for item in inner if isinstance(item[1], dict | list) and item[1]]
        if not inner:
            break
        target = inner[int(rng.integers(len(inner)))][1]
    keys = list(target) if isinstance(target, dict) else list(range(len(target)))
    key = keys[int(rng.integers(len(keys)))]
    change = int(rng.integers(5))
    canary = str(fuzz.canary(folder))
    if change == 0:
        target[key] = ODD[int(rng.integers(len(ODD)))]
    elif change == 1 and isinstance(target, dict):
        del target[key]
    elif change == 2:
        raw["recordings"].append(raw["recordings"][0])
    elif change == 3:
        bad = [canary, "../canary", "train/../../canary", "train/00001.h5", "val/00000.h5", "/x.h5"]
        field = ["shard", "name", "group", "split"][int(rng.integers(4))]
        raw["recordings"][0][field] = bad[int(rng.integers(len(bad)))]
    else:
        target[key] = json.loads("[" * 90 + "]" * 90)
    path.write_text(json.dumps(raw))


def damage_shard(folder: Path, rng: np.random.Generator) -> None:
    """Bytes, or an object of the HDF5 file."""
    path = folder / SHARD
    if rng.random() < 0.6:
        fuzz.damage_bytes(folder, fuzz.Kind(make_shards, check_shards, str(SHARD), 4096), rng)
        return
    if rng.random() < 0.1:
        path.unlink()
        path.symlink_to(fuzz.canary(folder))
        return
    with h5py.File(path, "r+") as file:
        group = file[f"train_00{rng.integers(2)}"]
        names = list(group)
        damage_dataset(folder, group, names[int(rng.integers(len(names)))], rng)


def damage_dataset(folder: Path, group: h5py.Group, name: str, rng: np.random.Generator) -> None:
    canary = str(fuzz.canary(folder))
    old = group[name][:]
    change = int(rng.integers(9))
    if change == 0:
        group[name][int(rng.integers(len(old)))] = (
            np.zeros((), old.dtype) if rng.random() < 0.5 else old[0]
        )
        return
    if change == 1:
        text = "entry" if rng.random() < 0.5 else "config"
        group.attrs[text] = np.bytes_([b"[" * 50_000, b"{}", b"", b"\xff"][int(rng.integers(4))])
        return
    if change == 2:
        group.attrs["frame_shape"] = [2**62, 2**40, 3]
        return
    del group[name]
    if change == 3:
        group[name] = h5py.ExternalLink(canary, "/a")
    elif change == 4:
        group[name] = h5py.SoftLink(f"/{group.name}/{name}")
    elif change == 5:
        size = old.nbytes
        group.create_dataset(name, old.shape, old.dtype, external=[(canary, 0, size)])
    elif change == 6:
        layout = h5py.VirtualLayout(old.shape, old.dtype)
        layout[:] = h5py.VirtualSource(canary, "a", old.shape)
        group.create_virtual_dataset(name, layout)
    elif change == 7:
        group.create_dataset(name, (2**40,), old.dtype, chunks=(2**20,))
    else:
        group[name] = (
            old[:-1]
            if rng.random() < 0.5
            else old.astype("f8" if old.dtype.names is None else old.dtype)
        )


# -- RVT's tree ------------------------------------------------------------------------------------
def make_tree(folder: Path) -> None:
    write_rvt_tree(folder, {"a": 4, "b": 3})


def check_tree(folder: Path) -> None:
    config = DatasetConfig(root=str(folder), kind=DatasetKind.rvt_tree, classes=list(CLASSES))
    values = content(open_dataset(config, "train"))
    for path in recording_folders(folder, "train"):
        frame_problems(open_recording(folder, path, len(CLASSES)))
    compared("tree", values)


def damage_tree(folder: Path, rng: np.random.Generator) -> None:
    """Bytes of a file, its place, or a value of an array."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[int(rng.integers(len(files)))]
    change = int(rng.integers(6))
    if change <= 1:
        path.write_bytes(fuzz.damaged(path.read_bytes(), 200, rng))
    elif change == 2:
        path.unlink()
        if rng.random() < 0.5:
            path.symlink_to(fuzz.canary(folder))
    elif change == 3:
        name = ["stacked_histogram_dt=20_nbins=10", "stacked_histogram_dt=50_nbins=9", "x"]
        frames = next(folder.rglob("stacked_histogram*"))
        frames.rename(frames.with_name(name[int(rng.integers(3))]))
    elif path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            damage_dataset(folder, file, "data", rng)
    elif path.suffix == ".npy":
        np.save(path, damaged_array(np.load(path), rng), allow_pickle=True)
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        name = list(arrays)[int(rng.integers(len(arrays)))]
        if rng.random() < 0.2:
            write_bomb(path)
            return
        arrays[name] = damaged_array(arrays[name], rng)
        np.savez(path, **arrays)


def write_bomb(path: Path) -> None:
    """An archive whose array declares and expands to 300 MiB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (300 << 17,)}
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("labels.npy", "w") as member,
    ):
        member.write(header.getvalue())
        for _ in range(300):
            member.write(b"\0" * (1 << 20))


def damaged_array(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = values.copy()
    at = int(rng.integers(len(out)))
    odd = [-1, 0, 3, 2**31 - 1, 255][int(rng.integers(5))]
    change = int(rng.integers(7))
    if change == 0:
        return out[:-1]
    if change == 1:
        return out[::-1]
    if change == 2:
        return np.array([{"a": 1}] * len(out), object)
    if change == 3:
        return np.concatenate([out, out])
    if out.dtype.names:
        field = out.dtype.names[int(rng.integers(len(out.dtype.names)))]
        nan = np.nan if out.dtype[field].kind == "f" else odd % 256
        out[field][at] = nan if rng.random() < 0.5 else odd % 256
        return out
    out[at] = odd
    return out.astype("f8") if change == 4 else out


KINDS: dict[str, fuzz.Kind] = {
    "manifest": fuzz.Kind(make_shards, check_shards, damage=damage_manifest),
    "shard": fuzz.Kind(make_shards, check_shards, damage=damage_shard),
    "rvt_tree": fuzz.Kind(make_tree, check_tree, damage=damage_tree),
}


def refuse_to_start(*_: object) -> Callable[..., None]:
    """In place of the process that reads texts of earlier versions: a case starts none."""
    raise ShardError("a text of variable length")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_damaged_datasets_are_read_as_written_or_refused() -> None:
    fuzz.run_all(__file__, KINDS, 40)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_datasets(name: str) -> None:
    fuzz.run_many(__file__, KINDS, name)


def test_a_check_notices_other_values(tmp_path: Path) -> None:
    """The campaign's own check can fail."""
    make_shards(tmp_path / "d")
    check_shards(tmp_path / "d")
    write_small_shards(tmp_path / "e", {"train": [5, 4]}, seed=1, height=12, width=16)
    with pytest.raises(AssertionError, match="other values"):
        check_shards(tmp_path / "e")
    (tmp_path / "e" / SHARD).write_bytes(b"")
    with pytest.raises(UserError):
        check_shards(tmp_path / "e")


if __name__ == "__main__":
    hdf5_texts._texts = refuse_to_start  # type: ignore[assignment]
    fuzz.main(KINDS)
    print(f"accepted: {dict(outcomes)}", file=sys.stderr)
