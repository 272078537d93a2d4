"""Flipped bits in shards: training reads what was written, or ends with an error that names the place."""

import re
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import ShardError, UserError
from evspan.conf.schema.prep import DatasetConfig
from evspan.data_prep import hdf5_texts
from evspan.data_prep.shards.status import status
from evspan.data_prep.shards.verify import verify
from evspan.pipeline.data import datasets
from evspan.pipeline.data.datasets import open_dataset
from support.small_shards import write_small_shards

SHARD = Path("train", "00000.h5")
FLIPS = 80


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards") / "d"
    return write_small_shards(root, {"train": [9, 4], "val": [3]}, height=24, width=32)


@pytest.fixture
def mine(small, tmp_path):
    root = tmp_path / "d"
    for path in small.rglob("*.*"):
        (root / path.relative_to(small)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(small)).write_bytes(path.read_bytes())
    return root


def content(root: Path) -> list[np.ndarray]:
    """All that training reads of the split, dense and encoded."""
    values = []
    for recording in open_dataset(DatasetConfig(root=str(root)), "train").recordings:
        frames = recording.frames
        values += [recording.end_us, recording.labelled, recording.box_start]
        values.append(recording.read(0, frames))
        values += recording.codes(0, frames)
        values += recording.boxes_of(0, frames)
    return values


def is_same(values: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Whether all bytes are equal."""
    pairs = zip(values, others, strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.slow
def test_every_flipped_bit_is_noticed_or_changes_nothing(mine):
    whole = content(mine)
    good = (mine / SHARD).read_bytes()
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    rng = np.random.default_rng(0)
    noticed = 0
    for bit in (8 * rng.choice(used, FLIPS) + rng.integers(8, size=FLIPS)).tolist():
        (mine / SHARD).write_bytes(good)
        flip(mine / SHARD, bit)
        try:
            assert is_same(content(mine), whole), f"bit {bit} feeds other values"
        except UserError as error:
            noticed += 1
            assert str(mine / SHARD) in str(error)
            assert "\n" not in str(error)
    assert noticed > 0.8 * FLIPS


def byte_of(path: Path, dataset: str, byte: int) -> int:
    """Where a byte of a contiguous dataset lies in the file."""
    with h5py.File(path, "r", locking=False) as file:
        return file[dataset].id.get_offset() + byte


@pytest.mark.parametrize(
    ("dataset", "byte", "message"),
    [
        (
            "frames",
            40,
            r"recording 'train_000', frame 0 is damaged \(it does not have its checksum",
        ),
        ("boxes", 45, r"recording 'train_000', frame 1 is damaged \(its boxes do not have their"),
        ("labelled", 1, "recording 'train_000' is damaged: .* frames are labelled instead of 4"),
        ("end_us", 0, "frame_start, end_us, .* have the checksum"),
        ("frame_start", 8, "frame_start, end_us, .* have the checksum"),
        ("frame_xxh3", 3, "frame_start, end_us, .* have the checksum"),
    ],
)
def test_the_error_names_recording_frame_and_remedy(mine, dataset, byte, message):
    flip(mine / SHARD, 8 * byte_of(mine / SHARD, f"train_000/{dataset}", byte))
    with pytest.raises(ShardError, match=message) as error:
        content(mine)
    assert re.search("evspan prep verify.* then the same evspan prep again", str(error.value))
    assert verify(mine, processes=1).damaged.keys() == {"train/train_000"}


def test_shards_without_checksums_are_read_and_status_says_so(mine, capsys):
    from evspan.launch.cli.prep_status import main

    whole = content(mine)
    with h5py.File(mine / SHARD, "r+") as file:
        group = file["train_001"]
        del group["frame_xxh3"], group["box_xxh3"], group.attrs["index_xxh3"]
        for name in ("entry", "config"):  # strings of variable length, as earlier versions
            group.attrs[name] = group.attrs[name].decode()
    assert is_same(content(mine), whole)
    assert verify(mine, processes=1).damaged == {}
    found = status(mine)
    assert [key for key, stored in found.stored.items() if not stored.checksums] == [
        "train/train_001"
    ]
    main([str(mine)])
    assert "1 recording without checksums that training verifies" in capsys.readouterr().out


def test_boxes_that_are_read_when_needed_are_verified_too(mine, monkeypatch):
    monkeypatch.setattr(datasets, "BOXES_IN_MEMORY", 0)
    whole = content(mine)
    flip(mine / SHARD, 8 * byte_of(mine / SHARD, "train_000/boxes", 45))
    with pytest.raises(ShardError, match=r"frame 1 is damaged \(its boxes do not have their"):
        content(mine)
    monkeypatch.undo()
    flip(mine / SHARD, 8 * byte_of(mine / SHARD, "train_000/boxes", 45))
    assert is_same(content(mine), whole)


@pytest.mark.parametrize("lost", ["frame_xxh3", "box_xxh3", "index_xxh3"])
def test_one_lost_checksum_is_damage(mine, lost):
    with h5py.File(mine / SHARD, "r+") as file:
        group = file["train_001"]
        del (group.attrs if lost == "index_xxh3" else group)[lost]
    with pytest.raises(ShardError, match=f"recording 'train_001' is damaged: {lost} missing"):
        content(mine)


def test_a_shard_of_another_dataset_is_refused(mine, tmp_path):
    other = write_small_shards(tmp_path / "o", {"train": [9, 4]}, seed=1, height=24, width=32)
    (mine / SHARD).write_bytes((other / SHARD).read_bytes())
    with pytest.raises(
        ShardError, match="recording 'train_000' is damaged: .* the recording's ent"
    ):
        content(mine)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_text_of_an_earlier_version_whose_heap_is_damaged_ends_soon(mine, monkeypatch):
    monkeypatch.setattr(hdf5_texts, "FILE_SECONDS", 1)
    with h5py.File(mine / SHARD, "r+") as file:
        for group in file.values():
            for name in ("entry", "config"):
                group.attrs[name] = group.attrs[name].decode()
    data = bytearray((mine / SHARD).read_bytes())
    heap = data.index(b"GCOL") + 16  # after its signature, version and size: its objects
    data[heap : heap + 4096] = bytes(4096)
    (mine / SHARD).write_bytes(data)
    start = time.monotonic()
    report = verify(mine, processes=1)
    assert time.monotonic() - start < 60
    assert "train/train_000" in report.damaged
    assert "attribute" in report.damaged["train/train_000"]
