"""Ranks that die, hang, fail or run out of memory: the others end in time, and one line names it and the remedy."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
import torch.distributed as dist
from evspan.conf.compose import compose
from evspan.conf.errors import UserError
from evspan.conf.schema.training import ParallelConfig, Precision, TrainConfig, TrainingConfig
from evspan.pipeline.engine.oom import explain_out_of_memory, memory_options, out_of_memory
from evspan.pipeline.history import Activity
from evspan.pipeline.parallel import heartbeat
from evspan.pipeline.parallel.flight_recorder import set_phase
from evspan.pipeline.parallel.heartbeat import LOST, Beat, _Heartbeats
from evspan.pipeline.parallel.world import World
from support.processes import alive, all_ready, eventually, pids
from support.slurm_cluster import free_ports

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SHARD_FRAMES = {"train": [23, 22], "val": [4]}
TIMEOUT_S = 6

PROGRAM = """
import os, pathlib, sys, time
from evspan.launch.cli.command import run_command
here, size = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def work():
    import torch
    from evspan.conf.schema.training import ParallelConfig
    from evspan.pipeline.parallel.reductions import sum_over_ranks
    from evspan.pipeline.parallel.world import open_world
    with open_world(ParallelConfig(ranks=size, timeout_s=int(sys.argv[3]), threads=1)) as world:
        while not sum_over_ranks(torch.tensor((here / "enough").exists()).float()):
            sum_over_ranks(torch.ones(1000))
            (here / f"pid-{world.rank}").write_text(str(os.getpid()))
            misbehave(world.rank)
            time.sleep(0.02)
def misbehave(rank):
    pass
"""


def started(folder, misbehaviour="", size=3, timeout_s=TIMEOUT_S):
    """Ranks without a parent that watches them, as under SLURM."""
    (folder / "program.py").write_text(f"{PROGRAM}\n{misbehaviour}\nrun_command(work)\n")
    (port,) = free_ports(1)
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "program.py"), str(folder), str(size), str(timeout_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_NTASKS": str(size),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS_PER_NODE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]


def end_of(process, seconds):
    """Exit code and stderr of a process that must end within `seconds`."""
    try:
        _, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.parametrize(("number", "victim"), [("SIGKILL", 1), ("SIGKILL", 0), ("SIGSTOP", 0)])
def test_survivors_end_in_time_and_name_the_rank(tmp_path, number, victim):
    ranks = started(tmp_path)
    all_ready(tmp_path, 3)
    time.sleep(1.5)  # a beat
    ranks[victim].send_signal(getattr(signal, number))
    began = time.monotonic()
    for rank in set(range(3)) - {victim}:
        code, err = end_of(ranks[rank], 120)
        assert code == 69 and err.startswith("error: ") and err.count("\n") == 1, err
        assert re.search(
            rf"^error: rank {victim} \(process {ranks[victim].pid} on \S+\).* is gone or stuck", err
        ), err
        assert f"So rank {rank} ends" in err
    assert time.monotonic() - began < TIMEOUT_S + 60
    ranks[victim].kill()
    ranks[victim].communicate()


@pytest.mark.parametrize(("missed", "named"), [([0, 5, 0], 1), ([0, 3, 0], 1), ([0, 1, 0], 0)])
def test_a_store_that_ended_with_rank_0_hides_no_rank_that_was_silent_before(missed, named):
    heartbeats = object.__new__(_Heartbeats)  # without its threads
    heartbeats.rank, heartbeats.size = 2, 3
    heartbeats.address, heartbeats.port = "127.0.0.1", 1
    heartbeats.latest = [Beat("node", 100 + rank, 9) for rank in range(3)]
    heartbeats.missed = missed
    heartbeats.unanswered = 6
    message = heartbeats._message(beats=TIMEOUT_S)
    assert message.startswith(f"rank {named} (process {100 + named} on node)"), message
    assert "gone or stuck" in message


@pytest.mark.parametrize(
    ("backend", "status", "beats", "returns_early"),
    [
        ("gloo", "", 10, True),  # the other has read the error in its next beat
        ("gloo", "", 9, False),
        ("nccl", "", 10, False),  # NCCL aborts a rank that is alive when this one ends
        ("nccl", LOST, 10, True),
    ],
)
def test_a_failed_rank_waits_for_its_readers(monkeypatch, backend, status, beats, returns_early):
    monkeypatch.setattr(heartbeat, "BEAT_S", 1.0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    heartbeats = object.__new__(_Heartbeats)  # without its threads
    heartbeats.rank, heartbeats.size = 0, 2
    heartbeats.wake = Event()
    heartbeats.status = "ValueError: of all things"
    heartbeats.latest = [Beat("node", 100, 9, heartbeats.status), Beat("node", 101, 9)]
    answer = Timer(0.05, lambda: setattr(heartbeats, "latest", [heartbeats.latest[0], other]))
    other = Beat("node", 101, beats, status)
    answer.start()
    started_at = time.monotonic()
    heartbeats.wait_for_others()
    assert (time.monotonic() - started_at < 1.9) == returns_early
    answer.join()


def test_a_rank_that_is_alive_but_late_is_named(tmp_path):
    ranks = started(
        tmp_path,
        """
def misbehave(rank):
    if rank == 1:
        time.sleep(60)
""",
    )
    for rank in (0, 2):
        code, err = end_of(ranks[rank], 120)
        assert code == 69 and err.count("\n") == 1, err
        assert err.startswith(f"error: rank 1 (process {ranks[1].pid} on "), err
        assert (
            f"is alive, but did not reach a collective within parallel.timeout_s={TIMEOUT_S}" in err
        )
    code_of_sleeper = ranks[1].poll()
    assert code_of_sleeper in (None, 69)
    ranks[1].kill()
    ranks[1].communicate()


# As with NCCL: ranks wait for a failed one for ever, and so does a rank that destroys its process group.
FAILURE = """
from evspan.conf.errors import UserError
def misbehave(rank):
    import torch.distributed
    torch.distributed.destroy_process_group = lambda: time.sleep(1000)
    if rank != {victim}:
        time.sleep(1000)
    time.sleep(1.5)  # a beat
    print("the last output", end="")
    (here / "raised").write_text(str(time.time()))
    raise {error}
"""


@pytest.mark.parametrize(
    ("victim", "error", "code", "last_line"),
    [
        (2, 'ValueError("of all things")', 1, "ValueError: of all things"),
        (0, 'UserError("no such shard")', 2, "error: no such shard"),
    ],
)
def test_a_rank_that_fails_ends_at_once_and_is_named(tmp_path, victim, error, code, last_line):
    ranks = started(tmp_path, FAILURE.format(victim=victim, error=error), timeout_s=60)
    failed = ranks[victim]
    first_line = failed.stderr.readline()
    raised = float((tmp_path / "raised").read_text())
    assert time.time() - raised < 20  # of the 60 s that a rank may be silent
    err = first_line + failed.stderr.read()
    assert failed.wait(120) == code
    assert failed.stdout.read() == "the last output"
    assert err.rstrip().endswith(last_line)
    kind = error.split("(")[0]
    for rank in set(range(3)) - {victim}:
        code_of_peer, err = end_of(ranks[rank], 120)
        assert code_of_peer == 69
        assert err.count("\n") == 1
        assert re.match(
            rf"error: rank {victim} \(process {failed.pid} on \S+\) failed \({kind}: .*\)\. So", err
        ), err
    assert time.time() - raised < 40


def test_ranks_that_are_done_print_nothing(tmp_path):
    ranks = started(
        tmp_path,
        """
def misbehave(rank):
    if rank == 1 and (here / "pid-2").exists() and not (here / "enough").exists():
        time.sleep(0.5)
        (here / "enough").touch()
""",
    )
    for process in ranks:
        assert end_of(process, 120) == (0, "")


def test_a_rank_that_does_not_start_is_missed_in_one_line(tmp_path):
    ranks = started(
        tmp_path,
        """
if os.environ["SLURM_PROCID"] == "2":
    sys.exit()
""",
        timeout_s=2,
    )
    assert end_of(ranks[2], 120) == (0, "")
    for rank in (0, 1):
        code, err = end_of(ranks[rank], 120)
        assert code == 69, err
        error = err.splitlines()[-1]  # after torch's warnings
        waited = f"error: rank {rank} of 3 waited up to 2 s for the others to join at 127.0.0.1:"
        assert error.startswith(waited), err
        assert error.endswith("raise parallel.timeout_s")
        assert "keys" not in error
        assert "Traceback" not in err


def test_stuck_ranks_are_ended_by_their_parent_and_named(tmp_path):
    """`evspan train` with a rank that is stopped: reported once."""
    (tmp_path / "program.py").write_text(PROGRAM + "\nrun_command(work)\n")
    launcher = (
        "import sys; from evspan.launch.local.ranks import run_ranks; "
        "sys.exit(run_ranks([sys.executable, *sys.argv[1:]], 2, threads=1, remedy='Do it again', grace_s=1))"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            launcher,
            str(tmp_path / "program.py"),
            str(tmp_path),
            "2",
            str(TIMEOUT_S),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = all_ready(tmp_path)
    time.sleep(1.5)
    os.kill(ranks[1], signal.SIGSTOP)
    code, err = end_of(process, 120)
    assert code == 69 and err.count("\n") == 1, err
    assert err.startswith(f"error: rank 1 (process {ranks[1]} on ")
    assert err.endswith("; rank 1 had to be killed. Do it again\n")
    eventually(lambda: not any(map(alive, pids(tmp_path))), 120)


# -- memory ------------------------------------------------------------------------------------------------------
# Bytes of address space that a rank gets when its first step begins, beyond what it has.
SPARE = 700 << 20


def trained_in_little_memory(shards, run_dir, *overrides):
    """Exit code and stderr of `evspan train` on one rank, which ends with its first step."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "evspan.launch",
            "train",
            "experiment=demo",
            f"dataset.root={shards}",
            f"run_dir={run_dir}",
            "parallel.ranks=1",
            "parallel.threads=1",
            "training.sequence_length=20",
            "training.log_every=1",
            "training.num_workers=0",
            *overrides,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    for line in process.stdout:
        if line.startswith("watch it"):
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            limit = (int(status["VmSize"].split()[0]) << 10) + SPARE
            resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
        if line.startswith("step 1 "):
            process.send_signal(signal.SIGTERM)
    return end_of(process, 120)


def test_too_little_memory_names_options_that_help(shards, tmp_path):
    code, err = trained_in_little_memory(shards, tmp_path / "run", "training.batch_size=16")
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith(
        "error: rank 0 ran out of memory with 16 lanes x 20 frames in a micro-batch, after using "
    )
    assert "can't allocate memory" in err
    assert "training.activation_checkpointing=true training.frames_per_call=16" in err
    assert "parallel.sequence=2 parallel.ranks=2 (10 frames a rank instead of 20)" in err
    assert (
        "training.batch_size=8 training.gradient_accumulation_steps=2 (as many lanes a step, 8 instead of 16 at once"
        in err
    )
    code, err = trained_in_little_memory(
        shards, tmp_path / "run", "training.batch_size=2", "training.gradient_accumulation_steps=8"
    )
    assert code == 75, err


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 80 bytes."
            ),
            True,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes."),
            True,
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_out_of_memory(error, is_one):
    assert out_of_memory(error) == is_one


def config(*, ranks=1, **training):
    sequence = training.pop("sequence", 1)
    return TrainConfig(
        training=TrainingConfig(**training), parallel=ParallelConfig(ranks=ranks, sequence=sequence)
    )


def world(size, device="cpu"):
    return World(0, size, 0, size, torch.device(device))


def test_memory_options_start_from_the_config():
    options = memory_options(
        config(
            ranks=4,
            sequence=2,
            sequence_length=12,
            batch_size=6,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            frames_per_call=9,
        ),
        world(4),
    )
    assert [line.split(" (")[0] for line in options] == [
        "training.frames_per_call=3 instead of 9",
        "deepspeed.stage=2",
        "parallel.sequence=4 parallel.ranks=8",
        "training.batch_size=2 training.gradient_accumulation_steps=6",
        "training.sequence_length=6",
    ]
    assert "1 instead of 3 at once" in options[3]
    options = memory_options(
        config(sequence_length=1, batch_size=1, activation_checkpointing=True), world(1)
    )
    assert len(options) == 1
    assert "smaller model" in options[0]


@pytest.mark.parametrize(
    ("activity", "size", "first"),
    [
        (
            Activity.evaluating,
            "4 recordings x 10 frames in an evaluation",
            "evaluation.batch_size=2 instead of 4; evaluation.sequence_length=5 instead of 10; ",
        ),
        (
            Activity.images,
            "10 frames in writing TensorBoard images",
            "evaluation.sequence_length=5 instead of 10; ",
        ),
        (Activity.training, "4 lanes x 5 frames in a micro-batch", ""),
    ],
)
def test_what_exhausted_the_memory_has_its_own_options(activity, size, first):
    given = config(batch_size=4, sequence_length=5)
    before = set_phase(activity.value)
    try:
        with (
            pytest.raises(UserError) as raised,
            explain_out_of_memory(given, world(1)),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    finally:
        set_phase(before)
    options = "; ".join(memory_options(given, world(1)))
    assert str(raised.value).startswith(f"rank 0 ran out of memory with {size}, after using ")
    assert str(raised.value).endswith(f"Try, in this order: {first}{options}")


def test_an_evaluation_of_one_frame_at_a_time_has_no_options_of_its_own():
    given = config()
    given.evaluation.batch_size = given.evaluation.sequence_length = 1
    options = memory_options(given, world(1), Activity.evaluating)
    assert options == memory_options(given, world(1))


def test_gpus_have_more_memory_options():
    fp32 = config(ranks=2, batch_size=2, precision=Precision.fp32)
    options = " ".join(memory_options(fp32, world(2, "cuda")))
    assert "training.precision=bf16" in options
    assert "deepspeed.offload_optimizer=true" in options
    assert "bf16" not in " ".join(
        memory_options(config(ranks=2, batch_size=2, precision=Precision.bf16), world(2, "cuda"))
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "words",
    [
        "parallel.ranks=1 training.sequence_length=5 training.batch_size=8",
        "parallel.ranks=2 parallel.sequence=2 training.sequence_length=8 training.batch_size=3",
        "parallel.ranks=6 parallel.sequence=3 training.sequence_length=9 training.batch_size=4",
        "parallel.ranks=4 training.sequence_length=7 training.batch_size=12",
        "parallel.ranks=2 training.batch_size=8 training.cuda_graphs=true deepspeed.stage=2",
        "parallel.ranks=2 training.sequence_length=8 training.batch_size=8 training.bptt_frames=4",
        "training.batch_size=8 training.engine=plain training.activation_checkpointing=true",
    ],
)
def test_every_memory_option_makes_a_valid_config(words, device):
    """Overrides as suggested, taken one after the other."""
    given = compose(TrainConfig, words.split())
    lines = memory_options(given, world(given.parallel.ranks, device))
    assert len(lines) > 1
    for line in lines:
        suggested = re.findall(r"\w+\.\w+=\w+", line.partition(" (")[0])
        assert suggested
        compose(TrainConfig, [*words.split(), *suggested])
