"""The GPU check itself: its parts run on a CPU, a failed one ends with exit code 1, missing packages are named."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import check, machine
from gpu.processes import ProcessFailedError
from gpu.report import FAILED, SKIPPED, Report

CHECK = Path(check.__file__)
ROOT = CHECK.parents[2]


def run_check(tmp_path, *arguments, **options):
    return subprocess.run(
        [sys.executable, str(CHECK), "--output", str(tmp_path / "results"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        **options,
    )


@pytest.mark.slow
def test_every_part_passes_on_a_cpu(tmp_path, parity_dir):
    result = run_check(
        tmp_path,
        "--device",
        "cpu",
        "--tiny",
        "--parity",
        str(parity_dir),
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    parts = {row["part"] for row in results["rows"]}
    assert parts == set(check.PARTS)
    assert {row["name"] for row in results["rows"] if row["status"] == SKIPPED} == {
        "CUDA graphs, micro, fp32",
        "base",
    }
    assert results["machine"]["torch"]
    (steps,) = [
        row
        for row in results["rows"]
        if row["name"].endswith("T = 2, fp32") and "frame" not in row["name"]
    ]
    assert steps["values"]["frames_per_s"] > 0


@pytest.mark.slow
def test_without_a_gpu_one_line_names_the_remedy(tmp_path):
    result = run_check(tmp_path, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("error: torch ") and result.stderr.count("\n") == 1
    assert "--device cpu --tiny" in result.stderr


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    class Part:
        def __init__(self, name):
            self.name = name

        def run(self, context):
            ran.append(self.name)
            if self.name == "parity":
                raise ValueError("of all things")
            if self.name == "gradients":
                raise ModuleNotFoundError("No module named 'hotcoco'", name="hotcoco")

    monkeypatch.setattr(
        check.importlib, "import_module", lambda name: Part(name.rpartition(".")[2])
    )
    report = Report(60, tmp_path, {})
    context = check.Context(torch.device("cpu"), True, tmp_path, tmp_path, report, ["hotcoco"], {})
    check.run_parts(["parity", "gradients", "kernels"], context)
    assert ran == ["parity", "gradients", "kernels"]
    assert [(row.part, row.status) for row in report.rows] == [
        ("parity", FAILED),
        ("gradients", SKIPPED),
    ]
    assert "of all things" in report.rows[0].reason
    assert report.rows[1].reason == "package hotcoco is not installed"
    assert not check.print_summary(report)
    assert "2 rows: 1 failed, 1 skipped" in capsys.readouterr().out


def test_a_part_without_enough_time_is_skipped(tmp_path):
    report = Report(5, tmp_path, {})
    context = check.Context(torch.device("cpu"), False, tmp_path, tmp_path, report, [], {})
    check.run_parts(["engine"], context)
    assert [row.status for row in report.rows] == [SKIPPED]


@pytest.mark.slow
def test_a_missing_hdf5plugin_is_replaced(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("hdf5plugin", "evspan") else found(name),
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "before")
    assert machine.prepare_imports(tmp_path) == ["hdf5plugin"]
    assert (tmp_path / "evspan" / "pipeline").is_dir()
    # All that the check imports, with the stand-in in place of the package.
    folders = [tmp_path, ROOT / "tests", ROOT / "tests" / "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    code = """
import hdf5plugin
print(hdf5plugin.__file__, dict(**hdf5plugin.Blosc(cname="zstd")), hdf5plugin.Zstd())
import gpu.rank, gpu.simulated
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'hdf5plugin.py'} {{}} {{}}\n"


def test_a_failed_process_names_its_exception(tmp_path):
    hint = "Compile with TORCH_USE_CUDA_DSA to enable device-side assertions.\n" * 9
    stderr = f"Traceback:\n  File x\nRuntimeError: CUDA error: an illegal access\n{hint}"
    error = ProcessFailedError("ended with code 1", stderr)
    report = Report(60, tmp_path, {})
    report.failed("engine", "micro", error)
    assert "RuntimeError: CUDA error: an illegal access" in report.rows[0].reason
    assert stderr in (tmp_path / "errors.txt").read_text() + "\n"
    try:
        raise ValueError("of all things")
    except ValueError as raised:
        report.failed("steps", "base", raised)
    assert "test_check.py" in (tmp_path / "errors.txt").read_text()
    assert json.loads((tmp_path / "gpu_check.json").read_text())["rows"][1]["status"] == FAILED
