"""Fixtures of all tests: prepared datasets, the throw-away SLURM, and material that is not part of the project."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from evspan.data_prep.prepare import prepare
from evspan.launch.logging_config import configure_logging
from evspan.pipeline.parallel import rank_exit
from support.prepared import make_source, prep_config
from support.slurm_cluster import cluster  # noqa: F401  a fixture
from support.small_shards import write_small_shards

ROOT = Path(__file__).parent.parent

# Test processes share the cores. OpenMP's threads spin while they wait, by default, and take the time of those that work: with twice as
# many threads as cores a training step takes up to forty times as long. On the small arrays of tests a second thread only costs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Else every process, this one too, would compile all modules of Evspan and its tests again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# All tests run on the CPU, on machines with GPUs too, and so do the processes that they start. `make gpu` checks a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Where the tests run in the background of a script, Ctrl-C is ignored, which every process that a test starts would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Long files begin first, so that no process waits for another's at the end; the first spends most of its time waiting for SLURM.
LONG = (
    "test_submit_slurm",
    "test_layouts",
    "test_training",
    "test_exchange",
    "test_tensorboard",
    "test_checkpoint_layouts",
    "test_prep_slurm",
    "test_submitted_code_slurm",
    "test_failures",
    "test_readme",
    "test_guides",
    "test_check",
    "test_smoke",
    "test_interactive_train",
    "test_crash",
    "test_packaging",
    "test_interactive_step",
    "test_submit",
)


# While modules are imported next to nothing is freed, and the collector looks at all objects again and again.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()  # without gc.freeze(), which would hide the caches that the emulated GPU empties


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def outside(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        reason = f"{folder} is not there; set {variable} to the folder that holds it"
        if os.environ.get("EVSPAN_REQUIRE_SAMPLES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Logging as in a command, for `capsys` and `capfd`; records reach `caplog`, too, until a command configures it again."""
    configure_logging(0)
    logging.getLogger("evspan").propagate = True
    yield
    configure_logging(0)


@contextmanager
def no_launcher_left() -> Iterator[None]:
    """Restores torchrun's variables: in a process with them, a command takes itself for a rank.

    A trainer that has left threads or a process group behind makes the next command end its process.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)
    rank_exit._threads_left.clear()
    rank_exit._waits.clear()


@pytest.fixture(autouse=True)
def _launcher() -> Iterator[None]:
    """For tests that train in their own process."""
    with no_launcher_left():
        yield


@pytest.fixture(autouse=True, scope="module")
def _launcher_of_module() -> Iterator[None]:
    """For fixtures that do."""
    with no_launcher_left():
        yield


@pytest.fixture(scope="session")
def reported_cases() -> Path:
    """Inputs after public bug reports, a folder each."""
    return outside("EVSPAN_CASES", "cases")


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Small real recordings and golden.json."""
    return outside("EVSPAN_SAMPLES", "data")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Weights, inputs and outputs of the published detector, and preprocessing fixtures."""
    return outside("EVSPAN_PARITY", "parity")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five simulated recordings in three formats and three splits, most of them with boxes."""
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes for `source`. A test that changes it works on a copy."""
    output = tmp_path_factory.mktemp("prepared")
    prepare(prep_config(source, output))
    return output


@pytest.fixture(scope="module")
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of moving rectangles. The module's SHARD_FRAMES: split -> frames of each recording."""
    return write_small_shards(
        tmp_path_factory.mktemp("data") / "shards", request.module.SHARD_FRAMES
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For results that are compared bit for bit. With a mark of the module it precedes its fixtures."""
    import torch  # most tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
