"""Inputs after public bug reports, among the samples: each is prepared, refused or reported as its README expects."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from evspan.launch.cli.prep import main
from support.prepared import manifest

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    """A folder of recordings and the expected result of preparing it.

    code: exit code. messages: patterns that the output must contain. boxes: of the whole dataset,
    where recordings are prepared.
    """

    folder: str
    code: int
    messages: tuple[str, ...] = ()
    boxes: int = 0


CASES = (
    Case("box-plain", 0, boxes=22),
    Case("box-nan-confidence", 0, boxes=22),
    Case("box-track-minus1", 0, boxes=22),
    Case("box-duplicates", 0, ("22 of 44 boxes are duplicates",), boxes=44),
    Case("box-name-mismatch", 0, ("box files of no recording", "no labelled frame")),
    Case("box-npz", 0, ("a_bbox.npz", "no labelled frame")),
    Case("box-times-ms", 0, ("dataset.labels.time_unit=ms",), boxes=2),
    Case("boxes-relative-events-absolute", 0, (r"14 of 22 .*offset_us=700011",), boxes=8),
    Case("dat-trigger-type", 2, ("triggers",)),
    Case("events-ns-boxes-us", 0, ("likely in ns",), boxes=22),
    Case("evt3-no-time-high", 2, (r"5 of 5 events .*TIME_HIGH",)),
    Case("git-lfs-pointer", 2, ("git lfs pull",)),
    Case("gz", 0, (r"compressed: train/b_td\.dat\.gz",), boxes=4),
    Case("h5-compound-events", 0, ("1280 x 720 is assumed",)),
    Case("h5-dsec", 0, ("640 x 480 is assumed",), boxes=4),
    Case("h5-m3ed", 2, ("prophesee/left/t", "M3ED")),
    Case("h5-types", 2, (r"6 of 16 .*p_0123.* are 0, 1, 2, 3", "p_1_2.* are 1, 2")),
    Case("h5-vds-missing", 2, ("virtual dataset",)),
    Case("hdr-system28-evt2", 0),
    Case("name-dot", 2, ("has no name",)),
    Case("name-not-utf8", 2, (r"caf\\xe9_td\.h5: the file name is not UTF-8",)),
    Case("nested", 0, ("in sub-folders: train/day/b_td.h5 and 1 more",), boxes=4),
    Case("suffix-upper", 0, ("without a box file",), boxes=4),
    Case("symlinks", 2, ("2 links .*gone.h5.*gone.npy", "Nothing was changed")),
    Case("time-one-spike", 0, ("dropped as spikes: 1 event",)),
    Case("time-reset-middle", 2, (r"of 20038 events .*at event 10019",)),
    Case("zero-bytes", 2, ("dat1_td.dat is empty", "h51_td.h5 is empty", "raw1_td.raw is empty")),
)


@pytest.fixture
def case_folder(reported_cases, tmp_path, monkeypatch):
    """Copies a case and runs its make.sh; it becomes the working folder's neighbour."""

    def copy(name: str) -> Path:
        for needed in {name, "box-plain", "symlinks"}:
            shutil.copytree(reported_cases / needed, tmp_path / needed)
        for path in tmp_path.rglob("*"):
            path.chmod(path.stat().st_mode | 0o200)
        folder = tmp_path / name
        if (folder / "make.sh").exists():
            subprocess.run(["bash", "make.sh"], cwd=folder, check=True, timeout=120)
        monkeypatch.chdir(tmp_path)
        return folder

    return copy


@pytest.fixture
def prep(capsys, monkeypatch):
    """`evspan prep` in this process: its exit code and whole output."""

    def call(source: Path, output: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["evspan"])
        code = 0
        try:
            main([f"source={source}", f"output={output}", "dataset=simulated", "processes=1"])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out + err

    return call


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder)
def test_a_reported_input_is_prepared_or_refused(case, case_folder, prep, tmp_path):
    code, output = prep(case_folder(case.folder), tmp_path / "out")
    assert code == case.code, output
    for message in case.messages:
        assert re.search(message, output), output
    if code == 0:
        recordings = manifest(tmp_path / "out")["recordings"]
        assert sum(entry["boxes"] for entry in recordings) == case.boxes


def test_a_disk_that_is_not_mounted_changes_nothing(case_folder, prep, tmp_path):
    folder = case_folder("dangling-rerun")
    output = tmp_path / "out"
    assert prep(folder / "source", output)[0] == 0
    before = (output / "manifest.json").read_bytes()
    for name in ("b.h5", "a.npy"):
        os.rename(folder / "store" / name, tmp_path / name)
        code, message = prep(folder / "source", output)
        os.rename(tmp_path / name, folder / "store" / name)
        assert code == 2
        assert f"-> ../../store/{name}" in message
        assert (output / "manifest.json").read_bytes() == before
    assert "nothing to do" in prep(folder / "source", output)[1]
