"""Damaged labels of other tools: imported, or refused with a UserError that names the file."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from evspan.data_prep.labels.box_files import RAW_BOX, read_labels, write_boxes
from evspan.data_prep.labels.interchange.exporting import ExportOptions, export_labels
from evspan.data_prep.labels.interchange.formats import FORMATS
from evspan.data_prep.labels.interchange.importing import ImportOptions, import_labels
from evspan.data_prep.labels.interchange.timing import Timing
from support import fuzz

WORDS = [
    *("0", "-1", "1e400", "nan", "inf", "1e30", "99999999999999999999", "0x10", "", "null", "true"),
    *("[]", "{}", '"a"', "[[[[[[[]]]]]]]", "../../x", "/etc/passwd", "\u202e", "a\tb", "\x1b[2J"),
    *("<a>", "<!DOCTYPE a>", '<!DOCTYPE a [<!ENTITY b SYSTEM "canary">]>', "&b;", "&#0;", "]]>"),
    *("*a", "&a 1", "!!python/object:os.system", "a" * 300, ",", "\n", "1 2 3", "drive_9us.png"),
]
TOKEN = re.compile(rb"[A-Za-z0-9_.\-]+")


def make(name: str, folder: Path) -> None:
    """An export of two recordings in the format, in `labels`."""
    rng = np.random.default_rng(5)
    boxes = folder / "boxes"
    boxes.mkdir()
    (boxes / "classes.txt").write_text("car\nperson\n")
    for recording in ("drive", "b"):
        rows = np.zeros(8, RAW_BOX)
        rows["t"] = np.sort(rng.choice(20, 8)) * 50_000
        for side in "xywh":
            rows[side] = rng.uniform(1, 90, 8)
        rows["class_id"] = rng.integers(0, 2, 8)
        rows["track_id"] = np.arange(8) + 1
        rows["class_confidence"] = 1
        write_boxes(boxes / f"{recording}_bbox.npy", rows[:6], rows[6:])
    options = ExportOptions(source=boxes, out=folder / "labels", format=name, size=(200, 100))
    export_labels(options)


def damage(folder: Path, rng: np.random.Generator) -> None:
    """Replaces words of a file, or damages its bytes, or makes a link of it."""
    files = sorted(path for path in (folder / "labels").rglob("*") if path.is_file())
    path = files[int(rng.integers(len(files)))]
    kind = rng.random()
    data = path.read_bytes()
    if kind < 0.03:
        path.unlink()
        os.symlink(rng.choice(["gone", "..", "/dev/zero", str(folder)]), path)
    elif kind < 0.05:
        os.mkfifo(path.with_name(f"z_{path.name}"))  # restored by its name
    elif kind < 0.4:
        path.write_bytes(fuzz.damaged(data, 300, rng))
    else:
        for _ in range(int(rng.integers(1, 4))):
            tokens = list(TOKEN.finditer(data))
            if tokens:
                token = tokens[int(rng.integers(len(tokens)))]
                word = WORDS[int(rng.integers(len(WORDS)))].encode()
                data = data[: token.start()] + word + data[token.end() :]
        path.write_bytes(data)


def check(name: str, folder: Path) -> None:
    """Imports with a period, since a damaged name may be that of a numbered frame."""
    out = folder / "out"
    options = ImportOptions(
        labels=folder / "labels", out=out, format=name, timing=Timing(50_000), size=(200, 100)
    )
    summary = import_labels(options)
    assert {path.parent for path in summary.files} == {out}
    for path in summary.files:
        rows = read_labels(path)
        for boxes in rows:
            assert all(np.isfinite(boxes[side]).all() for side in "xywh")
            assert (boxes["x"] >= 0).all() and (boxes["x"] + boxes["w"] < 200.01).all()


KINDS = {
    name: fuzz.Kind(
        make=lambda folder, name=name: make(name, folder),  # type: ignore[misc]  # bound here
        check=lambda folder, name=name: check(name, folder),  # type: ignore[misc]  # bound here
        damage=damage,
    )
    for name in FORMATS
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_damaged_labels_are_imported_or_refused():
    fuzz.run_all(__file__, KINDS, 20)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_labels_are_imported_or_refused(kind):
    fuzz.run_many(__file__, KINDS, kind)


if __name__ == "__main__":
    fuzz.main(KINDS)
