"""The time of a run over its attempts: written out second by second, and drawn by chance."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from evspan.pipeline.time_records import (
    FOLDER,
    Allocation,
    AttemptTime,
    Part,
    attempt_path,
    record_allocation,
    record_release,
    write_attempt,
)
from evspan.pipeline.time_use import (
    GROUPS,
    RunNow,
    TimeUse,
    read_time_use,
    total_of,
    with_attempt,
)

NOW = RunNow(now=5000.0)


def attempt(run: Path, start: float, part: Part, **values) -> AttemptTime:
    """Writes the record of an attempt. values: seconds by part, or fields of the record."""
    seconds = {p: values.pop(p.value) for p in Part if p.value in values}
    record = AttemptTime(
        start=start,
        written=start + sum(seconds.values()),
        seconds=seconds,
        closed=part is Part.ending,
        part=part,
        first_step=0,
        step=0,
        stepped=0.0,
        starts_over=False,
        job="",
        allocated=0.0,
        ranks=2,
        gpu=False,
        host="n1",
        pid=os.getpid(),
    )
    record = replace(record, **values)
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    write_attempt(attempt_path(run, start), record)
    return record


def used(use: TimeUse) -> dict[str, float]:
    return {part.value: seconds for part, seconds in use.seconds.items() if seconds}


def test_a_job_that_is_killed_requeued_and_done(tmp_path):
    """By hand: queue 10 s, 100 s until a kill, 20 s in the queue, 60 s until the end."""
    first = Allocation("7", 1000.0, 1010.0, 2)
    second = Allocation("7", 1110.0, 1130.0, 2)  # SLURM ends the processes until 1110
    record_allocation(tmp_path, first)
    attempt(
        tmp_path,
        1012.0,
        Part.training,
        job="7",
        allocated=1010.0,
        imports=8.0,
        setup=5.0,
        first_step=5.0,
        training=50.0,
        data_wait=4.0,
        saving=6.0,
        stepped=1088.0,
    )  # written at 1090; the decision to requeue comes at 1110
    record_release(tmp_path, first, 1105.0)
    record_allocation(tmp_path, second)
    attempt(
        tmp_path,
        1133.0,
        Part.ending,
        job="7",
        allocated=1130.0,
        imports=10.0,
        repeated=7.0,
        training=20.0,
        evaluation=11.0,
        ending=1.0,
    )  # closed at 1182
    record_release(tmp_path, second, 1190.0)
    use = read_time_use(tmp_path, NOW)
    assert used(use) == {
        "launch": 2 + 3,
        "imports": 18,
        "setup": 5,
        "first_step": 5,
        "training": 48 + 20,
        "data_wait": 4,
        "saving": 6,
        "repeated": 7,
        "evaluation": 11,
        "idle": 2 + 20,
        "ending": 1 + 8,
    }
    assert use.allocated_s == 100 + 60
    assert use.queue_s == 10 + 20
    assert use.rank_seconds == 2 * 160
    assert use.goodput == 68 / 160
    assert use.groups()["start-up"] == 33
    before = read_time_use(tmp_path, NOW, before=1130.0)
    assert (before.allocated_s, before.queue_s) == (100, 30)
    again = with_attempt(before, {Part.training: 3.0}, 2.0, 2, gpu=False)
    assert (again.allocated_s, again.rank_seconds) == (105, 210)
    total = total_of([use, again])
    assert (total.allocated_s, total.queue_s, total.rank_seconds) == (265, 60, 530)


def test_an_end_that_no_script_could_record(tmp_path):
    """SLURM's own time of the requeue counts, or the last sign of the run."""
    record_allocation(tmp_path, Allocation("7", 0.0, 1000.0, 2))
    attempt(tmp_path, 1004.0, Part.training, job="7", allocated=1000.0, training=20.0)
    lost = read_time_use(tmp_path, NOW)
    assert used(lost) == {"launch": 4, "training": 20}
    sign = read_time_use(tmp_path, replace(NOW, signs=[900.0, 1030.0]))
    assert used(sign) == {"launch": 4, "training": 20, "idle": 6}
    record_allocation(tmp_path, Allocation("7", 1040.0, 1050.0, 2))
    use = read_time_use(tmp_path, replace(NOW, signs=[1030.0]))
    assert used(use) == {"launch": 4, "training": 20, "idle": 16}
    assert use.queue_s == 10
    running = read_time_use(tmp_path, RunNow(1060.0, is_running=True))
    assert used(running) == {"launch": 4 + 10, "training": 20, "idle": 16}


def test_records_after_slurms_time_of_the_requeue(tmp_path):
    """Its times are whole seconds, so the last record may be later: its time counts."""
    first = Allocation("7", 1000.0, 1010.0, 2)
    record_allocation(tmp_path, first)
    attempt(
        tmp_path,
        1014.0,
        Part.training,
        job="7",
        allocated=1010.0,
        training=32.0,
        saving=4.8,
        stepped=1048.8,
    )  # written at 1050.8
    record_release(tmp_path, first, 1050.9)
    record_allocation(tmp_path, Allocation("7", 1050.0, 1056.0, 2))
    use = read_time_use(tmp_path, NOW)
    assert use.queue_s == 10 + 6
    assert use.allocated_s == pytest.approx(40)
    assert used(use) == pytest.approx(
        {"launch": 4 / 1.02, "training": 30 / 1.02, "saving": 4.8 / 1.02, "idle": 2 / 1.02}
    )
    assert use.rank_seconds == pytest.approx(80)


def test_a_run_that_goes_on_or_waits(tmp_path):
    record_allocation(tmp_path, Allocation("7", 990.0, 1000.0, 4))
    attempt(tmp_path, 1001.0, Part.evaluation, job="7", allocated=1000.0, evaluation=9.0, ranks=4)
    running = read_time_use(tmp_path, RunNow(1015.0, is_running=True))
    assert used(running) == {"launch": 1, "evaluation": 14}
    assert running.rank_seconds == 60
    record_release(tmp_path, Allocation("7", 990.0, 1000.0, 4), 1020.0)
    waiting = read_time_use(tmp_path, RunNow(1050.0, queued=1019.0))
    assert used(waiting) == {"launch": 1, "evaluation": 9, "idle": 10}
    assert waiting.queue_s == 10 + 30


def test_attempts_without_a_job_have_their_machine_while_they_live(tmp_path):
    attempt(tmp_path, 1000.0, Part.training, training=20.0, gpu=True)  # killed
    attempt(tmp_path, 2000.0, Part.ending, training=30.0, ending=1.0, job="8")  # inside of salloc
    use = read_time_use(tmp_path, NOW)
    assert used(use) == {"training": 50, "ending": 1}
    assert (use.queue_s, use.rank_seconds, use.gpu) == (0, 102, True)


def test_a_run_without_records(tmp_path):
    use = read_time_use(tmp_path / "nowhere", NOW)
    assert (use.allocated_s, use.goodput, use.rank_hours) == (0, None, 0)


def test_every_part_is_in_one_group():
    grouped = [part for parts in GROUPS.values() for part in parts]
    assert sorted(grouped, key=lambda part: part.value) == sorted(Part, key=lambda p: p.value)


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_add_up_to_the_allocated_time(tmp_path, seed):
    """Attempts that end in any way, with and without a record of their end.

    Requeued in whole seconds, up to one before their last record.
    """
    rng = random.Random(seed)
    now = 1000.0
    allocated = 0.0
    queued = 0.0
    for number in range(rng.randint(1, 8)):
        waits = rng.uniform(0, 50)
        allocation = Allocation("7", now, now + waits, 3)
        queued += waits
        record_allocation(tmp_path, allocation)
        start = allocation.start + rng.uniform(0, 5)
        seconds = {part.value: rng.uniform(0, 40) for part in rng.sample(list(Part), 5)}
        part = Part(rng.choice(list(seconds)))
        ended = start + sum(seconds.values())
        attempt(
            tmp_path,
            start,
            part,
            job="7",
            allocated=allocation.start,
            stepped=ended - rng.uniform(0, 60),
            **seconds,
        )
        now = float(int(ended + rng.uniform(0, 9)))
        if rng.random() < 0.5 or number == 0:
            record_release(tmp_path, allocation, now)
        allocated += now - allocation.start
    record_release(tmp_path, allocation, now)
    use = read_time_use(tmp_path, NOW)
    assert use.allocated_s == pytest.approx(allocated, abs=0.1)
    assert use.rank_seconds == pytest.approx(3 * allocated, abs=0.1)
    assert use.queue_s == pytest.approx(queued, abs=0.1)
    assert min(use.seconds.values()) >= -1e-9
