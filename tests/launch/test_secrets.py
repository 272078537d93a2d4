"""Values of cluster.environment and cluster.setup are in the batch script, and nowhere else."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from evspan.conf.compose import load_config, save_config
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.schema.training import TrainConfig
from evspan.conf.secret_values import hidden_overrides, hide_values, without_secrets
from evspan.launch.cli import submit
from evspan.launch.sweep.plan import PlannedRun, assign_folders
from support.refusals import refused_by
from support.small_shards import write_small_shards

ROOT = Path(__file__).parents[2]
CANARIES = ("canary-of-environment", "canary-of-setup")
KEYS = [
    "cluster=slurm",
    "cluster.detach=true",
    f"cluster.environment=['HF_TOKEN={CANARIES[0]}','NCCL_DEBUG=INFO']",
    f"cluster.setup=['export KEY={CANARIES[1]}']",
]
TINY = [
    "size=micro",
    "training.max_steps=1",
    "training.batch_size=2",
    "training.sequence_length=2",
    "training.num_workers=0",
    "training.evaluate_every=0",
    "training.log_every=1",
]
SBATCH = """#!/bin/sh
echo Submitted batch job 7
"""


@pytest.mark.parametrize(
    ("override", "published"),
    [
        ("cluster.environment=[A=1,B_2=x y]", "cluster.environment=[A=<hidden>,B_2=<hidden>]"),
        ("+cluster.environment=['A=1,Q=2']", "+cluster.environment=[A=<hidden>]"),
        ('cluster.environment=["A=1,Q=2",B=3]', "cluster.environment=[A=<hidden>,B=<hidden>]"),
        ("cluster.environment=A", "cluster.environment=<hidden>"),
        ("cluster.environment=[A,B=2]", "cluster.environment=[<hidden>,B=<hidden>]"),
        ("cluster.environment=['A=1", "cluster.environment=<hidden>"),
        ("cluster.environment.0=A=1", "cluster.environment.0=<hidden>"),
        ("cluster.setup=[export A=1]", "cluster.setup=<hidden>"),
        ("++cluster={environment:[A=1]}", "++cluster=<hidden>"),
        (
            "cluster.sbatch_args=[mail-type=END,'export=ALL,TOKEN=x',nice]",
            "cluster.sbatch_args=[mail-type=END,export=<hidden>,nice]",
        ),
        ("cluster.sbatch_args=[export=TOKEN=x]", "cluster.sbatch_args=[export=<hidden>]"),
        ("cluster.sbatch_args=[export=NONE]", "cluster.sbatch_args=[export=NONE]"),
        ("cluster.sbatch_args=[nice=1,qos=a]", "cluster.sbatch_args=[nice=1,qos=a]"),
        ("hydra.launcher.setup=[export A=1]", "hydra.launcher.setup=<hidden>"),
        (
            "+hydra.launcher.additional_parameters={export:TOKEN=x}",
            "+hydra.launcher.additional_parameters=<hidden>",
        ),
        ("cluster=slurm", "cluster=slurm"),
        ("~cluster.environment", "~cluster.environment"),
        ("cluster.partition=gpu", "cluster.partition=gpu"),
        ("run_dir=cluster.environment=[A=1]", "run_dir=cluster.environment=[A=1]"),
    ],
)
def test_overrides_keep_names_and_hide_values(override, published):
    assert hidden_overrides([override]) == [published]
    assert hidden_overrides([published]) == [published]
    assert PlannedRun(Path("run"), [override], TrainConfig()).overrides == [published]


def test_the_runs_of_a_sweep_over_an_environment_stay_different():
    values = [[f"cluster.environment=[A={value}]"] for value in ("secret1", "secret2", "secret1")]
    hidden = [hidden_overrides(overrides, distinct=True) for overrides in values]
    assert assign_folders([], hidden) == ["0", "1", "0"]
    assert not any("secret" in text for overrides in hidden for text in overrides)
    assert hidden_overrides(hidden[0]) == hidden[0]


def test_a_message_that_quotes_an_override_hides_its_value():
    overrides = ["cluster.environment=[HF_TOKEN=hf_abc,B='x,y']", "seed=hello"]
    text = "cannot parse 'hf_abc' in cluster.environment=[HF_TOKEN=hf_abc,B='x,y']; x,y; hello"
    hidden = hide_values(text, overrides)
    assert "hf_abc" not in hidden
    assert "x,y" not in hidden
    assert "hello" in hidden


def test_a_saved_config_is_read_as_it_was_published(tmp_path):
    config = TrainConfig(cluster=ClusterConfig(environment=["A=1", "B=2"], setup=["x", "y"]))
    save_config(config, tmp_path / "config.yaml")
    read = load_config(TrainConfig, tmp_path / "config.yaml")
    assert read.cluster.environment == ["A=<hidden>", "B=<hidden>"]
    assert read.cluster.setup == ["<hidden>", "<hidden>"]
    assert config.cluster.environment == ["A=1", "B=2"]
    assert without_secrets(read) == read


def test_a_wrong_entry_is_named_without_its_value(tmp_path, capsys):
    words = ["cluster=slurm", "cluster.environment=['A=1',canary_value]", f"run_dir={tmp_path}"]
    message = refused_by(submit.main, capsys, *words)
    assert "entry 2 of cluster.environment" in message
    assert "canary" not in message


# -- a whole run -----------------------------------------------------------------------------------
def evspan(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=150,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_that_a_run_leaves_contains_a_secret(tmp_path):
    """Submitted, trained by the task that SLURM would start, evaluated, reported."""
    shards = tmp_path / "shards"
    write_small_shards(shards, {"train": [8, 8], "val": [8]})
    run = tmp_path / "runs" / "a"
    (tmp_path / "bin").mkdir()
    for command in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        program = tmp_path / "bin" / command
        program.write_text(SBATCH if command == "sbatch" else "#!/bin/sh\n")
        program.chmod(0o755)
    keys = [f"dataset.root={shards}", f"run_dir={run}", "model.head.num_classes=3", *TINY, *KEYS]
    shown = [evspan(tmp_path, "evspan.launch", "submit", *keys)]
    (scripts,) = (run / ".submitit").iterdir()
    shown.append(
        evspan(
            tmp_path,
            "evspan.launch.slurm.submitted_task",
            str(scripts),
            SUBMITIT_EXECUTOR="slurm",
            SLURM_JOB_ID="7",
            SLURM_NTASKS="1",
            SLURM_PROCID="0",
            SLURM_LOCALID="0",
            SLURM_NODEID="0",
            SLURM_JOB_NODELIST="localhost",
        )
    )
    for words in (
        ["evaluate", str(run), f"dataset.root={shards}"],
        ["status", str(run)],
        ["report", str(run)],
    ):
        shown.append(evspan(tmp_path, "evspan.launch", *words))
    for folder in (scripts, scripts.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    published = [path for path in files if ".submitit" not in path.parts]
    names = {path.name for path in published}
    assert {
        "config.yaml",
        "config.json",
        "meta.json",
        "weights.safetensors",
        "report.html",
    } <= names
    for canary in CANARIES:
        holders = [path for path in published if canary.encode() in path.read_bytes()]
        assert not holders
        assert not any(canary in process.stdout + process.stderr for process in shown)
        assert any(canary.encode() in path.read_bytes() for path in scripts.iterdir())
    assert "HF_TOKEN=<hidden>" in (run / "config.json").read_text()
