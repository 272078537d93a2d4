"""A CUDA device in emulation: its tensors report `cuda:0` and compute on the CPU.

    with emulated_gpu(world=64, rank=0) as gpu:
        model.to(gpu.device)
        with gpu.counting() as counts:
            step()
    print(counts.table())

An operator that a GPU would refuse, because its tensors are on two devices, raises. Operators, host
waits, copies between host and device, and collectives are counted, each with the project's line
that causes it. The peers of a world are fake: an all-reduce returns this rank's own values, a
gather returns them once per rank.

With `values=False` the tensors have shapes but no values (they are on torch's meta device), so a
step of any size takes seconds; what the host reads of them is 0. An operator whose result's shape
depends on values raises.

The device is torch's PrivateUse1 backend, which is registered for the whole process. Not emulated:
streams run in order, an operator counts once however many kernels it launches, and torch.compile
and CUDA graphs are unavailable.
"""

import functools
import gc
import importlib
import math
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import evspan.pipeline
import torch
import torch.distributed as dist
import torch.nn.functional as F
from evspan.pipeline.benchmark.operations import ALLOCATIONS, makes_host_wait
from evspan.pipeline.parallel.world import World
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

PROJECT = Path(evspan.pipeline.__file__).parents[1]
PACKAGES = ("conf", "data_prep", "launch", "pipeline")
BACKEND = "emulated"
MESSAGES = ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")
NO_WORK = ALLOCATIONS | {"aten::detach", "aten::alias", "aten::set_"}


# -- counts ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Copy:
    """A copy between host and device.

    direction: "H2D" or "D2H". non_blocking: as requested; a pageable source makes the host wait
    for the copy in any case. line: the project's.
    """

    direction: str
    num_bytes: int
    pinned: bool
    non_blocking: bool
    line: str


@dataclass(frozen=True)
class Collective:
    """Or a message between two ranks.

    name: of torch's operator. num_bytes: sent or reduced by this rank. line: the project's.
    """

    name: str
    num_bytes: int
    line: str

    @property
    def is_message(self) -> bool:
        """Whether it is sent to or received from one rank."""
        return self.name in MESSAGES


@dataclass
class Counts:
    """What a piece of work asks of the device.

    Attributes:
        operators: by name; views and allocations are left out. A GPU launches a kernel or more
            for each.
        operator_lines: the same operators by line.
        waits: line and reason of everything that makes the host wait for the device.
        copies: between host and device.
        collectives: in order, with messages.
        num_bytes: that operators read and write in the device's memory, by name.
        flop: of matrix products, convolutions, attention and LSTMs, by name.
        lstm_steps: time steps of all LSTM calls, forward and backward.
    """

    operators: Counter[str] = field(default_factory=Counter)
    operator_lines: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: list[Copy] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    num_bytes: Counter[str] = field(default_factory=Counter)
    flop: Counter[str] = field(default_factory=Counter)
    lstm_steps: int = 0

    def copied_bytes(self, direction: str, *, pinned: bool | None = None) -> int:
        """Bytes of the copies in one direction; `pinned`: only those from or to such memory."""
        copies = [c for c in self.copies if c.direction == direction]
        if pinned is not None:
            copies = [c for c in copies if c.pinned == pinned]
        return sum(c.num_bytes for c in copies)

    def list_gathers(self) -> Counter[str]:
        """Lines of all-gathers into lists, which copy once per rank."""
        name = "c10d::allgather_"
        return Counter(c.line for c in self.collectives if c.name == name)

    def table(self, rows: int = 12) -> str:
        """All counts as text, the most frequent lines of each first."""
        parts = [
            f"operators {self.operators.total():,}, host waits {self.waits.total()}, "
            f"collectives {sum(not c.is_message for c in self.collectives)}, "
            f"messages {sum(c.is_message for c in self.collectives)}, "
            f"to the device {self.copied_bytes('H2D') / 1e6:.3f} MB "
            f"({self.copied_bytes('H2D', pinned=True) / 1e6:.3f} MB pinned), "
            f"to the host {self.copied_bytes('D2H') / 1e6:.3f} MB, "
            f"{sum(self.flop.values()) / 1e9:.1f} GFLOP, "
            f"memory traffic {sum(self.num_bytes.values()) / 1e9:.2f} GB"
        ]
        copies = Counter(
            f"{c.direction} {c.num_bytes:,} B, pinned {c.pinned}, non_blocking "
            f"{c.non_blocking}, {c.line}"
            for c in self.copies
        )
        sections = {
            "host waits": self.waits,
            "copies": copies,
            "collectives": Counter(f"{c.name} {c.line}" for c in self.collectives),
            "operators": self.operators,
            "operators by line": self.operator_lines,
        }
        for title, counter in sections.items():
            parts.append(f"{title}: {counter.total():,}")
            parts += [f"  {n:6,}  {what}" for what, n in counter.most_common(rows)]
        return "\n".join(parts)


def project_line() -> str:
    """The innermost line of the project (not of its tests) or of DeepSpeed on the stack.

    Backward runs in a thread of its own, where only custom functions and hooks have a line.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = _file_of_interest(frame.f_code.co_filename)
        if file:
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    if threading.current_thread() is threading.main_thread():
        return "outside the project"
    return "backward"


@functools.cache
def _file_of_interest(file: str) -> str:
    """A short name of a file of the project or of DeepSpeed, empty for others."""
    path = Path(file)
    # The environment, with torch, may be in the project's folder.
    if any(path.is_relative_to(PROJECT / package) for package in PACKAGES):
        return str(path.relative_to(PROJECT))
    if "deepspeed" in path.parts:
        return f"deepspeed/{path.name}"
    return ""


# -- the device ------------------------------------------------------------------------------------
class Emulation:
    """The device while it is open, its world, and the counts of what it is asked to do.

    Attributes:
        device: cuda:0.
        world: of this rank, on the device.
        values: whether tensors have values.
        counts: since `counting` was entered; None outside.
    """

    def __init__(self, world: World, *, values: bool) -> None:
        self.device = world.device
        self.world = world
        self.values = values
        self.counts: Counts | None = None
        self.step = 0
        self.pinned: set[int] = set()  # addresses of storages

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts what runs inside, as a step of its own."""
        self.counts = Counts()
        self.next_step()
        try:
            yield self.counts
        finally:
            self.counts = None

    def next_step(self) -> None:
        """A step ends. Waiting for an event of an earlier step is not counted: it is over."""
        self.step += 1

    def operator(self, name: str, num_bytes: int = 0, flop: int = 0) -> None:
        """Counts an operator."""
        if self.counts is None:
            return
        self.counts.operators[name] += 1
        self.counts.operator_lines[project_line()] += 1
        self.counts.num_bytes[name] += num_bytes
        if flop:
            self.counts.flop[name] += flop

    def wait(self, reason: str) -> None:
        """Counts a wait of the host."""
        if self.counts is not None:
            self.counts.waits[f"{project_line()}: {reason}"] += 1

    def copy(self, direction: str, host: torch.Tensor, *, non_blocking: bool) -> None:
        """Counts a copy from or to the tensor `host`."""
        if self.counts is None:
            return
        num_bytes = host.numel() * host.element_size()
        # torch allocates the target of a copy to the host in pinned memory where it may not block.
        pinned = self.is_pinned(host) or (direction == "D2H" and non_blocking)
        self.counts.copies.append(Copy(direction, num_bytes, pinned, non_blocking, project_line()))
        if not non_blocking:
            self.wait(f"blocking copy {direction}")

    def collective(self, name: str, num_bytes: int) -> None:
        """Counts a collective or a message."""
        if self.counts is not None:
            self.counts.collectives.append(Collective(name, num_bytes, project_line()))

    def pin(self, t: torch.Tensor) -> torch.Tensor:
        """Treats the memory of a CPU tensor as pinned."""
        storage = t.untyped_storage()
        address = storage.data_ptr()
        self.pinned.add(address)
        weakref.finalize(storage, self.pinned.discard, address)
        return t

    def is_pinned(self, t: torch.Tensor) -> bool:
        """Whether the memory of a CPU tensor was pinned."""
        return t.untyped_storage().data_ptr() in self.pinned

    def to_device(self, t: torch.Tensor) -> "EmulatedTensor":
        """A CPU tensor's values on the device."""
        return EmulatedTensor(t.clone() if self.values else t.to("meta"))

    def to_host(self, inner: torch.Tensor) -> torch.Tensor:
        """The values of a device tensor, given what it holds; zeros without values."""
        if self.values:
            return inner.clone()
        return torch.zeros(inner.shape, dtype=inner.dtype)


_open: list[Emulation] = []


def current() -> Emulation:
    """The open emulation."""
    if not _open:
        raise RuntimeError("no emulated GPU is open; use emulated_gpu()")
    return _open[-1]


class EmulatedTensor(torch.Tensor):
    """A tensor of the device. inner: the tensor that holds its values, on the CPU or on meta."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "EmulatedTensor":
        t = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(BACKEND, 0),
        )
        t.inner = inner
        return t

    def __repr__(self, **_: Any) -> str:
        return f"EmulatedTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    # torch's own accessors would report the backend's name.
    @property
    def device(self) -> torch.device:
        """cuda:0."""
        return torch.device("cuda", 0)

    @property
    def is_cuda(self) -> bool:
        """True."""
        return True

    @property
    def data(self) -> "EmulatedTensor":
        """The same values without gradient."""
        return EmulatedTensor(self.inner.detach())

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner.detach()

    def data_ptr(self) -> int:
        """Address of the values."""
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the values."""
        return self.inner.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        """Memory of the device is not."""
        return False

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As torch's; copies are counted."""
        return super().to(*map(_backend_device, args), **_with_backend_device(kwargs))

    def cuda(self, *_: Any, **__: Any) -> "EmulatedTensor":
        """The tensor itself."""
        return self

    def record_stream(self, stream: Any) -> None:
        """Memory is not reused here."""
        pass

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        """torch fills a CPU tensor and copies it, blocking (csrc/utils/tensor_new.cpp)."""
        kwargs.pop("device", None)
        made = torch.tensor(data, **{"dtype": self.dtype, **kwargs})
        current().copy("H2D", made, non_blocking=False)
        return current().to_device(made)

    def tolist(self) -> Any:
        """As torch's: a blocking copy."""
        host = current().to_host(self.inner)
        current().copy("D2H", host, non_blocking=False)
        return host.tolist()


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", BACKEND)


def _backend_device(value: Any) -> Any:
    """The backend's device for a CUDA one; other values as they are."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return torch.device(BACKEND, 0) if _is_cuda(value) else value
    return value


def _with_backend_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _backend_device(value) for name, value in kwargs.items()}


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, EmulatedTensor) else value


def _size(t: torch.Tensor) -> int:
    """Bytes of the elements; those of an expanded dimension are the same ones."""
    sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return math.prod(sizes) * t.element_size() if t.numel() else 0


def _sizes(values: Any) -> int:
    return sum(_size(t) for t in tree_leaves(values) if isinstance(t, torch.Tensor))


def _traffic(schema: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operator reads and writes: its inputs, what it changes of them, its outputs."""
    read = _sizes((args, kwargs))
    if not schema.is_mutable:
        return read + _sizes(out)
    by_name = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    changed = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    written = sum(_sizes(by_name.get(name)) for name in changed)
    if schema.name in ("aten::copy_", "aten::fill_", "aten::zero_"):
        return read  # the old values are not read
    return read + written


# -- operators -------------------------------------------------------------------------------------
def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`dispatch`, outside of inference mode.

    In that mode torch does not decompose composite operators, and views of parameters fail.
    """
    if not torch.is_inference_mode_enabled():
        return dispatch(func, args, kwargs)
    with torch.inference_mode(False), torch.no_grad(), _Factories():
        return func(*args, **kwargs)


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the tensors' values, counts it, and checks its devices.

    Raises:
        RuntimeError: its tensors are on two devices.
    """
    emulation = current()
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_device = [t for t in tensors if isinstance(t, EmulatedTensor)]
    if name == "aten::_to_copy":
        return _to_copy(emulation, func, args[0], kwargs)
    if name == "aten::copy_" and isinstance(args[0], EmulatedTensor) != isinstance(
        args[1], EmulatedTensor
    ):
        return _copy_across(emulation, *args[:2], non_blocking=(*args, False)[2])
    device = kwargs.get("device")
    targets_device = _is_cuda(device) if device is not None else bool(on_device)
    if not targets_device and not on_device:
        return _on_cpu(emulation, func, args, kwargs)
    is_collective = name.startswith("c10d::")
    if on_device and not is_collective:
        _check_devices(emulation, name, args, tensors)
    if name == "aten::_local_scalar_dense":
        return _read_scalar(emulation, args[0])
    if on_device and makes_host_wait(name, args):
        emulation.wait(name)
    if is_collective:
        out = _collective(emulation, func, *tree_map(_inner, (args, kwargs)))
    else:
        out = _compute(emulation, func, *tree_map(_inner, (args, kwargs)))
    return _wrapped(out, on_device)


def _compute(emulation: Emulation, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on inner tensors, and counts it."""
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu" if emulation.values else "meta")
    kwargs.pop("pin_memory", None)
    out = func(*args, **kwargs)
    if not func.is_view and func._schema.name not in NO_WORK:
        _count(emulation, func, args, kwargs, out)
    return out


def _wrapped(out: Any, on_device: list[EmulatedTensor]) -> Any:
    """A result as tensors of the device: those that were given where it contains them."""
    wrappers = {id(t.inner): t for t in on_device}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        known = wrappers.get(id(value))
        return EmulatedTensor(value) if known is None else known

    return tree_map(wrapped, out)


class _Factories(TorchDispatchMode):
    """Sends operators without tensors of the device, like torch.zeros, through `dispatch`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _on_cpu(emulation: Emulation, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator of the CPU alone. Pinned allocations need no driver."""
    if func._schema.name.startswith("c10d::"):
        return _collective(emulation, func, args, kwargs)
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    return emulation.pin(func(*args, **{**kwargs, "pin_memory": False}))


def _count(emulation: Emulation, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if emulation.counts is None:
        return
    num_bytes = _traffic(func._schema, args, kwargs, out)
    formula = flop_registry.get(func._overloadpacket)
    flop = formula(*args, **kwargs, out_val=out) if formula else 0
    emulation.operator(func._schema.name, num_bytes, flop)


def _check_devices(emulation: Emulation, name: str, args: Any, tensors: list[Any]) -> None:
    host = [t for t in tensors if not isinstance(t, EmulatedTensor) and t.dim() > 0]
    if name.startswith(("aten::index", "aten::_index_put")) and len(args) > 1:
        # torch copies CPU indices to the device, blocking.
        indices = tree_leaves(args[1])
        for index in [t for t in host if any(t is i for i in indices)]:
            emulation.copy("H2D", index, non_blocking=False)
        host = [t for t in host if all(t is not i for i in indices)]
    if name == "aten::_fused_adamw_":
        return
    if host:
        shapes = [tuple(t.shape) for t in host]
        raise RuntimeError(
            f"{name} has tensors on cuda:0 and tensors of shape {shapes} on {host[0].device}, at "
            f"{project_line()}"
        )


def _to_copy(emulation: Emulation, func: Any, source: torch.Tensor, kwargs: Any) -> torch.Tensor:
    non_blocking = bool(kwargs.get("non_blocking"))
    device = kwargs.get("device")
    options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    from_device = isinstance(source, EmulatedTensor)
    to_device = _is_cuda(device) if device is not None else from_device
    if not from_device and not to_device:
        if device is not None:
            options["device"] = device
        return func(source, **options)
    if not from_device:
        emulation.copy("H2D", source, non_blocking=non_blocking)
        return emulation.to_device(func(source, **options))
    converted = func(source.inner, **options)
    if to_device:
        emulation.operator("aten::_to_copy", _size(source) + _size(converted))
        return EmulatedTensor(converted)
    if torch.device(device).type == "meta":
        return converted.to("meta")
    host = emulation.to_host(converted)
    emulation.copy("D2H", host, non_blocking=non_blocking)
    return host


def _copy_across(
    emulation: Emulation, target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool
) -> torch.Tensor:
    if isinstance(target, EmulatedTensor):
        emulation.copy("H2D", source, non_blocking=non_blocking)
        if emulation.values:
            target.inner.copy_(source)
    else:
        emulation.copy("D2H", target, non_blocking=non_blocking)
        target.copy_(emulation.to_host(source.inner))
    return target


def _read_scalar(emulation: Emulation, t: torch.Tensor) -> Any:
    emulation.wait("a value is read")
    return emulation.to_host(t.inner).reshape(()).item()


# -- collectives -----------------------------------------------------------------------------------
def _collective(emulation: Emulation, func: Any, args: Any, kwargs: Any) -> Any:
    """Counts a collective, and runs it with peers that have this rank's values."""
    name = func._schema.name
    tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    num_bytes = sum(_size(t) for t in tensors)
    if name == "c10d::allgather_":
        num_bytes = sum(_size(t) for t in tree_leaves(args[1]))
    elif name in ("c10d::_allgather_base_", "c10d::alltoall_base_"):
        num_bytes = _size(args[1])
    emulation.collective(name, num_bytes)
    on_host = not any(t.is_meta for t in tensors)
    if on_host:
        host = (args, kwargs)
    else:  # the fake process group takes no meta tensors
        host = tree_map(_placeholder, (args, kwargs))
    result = func(*host[0], **host[1])
    if isinstance(result, tuple):  # (tensors, work)
        result = (args[0], *result[1:])
    if on_host:
        _fill(name, args)
    if name == "c10d::allgather_":
        for part in tree_leaves(args[0]):
            emulation.operator("aten::copy_", 2 * _size(part))
    return result


def _placeholder(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _fill(name: str, args: Any) -> None:
    """Writes the outputs that the fake process group leaves as they are."""
    if name == "c10d::allgather_":
        for parts, own in zip(args[0], args[1], strict=True):
            for part in parts:
                part.copy_(own)
    elif name == "c10d::_allgather_base_":
        out, own = args[0], args[1]
        out.view(-1, own.numel()).copy_(own.reshape(1, -1).expand(out.numel() // own.numel(), -1))
    elif name == "c10d::alltoall_base_":
        out, own = args[0], args[1]
        if out.numel() == own.numel():
            out.view(-1).copy_(own.reshape(-1))
        else:
            out.zero_()
    elif name == "c10d::_reduce_scatter_base_":
        out, own = args[0], args[1]
        out.view(-1).copy_(own.reshape(-1)[: out.numel()])
    elif name in MESSAGES[1:]:
        for t in args[0]:
            t.zero_()


# -- composite operators that choose another kernel on CUDA ----------------------------------------
class _Kernel(torch.autograd.Function):
    """One operator forward and one backward, computed on the inner tensors by any function."""

    @staticmethod
    def forward(ctx, function, name, flop, *tensors):
        with torch.enable_grad():
            leaves = [_leaf(t) for t in tensors]
            outs = function(*leaves)
        ctx.name = name
        ctx.flop = flop
        ctx.leaves = leaves
        ctx.outs = outs
        num_bytes = sum(map(_size, (*leaves, *outs)))
        ctx.num_bytes = num_bytes
        current().operator(name, num_bytes, flop)
        return tuple(EmulatedTensor(o.detach()) for o in outs)

    @staticmethod
    def backward(ctx, *gradients):
        current().operator(f"{ctx.name}_backward", 2 * ctx.num_bytes, 2 * ctx.flop)
        pairs = zip(ctx.outs, gradients, strict=True)
        used = [(o, _inner(g)) for o, g in pairs if g is not None]
        results = torch.autograd.grad(
            [o for o, _ in used], ctx.leaves, [g for _, g in used], allow_unused=True
        )
        wrapped = (None if g is None else EmulatedTensor(g) for g in results)
        return (None, None, None, *wrapped)


def _leaf(t: torch.Tensor) -> torch.Tensor:
    return _inner(t).detach().requires_grad_(t.is_floating_point())


_real_lstm = torch.lstm
_real_attention = F.scaled_dot_product_attention


def _attention(query, key, value, *args, **kwargs):
    if not isinstance(query, EmulatedTensor):
        return _real_attention(query, key, value, *args, **kwargs)

    def function(q, k, v):
        return (_real_attention(q, k, v, *args, **kwargs),)

    positions = query.shape[-2] * key.shape[-2]
    flop = 4 * query.shape[:-2].numel() * positions * query.shape[-1]
    return _Kernel.apply(function, "aten::scaled_dot_product_attention", flop, query, key, value)[0]


def _lstm(x, state, weights, *options):
    if not isinstance(x, EmulatedTensor):
        return _real_lstm(x, state, weights, *options)
    emulation = current()
    if emulation.counts is not None:
        emulation.counts.lstm_steps += len(x)

    def function(x, hidden, cell, *weights):  # the CPU's LSTM has no half precision
        state = [hidden.float(), cell.float()]
        outs = _real_lstm(x.float(), state, [w.float() for w in weights], *options)
        return tuple(out.to(x.dtype) for out in outs)

    flop = sum(2 * w.numel() for w in weights if w.dim() == 2) * x.shape[:2].numel()
    return _Kernel.apply(function, "aten::lstm", flop, x, *state, *weights)


# -- torch.cuda ------------------------------------------------------------------------------------
class Stream:
    """A torch.cuda.Stream whose work runs at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """The device waits, not the host."""

    def wait_event(self, event: Any) -> None:
        """The device waits, not the host."""

    def record_event(self, event: Any = None) -> "Event":
        """Records an event."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Counts a wait."""
        current().wait("Stream.synchronize")

    def query(self) -> bool:
        """Whether its work has run."""
        return True


class Event:
    """A torch.cuda.Event. Waiting for one that an earlier step recorded is no wait."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.step = 0

    def record(self, stream: Any = None) -> None:
        """In the step of now."""
        self.step = current().step

    def wait(self, stream: Any = None) -> None:
        """The device waits, not the host."""

    def synchronize(self) -> None:
        """Counts a wait."""
        if self.step == current().step:
            current().wait("Event.synchronize in the step that recorded it")

    def query(self) -> bool:
        """Whether its work has run."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """In ms."""
        return 0.0


def _pin_memory(t: torch.Tensor, *_: Any) -> torch.Tensor:
    return current().pin(t.clone())


def _is_pinned(t: torch.Tensor, *_: Any) -> bool:
    return current().is_pinned(t)


def _tensor_on_cuda(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.tensor(data, device="cuda") copies from the CPU, blocking."""
    if not _is_cuda(kwargs.get("device")):
        return _real_tensor(data, *args, **kwargs)
    kwargs.pop("device")
    made = _real_tensor(data, *args, **kwargs)
    current().copy("H2D", made, non_blocking=False)
    return current().to_device(made)


def _empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    """torch.empty in a loader's thread, too, where no dispatch mode is active."""
    t = _real_empty(*args, **kwargs)
    return current().pin(t) if pin_memory else t


_real_tensor = torch.tensor
_real_empty = torch.empty


def _replacements() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value) of what torch takes from a CUDA driver."""
    stream = Stream()
    return [
        (torch, "lstm", _lstm),
        (torch, "tensor", _tensor_on_cuda),
        (torch, "empty", _empty),
        (F, "scaled_dot_product_attention", _attention),
        (torch.Tensor, "pin_memory", _pin_memory),
        (torch.Tensor, "is_pinned", _is_pinned),
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "stream", lambda s: s or stream),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "default_stream", lambda *_: stream),
        (torch.cuda, "synchronize", lambda *_: current().wait("torch.cuda.synchronize")),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "get_device_name", lambda *_: "emulated GPU"),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "reset_peak_memory_stats", lambda *_: None),
        (torch.cuda, "memory_reserved", lambda *_: 0),
        (torch.cuda, "max_memory_allocated", lambda *_: 0),
        (torch.cuda, "mem_get_info", lambda *_: (60 << 30, 80 << 30)),  # free, total
        (torch.cuda, "utilization", lambda *_: 0),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
    ]


_registered: list[str] = []


def _register() -> None:
    """Registers the backend, once in a process."""
    if _registered:
        return
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(BACKEND)
    # torch.utils.checkpoint asks every backend that is registered, also for tensors on a CPU.
    half = [torch.bfloat16, torch.float16]
    getattr(torch, BACKEND).get_amp_supported_dtype = lambda: half
    foreach_types = importlib.import_module("torch.optim.optimizer")._foreach_supported_types
    foreach_types.append(EmulatedTensor)
    _registered.append(BACKEND)


def is_supported() -> bool:
    """Whether this torch can register a device that is written in Python."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


if is_supported():  # before any backward pass of this process: autograd counts devices once
    _register()


def _forget_constants() -> None:
    """Empties the project's caches: they hold tensors by device."""
    for value in gc.get_objects():
        if type(value) is functools._lru_cache_wrapper:
            module = getattr(value, "__module__", None) or ""
            if module.startswith("evspan.pipeline."):
                value.cache_clear()


@contextmanager
def emulated_gpu(*, world: int = 1, rank: int = 0, values: bool = True) -> Iterator[Emulation]:
    """An emulated GPU as rank `rank` of a world whose other ranks are fake.

    Args:
        values: False: tensors of the device have shapes only.
    """
    _register()
    device = torch.device("cuda", 0)
    node = min(8, world)
    emulation = Emulation(World(rank, world, rank % node, node, device), values=values)
    _open.append(emulation)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    with ExitStack() as stack:
        if not values:
            _forget_constants()
            stack.callback(_forget_constants)
        stack.callback(dist.destroy_process_group)
        stack.callback(_open.pop)
        for target, name, value in _replacements():
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(_Factories())
        yield emulation
