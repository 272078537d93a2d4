"""Private names of Hydra, OmegaConf, Submitit and its Hydra launcher still do what we rely on.

Each adapter names the version that it was verified against. If one of these tests fails after an
update, read the adapter and the library's changes, correct the adapter, and set the version.
"""

import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from evspan.conf import hydra_adapter, omegaconf_adapter
from evspan.conf.compose import compose, multirun
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import TrainConfig
from evspan.launch.slurm import hydra_plugin, submitit_adapter
from hydra.core.global_hydra import GlobalHydra
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import OmegaConf


@pytest.mark.parametrize(
    ("package", "verified"),
    [
        ("hydra-core", hydra_adapter.VERIFIED_VERSION),
        ("omegaconf", omegaconf_adapter.VERIFIED_VERSION),
        ("submitit", submitit_adapter.VERIFIED_VERSION),
        ("hydra-submitit-launcher", hydra_plugin.VERIFIED_VERSION),
    ],
)
def test_the_installed_version_is_the_verified_one(package, verified):
    assert version(package) == verified


# -- Hydra ---------------------------------------------------------------------------------------
@pytest.fixture(autouse=True, scope="module")
def _schemas():
    """Composing a config registers its schema, which these trees refer to."""
    compose(TrainConfig, [])


def test_a_composed_tree_has_no_node_of_hydra_and_leaves_no_state():
    raw = hydra_adapter.compose_tree("train", ["size=micro"], None)
    assert "hydra" not in raw
    assert raw.model.backbone.embed_dim == 16
    assert not GlobalHydra.instance().is_initialized()


def test_a_further_tree_is_searched_after_ours(tmp_path):
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "huge.yaml").write_text("# @package model\nbackbone: {embed_dim: 96}\n")
    (tmp_path / "size" / "tiny.yaml").write_text("# @package model\nbackbone: {embed_dim: 96}\n")
    for size, embed_dim in (("huge", 96), ("tiny", 32)):
        raw = hydra_adapter.compose_tree("train", [f"size={size}"], tmp_path)
        assert raw.model.backbone.embed_dim == embed_dim
    with pytest.raises(ConfigError, match="not a folder"):
        hydra_adapter.compose_tree("train", [], tmp_path / "nowhere")


def test_overrides_expand_to_every_combination():
    expansion = hydra_adapter.expand_overrides(["a=1,2", "b='x,y'", "c=range(2)", "d=3"])
    assert expansion.swept_keys == ["a", "c"]
    assert expansion.combinations == [
        [f"a={a}", "b='x,y'", f"c={c}", "d=3"] for a in (1, 2) for c in (0, 1)
    ]


@pytest.mark.slow
def test_multirun_calls_the_task_with_each_config(tmp_path, monkeypatch):
    """Without Hydra's argument parser, which fails on Python 3.14, and without sys.argv."""

    def broken_parser() -> None:
        raise ValueError("badly formed help string")

    for module in ("hydra.main", "hydra._internal.utils"):
        monkeypatch.setattr(import_module(module), "get_args_parser", broken_parser)
    monkeypatch.setattr("sys.argv", ["a", "--broken"])
    monkeypatch.chdir(tmp_path)
    jobs = []

    def task(config: TrainConfig, number: int) -> None:
        nested = compose(TrainConfig, ["seed=7"])  # as hydra/launcher=slurm does
        jobs.append((number, config.seed, nested.seed))

    multirun(TrainConfig, ["seed=1,2", "size=micro"], task)
    assert jobs == [(0, 1, 7), (1, 2, 7)]
    assert not GlobalHydra.instance().is_initialized()


def test_multirun_writes_no_secrets(tmp_path, monkeypatch):
    """Hydra's multirun.yaml has them by name; the jobs have the values."""
    monkeypatch.chdir(tmp_path)
    environments = []
    overrides = [
        "seed=1,2",
        "run_dir=${hydra:job.name}",
        "cluster.environment=[HF_TOKEN=canary1]",
        "cluster.setup=[export KEY=canary2]",
        "cluster.sbatch_args=['export=ALL,X=canary3',nice]",
    ]
    multirun(TrainConfig, overrides, lambda c, _: environments.append(c.cluster.environment))
    assert environments == [["HF_TOKEN=canary1"]] * 2
    (path,) = tmp_path.rglob("multirun.yaml")
    text = path.read_text()
    assert "canary" not in text
    stored = OmegaConf.load(path)
    assert stored.cluster.environment == ["HF_TOKEN=<hidden>"]
    assert stored.cluster.sbatch_args == ["export=<hidden>", "nice"]
    assert "seed=1,2" in stored.hydra.overrides.task


@pytest.mark.slow
def test_multirun_knows_the_further_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders: list[Path | None] = []

    def task(config: TrainConfig, number: int) -> None:
        from hydra.core.hydra_config import HydraConfig

        folders.append(hydra_adapter.config_dir_of(HydraConfig.get()))

    multirun(TrainConfig, ["seed=1,2", "--config-dir", str(tmp_path)], task)
    multirun(TrainConfig, ["seed=1,2"], task)
    assert folders == [tmp_path, tmp_path, None, None]


# -- OmegaConf -----------------------------------------------------------------------------------
def test_the_root_of_a_node():
    config = OmegaConf.create({"a": {"b": {"c": 1}}})
    assert omegaconf_adapter.root_of(config.a.b) is config
    assert omegaconf_adapter.root_of(config) is config


# -- Submitit ------------------------------------------------------------------------------------
def test_a_script_is_written_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = submitit_adapter.Executor(tmp_path, python="my-python")
    executor.update_parameters(job_name="x", time=5, array_parallelism=2, setup=["first"])
    text = submitit_adapter.script_of(executor, tasks=3)
    assert "#SBATCH --array=0-2%2" in text
    assert "my-python -u -m evspan.launch.slurm.submitted_task" in text
    assert text.index("first") < text.index("srun")
    single = submitit_adapter.Executor(tmp_path)
    assert "--array" not in submitit_adapter.script_of(single, tasks=1)


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_percent_sign_of_a_path_is_neither_slurms_nor_submitits(tmp_path, tasks):
    """SLURM would replace %j and %x in a path, Submitit %j, %t, %A and %a."""
    folder = tmp_path / "50%jobs %A" / "100%"
    executor = submitit_adapter.Executor(folder, python="my-python")
    text = submitit_adapter.script_of(executor, tasks)
    name = "%j" if tasks == 1 else "%A_%a"
    pattern = str(folder).replace("%", "%%")
    assert f"#SBATCH --output='{pattern}/{name}_0_log.out'" in text
    assert f"--output '{pattern}/{name}_%t_log.out'" in text
    assert f"my-python -u -m evspan.launch.slurm.submitted_task '{folder}'" in text
    paths = submitit_adapter.JobPaths(folder, job_id="7_1", task_id=3)
    assert paths.stdout == folder / "7_1_3_log.out"
    assert paths.submitted_pickle == folder / "7_1_submitted.pkl"
    assert paths.submission_file == folder / "7_submission.sh"
    assert paths.get_first_id_independent_folder(folder) == folder


# -- hydra-submitit-launcher ---------------------------------------------------------------------
def test_its_parameters_become_keys_of_our_cluster():
    parameters = {
        "partition": "gpu",
        "timeout_min": 30,
        "setup": ["module load a", "it's"],
        "additional_parameters": {"mail-type": "END"},
        "account": None,
        "gpus_per_node": 8,
        "mem_gb": 64,
    }
    overrides = hydra_plugin.cluster_overrides(parameters)
    config = compose(TrainConfig, ["cluster=slurm", *overrides])
    assert config.cluster.partition == "gpu"
    assert config.cluster.timeout_min == 30
    assert config.cluster.setup == ["module load a", "it's"]
    assert config.cluster.sbatch_args == ["mail-type=END"]
    assert config.cluster.account == ""
    assert config.cluster.gpus_per_node == 8
    assert config.cluster.mem_gb == 64


KEYS = vars(SlurmQueueConf()).keys() - {"_target_", *hydra_plugin.KEYS_OF_YAML}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_each_key_of_its_launcher_is_forwarded_or_refused_with_a_remedy(name):
    defaults = vars(SlurmQueueConf())
    hydra_plugin.cluster_overrides(defaults)  # is not refused: a user has set none of them
    value = {"a": 7} if name == "additional_parameters" else 7
    try:
        overrides = hydra_plugin.cluster_overrides({**defaults, name: value})
    except ConfigError as error:
        assert f"hydra.launcher.{name}=7" in str(error)
        assert re.search("cluster|parallel|additional_parameters|leave it out", str(error))
        return
    assert any("7" in override for override in overrides)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("comment", "'+hydra.launcher.additional_parameters={comment: VALUE}'"),
        ("mem_per_gpu", "cluster.mem_gb"),
        ("mem_per_cpu", "cluster.mem_gb"),
        ("cpus_per_gpu", "cluster.cpus_per_task"),
        ("gpus_per_task", "cluster.gpus_per_node"),
        ("max_num_timeout", "cluster.max_retries"),
        ("nodes", "parallel.ranks"),
    ],
)
def test_a_key_that_would_be_dropped_names_its_remedy(name, remedy):
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        hydra_plugin.cluster_overrides({name: 7})


def test_no_gpus_of_its_launcher_replace_those_of_the_cluster():
    overrides = hydra_plugin.cluster_overrides({"gpus_per_node": 0, "mem_gb": None})
    assert overrides == ["cluster.gpus_per_node=0"]
