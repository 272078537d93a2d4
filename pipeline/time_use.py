"""Adds up what a run used its time for, over all its attempts and allocations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evspan.pipeline.time_records import (
    START_UP,
    STEP_PARTS,
    Allocation,
    AttemptTime,
    Part,
    read_allocations,
    read_attempts,
)

GROUPS: Mapping[str, tuple[Part, ...]] = {  # as reports show them
    "start-up": START_UP,
    "training": (Part.training,),
    "data wait": (Part.data_wait,),
    "exchange": (Part.exchange,),
    "evaluation": (Part.evaluation,),
    "saving": (Part.saving,),
    "images": (Part.images,),
    "repeated steps": (Part.repeated,),
    "idle after failures": (Part.idle,),
    "ending": (Part.ending,),
}


@dataclass(frozen=True)
class TimeUse:
    """What a run, or several, used their time for.

    Attributes:
        queue_s: seconds that its jobs waited for nodes; not allocated.
        seconds: allocated time by part. The parts add up to `allocated_s`.
        rank_seconds: allocated time of all ranks.
        gpu: whether ranks are GPUs.
    """

    queue_s: float = 0.0
    seconds: Mapping[Part, float] = field(default_factory=dict)
    rank_seconds: float = 0.0
    gpu: bool = False

    @property
    def allocated_s(self) -> float:
        """Seconds for which the run had its nodes."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """Training / allocated, 0 to 1; None if nothing was allocated."""
        if not self.allocated_s:
            return None
        return self.seconds.get(Part.training, 0.0) / self.allocated_s

    @property
    def rank_hours(self) -> float:
        """Allocated hours x ranks: GPU-hours where a rank is a GPU."""
        return self.rank_seconds / 3600

    def groups(self) -> dict[str, float]:
        """Allocated seconds by the names of GROUPS."""
        sums = {}
        for name, parts in GROUPS.items():
            sums[name] = sum(self.seconds.get(part, 0.0) for part in parts)
        return sums


def total_of(uses: Iterable[TimeUse]) -> TimeUse:
    """The sum over runs; each second counts once per run, whatever the number of its ranks."""
    total = TimeUse()
    for use in uses:
        total = TimeUse(
            queue_s=total.queue_s + use.queue_s,
            seconds={
                part: total.seconds.get(part, 0.0) + use.seconds.get(part, 0.0) for part in Part
            },
            rank_seconds=total.rank_seconds + use.rank_seconds,
            gpu=total.gpu or use.gpu,
        )
    return total


@dataclass(frozen=True)
class RunNow:
    """What the records of a run do not contain.

    now: seconds since 1970. is_running: its last attempt still runs. queued: since when its job
    waits for nodes; None if it does not. signs: times at which the run has recorded something.
    """

    now: float
    is_running: bool = False
    queued: float | None = None
    signs: Sequence[float] = ()


def read_time_use(run: str | Path, run_now: RunNow, *, before: float | None = None) -> TimeUse:
    """The time of a run until now.

    Args:
        before: allocations that start at this time or later only count for the queue.

    Raises:
        OSError: its records exist and cannot be read.
    """
    spans = _spans(read_allocations(run), read_attempts(run))
    return _add_up(spans, run_now, float("inf") if before is None else before)


@dataclass(frozen=True)
class _Span:
    """Nodes that a run had, and the attempts on them. Without a job, an attempt is its own."""

    allocation: Allocation
    attempts: list[AttemptTime]

    @property
    def start(self) -> float:
        return self.allocation.start

    @property
    def ranks(self) -> int:
        return max([self.allocation.ranks, 1, *(attempt.ranks for attempt in self.attempts)])

    @property
    def gpu(self) -> bool:
        return any(attempt.gpu for attempt in self.attempts)

    @property
    def last_sign(self) -> float:
        return max([self.start, *(attempt.written for attempt in self.attempts)])


def _spans(allocations: Sequence[Allocation], attempts: Sequence[AttemptTime]) -> list[_Span]:
    """In the order of their starts."""
    spans = {(a.job, a.start): _Span(a, []) for a in allocations}
    for attempt in attempts:
        # Outside of a job of ours, an attempt has its machine from its start to its end.
        key = (attempt.job, attempt.allocated or attempt.start)
        if key not in spans:
            spans[key] = _Span(_allocation_of(attempt, key[1]), [])
        spans[key].attempts.append(attempt)
    return sorted(spans.values(), key=lambda span: span.start)


def _allocation_of(attempt: AttemptTime, start: float) -> Allocation:
    """Of an attempt whose allocation is not recorded."""
    is_local = not attempt.allocated
    end = attempt.written if is_local and attempt.closed else None
    job = "" if is_local else attempt.job
    return Allocation(job, 0.0, start, attempt.ranks, end)


def _add_up(spans: Sequence[_Span], run_now: RunNow, before: float) -> TimeUse:
    seconds = dict.fromkeys(Part, 0.0)
    queue_s = 0.0
    rank_seconds = 0.0
    previous_end = 0.0
    for i, span in enumerate(spans):
        following = spans[i + 1] if i + 1 < len(spans) else None
        is_running = following is None and run_now.is_running
        if is_running:
            end = max(run_now.now, span.last_sign)
        else:
            end = _end(span, following, run_now.signs)
        if span.allocation.queued:
            queue_s += max(0.0, span.start - max(span.allocation.queued, previous_end))
        previous_end = end
        if span.start >= before:
            continue
        for part, part_s in _parts(span, end, is_running=is_running).items():
            seconds[part] += part_s
        rank_seconds += span.ranks * (end - span.start)
    if run_now.queued is not None:
        queue_s += max(0.0, run_now.now - max(run_now.queued, previous_end))
    return TimeUse(queue_s, seconds, rank_seconds, any(span.gpu for span in spans))


def _end(span: _Span, following: _Span | None, signs: Sequence[float]) -> float:
    """The end of an allocation that is over.

    When SLURM put the job into its queue again, in whole seconds: until then it ends the processes
    on the nodes. Else what the batch script has recorded. Where it could not, because SLURM or the
    node has ended it: the last sign of the run.
    """
    allocation = span.allocation
    if following is not None and _is_same_job(allocation, following.allocation):
        return max(following.allocation.queued, span.start)
    limit = following.start if following is not None else float("inf")
    end = allocation.end
    if end is None:
        end = span.last_sign
        if allocation.job:
            end = max([end, *(sign for sign in signs if span.start <= sign <= limit)])
    return max(min(end, limit), span.last_sign)


def _is_same_job(first: Allocation, second: Allocation) -> bool:
    """Whether SLURM put a job into its queue again, and says when."""
    return bool(first.job) and first.job == second.job and bool(second.queued)


def _parts(span: _Span, end: float, *, is_running: bool) -> dict[Part, float]:
    """The time from the start of the allocation to `end` by part."""
    seconds = dict.fromkeys(Part, 0.0)
    counted = span.start
    part = Part.launch
    for attempt in span.attempts:
        seconds[part] += max(0.0, attempt.start - counted)
        for name, part_s in attempt.seconds.items():
            seconds[name] += part_s
        counted = attempt.written
        part = Part.ending if attempt.closed else Part.idle
    if not span.attempts and not is_running:
        part = Part.idle  # no rank has started
    if span.attempts and not span.attempts[-1].closed:
        last = span.attempts[-1]
        if is_running:
            part = last.part
        else:
            unfinished_s = _unfinished_s(last)
            seconds[last.part] -= unfinished_s
            seconds[Part.idle] += unfinished_s
    if end >= counted:
        seconds[part] += end - counted
        return seconds
    # Records later than the end: SLURM's times are whole seconds, clocks of nodes differ.
    fraction = (end - span.start) / (counted - span.start)
    return {part: fraction * part_s for part, part_s in seconds.items()}


def _unfinished_s(attempt: AttemptTime) -> float:
    """Seconds since the last complete step of an attempt that was killed in a step."""
    if attempt.part not in STEP_PARTS or not attempt.stepped:
        return 0.0
    return min(max(0.0, attempt.written - attempt.stepped), attempt.seconds.get(attempt.part, 0.0))


def with_attempt(
    earlier: TimeUse, seconds: Mapping[Part, float], launch_s: float, ranks: int, *, gpu: bool
) -> TimeUse:
    """`earlier` and the attempt that runs now.

    Args:
        seconds: of the attempt by part. launch_s: from its allocation to its start.
    """
    own = {**seconds, Part.launch: seconds.get(Part.launch, 0.0) + launch_s}
    use = TimeUse(seconds=own, gpu=gpu)
    return total_of([earlier, replace(use, rank_seconds=ranks * use.allocated_s)])
