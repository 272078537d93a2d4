"""A run whose checkpoints are damaged resumes from the newest intact one, and reports it."""

import json
import logging
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import ModelConfig
from evspan.launch.slurm.requeue import newest_step
from evspan.launch.sweep.registry import read_runs
from evspan.pipeline.checkpoint_files import (
    DamagedError,
    FileSum,
    checkpoint_name,
    dump_with_checksum,
    find_newest_intact,
    find_weights,
    read_meta,
    read_with_checksum,
    step_names,
)
from evspan.pipeline.engine.checkpoints import Checkpoints, Resumed, Snapshot, load_same_weights
from evspan.pipeline.history import read
from evspan.pipeline.weights import Weights, load_weights
from support.damages import (
    DAMAGES,
    append_bytes,
    empty,
    flip_bit,
    remove,
    swap,
    truncate,
    zero_page,
)

LANES = 4
STEPS = {2: 0.1, 4: 0.3, 6: 0.5}  # step -> AP
NEWEST = "step-00000006"
OLDER = "step-00000004"
PAYLOAD = (
    "meta.json",
    "weights.safetensors",
    "moments.safetensors",
    "lanes-0000-0002.safetensors",
    "lanes-0002-0004.safetensors",
    "rank-0000.safetensors",
    "rank-0001.safetensors",
)


class TwoRanks(Checkpoints):
    """Rank 0 of a world of one, which also writes the files of rank 1."""

    def _write(self, folder: Path, snapshot: Snapshot) -> dict[str, FileSum]:
        assert snapshot.carry is not None
        other = Checkpoints(self.run, rank=1, keep=self.keep)
        halves = [[t.narrow(-4, first, 2) for t in snapshot.carry] for first in (0, 2)]
        files = super()._write(folder, replace(snapshot, lanes=range(2), carry=halves[0]))
        part = replace(snapshot, lanes=range(2, 4), carry=halves[1])
        return files | other._write(folder, part)


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"layer.{i}": torch.randn(40, 40, generator=generator) for i in range(2)}
    return Snapshot(
        {
            "skipped": 0,
            "counters": {"updates": step, "adam_steps": step},
            "config": {"seed": 0},
            "data": {"recordings": [["a", 3, "0"]]},
        },
        Weights(tensors, ModelConfig(), FrameConfig(), ["ball"], step),
        {f"exp_avg/{name}": tensor for name, tensor in tensors.items()},
        range(LANES),
        [torch.full((LANES, 3, 4, 4), float(step))],
    )


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(one_rank, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = TwoRanks(run, rank=0, keep=9)
    with torch.random.fork_rng(devices=[]):
        for step, ap in STEPS.items():
            torch.manual_seed(step)
            checkpoints.save(step, snapshot(step))
            checkpoints.record(step, {"ap": ap})
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def resume(run: Path) -> Resumed | None:
    checkpoints = Checkpoints(run, rank=0, keep=9)
    resumed = checkpoints.resume(range(LANES), lambda folder, meta: None)
    if resumed is not None:
        checkpoints.accept(resumed)
    return resumed


def events(run: Path) -> list[str]:
    return [event["message"] for event in read(run) if event["event"] == "fallback"]


def assert_step(resumed: Resumed | None, step: int) -> None:
    """All that is loaded is what was saved at `step`."""
    assert resumed is not None
    assert resumed.meta["step"] == step
    expected = snapshot(step)
    for name, tensor in expected.weights.tensors.items():
        assert torch.equal(resumed.snapshot.weights[name], tensor)
        assert torch.equal(resumed.snapshot.moments[f"exp_avg/{name}"], tensor)
    assert expected.carry is not None
    assert torch.equal(resumed.snapshot.carry[0], expected.carry[0])
    assert resumed.snapshot.generators is not None


# -- damages -----------------------------------------------------------------------------------
POINTERS = ("latest", "best")


class Case(NamedTuple):
    """A damage of a file; `seed` chooses the place."""

    damage: Any
    file: str
    seed: int = 0


def cases(seeds: int) -> list[Case]:
    files = [*(f"{NEWEST}/{name}" for name in (*PAYLOAD, "metrics.json")), *POINTERS]
    all_cases = []
    for seed in range(seeds):
        for damage in DAMAGES:
            all_cases += [Case(damage, file, seed) for file in files]
    return all_cases


def check_damage(run: Path, case: Case, caplog) -> None:
    """Resumes from the newest intact checkpoint, with one line and one event."""
    path = run / "checkpoints" / case.file
    before = path.read_bytes()
    case.damage(path, random.Random(f"{case.damage.__name__} {case.file} {case.seed}"))
    assert not path.exists() or path.read_bytes() != before
    caplog.clear()
    with caplog.at_level(logging.INFO, "evspan"):
        resumed = resume(run)
    step = 4 if path.name in PAYLOAD else 6
    assert_step(resumed, step)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == events(run), "one line, one event"
    assert len(warnings) == 1
    assert path.name in warnings[0]
    assert "\n" not in warnings[0]
    # What a second start, and other commands, find.
    assert find_newest_intact(run).message() == ""
    assert_step(resume(run), step)
    assert len(events(run)) == 1
    assert (run / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"


QUICK = [
    Case(flip_bit, f"{NEWEST}/meta.json"),
    Case(flip_bit, f"{NEWEST}/moments.safetensors"),
    Case(zero_page, f"{NEWEST}/lanes-0002-0004.safetensors"),
    Case(truncate, f"{NEWEST}/weights.safetensors"),
    Case(remove, f"{NEWEST}/rank-0001.safetensors"),
    Case(empty, f"{NEWEST}/meta.json"),
    Case(swap, f"{NEWEST}/meta.json"),
    Case(swap, f"{NEWEST}/rank-0000.safetensors"),
    Case(append_bytes, f"{NEWEST}/metrics.json"),
    Case(remove, "latest"),
    Case(flip_bit, "latest"),
    Case(swap, "latest"),
    Case(remove, "best"),
    Case(swap, "best"),
]


@pytest.mark.parametrize("case", QUICK, ids=lambda c: f"{c.damage.__name__}-{Path(c.file).name}")
def test_a_damaged_file_is_reported_and_not_used(run, case, caplog):
    check_damage(run, case, caplog)


@pytest.mark.soak
def test_every_damage_of_every_file(saved, tmp_path, caplog):
    """Several places of each, so that any byte of the small files is hit sooner or later."""
    done = 0
    for case in cases(seeds=10):
        shutil.copytree(saved, tmp_path / "run")
        check_damage(tmp_path / "run", case, caplog)
        shutil.rmtree(tmp_path / "run")
        done += 1
    print(f"{done} damages, {done} resumed from the newest intact checkpoint and reported")


def test_every_flipped_bit_of_meta_json_is_noticed(saved, tmp_path):
    data = (saved / "checkpoints" / NEWEST / "meta.json").read_bytes()
    folder = tmp_path / NEWEST
    folder.mkdir()
    last_line = range(len(data) - 40, len(data))
    places = [*range(0, len(data), 7), *last_line]
    problems = set()
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        (folder / "meta.json").write_bytes(flipped)
        with pytest.raises(DamagedError) as raised:
            read_meta(folder)
        problems.add(raised.value.problem)
    assert "does not have the checksum in its last line" in problems
    # The key of the checksum itself was hit: the checksums of the files require one.
    assert "lacks its checksum or those of the other files" in problems


def test_none_of_a_runs_checkpoints_is_intact(run):
    for step in STEPS:
        (run / "checkpoints" / f"step-{step:08d}" / "moments.safetensors").unlink()
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(UserError) as refused:
        resume(run)
    message = str(refused.value)
    assert "has no intact checkpoint" in message
    assert message.count("moments.safetensors is missing") == 3
    assert "\n" not in message
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert newest_step(run) == 0


def test_a_run_whose_checkpoints_are_gone_does_not_start_at_step_0(run):
    for step in STEPS:
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    with pytest.raises(UserError, match=f"latest names {NEWEST}, which is missing"):
        resume(run)
    shutil.rmtree(run / "checkpoints")
    assert resume(run) is None


def test_the_damaged_checkpoint_is_kept_and_not_counted(run):
    (run / "checkpoints" / NEWEST / "weights.safetensors").write_bytes(b"")
    resumed = resume(run)
    assert_step(resumed, 4)
    checkpoints = TwoRanks(run, rank=0, keep=2)
    assert checkpoints.best.name() == OLDER
    checkpoints.save(5, snapshot(5))
    checkpoints.save(6, snapshot(6))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [
        "best",
        "damaged-step-00000006",
        "latest",
        "step-00000004",
        "step-00000005",
        "step-00000006",
    ]
    assert_step(resume(run), 6)
    checkpoints.record(6, {"ap": 0.2})
    assert checkpoints.best.name() == OLDER


def test_all_damaged_ones_before_the_intact_one_are_named(run, caplog):
    (run / "checkpoints" / NEWEST / "meta.json").write_text("[]")
    (run / "checkpoints" / OLDER / "rank-0000.safetensors").unlink()
    assert_step(resume(run), 2)
    (message,) = events(run)
    assert f"{NEWEST} is damaged (meta.json is not a JSON object but an array)" in message
    assert f"{OLDER} is damaged (rank-0000.safetensors is missing)" in message
    assert "step-00000002, the newest intact checkpoint, is used" in message
    assert read_runs(run).runs[0].error == message


def test_tensors_of_another_checkpoint_beside_those_saved_are_noticed(run):
    folder = run / "checkpoints" / NEWEST
    shutil.copy(folder / "lanes-0000-0002.safetensors", folder / "lanes-0000-0004.safetensors")
    assert_step(resume(run), 4)
    assert "lanes-0000-0004.safetensors was not saved with it" in events(run)[0]


def test_another_folder_in_a_checkpoint_is_no_damage(run):
    (run / "checkpoints" / NEWEST / "evaluation-val").mkdir()
    assert_step(resume(run), 6)
    assert events(run) == []


def test_a_checkpoint_that_a_kill_kept_from_being_named_is_used(run):
    (run / "checkpoints" / "latest").write_text(f"{OLDER}\n")
    assert_step(resume(run), 6)
    assert f"latest names {OLDER}, which is older" in events(run)[0]


def test_a_file_that_another_machine_shows_late_is_waited_for(run, monkeypatch):
    lanes = run / "checkpoints" / NEWEST / "lanes-0000-0002.safetensors"
    hidden = run / "hidden"
    lanes.rename(hidden)
    meta = read_meta(lanes.parent)
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            hidden.rename(lanes)

    monkeypatch.setattr("evspan.pipeline.engine.checkpoints.time.sleep", wait)
    other = Checkpoints(run, rank=1, keep=9)
    assert len(other._load(lanes.parent, range(LANES), meta).carry) == 1
    assert len(waits) == 2
    lanes.unlink()
    with pytest.raises(DamagedError, match="lanes-0000-0002.safetensors is missing"):
        other._load(lanes.parent, range(LANES), meta)
    monkeypatch.setattr("evspan.pipeline.engine.checkpoints.time.sleep", pytest.fail)
    with pytest.raises(DamagedError, match="lanes-0000-0002.safetensors is missing"):
        Checkpoints(run, rank=0, keep=9)._load(lanes.parent, range(LANES), meta)


@pytest.mark.parametrize("name", ["../step-00000004/moments.safetensors", "a/b.c", "..", "x\0.y"])
def test_meta_json_names_files_in_its_folder_only(run, name):
    folder = run / "checkpoints" / NEWEST
    values = read_meta(folder).values
    values["files"][name] = {"bytes": 1, "xxh3": "0" * 16}
    (folder / "meta.json").write_bytes(dump_with_checksum(values))
    assert_step(resume(run), 4)
    assert "meta.json has files of another form" in events(run)[0]


@pytest.mark.parametrize("name", ["step-7", "step-000000007", "step-0000000x", "step-00000009.bak"])
def test_other_folders_are_no_checkpoints(run, name):
    shutil.copytree(run / "checkpoints" / NEWEST, run / "checkpoints" / name)
    assert_step(resume(run), 6)
    assert events(run) == []


def test_a_file_that_cannot_be_read_is_not_taken_for_damage(run, monkeypatch):
    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "moments.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    original = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        resume(run)
    assert (run / "checkpoints" / NEWEST).is_dir()


# -- other commands ----------------------------------------------------------------------------
def test_a_run_is_evaluated_from_its_newest_intact_weights(run, caplog, monkeypatch):
    # The tensors are those of no detector.
    monkeypatch.setattr("evspan.pipeline.weights.read_weights", lambda file: file.parent.name)
    monkeypatch.setattr(
        "evspan.pipeline.engine.checkpoints.read_weights", lambda file: file.parent.name
    )
    (run / "checkpoints" / NEWEST / "weights.safetensors").write_bytes(b"x" * 5000)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    for path in (run, run / "checkpoints" / "latest"):
        caplog.clear()
        assert load_weights(path) == OLDER
        (record,) = caplog.records
        assert f"{NEWEST} is damaged (weights.safetensors is cut off" in record.getMessage()
    assert load_same_weights(run, 0) == OLDER
    assert newest_step(run) == 4
    # A command that only reads changes nothing.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names


@pytest.mark.parametrize("damage", [flip_bit, truncate, swap, remove])
@pytest.mark.parametrize("file", ["weights.safetensors", "meta.json"])
def test_a_damaged_checkpoint_that_is_named_is_refused(run, damage, file):
    folder = run / "checkpoints" / NEWEST
    damage(folder / file, random.Random(1))
    for path in (folder, folder / "weights.safetensors", run / "checkpoints" / "best"):
        if path.exists():
            with pytest.raises(UserError, match=f"{NEWEST} is damaged: {file}") as refused:
                load_weights(path)
            with pytest.raises(UserError, match=f"{NEWEST} is damaged: {file}"):
                load_same_weights(path, 0)
            assert "\n" not in str(refused.value)


def test_a_pointer_to_the_best_that_names_nothing_is_refused(run):
    (run / "checkpoints" / "best").write_text("step-00000009\n")
    with pytest.raises(UserError, match="best contains 'step-00000009', which is no checkpoint"):
        load_weights(run / "checkpoints" / "best")


# -- checkpoints of earlier versions -----------------------------------------------------------
def without_checksums(run: Path) -> None:
    for name in ("meta.json", "metrics.json"):
        for path in (run / "checkpoints").glob(f"step-*/{name}"):
            values = json.loads(path.read_text())
            for key in ("xxh3", "files", "data"):
                values.pop(key, None)
            path.write_text(json.dumps(values, indent=1) + "\n")


def test_checkpoints_of_earlier_versions_are_read(run, caplog):
    without_checksums(run)
    assert_step(resume(run), 6)
    assert find_weights(run) == (run / "checkpoints" / NEWEST / "weights.safetensors", "")
    assert events(run) == []
    assert "has no checksums" in caplog.text
    (run / "checkpoints" / NEWEST / "lanes-0000-0002.safetensors").unlink()
    assert_step(resume(run), 4)
    (run / "checkpoints" / OLDER / "meta.json").write_text('{"step": 4, "form": 2}')
    assert_step(resume(run), 2)


def test_what_a_run_before_left_in_its_folder_is_not_resumed(run):
    """Earlier versions left checkpoints of later steps there when a run was started over."""
    without_checksums(run)
    (run / "checkpoints" / "latest").write_text(f"{OLDER}\n")
    assert_step(resume(run), 4)
    assert f"{NEWEST} is newer than latest but has no checksums" in events(run)[0]


def test_the_checksum_of_a_json_file_is_of_its_bytes(tmp_path):
    values = {"step": 3, "text": "ü", "list": [1.5, None]}
    (tmp_path / "a.json").write_bytes(dump_with_checksum(values))
    assert read_with_checksum(tmp_path, "a.json") == (values, True)
    assert json.loads((tmp_path / "a.json").read_text()).keys() == {*values, "xxh3"}
    text = (tmp_path / "a.json").read_text()
    for other in (text.replace("3", "4", 1), text.replace('"step"', ' "step"'), text + "\n"):
        (tmp_path / "a.json").write_text(other)
        with pytest.raises(DamagedError):
            read_with_checksum(tmp_path, "a.json")


def test_best_is_of_the_evaluation_of_the_newest(one_rank, tmp_path):
    checkpoints = TwoRanks(tmp_path, rank=0, keep=2)

    def save(step: int, ap: float | None, evaluation: str) -> None:
        checkpoints.save(step, snapshot(step))
        identity = {"evaluation_id": evaluation} if evaluation else {}
        checkpoints.record(step, {"ap": ap, **identity})

    best = checkpoints.folder / "best"
    save(1, 0.6, "two recordings")
    save(2, 0.3, "all")
    for step, ap in ((3, 0.5), (4, 0.4), (5, 0.2), (6, None)):
        save(step, ap, "all")
        assert best.read_text() == checkpoints.best.name() + "\n" == "step-00000003\n"
    assert step_names(checkpoints.folder) == [checkpoint_name(step) for step in (6, 5, 3)]
    save(7, 0.05, "")  # of an earlier version: comparable with all
    assert checkpoints.best.name() == "step-00000003"
    save(8, 0.1, "two recordings")
    assert checkpoints.best.name() == "step-00000008"
    best.write_text("step-00000003\n")
    resume(tmp_path)
    assert best.read_text() == "step-00000008\n"
    assert (
        "best names step-00000003, whose evaluation is not that of the newest AP"
        in events(tmp_path)[0]
    )
