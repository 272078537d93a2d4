"""Sources with damaged box files, class names, lists and links: prepared, or refused with a UserError."""

import os
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.schema.prep import DatasetConfig, LabelConfig, PrepConfig, TimeUnit
from evspan.data_prep.labels.box_files import NO_TRACK, RAW_BOX, read_boxes
from evspan.data_prep.labels.checks import label_warnings
from evspan.data_prep.labels.classes import require_named, with_classes
from evspan.data_prep.labels.clock import Span
from evspan.data_prep.labels.filters import filter_boxes
from evspan.data_prep.recordings.sources import find_sources, unused_files
from support import fuzz

NPY_HEADERS = (
    "{'descr': %s, 'fortran_order': False, 'shape': (%s,), }",
    "{'descr': %s, 'fortran_order': True, 'shape': (%s, 1), }",
    "{'descr': %s, 'shape': (%s,), }",
    "__import__('os').system('touch canary') or {'descr': %s, 'shape': (%s,)}",
)
TYPES = (
    "<i8",
    ">i8",
    "<u8",
    "<f8",
    ">f4",
    "<f2",
    "|b1",
    "|O",
    "<U3",
    "|V0",
    "<M8[us]",
    "<c16",
    "|S0",
)
VALUES = (0, -1, 1, 0.5, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), np.nan, np.inf, -np.inf, 1e30)


# -- box files ------------------------------------------------------------------------------------
def write_example(path: Path, n: int = 60) -> None:
    boxes = np.zeros(n, RAW_BOX)
    boxes["t"] = np.arange(n) * 16_666
    boxes["x"], boxes["w"], boxes["h"] = 4, 30, 20
    boxes["class_id"] = np.arange(n) % 3
    np.save(path, boxes)


def damage_boxes(folder: Path, rng: np.random.Generator) -> None:
    """Other types and values of columns, or other headers."""
    path = folder / "a_bbox.npy"
    if rng.random() < 0.3:
        _write_header(path, rng)
        return
    n = int(rng.integers(0, 40))
    columns = {}
    for name in RAW_BOX.names:
        if rng.random() < 0.05:
            continue
        base = rng.integers(0, 4, n) if rng.random() < 0.7 else rng.random(n)
        kind = str(rng.choice(TYPES[:7])) if rng.random() < 0.3 else "<f8"
        with np.errstate(all="ignore"):
            column = np.asarray(base, "f8")
            if n and rng.random() < 0.3:
                column[rng.integers(n)] = rng.choice(np.array(VALUES, "f8"))
            columns[name] = column.astype(kind)
    if rng.random() < 0.1:
        columns = {"ts" if name == "t" else name: column for name, column in columns.items()}
    array = np.zeros(n, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        array[name] = column
    if rng.random() < 0.05:
        np.savez(path.with_suffix(".npz"), boxes=array)
        path.with_suffix(".npz").rename(path)
    else:
        np.save(path, array)


def _write_header(path: Path, rng: np.random.Generator) -> None:
    fields = [(name, str(rng.choice(TYPES))) for name in RAW_BOX.names]
    descr = repr(fields) if rng.random() < 0.8 else repr(str(rng.choice(TYPES)))
    shape = str(rng.choice([0, 1, 60, -1, 10**12, 2**63 - 1, 2**70]))
    text = str(rng.choice(NPY_HEADERS)) % (descr, shape)
    if rng.random() < 0.1:
        text = "(" * int(rng.integers(1, 60_000))
    version = int(rng.choice([1, 2, 3, 9]))
    width = 2 if version == 1 else 4
    header = text.encode()[: 256**width - 1]
    size = len(header).to_bytes(width, "little")
    data = rng.bytes(int(rng.integers(0, 3000)))
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + header + data)


def check_boxes(folder: Path) -> None:
    """What preparing a recording does with its boxes."""
    path = folder / "a_bbox.npy"
    for unit, offset in ((TimeUnit.us, 0), (TimeUnit.ms, -(10**9)), (TimeUnit.ns, 2**40)):
        boxes = read_boxes(path, time_unit=unit, offset_us=offset)
        assert boxes.dtype == RAW_BOX
        assert (np.diff(boxes["t"]) >= 0).all()
        assert (boxes["t"] >= min(0, offset)).all()
        assert all(np.isfinite(boxes[k]).all() for k in ("x", "y", "w", "h", "class_confidence"))
        assert ((boxes["track_id"] < 2**31) | (boxes["track_id"] == NO_TRACK)).all()
        config = LabelConfig(time_unit=unit, offset_us=offset)
        for text in label_warnings(path.name, boxes, Span(0, 1_000_000), config).values():
            assert "\n" not in text
        require_named(path, boxes, LabelConfig(), ["a", "b", "c", "d"])
        kept, dropped = filter_boxes(boxes, config, classes=4, height=50, width=60, split="train")
        assert kept.size + sum(dropped.values()) == boxes.size


# -- sources --------------------------------------------------------------------------------------
def make_source(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split).mkdir()
        (folder / split / "a_td.h5").write_bytes(b"")
        write_example(folder / split / "a_bbox.npy", 4)
    (folder / "classes.txt").write_text("car\nbus\nbike\n")
    (folder / "list.csv").write_text("split,path,boxes\ntrain,train/a_td.h5\nval,val/a_td.h5,-\n")


def damage_source(folder: Path, rng: np.random.Generator) -> None:
    """Damages one of the text files, and adds an entry with an odd name or target."""
    name = str(rng.choice(["classes.txt", "list.csv"]))
    path = folder / name
    path.write_bytes(fuzz.damaged(path.read_bytes(), 64, rng))
    split = os.fsencode(folder / str(rng.choice(["train", "val", "."])))
    stem = bytes(rng.choice([b"_td.h5", b".._td.h5", b"\xff\xfe.raw", b"a\nb.raw", b"\x1b[2J.gz"]))
    odd = split + b"/" + (stem if rng.random() < 0.6 else b"b_td.raw")
    kind = int(rng.integers(5))
    target = rng.choice(["gone", "list.csv", "..", ".", "/dev/zero", "b_td.raw"])
    if kind == 0:
        os.symlink(str(target), odd)
    elif kind == 1:
        os.mkfifo(odd)
    elif kind == 2:
        os.mkdir(odd)
    elif kind == 3:
        open(odd, "wb").close()
    elif rng.random() < 0.3:
        (folder / "classes.txt").unlink()
        os.symlink(str(target), folder / "classes.txt")


def check_source(folder: Path) -> None:
    """What `evspan prep` does before it reads a recording."""
    for source in (folder, folder / "list.csv"):
        sources = find_sources(source)
        assert all("\n" not in line and "\x1b" not in line for line in unused_files(source))
        config = PrepConfig(source=str(source), output=str(folder / "out"), dataset=DatasetConfig())
        with_classes(config, [s.boxes for s in sources if s.boxes])


KINDS = {
    "box_values": fuzz.Kind(
        make=lambda folder: write_example(folder / "a_bbox.npy"),
        check=check_boxes,
        damage=damage_boxes,
    ),
    "source": fuzz.Kind(make=make_source, check=check_source, damage=damage_source),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_damaged_sources_are_read_or_refused():
    fuzz.run_all(__file__, KINDS, 80, least=3)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_sources_are_read_or_refused(kind):
    fuzz.run_many(__file__, KINDS, kind)


if __name__ == "__main__":
    fuzz.main(KINDS)
