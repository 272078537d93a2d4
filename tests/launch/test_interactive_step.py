"""The shell of an interactive step of SLURM starts ranks as a shell on any machine does."""

import shlex
import subprocess
import sys

import pytest

SHARD_FRAMES = {"train": [24], "val": [12]}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
COMMANDS = """
env | grep -E '^SLURM_(NTASKS|STEP_NUM_TASKS|STEP_ID)=' | sort
export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1
{python} train {train} run_dir={runs}/two parallel.ranks=2 parallel.timeout_s=60; echo "two: exit code $?"
{python} evaluate {runs}/two dataset.root={shards}; echo "evaluate: exit code $?"
{python} doctor --folder {runs} | tail -1; echo "doctor: exit code ${{PIPESTATUS[0]}}"
exit
"""


def test_train_evaluate_and_doctor_start_their_ranks_themselves(cluster, shards, tmp_path):
    train = (
        f"experiment=demo size=micro dataset.root={shards} training.max_steps=1 "
        "training.sequence_length=4 training.batch_size=2 evaluation.skip_first_ms=0"
    )
    program = f"{shlex.quote(sys.executable)} -m evspan.launch"
    text = COMMANDS.format(python=program, train=train, runs=tmp_path, shards=shards)
    done = subprocess.run(
        ["script", "-qec", "salloc -n 2 -N 1", "/dev/null"],
        input=text,
        env={**cluster.environment, "SHELL": "/bin/bash"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    output = done.stdout + done.stderr
    assert "SLURM_NTASKS=2" in output, output
    assert "SLURM_STEP_ID=4294967290" in output
    assert "SLURM_STEP_NUM_TASKS=1" in output
    for name in ("two", "evaluate"):
        assert f"{name}: exit code 0" in output, output
    assert (tmp_path / "two" / "checkpoints" / "step-00000001").is_dir()
    assert "starts its tasks itself" not in output
    assert "passed" in output.split("doctor:")[-2], output
