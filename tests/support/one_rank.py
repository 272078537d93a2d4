"""This process as the only rank of a world, for tests of the trainer and DeepSpeed in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.utils import groups
from evspan.pipeline.parallel.world import World


@contextmanager
def open_one_rank() -> Iterator[World]:
    """A gloo group of this process, with the variables that DeepSpeed reads.

    DeepSpeed keeps the process groups that it has used, and its stage 3 replaces
    torch.nn.functional.linear; other tests see neither.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        patch.setattr(comm, "cdb", None)
        for name, value in list(vars(groups).items()):
            if name.endswith(("_GROUP", "_GROUP_RANKS")):
                patch.setattr(groups, name, {} if isinstance(value, dict) else None)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        try:
            yield World(0, 1, 0, 1, torch.device("cpu"))
        finally:
            dist.destroy_process_group()
