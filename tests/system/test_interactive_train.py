"""`evspan train` as a user sees it on a terminal: first lines, bar, Ctrl-C, logs and metrics."""

import json
import os
import re
from pathlib import Path

import psutil
import pytest
from evspan.conf.errors import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE
from evspan.launch.cli.logs import main as logs
from evspan.pipeline.history import read
from evspan.pipeline.metrics_log import EVALUATION, TRAIN, read_metrics
from support.small_shards import write_small_shards
from support.terminal import Terminal, screen
from support.training_runs import ROOT, train_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 12
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    return write_small_shards(folder / "shards", {"train": [23, 12, 9], "val": [12]})


def on_terminal(shards: Path, run: Path, *overrides: str) -> Terminal:
    command = train_command(
        shards,
        run,
        "size=micro",
        "training.engine=plain",
        f"training.max_steps={STEPS}",
        "training.log_every=6",
        "training.evaluate_every=0",
        "training.log_images_every=0",
        "training.num_workers=0",
        "parallel.threads=1",
        *overrides,
    )
    return Terminal(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT})


def with_children(process: int) -> list[psutil.Process]:
    parent = psutil.Process(process)
    return [parent, *parent.children(recursive=True)]


def test_ctrl_c_saves_and_the_run_continues_and_reports_its_end(shards, tmp_path, capsys):
    run = tmp_path / "run"
    # So many steps that it cannot end before Ctrl-C; the run continues with the same number.
    endless = ["parallel.ranks=2", "training.max_steps=100000"]
    with on_terminal(shards, run, *endless) as terminal:
        terminal.read_until(rb"step 5 of 100000 ")
        terminal.type(b"\x03")
        assert terminal.wait() == STOPPED_EXIT_CODE
        shown = screen(terminal.output)
    assert b"training:" in terminal.output
    text = "\n".join(shown)
    for line in (
        r"starts at step 0 of 100000; 2 ranks = 2 data, fp32",
        r"data: 3 recordings, 44 frames of \d+ x \d+, \d+ labelled",
        r"boxes: \d+ of 3 classes: \w+ \d+, ",
        r"batch: 4 sequences of 4 frames = 2 data ranks x 2 lanes x 1 accumulation step; "
        r"16 frames per step",
        r"learning rate: 0.0002 after \d+ warm-up steps?, then onecycle to 2.0e-08",
        r"model: [\d,]+ parameters",
        r"watch it: tensorboard --logdir .*; log: .*/logs/rank-00.log",
        r"[\d.]+ GFLOP a labelled frame: backbone \d+ %, neck \d+ %, small-object attention \d+ %, "
        r"head \d+ %; a rank's peak is "
        r"[\d.]+ [GT]FLOP/s \(measured product of 1024 x 1024 matrices\)",
        r"memory: \d\.\d\d GiB per rank",
        r"step 2 of 100000  epoch 0.727  loss [\d.]+  lr \d\.\de-\d\d  [\d.]+ frames/s  "
        r"MFU [\d.]+ %  data wait \d+ %  ETA \d+:\d\d",
        r"Ctrl-C: saves at the end of this step and ends; again: ends at once",
        r"Ctrl-C: saved step \d+ in .*; the same command with run_dir=.* continues",
    ):
        assert re.search(line, text), line
    # The terminal's ^C and the launcher's line may leave one bar standing.
    assert sum(line.startswith("training:") for line in shown) <= 1
    saved = read(run)[-1]
    assert saved["event"] == "saved"
    logged = [record["step"] for record in read_metrics(run)]
    assert logged[:3] == [1, 2, 5]

    last = saved["step"] + 3
    # One rank now, in the process of the command itself.
    rest = ["parallel.ranks=1", f"training.max_steps={last}", "optimizer.end_factor=1"]
    with on_terminal(shards, run, *rest, "checkpoint.resume=false") as terminal:
        assert terminal.wait() == 0
    with on_terminal(shards, run, *rest, "optimizer.lr=0.0003") as terminal:
        assert terminal.wait() == 0
        shown = "\n".join(screen(terminal.output))
    assert "with other settings: optimizer.lr 0.0002 -> 0.0003" in shown
    assert re.search(rf"is complete: step {last} of {last}\nAP 0\.\d+ in step {last}", shown)
    assert f"to train on: run_dir={run} training.max_steps={2 * last}" in shown

    records = read_metrics(run)
    trained = [record["step"] for record in records if record["kind"] == TRAIN]
    assert trained == sorted(set(trained))
    assert trained[-1] == last
    assert [record["step"] for record in records if record["kind"] == EVALUATION] == [last]
    log = (run / "logs" / "rank-00.log").read_text()
    assert re.findall(r"---- attempt (\d+), .*, rank 0 of (\d)", log) == [
        ("1", "2"),
        ("2", "1"),
        ("3", "1"),
    ]
    assert re.search(r"^\d{4}-.* INFO rank 0: step 5 of 100000 ", log, re.MULTILINE)
    assert "training:" not in log
    assert "attempt 1, " in (run / "logs" / "rank-01.log").read_text()
    logs([str(run), "--rank", "1"])
    assert "rank 1 of 2" in capsys.readouterr().out
    logs([str(run), "--metrics"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records


def test_a_second_ctrl_c_ends_all_ranks_at_once(shards, tmp_path):
    overrides = ["parallel.ranks=2", "training.max_steps=100000"]
    with on_terminal(shards, tmp_path / "run", *overrides) as terminal:
        terminal.read_until(rb"step 2 of 100000 ")
        processes = with_children(terminal.process.pid)
        # A rank that is stopped never reaches the end of its step.
        processes[-1].suspend()
        terminal.type(b"\x03")
        terminal.read_until(rb"ends at once")
        assert terminal.process.poll() is None
        terminal.type(b"\x03")
        assert terminal.wait(120) == INTERRUPTED_EXIT_CODE
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive
