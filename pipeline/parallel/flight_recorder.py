"""The latest collectives of this rank, by the project's names for them.

torch's own flight recorder holds every collective that a process group was given, also those of
DeepSpeed, with the number that it has on all ranks of the group, but under torch's names. The ring
here holds those that Evspan calls, with their names and the phase of the run. `latest_collectives`
joins both. torch's recorder covers NCCL in all releases, and gloo where torch has one recorder for
all backends; where it does not, the ring's own numbers are used.

A collective costs two reads of the clock and an append to a deque, and nothing on the device.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from evspan.pipeline.parallel.hang_files import Collective, CollectiveState
from evspan.pipeline.parallel.hang_ring import RingFile
from torch import Tensor

RING_SIZE = 256  # collectives; about four steps of a model with exact norms over many ranks
# Entries of torch's recorder. Its releases read one of these variables.
TORCH_RING_SIZE = 512
TORCH_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
# torch's names of dtypes in its recorder.
DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16"}
DTYPES |= {"Long": "int64", "Int": "int32", "Byte": "uint8", "Char": "int8", "Bool": "bool"}
# Functions of torch that return its recorder's entries as JSON, the newest release's first.
TORCH_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
NANOSECONDS = 1e9
# Phases of a step, and what the collectives are for that libraries (DeepSpeed) call in them.
FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer step"
OF_LIBRARIES = {
    FORWARD: "partitioned weights",
    BACKWARD: "gradients",
    OPTIMIZER: "gradient norm and weights",
}


class Recorded:
    """A collective or message of this rank, open as a context while its call runs.

    Attributes:
        name: what it is for. kind: the operation, such as 'all-reduce'.
        shape, dtype: of this rank's tensor; None for a barrier.
        group: its process group; None: all ranks.
        peer: rank of the world that a message goes to or comes from; -1 for a collective.
        phase: of the run when it was called.
        number: among those of the group, from 1.
        started_ns, ended_ns: since 1970; ended_ns is 0 while the call runs.
        failed: whether the call raised an error.
    """

    __slots__ = (
        "dtype",
        "ended_ns",
        "failed",
        "group",
        "kind",
        "name",
        "number",
        "peer",
        "phase",
        "place",
        "shape",
        "started_ns",
    )

    def __init__(
        self,
        name: str,
        kind: str,
        x: Tensor | None,
        group: dist.ProcessGroup | None,
        peer: int,
    ) -> None:
        self.name = name
        self.kind = kind
        self.shape = None if x is None else x.shape
        self.dtype = None if x is None else x.dtype
        self.group = group
        self.peer = peer
        self.phase = _recorder.phase
        self.number = _recorder.next_number(group, is_message=peer >= 0)
        self.started_ns = time.time_ns()
        self.ended_ns = 0
        self.failed = False
        self.place = 0
        if _recorder.memory is not None:
            self.place = _recorder.memory.begin(self._json())

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """On a GPU the device may still wait for it: the host only queues it."""
        self.failed = error is not None
        self.ended_ns = time.time_ns()
        if _recorder.memory is not None and self.place:
            _recorder.memory.end(self.place, failed=self.failed)

    def _json(self) -> str:
        """For `RingFile.begin`: a list, whose texts are the same again and again."""
        shape = "" if self.shape is None else ",".join(map(str, self.shape))
        return (
            f"[{_group_json(self.group)},{self.number},{_text_json(self.name)},"
            f"{_text_json(self.kind)},{_text_json(self.phase)},[{shape}],"
            f"{_dtype_json(self.dtype)},{self.started_ns},{self.peer}]"
        )


class _Recorder:
    """The ring of this process, which is one rank."""

    def __init__(self) -> None:
        self.ring: deque[Recorded] = deque(maxlen=RING_SIZE)
        self.memory: RingFile | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.ring.clear()
        self.phase = ""
        self.phases: deque[tuple[int, str]] = deque(maxlen=RING_SIZE)  # since when, in ns
        self.num_recorded = 0
        # By the group object's id (0: all ranks), and whether messages are counted.
        self.counts: Counter[tuple[int, bool]] = Counter()

    def next_number(self, group: dist.ProcessGroup | None, *, is_message: bool) -> int:
        """The number of a new collective, or message, of the group."""
        key = (0 if group is None else id(group), is_message)
        self.counts[key] += 1
        self.num_recorded += 1
        return self.counts[key]


_recorder = _Recorder()


def recorded(
    name: str,
    kind: str,
    x: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    peer: int = -1,
) -> Recorded:
    """Records a collective, or a message, that is called inside of the returned context.

    Args:
        name: what it is for, in words that a user understands: 'gradients'.
        kind: the operation: 'all-reduce'.
        x: this rank's tensor; only its shape and dtype are read.
        group: None: all ranks.
        peer: rank of the world at the other end of a message.
    """
    collective = Recorded(name, kind, x, group, peer)
    _recorder.ring.append(collective)
    return collective


def set_phase(name: str) -> str:
    """Sets what the run does now, such as 'backward'. Returns what it did before.

    Collectives that libraries call have no other name.
    """
    before = _recorder.phase
    _recorder.phase = name
    _recorder.phases.append((time.time_ns(), name))
    if _recorder.memory is not None:
        _recorder.memory.set_phase(name)
    return before


def copy_to(memory: RingFile | None) -> None:
    """Copies what is recorded from now on to shared memory, or no longer."""
    _recorder.memory = memory


def current_phase() -> str:
    """The name that `set_phase` was given last."""
    return _recorder.phase


def start_recording() -> None:
    """Empties the ring, and sets the size of torch's. Call it before a process group is created."""
    stop_recording()
    if not any(variable in os.environ for variable in TORCH_VARIABLES):
        has_one_recorder = hasattr(torch._C._distributed_c10d, TORCH_DUMPS[0])
        variable = TORCH_VARIABLES[0] if has_one_recorder else TORCH_VARIABLES[1]
        os.environ[variable] = str(TORCH_RING_SIZE)


def stop_recording() -> None:
    """Forgets what was recorded, and the process groups in it."""
    _recorder.memory = None
    _recorder.reset()
    _group_json.cache_clear()


def progress() -> int:
    """A number that increases with every recorded collective."""
    return _recorder.num_recorded


def waits_since() -> float:
    """When this rank called the newest collective that has not ended, in seconds since 1970.

    Infinity if there is none, as far as the host can tell without waiting for the device.
    """
    ring = list(_recorder.ring)
    if ring and not ring[-1].ended_ns:
        return ring[-1].started_ns / NANOSECONDS
    # A collective of a library, or one that the host has queued on a GPU.
    active = [_entry_time_ns(entry) for entry in _torch_entries() if not _has_ended(entry)]
    return min(active) / NANOSECONDS if active else float("inf")


def latest_collectives() -> list[Collective]:
    """The newest collectives of this rank, oldest first. No collective; does not wait."""
    ring = list(_recorder.ring)
    groups = _group_ranks()
    joined: list[Collective] = []
    in_torch: set[int] = set()
    for entry in _torch_entries():
        own = _enclosing(ring, _entry_time_ns(entry))
        if own is not None:
            in_torch.add(id(own))
        joined.append(_from_torch(entry, own, groups))
    for collective in ring:
        if id(collective) not in in_torch:
            joined.append(_from_ring(collective, groups))
    joined.sort(key=lambda collective: collective.started)
    return joined[-RING_SIZE:]


def describe_progress() -> str:
    """What this rank does now, and its newest collective, for its heartbeat."""
    text = _recorder.phase
    if _recorder.ring:
        newest = _recorder.ring[-1]
        verb = "after" if newest.ended_ns else "in"
        text += f", {verb} {newest.name!r} ({newest.kind} {newest.number})"
    return text.removeprefix(", ")


def _enclosing(ring: list[Recorded], time_ns: int) -> Recorded | None:
    """The collective of the ring during whose call torch recorded one at `time_ns`."""
    for collective in reversed(ring):
        if collective.started_ns <= time_ns:
            return collective if not collective.ended_ns or time_ns <= collective.ended_ns else None
    return None


def _torch_entries() -> list[dict[str, Any]]:
    """The newest entries of torch's recorder; [] where torch has none, or another format."""
    dump: Callable[[], bytes] | None = None
    for name in TORCH_DUMPS:
        dump = dump or getattr(torch._C._distributed_c10d, name, None)
    if dump is None:
        return []
    try:
        entries = json.loads(dump()).get("entries", [])
        return [entry for entry in entries if _entry_time_ns(entry)][-RING_SIZE:]
    except (ValueError, AttributeError, TypeError, KeyError, RuntimeError):
        return []


def _entry_time_ns(entry: dict[str, Any]) -> int:
    return int(entry["time_created_ns"])


def _has_ended(entry: dict[str, Any]) -> bool:
    """gloo's entries are retired when they end, and keep their first state."""
    if str(entry.get("profiling_name", "")).startswith("nccl"):
        return entry.get("state") == "completed"
    return bool(entry.get("retired"))


def _from_torch(
    entry: dict[str, Any], own: Recorded | None, groups: dict[str, tuple[int, ...]]
) -> Collective:
    """An entry of torch's recorder. own: the call of Evspan that it belongs to."""
    backend, _, kind = str(entry.get("profiling_name", "")).partition(":")
    is_message = bool(entry.get("is_p2p"))
    phase = own.phase if own else _phase_at(_entry_time_ns(entry))
    sizes = entry.get("input_sizes") or entry.get("output_sizes") or []
    dtypes = entry.get("input_dtypes") or entry.get("output_dtypes") or [""]
    shape = tuple(sizes[0]) if sizes else ()
    if own is not None:
        shape = tuple(own.shape or ())
    group = str((entry.get("process_group") or [""])[0])
    state = CollectiveState.ended if _has_ended(entry) else CollectiveState.waiting
    if own is not None and own.failed:
        state = CollectiveState.failed
    elif own is not None and own.ended_ns and backend != "nccl":
        state = CollectiveState.ended
    return Collective(
        group=group,
        ranks=groups.get(group, ()),
        number=own.number if own else 0,
        name=own.name if own else OF_LIBRARIES.get(phase, ""),
        kind=own.kind if own else kind.strip("_").replace("_", "-"),
        phase=phase,
        shape=shape,
        dtype=_dtype_name(own.dtype) if own else DTYPES.get(dtypes[0], str(dtypes[0])),
        state=state,
        started=_entry_time_ns(entry) / NANOSECONDS,
        peer=own.peer if own else -1,
        is_message=is_message or (own is not None and own.peer >= 0),
        torch_number=int(entry.get("p2p_seq_id" if is_message else "collective_seq_id") or 0),
    )


def _from_ring(collective: Recorded, groups: dict[str, tuple[int, ...]]) -> Collective:
    group = _group_name(collective.group)
    state = CollectiveState.ended if collective.ended_ns else CollectiveState.waiting
    if collective.failed:
        state = CollectiveState.failed
    return Collective(
        group=group,
        ranks=groups.get(group, ()),
        number=collective.number,
        name=collective.name,
        kind=collective.kind,
        phase=collective.phase,
        shape=tuple(collective.shape or ()),
        dtype=_dtype_name(collective.dtype),
        state=state,
        started=collective.started_ns / NANOSECONDS,
        peer=collective.peer,
        is_message=collective.peer >= 0,
    )


def _phase_at(time_ns: int) -> str:
    """What the run did at that time."""
    for since_ns, name in reversed(list(_recorder.phases)):
        if since_ns <= time_ns:
            return name
    return ""


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _group_name(group: dist.ProcessGroup | None) -> str:
    """torch's name of a process group."""
    group = group or dist.group.WORLD
    return "" if group is None else str(group.group_name)


@lru_cache(maxsize=256)
def _text_json(text: str) -> str:
    return json.dumps(text)


@lru_cache(maxsize=64)
def _dtype_json(dtype: torch.dtype | None) -> str:
    return json.dumps(_dtype_name(dtype))


@lru_cache(maxsize=64)
def _group_json(group: dist.ProcessGroup | None) -> str:
    return json.dumps(_group_name(group))


def _group_ranks() -> dict[str, tuple[int, ...]]:
    """The ranks of the world in each of this rank's process groups, by the group's name."""
    ranks = {}
    for group in list(getattr(dist.distributed_c10d._world, "pg_map", {})):
        try:
            ranks[_group_name(group)] = tuple(dist.get_process_group_ranks(group))
        except (KeyError, RuntimeError, ValueError):  # destroyed meanwhile
            continue
    return ranks
