"""`evspan prep cluster=slurm` on a throw-away SLURM: the array writes what one machine's processes write, whichever process dies."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evspan.conf.code_version import running_code
from evspan.conf.errors import ConfigError
from evspan.conf.schema.cluster import PrepClusterConfig, Scheduler
from evspan.data_prep.prepare import prepare
from evspan.launch.slurm.prep_task import BYTES_PER_TASK, MOST_TASKS, balanced, number_of_tasks
from support.prepared import assert_same, prep_config
from support.slurm_cluster import Cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEYS = [
    "dataset=simulated",
    "dataset.labels.label_every_ms=100",
    "frames.bins=3",
    "cluster=slurm",
    "cluster.mem_gb=1",
]
COPIES = 80  # of a small recording: a second of work or more
QUICK = (
    "import evspan.launch.slurm.prep_wait as w; w.QUEUE_S = w.GRACE_S = 1.0; w.POLL_S = 0.2; "  # the cluster is ours, its disk local
    "from evspan.launch.cli.main import main; main()"
)


@pytest.fixture(scope="module")
def many(source, tmp_path_factory):
    """A source of many recordings, and the shards that this machine prepares from it."""
    folder, output = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("many_prepared")
    (folder / "train").mkdir()
    for i in range(COPIES):
        for ending in ("td.h5", "bbox.npy"):
            os.link(source / "train" / f"c_{ending}", folder / "train" / f"r{i:03d}_{ending}")
    prepare(prep_config(folder, output))
    return folder, output


@pytest.fixture
def slurm(cluster: Cluster):
    yield cluster
    cluster.end_jobs()


def command(
    cluster: Cluster | None,
    source,
    output,
    *more: str,
    environment=None,
) -> subprocess.Popen:
    """The command, started in another folder than the code's."""
    environment = {
        **(cluster.environment if cluster else os.environ),
        "PYTHONPATH": str(ROOT),
        **(environment or {}),
    }
    return subprocess.Popen(
        [sys.executable, "-c", QUICK, "prep", f"source={source}", f"output={output}", *KEYS, *more],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_until(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.002)
    return value


def task_of(output: Path) -> int | None:
    """The process that does a task for `output`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"evspan.launch.slurm.submitted_task" in words
            and os.path.basename(words[0]).startswith(b"python")
            and str(output / ".parts" / "slurm").encode() in words
        ):
            return int(path.parent.name)
    return None


def outcomes(output: Path) -> dict[str, int]:
    return {
        p.name: p.stat().st_mtime_ns
        for p in (output / ".parts" / "slurm" / "outcomes").glob("[0-9]*.json")
    }


def stopped_at_work(output: Path) -> tuple[int, dict[str, int]]:
    """The one task of an array, stopped when it had done some recordings, and the outcomes it had written."""
    wait_until(lambda: outcomes(output))
    pid = task_of(output)
    assert pid
    os.kill(pid, signal.SIGSTOP)
    done = outcomes(output)
    assert 0 < len(done) < COPIES
    return pid, done


def job_of(cluster: Cluster) -> str:
    """The newest job."""
    return max(cluster.jobs(), key=lambda id_: int(id_.split("_")[0]))


# -- groups ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([5, 4, 3, 3, 3], 2),
        ([9, 1, 1, 1, 1, 1, 8], 3),
        ([7, 7, 6, 6, 5, 5, 4, 4, 4], 4),
        ([3], 4),
        ([0, 0, 0, 0], 2),
        ([10, 1], 2),
        ([2, 2, 2, 2, 2, 2], 3),
    ],
)
def test_groups_are_balanced(sizes, groups):
    members = balanced(sizes, groups)
    assert sorted(itertools.chain(*members)) == list(range(len(sizes)))
    assert len(members) == min(groups, len(sizes))
    assert all(members)
    best = min(
        max(sum(s for s, g in zip(sizes, assignment) if g == group) for group in range(groups))
        for assignment in itertools.product(range(groups), repeat=len(sizes))
    )  # of all assignments
    assert (
        max(sum(sizes[i] for i in group) for group in members)
        <= (4 / 3 - 1 / (3 * groups)) * best + 1e-9
    )


def test_empty_files_are_divided_evenly_and_equal_ones_in_order():
    assert balanced([0] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert balanced([5] * 4, 2) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("sizes", "tasks", "expected"),
    [
        ([1] * 9, 0, 1),
        ([1] * 9, 4, 4),
        ([1] * 9, 40, 9),
        ([BYTES_PER_TASK] * 9, 0, 9),
        ([BYTES_PER_TASK // 2] * 9, 0, 5),
        ([BYTES_PER_TASK] * 1000, 0, MOST_TASKS),
    ],
)
def test_the_number_of_tasks_follows_the_size(sizes, tasks, expected):
    assert (
        number_of_tasks(sizes, PrepClusterConfig(scheduler=Scheduler.slurm, array_size=tasks))
        == expected
    )


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"timeout_min": 0}, "cluster.timeout_min is 0"),
        ({"mem_gb": -1}, "cluster.mem_gb is -1"),
        ({"array_size": -1}, "cluster.array_size is -1"),
        (
            {"timeout_min": 1, "signal_delay_s": 60},
            "cluster.signal_delay_s is 60, but the time limit is 60 s",
        ),
    ],
)
def test_impossible_values_are_refused(values, part):
    with pytest.raises(ConfigError, match=re.escape(part)):
        PrepClusterConfig(scheduler=Scheduler.slurm, **values)


def test_keys_that_do_nothing_are_refused(source, tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.partition needs a cluster.*add cluster=slurm"):
        PrepClusterConfig(partition="cpu")
    with pytest.raises(ConfigError, match=r"set cluster.cpus_per_task"):
        prep_config(
            source,
            tmp_path,
            processes=2,
            cluster=PrepClusterConfig(scheduler=Scheduler.slurm),
        )


# -- the script --------------------------------------------------------------------------------------------------
@pytest.mark.timeout(240)
def test_a_dry_run_prints_the_script_and_needs_no_slurm(source, tmp_path):
    values = {
        "partition": "cpu",
        "account": "lab",
        "qos": "long",
        "constraint": "'a&b'",
        "timeout_min": 90,
        "cpus_per_task": 3,
        "mem_gb": 2.5,
        "array_parallelism": 1,
        "signal_delay_s": 30,
        "array_size": 2,
        "exclude": "'n[1-2]'",
        "setup": "['module load hdf5']",
        "environment": "['A=b c']",
        "sbatch_args": "['mail-type=END']",
        "python": "/opt/python",
    }
    code, out, err = finished(
        command(
            None,
            source,
            tmp_path / "out",
            *(f"cluster.{k}={v}" for k, v in values.items()),
            "cluster.dry_run=true",
            environment={"PATH": "/nowhere"},
        )
    )
    assert (code, err) == (0, "")
    assert not (tmp_path / "out").exists()
    for line in (
        "#SBATCH --partition=cpu",
        "#SBATCH --account=lab",
        "#SBATCH --qos=long",
        "#SBATCH --constraint='a&b'",
        "#SBATCH --time=90",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --mem=2560MB",
        "#SBATCH --array=0-1%1",
        "#SBATCH --signal=USR2@30",
        "#SBATCH --requeue",
        "#SBATCH --exclude='n[1-2]'",
        "#SBATCH --mail-type=END",
        "module load hdf5",
        "export A='b c'",
        f"code={tmp_path}/out/.parts/slurm/code/{running_code().digest}",
        f"export PYTHONPATH={tmp_path}/out/.parts/slurm/code/{running_code().digest}:{ROOT}"
        '"${PYTHONPATH:+:$PYTHONPATH}"',
        "# task 0, 0.00 GB: train/c, test/plain",
    ):
        assert line in out.splitlines(), line
    assert out.index("module load") < out.index(
        "/opt/python -u -m evspan.launch.slurm.submitted_task"
    )
    assert subprocess.run(["bash", "-n"], input=out, text=True, timeout=120).returncode == 0
    assert not (tmp_path / "out" / ".parts").exists()


@pytest.mark.timeout(240)
def test_without_slurm_it_ends_in_one_line(source, tmp_path):
    code, _, err = finished(
        command(None, source, tmp_path / "out", environment={"PATH": "/nowhere"})
    )
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "sbatch" in err
    assert "not on the PATH" in err


# -- on the cluster ----------------------------------------------------------------------------------------------
@pytest.mark.timeout(240)
def test_the_array_makes_what_one_machine_makes(slurm, source, prepared, tmp_path):
    """With a policy of some sites, and in a path whose signs SLURM and Submitit replace."""
    output = tmp_path / "100% of %j"
    code, out, err = finished(
        command(
            slurm,
            source,
            output,
            "cluster.array_size=2",
            "cluster.partition=low",
            environment={"SBATCH_EXPORT": "NONE"},
        )
    )
    assert (code, err) == (0, "")
    assert "5 of 5 recordings prepared" in out
    assert re.search(r"\[5/5\] \w+/\w+: \d+ frames", out)
    assert_same(output, prepared)
    assert not (output / ".parts").exists()
    array = job_of(slurm).split("_")[0]
    tasks = [job for job in slurm.jobs() if job.startswith(array)]
    assert sorted(tasks) == [f"{array}_0", f"{array}_1"]
    code, out, err = finished(command(slurm, source, output))
    assert (code, err) == (0, "")
    assert "nothing to do" in out


@pytest.mark.timeout(240)
def test_a_partition_that_is_not_there_is_one_line(slurm, source, tmp_path):
    code, _, err = finished(command(slurm, source, tmp_path / "out", "cluster.partition=nope"))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: SLURM refuses the job: invalid partition specified: nope")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("how", "cpus"), [("requeued", 1), ("at its time limit", 1), ("preempted", 2)]
)
def test_a_requeued_task_continues_and_a_bad_recording_is_named(slurm, many, tmp_path, how, cpus):
    source, output = (
        Path(shutil.copytree(many[0], tmp_path / "source", copy_function=os.link)),
        tmp_path / "out",
    )
    (source / "train" / "bad_td.dat").write_bytes(b"% Width 200\n% Height 160\n% end\n\x0c\x08odd")
    process = command(slurm, source, output, f"cluster.cpus_per_task={cpus}")
    pid, before = stopped_at_work(output)
    job = job_of(slurm)
    if how == "requeued":
        slurm.ask("scontrol", "requeue", job)
    elif how == "preempted":  # SLURM continues it first
        slurm.ask(
            "sbatch",
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 1",
        )
    else:
        slurm.ask("scancel", "--signal=USR2", job)
        os.kill(pid, signal.SIGCONT)
    code, _out, err = finished(process)
    assert "Restarts=1" in slurm.ask("scontrol", "show", "job", job)
    assert code == 2
    warning, err = err.split("\n", 1)
    assert "without a box file" in warning
    assert err.startswith(
        f"error: 1 of {COPIES + 1} recordings cannot be prepared; {COPIES} are done"
    )
    assert "train/bad: " in err
    assert "bad_td.dat" in err
    assert len(err.splitlines()) == 1
    after = outcomes(output)
    assert len(after) == COPIES + 1
    assert {k: after[k] for k in before} == before
    (source / "train" / "bad_td.dat").unlink()
    prepare(prep_config(source, output))
    assert_same(output, many[1])


@pytest.mark.timeout(240)
def test_a_task_that_dies_is_noticed_and_the_same_command_completes(slurm, many, tmp_path):
    source, output = many[0], tmp_path / "out"
    process = command(slurm, source, output)
    pid, _ = stopped_at_work(output)
    os.kill(pid, signal.SIGKILL)
    code, out, err = finished(process)
    assert code == 2
    assert len(err.splitlines()) == 1
    done = len(outcomes(output))
    assert err.startswith(
        f"error: {COPIES - done} of {COPIES} recordings cannot be prepared; {done} are done and kept"
    )
    lost = re.findall(
        r"(train/r\d+): SLURM task (\d+) ended as FAILED before it was done; its log is (\S+)", err
    )
    assert len({key for key, _, _ in lost}) == COPIES - done
    assert all(Path(log).is_file() for _, _, log in lost)
    code, out, err = finished(command(slurm, source, output))
    assert (code, err) == (0, "")
    assert f"[{COPIES - done}/{COPIES - done}]" in out
    assert_same(output, many[1])


@pytest.mark.timeout(240)
def test_the_array_of_a_killed_command_is_cancelled_by_the_next_one(slurm, many, tmp_path):
    source, output = many[0], tmp_path / "out"
    process = command(slurm, source, output)
    _, before = stopped_at_work(output)
    second = finished(command(slurm, source, output))
    assert second[0] == 2
    assert "is being written to by process" in second[2]
    assert len(second[2].splitlines()) == 1
    process.kill()
    finished(process)
    orphan = job_of(slurm)
    assert slurm.jobs()[orphan] == "RUNNING"
    code, out, err = finished(command(slurm, source, output))
    assert (code, err) == (0, "")
    assert f"cancelling SLURM job {orphan}" in out
    assert int(re.search(r"\[1/(\d+)\]", out)[1]) <= COPIES - len(before)
    assert_same(output, many[1])


@pytest.mark.timeout(240)
def test_an_array_of_a_process_elsewhere_is_left_alone(slurm, source, tmp_path):
    output = tmp_path / "out"
    name = re.search(
        r"--job-name=(\S+)", finished(command(slurm, source, output, "cluster.dry_run=true"))[1]
    )[1]
    slurm.ask(
        "sbatch",
        f"--job-name={name}",
        "--comment=process 7 on elsewhere",
        "--output=/dev/null",
        "--wrap=sleep 60",
    )
    job = job_of(slurm)
    code, _, err = finished(command(slurm, source, output))
    assert code == 2
    assert err.startswith(
        f"error: SLURM job {job} prepares into the same output for process 7 on elsewhere"
    )
    assert f"scancel {job}" in err
    assert slurm.jobs()[job] in ("RUNNING", "PENDING")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_cancels_the_array(slurm, many, tmp_path, number, expected):
    process = command(slurm, many[0], tmp_path / "out")
    stopped_at_work(tmp_path / "out")
    job = job_of(slurm)
    process.send_signal(number)
    code, out, err = finished(process)
    assert (code, err) == (expected, "")
    assert "cancelled the SLURM job; finished parts are kept" in out
    wait_until(lambda: slurm.jobs()[job] == "CANCELLED", 120)
