"""`evspan doctor` on this machine, with SLURM's settings, and in jobs of a throw-away SLURM."""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.cluster import ClusterConfig
from evspan.launch.cli.doctor import main
from evspan.launch.doctor import folder, job, machine, slurm
from evspan.launch.doctor.checks import DoctorOptions
from evspan.launch.doctor.data_speed import data_findings
from evspan.launch.doctor.data_task import read_uncached, training_config
from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding
from evspan.launch.doctor.kept import find_kept
from evspan.launch.doctor.links import interface_gb_per_s, judge_links
from evspan.launch.doctor.verdict import TaskFinding, judge, node_names
from evspan.pipeline.parallel import gpus as gpu_module
from support.refusals import refused_by
from support.slurm_cluster import Cluster, free_ports
from support.small_shards import write_small_shards

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "evspan.launch", "doctor"]
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = (
    24,
    1,
    2,
)  # <linux/prctl.h>, <linux/capability.h>
ABSENT = {"PATH": "/nowhere"}  # of SLURM's commands
MICRO = [
    *(
        "--config",
        "size=micro",
        "--config",
        "dataset=simulated",
        "--config",
        "training.batch_size=1",
    ),
    *("--config", "training.sequence_length=2", "--config", "parallel.threads=1"),
]


@pytest.fixture
def slurm_of(cluster: Cluster, monkeypatch):
    """The cluster, for checks in this process."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    yield cluster
    cluster.end_jobs()


def doctor(*arguments, environment=None, before=(), **more) -> subprocess.CompletedProcess:
    """From another folder than the code's."""
    (port,) = free_ports(
        1
    )  # jobs of other throw-away clusters may bear the same numbers, from which ports follow
    return subprocess.run(
        [*before, *COMMAND, *map(str, arguments)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **QUIET, "MASTER_PORT": str(port), **(environment or {})},
        **more,
    )


MEASURED = ("in a node", "between nodes", "all-reduce", "dataset", "decoding", "import time")
MEASURED += ("shared memory", "clocks")


def rows(process: subprocess.CompletedProcess) -> dict[tuple[str, str], dict]:
    """The checks that --json prints, by place and name; the exit code must agree with them."""
    results = json.loads(process.stdout)
    assert (
        process.returncode
        == int(not results["passed"])
        == int(any(row["grade"] == FAIL for row in results["checks"]))
    ), process.stderr
    for row in results["checks"]:
        assert row["found"] and (row["grade"] == PASS) == (not row["remedy"]), row
    return {(row["where"], row["check"]): row for row in results["checks"]}


def mounted(where: Path) -> list[str]:
    """A command prefix: the command sees an empty file system of 1 MB at `where`."""
    words = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=1m none "$0" && exec "$@"',
        str(where),
    ]
    if (
        not shutil.which("unshare")
        or subprocess.run([*words, "true"], capture_output=True, timeout=120).returncode
    ):
        pytest.skip("users may not mount folders on this machine")
    return words


def no_trace(runs: Path):
    assert [p.name for p in runs.iterdir() if p.name.startswith(".doctor")] == []


# -- the command ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_machine_without_slurm(tmp_path):
    process = doctor("--folder", tmp_path, environment=ABSENT)
    assert process.returncode == 0 and not process.stderr, process.stdout + process.stderr
    grades = dict(
        re.findall(r"^  (?:pass|warn)  ([\w-][\w -]*?) {2,}(.*)$", process.stdout, re.MULTILINE)
    )
    assert f"here, on {socket.gethostname()}" in process.stdout
    assert re.search(r"^  warn  SLURM .*\n +-> ", process.stdout, re.MULTILINE)
    assert str(tmp_path) in grades["folder"]
    assert "all whole, fsync works" in grades["rename"]
    assert version("torch") in grades["torch"]
    assert grades["DeepSpeed"] == version("deepspeed")
    assert re.fullmatch(r"torch and DeepSpeed in [\d.]+ s", grades["import time"])
    assert not (tmp_path / "doctor.json").exists()  # of jobs only
    assert grades["all-reduce"] == "gloo works with itself"
    passed, warned = (
        len(re.findall(rf"^  {grade}  ", process.stdout, re.MULTILINE))
        for grade in ("pass", "warn")
    )
    assert (
        process.stdout.splitlines()[-1] == f"doctor: 0 failed, {warned} to look at, {passed} passed"
    )
    assert passed >= 11
    no_trace(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_nodes_of_a_cluster(slurm_of, tmp_path):
    shards = write_small_shards(tmp_path / "shards", {"train": [40, 40, 40]})
    process = doctor(
        "--folder",
        tmp_path,
        "--partition",
        "high",
        "--nodes",
        2,
        "--ranks-per-node",
        2,
        "--dataset",
        shards,
        *MICRO,
        "--json",
        environment={**slurm_of.environment, "SLURM_EXPORT_ENV": "NONE"},  # a policy of some sites
    )
    results = rows(process)
    failed = {
        key: row for key, row in results.items() if row["grade"] == FAIL and key[1] != "versions"
    }  # the code may be at work
    assert failed == {} and process.stderr.count("\n") <= 2, (failed, process.stderr)
    assert "COMPLETED" in slurm_of.jobs().values()
    inside = {check: row for (where, check), row in results.items() if where == "in a job"}
    assert inside["tasks"]["found"] == "4 on n1, n2"
    assert inside["shared folder"]["found"] == "the token and the files of all 4 tasks can be read"
    reduced = re.fullmatch(
        r"gloo over 4 ranks: ([\d.]+) GB/s, (\d+) us", inside["all-reduce"]["found"]
    )
    assert reduced
    assert float(reduced[1]) > 0
    assert int(reduced[2]) > 0
    for link in ("in a node", "between nodes"):
        measured = re.match(
            r"all-reduce ([\d.]+) GB/s, \d+ us; all-to-all ([\d.]+) GB/s, \d+ us",
            inside[link]["found"],
        )
        assert measured, inside[link]
        assert float(measured[1]) > 0 < float(measured[2])
    read = re.search(
        r"(\d+) MB/s \(all 2 nodes at once\) are (\d+) frames/s; the 2 ranks of a node train on (\d+)",
        inside["dataset"]["found"],
    )
    assert read, inside["dataset"]
    assert (inside["dataset"]["grade"] == PASS) == (int(read[2]) >= int(read[3]) > 0)
    assert "frames/s per core; a rank trains on" in inside["decoding"]["found"]
    assert "torch and DeepSpeed in" in inside["import time"]["found"]
    for check in MEASURED:
        assert re.match(r"[\d.e+]+ (GB|frames|s |us)", inside[check]["threshold"]), inside[check]
    kept = json.loads((tmp_path / "doctor.json").read_text())
    assert kept == json.loads(process.stdout)
    assert find_kept(tmp_path).link == "doctor.json"
    assert find_kept(tmp_path / "sweep").link == "../doctor.json"
    assert f"{len(kept['checks'])} checks" in find_kept(tmp_path).summary
    assert re.fullmatch(r"within [\d.]+ ms of the first task's", inside["clocks"]["found"])
    assert float(inside["clocks"]["found"].split()[1]) < 500
    assert re.search(
        "reads of a file while task 0 replaced it: (all )?whole", inside["rename"]["found"]
    )
    first = inside["MASTER_ADDR"]  # names of virtual nodes cannot be resolved, but ranks connect
    if (
        shutil.which("getent")
        and subprocess.run(["getent", "hosts", "n1"], capture_output=True).returncode
    ):
        assert first["grade"] == WARN
        assert re.fullmatch("n1 cannot be resolved here .* is used instead", first["found"])
    else:
        assert first["grade"] == PASS
    for check in (
        "file descriptors",
        "shared memory",
        "network",
        "versions",
        "DeepSpeed",
        "torch",
        "GPUs",
        "clock",
    ):
        assert check in inside
    here = {check: row["found"] for (where, check), row in results.items() if where == "here"}
    assert here["partition"] == "high: 2 of 2 nodes run"
    assert "not preempted" in here["preemption"]
    assert "KillWait 2 s" in here["requeue"]
    assert here["accounting"].startswith("none;")
    no_trace(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_folder_that_the_nodes_do_not_see(slurm_of, tmp_path):
    results = rows(
        doctor(
            "--folder",
            tmp_path,
            "--nodes",
            2,
            "--json",
            environment=slurm_of.environment,
            before=mounted(tmp_path),
        )
    )
    assert results["here", "folder"]["grade"] == PASS
    assert "tmpfs" in results["here", "folder"]["found"]
    inside = results["in a job", "shared folder"]
    assert inside["grade"] == FAIL
    assert "token: No such file" in inside["found"]
    assert "all nodes see" in inside["remedy"]
    assert results["in a job", "tasks"]["grade"] == PASS  # each reported nevertheless
    assert ("in a job", "rename") not in results
    assert ("in a job", "file descriptors") in results
    assert results["in a job", "all-reduce"]["found"].startswith("not tried")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_bad_options_fail_with_their_remedies_and_start_no_job(slurm_of, tmp_path):
    before = slurm_of.jobs()
    results = rows(
        doctor(
            "--folder",
            tmp_path / "absent",
            "--partition",
            "gpu",
            "--nodes",
            2,
            "--json",
            environment={**slurm_of.environment},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
        )
    )
    where, what = results["here", "folder"], results["here", "partition"]
    assert where["found"] == f"{tmp_path / 'absent'} does not exist"
    assert "--folder" in where["remedy"]
    assert what["found"] == "there is no partition 'gpu'"
    assert "low, high" in what["remedy"]
    few = results["here", "file descriptors"]
    assert few["grade"] == FAIL
    assert few["found"] == "256, less than 4096"
    assert "hard limit of 256" in few["remedy"]
    assert results["in a job", "tasks"]["found"] == "no job was started"
    assert slurm_of.submitted_since(before) == set()
    assert results["here", "all-reduce"]["grade"] == PASS  # the rest was checked


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sigterm_cancels_its_job(slurm_of, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--folder", str(tmp_path), "--nodes", "2", "--", "--begin=now+1hour"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**slurm_of.environment, **QUIET},
    )
    try:
        end = time.monotonic() + 60
        while not slurm_of.ask("squeue", "--noheader", "--name=evspan-doctor"):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
        end = time.monotonic() + 10
        while slurm_of.ask("squeue", "--noheader", "--name=evspan-doctor"):
            assert time.monotonic() < end
            time.sleep(0.1)
        no_trace(tmp_path)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nodes", -1], "--nodes is -1; give 0 or more"),
        (["--nodes", 1, "--time", 0], "--time is 0; give 1 or more"),
        (["--ranks-per-node", 2], "give --nodes, too"),
        (["--", "--qos=x"], "give --nodes, too"),
        (["--nodes", 1, "--gpus-per-node", 2, "--ranks-per-node", 4], "each rank needs one"),
        (["--node"], "--help shows how"),
        (["--nodes", "two"], "invalid int value: 'two'"),
        (["--queue=x"], "unrecognized arguments"),
    ],
)
def test_invalid_options(arguments, part, capsys):
    assert part in refused_by(main, capsys, *arguments)


def test_it_refuses_to_be_a_rank(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "starts its tasks itself" in refused_by(main, capsys)


def test_it_imports_nothing_slow():
    process = subprocess.run(
        [*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0
    assert "--partition" in process.stdout
    slow = "import sys, evspan.launch.doctor.checks; print({'torch', 'hydra', 'deepspeed', 'numpy', 'submitit'} & sys.modules.keys())"
    assert (
        subprocess.run(
            [sys.executable, "-c", slow], cwd=ROOT, capture_output=True, text=True, timeout=120
        ).stdout
        == "set()\n"
    )


# -- jobs that do not start ----------------------------------------------------------------------------------------
def run_job(tmp_path, *options) -> list[Finding]:
    _, work = folder.open_folder(tmp_path)
    assert work
    lines: list[str] = []
    findings = job.run_job(
        job.Job(2, 1, options),
        work,
        (work / folder.TOKEN).read_text(),
        machine.software(),
        lines.append,
    )
    assert lines
    return findings


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_srun_refuses_is_reported(slurm_of, tmp_path):
    (finding,) = run_job(tmp_path, "--constraint=quantum")
    assert (finding.check, finding.grade) == ("tasks", FAIL)
    assert finding.message.startswith("2 of 2 reported nothing. srun: ")
    assert "feature specification" in finding.message
    assert sys.executable in finding.remedy


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_task_that_dies_is_reported(slurm_of, tmp_path):
    """Python on node n2 cannot import its libraries, as if the installation were not shared."""
    prolog = tmp_path / "prolog"
    prolog.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = n1 ] || echo export PYTHONHOME=/nowhere\n')
    prolog.chmod(0o755)
    finding = run_job(tmp_path, f"--task-prolog={prolog}")[0]
    assert finding.grade == FAIL
    assert "of 2 reported nothing" in finding.message
    assert "n2: task 1: Exited with exit code 1" in finding.message


@pytest.mark.parametrize(
    ("env", "address", "grade", "variables"),
    [
        ({"SLURM_STEP_NODELIST": "localhost,other[1-3]"}, "10.0.0.1", PASS, {}),
        (
            {"SLURM_STEP_NODELIST": "absent[07-09].invalid"},
            "10.0.0.1",
            WARN,
            {"MASTER_ADDR": "10.0.0.1"},
        ),
        ({"SLURM_STEP_NODELIST": "absent[07-09].invalid"}, "", FAIL, {}),
        (
            {"SLURM_STEP_NODELIST": "localhost", "MASTER_ADDR": "absent.invalid"},
            "10.0.0.1",
            FAIL,
            {},
        ),
        (
            {"SLURM_STEP_NODELIST": "absent.invalid", "MASTER_ADDR": "127.0.0.1"},
            "10.0.0.1",
            PASS,
            {},
        ),
    ],
)
def test_the_address_of_rank_0(env, address, grade, variables):
    finding, actual = job.check_master_address(env, address)
    assert (finding.grade, actual) == (grade, variables)
    assert (
        env.get("MASTER_ADDR", env["SLURM_STEP_NODELIST"].replace("[07-09]", "07").split(",")[0])
        in finding.message
    )


# -- SLURM's settings ----------------------------------------------------------------------------------------------
def settings(partition="", nodes=0) -> dict[str, Finding]:
    return {finding.check: finding for finding in slurm.check_settings(partition, nodes)}


@pytest.mark.slow
def test_settings_of_a_cluster(slurm_of):
    findings = settings("low", 2)
    assert {check: f.grade for check, f in findings.items()} == dict.fromkeys(
        ["SLURM", "partition", "time limit", "preemption", "requeue", "job records", "accounting"],
        PASS,
    )
    assert findings["preemption"].message.startswith(
        "by high: mode REQUEUE, GraceTime 10 s; its own signal"
    )
    assert findings["SLURM"].message.endswith(" of evspan answers")
    assert findings["time limit"].message.startswith("none in low")
    assert settings()["partition"].message == findings["partition"].message  # the default one
    many = settings("low", 9)["partition"]
    assert many.grade == FAIL
    assert "fewer than the 9 asked for" in many.message
    assert many.remedy == "ask for fewer nodes"


@pytest.mark.slow
def test_settings_that_change(slurm_of):
    change = ("scontrol", "update", "PartitionName=low")
    try:
        slurm_of.ask(*change, "MaxTime=2", "GraceTime=0", "MaxNodes=1")
        findings = settings("low", 2)
        assert findings["time limit"].grade == FAIL
        assert findings["time limit"].message.startswith("2 min in low")
        assert findings["preemption"].grade == WARN
        assert "GraceTime 0 s" in findings["preemption"].message
        assert findings["partition"].grade == FAIL
        assert "may have 1 nodes, not 2" in findings["partition"].message
        slurm_of.ask(*change, "MaxTime=1-00:30:00", "State=DOWN")
        findings = settings("low")
        assert findings["time limit"].grade == PASS
        assert findings["time limit"].message.startswith("1470 min in low")
        assert findings["partition"].grade == FAIL
        assert findings["partition"].message == "low is DOWN"
        slurm_of.ask(*change, "MaxTime=60", "State=UP", "MaxNodes=UNLIMITED")
        time_limit = settings("low")["time limit"]
        assert time_limit.grade == WARN
        assert "set cluster.timeout_min=60 or less" in time_limit.remedy
        slurm_of.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        partition = settings("low", 2)["partition"]
        assert partition.grade == FAIL
        assert partition.message == "low: 1 of 2 nodes run, fewer than the 2 asked for"
    finally:
        slurm_of.ask(*change, "MaxTime=INFINITE", "GraceTime=10", "MaxNodes=UNLIMITED", "State=UP")
        slurm_of.ask("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_no_controller_and_no_commands(monkeypatch, tmp_path):
    if shutil.which("scontrol"):
        conf, (port,) = tmp_path / "slurm.conf", free_ports(1)
        monkeypatch.setenv("SLURM_CONF", str(conf))
        for part in ("which does not exist", "the controller does not answer: "):
            findings = settings()
            assert list(findings) == ["SLURM"]
            assert findings["SLURM"].grade == FAIL
            assert part in findings["SLURM"].message
            conf.write_text(
                f"ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort={port}\nNodeName=n1\nMessageTimeout=2\n"
            )
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = settings()
    assert slurm.is_installed()
    assert findings["SLURM"].message.startswith(
        "srun, squeue, scancel, scontrol, sinfo not on the PATH"
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:30:00", 1800),
        ("1-02:00:00", 93600),
        ("05:30", 330),
        ("30 sec", 30),
        ("10", 10),
        ("UNLIMITED", float("inf")),
        ("NONE", float("inf")),
        ("7-00:00:00", 604800),
    ],
)
def test_durations_of_slurm(text, seconds):
    assert slurm.parse_seconds(text) == seconds


PREEMPTED = {
    "PartitionName": "low",
    "PriorityTier": "1",
    "PreemptMode": "REQUEUE",
    "GraceTime": "60",
}
ABOVE = {"PartitionName": "high", "PriorityTier": "5"}


@pytest.mark.parametrize(
    ("config", "partition", "grade", "part"),
    [
        ({"PreemptType": "preempt/none"}, {}, PASS, "not preempted"),
        ({"PreemptType": "(null)none"}, {}, PASS, "not preempted"),
        (
            {"PreemptType": "preempt/partition_prio"},
            {},
            PASS,
            "by high: mode REQUEUE, GraceTime 60 s; SIGTERM",
        ),
        ({"PreemptType": "preempt/partition_prio"}, {"PriorityTier": "9"}, PASS, "not preempted"),
        ({"PreemptType": "preempt/partition_prio"}, {"PreemptMode": "CANCEL"}, WARN, "mode CANCEL"),
        (
            {"PreemptType": "preempt/partition_prio"},
            {"PreemptMode": "GANG,SUSPEND"},
            WARN,
            "mode GANG,SUSPEND",
        ),
        ({"PreemptType": "preempt/qos"}, {"PriorityTier": "9"}, PASS, "by qos: mode REQUEUE"),
        ({"PreemptType": "preempt/qos"}, {"GraceTime": "0"}, WARN, "GraceTime 0 s"),
    ],
)
def test_preemption(config, partition, grade, part):
    finding = slurm.check_preemption(config, {**PREEMPTED, **partition}, [PREEMPTED, ABOVE])
    assert finding.grade == grade
    assert part in finding.message


@pytest.mark.parametrize(
    ("minutes", "delay", "most", "grade"),
    [
        (240, 120, "UNLIMITED", PASS),
        (240, 120, "04:00:00", PASS),
        (240, 120, "03:59:00", WARN),
        (240, 600, "00:10:00", FAIL),
    ],
)
def test_time_limits(minutes, delay, most, grade):
    config = ClusterConfig(timeout_min=minutes, signal_delay_s=delay)
    assert slurm.check_time_limit({"PartitionName": "p", "MaxTime": most}, config).grade == grade


@pytest.mark.parametrize(
    ("nodes", "other_nodes", "expected"),
    [
        ("g1,g2", "c1,c2", False),
        ("g1,g2", "c1,g2", True),
        ("g1", "(null)", True),  # not known
        ("ALL", "ALL", True),
    ],
)
def test_only_partitions_with_a_node_in_common_preempt(nodes, other_nodes, expected):
    def expand(names):
        return frozenset(names.split(","))

    assert slurm.share_nodes({"Nodes": nodes}, {"Nodes": other_nodes}, expand) is expected


def test_each_of_several_partitions_is_checked(monkeypatch):
    """As cluster.partition=gpu,gpu-long: SLURM takes the first one that can run the job."""
    outputs = {
        "config": "SLURM_VERSION = 23.11\nMinJobAge = 300 sec\n",
        "partition": "PartitionName=gpu Nodes=g1\nPartitionName=gpu-long Nodes=g2\n",
        "sinfo": "4 idle\n",
    }

    def output(*command):
        key = command[0] if command[0] == "sinfo" else command[-1]
        return outputs.get(key, "")

    monkeypatch.setattr(slurm, "_output", output)
    findings = [*slurm._check_controller("gpu,gpu-long,gone", 1)]
    partitions = [finding for finding in findings if finding.check == "partition"]
    assert [finding.grade for finding in partitions] == [PASS, PASS, FAIL]
    assert "there is no partition 'gone'" in partitions[-1].message


def test_short_lived_job_records():
    assert slurm.check_job_records({"MinJobAge": "10 sec"}).grade == WARN
    assert (
        slurm.check_job_records({"MinJobAge": "300 sec"}).grade
        == slurm.check_job_records({"MinJobAge": "0 sec"}).grade
        == PASS
    )


# -- the folder ----------------------------------------------------------------------------------------------------
def in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def away_and_back(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    time.sleep(0.001)
    folder.replace_file(path, data)


def into_nothing(path: Path, data: bytes) -> None:
    raise OSError(5, "Input/output error")


def test_replacement_is_atomic(tmp_path):
    finding = folder.atomic_replacement(tmp_path / "file")
    assert finding.grade == PASS
    assert int(finding.message.split()[0]) > 10


@pytest.mark.parametrize(
    ("put", "part"),
    [
        (in_place, "half written"),
        (away_and_back, "missing"),
        (into_nothing, "cannot be replaced: [Errno 5]"),
    ],
)
def test_non_atomic_replacement_is_detected(tmp_path, put, part):
    finding = folder.atomic_replacement(tmp_path / "file", replace=put)
    assert finding.grade == FAIL
    assert part in finding.message
    assert "--folder" in finding.remedy


def test_a_file_that_another_machine_never_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAIT_S", 0.2)
    assert folder.atomic_replacement(tmp_path / "file", write=False).message.startswith("0 reads")


def test_a_folder_that_cannot_be_written(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o555)

    def without_privilege():
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(
                PR_CAPBSET_DROP, capability, 0, 0, 0
            )  # does nothing for those who have none

    code = "import sys; from evspan.launch.doctor.folder import *; print(open_folder(Path(sys.argv[1]))[0].message)"
    process = subprocess.run(
        [sys.executable, "-c", code, str(runs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=without_privilege,
    )
    assert process.stdout == f"{runs} cannot be written: Permission denied\n", process.stderr


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").touch()
    finding, work = folder.open_folder(tmp_path / "runs")
    assert finding.grade == FAIL
    assert finding.message.endswith("runs is a file")
    assert work is None


def test_a_full_folder(tmp_path):
    code = "import sys; from evspan.launch.doctor.folder import *; f = free_space(Path(sys.argv[1])); print(f.check, f.grade, f.message)"
    process = subprocess.run(
        [*mounted(tmp_path), sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout.startswith("free space fail 0.0 GB, less than 20")


def test_clocks_that_differ_from_the_file_servers(tmp_path, monkeypatch):
    assert folder.file_clock(tmp_path).grade == PASS
    now = time.time
    for ahead, part in ((3.0, "ahead of"), (-3.0, "behind")):
        monkeypatch.setattr(
            time, "time", lambda ahead=ahead: now() + ahead
        )  # the files keep the kernel's
        finding = folder.file_clock(tmp_path)
        assert (
            finding.grade == WARN
            and part in finding.message
            and finding.message.startswith(("2.9 s", "3.0 s"))
        ), finding


def test_tasks_exchange_notes(tmp_path, monkeypatch):
    finding, work = folder.open_folder(tmp_path)
    assert finding.grade == PASS
    assert work
    token = (work / "token").read_text()
    code = f"from evspan.launch.doctor.folder import *; print(sorted(exchange_notes(Path({str(work)!r}), {token!r}, 0, 2, 'a')[1].items()))"
    first = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    met, notes = folder.exchange_notes(work, token, 1, 2, "b")
    assert met.grade == PASS
    assert notes == {0: "a", 1: "b"}
    assert folder.count_unreadable_notes(work, token, 2) == 0
    assert first.communicate(timeout=120)[0] == "[(0, 'a'), (1, 'b')]\n"
    assert folder.count_unreadable_notes(work, token, 3) == 1
    assert folder.count_unreadable_notes(work, "another", 2) == 2
    monkeypatch.setattr(folder, "WAIT_S", 0.1)
    assert "the files of 1 of 3 tasks" in folder.exchange_notes(work, token, 1, 3, "b")[0].message
    assert "another token" in folder.exchange_notes(work, "another", 1, 2, "b")[0].message
    assert folder.exchange_notes(work / "absent", token, 1, 2, "b")[0].message.endswith(
        "No such file or directory"
    )


# -- the machine ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("soft", "hard", "grade", "part"),
    [
        (256, 8192, FAIL, "ulimit -n 4096"),
        (1024, 8192, WARN, "ulimit -n 4096"),
        (4096, 8192, PASS, ""),
        (1024, 2048, WARN, "the hard limit of 2048"),
    ],
)
def test_file_descriptors(soft, hard, grade, part):
    code = "from evspan.launch.doctor.machine import file_descriptors as f; print(f().grade, f().remedy)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    assert process.stdout.startswith(grade) and part in process.stdout, process.stderr


def test_shared_memory(tmp_path):
    assert machine.shared_memory(tmp_path / "absent").grade == FAIL
    assert str(tmp_path) in machine.shared_memory(tmp_path).message


def test_interfaces_are_those_of_ip():
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to compare with")
    results = json.loads(
        subprocess.run(
            ["ip", "-json", "address"], capture_output=True, check=True, timeout=120
        ).stdout
    )
    expected = {
        one["ifname"]: {a["local"] for a in one["addr_info"] if a["scope"] == "global"}
        for one in results
    }
    findings = {name: set(addresses) for name, addresses in machine.interfaces().items()}
    assert set(findings) == {
        name for name, addresses in expected.items() if addresses and name != "lo"
    }
    assert all(findings[name] <= expected[name] for name in findings)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),
        ("GLOO_SOCKET_IFNAME", "ib0,eth9", False),
        ("NCCL_SOCKET_IFNAME", "ib", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "eth,ib", True),
        ("NCCL_SOCKET_IFNAME", "wlan", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo,ib,en", False),
    ],
)
def test_variables_that_name_interfaces(variable, value, named):
    assert machine.selects_interface(variable, value, ["eno1", "ib0", "lo"]) is named


def test_a_variable_that_names_no_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    assert machine.network().grade == FAIL
    assert "'nope0'" in machine.network().message


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV4\tSYS\tSYS\tPIX\t0-31\t0\t\tN/A
GPU1\tNV4\t X \tSYS\tSYS\tPXB\t0-31\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNV4\tSYS\t32-63\t1\t\tN/A
GPU3\tSYS\tSYS\tNV4\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPIX\tPXB\tSYS\tSYS\t X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""


def nvidia_smi(tmp_path, monkeypatch, *lines: str):
    """A substitute, for machines without a GPU."""
    (tmp_path / "nvidia-smi").write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "topology").write_text(TOPOLOGY)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_gpus_and_what_joins_them(tmp_path, monkeypatch):
    nvidia_smi(
        tmp_path,
        monkeypatch,
        f'[ "$1" = topo ] && exec cat {tmp_path}/topology',
        "for i in 1 2 3 4; do echo A100; done",
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "driver_version", lambda: "")
    finding = machine.gpus()
    assert finding.grade == PASS
    assert finding.values == {"gpus": 4}
    assert (
        finding.message
        == "4 x A100; pairs joined by SYS (PCIe across CPU sockets) x 4, NV4 (NVLink) x 2"
    )
    assert (
        machine.gpu_links("") == machine.gpu_links("\tGPU0\tCPU Affinity\nGPU0\t X \t0-7\n") == []
    )


def test_gpus_that_a_task_may_use(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "for i in 1 2 3 4; do echo A100; done")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    finding = machine.gpus()
    assert finding.values == {"gpus": 1}
    assert finding.message.endswith("; CUDA_VISIBLE_DEVICES=2")


def test_gpus_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, message in ((0, "none, nvidia-smi"), (2, "2 GPUs, driver 535.1; nvidia-smi is not")):
        files = [tmp_path / f"nvidia{i}" for i in range(count)]
        monkeypatch.setattr(gpu_module, "gpu_files", lambda files=files: files)
        monkeypatch.setattr(machine, "gpu_files", lambda files=files: files)
        monkeypatch.setattr(machine, "driver_version", lambda: "535.1")
        finding = machine.gpus()
        assert finding.grade == PASS
        assert finding.message.startswith(message)
        assert finding.values == {"gpus": count}


@pytest.mark.parametrize(
    ("value", "used"),
    [("", ["ib0", "ib1"]), ("eno", ["eno1"]), ("^docker,ib", ["eno1"]), ("=ib1", ["ib1"])],
)
def test_interfaces_of_nccl(monkeypatch, value, used):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert machine.nccl_interfaces(["docker0", "eno1", "ib0", "ib1"]) == used
    if not value:
        assert machine.nccl_interfaces(["docker0", "eno1"]) == ["eno1"]


def test_a_driver_that_fails(tmp_path, monkeypatch):
    nvidia_smi(
        tmp_path,
        monkeypatch,
        "echo NVIDIA-SMI has failed: it could not communicate with the driver",
        "exit 9",
    )
    assert machine.gpus().grade == WARN
    assert "could not communicate" in machine.gpus().message


# -- all-reduce ----------------------------------------------------------------------------------------------------
def probes(ranks, size, *arguments) -> list[subprocess.Popen]:
    (port,) = free_ports(1)
    env = {
        **os.environ,
        **QUIET,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        machine.start_process(
            [*machine.PROBE, *arguments], {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in ranks
    ]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_that_connect_and_one_that_is_alone():
    met, (alone,) = probes(range(2), 2), probes([0], 2, "2")
    for process in met:
        torch_, reduced = machine.torch_and_all_reduce(process, 0)
        assert torch_.grade == reduced.grade == PASS
        assert reduced.values["ranks"] == 2
        assert reduced.values["backend"] == "gloo"
        assert reduced.values["gb_per_s"] > 0
        assert reduced.values["latency_us"] > 0
        assert abs(reduced.values["clock_s"]) < 0.5
        assert set(reduced.values["links"]) == {"in a node"} or reduced.values["links"] == {}
    (finding,) = machine.torch_and_all_reduce(alone, 0)
    assert (finding.check, finding.grade) == ("all-reduce", FAIL)
    assert "1/2 clients" in finding.message
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


@pytest.mark.parametrize(
    ("torch_", "found", "grade", "part"),
    [
        ({"cuda": "12.8", "gpus": 4}, 4, PASS, "CUDA 12.8, NCCL 2.27.3; it sees 4 GPUs"),
        ({"cuda": None, "gpus": 0}, 4, FAIL, "CPU build; it sees 0 GPUs of 4"),
        ({"cuda": "12.8", "gpus": 3}, 4, FAIL, "3 GPUs of 4"),
        ({"cuda": "12.8", "gpus": 1}, 1, PASS, "it sees 1 GPU"),
        ({"cuda": "12.8", "gpus": 0}, 0, PASS, "it sees 0 GPUs"),
        (
            {"cuda": "12.8", "gpus": 0, "device_error": "n1 has 4 GPUs, but no; update the driver"},
            4,
            FAIL,
            "CUDA 12.8, NCCL 2.27.3: n1 has 4 GPUs, but no",
        ),
    ],
)
def test_torch_and_the_gpus(torch_, found, grade, part):
    line = json.dumps({"torch": "2.9", "nccl": "2.27.3", "ranks": 1, "backend": "nccl", **torch_})
    process = machine.start_process([sys.executable, "-c", f"print({line!r})"], os.environ)
    finding = machine.torch_and_all_reduce(process, found)[0]
    assert finding.grade == grade
    assert part in finding.message
    assert bool(finding.remedy) == (grade == FAIL)


def test_a_failed_process_is_reported_by_its_last_line():
    command = [sys.executable, "-c", "import deepspeed_of_another_name"]
    (finding,) = machine.deepspeed_import(machine.start_process(command, os.environ))
    assert finding.grade == FAIL
    assert "No module named 'deepspeed_of_another_name'" in finding.message


# -- what is measured against what it should be --------------------------------------------------------------------
def link(**more) -> dict:
    fast = {
        "all_reduce_us": 50,
        "all_reduce_gb_per_s": 10,
        "all_to_all_us": 60,
        "all_to_all_gb_per_s": 8,
    }
    return fast | more


@pytest.mark.parametrize(
    ("slow", "interface", "grade", "part"),
    [
        ({}, 12.5, PASS, "(the interface: 12.5 GB/s)"),
        ({"all_to_all_gb_per_s": 3.5}, 12.5, WARN, "all-to-all under 3.75 GB/s"),
        ({"all_reduce_gb_per_s": 3.5}, 12.5, WARN, "all-reduce under 3.75 GB/s"),
        (
            {"all_reduce_gb_per_s": 3.5},
            None,
            PASS,
            "all-reduce 3.50 GB/s, 50 us; all-to-all 8.00 GB/s, 60 us",
        ),
        ({"all_reduce_gb_per_s": 0.05}, None, WARN, "all-reduce under 0.1 GB/s"),
        ({"all_to_all_us": 2500}, 12.5, WARN, "all-to-all over 2000 us"),
    ],
)
def test_links_between_nodes_are_graded_by_their_interface(slow, interface, grade, part):
    ranks = [
        {"links": {"between nodes": link()}},
        {"links": {"between nodes": link(**slow)}},
        {"links": {}},
    ]
    (finding,) = judge_links(ranks, interface)
    assert (finding.check, finding.grade) == ("between nodes", grade)
    assert part in finding.message
    assert "NCCL_SOCKET_IFNAME" in finding.remedy or grade == PASS


def test_a_link_in_a_node_is_not_graded_by_an_interface():
    (finding,) = judge_links([{"links": {"in a node": link(all_reduce_gb_per_s=0.2)}}], 12.5)
    assert (finding.check, finding.grade) == ("in a node", PASS)
    assert judge_links([{"links": {}}], 12.5) == []


def test_the_speed_of_interfaces(tmp_path):
    for name, speed in {
        "eth0": "25000\n",
        "eth1": "10000\n",
        "virtual": "-1\n",
        "odd": "fast",
    }.items():
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(speed)
    assert interface_gb_per_s(["eth1", "eth0"], tmp_path, with_gpus=True) == 3.125
    assert interface_gb_per_s(["virtual", "odd", "absent"], tmp_path, with_gpus=True) is None
    port = tmp_path / "infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    assert interface_gb_per_s(["eth0"], tmp_path, with_gpus=True) == 25
    assert interface_gb_per_s(["eth0"], tmp_path, with_gpus=False) == 3.125  # gloo


@pytest.mark.parametrize(
    ("changed", "grades", "check", "part"),
    [
        (
            {},
            {PASS},
            "dataset",
            "200 MB/s (all 3 nodes at once) are 2000 frames/s; the 8 ranks of a node train on 800",
        ),
        ({"read_bytes": 3e7}, {WARN, PASS}, "dataset", "10 MB/s"),
        (
            {"decoded": 30.0},
            {PASS},
            "decoding",
            "30 frames/s per core; a rank trains on 100, and may use 4 cores",
        ),
        ({"decoded": 20.0}, {WARN, PASS}, "decoding", "20 frames/s per core"),
    ],
)
def test_reading_and_decoding_are_graded_by_what_training_consumes(changed, grades, check, part):
    values = {"read_bytes": 6e8, "read_s": 3.0, "frame_bytes": 1e5}
    values |= {"needed": 100.0, "decoded": 300.0, "cores": 4, "device": "cpu"} | changed
    process = machine.start_process(
        [sys.executable, "-c", f"print({json.dumps(values)!r})"], os.environ
    )
    findings = {f.check: f for f in data_findings(process, ranks_per_node=8, nodes=3)}
    assert {f.grade for f in findings.values()} == grades
    assert part in findings[check].message
    if changed == {"decoded": 20.0}:
        assert "cluster.cpus_per_task=6" in findings[check].remedy


def test_a_dataset_that_cannot_be_read():
    command = [sys.executable, "-c", "import sys; sys.exit('error: /data: no manifest.json')"]
    (finding,) = data_findings(machine.start_process(command, os.environ), 1, 1)
    assert (finding.check, finding.grade) == ("dataset", FAIL)
    assert finding.message == "/data: no manifest.json"


def test_a_config_of_several_ranks_is_refused_with_the_fraction_of_one(tmp_path):
    words = ["parallel.ranks=16", "training.batch_size=32"]
    with pytest.raises(ConfigError, match="training.batch_size=2 training.sequence_length"):
        training_config(tmp_path, words)
    assert training_config(tmp_path, ["training.batch_size=2"]).parallel.ranks == 1


def test_cores_of_a_rank_are_an_option_of_srun():
    options = DoctorOptions(nodes=2, cpus_per_task=12)
    assert "--cpus-per-task=12" in options.job().srun_options
    with pytest.raises(UserError, match="give --nodes, too"):
        DoctorOptions(cpus_per_task=12)


def test_reading_ends_with_the_files_or_the_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(9 << 20))
    files = sorted(tmp_path.iterdir())
    assert read_uncached(files, 100)[0] == 18 << 20
    assert read_uncached(files, 0)[0] == 4 << 20  # a block


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"time": 1e300, "checks": []}', '{"time": "x", "checks": [{}]}']
)
def test_damaged_findings_are_not_linked(tmp_path, content):
    (tmp_path / "doctor.json").write_text(content)
    assert find_kept(tmp_path) is None


def test_a_slow_import_is_a_warning():
    assert machine.import_time(12.0).grade == PASS
    slow = machine.import_time(45.0)
    assert slow.grade == WARN
    assert "cluster.container" in slow.remedy


# -- the tasks compared -----------------------------------------------------------------------------------------
HERE = Finding("versions", PASS, "", "", {"Python": "3.11.7", "torch": "2.9"})


def task_findings(
    rank: int,
    node: str,
    *,
    machine_="m",
    address="10.0.0.1",
    versions=HERE.values,
    clock_s=0.0,
    gb_per_s=1.0,
    first=PASS,
    reduced=PASS,
) -> list[TaskFinding]:
    return [
        TaskFinding(rank, node, finding)
        for finding in [
            Finding("shared folder", PASS, "read"),
            Finding(
                "network",
                PASS,
                f"eth0 {address}",
                "",
                {"machine": machine_, "address": address, "interfaces": ["eth0", f"ib{rank}"]},
            ),
            Finding("versions", PASS, "", "", versions),
            Finding("MASTER_ADDR", first, "n1"),
            Finding(
                "all-reduce",
                reduced,
                "gloo",
                "name an interface",
                {
                    "backend": "gloo",
                    "ranks": 2,
                    "gb_per_s": gb_per_s,
                    "latency_us": 100.0,
                    "clock_s": clock_s,
                },
            ),
        ]
    ]


def judged(*results: list[TaskFinding], size=2, complaints="", unseen=0) -> dict[str, Finding]:
    return {
        f.check: f
        for f in judge([t for one in results for t in one], size, HERE, complaints, unseen)
    }


def test_equal_tasks_pass():
    findings = judged(task_findings(0, "n1"), task_findings(1, "n2", gb_per_s=0.5))
    assert {f.grade for f in findings.values()} == {PASS}
    assert findings["tasks"].message == "2 on n1, n2"
    assert findings["all-reduce"].message == "gloo over 2 ranks: 0.50 GB/s, 100 us"
    assert findings["versions"].message == "the same on all nodes and here"


@pytest.mark.parametrize(
    ("second", "grades", "check", "part"),
    [
        ({"clock_s": 2.5}, {WARN}, "clocks", "that of n2 is 2.5 s ahead of the first task's"),
        ({"clock_s": -1.5}, {WARN}, "clocks", "1.5 s behind"),
        (
            {"versions": {"Python": "3.11.7", "torch": "2.8"}},
            {FAIL},
            "versions",
            "torch 2.9 on n1, 2.8 on n2, 2.9 here",
        ),
        ({"machine_": "other", "address": "127.0.1.1"}, {WARN}, "network", "loopback on n2"),
        ({"address": "127.0.1.1"}, {PASS}, "network", "n2: eth0 127.0.1.1"),
        ({"machine_": "other", "gb_per_s": 0.05}, {WARN}, "all-reduce", "0.05 GB/s"),
        ({"reduced": FAIL}, {FAIL}, "all-reduce", "n2: gloo"),
        ({"first": WARN, "reduced": FAIL}, {FAIL}, "MASTER_ADDR", "n2: n1"),
        ({"first": WARN}, {WARN}, "MASTER_ADDR", "n2: n1"),
    ],
)
def test_one_task_that_differs(second, grades, check, part):
    findings = judged(task_findings(0, "n1"), task_findings(1, "n2", **second))
    assert {findings[check].grade} == grades
    assert part in findings[check].message
    others = {f.grade for name, f in findings.items() if name != check}
    assert others <= {PASS} or second == {"first": WARN, "reduced": FAIL}


def test_versions_that_differ_only_from_this_machine_are_a_warning():
    other = {"Python": "3.11.9", "torch": "2.9"}
    findings = judged(
        task_findings(0, "n1", versions=other), task_findings(1, "n2", versions=other)
    )["versions"]
    assert findings.grade == WARN
    assert findings.message == "Python 3.11.9 on n1, n2, 3.11.7 here"


def test_tasks_that_end_early_are_named():
    findings = judged(
        task_findings(0, "n1"),
        task_findings(1, "n2")[:2],
        size=3,
        complaints="task 2 launch failed",
    )["tasks"]
    assert findings.grade == FAIL
    assert (
        findings.message
        == "1 of 3 reported nothing; task 1 on n2 ended after 'network'. srun: task 2 launch failed"
    )
    assert judged(size=3)["tasks"].message == "3 of 3 reported nothing"


def test_notes_that_cannot_be_read_here():
    assert (
        "the files of 1 of 2 tasks cannot be read here"
        in judged(task_findings(0, "n1"), task_findings(1, "n2"), unseen=1)["shared folder"].message
    )


def test_many_nodes_on_a_line():
    assert (
        node_names([TaskFinding(i, f"n{i}", HERE) for i in range(12)])
        == "n0, n1, n2, n3 and 8 more"
    )
