"""`prep split=0.8,0.1,0.1`: recordings go to train, val and test by the hashes of their names."""

import logging

import numpy as np
import pytest
import xxhash
from evspan.conf.errors import ConfigError, RecordingError, ShardError
from evspan.conf.schema.prep import split_fractions
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.sources import find_sources
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.status import status
from evspan.data_prep.shards.verify import verify
from evspan.launch.cli.prep import main, print_report
from support.prepared import manifest, prep_config

NAMES = [f"drive_{i:02d}" for i in range(12)]


def write_recording(path) -> None:
    rows = "".join(f"{1000 * i},{i % 9},{i % 7},{i % 2}\n" for i in range(100))
    path.write_text("# width 64 height 48\nt,x,y,p\n" + rows)


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in NAMES:
        write_recording(folder / f"{name}.csv")
    return folder


def splits(folder, split: str) -> dict[str, str]:
    return {source.name: source.split for source in find_sources(folder, split)}


def test_the_hash_of_the_name_decides(flat):
    found = splits(flat, "0.6,0.2,0.2")
    for name in NAMES:
        position = xxhash.xxh3_64_intdigest(name.encode()) / 2**64
        expected = ["train", "val", "test"][int(np.searchsorted([0.6, 0.8], position, "right"))]
        assert found[name] == expected
    assert set(found.values()) == {"train", "val", "test"}
    assert splits(flat, "6,2,2") == splits(flat, "[0.6,0.2,0.2]") == found
    assert set(splits(flat, "1,0,0").values()) == {"train"}
    assert set(splits(flat, "0,1,0").values()) == {"val"}


def test_more_recordings_move_none(flat):
    before = splits(flat, "0.6,0.2,0.2")
    for i in range(40, 60):
        write_recording(flat / f"walk_{i}.csv")
    after = splits(flat, "0.6,0.2,0.2")
    assert len(after) == len(before) + 20
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "text", ["0.8,0.2", "a,b,c", "0,0,0", "1,-1,1", "nan,1,1", "1,1,1,1", "1e999,1,1"]
)
def test_other_fractions_are_refused(text, flat):
    with pytest.raises(ConfigError, match=r"give the fractions .* split=0\.8,0\.1,0\.1"):
        prep_config(flat, flat, split=text)


def test_fractions_are_divided_by_their_sum():
    assert split_fractions("") is None
    assert split_fractions("8, 1, 1") == (0.8, 0.1, 0.1)


def test_folders_of_splits_are_not_assigned(flat):
    (flat / "train").mkdir()
    with pytest.raises(RecordingError, match=r"has folders train/, val/, test/.* Leave split= out"):
        find_sources(flat, "0.8,0.1,0.1")


def test_a_list_without_splits_is_assigned(flat):
    listed = flat.parent / "list.txt"
    listed.write_text("".join(f"flat/{name}.csv -\n" for name in NAMES[:5]))
    found = splits(listed, "0.6,0.2,0.2")
    assert found == {name: splits(flat, "0.6,0.2,0.2")[name] for name in NAMES[:5]}
    listed.write_text("train flat/drive_00.csv\n")
    with pytest.raises(RecordingError, match=r"line 1: it names a split"):
        find_sources(listed, "0.8,0.1,0.1")


def test_the_assignment_is_stored_and_another_one_is_noticed(flat, tmp_path, capsys):
    output = tmp_path / "out"
    print_report("out", prepare(prep_config(flat, output, split="0.6,0.2,0.2")), 1.0)
    text = capsys.readouterr().out
    found = splits(flat, "0.6,0.2,0.2")
    for split in ("train", "val", "test"):
        names = sorted(name for name in NAMES if found[name] == split)
        assert f"split=0.6,0.2,0.2, {split}: {len(names)} ({', '.join(names)})" in text
    stored = load_manifest(output)
    assert stored.split_fractions == "0.6,0.2,0.2"
    assert {r.name: r.split for r in stored.recordings} == found
    before = manifest(output)
    for other in ("0.2,0.2,0.6", ""):
        with pytest.raises(ShardError, match=r"with split=0\.6,0\.2,0\.2; .* would move \d+ rec"):
            prepare(prep_config(flat, output, split=other))
    assert manifest(output) == before
    assert prepare(prep_config(flat, output, split="6,2,2")).prepared == {}
    assert status(output, flat).complete
    assert not verify(output, flat, sample=1, processes=1).damaged
    moved = prepare(prep_config(flat, output, split="0.2,0.2,0.6", allow_removal=True))
    assert {r.name: r.split for r in moved.manifest.recordings} == splits(flat, "0.2,0.2,0.6")


def test_the_command_takes_the_fractions_as_they_are(capsys):
    main(["source=flat", "output=out", "split=0.8,0.1,0.1", "--cfg", "job"])
    assert "split: 0.8,0.1,0.1" in capsys.readouterr().out


def test_an_empty_split_is_reported(tmp_path, caplog):
    folder = tmp_path / "flat"
    folder.mkdir()
    write_recording(folder / "only.csv")
    with caplog.at_level(logging.WARNING):
        prepare(prep_config(folder, tmp_path / "out", split="0.8,0.1,0.1"))
    assert caplog.text.count("assigns none of 1 recording to") == 2
    assert "source=LIST.txt" in caplog.text
