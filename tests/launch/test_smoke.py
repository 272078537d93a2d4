"""`evspan smoke`: a run on two ranks, and that its table shows differences."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from evspan.conf.schema.layout import ExchangeKind
from evspan.launch.cli.smoke import layout_table
from evspan.launch.smoke import Tolerances, device_variables, judge, tolerances
from evspan.pipeline.engine.layout_comparison import ComparisonConfig, train_config
from evspan.pipeline.engine.layouts import LayoutResult, layouts_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ALIKE = LayoutResult(
    layout="2x1",
    stage=1,
    skipped=0,
    peak_bytes=700_000_000,
    frames_per_s=40.0,
    loss=3e-7,
    gradients=2e-5,
    resumed=0.0,
    other="1x1",
    resumed_other=1e-6,
)
ALLOWED = Tolerances(1e-5, 1e-4, 2e-6, 2e-5)


def run(*arguments, cwd=ROOT, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "evspan.launch", "smoke", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.timeout(300)
def test_two_ranks_compute_what_one_computes(tmp_path):
    process = run("--keep", str(tmp_path / "smoke"))
    assert process.returncode == 0, process.stdout + process.stderr
    rows = re.findall(r"^(1x1|2x1|1x2) *(\S.*?)?  +([0-3])  .* pass$", process.stdout, re.MULTILINE)
    assert rows == [
        ("1x1", "(reference)", "0"),
        ("1x1", "frame by frame", "0"),
        ("2x1", "", "1"),
        ("1x2", "transpose", "2"),
        ("1x2", "relay", "3"),
    ]
    assert "FAIL" not in process.stdout
    assert "CPU" in process.stdout
    assert "smoke: pass, 5 layouts" in process.stdout
    assert not process.stderr
    results = [
        json.loads(line)
        for line in (tmp_path / "smoke" / "results-2.jsonl").read_text().splitlines()[1:]
    ]
    assert len(results) == 3
    for row in results:  # the layouts compute differently: rounding differs
        assert 0 < row["gradients"] < 1e-3
        assert 0 < row["resumed_other"] < 1e-4
        assert row["resumed"] == 0
        assert 1e8 < row["peak_bytes"] < 1e10
        assert row["frames_per_s"] > 0
    again = run("--keep", str(tmp_path / "smoke"))
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "exists and is not empty" in again.stderr


@pytest.mark.parametrize(
    ("gpus", "ranks", "message"),
    [
        (0, 2, ""),
        (2, 2, ""),
        (8, 2, ""),
        (1, 2, "1 GPU for 2 ranks, so the test runs on the CPU; --ranks 1 uses the GPUs"),
        (2, 4, "2 GPUs for 4 ranks, so the test runs on the CPU; --ranks 2 uses the GPUs"),
    ],
)
def test_all_ranks_have_a_gpu_or_none(gpus, ranks, message, capsys):
    assert device_variables(gpus, ranks) == ({"CUDA_VISIBLE_DEVICES": ""} if message else {})
    assert message in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("pipeline/engine/trainer.py", "losses.total * self.world.size", "losses.total"),
        ("pipeline/data/loader.py", "chunk.first + self.frames.start", "chunk.first"),
        ("pipeline/engine/trainer.py", "self.state = self.exchange.scatter(carry)", "pass"),
    ],
)
def test_a_mistake_in_the_code_is_found(tmp_path, file, right, wrong):
    for package in ("conf", "data_prep", "launch", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package)
    source = (tmp_path / file).read_text()
    assert right in source
    (tmp_path / file).write_text(source.replace(right, wrong))
    process = run(cwd=tmp_path)
    assert process.returncode == 1 and "FAIL" in process.stdout and "DIFFERS" in process.stdout, (
        process.stdout + process.stderr
    )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("loss", 2e-5),
        ("loss", math.nan),
        ("gradients", 2e-4),
        ("gradients", math.nan),
        ("resumed", 1e-9),
        ("resumed_other", 2e-5),
    ],
)
def test_a_difference_fails(column, value):
    result = replace(ALIKE, **{column: value})
    verdict = judge(result, ALLOWED, exact=True)
    assert verdict._asdict() == {
        name: name != column for name in ("loss", "gradients", "resumed", "resumed_other")
    }
    alike = judge(ALIKE, ALLOWED, exact=True)
    assert alike.passed
    assert not verdict.passed
    lines = layout_table([ALIKE, result], [alike, verdict])
    assert lines[1].endswith("pass")
    assert lines[2].endswith("FAIL")
    assert "DIFFERS" in lines[2]


def test_equal_results_pass():
    assert judge(ALIKE, ALLOWED, exact=True).passed
    assert judge(replace(ALIKE, resumed=1e-9), ALLOWED, exact=False).passed
    assert not judge(replace(ALIKE, skipped=1), ALLOWED, exact=False).passed


def test_tolerances_follow_rounding_within_limits():
    def allowed(loss, gradients):
        return tolerances(replace(ALIKE, loss=loss, gradients=gradients))[:2]

    assert allowed(1e-7, 1e-8) == (1e-5, 1e-5)
    assert allowed(4e-6, 3e-5) == pytest.approx((2e-5, 1.5e-4))
    assert allowed(0.5, math.nan) == pytest.approx((5e-3, 1e-5))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_layouts_are_complete_and_valid(tmp_path, ranks):
    layouts = layouts_of(ranks)
    comparison = ComparisonConfig(tmp_path, ranks=ranks, steps=3, threads=1)
    for layout in layouts:
        train_config(layout, comparison, tmp_path / "run")  # refuses what does not divide
    cuts = {(layout.ranks // layout.sequence, layout.sequence) for layout in layouts}
    assert cuts == {(ranks // s, s) for s in range(1, ranks + 1) if ranks % s == 0}
    shared = {(layout.sequence, layout.exchange) for layout in layouts if layout.sequence > 1}
    assert shared == {
        (s, kind)
        for s in range(2, ranks + 1)
        if ranks % s == 0
        for kind in (ExchangeKind.transpose, ExchangeKind.relay)
    }
