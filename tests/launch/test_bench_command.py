"""`evspan bench`: a real run at micro size, and what is refused before anything is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evspan.conf.schema.benchmark import BenchConfig
from evspan.launch.cli.bench import report_lines
from evspan.launch.cli.config_keys import choices_of, keys_of
from evspan.launch.cli.main import main

STEPS, LANES, FRAMES = 3, 2, 2


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """No variables of torchrun or SLURM from another test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_measurements_of_a_micro_config(tmp_path):
    output = tmp_path / "bench.json"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    arguments = [
        *("size=micro", "run_dir=run", "parallel.threads=1"),
        *(f"training.batch_size={LANES}", f"training.sequence_length={FRAMES}"),
        *("evaluation.batch_size=1", "evaluation.sequence_length=4"),
        *(f"bench.steps={STEPS}", "bench.seconds=0.2", "bench.height=96", "bench.width=160"),
        f"bench.output={output}",
    ]
    process = subprocess.run(
        [sys.executable, "-m", "evspan.launch", "bench", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary)},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads(output.read_text())
    check_step(result)
    check_others(result)
    check_table(process.stdout, result)
    # Nothing is left behind: no run folder, no simulated data.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "tmp"]
    assert not any(temporary.glob("evspan-*"))


def check_step(result):
    step = result["step"]
    medians = [part["median"] for part in step["parts"].values()]
    assert len(medians) == 5
    assert min(medians) > 0
    assert sum(medians) == pytest.approx(step["step"]["median"], rel=0.5)
    assert 2 <= step["step"]["count"] <= STEPS
    assert step["frames"] == LANES * FRAMES
    assert step["frames_per_s"] == pytest.approx(1000 * LANES * FRAMES / step["step"]["median"])
    assert step["peak_bytes"] > 100e6
    assert step["operations"]["launches"] > 1000
    assert step["operations"]["waits"] == sum(step["operations"]["wait_places"].values())
    flops = step["flops"]
    total = sum(part["forward"] + part["backward"] for part in flops["parts"])
    per_second = total / (step["step"]["median"] / 1000)
    assert result["mfu"] == pytest.approx(per_second / result["peak"]["flops"])
    assert (flops["frames"], flops["labelled"]) == (LANES * FRAMES, LANES * FRAMES)


def check_others(result):
    cores = len(os.sched_getaffinity(0))
    assert result["loader"][0]["threads"] == 1
    assert result["loader"][-1]["threads"] == cores
    assert all(speed["frames_per_s"] > 0 for speed in result["loader"])
    streaming = result["streaming"]
    assert streaming["step"]["count"] >= 5
    assert streaming["candidates"] >= 100
    assert result["evaluation"]["frames_per_s"] > 0
    assert result["setting"]["model"] == "micro"
    assert result["setting"]["frame"] == [20, 96, 160]
    assert result["limit"]["resource"] in ("loader", "compute", "memory")


def check_table(text, result):
    lines = text.splitlines()
    assert any("lanes x" in line and "simulated, 2 recordings" in line for line in lines)
    for name in ("training step", "  backward", "  host waits", "GFLOP of a micro-batch", "  neck"):
        assert any(line.startswith(name) for line in lines), name
    for name in ("loader, 1 thread", "loader threads needed", "infer, with NMS", "evaluation"):
        assert any(line.startswith(name) for line in lines), name
    assert f"MFU {result['mfu']:.1%}" in text
    assert any(line.startswith("limited by") for line in lines)


def test_the_table_of_a_gpu():
    from evspan.pipeline.benchmark.limits import Limit, Resource
    from evspan.pipeline.benchmark.loading import LoaderSpeed
    from evspan.pipeline.benchmark.operations import Operations
    from evspan.pipeline.benchmark.peaks import Peak
    from evspan.pipeline.benchmark.run import BenchmarkResult, Setting
    from evspan.pipeline.benchmark.step import PARTS, StepMeasurement
    from evspan.pipeline.benchmark.streaming import EvaluationMeasurement, StreamingMeasurement
    from evspan.pipeline.benchmark.timing import Spread
    from evspan.pipeline.model.flops import DetectorFlops, PartFlops

    spread = Spread(20.0, 19.0, 23.5, 10)
    operations = Operations(2800, True, 12, 2, {"loss.py:7": 2}, 60.0, 45.0)
    flops = DetectorFlops((PartFlops("neck", 10**9, 2 * 10**9),), 120, 100)
    result = BenchmarkResult(
        setting=Setting(
            "NVIDIA H100 PCIe, NCCL",
            16,
            "2.9.0, CUDA 12.8",
            "bf16",
            "base",
            "data, 9 recordings",
            24,
            5,
            (20, 360, 640),
            18_500_000,
            "ZeRO-1",
        ),
        peak=Peak(756.5e12, "H100 data sheet"),
        step=StepMeasurement(
            parts=dict.fromkeys(PARTS, spread),
            step=Spread(100.0, 99.0, 101.0, 10),
            frames=120,
            frames_per_s=1200.0,
            frames_per_s_needed=1500.0,
            host_ms=55.0,
            peak_bytes=30_000_000_000,
            operations=operations,
            flops=flops,
            micro_batches=1,
        ),
        mfu=0.17,
        num_workers=8,
        loader=[LoaderSpeed(1, 700.0)],
        threads_needed=None,
        streaming=StreamingMeasurement(
            spread, spread, Spread(4.0, 3.9, 4.2, 9), 0.01, 99.6, operations
        ),
        evaluation=EvaluationMeasurement(900.0, 400, 4, 10),
        limit=Limit(Resource.host, "it waits", "launch less"),
    )
    text = "\n".join(" ".join(line.split()) for line in report_lines(result))
    for line in (
        "NVIDIA H100 PCIe, NCCL; 16 cores; torch 2.9.0, CUDA 12.8; bf16",
        "base, 18.5 M parameters, ZeRO-1; 24 lanes x 5 frames of 20 x 360 x 640; data, 9 recordings",
        "training step 100.0 99.0 - 101.0 1200.0 MFU 17.0% of 756 TFLOP/s (H100 data sheet)",
        "data wait 20.0 19.0 - 23.5 20% of the step",
        "issued by the host 55.0 2,800 launches, 12 copies",
        "host waits 2: loss.py:7 2",
        "device computes 60.0 75% of it in matrix products",
        "peak memory 30,000 MB",
        "GFLOP of a micro-batch 1 forward, 3 with backward; 100 of 120 frames labelled",
        "loader threads needed 1500 more than the 16 cores; training uses 8",
        "infer, with NMS, CUDA graph 4.0 3.9 - 4.2 250.0 100 candidates",
        "limited by host launches: it waits.",
    ):
        assert line in text.splitlines()
    assert json.loads(json.dumps(result.to_json()))["limit"]["resource"] == "host"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench.steps=0"], "bench.steps is 0; give 1 or more"),
        (["bench.seconds=0"], "bench.seconds is 0.0; give a time above 0"),
        (["training.peak_tflops=-1"], "training.peak_tflops is -1.0; give the dense TFLOP/s"),
        (["bench.height=20"], "bench.height 20 and bench.width 640"),
        (["bench.step=3"], "bench.steps"),
        (["dataset.root=nowhere"], "dataset.root=nowhere is no folder"),
        (["bench.output=no/where.json"], "make it, or name another file"),
        (["training.batch_size=auto"], "measures a given number of lanes: training.batch_size=N"),
        (["bench.output=."], "bench.output is ., a folder; name a file"),
        (
            [
                "parallel.ranks=8",
                "parallel.sequence=2",
                "training.batch_size=24",
                "training.sequence_length=40",
            ],
            "parallel.ranks=1 parallel.sequence=1 training.batch_size=6 "
            "training.sequence_length=20",
        ),
        (["--multirun", "seed=1,2"], "measures one config"),
        (["--steps", "3"], "evspan bench bench.steps=3"),
        (["shards"], "evspan bench dataset.root=shards"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_rank_of_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "77")
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "run it without torchrun" in capsys.readouterr().err


def test_it_takes_the_keys_and_groups_of_train():
    assert keys_of("bench").keys() > keys_of("train").keys()
    assert choices_of("bench") == choices_of("train")
    own = keys_of("bench").keys() - keys_of("train").keys()
    assert {key.split(".")[0] for key in own} == {"bench"}


def test_its_config_starts_as_that_of_train():
    conf = Path(__file__).parents[2] / "conf"
    train = (conf / "train.yaml").read_text()
    assert (conf / "bench.yaml").read_text() == train.replace("train_schema", "bench_schema")
    assert BenchConfig().bench.steps == 20
