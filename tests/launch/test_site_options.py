"""Options of sbatch and srun that sites ask for: the lines that they add to a batch script."""

from dataclasses import replace

import pytest
from evspan.conf.errors import ConfigError
from evspan.conf.schema.cluster import ClusterConfig, PrepClusterConfig, Scheduler, SlurmConfig
from evspan.conf.schema.training import TrainConfig
from evspan.launch.slurm.prep_array import PrepArray
from evspan.launch.slurm.sbatch import JobArray, script
from evspan.launch.sweep.plan import PlannedRun

# key, value, and the line that it adds; `srun` lines are options of srun.
OPTIONS = [
    ("partition", "gpu", "#SBATCH --partition=gpu"),
    ("partition", "gpu,gpu-long", "#SBATCH --partition=gpu,gpu-long"),
    ("constraint", "a100&nvlink", "#SBATCH --constraint='a100&nvlink'"),
    ("constraint", "[rack1*2&rack2*4]", "#SBATCH --constraint='[rack1*2&rack2*4]'"),
    ("exclude", "n07,n[12-14]", "#SBATCH --exclude='n07,n[12-14]'"),
    ("gres", "nvme:1,license_x:2", "#SBATCH --gres=nvme:1,license_x:2"),
    ("exclusive", True, "#SBATCH --exclusive"),
    ("nice", 100, "#SBATCH --nice=100"),
    ("nice", -5, "#SBATCH --nice=-5"),
    ("mail_type", "END,FAIL,TIME_LIMIT_90", "#SBATCH --mail-type=END,FAIL,TIME_LIMIT_90"),
    ("cpu_bind", "cores", "srun --cpu-bind=cores"),
    ("cpu_bind", "verbose,mask_cpu:0xff,0xff00", "srun --cpu-bind=verbose,mask_cpu:0xff,0xff00"),
    ("cpu_bind", "ldoms", "srun --cpu-bind=ldoms"),
    ("mem_bind", "local", "srun --mem-bind=local"),
    ("gpu_bind", "single:1", "srun --gpu-bind=single:1"),
    ("gpu_bind", "map:0*4,1", "srun '--gpu-bind=map:0*4,1'"),
]
BOTH = [PrepClusterConfig, ClusterConfig]


@pytest.fixture
def text_of(tmp_path):
    """The batch script for a config: that of a run, or of a prep array."""

    def text(cluster: SlurmConfig) -> str:
        if isinstance(cluster, ClusterConfig):
            run = PlannedRun(tmp_path / "run", [], TrainConfig())
            return script(JobArray([run], cluster, 2, 4, tmp_path / "scripts", "evspan-x"))
        array = PrepArray("evspan-prep-x", "process 1", tmp_path / "slurm", [], [[], []])
        return array.script(cluster)

    return text


def words(line: str) -> set[str]:
    """The options of a line as they are written: those of srun each by itself."""
    return {f"srun {word}" for word in line.split()} if line.startswith("srun ") else {line}


def lines_of(text: str) -> set[str]:
    lines: set[str] = set()
    for line in text.splitlines():
        lines |= words(line)
    return lines


@pytest.mark.parametrize("schema", BOTH)
@pytest.mark.parametrize(("key", "value", "line"), OPTIONS)
def test_an_option_adds_one_line(text_of, schema, key, value, line):
    plain = schema(scheduler=Scheduler.slurm)
    assert lines_of(text_of(replace(plain, **{key: value}))) - lines_of(text_of(plain)) == {line}


@pytest.mark.parametrize("schema", BOTH)
def test_mail_has_a_recipient(text_of, schema):
    cluster = schema(scheduler=Scheduler.slurm, mail_type="ALL", mail_user="a.b+c@lab.org")
    assert {"#SBATCH --mail-type=ALL", "#SBATCH --mail-user=a.b+c@lab.org"} <= lines_of(
        text_of(cluster)
    )


def test_gpus_by_name_replace_those_by_number(text_of):
    by_number = lines_of(text_of(ClusterConfig(gpus_per_node=4)))
    by_name = lines_of(text_of(ClusterConfig(gpus_per_node=4, gres="gpu:a100:4,nvme:1")))
    assert by_number - by_name == {"#SBATCH --gpus-per-node=4"}
    assert by_name - by_number == {"#SBATCH --gres=gpu:a100:4,nvme:1"}
    assert ClusterConfig(gpus_per_node=8, gres="gpu:a:2,gpu:b:6").gpus_in_gres() == 8
    ClusterConfig(gpus_per_node=8, ranks_per_node=4, gres="gpu:4")
    with pytest.raises(ConfigError, match="4 GPUs, for 8 ranks per node.*set gpus_per_node=4"):
        ClusterConfig(gpus_per_node=8, gres="gpu:4")
    with pytest.raises(ConfigError, match="gpus_per_node=0"):
        ClusterConfig(gres="gpu:4")


def test_an_option_of_sbatch_args_replaces_the_key(text_of):
    text = text_of(ClusterConfig(nice=5, sbatch_args=["nice=7"]))
    assert [line for line in text.splitlines() if "nice" in line] == ["#SBATCH --nice=7"]


@pytest.mark.parametrize("schema", BOTH)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "gpu, long"),
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("partition", ","),
        ("constraint", "a\n#SBATCH --uid=0"),
        ("gres", "gpu"),
        ("gres", "gpu:0"),
        ("gres", "nvme:1\n"),
        ("gres", "nvme:$(id)"),
        ("nice", 1 << 31),
        ("mail_type", "SOMETIMES"),
        ("mail_type", "END,\nFAIL"),
        ("cpu_bind", "cores;id"),
        ("cpu_bind", "cores --uid=0"),
        ("mem_bind", "`id`"),
        ("gpu_bind", "single:1\n"),
    ],
)
def test_values_that_are_none_are_refused_by_name(schema, key, value):
    with pytest.raises(ConfigError, match=f"cluster.{key}") as error:
        schema(scheduler=Scheduler.slurm, **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("user", ["a b", "a@b\n", "a;id", "$(id)", "'a'"])
def test_a_mail_address_is_one_word(user):
    with pytest.raises(ConfigError, match="cluster.mail_user"):
        ClusterConfig(mail_type="END", mail_user=user)
    with pytest.raises(ConfigError, match="add mail_type=END,FAIL"):
        ClusterConfig(mail_user="a@b.org")
