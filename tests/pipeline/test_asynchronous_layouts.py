"""On every layout, two ranks that write in threads leave the files of a synchronous save."""

import sys
from pathlib import Path

import pytest
from evspan.launch.local.ranks import run_ranks
from evspan.pipeline.checkpoint_files import find_newest_intact, read_meta
from support.asynchronous_ranks import EVERY, FULL, LAYOUTS, STEPS
from support.small_shards import write_small_shards

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # of one launch, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_small_shards(folder / "shards", {"train": [23, 12, 9], "val": [4]})
    command = ["env", f"PYTHONPATH={ROOT / 'tests'}", sys.executable]
    command += ["-m", "support.asynchronous_ranks", str(folder), *LAYOUTS]
    assert run_ranks(command, 2, threads=1) == 0
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_are_those_of_a_synchronous_save(folder, name):
    runs = [folder / name / kind / "checkpoints" for kind in ("synchronous", "asynchronous")]
    steps = sorted(path.name for path in runs[0].glob("step-*"))
    assert len(steps) == STEPS // EVERY + 1
    assert sorted(path.name for path in runs[1].iterdir()) == ["latest", *steps]
    for step in steps:
        expected, actual = (read_meta(run / step) for run in runs)
        assert expected.files is not None
        assert actual.files == expected.files  # names, sizes and checksums
        assert len(expected.files) >= 5 + LAYOUTS[name].case.ranks - 1
        assert actual.values["counters"] == expected.values["counters"]
        for file in expected.files:
            assert (runs[1] / step / file).read_bytes() == (runs[0] / step / file).read_bytes()
    assert find_newest_intact(folder / name / "asynchronous").message() == ""


def test_a_full_disk_of_one_rank_ends_all_with_one_message(folder):
    """No file of the checkpoint is left."""
    errors = [(folder / f"error-{rank}").read_text() for rank in range(2)]
    temporary = folder / FULL / "checkpoints" / ".writing-step-00000001"
    assert errors[0].startswith(
        f"the checkpoint could not be saved: {temporary}: No space left on device. "
    )
    assert errors[1] == errors[0]
    assert list((folder / FULL / "checkpoints").iterdir()) == []
