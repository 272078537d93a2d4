"""The command line: help texts that match the config, mistakes that end in one line with the remedy."""

import errno
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evspan.conf.compose import compose
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.launch.cli import evaluate, train
from evspan.launch.cli.command import run_command
from evspan.launch.cli.main import COMMANDS, main
from evspan.launch.local.run import under_launcher
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def restored_state(monkeypatch, tmp_path):
    """Commands run in this process and in an empty folder; the settings that they change are restored."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # as a user might have it
    for name in ("EVSPAN_DEBUG", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def evspan(capfd, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `evspan ARGV`. From the file descriptors: the output of child processes counts too."""
    code = 0
    try:
        main(list(argv))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capfd.readouterr()
    return code, out, err


def python(*argv, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# -- help --------------------------------------------------------------------------------------------------------
def test_the_help_of_evspan_imports_nothing_slow():
    probe = "import sys; from evspan.launch.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = python("-c", probe)
    assert all(name in done.stdout for name in COMMANDS)
    assert not {"torch", "hydra", "omegaconf", "numpy", "h5py", "pipeline", "submitit"} & set(
        done.stderr.split()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example_and_needs_no_torch(command):
    probe = (
        "import sys; from evspan.launch.cli.main import main\ntry: main([*sys.argv[1:], '--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = python("-c", probe, command)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"examples?:?\s+evspan {command} ", done.stdout), done.stdout
    assert not {"torch", "deepspeed"} & set(done.stderr.split())


@pytest.mark.parametrize(
    "module",
    [
        "evspan.launch",
        "evspan.launch.cli.simulate",
        "evspan.launch.cli.train",
        "evspan.launch.cli.evaluate",
        "evspan.launch.cli.infer",
        "evspan.launch.cli.export",
        "evspan.launch.cli.convert",
        "evspan.launch.cli.smoke",
    ],
)
def test_commands_are_modules_too(module):
    done = python("-m", module, "--help")
    assert done.returncode == 0
    assert "evspan" in done.stdout
    assert not done.stderr


def test_another_broken_pipe_is_raised(monkeypatch):
    def show_help(words):
        raise BrokenPipeError(errno.EPIPE, "of a child process")

    monkeypatch.setattr("evspan.launch.cli.main.show_help", show_help)
    with pytest.raises(BrokenPipeError, match="of a child process"):
        main(["help"])


def test_without_arguments_it_prints_help_and_version_is_the_distributions(capfd):
    assert evspan(capfd) == evspan(capfd, "--help")
    assert evspan(capfd, "--version") == (0, f"evspan {importlib.metadata.version('evspan')}\n", "")


@pytest.mark.parametrize(("module", "schema"), [(train, TrainConfig), (evaluate, EvaluateConfig)])
def test_help_has_the_defaults_of_the_schema(module, schema):
    section = module.HELP.split("\n  keys\n")[1].split("\n\n")[0]
    defaults = dict(re.findall(r"^ +([\w.]+)=(\S*)", section, re.MULTILINE))
    config = OmegaConf.structured(compose(schema, []))
    assert len(defaults) > 5
    assert all(word == "own" for key, word in defaults.items() if key == "dataset")
    for key, default in defaults.items():
        if key != "dataset":
            value = OmegaConf.select(config, key)
            assert (
                getattr(value, "name", value)
                == OmegaConf.from_dotlist([f"v={default or repr('')}"]).v
            ), key


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        (train, ["experiment", "model", "size", "dataset", "augmentation", "deepspeed"]),
        (evaluate, ["dataset"]),
    ],
)
def test_help_names_every_choice(module, groups):
    for group in groups:
        for path in (ROOT / "conf" / group).rglob("*.yaml"):
            assert re.search(rf"\b{path.stem}\b", module.HELP), path


@pytest.mark.slow
def test_cfg_shows_the_config_and_runs_nothing(capfd):
    code, out, err = evspan(capfd, "train", "--cfg", "job", "training.max_steps=7")
    assert code == 0
    assert not err
    assert OmegaConf.create(out).training.max_steps == 7
    assert evspan(capfd, "evaluate", "--hydra-help")[0] == 0


# -- mistakes ----------------------------------------------------------------------------------------------------
SHARDS = "dataset.root=nowhere"
MISTAKES = [
    ("trian", "there is no command 'trian'; did you mean 'train'?"),
    ("quux", "There are: simulate, prep, labels, train, submit, sweep, status,"),
    ("--verison", "did you mean '--version'?"),
    # keys
    (
        "train training.max_step=5",
        "there is no key 'training.max_step'; did you mean training.max_steps?",
    ),
    ("train trainig.max_steps=5", "did you mean training.max_steps?"),
    ("train max_steps=5", "did you mean training.max_steps?"),
    ("train batch_size=5", "did you mean evaluation.batch_size or training.batch_size?"),
    ("train experimnt=demo", "did you mean experiment?"),
    ("train quux=5", "there is no key 'quux'; --cfg job lists"),
    ("train +training.max_step=5", "did you mean training.max_steps?"),
    ("train +dataset.lables.min_side=5", "did you mean dataset.labels?"),
    ("train parallel.ranks=2 training.max_step=5", "did you mean training.max_steps?"),
    ("evaluate checkpont=x", "did you mean checkpoint?"),
    ("prep sorce=x", "did you mean source?"),
    # choices
    (
        "train experiment=gen4/smal",
        "has no option 'gen4/smal'; did you mean experiment=gen4/small? There are: ",
    ),
    ("train experiment=small", "did you mean experiment=gen4/small?"),
    (
        "train model=maxvit",
        "There are: maxvit_yolox/default, maxvit_yolox/size_aware, maxvit_yolox/size_aware_attention",
    ),
    ("train size=huge", "size has no option 'huge'. There are: base, micro, small, tiny"),
    ("evaluate dataset=gen5", "did you mean dataset=gen4?"),
    ("prep dataset=gen5", "did you mean dataset=gen4?"),
    # values
    ("train training.max_steps=abc", "training.max_steps is 'abc'; give a whole number"),
    ("train training.max_steps=", "training.max_steps is ''; give a whole number"),
    (
        "train training.batch_size=atuo",
        "training.batch_size is 'atuo'; give a whole number, or auto (default: 8)",
    ),
    ("train optimizer.lr=fast", "optimizer.lr is 'fast'; give a number (default: 0.001)"),
    ("train checkpoint.resume=maybe", "give true or false"),
    (
        "train training.sampling=streams",
        "training.sampling is 'streams'; give one of stream, random, mixed",
    ),
    ("train seed=null", "seed is null; give a whole number"),
    ("train training=5", "give its keys one by one: training.max_steps, "),
    ("train model.fpn.in_stages=2", "give a list, such as [1,2]"),
    ("train training.max_steps=-3", "training.max_steps is -3; give 1 or more"),
    (
        "train model.head.center_radius=0",
        "model.head.center_radius is 0.0; give a number of strides",
    ),
    ("train model.head.candidate_top_k=0", "model.head.candidate_top_k is 0; give 1 or more"),
    ("train optimizer.end_factor=-3", "optimizer.end_factor is -3.0; give 0 or more"),
    ("train model.fpn.in_stages=[2,3]", "model.fpn.in_stages is [2, 3]; choose [2,3,4]"),
    ("train dataset=simulated model.head.num_classes=1", "set model.head.num_classes=3 or more"),
    ("evaluate evaluation.nms_threshold=2", "evaluation.nms_threshold is 2.0; give above 0 to 1"),
    ("prep source=x output=y frames.downsample=3", "frames.downsample is 3; choose 1, 2 or 4"),
    # the grammar of overrides, and options
    ("train training.max_steps", "'training.max_steps' is not of the form key=value"),
    ("train optimizer.lr='1", "needs quotes"),
    ("train optimizer.lr=a=b", "'optimizer.lr=\"a=b\"'"),
    (
        "train model.fpn.in_stages=2,3,4",
        "a list needs brackets. Use: evspan train 'model.fpn.in_stages=[2,3,4]'",
    ),
    ("train run_dir=${nowhere}", "Interpolation key 'nowhere' not found"),
    ("train --parallel.ranks=2", "has no dashes. Use: evspan train parallel.ranks=2"),
    ("train --ranks 2", "Use: evspan train parallel.ranks=2"),
    ("train --quux 2", "evspan train --help"),
    ("evaluate --cfg jobb", "choose from"),
    ("prep --processes 2", "Use: evspan prep processes=2"),
    ("evaluate -m a,b parallel.ranks=2", "--multirun cannot evaluate by several ranks"),
    # files
    ("train", "dataset.root is empty. Name the folder that evspan prep wrote"),
    (f"train {SHARDS}", "evspan prep source=RAW output=nowhere"),
    (f"train parallel.ranks=2 {SHARDS}", "evspan prep source=RAW output=nowhere"),
    (
        f"train {SHARDS} checkpoint.init_from=gone",
        "checkpoint.init_from is gone, where there is nothing",
    ),
    (f"train {SHARDS} run_dir={__file__}", "which is a file"),
    (f"evaluate {SHARDS}", "the checkpoint is missing; name a run folder"),
    (
        f"evaluate gone {SHARDS}",
        "there is no checkpoint gone; name a run folder",
    ),
    (f"evaluate {__file__} {SHARDS}", "evspan prep source=RAW output=nowhere"),
    ("prep source=gone output=out", "gone"),
    ("prep source=x", "output="),
    ("prep info gone.raw", "gone.raw"),
    ("prep info", "evspan prep info --help"),
    ("prep decode gone.raw out.h5", "gone.raw"),
    ("prep preview gone.raw out.png", "gone.raw"),
    ("prep preview gone.raw out.png --fraems 3", "evspan prep preview --help"),
    ("simulate", "evspan simulate --help"),
    ("simulate out --sceonds 3", "--sceonds"),
    ("simulate out --recordings train", "is not of the form train=8,val=2"),
    ("simulate out --seconds -1", "--seconds is -1; give more than 0"),
    ("labels impor gone out", "there is no 'labels impor'; did you mean 'import'?"),
    ("labels import gone out", "gone is not there. Give a file or folder of labels"),
    ("labels export gone out", "gone is not there. Give a box file"),
    ("infer gone.raw", "evspan infer RUN gone.raw"),
    ("infer gone gone.raw --conf 0.5 --quux", "evspan infer --help"),
    ("infer gone gone.raw", "gone"),
    ("infer gone.raw --checkpoint gone", "evspan infer gone gone.raw"),
    ("export gone", "evspan export --help"),
    ("export gone out.onnx", "gone is not there. Name a published .ckpt, a run folder"),
    ("export gone out.pb", "out.pb ends in neither .onnx nor .pt2"),
    ("smoke --ranks 0", "--ranks is 0; give 1 to 64"),
    ("smoke --ranks two", "evspan smoke --help"),
    ("smoke --steps 1", "--steps is 1; give 2 to 100: runs are resumed half way"),
    (f"smoke --keep {__file__}", "exists and is not empty; name a new folder"),
    ("convert gone.ckpt", "evspan convert --help"),
    ("convert gone.ckpt out.safetensors", "gone.ckpt is not there. Name a published .ckpt"),
    ("convert gone.ckpt out.pt", "out.pt ends in none of .safetensors, .ckpt"),
    ("convert gone.ckpt out.ckpt --classes a,,b", "'a,,b' is not of the form car,pedestrian"),
    ("convert gone.ckpt out.ckpt --window-ms 20", "--window-ms 20 needs --mode exact"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "remedy"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_ends_in_one_line(capfd, tmp_path, arguments, remedy):
    code, out, err = evspan(capfd, *arguments.split())
    assert code == 2, out + err
    assert err.startswith("error: ") and err.count("\n") == 1 and remedy in err, err
    assert not [line for line in out.splitlines() if "[HYDRA]" not in line], (
        out
    )  # --multirun announces its jobs
    assert not [p for p in tmp_path.iterdir() if p.name != "multirun"]


@pytest.mark.slow
def test_debug_shows_the_traceback(capfd, monkeypatch):
    done = python("-m", "evspan.launch", "train", "training.max_steps=0", EVSPAN_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == "evspan.conf.errors.ConfigError: training.max_steps is 0; give 1 or more"
    )
    monkeypatch.setenv("EVSPAN_DEBUG", "1")
    with pytest.raises(ConfigError, match="frames.bins is 0"):
        main(["prep", "source=x", "output=y", "frames.bins=0"])


# -- what a task raises ------------------------------------------------------------------------------------------
@pytest.fixture
def failing(monkeypatch):
    """A function that makes training and evaluation raise an error."""

    def fail_with(error: BaseException) -> None:
        def run(config: object) -> int:
            raise error

        monkeypatch.setattr("evspan.launch.local.run.run_training", run)
        monkeypatch.setattr("evspan.launch.local.run.run_evaluation", run)

    return fail_with


def test_a_users_error_in_the_task_is_reported_and_a_defect_is_raised(capfd, failing):
    failing(UserError("the disk is full;\n  delete something"))
    with pytest.raises(SystemExit) as end:
        train.main([])
    assert end.value.code == 2
    failing(FileNotFoundError(2, "No such file or directory", "shards/00000.h5"))
    with pytest.raises(SystemExit) as end:
        train.main([])
    assert end.value.code == 2
    failing(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        evaluate.main([])
    assert capfd.readouterr().err == (
        "error: the disk is full; delete something\n"
        "error: shards/00000.h5: No such file or directory\n"
    )  # and nothing of Hydra's


@pytest.mark.parametrize(("raised", "code"), [(SystemExit(75), 75), (KeyboardInterrupt(), 130)])
def test_a_task_chooses_its_exit_code(failing, raised, code):
    failing(raised)
    with pytest.raises(SystemExit) as end:
        train.main([])
    assert end.value.code == code


def test_a_failing_command_notes_when(tmp_path, monkeypatch):
    monkeypatch.setenv("EVSPAN_FAILURE_FILE", str(tmp_path / "note"))
    run_command(lambda: None)
    assert not (tmp_path / "note").exists()
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    assert (tmp_path / "note").exists()


def test_hydra_leaves_no_trace(tmp_path):
    level = logging.getLogger().level  # of libraries, which stay off the console
    config = compose(TrainConfig, ["experiment=demo", "run_dir=runs/x"])
    assert config.run_dir == "runs/x"
    assert config.parallel.ranks == 2
    compose(EvaluateConfig, ["checkpoint=x"])
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())
    assert logging.getLogger().level == level


STEP = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "inside"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True),
        ({"SLURM_NTASKS": "4"}, False),
        # the shell of an interactive step, and a batch script, in a job of 4 tasks
        ({**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"}, False),
        ({**STEP, "SLURM_STEP_ID": "4294967291"}, False),
        ({**STEP, "SLURM_STEP_ID": "4294967292"}, False),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),
    ],
)
def test_a_launchers_ranks_are_recognised(monkeypatch, environment, inside):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert under_launcher() is inside


LEFT_OVER = [
    (
        {"RANK": "1", "WORLD_SIZE": "4"},
        "RANK=1 and WORLD_SIZE=4 make this process one of several ranks, but MASTER_ADDR, "
        "MASTER_PORT are missing: left over from another program? To start without a launcher: "
        "unset RANK WORLD_SIZE",
    ),
    ({"WORLD_SIZE": "8"}, "unset WORLD_SIZE"),
    ({"RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "but WORLD_SIZE is missing"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "but MASTER_PORT is missing"),
]


@pytest.mark.parametrize(("environment", "message"), LEFT_OVER)
@pytest.mark.parametrize(
    "command",
    [
        ["train", "experiment=demo", "dataset.root=x"],
        ["evaluate", "x", "dataset.root=x"],
        ["doctor"],
        ["bench"],
        ["smoke"],
    ],
    ids=lambda command: command[0],
)
def test_left_over_variables_of_a_launcher_are_named(
    capfd, monkeypatch, command, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = evspan(capfd, *command)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
