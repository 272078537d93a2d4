"""`evspan report`: curves, order, costs, the page, and TensorBoard's HParams."""

import json
import os
import re
import time
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.launch.cli import cancel, logs, report, status
from evspan.launch.sweep.registry import read_runs
from evspan.launch.sweep.report import hparams as hparams_module
from evspan.launch.sweep.report import html
from evspan.launch.sweep.report.curves import Curve, read_curves
from evspan.launch.sweep.report.event_files import Point
from evspan.launch.sweep.report.hparams import hparam_value, trial_names
from evspan.launch.sweep.report.html import CURVE_POINTS, thinned
from evspan.launch.sweep.report.results import InterruptionCost, RunResult, read_results
from evspan.launch.sweep.report.summary import write_report
from evspan.pipeline.history import append
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from evspan.pipeline.time_records import (
    Allocation,
    AttemptTime,
    Part,
    attempt_path,
    record_allocation,
    record_release,
    write_attempt,
)
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.summary.writer.event_file_writer import EventFileWriter

NOW = time.time()
TAGS = ("loss/total", "evaluation/ap")
EVIL = "</title><script>alert('x')</script>&\"\n\033[2J"


def train(
    run: Path, *attempts: range, ap: float, end: str = "done", picture: bool = False, **end_values
) -> Path:
    """A run with losses 10 / step and one evaluation; an attempt starts at the start of its range, 1000 s after the previous one."""
    for number, steps in enumerate(attempts, 1):
        began = NOW - 10_000 + 1000 * number
        append(
            run,
            "start",
            step=steps.start,
            of=100,
            attempt=number,
            host="n1",
            job="",
            pid=os.getpid(),
            time=began,
        )
        append(run, "running", step=steps.start + 1, seconds=9.5, time=began + 10)
        writer = TensorBoardWriter(run, enabled=True, resume_step=steps.start)
        for step in steps:
            assert writer.summary_writer
            writer.summary_writer.add_scalar(
                "loss/total", 10 / (step + 1), step + 1, walltime=began + 10 + step - steps.start
            )
            writer.summary_writer.add_scalar("loss/iou", 1.0, step + 1)
        if picture:
            writer.write_image(
                "training/boxes",
                np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8),
                steps.stop,
            )
        writer.write_scalars({"evaluation/ap": ap * number / len(attempts)}, steps.stop)
        writer.close()
        if number < len(attempts):
            append(run, "requeued", step=attempts[number].start, time=began + 900)
    append(run, end, step=attempts[-1].stop, time=NOW, **end_values)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "metrics.json").write_text(
        json.dumps({"ap": ap, "ap50": ap + 0.1, "ap_small": None})
    )
    return run


@pytest.fixture
def sweep(tmp_path):
    """0: worse. 1: interrupted twice, best. 2: misspelt key. 3: just started. 4: hostile text, failed."""
    folder = tmp_path / "lr & co"
    train(folder / "0", range(0, 100), ap=0.25)
    train(folder / "1", range(0, 60), range(40, 80), range(80, 100), ap=0.5, picture=True)
    append(folder / "2", "failed", step=0, message="optimizer.learn is no key", code=2)
    append(folder / "3", "start", step=0, of=100, attempt=1, host="n2", job="", pid=os.getpid())
    train(folder / "4", range(0, 20), ap=0.125, end="failed", message=EVIL, code=1)
    overrides = [
        ["optimizer.lr=0.001", "seed=1"],
        ["optimizer.lr=3e-4", "seed=1"],
        ["optimizer.learn=1", "seed=1"],
        ["optimizer.lr=0.1", "seed=1"],
        [f"+dataset.root='{EVIL}'", "optimizer.lr=1", "seed=1"],
    ]
    (folder / "sweep.json").write_text(
        json.dumps(
            {
                "runs": [
                    {
                        "folder": str(i),
                        "overrides": o,
                        "error": "optimizer.learn is no key" if i == 2 else None,
                    }
                    for i, o in enumerate(overrides)
                ]
            }
        )
    )
    return folder


def rows(sweep: Path) -> list[RunResult]:
    return read_results(read_runs(sweep).runs)


class Page(HTMLParser):
    """Tags, links, texts, and the cells of the tables' rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.texts, self.open, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


# -- curves ------------------------------------------------------------------------------------------------------
def test_curves_equal_those_of_tensorboards_reader(sweep):
    for name in "014":
        oracle = EventAccumulator(
            str(sweep / name / "tensorboard"), size_guidance={"scalars": 0, "images": 1}
        )
        oracle.Reload()
        curves = read_curves(sweep / name, TAGS).by_tag
        for tag in TAGS:
            assert [(p.step, p.value, p.time) for p in curves[tag].points] == [
                (e.step, e.value, e.wall_time) for e in oracle.Scalars(tag)
            ]
    assert [p.step for p in curves["loss/total"].points] == list(range(1, 21))
    curves = read_curves(sweep / "1", TAGS).by_tag
    assert [p.step for p in curves["loss/total"].points] == list(
        range(1, 101)
    )  # steps 41 to 60 of the first attempt are gone
    assert len(curves["loss/total"].all_points) == 120


def test_what_an_attempt_without_a_checkpoint_wrote_does_not_count(tmp_path):
    """It was killed before its first checkpoint, so the next attempt starts at step 0 again."""
    run = train(tmp_path / "0", range(0, 60), range(0, 40), ap=0.5)
    oracle = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    oracle.Reload()
    curves = read_curves(run, TAGS).by_tag
    steps = [point.step for point in curves["loss/total"].points]
    assert steps == [event.step for event in oracle.Scalars("loss/total")] == [*range(1, 41)]
    (result,) = read_results(read_runs(tmp_path).runs)
    assert result.best is not None
    assert tuple(result.best) == (0.5, 40)  # not 0.25 at step 60


def test_truncated_and_damaged_event_files_give_their_whole_records(sweep):
    (path,) = (sweep / "0" / "tensorboard").glob("*tfevents*")
    whole = path.read_bytes()
    before = 100
    for end in (*range(len(whole) - 1, len(whole) - 200, -13), 30, 5, 0):
        path.write_bytes(whole[:end])
        steps = [p.step for p in read_curves(sweep / "0", TAGS).by_tag["loss/total"].points]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) <= before
        before = len(steps)
    assert before == 0
    at = whole.index(b"loss/total", len(whole) // 2)
    path.write_bytes(whole[:at] + b"lost/total" + whole[at + 10 :])
    assert len(read_curves(sweep / "0", TAGS).by_tag["loss/total"].points) == 99
    assert read_curves(sweep / "nowhere", TAGS).by_tag == {tag: Curve() for tag in TAGS}


def test_records_after_damage_are_read_and_the_damage_is_reported(sweep):
    """A damaged value, a damaged length, and garbage in the middle; the end may be half written."""
    (path,) = (sweep / "0" / "tensorboard").glob("*tfevents*")
    whole = path.read_bytes()
    at = whole.index(b"loss/total", len(whole) // 2)
    # The record begins where the eight bytes are its own length.
    start = next(
        place
        for place in range(at - 25, 0, -1)
        if whole[place : place + 8] == (at + 15 - place - 12).to_bytes(8, "little")
    )
    for first, damage, points, problem in (
        (at + 12, b"\xff", 99, "1 damaged record"),
        (start, b"\xff", 99, "damaged"),
        (start + 1, b"\xff", 99, f"damaged at byte {start}"),
        (start, bytes(300), None, ""),
        (start, b"\xfe" * 300, None, f"damaged at byte {start}"),
    ):
        path.write_bytes(whole[:first] + damage + whole[first + len(damage) :])
        curves = read_curves(sweep / "0", TAGS)
        steps = [p.step for p in curves.by_tag["loss/total"].points]
        assert sorted(steps) == steps
        assert steps[0] == 1
        assert steps[-1] == 100
        assert len(steps) == points or points is None
        assert problem in curves.problem
    path.write_bytes(whole[:-7])
    assert read_curves(sweep / "0", TAGS).problem == ""
    path.write_bytes(os.urandom(5000))
    assert "damaged at byte 0" in read_curves(sweep / "0", TAGS).problem


def test_records_of_other_forms_are_read(tmp_path):
    """Several values in one record, a negative step, no wall_time, and tags inside other tags."""
    writer = EventFileWriter(str(tmp_path / "tensorboard"))
    values = [Summary.Value(tag=tag, simple_value=2.5) for tag in ("other", *TAGS)]
    writer.add_event(Event(wall_time=1.0, step=3, summary=Summary(value=values)))
    for step in (0, 1, 127, 128, 2**20, 2**40):
        for tag in ("loss/total", "loss/total_2", "a/loss/total"):
            value = Summary.Value(tag=tag, simple_value=step)
            writer.add_event(Event(wall_time=2.0, step=step, summary=Summary(value=[value])))
    text = Summary.Value(tag="notes", metadata={"display_name": "loss/total"})
    writer.add_event(Event(wall_time=3.0, step=9, summary=Summary(value=[text])))
    writer.close()
    curves = read_curves(tmp_path, TAGS)
    assert [p.step for p in curves.by_tag["loss/total"].points] == [3, 0, 1, 127, 128, 2**20, 2**40]
    assert curves.by_tag["loss/total"].points[-1].value == 2.0**40
    assert curves.by_tag["evaluation/ap"].points == [Point(3, 2.5, 1.0)]
    assert curves.problem == ""


@pytest.mark.slow
def test_the_report_of_many_runs_takes_milliseconds_per_run(tmp_path):
    run = tmp_path / "0"
    writer = TensorBoardWriter(run, enabled=True)
    for step in range(1, 2001):
        writer.write_scalars({f"speed/{i}": 1.0 for i in range(10)}, step)
        writer.write_scalars({"loss/total": 1.0}, step)
    writer.close()
    started = time.process_time()
    for _ in range(5):
        assert len(read_curves(run, TAGS).by_tag["loss/total"].points) == 2000
    assert time.process_time() - started < 5 * 0.1  # 0.01 s each; 0.4 s with a loop over all bytes


def test_thinned_curves_keep_the_mean():
    points = [Point(i, float(i % 7), 0.0) for i in range(1000)]
    thin = thinned(points)
    assert len(thin) <= CURVE_POINTS
    assert thin[0] == (1.5, 1.5)
    assert thin[-1][0] == 997.5
    assert np.mean([v for _, v in thin]) == pytest.approx(np.mean([p.value for p in points]))
    assert thinned(points[:CURVE_POINTS]) == [
        (float(p.step), p.value) for p in points[:CURVE_POINTS]
    ]
    assert thinned([]) == []


# -- order and costs ---------------------------------------------------------------------------------------------
def test_results_are_in_the_order_of_ap(sweep):
    results = rows(sweep)
    assert [row.run.name for row in results] == ["1", "0", "4", "2", "3"]
    assert results[0].metrics() == {"ap": 0.5, "ap50": 0.6, "final_loss": pytest.approx(0.1)}
    assert results[0].best == (0.5, 100)
    assert results[4].best is None
    assert results[4].metrics() == {}


def test_the_best_of_a_curve_may_be_earlier(sweep):
    writer = TensorBoardWriter(sweep / "0", enabled=True)
    for step in (101, 103):
        writer.write_scalars({"evaluation/ap": 0.75}, step)
    writer.write_scalars({"evaluation/ap": float("nan")}, 102)
    writer.close()
    assert rows(sweep)[1].best == (0.75, 101)


def test_what_requeues_cost(sweep):
    by_name = {row.run.name: row for row in rows(sweep)}
    assert by_name["0"].cost == InterruptionCost()
    assert by_name["3"].cost == InterruptionCost()
    # The first attempt was last heard of in its step 60, 69 s after its start, the second in its 40th, 49 s after; each next one
    # does its first step 1010 s after the start of the one before. It began at step 40: 20 steps again; the third at 80: none.
    cost = by_name["1"].cost
    assert (by_name["1"].run.requeues, cost.steps) == (2, 20)
    assert cost.seconds == pytest.approx(1010 - 69 + 1010 - 49)
    assert cost.starting == pytest.approx(20)


def test_attempts_that_never_ran_count_in_full(tmp_path):
    for event, step, at in (
        ("start", 0, 0),
        ("running", 1, 10),
        ("saved", 30, 100),
        ("requeued", 30, 101),
        ("start", 30, 200),
        ("fault", 30, 210),
        ("requeued", 30, 211),
        ("start", 30, 300),
        ("running", 31, 320),
        ("done", 40, 400),
    ):
        append(tmp_path, event, step=step, of=40, time=NOW - 500 + at, job="", host="n1")
    (row,) = rows(tmp_path)
    assert row.run.requeues == 2
    assert (row.cost.seconds, row.cost.starting, row.cost.steps) == (
        pytest.approx(220),
        pytest.approx(20),
        0,
    )


# -- time --------------------------------------------------------------------------------------------------------
def add_times(run: Path, start: float, *, ranks: int = 4, job: str = "7", **seconds: float) -> None:
    """An attempt on GPUs in a job that was queued for 30 s and ended in order."""
    allocation = Allocation(job, start - 30, start, ranks)
    record_allocation(run, allocation)
    record = AttemptTime(
        start=start,
        written=start + sum(seconds.values()),
        seconds={Part(name): part_s for name, part_s in seconds.items()},
        closed=True,
        part=Part.ending,
        first_step=0,
        step=100,
        stepped=0.0,
        starts_over=False,
        job=job,
        allocated=start,
        ranks=ranks,
        gpu=True,
        host="n1",
        pid=os.getpid(),
    )
    write_attempt(attempt_path(run, start), record)
    record_release(run, allocation, record.written)


@pytest.fixture
def timed(sweep):
    """0: 1 h on 4 GPUs, half of it training. 1: twice 0.5 h on 4 GPUs, 3/4 of it training."""
    add_times(sweep / "0", NOW - 9000, setup=600.0, training=1800.0, evaluation=1200.0)
    # Two jobs: one that SLURM requeues has its nodes until it is in the queue again.
    for job, start in (("7", NOW - 9000), ("8", NOW - 5000)):
        seconds = {"imports": 90.0, "training": 1350.0, "saving": 60.0, "repeated": 300.0}
        add_times(sweep / "1", start, job=job, **seconds)
    return sweep


def test_the_text_has_goodput_hours_and_ap_per_hour(timed, capsys):
    report.main([str(timed)])
    lines = capsys.readouterr().out.splitlines()
    cells = [re.split(r"  +", line) for line in lines[:6]]
    assert cells[0][-6:] == ["step", "goodput", "GPU-hours", "AP per GPU-hour", "state", "requeues"]
    assert cells[1][-6:] == ["100", "75.0 %", "4", "0.125", "done", "2"]
    assert cells[2][-6:] == ["100", "50.0 %", "4", "0.0625", "done", "0"]
    assert cells[3][-3:] == ["20", "failed", "0"]  # run 4 has no records
    assert (
        "allocated 2.0 h (8 GPU-hours): start-up 10.8 %, training 62.5 %, evaluation 16.7 %, "
        "saving 1.7 %, repeated steps 8.3 %. Goodput 62.5 %; queue 90 s; "
        "best AP 0.0625 per GPU-hour"
    ) in lines


def test_the_json_has_the_time_of_each_run_and_of_all(timed, capsys):
    report.main([str(timed), "--json"])
    values = json.loads(capsys.readouterr().out)
    best = values["runs"][0]["time"]
    assert {part: seconds for part, seconds in best["parts_s"].items() if seconds} == {
        "imports": 180,
        "training": 2700,
        "saving": 120,
        "repeated": 600,
    }
    assert (best["allocated_s"], best["queue_s"], best["goodput"]) == (3600, 60, 0.75)
    assert (best["rank_hours"], best["ranks_are_gpus"], best["ap_per_rank_hour"]) == (
        4,
        True,
        0.125,
    )
    assert values["time"]["allocated_s"] == sum(
        run["time"]["allocated_s"] for run in values["runs"]
    )
    assert values["time"]["goodput"] == 0.625
    nothing = values["runs"][2]["time"]
    assert (nothing["goodput"], nothing["ap_per_rank_hour"], nothing["rank_hours"]) == (
        None,
        None,
        0,
    )


def test_the_page_has_a_bar_for_each_run_with_times(timed):
    write_report(timed, "http://localhost:6006")
    page = Page((timed / "report.html").read_text())
    bars = [values for tag, values in page.tags if values.get("class") == "timebar"]
    assert [bar["aria-label"] for bar in bars] == ["time of run 1", "time of run 0"]
    segments = [
        (values["title"], float(re.search(r"width:([\d.]+)%", values["style"])[1]))
        for tag, values in page.tags
        if tag == "span" and "title" in values
    ]
    assert [title for title, _ in segments] == [
        "queue: 60 s",
        "start-up: 3 min",
        "training: 45 min",
        "saving: 2 min",
        "repeated steps: 10 min",
        "queue: 30 s",
        "start-up: 10 min",
        "training: 30 min",
        "evaluation: 20 min",
    ]
    assert sum(width for _, width in segments[:5]) == pytest.approx(100, abs=0.01)
    assert sum(width for _, width in segments[5:]) == pytest.approx(100 * 3630 / 3660, abs=0.01)
    (row,) = [row for row in page.rows if row[0] == "1" and "75 %" in row[-1]]
    assert row[1:4] == ["60 min", "4", "60 s"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"event": "allocated", "start": 1e999}'])
def test_damaged_times_count_nothing(timed, damage, capsys):
    for path in (timed / "0" / "time").iterdir():
        path.write_bytes(damage)
    report.main([str(timed), "--json"])
    times = {run["folder"]: run["time"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert times[str(timed / "0")]["allocated_s"] == 0
    assert times[str(timed / "1")]["allocated_s"] == 3600


def test_times_that_cannot_be_read_are_reported(timed, capsys):
    for path in (timed / "0" / "time").iterdir():
        path.unlink()
    (timed / "0" / "time" / "allocations.jsonl").mkdir()
    report.main([str(timed)])
    assert f"{timed / '0'}: its times cannot be read: " in capsys.readouterr().out


# -- text --------------------------------------------------------------------------------------------------------
def test_the_text(sweep, capsys):
    report.main([str(sweep)])
    out = capsys.readouterr().out
    assert "\033" not in out
    lines = out.splitlines()
    cells = [re.split(r"  +", line) for line in lines[:6]]
    assert cells[0] == [
        "run",
        "lr",
        "learn",
        "root",
        "AP",
        "AP50",
        "AP small",
        "best AP",
        "loss",
        "step",
        "state",
        "requeues",
    ]
    assert cells[1] == ["1", "3e-4", "0.500", "0.600", "0.500 at 100", "0.1000", "100", "done", "2"]
    assert [row[0] for row in cells[1:]] == ["1", "0", "4", "2", "3"]
    assert f"best: {sweep / '1'} (optimizer.lr=3e-4), AP 0.500" in lines
    assert f"{sweep / '2'}: failed: optimizer.learn is no key" in lines
    assert f"{sweep / '1'}: requeued 2 times, which took 32 min and 20 steps repeated" in lines
    assert lines[-1] == f"{sweep / 'report.html'}; HParams: tensorboard --logdir '{sweep}'"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("7", 7.0),
        ("True", True),
        ("false", False),
        ("adam", "adam"),
        ("nan", "nan"),
        ("[1,2]", "[1,2]"),
        ("", ""),
    ],
)
def test_values_for_tensorboard(text, value):
    got = hparam_value(text)
    assert (got, type(got)) == (value, type(value))


def test_a_bad_tensorboard_address_is_refused(sweep):
    with pytest.raises(UserError, match="--tensorboard is 'javascript:x'"):
        write_report(sweep, "javascript:x")


# -- the page ----------------------------------------------------------------------------------------------------
def test_the_page_is_self_contained_and_complete(sweep, capsys):
    report.main([str(sweep), "--tensorboard", "http://login1:6006"])
    text = (sweep / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:  # nothing is fetched
        assert tag not in ("link", "img", "iframe", "object")
        assert not {
            "src",
            "onload",
            "onerror",
        } & set(attributes)
        if "href" in attributes:
            assert tag == "a"
            assert re.match(r"http://login1:6006/|[014]/logs/", attributes["href"])
    assert "url(" not in text
    assert "@import" not in text
    assert "\033" not in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "alert('x')" in "".join(page.texts)
    (best,) = [i for i, t in enumerate(page.texts) if t == "Best"]
    assert page.texts[best + 1] == "optimizer.lr=3e-4"
    assert best < page.texts.index("Runs")
    table = [row for row in page.rows if row and row[0] in "01234"]
    assert [row[0] for row in table[:5]] == ["1", "0", "4", "2", "3"]
    assert [row[4:7] for row in table[:3]] == [
        ["0.500", "0.600", "–"],
        ["0.250", "0.350", "–"],
        ["0.125", "0.225", "–"],
    ]
    assert table[5] == ["1", "2", "32 min", "20 s", "20"]
    assert [t for t in page.texts if t.startswith("2 failed: optimizer.learn")]
    hrefs = [a["href"] for tag, a in page.tags if tag == "a"]
    assert "http://login1:6006/?runFilter=%5E1%2F#timeseries" in hrefs
    assert "http://login1:6006/#hparams" in hrefs


def test_the_curves_are_drawn_at_their_values(sweep, capsys):
    report.main([str(sweep)])
    lines = [
        (a["points"], a["style"])
        for tag, a in Page((sweep / "report.html").read_text()).tags
        if tag == "polyline"
    ]
    assert len(lines) == 6  # two curves of three runs
    points = [[tuple(map(float, p.split(","))) for p in places.split()] for places, _ in lines]
    loss, ap = points[:3], points[3:]
    assert len(loss[0]) == 100
    assert len(loss[2]) == 20
    x, y = np.array(loss[0]).T
    assert np.all(np.diff(x) > 0)
    assert np.all(np.diff(y) >= 0)
    assert np.polyfit(np.arange(1, 101), x, 1)[1] == pytest.approx(
        46, abs=0.2
    )  # step 0 lies on the axis
    assert np.array(loss[2])[:, 0] == pytest.approx(x[:20])
    heights = [ap[i][-1][1] for i in range(3)]
    assert heights[0] < heights[1] < heights[2]  # 0.5, 0.25, 0.125
    base = 300 - 38
    assert (base - heights[0]) / (base - heights[1]) == pytest.approx(2, rel=0.01)
    assert len({style for _, style in lines[:3]}) == 3
    assert [s for _, s in lines[:3]] == [s for _, s in lines[3:]]


def test_a_run_that_has_only_begun_has_a_report(tmp_path, capsys):
    append(tmp_path / "run", "start", step=0, of=10, attempt=1, host="n1", job="", pid=os.getpid())
    report.main([str(tmp_path / "run")])
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "No run has been evaluated yet." in page.texts
    assert "Curves" not in page.texts
    assert "best:" not in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        report.main([str(tmp_path)])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert len(err.splitlines()) == 1
    assert "contains no run" in err
    assert not list(tmp_path.iterdir())


# -- TensorBoard -------------------------------------------------------------------------------------------------
def hparams(logdir: Path) -> dict[str, tuple[dict, dict]]:
    """What TensorBoard's own plugin shows below a folder: session -> (hyper-parameters, metrics)."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    context = Context(SimpleNamespace(data_provider=provider))
    request_context, runs = RequestContext(), None
    runs = context.hparams_metadata(request_context, "x")
    experiment = context.experiment_from_metadata(request_context, "x", True, runs, [])
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=[0, 1, 2, 3], include_metrics=True
    )
    for info in experiment.hparam_infos:
        asked.col_params.add(hparam=info.name)
    for info in experiment.metric_infos:
        asked.col_params.add(metric=info.name)
    answer = Handler(request_context, context, "x", asked).run()
    return {
        group.sessions[0].name: (
            {key: getattr(value, value.WhichOneof("kind")) for key, value in group.hparams.items()},
            {m.name.tag: m.value for m in group.metric_values},
        )
        for group in answer.session_groups
    }


@pytest.mark.timeout(240)
def test_tensorboard_shows_the_sweep_once_after_several_reports(sweep, capsys):
    for _ in range(2):
        report.main([str(sweep)])
        assert [len(list((sweep / name / "hparams").iterdir())) for name in "01234"] == [1] * 5
    shown = hparams(sweep)
    assert set(shown) == {f"{name}/hparams" for name in "01234"}
    values, metrics = shown["1/hparams"]
    assert values == {"optimizer.lr": 3e-4}
    assert metrics == {"ap": 0.5, "ap50": pytest.approx(0.6), "final_loss": pytest.approx(0.1)}
    assert shown["2/hparams"] == ({"optimizer.learn": 1.0}, {})
    assert shown["4/hparams"][0]["optimizer.lr"] == 1.0
    (sweep / "1" / "evaluation" / "metrics.json").write_text('{"ap": 0.75}')
    report.main([str(sweep)])
    assert hparams(sweep)["1/hparams"][1]["ap"] == 0.75


def test_names_of_trials_are_short_and_differ():
    sweep = Path("/data/sweeps/lr")
    assert trial_names([sweep / "0", sweep / "1"]) == ["lr/0", "lr/1"]
    assert trial_names([sweep / "a" / "0", sweep / "b" / "0", Path("/x/0")]) == [
        "a/0",
        "b/0",
        "x/0",
    ]
    twins = [Path("/data/a/lr/0"), Path("/data/b/lr/0")]
    assert trial_names(twins) == ["a/lr/0", "b/lr/0"]
    assert trial_names([]) == []


# -- damaged files -----------------------------------------------------------------------------------------------
DAMAGES = {
    "not JSON": b"{\n",
    "garbage": bytes(range(256)) * 4,
    "an array": b"[1, 2]\n",
    "deep": b"[" * 100_000 + b"\n",
    "wrong types": json.dumps(
        {
            key: {"a": [None]}
            for key in ("event", "time", "step", "of", "job", "overrides", "training", "ap", "loss")
        }
    ).encode(),
    "wrong numbers": b'{"event": "start", "time": 1e999, "step": 1' + b"0" * 400 + b', "ap": NaN}',
    "hostile": b'{"event": "start", "time": 1, "host": 5, "pid": "x", "job": "--user=root"}',
    "a folder": None,
}
FILES = (
    "submitted.json",
    "history.jsonl",
    "progress.json",
    "config.json",
    "evaluation/metrics.json",
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_in_a_run_affects_its_own_row(sweep, capsys, monkeypatch, name, damage):
    monkeypatch.setenv("PATH", "/nowhere")
    before = {result.run.name: result.run for result in rows(sweep)}
    path = sweep / "0" / name
    path.unlink(missing_ok=True)
    content = DAMAGES[damage]
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    after = {run.name: run for run in read_runs(sweep).runs}
    assert after.keys() == before.keys()
    for other in "1234":
        assert after[other] == before[other]
    if damage not in ("wrong types", "wrong numbers", "hostile"):
        assert name.split("/")[-1] in after["0"].problem
    assert after["0"].problem.isprintable()
    report.main([str(sweep)])
    status.main([str(sweep)])
    output = capsys.readouterr().out
    assert after["0"].problem in output
    assert "Traceback" not in output
    assert (sweep / "report.html").read_text().count("<tr") > 5
    with suppress(SystemExit):
        cancel.main([str(sweep)])
    with suppress(SystemExit):
        logs.main([str(sweep / "0")])


def test_damaged_files_are_no_failures(sweep):
    """The page counts them under a heading of their own."""
    (sweep / "1" / "progress.json").write_text("{")
    report.main([str(sweep)])
    texts = Page((sweep / "report.html").read_text()).texts
    assert "2 failed or lost" in texts
    assert "1 with files that are damaged or cannot be read" in texts


def test_a_sweep_that_may_only_be_read_is_reported(sweep, capsys, monkeypatch):
    """It may be a colleague's. Root may write anywhere, so writing is refused by the test."""

    def refuse(path, *rest, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(html, "atomic_write", refuse)
    monkeypatch.setattr(hparams_module, "write_hparams", refuse)
    report.main([str(sweep)])
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("run")
    assert output[-2].startswith("note: the page is not written: ")
    assert output[-2].endswith("Permission denied")
    assert output[-1].startswith("note: HParams of 5 runs are not written; the first: ")
    report.main([str(sweep), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["page"] is None
    assert len(values["not_written"]) == 2
    assert len(values["runs"]) == 5


def test_a_run_that_may_not_be_read_affects_its_own_row(sweep, capsys, monkeypatch):
    """Reading is refused by the test: root may read everything."""
    closed = str(sweep / "0")

    def refusing(function):
        def call(path, *rest, **options):
            if not isinstance(path, int) and str(path).startswith(closed):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *rest, **options)

        return call

    for name in ("stat", "open", "listdir", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr("builtins.open", refusing(open))
    monkeypatch.setattr("io.open", refusing(open))
    report.main([str(sweep)])
    status.main([str(sweep)])
    output = capsys.readouterr().out
    assert "Permission denied" in output
    assert "0.500" in output


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"runs": 1}', b'{"runs": [{"folder": "../x"}, 7]}']
)
def test_a_damaged_sweep_json_leaves_the_runs(sweep, caplog, content):
    (sweep / "sweep.json").write_bytes(content)
    assert [run.name for run in read_runs(sweep).runs] == list("01234")
    assert "sweep.json" in caplog.text
