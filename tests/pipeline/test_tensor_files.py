"""Files of tensors are those that the safetensors library would write."""

import json
import os
from pathlib import Path

import pytest
import torch
from evspan.pipeline.checkpoint_files import file_sum
from evspan.pipeline.tensor_files import DTYPES, save_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save

HEADER = {"evspan": json.dumps({"classes": ['a "ball"\\', "Straße\n"]}, ensure_ascii=False)}


def flat_views() -> dict[str, torch.Tensor]:
    """As of a checkpoint: views of one tensor at any offset, integers, none and one element."""
    flat = torch.randn(100)
    return {
        "layer.weight": flat[1:91].view(9, 10),
        "layer.bias": flat[91:100],
        "norm.batches": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "one": flat[0],
    }


def test_the_bytes_are_those_of_the_library(tmp_path: Path):
    tensors = flat_views()
    total = save_tensors(tmp_path / "file", tensors, HEADER)
    apart = {name: tensor.clone() for name, tensor in tensors.items()}
    assert (tmp_path / "file").read_bytes() == save(apart, metadata=HEADER)
    assert total == file_sum(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_dtype_can_be_read_and_is_aligned(tmp_path: Path):
    tensors = {name: torch.arange(3).to(dtype) for dtype, name in DTYPES.items()}
    tensors["transposed"] = torch.arange(6.0).view(2, 3).t()
    save_tensors(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    size = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert size % 8 == 0
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() is None


def test_a_disk_that_is_full_is_an_error_of_the_system():
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors(Path("/dev/full"), {"x": torch.zeros(10_000)})
