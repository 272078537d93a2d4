"""What an asynchronous save asks of a GPU, on an emulated one: the host does not wait for copies."""

import threading

import pytest
import torch
from evspan.pipeline.checkpoint_files import find_newest_intact
from evspan.pipeline.engine.checkpoints import THREAD
from evspan.pipeline.engine.host_copies import HostCopies
from safetensors.torch import load_file
from support.counted_step import StepOptions, open_trainer, write_shards
from support.emulated_device import is_supported

WAIT_S = 60.0  # of the thread for what must happen


@pytest.mark.slow
@pytest.mark.skipif(not is_supported(), reason="torch before 2.9")
@pytest.mark.parametrize(
    "options",
    [StepOptions(engine="plain", zero=0), StepOptions(zero=0), StepOptions(zero=1)],
    ids=["plain", "zero 0", "zero 1"],
)
def test_on_a_gpu_the_host_waits_for_no_copy(tmp_path, monkeypatch, options):
    """They are queued to page-locked memory; the thread waits for them."""
    may_wait = threading.Event()
    waiting: list[str] = []
    real = HostCopies.wait

    def wait(copies: HostCopies) -> None:
        assert may_wait.wait(WAIT_S)
        waiting.append(threading.current_thread().name)
        real(copies)

    monkeypatch.setattr(HostCopies, "wait", wait)
    shards = write_shards(tmp_path / "shards", options)
    with open_trainer(options, shards, tmp_path / "run") as (gpu, trainer):
        batches = trainer.loader.batches(0)
        trainer.micro_batch(next(batches).to(gpu.device))
        trainer.step += 1
        trainer._read_pending()
        batches.close()
        expected = trainer.engine.full_state()
        with gpu.counting() as counts:
            trainer._save()
        may_wait.set()
        trainer._end_save()
    # The counters of Adam are read, after the step whose values the host has read.
    assert [line for line in counts.waits if " counters" not in line] == []
    to_host = [copy for copy in counts.copies if copy.direction == "D2H"]
    assert sum(copy.num_bytes for copy in to_host if not copy.pinned) < 100
    parameters = sum(tensor.numel() for tensor in expected.values())
    assert sum(copy.num_bytes for copy in to_host) > 15 * parameters
    assert len(to_host) < 40  # of several hundred tensors
    assert waiting == [THREAD]
    saved = find_newest_intact(tmp_path / "run").folder / "weights.safetensors"
    loaded = load_file(saved)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
