"""The benchmarks' version of RVT's preparation gives the output of RVT's own script."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import rvt_way
from support.rvt_tree import assert_same_tree


@pytest.mark.slow
def test_gives_the_published_output(tmp_path, parity_dir):
    rvt_way.prepare(parity_dir / "prep_fixture" / "input", tmp_path / "out")
    assert_same_tree(tmp_path / "out", parity_dir / "prep_fixture" / "output")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_give_the_same(tmp_path, parity_dir):
    source = parity_dir / "prep_fixture" / "input"
    assert rvt_way.prepare(source, tmp_path / "two", processes=2) > 3_000_000
    assert_same_tree(tmp_path / "two", parity_dir / "prep_fixture" / "output")


def test_a_hot_pixel_wraps_and_windows_are_closed_at_both_ends(tmp_path):
    """257 events at one pixel, and one at the seam of two windows."""
    path = tmp_path / "a_td.h5"
    t = np.concatenate((np.full(257, 120_000), [150_000], [200_000]))
    with h5py.File(path, "w") as file:
        for name, column in {
            "t": t,
            "x": np.full(t.size, 3),
            "y": np.full(t.size, 5),
            "p": np.ones(t.size, int),
        }.items():
            file[f"events/{name}"] = column
    out = Path(tmp_path / "out.h5")
    ends = np.array([150_000, 200_000])
    assert rvt_way.write_frames(path, out, ends) == 260  # the event at 150,000 counts twice
    with h5py.File(out) as file:
        frames = file["data"][:]
    assert frames[0].sum() == 1 + 1
    assert frames[0, 10, 2, 1] == 1
    assert frames[0, 19, 2, 1] == 1
    assert frames[1].sum() == 2
    assert frames[1, 10, 2, 1] == 1
