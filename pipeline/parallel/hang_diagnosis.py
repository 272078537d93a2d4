"""Compares the reports of all ranks of a run that hangs: one sentence per rank, and the cause."""

import itertools
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from evspan.pipeline.parallel.hang_files import (
    Collective,
    CollectiveState,
    Peer,
    RankProcess,
    Report,
    process_state,
    read_rank_process,
    read_reports,
)
from evspan.pipeline.parallel.hang_ring import Ring, read_ring

# Operations in which the tensors of all ranks have one size.
EQUAL_SIZES = ("all-reduce", "broadcast", "all-gather", "reduce-scatter", "all-to-all")
RANKS_NAMED = 8
Called = Sequence[Collective]  # by one rank
SILENT_S = 3.0  # without a heartbeat, of a rank that does not answer
SHORT_S = 3.0  # ranks that train wait for each other, too, but not for so long
STATES = {
    "T": "is stopped (SIGSTOP)",
    "t": "is stopped by a debugger",
    "Z": "has ended",
    "gone": "has ended",
    "D": "waits for a disk or a file system, and does not answer",
}


@dataclass(frozen=True)
class Diagnosis:
    """What the ranks of a run do.

    Attributes:
        cause: one sentence; empty if the reports show none.
        ranks_differ: whether the cause is that ranks have called different collectives.
        sentences: one for each rank, by rank.
        reports: of the ranks that have answered.
        time: of the newest report, seconds since 1970; 0 without reports.
        reason: why the reports were requested.
    """

    cause: str
    ranks_differ: bool
    sentences: dict[int, str]
    reports: dict[int, Report]
    time: float
    reason: str


class _Signature(NamedTuple):
    """What all ranks must agree on in a collective. numel: -1 where sizes may differ."""

    name: str
    kind: str
    phase: str
    numel: int
    dtype: str


class _Key(NamedTuple):
    """A process group, and which numbers of its collectives are compared: torch's, or Evspan's."""

    group: str
    ranks: tuple[int, ...]
    by_torch: bool


class _Difference(NamedTuple):
    """The first collective of a group in which ranks differ. odd: those that differ from most."""

    key: _Key
    number: int
    collectives: dict[int, Collective]
    odd: list[int]


def diagnose(run: Path, size: int, request: str | None = None) -> Diagnosis:
    """Reads the reports of a run's ranks and compares them.

    Args:
        size: number of ranks.
        request: id of the request that the reports answer; None: the newest one.
    """
    reports = read_reports(run, size, request)
    processes = {}
    for rank in range(size):
        process = read_rank_process(run, rank)
        if process is not None:
            processes[rank] = process
    return compare(reports, size, processes)


def compare(
    reports: Mapping[int, Report], size: int, processes: Mapping[int, RankProcess]
) -> Diagnosis:
    """Compares reports.

    Args:
        reports: by rank; a rank without one has not answered.
        size: number of ranks.
        processes: of the ranks, as far as they are known.
    """
    comparison = _Comparison(reports, size, processes)
    newest = max(reports.values(), key=lambda report: report.time, default=None)
    return Diagnosis(
        comparison.cause(),
        comparison.difference is not None,
        {rank: comparison.sentence(rank) for rank in range(size)},
        dict(reports),
        newest.time if newest else 0.0,
        newest.reason if newest else "",
    )


class _Comparison:
    """The reports, and what follows from them."""

    def __init__(
        self, reports: Mapping[int, Report], size: int, processes: Mapping[int, RankProcess]
    ) -> None:
        self.reports = reports
        self.size = size
        self.processes = processes
        self.silent = [rank for rank in range(size) if rank not in reports]
        self.rings = {rank: self._ring(rank) for rank in self.silent}
        self.waits = {rank: _newest_wait(report) for rank, report in reports.items()}
        self.called = {rank: report.collectives for rank, report in reports.items()}
        for rank, ring in self.rings.items():
            if ring.collectives:
                self.called[rank] = self._with_ranks(ring.collectives)
        self.difference = _first_difference(self.called)

    def _ring(self, rank: int) -> Ring:
        """What a rank that does not answer has done last, as its node's memory still shows."""
        for report in self.reports.values():
            peer = report.peers.get(rank)
            if peer is not None and peer.collectives:
                return Ring(peer.phase, peer.collectives)
        process = self.processes.get(rank)
        if process is None or process.host != socket.gethostname():
            return Ring()
        return read_ring(process.ring)

    def _with_ranks(self, collectives: Sequence[Collective]) -> tuple[Collective, ...]:
        """With the ranks of their groups, as other ranks have reported them."""
        ranks = {}
        for report in self.reports.values():
            for collective in report.collectives:
                ranks[collective.group] = collective.ranks
        return tuple(replace(c, ranks=ranks.get(c.group, ())) for c in collectives)

    # -- the cause ---------------------------------------------------------------------------------
    def cause(self) -> str:
        """One sentence; empty if there is none."""
        if self.difference is not None:
            return "; ".join(self._odd(rank) for rank in self.difference.odd[:RANKS_NAMED])
        if self.silent:
            return "; ".join(self._silence(rank) for rank in self.silent[:RANKS_NAMED])
        if not any(self._is_stuck(rank) for rank in self.waits):
            return ""
        missing = self._missing_in_all()
        return "; ".join(self.sentence(rank) for rank in missing[:RANKS_NAMED])

    def _is_stuck(self, rank: int) -> bool:
        """Whether a rank waits for longer than in a step, or its collective has failed."""
        wait = self.waits[rank]
        if wait is None:
            return False
        waited_s = self.reports[rank].time - wait.started
        return wait.state is CollectiveState.failed or waited_s >= SHORT_S

    def _missing_in_all(self) -> list[int]:
        """Ranks that others wait for, and that wait for none themselves."""
        missed = set()
        for rank, wait in self.waits.items():
            if wait is not None:
                missed.update(self._missing(rank, wait))
        idle = sorted(rank for rank in missed if self.waits.get(rank) is None)
        return idle or sorted(missed)

    # -- sentences ---------------------------------------------------------------------------------
    def sentence(self, rank: int) -> str:
        """What a rank does."""
        if self.difference is not None and rank in self.difference.odd:
            return self._odd(rank)
        if rank in self.silent:
            return self._silence(rank)
        report = self.reports[rank]
        wait = self.waits[rank]
        if wait is not None:
            return self._waiting(rank, wait)
        text = f"rank {rank} waits in no collective"
        if report.phase:
            text += f", in {report.phase}"
        if report.kernel_state == "D":
            text += ", waiting for a disk or a file system"
        place = _place(report)
        if place:
            text += f", at {place}"
        newest = report.collectives[-1] if report.collectives else None
        if newest is not None:
            text += f"; its last one is {_name(newest)}"
        return text

    def _waiting(self, rank: int, wait: Collective) -> str:
        seconds = self.reports[rank].time - wait.started
        verb = "waits in" if wait.state is CollectiveState.waiting else "failed in"
        text = f"rank {rank} {verb} {_described(wait)}"
        if wait.is_message and wait.peer >= 0:
            return f"{text}, a message with rank {wait.peer}, for {seconds:.0f} s"
        missing = self._missing(rank, wait)
        if missing:
            text += f", for {_ranks(missing)}"
        return f"{text}, since {seconds:.0f} s"

    def _missing(self, rank: int, wait: Collective) -> list[int]:
        """Ranks that have not come to the collective that a rank waits in."""
        ranks = range(self.size)  # a damaged report may name others
        if wait.is_message:
            return [wait.peer] if wait.peer in ranks else []
        missing = []
        for member in wait.ranks or ranks:
            key = _key(wait)
            if member == rank or member not in ranks:
                continue
            if not self._has_called(member, key, _number(wait, key)):
                missing.append(member)
        return missing

    def _has_called(self, rank: int, key: _Key, number: int) -> bool:
        """Whether a rank has come to a collective of the group."""
        return max(_by_number(self.called.get(rank, ()), key), default=0) >= number

    def _odd(self, rank: int) -> str:
        """How a rank's collective differs from that of the others."""
        assert self.difference is not None
        collectives = self.difference.collectives
        own = collectives[rank]
        others = [other for other in collectives if other not in self.difference.odd]
        usual = collectives[others[0]]
        names = _ranks(others)
        if own.name == usual.name and own.kind == usual.kind and own.phase == usual.phase:
            verb = "has" if len(others) == 1 else "have"
            return (
                f"rank {rank} has {_size(own)} in {_name(own)}, where {names} {verb} {_size(usual)}"
            )
        text = f"rank {rank} called {_described(own)} where {names} called {_described(usual)}"
        if self._comes_next(rank, others[0]):
            return f"{text}: rank {rank} skipped {_name(usual)}"
        if self._comes_next(others[0], rank):
            return f"{text}: rank {rank} called {_name(own)} in addition"
        return text

    def _comes_next(self, rank: int, other: int) -> bool:
        """Whether a rank's differing collective is the one that the other called after its own."""
        assert self.difference is not None
        key = self.difference.key
        number = self.difference.number
        own = self.difference.collectives[rank]
        theirs = _by_number(self.called[other], key)
        following = theirs.get(number + 1)
        if following is not None:
            return _signature(following) == _signature(own)
        # The other has not come further; what followed in earlier steps?
        usual = _signature(theirs[number])
        for earlier in range(number - 1, min(theirs) - 1, -1):
            if earlier + 1 in theirs and _signature(theirs[earlier]) == usual:
                return _signature(theirs[earlier + 1]) == _signature(own)
        return False

    # -- ranks that have not answered --------------------------------------------------------------
    def _silence(self, rank: int) -> str:
        process = self.processes.get(rank)
        peers = [report.peers[rank] for report in self.reports.values() if rank in report.peers]
        state = self._state(rank, peers)
        text = f"rank {rank}"
        if process is not None:
            text += f" (process {process.pid} on {process.host})"
        text += f" {STATES.get(state, 'does not answer')}"
        silent = max(peers, key=lambda peer: peer.silent_s, default=None)
        if silent is not None and silent.silent_s >= SILENT_S:
            text += f"; its last heartbeat was {silent.silent_s:.0f} s ago"
        ring = self.rings[rank]
        newest = ring.collectives[-1] if ring.collectives else None
        if newest is not None:
            verb = "after" if newest.state is CollectiveState.ended else "in"
            text += f"; its last phase was {ring.phase!r}, {verb} {_name(newest)}"
        elif silent is not None and silent.doing:
            text += f"; its last phase was {silent.doing}"
        elif silent is not None and state not in STATES:
            text += " although it sends heartbeats"
        if state == "T" and process is not None:
            text += f"; `kill -CONT {process.pid}` there continues it"
        return text

    def _state(self, rank: int, peers: Sequence[Peer]) -> str:
        """The state of its process, from ranks on its node, or of this one."""
        states = [peer.process_state for peer in peers if peer.process_state]
        process = self.processes.get(rank)
        if process is not None:
            states.append(process_state(process.host, process.pid))
        known = [state for state in states if state in STATES]
        return known[0] if known else ""


# -- collectives -----------------------------------------------------------------------------------
def _newest_wait(report: Report) -> Collective | None:
    """The oldest call that has not ended, or the newest if that has failed.

    A message that this rank sends waits for nobody.
    """
    for collective in report.collectives:
        is_send = collective.is_message and collective.kind == "send"
        if collective.state is CollectiveState.waiting and not is_send:
            return collective
    if report.collectives and report.collectives[-1].state is CollectiveState.failed:
        return report.collectives[-1]
    return None


def _key(collective: Collective) -> _Key:
    """By which it is compared: libraries' collectives have only torch's numbers."""
    return _Key(collective.group, collective.ranks, by_torch=not collective.number)


def _number(collective: Collective, key: _Key) -> int:
    return collective.torch_number if key.by_torch else collective.number


def _signature(collective: Collective) -> _Signature:
    numel = _numel(collective.shape) if collective.kind in EQUAL_SIZES else -1
    return _Signature(collective.name, collective.kind, collective.phase, numel, collective.dtype)


def _numel(shape: Iterable[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _by_number(called: Called, key: _Key) -> dict[int, Collective]:
    """A rank's collectives of a group."""
    by_number = {}
    for collective in called:
        is_of_group = (collective.group, collective.ranks) == (key.group, key.ranks)
        if is_of_group and not collective.is_message and _number(collective, key):
            by_number[_number(collective, key)] = collective
    return by_number


def _first_difference(by_rank: Mapping[int, Called]) -> _Difference | None:
    """The oldest collective, over all groups, in which ranks differ; None if there is none."""
    groups: dict[tuple[str, tuple[int, ...]], None] = {}
    for called in by_rank.values():
        for collective in called:
            if not collective.is_message and collective.ranks:
                groups.setdefault((collective.group, collective.ranks))
    differences = []
    for (group, ranks), by_torch in itertools.product(groups, (False, True)):
        difference = _first_difference_of(_Key(group, ranks, by_torch), by_rank)
        if difference is not None:
            differences.append(difference)
    return min(differences, key=_time_of, default=None)


def _time_of(difference: _Difference) -> float:
    return min(collective.started for collective in difference.collectives.values())


def _first_difference_of(key: _Key, called_by: Mapping[int, Called]) -> _Difference | None:
    by_rank = {rank: _by_number(called_by[rank], key) for rank in key.ranks if rank in called_by}
    numbers: set[int] = set()
    for collectives in by_rank.values():
        numbers.update(collectives)
    for number in sorted(numbers):
        called = {rank: found[number] for rank, found in by_rank.items() if number in found}
        signatures = Counter(_signature(collective) for collective in called.values())
        if len(signatures) > 1:
            return _Difference(key, number, called, _odd_ranks(key, number, called, by_rank))
    return None


def _odd_ranks(
    key: _Key,
    number: int,
    called: Mapping[int, Collective],
    by_rank: Mapping[int, Mapping[int, Collective]],
) -> list[int]:
    """Ranks that differ from most. If there is no majority: those that are a collective ahead.

    Failing that, all but the lowest rank and those that agree with it.
    """
    by_signature: dict[_Signature, list[int]] = {}
    for rank, collective in called.items():
        by_signature.setdefault(_signature(collective), []).append(rank)
    largest = max(len(ranks) for ranks in by_signature.values())
    usual = [signature for signature, ranks in by_signature.items() if len(ranks) == largest]
    if len(usual) > 1:
        for signature in usual:
            # Others call it one collective later: its ranks have skipped one.
            for other in usual:
                following = by_rank[by_signature[other][0]].get(number + 1)
                if following is not None and _signature(following) == signature != other:
                    return by_signature[signature]
        return sorted(set(called) - set(by_signature[usual[0]]))
    return sorted(set(called) - set(by_signature[usual[0]]))


# -- text ------------------------------------------------------------------------------------------
def _name(collective: Collective) -> str:
    """'gradients' (all-reduce 412)."""
    number = collective.number or collective.torch_number
    operation = f"{collective.kind or 'collective'} {number}"
    return f"{collective.name!r} ({operation})" if collective.name else operation


def _described(collective: Collective) -> str:
    """'gradients' (all-reduce 412, 1,024 float32) of the optimizer step."""
    number = collective.number or collective.torch_number
    parts = [f"{collective.kind or 'collective'} {number}"]
    if collective.dtype:
        parts.append(_size(collective))
    text = ", ".join(parts)
    if collective.name:
        text = f"{collective.name!r} ({text})"
    if collective.phase:
        text += f" in {collective.phase}"
    return text


def _size(collective: Collective) -> str:
    return f"{_numel(collective.shape):,} {collective.dtype}"


def _ranks(ranks: Sequence[int]) -> str:
    """'rank 1', 'ranks 1, 3'."""
    noun = "rank" if len(ranks) == 1 else "ranks"
    text = ", ".join(str(rank) for rank in ranks[:RANKS_NAMED])
    if len(ranks) > RANKS_NAMED:
        text += f" and {len(ranks) - RANKS_NAMED} more"
    return f"{noun} {text}"


def _place(report: Report) -> str:
    """The innermost call of this project in the main thread."""
    for stack in report.threads:
        if stack.is_main:
            own = [frame for frame in stack.frames if frame.file.startswith("evspan/")]
            frame = (own or list(stack.frames))[-1]
            return f"{frame.file}:{frame.line} in {frame.function}"
    return ""


def time_text(seconds: float) -> str:
    """A time since 1970 as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
