"""A config is composed once; ranks, SLURM tasks and requeues read the file that the launcher wrote."""

import pickle
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from evspan.conf.compose import CONFIG_FILE, PRIMARY_CONFIGS, compose, load_config, save_config
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.launch.local import rank, run
from evspan.launch.slurm.rank_task import RankTask

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
)
DATASETS = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
# Text that YAML, Hydra or OmegaConf would read as something else.
TEXTS = [
    *("1e3", "2024_11_28", "true", "null", "~", "", "007", "0x1f", "1:30", "2001-01-01", "<<", "="),
    *("a: b", "#x", "it's", '"q"', "ünï", " lead", "trail ", "\t", "- a", "{a}", "*", "%x", "\\"),
    *("$HOME", "${x}", "${x", "\\${x}", "\\\\${x}", "a\\b ${HOME} c\\", "export P=${P:-a}:$Q"),
]


@pytest.mark.parametrize(
    ("schema", "dataset"),
    [
        *((schema, "gen4") for schema in PRIMARY_CONFIGS),
        *((TrainConfig, dataset) for dataset in DATASETS if dataset != "gen4"),
    ],
)
def test_every_schema_is_the_same_after_a_file(tmp_path, schema, dataset):
    argv = [f"dataset={dataset}"]
    if issubclass(schema, TrainConfig):
        argv.append("model.head.num_classes=8")
    config = compose(schema, argv)
    assert type(config) is schema
    save_config(config, tmp_path / CONFIG_FILE)
    assert load_config(schema, tmp_path / CONFIG_FILE) == config


@pytest.fixture(scope="module")
def gen4_config():
    return compose(TrainConfig, ["dataset=gen4"])


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_the_same_after_a_file(tmp_path, gen4_config, text):
    config = deepcopy(gen4_config)
    config.run_dir = text
    config.cluster.mounts = [text, "/data"]
    config.dataset.classes = [f"a{text}", "b", "c"]
    save_config(config, tmp_path / CONFIG_FILE)
    assert load_config(TrainConfig, tmp_path / CONFIG_FILE) == config


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path):
    path = tmp_path / CONFIG_FILE
    with pytest.raises(ConfigError, match=f"{path} is missing"):
        load_config(TrainConfig, path)
    path.write_text("training: {max_steps: 0}\n")
    with pytest.raises(ConfigError, match=f"{path}: training.max_steps is 0; give 1 or more"):
        load_config(TrainConfig, path)
    path.write_text("training: {max_step: 3}\n")
    with pytest.raises(ConfigError, match="Key 'max_step' not in 'TrainingConfig'"):
        load_config(TrainConfig, path)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_rank_has_exactly_the_composed_config(tmp_path, monkeypatch, experiment):
    """From the command that starts the ranks to the trainer, with the trainer replaced."""
    commands = []
    trained = []
    monkeypatch.setattr(run, "check_training", lambda config: None)
    monkeypatch.setattr(run, "run_ranks", lambda command, *_, **__: commands.append(command) or 0)
    monkeypatch.setattr(rank, "train_rank", trained.append)
    argv = [f"experiment={experiment}", f"run_dir={tmp_path / 'run'}", "parallel.ranks=2"]
    config = compose(TrainConfig, [*argv, "training.batch_size=8"])
    assert run.run_training(config) == 0
    python, _, module, kind, path = commands[0]
    assert (python, module) == (sys.executable, "evspan.launch.local.rank")
    assert path == str(tmp_path / "run" / CONFIG_FILE)
    rank.run_rank(kind, Path(path))
    assert trained == [config]


def test_a_rank_of_an_evaluation_has_exactly_the_composed_config(monkeypatch):
    evaluated = []
    monkeypatch.setattr(run, "check_evaluation", lambda config: None)
    monkeypatch.setattr(rank, "evaluate_rank", evaluated.append)

    def run_ranks(command: list[str], *_: object, **__: object) -> int:
        rank.run_rank(command[3], Path(command[4]))
        return 0

    monkeypatch.setattr(run, "run_ranks", run_ranks)
    config = compose(EvaluateConfig, ["checkpoint=a", "dataset=gen4", "parallel.ranks=3"])
    assert run.run_evaluation(config) == 0
    assert evaluated == [config]


def test_a_pickled_task_has_only_the_folder_of_its_run(tmp_path):
    task = pickle.loads(pickle.dumps(RankTask(str(tmp_path))))
    assert vars(task) == {"run": str(tmp_path)}


def test_prep_is_composed_by_the_same_function():
    config = compose(PrepConfig, ["source=a", "output=b", "dataset=gen4", "frames.bins=5"])
    assert (config.source, config.output, config.frames.bins) == ("a", "b", 5)
