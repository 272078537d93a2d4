"""Step times without waiting for other ranks, and the ranks that are named as slow."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.schema.training import TrainingConfig
from evspan.launch.cli import status
from evspan.launch.local.ranks import run_ranks
from evspan.launch.sweep.rank_times import PARTS
from evspan.pipeline.engine.slow_ranks import (
    RankPlace,
    SlowRanks,
    rank_scalars,
    ratios,
    slowest_part,
)
from evspan.pipeline.engine.step_clock import StepClock, StepPart, StepTimes
from evspan.pipeline.history import read
from evspan.pipeline.metrics_log import read_metrics
from evspan.pipeline.parallel import collective_time
from evspan.pipeline.parallel.collective_time import collective, measure_with, time_collectives
from support import slow_rank_ranks
from support.slow_rank_ranks import DELAY_S, RANKS, STEPS

SHARD_FRAMES = {"train": [23, 12, 9], "val": [12]}
TESTS = Path(__file__).parents[1]
CPU = torch.device("cpu")


def times_of(own_ms: float, **parts: float) -> StepTimes:
    """Steps that all take the same."""
    forward = own_ms - sum(ms for name, ms in parts.items() if name != "exchange")
    step = {StepPart.forward: forward, **{StepPart(name): ms for name, ms in parts.items()}}
    return StepTimes.of([step] * 3)


# -- the clock ---------------------------------------------------------------------------------------
@pytest.fixture
def now(monkeypatch):
    """The host's clock in seconds: a list of one number."""
    time_s = [100.0]
    monkeypatch.setattr("evspan.pipeline.engine.step_clock.time.perf_counter", lambda: time_s[0])
    yield time_s
    measure_with(None)


def test_collectives_are_no_time_of_the_ranks_own(now):
    """Plain sums over a script of a step, with collectives in each part and in each other."""
    clock = StepClock(CPU, log_every=50)
    measure_with(clock)
    script = [
        (StepPart.data, 0.010, 0.0),
        (StepPart.forward, 0.100, 0.030),
        (StepPart.backward, 0.200, 0.500),
        (StepPart.update, 0.020, 0.001),
    ]
    for _ in range(2):
        clock.start_step()
        for part, own_s, exchange_s in script:
            clock.begin(part)
            now[0] += own_s / 2
            with collective():
                now[0] += exchange_s / 2
                with collective():
                    now[0] += exchange_s / 2
            now[0] += own_s / 2
        clock.end_step()
        now[0] += 7.0  # between steps: logs, checkpoints
        with collective():
            now[0] += 3.0
    times = clock.read()
    assert times.steps == 2
    assert times.own_ms == pytest.approx((330.0,) * 3)
    assert times.parts_ms == pytest.approx((10.0, 100.0, 200.0, 20.0, 531.0))
    assert clock.read().steps == 0
    assert math.isnan(clock.read().median_ms)


def test_quantiles_and_medians_are_those_of_the_steps():
    rng = np.random.default_rng(0)
    table = rng.uniform(1, 100, (31, len(StepPart)))
    times = StepTimes.of([dict(zip(StepPart, row, strict=True)) for row in table.tolist()])
    own = sorted(sum(row[:4]) for row in table.tolist())
    assert times.own_ms == pytest.approx((own[3], own[15], own[27]))
    assert times.parts_ms == pytest.approx([sorted(column)[15] for column in table.T.tolist()])
    assert StepTimes.from_numbers(times.to_numbers()) == times


class Event:
    """A CUDA event; the device reaches it when `finished` says so."""

    recorded: list["Event"] = []
    finished = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded.append(self)
        self.index = len(Event.recorded)

    def query(self) -> bool:
        return self.index <= Event.finished

    def elapsed_time(self, end: "Event") -> float:
        assert end.query()  # else CUDA raises
        return 10.0 * (end.index - self.index)


def test_a_gpu_is_measured_in_some_steps_and_never_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", [])
    monkeypatch.setattr(Event, "finished", 0)
    clock = StepClock(torch.device("cuda", 0), log_every=80)
    measured = []
    for step in range(1, 41):
        before = len(Event.recorded)
        clock.start_step()
        for part in (StepPart.data, StepPart.forward, StepPart.backward, StepPart.update):
            clock.begin(part)
        clock.end_step()
        if len(Event.recorded) > before:
            measured.append(step)
    assert measured == [*range(1, 11), 20, 30, 40]
    Event.finished = len(Event.recorded) - 1  # all but the end of the last step
    times = clock.read()
    assert (times.steps, times.median_ms) == (12, 40.0)
    Event.finished += 1
    assert clock.read().steps == 1  # it is not lost


def test_nothing_is_measured_when_it_is_off(now):
    clock = StepClock(CPU, log_every=50, enabled=False)
    clock.start_step()
    clock.begin(StepPart.forward)
    clock.end_step()
    assert clock.read().steps == 0


def test_collectives_of_another_library_are_measured_once(now):
    class Work:
        def wait(self):
            now[0] += 0.25
            return "done"

        def is_completed(self):
            return True

    class Backend:
        def all_reduce(self, x, async_op=False):
            now[0] += 0.5
            return Work() if async_op else x

        def get_rank(self):
            return 3

    backend = Backend()
    time_collectives(backend)
    time_collectives(backend)
    clock = StepClock(CPU, log_every=50)
    measure_with(clock)
    clock.start_step()
    clock.begin(StepPart.update)
    now[0] += 1.0
    assert backend.all_reduce(5) == 5
    work = backend.all_reduce(5, async_op=True)
    now[0] += 2.0
    assert work.is_completed()
    assert work.wait() == "done"
    assert backend.get_rank() == 3
    clock.end_step()
    times = clock.read()
    assert times.part_ms(StepPart.exchange) == pytest.approx(1250.0)
    assert times.part_ms(StepPart.update) == pytest.approx(3000.0)
    measure_with(None)
    assert backend.all_reduce(6) == 6  # without a clock
    assert collective_time._clock is None


# -- which ranks are slow ----------------------------------------------------------------------------
def watch(run_dir: Path, ranks: int, **options) -> SlowRanks:
    places = [RankPlace(rank, f"n{rank // 2}", f"GPU {rank % 2} H100", 10) for rank in range(ranks)]
    options = {"factor": 1.2, "for_steps": 100, "first_step": 1, **options}
    return SlowRanks(run_dir, places, **options)


def slow_events(run_dir: Path) -> list[dict]:
    return [event for event in read(run_dir) if event["event"] == "slow_rank"]


def test_a_rank_is_named_after_a_while_once_and_when_it_is_over(tmp_path, caplog):
    caplog.set_level("INFO", logger="evspan")
    ranks = watch(tmp_path, 4)
    fast = [times_of(100.0, data=5.0, backward=50.0) for _ in range(4)]
    slow = [*fast]
    slow[3] = times_of(150.0, data=45.0, backward=55.0)
    ranks.update(50, slow)
    ranks.update(100, slow)
    assert slow_events(tmp_path) == [{**e} for e in slow_events(tmp_path)][:1]
    assert [event["step"] for event in slow_events(tmp_path)] == [100]
    ranks.update(150, slow)
    assert len(slow_events(tmp_path)) == 1
    row = json.loads((tmp_path / "ranks.json").read_text())["ranks"][3]
    assert (row["slow_since"], row["ratio"]) == (1, 1.5)
    ranks.update(200, fast)
    (event,) = slow_events(tmp_path)
    assert (event["rank"], event["host"], event["part"]) == (3, "n1", "data")
    assert event["message"] == (
        "rank 3 (node n1, GPU 1 H100) is slow: 150 ms per step without waiting for others, "
        "1.50 x the median, most of it in data (+40 ms), since step 1"
    )
    assert caplog.text.count("is slow") == 1
    assert "rank 3 (node n1, GPU 1 H100) is as fast as the others again" in caplog.text
    assert json.loads((tmp_path / "ranks.json").read_text())["ranks"][3]["slow_since"] is None


def test_a_rank_that_is_slow_now_and_then_is_not_named(tmp_path):
    ranks = watch(tmp_path, 4)
    fast = [times_of(100.0)] * 4
    slow = [*fast[:3], times_of(130.0)]
    unmeasured = [StepTimes.of([])] * 4
    for number in range(1, 21):
        ranks.update(20 * number, fast if number % 5 == 0 else slow)
    assert slow_events(tmp_path) == []
    ranks = watch(tmp_path, 4, for_steps=20)
    ranks.update(1, slow)  # the first step compiles and allocates
    ranks.update(10, [*fast[:3], times_of(119.0)])
    ranks.update(60, unmeasured)
    assert slow_events(tmp_path) == []
    off = watch(tmp_path, 4, factor=0.0, for_steps=1)
    off.update(50, slow)
    assert slow_events(tmp_path) == []


def test_ratios_are_to_the_median_of_the_measured_ranks():
    times = [times_of(ms) for ms in (90.0, 100.0, 110.0, 300.0)] + [StepTimes.of([])]
    median = sorted((90.0, 100.0, 110.0, 300.0))
    expected = [ms / ((median[1] + median[2]) / 2) for ms in (90.0, 100.0, 110.0, 300.0)]
    assert ratios(times)[:4] == pytest.approx(expected)
    assert math.isnan(ratios(times)[4])
    assert all(math.isnan(ratio) for ratio in ratios([StepTimes.of([])] * 2))
    part, lost = slowest_part(2, [times_of(9, data=1), times_of(9, data=1), times_of(20, data=2)])
    assert (part, lost) == (StepPart.forward, 10.0)
    scalars = rank_scalars(times[:4])
    assert scalars["ranks/own_ms_max"] == 300.0
    assert scalars["ranks/own_ms_median"] == 105.0
    assert scalars["ranks/slowest_rank"] == 3
    assert rank_scalars(times) == {} == rank_scalars(times[:1])


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"slow_rank_factor": 0.9}, "slow_rank_factor is 0.9; give a factor above 1, or 0"),
        ({"slow_rank_steps": 0}, "slow_rank_steps is 0; give 1 step or more"),
        ({"spike_sigmas": -1}, "spike_sigmas is -1; give standard deviations above 0"),
        ({"spike_window": 1}, "spike_window is 1; give 2 steps or more"),
        ({"peak_tflops": math.inf}, "peak_tflops is inf; give the dense TFLOP/s"),
    ],
)
def test_values_that_cannot_work_are_refused(values, part):
    with pytest.raises(ValueError, match=re.escape(f"training.{part}")):
        TrainingConfig(**values)


# -- a rank that is really slowed down ---------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_rank_that_is_slowed_down_is_named(shards, tmp_path, capsys):
    """Three ranks over gloo. The others wait for the slow one; this is no time of their own."""
    slow_rank, part = 1, "backward"
    run = tmp_path / "run"
    command = [
        *("env", f"PYTHONPATH={TESTS}", "OMP_WAIT_POLICY=PASSIVE"),
        *(sys.executable, "-m", slow_rank_ranks.__name__),
        *(str(shards), str(run), str(slow_rank), part),
    ]
    assert run_ranks(command, RANKS, threads=1) == 0
    delay_ms = 1000 * DELAY_S
    events = slow_events(run)
    assert [event["rank"] for event in events] == [slow_rank]
    assert events[0]["part"] == part
    assert events[0]["ratio"] > 1.2
    capsys.readouterr()
    status.main([str(run), "--ranks", "--json"])
    (of_run,) = json.loads(capsys.readouterr().out)["runs"]
    assert of_run["step"] == STEPS
    ranks = of_run["ranks"]
    assert [rank["rank"] for rank in ranks] == [*range(RANKS)]
    assert ranks[slow_rank]["slow_since"] is not None
    assert ranks[slow_rank]["parts_ms"][part] >= delay_ms
    for rank in ranks:
        if rank["rank"] == slow_rank:
            continue
        assert rank["slow_since"] is None
        assert rank["parts_ms"]["exchange"] > delay_ms / 2  # waits for the slow one
        own = sum(rank["parts_ms"][name] for name in PARTS[:4])
        assert own < sum(ranks[slow_rank]["parts_ms"][name] for name in PARTS[:4]) - delay_ms / 2
    status.main([str(run), "--ranks"])
    output = capsys.readouterr().out
    assert "3 ranks, 1 of them slow" in output
    assert re.search(rf"^ *{slow_rank} .*slow since step \d+$", output, re.M)
    record = read_metrics(run)[-1]
    assert record["slowest_rank"] == slow_rank
    assert record["own_ms_max"] >= delay_ms
    assert 0 < record["mfu"] < 1.5
    assert record["model_tflops_per_s"] > 0


def test_a_run_without_times_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").touch()
    for contents in (None, "[]", '{"ranks": 3}'):
        if contents is not None:
            (tmp_path / "run" / "ranks.json").write_text(contents)
        with pytest.raises(SystemExit):
            status.main([str(tmp_path / "run"), "--ranks"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "ranks.json" in line


def test_runs_of_a_sweep_that_have_not_begun_are_left_out(tmp_path, capsys):
    for name in ("0", "1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").touch()
    with pytest.raises(SystemExit):
        status.main([str(tmp_path), "--ranks"])
    assert "no run in" in capsys.readouterr().err
    for name in ("0", "2"):
        watch(tmp_path / name, 2).update(50, [times_of(100.0)] * 2)
    status.main([str(tmp_path), "--ranks"])
    output = capsys.readouterr().out
    assert re.findall(r"^(\d): step 50, .*: 2 ranks$", output, re.M) == ["0", "2"]


def test_damaged_times_do_no_harm(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "history.jsonl").touch()
    rows = [5, {"rank": "1", "host": "\x1b[2J", "own_ms": [1, "x"], "parts_ms": []}]
    (run / "ranks.json").write_text(json.dumps({"step": None, "ranks": rows}))
    status.main([str(run), "--ranks"])
    assert "\x1b" not in capsys.readouterr().out
