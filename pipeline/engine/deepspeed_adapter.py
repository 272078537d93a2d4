"""Everything that uses DeepSpeed's API, public and private.

Verified with deepspeed 0.19.8 by tests/pipeline/test_deepspeed_adapter.py. These names are private
and may change with any release:

    comm.comm.cdb                                        issues its collectives
    runtime.compiler.compile, runtime.compiler.dummy_decorator    decorates Muon's functions
    ops.__compatible_ops__, ops.op_builder.all_ops.ALL_OPS    compiled operators that are available
    runtime.zero.stage_1_and_2.is_invalid_grad_norm, runtime.zero.stage3.is_invalid_grad_norm
    optimizer.scaled_global_norm, optimizer.averaged_gradients, optimizer.params_in_partition,
        optimizer.dp_process_group, optimizer.cpu_offload (stages 1, 2)
    optimizer._get_norm_groups (stage 3)
    optimizer.fp16_groups, optimizer.fp32_groups, optimizer.step (stage 0 in bf16)
    optimizer.fp32_partitioned_groups_flat (stage 3)     the tensors that Adam updates
    optimizer._lazy_init_hp_params_optimizer_state (1, 2)
    parameter.ds_tensor, parameter.ds_shape (stage 3)    this rank's part, and the whole shape
    parameter._hp_mapping (stages 1, 2)                  where this rank's part is in the parameter
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from evspan.pipeline.engine.adam import clip_factor, sum_of_squares
from evspan.pipeline.parallel.collective_time import time_collectives
from torch import Tensor, nn

# DeepSpeed chooses its accelerator when it is imported, and logs then.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402
import deepspeed.comm as deepspeed_comm  # noqa: E402
from deepspeed.ops.op_builder.all_ops import ALL_OPS  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: E402
from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: E402

NormListener = Callable[[Tensor], None]

NOT_IMPLEMENTED = "deepspeed_not_implemented"  # an operator's name in DeepSpeed's table
VERIFIED_VERSION = "0.19.8"


def _silence() -> None:
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if handler not in logging.getLogger().handlers:  # others' records go through those
            handler.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore",
        message=".*(all_gather_into|reduce_scatter)_tensor.*",
        category=FutureWarning,
    )


_silence()


def _never_invalid(norm: Any) -> bool:
    """Replaces DeepSpeed's check, which makes the host wait for the norm.

    The optimizer leaves out an update with a gradient that is not finite; see `watch_norm`.
    """
    return False


stage_1_and_2.is_invalid_grad_norm = _never_invalid
stage3.is_invalid_grad_norm = _never_invalid


# To check the optimizer, DeepSpeed imports Muon, and torch's compiler for three functions of it:
# a second in every rank, and hundreds of files. Training does not use Muon.
compiler.compile = lambda: compiler.dummy_decorator


# On first access, DeepSpeed runs compilers and asks the GPU to find out which of its compiled
# operators are available, in every rank; with gloo, it would then compile one for half a minute.
# Training uses none of them.
deepspeed.ops.__compatible_ops__ = {**dict.fromkeys(ALL_OPS, False), NOT_IMPLEMENTED: False}


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    device: torch.device,
) -> Any:
    """DeepSpeed's engine for plain data parallelism over all ranks. A collective.

    Args:
        config: DeepSpeed's own, as in its JSON files.
    """
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
    time_collectives(deepspeed_comm.comm.cdb)
    _set_local_rank(device)
    engine, *_ = deepspeed.initialize(
        model=model.to(device),
        optimizer=optimizer,
        config=config,
        dist_init_required=False,
    )
    return engine


def _set_local_rank(device: torch.device) -> None:
    """Sets LOCAL_RANK to the device's index: DeepSpeed takes it from there, also in forwards.

    They differ where each rank sees only its own GPU, whose index is 0. Under mpirun DeepSpeed
    compares it with OpenMPI's variable.
    """
    if device.index is None:
        return
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(device.index)


# -- the gradient norm, on the device --------------------------------------------------------------
def watch_norm(engine: Any, listener: NormListener, *, stage: int, clip: float) -> None:
    """Calls `listener` in every update, before Adam, with the norm of all gradients.

    The norm is (), float32, before clipping, and the same on every rank; it is computed on the
    device, where DeepSpeed's own code makes the host wait. In float32, stage 0 has no hook: there
    the caller clips.

    Args:
        clip: the norm to which gradients are clipped; 0: not at all.
    """
    optimizer = engine.optimizer
    if stage == 3:
        _watch_stage_3(optimizer, listener)
    elif stage in (1, 2):
        _watch_stages_1_and_2(optimizer, listener)
    elif hasattr(optimizer, "fp32_groups"):
        optimizer.step = lambda: _step_stage_0(optimizer, listener, clip)


def _watch_stages_1_and_2(zero: Any, listener: NormListener) -> None:
    offloaded_norm = zero.scaled_global_norm

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        if zero.cpu_offload:
            norm = torch.as_tensor(offloaded_norm(norm_type), dtype=torch.float32)
        else:
            norm = _partitioned_norm(zero)
        listener(norm)
        return norm

    zero.scaled_global_norm = scaled_global_norm


def _partitioned_norm(zero: Any) -> Tensor:
    """DeepSpeed's norm of all ranks' gradients, with one kernel and one collective for all."""
    squares = []
    for group, parameters in enumerate(zero.params_in_partition):
        gradients = [g for g in zero.averaged_gradients[group] if not hasattr(g, "_zero_padding")]
        squares.append(sum_of_squares(gradients[: len(parameters)], zero.device))
    over_ranks = torch.stack(squares)
    deepspeed_comm.all_reduce(over_ranks, group=zero.dp_process_group)
    norm: Tensor = torch.linalg.vector_norm(over_ranks.sqrt())
    return norm


def _watch_stage_3(zero: Any, listener: NormListener) -> None:
    get_norm_groups = zero._get_norm_groups

    def norm_groups() -> Any:
        norms = get_norm_groups()
        listener(combine_grad_norm_groups(norms))
        return norms

    zero._get_norm_groups = norm_groups


def _step_stage_0(optimizer: Any, listener: NormListener, clip: float) -> None:
    """The update of bfloat16 parameters that are not partitioned, from float32 ones.

    Every parameter has a gradient: DeepSpeed fills in zeros when it averages.
    """
    parameters = [p for group in optimizer.fp16_groups for p in group]
    masters = [p for group in optimizer.fp32_groups for p in group]
    gradients = [torch.empty_like(p) for p in masters]
    torch._foreach_copy_(gradients, [p.grad for p in parameters])
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    norm = sum_of_squares(gradients, gradients[0].device).sqrt()
    listener(norm)
    optimizer._global_grad_norm = norm
    if clip:
        torch._foreach_mul_(gradients, clip_factor(norm, clip))
    optimizer.optimizer.step()
    with torch.no_grad():
        torch._foreach_copy_(parameters, masters)
    for master in masters:
        master.grad = None


def whole_parameters(
    parameters: Iterable[nn.Parameter], *, stage: int, write: bool = False
) -> AbstractContextManager[Any]:
    """While open, every rank holds whole parameters. A collective in stage 3, else nothing.

    Args:
        write: whether rank 0 changes them, and the others receive its values.
    """
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(parameters), modifier_rank=0 if write else None, enabled=stage == 3
    )
    return context


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Averaged over ranks, in the parameter's shape; None without one. A collective."""
    gradient: Tensor | None = deepspeed.utils.safe_get_full_grad(parameter)
    return gradient


def adam_parameters(engine: Any, adam: torch.optim.Adam, *, stage: int) -> list[Tensor]:
    """The tensors that `adam` updates on this rank: its own, or DeepSpeed's in their place."""
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in adam.param_groups for p in group["params"]]


def link_adam_state(engine: Any, *, stage: int) -> None:
    """Lets the functions below find Adam's state, which DeepSpeed links after its first step."""
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


# -- parts of a parameter ----------------------------------------------------------------------
# `key` is None for the float32 parameter itself, or the name of one of Adam's states.


class Part(NamedTuple):
    """This rank's part of a flattened tensor: values (n,) from element `start` on."""

    start: int
    values: Tensor


def whole_shape(parameter: Any, *, stage: int) -> torch.Size:
    """The parameter's shape without partitioning."""
    shape: torch.Size = parameter.ds_shape if stage == 3 else parameter.shape
    return shape


def padded_numel(parameter: Any, *, stage: int, ranks: int) -> int:
    """Elements of all ranks' parts. In stage 3 they are equal, so the last one is padded."""
    if stage == 3:
        return int(parameter.ds_tensor.numel()) * ranks
    return int(parameter.numel())


def read_part(parameter: Any, key: str | None, *, stage: int, rank: int) -> Part:
    """This rank's part of a parameter in stages 1 to 3, float32; empty if it has none."""
    if stage == 3:
        if key is None:
            values = deepspeed.utils.safe_get_local_fp32_param(parameter)
        else:
            values = deepspeed.utils.safe_get_local_optimizer_state(parameter, key)
        return Part(rank * parameter.ds_tensor.numel(), values.flatten())
    mapping = parameter._hp_mapping
    if mapping is None:
        return Part(0, torch.empty(0))
    return Part(mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).flatten())


def write_whole(parameter: Any, key: str | None, whole: Tensor, *, stage: int, rank: int) -> None:
    """Sets this rank's part of a parameter in stages 1 to 3. whole: of `whole_shape`."""
    if stage == 3:
        _write_stage_3(parameter, key, whole, rank)
    elif key is None:
        deepspeed.utils.safe_set_full_fp32_param(parameter, whole)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)


def _write_stage_3(parameter: Any, key: str | None, whole: Tensor, rank: int) -> None:
    """DeepSpeed's setters of whole tensors fail if the ranks do not divide them."""
    size = parameter.ds_tensor.numel()
    part = torch.zeros(size)
    values = whole.flatten()[rank * size :][:size]
    part[: values.numel()] = values
    if key is None:
        deepspeed.utils.safe_set_local_fp32_param(parameter, part)
    else:
        deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)
