"""Where a rank's time goes: parts that add up, records that survive a kill, steps done twice."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from evspan.pipeline.engine import step_report, time_account
from evspan.pipeline.engine.step_report import ThroughputMeter
from evspan.pipeline.engine.time_account import TimeAccount
from evspan.pipeline.time_records import (
    ALLOCATIONS,
    FOLDER,
    Allocation,
    AttemptTime,
    Part,
    read_allocations,
    read_attempts,
    record_allocation,
    record_release,
    steps_reached,
    this_allocation,
)


class Clock:
    """In place of the module `time`: it goes forward only when it is asked to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return 1_700_000_000.0 + self.now

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time_account, "time", fake)
    return fake


def used(account: TimeAccount) -> dict[str, float]:
    return {part.value: seconds for part, seconds in account.seconds().items() if seconds}


def write_to(account: TimeAccount, run: Path, **values) -> None:
    account.write_to(
        run, **{"first_step": 0, "starts_over": False, "ranks": 2, "gpu": False, **values}
    )


def test_every_second_belongs_to_the_innermost_part(clock):
    account = TimeAccount(Part.imports)
    clock.advance(2)
    account.enter(Part.setup)
    clock.advance(3)
    account.start_step(1)
    clock.advance(1)
    with account.part(Part.data_wait):  # of the first step, so of the start
        clock.advance(4)
    account.first_step_ended()
    account.start_step(2)
    with account.part(Part.data_wait):
        clock.advance(5)
    clock.advance(7)
    with account.part(Part.evaluation):
        clock.advance(11)
        with account.part(Part.saving):
            clock.advance(13)
        account.enter(Part.ending)  # holds when the parts around have ended
        clock.advance(17)
    clock.advance(19)
    expected = {
        "imports": 2,
        "setup": 3,
        "first_step": 5,
        "training": 7,
        "data_wait": 5,
        "evaluation": 28,
        "saving": 13,
        "ending": 19,
    }
    assert used(account) == expected


def test_a_part_ends_with_the_error_that_leaves_it(clock):
    account = TimeAccount(Part.training)
    with pytest.raises(ValueError, match="stop"), account.part(Part.saving):
        clock.advance(1)
        raise ValueError("stop")
    clock.advance(2)
    assert used(account) == {"saving": 1, "training": 2}


def test_time_that_is_measured_otherwise_comes_out_of_the_training_since_the_last_time(clock):
    account = TimeAccount(Part.training)
    clock.advance(10)
    account.move_from_training(Part.exchange, 4)
    assert used(account) == {"training": 6, "exchange": 4}
    clock.advance(1)
    account.move_from_training(Part.exchange, 4)  # more than there is
    assert used(account) == {"training": 6, "exchange": 5}


def test_steps_of_an_earlier_attempt_are_repeated_with_all_that_they_wait_for(clock, tmp_path):
    first = TimeAccount()
    write_to(first, tmp_path)
    for step in range(1, 8):
        first.start_step(step)
        clock.advance(1)
        first.end_step(step)
        if step == 1:
            first.first_step_ended()
    first.abandon()
    clock.advance(1)
    second = TimeAccount()
    write_to(second, tmp_path, first_step=4)
    assert second.repeats_until == 7
    for step in range(5, 10):
        second.start_step(step)
        with second.part(Part.data_wait):
            clock.advance(1)
        clock.advance(1)
        second.end_step(step)
        if step == 5:
            second.first_step_ended()
    second.move_from_training(Part.exchange, 0.5)
    second.close()
    assert used(second) == {
        "first_step": 2,
        "repeated": 4,
        "data_wait": 2,
        "training": 1.5,
        "exchange": 0.5,
    }
    clock.advance(1)
    third = TimeAccount()
    write_to(third, tmp_path, starts_over=True)
    third.start_step(1)
    third.end_step(1)
    third.abandon()
    assert third.repeats_until == 0
    records = read_attempts(tmp_path)
    assert [record.step for record in records] == [7, 9, 1]
    assert [record.closed for record in records] == [False, True, False]
    assert [record.part for record in records[:2]] == [Part.training, Part.ending]
    assert steps_reached(records) == 1
    for record in records:
        assert sum(record.seconds.values()) == pytest.approx(record.written - record.start)


def test_the_speed_is_that_of_training_without_evaluations(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_report, "time", clock)
    meter = ThroughputMeter()
    for _ in range(2):  # intervals
        clock.advance(6.0)
        started = clock.perf_counter()
        clock.advance(100.0)  # an evaluation
        meter.add_pause(since=started)
        started = clock.perf_counter()
        clock.advance(2.0)
        meter.add_wait(since=started)
        meter.add_frames(40)
        assert meter.read() == pytest.approx((5.0, 0.25, 8.0))


def test_the_record_is_kept_up_to_date_while_the_rank_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(time_account, "WRITE_EVERY_S", 0.02)
    account = TimeAccount(Part.training)
    write_to(account, tmp_path)
    with account.part(Part.evaluation):  # a kill in here leaves what the thread has written
        deadline = time.monotonic() + 120
        while not read_attempts(tmp_path)[0].seconds.get(Part.evaluation, 0.0) > 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (record,) = read_attempts(tmp_path)
        assert record.part is Part.evaluation
        assert not record.closed
    account.close()
    (record,) = read_attempts(tmp_path)
    assert record.closed
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / FOLDER).write_text("a file")
    account = TimeAccount()
    write_to(account, tmp_path)
    account.close()
    assert len(caplog.messages) == 2  # of reading, and once of writing
    assert "could not be written; the run goes on" in caplog.text
    assert read_attempts(tmp_path) == []
    assert read_allocations(tmp_path) == []


def test_allocations_are_read_without_damaged_lines(tmp_path):
    first = Allocation("12", 90.0, 100.0, 2)
    record_allocation(tmp_path, first)
    path = tmp_path / FOLDER / ALLOCATIONS
    with path.open("a") as file:
        for text in ("{", "[]", '{"job": 3}', '{"event": "allocated", "job": "13", "start": NaN}'):
            file.write(text + "\n")
        file.write('{"event": "released", "job": "12", "sta')  # cut off
    third = Allocation("12", 150.0, 300.0, 2)
    record_allocation(tmp_path, third)
    record_release(tmp_path, first, 149.0)
    record_release(tmp_path, first, 150.5)  # the last one counts
    second = Allocation("14", 0.0, 200.0, 4)
    record_release(tmp_path, second, 201.0)  # no rank had started
    assert read_allocations(tmp_path) == [
        replace(first, end=150.5),
        replace(second, end=201.0),
        third,
    ]


def test_the_allocation_is_that_of_the_batch_script(monkeypatch):
    for name in ("EVSPAN_JOB_START", "EVSPAN_JOB_QUEUED", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert this_allocation(2) is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert this_allocation(2) is None  # a script of the user
    monkeypatch.setenv("EVSPAN_JOB_START", "1764338400")
    monkeypatch.setenv("EVSPAN_JOB_QUEUED", "")  # SLURM's controller did not answer
    assert this_allocation(2) == Allocation("12", 0.0, 1764338400.0, 2)
    monkeypatch.setenv("EVSPAN_JOB_QUEUED", "1764338300")
    assert this_allocation(2) == Allocation("12", 1764338300.0, 1764338400.0, 2)


@pytest.mark.parametrize(
    "damage",
    [
        {"seconds": []},
        {"seconds": {"sleeping": 1}},
        {"seconds": {"training": float("nan")}},
        {"start": -1},
        {"written": 1e300},
        {"part": "sleeping"},
        {"step": "7"},
        {"step": None},
    ],
)
def test_damaged_attempts_are_left_out(tmp_path, damage):
    account = TimeAccount(Part.training)
    write_to(account, tmp_path)
    account.close()
    (path,) = (tmp_path / FOLDER).iterdir()
    (record,) = read_attempts(tmp_path)
    assert isinstance(record, AttemptTime)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    assert read_attempts(tmp_path) == []
    path.write_bytes(b"\xff{")
    assert read_attempts(tmp_path) == []


def test_only_the_first_account_of_a_process_counts_its_imports(monkeypatch):
    monkeypatch.setattr(time_account, "_process_is_counted", False)
    account = TimeAccount(Part.imports, since_process_start=True)
    assert account.seconds()[Part.imports] > 0.2
    again = TimeAccount(Part.imports, since_process_start=True)
    assert again.start > account.start
    assert again.seconds()[Part.imports] < 5
