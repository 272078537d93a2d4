"""A thread of each rank that reports what the rank does, when a run hangs or someone asks.

It runs whatever the main thread waits for, as long as Python code of the process can run. Where a
library keeps the interpreter's lock, faulthandler's own thread writes the stacks instead. A rank
that is stopped (SIGSTOP) can do neither; the ranks on its node report that it is.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from types import FrameType

import torch.distributed as dist
from evspan.pipeline.parallel import flight_recorder, hang_files
from evspan.pipeline.parallel.hang_diagnosis import diagnose
from evspan.pipeline.parallel.hang_files import Frame, Peer, Report, Request, ThreadStack
from evspan.pipeline.parallel.hang_ring import RingFile, read_ring, remove_old_rings, remove_ring
from evspan.pipeline.parallel.rank_env import RankInfo

logger = logging.getLogger(__name__)
POLL_S = 2.0  # between two looks at the request
RANKS_PER_POLL_S = 32  # with more ranks they look more rarely: at most so many per second do
NO_PYTHON_S = 60.0  # without a turn of the thread, faulthandler writes the stacks
ANSWER_S = 3 * POLL_S  # for the other ranks' reports
NOTICE_S = 10.0  # before the timeout, at most: a collective that waits is reported
PACKAGE = Path(__file__).parents[2]
MOST_FRAMES = 100  # of a stack

Peers = Callable[[], dict[int, Peer]]


class HangWatch:
    """Reports what this rank does, from `start` on.

    Args:
        run: the run's folder, which all ranks share.
        timeout_s: of a collective.
    """

    def __init__(self, run: Path, info: RankInfo, timeout_s: float) -> None:
        self.run = run
        self.rank = info.rank
        self.size = info.size
        self.timeout_s = timeout_s
        self.peers: Peers = dict  # of the other ranks, as their heartbeats show them
        self.main_thread = threading.current_thread().ident
        self.answered = ""  # id of the request that was answered last
        self.noticed = -1  # progress at which a wait was reported
        self.lock = threading.Lock()
        self.closed = Event()
        self.stacks = -1  # file descriptor
        self.enabled_faults = False  # faulthandler writes the stacks at a fatal signal
        self.memory: RingFile | None = None
        self.thread: Thread | None = None

    def start(self) -> None:
        """Starts the thread. Call it when no other run uses the folder.

        A folder that cannot be written to is a warning.
        """
        try:
            before = hang_files.read_rank_process(self.run, self.rank)
            if before is not None and before.host == socket.gethostname():
                remove_ring(before.ring)
            self.memory = self._open_memory()
            name = self.memory.name if self.memory else ""
            self.stacks = hang_files.open_stacks_file(self.run, self.rank, ring=name)
            if self.rank == 0:
                hang_files.clear_request(self.run)
        except OSError as error:
            logger.warning("the run writes no reports if it hangs: %s", error)
            return
        flight_recorder.copy_to(self.memory)
        if not faulthandler.is_enabled():
            faulthandler.enable(self.stacks)
            self.enabled_faults = True
        self.thread = Thread(target=self._watch, name="evspan-hang", daemon=True)
        self.thread.start()

    def _open_memory(self) -> RingFile | None:
        """Shared memory for the newest collectives; None with NCCL, or where there is none."""
        if dist.get_backend() == "nccl":
            return None
        try:
            remove_old_rings()
            return RingFile()
        except OSError:
            return None

    def close(self) -> None:
        """Ends the thread, unless it is stuck."""
        self.closed.set()
        if self.thread is not None:
            self.thread.join(POLL_S)
            self.thread = None
            faulthandler.cancel_dump_traceback_later()
            if self.enabled_faults:
                faulthandler.disable()
            os.close(self.stacks)
        self.free_memory()

    def free_memory(self) -> None:
        """Removes the file in shared memory. The main thread may still write to it."""
        flight_recorder.copy_to(None)
        if self.memory is not None:
            remove_ring(self.memory.name)
            self.memory = None

    def ask(self, reason: str) -> Request | None:
        """Asks all ranks for a report, and writes this one's. None if that is not possible."""
        if self.thread is None:
            return None
        try:
            request = self._open_request(reason)
            self._answer(request)
        except OSError as error:
            logger.warning("the reports of the ranks cannot be written: %s", error)
            return None
        return request

    def explain(self, reason: str) -> str:
        """Asks all ranks for a report, waits for a few seconds, and returns the cause in one line.

        Empty where the reports show none. Called when this rank is about to end; may be called from
        any thread.
        """
        request = self.ask(reason)
        if request is None:
            return ""
        deadline = time.monotonic() + self._poll_s + ANSWER_S
        while time.monotonic() < deadline:
            request = hang_files.read_request(self.run) or request
            if self.answered != request.id:
                with suppress(OSError):
                    self._answer(request)
            reports = hang_files.read_reports(self.run, self.size, request.id)
            if len(reports) + len(hang_files.ranks_not_running(reports)) >= self.size:
                break
            time.sleep(POLL_S / 10)
        diagnosis = diagnose(self.run, self.size, request.id)
        cause = diagnosis.cause if diagnosis.ranks_differ else diagnosis.sentences[self.rank]
        return f"{cause} (`evspan logs {self.run} --hang` shows all ranks)"

    @property
    def _poll_s(self) -> float:
        return max(POLL_S, self.size / RANKS_PER_POLL_S)

    # -- the thread --------------------------------------------------------------------------------
    def _watch(self) -> None:
        while not self.closed.wait(self._poll_s):
            # Started again at every turn; needs no lock of the interpreter to write.
            faulthandler.dump_traceback_later(NO_PYTHON_S, file=self.stacks)
            with suppress(OSError):
                request = hang_files.read_request(self.run)
                if request is not None and request.id != self.answered and self._is_new(request):
                    self._answer(request)
                self._notice_wait()

    def _is_new(self, request: Request) -> bool:
        """Whether the request is of this attempt, as clocks of nodes may differ by a minute."""
        process = hang_files.read_rank_process(self.run, self.rank)
        return process is None or request.time > process.started - hang_files.FRESH_S

    def _notice_wait(self) -> None:
        """Reports a collective shortly before its timeout, when all ranks are still there."""
        if self.size == 1:
            return
        progress = flight_recorder.progress()
        if progress == self.noticed:
            return
        limit_s = self.timeout_s - min(NOTICE_S, self.timeout_s / 2)
        waited_s = time.time() - flight_recorder.waits_since()
        if waited_s < limit_s:
            return
        self.noticed = progress
        reason = f"a collective of rank {self.rank} has waited for {waited_s:.0f} s"
        self._answer(self._open_request(reason))
        if dist.get_backend() == "nccl":  # which ends the process without an error in Python
            logger.error("%s: %s", reason, self.explain(reason))

    def _open_request(self, reason: str) -> Request:
        """The request of another rank, where it is recent; else a new one.

        The reports that a user has requested show what the ranks did then, not now.
        """
        request = hang_files.read_request(self.run)
        if request is None or request.reason == hang_files.ASKED:
            return hang_files.write_request(self.run, reason)
        if abs(time.time() - request.time) < hang_files.FRESH_S:
            return request
        return hang_files.write_request(self.run, reason)

    def _answer(self, request: Request) -> None:
        """Writes this rank's report, once for each request."""
        with self.lock:
            if self.answered == request.id:
                return
            hang_files.write_report(self.run, self._report(request))
            self.answered = request.id

    def _report(self, request: Request) -> Report:
        peers = {}
        for rank in range(self.size):
            if rank != self.rank:
                peers[rank] = self._peer(rank)
        own = hang_files.read_rank_process(self.run, self.rank)
        return Report(
            request=request.id,
            reason=request.reason,
            rank=self.rank,
            size=self.size,
            host=own.host if own else "?",
            pid=os.getpid(),
            time=time.time(),
            phase=flight_recorder.current_phase(),
            collectives=tuple(flight_recorder.latest_collectives()),
            threads=tuple(_stacks(self.main_thread)),
            kernel_state=_kernel_state(self.main_thread),
            peers=peers,
        )

    def _peer(self, rank: int) -> Peer:
        """What this rank knows of another one."""
        known = self.peers().get(rank, Peer("?", 0, 0.0, "", ""))
        process = hang_files.read_rank_process(self.run, rank)
        if process is None:
            return known
        state = hang_files.process_state(process.host, process.pid)
        known = known._replace(host=process.host, pid=process.pid, process_state=state)
        if state in hang_files.NOT_RUNNING:
            ring = read_ring(process.ring)
            known = known._replace(phase=ring.phase, collectives=ring.collectives)
        return known


@contextmanager
def hang_watch(run: Path | None, info: RankInfo, timeout_s: float) -> Iterator[HangWatch | None]:
    """The watch of this rank, to be started; None where the run has no folder for reports."""
    flight_recorder.start_recording()
    watch = HangWatch(run, info, timeout_s) if run else None
    try:
        yield watch
    finally:
        if watch is not None:
            watch.close()
        flight_recorder.stop_recording()


def _stacks(main_thread: int | None) -> list[ThreadStack]:
    """The Python stacks of all threads, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    stacks = []
    for ident, frame in sys._current_frames().items():
        if ident == own and ident != main_thread:
            continue
        is_main = ident == main_thread
        name = "main" if is_main else names.get(ident, f"thread {ident}")
        stacks.append(ThreadStack(name, is_main, _frames(frame)))
    return sorted(stacks, key=lambda stack: not stack.is_main)


def _frames(frame: FrameType | None) -> tuple[Frame, ...]:
    """Outermost first. Without source lines: reading files could wait for ever."""
    frames: list[Frame] = []
    while frame is not None and len(frames) < MOST_FRAMES:
        code = frame.f_code
        frames.append(
            Frame(
                _short_path(code.co_filename),
                frame.f_lineno or 0,
                getattr(code, "co_qualname", code.co_name),
            )
        )
        frame = frame.f_back
    return tuple(reversed(frames))


def _short_path(path: str) -> str:
    """From the package on. A checkout may contain the environment, so that is looked for first."""
    _, is_installed, name = path.rpartition("/site-packages/")
    if not is_installed and path.startswith(f"{PACKAGE}/"):
        return f"evspan{path.removeprefix(str(PACKAGE))}"
    return name


def _kernel_state(ident: int | None) -> str:
    """The state of a thread of this process, the letter in /proc; empty if it is not known."""
    for thread in threading.enumerate():
        if thread.ident == ident and thread.native_id:
            try:
                text = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
            except OSError:
                return ""
            return text.rpartition(")")[2].split()[0]
    return ""
