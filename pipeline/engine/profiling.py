"""Traces a few training steps: every operation on CPU and GPU, by part of the detector."""

import logging
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)
FOLDER = "profile"
REQUEST = "profile.request"
REQUESTED_STEPS = 3
TABLE_ROWS = 25  # of the most expensive operations


class Profiler:
    """Writes RUN/profile/steps-FIRST-LAST-rank-R.json.gz.

    Open it in https://ui.perfetto.dev or chrome://tracing.

    Args:
        module: its children are named in the trace.
        steps: [first, last], or [] for none. `touch RUN/profile.request` requests the next few
            steps of a running run.
    """

    def __init__(
        self, run: Path, rank: int, writer: TensorBoardWriter, module: nn.Module, steps: list[int]
    ) -> None:
        self.run = run
        self.rank = rank
        self.writer = writer
        self.module = module
        self.first, self.last = steps or (0, -1)
        self.step = 0  # the current one
        self.tracer: profile | None = None
        self.regions = ExitStack()
        self.hooks: list[RemovableHandle] = []

    def requested(self) -> int:
        """The number of steps requested by RUN/profile.request, which is then removed.

        Only rank 0 looks for the file; it returns 0 on the other ranks.
        """
        request = self.run / REQUEST
        if self.rank or not request.exists():
            return 0
        request.unlink(missing_ok=True)
        return REQUESTED_STEPS

    def request(self, first: int, count: int) -> None:
        """Traces `count` steps from `first` on, unless a trace is running."""
        if self.tracer is None:
            self.first = first
            self.last = first + count - 1

    def before(self, step: int) -> None:
        """Call it before each step, with the step's number."""
        if self.tracer is None and self.first - 1 <= step <= self.last:
            self._start(step)
        if self.tracer is not None:
            self.step = step
            self.regions.enter_context(record_function(f"training step {step}"))

    def after(self) -> None:
        """Call it after each step."""
        if self.tracer is not None:
            self.regions.close()
            self.tracer.step()
            if self.step >= self.last:
                self.close()

    def _start(self, step: int) -> None:
        # The step before the first one warms up: the start of the tracer would be in its trace.
        # Step 1 has none before it.
        warm_up = int(step < self.first)
        self.first = max(self.first, step)
        active = self.last - self.first + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = schedule(wait=0, warmup=warm_up, active=active, repeat=1)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and stops
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.tracer = profile(
            activities=activities, record_shapes=True, on_trace_ready=self._write, schedule=steps
        )
        for name, part in self.module.named_children():
            self.hooks += _name_in_trace(part, name)
        self.tracer.start()

    def close(self) -> None:
        """Writes the trace that is running, if any."""
        self.regions.close()
        for handle in self.hooks:
            handle.remove()
        self.hooks = []
        tracer = self.tracer
        self.tracer = None
        if tracer is not None:
            tracer.stop()

    def _write(self, trace: profile) -> None:
        last = min(self.last, self.step)
        folder = self.run / FOLDER
        path = folder / f"steps-{self.first}-{last}-rank-{self.rank}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except OSError as error:
            logger.warning("%s could not be written; the run goes on: %s", path, error)
            return
        if not self.writer.enabled:
            return
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = trace.key_averages().table(
            sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=60
        )
        self.writer.write_text(
            "run/profile",
            f"`{path}`, for [Perfetto](https://ui.perfetto.dev)\n\n```\n{table}\n```",
            last,
        )
        logger.info(
            "profile of steps %d to %d: %s; open it in https://ui.perfetto.dev",
            self.first,
            last,
            path,
        )


def _name_in_trace(part: nn.Module, name: str) -> list[RemovableHandle]:
    """Hooks that open a region of the trace around a module's forward."""
    regions: list[ExitStack] = []

    def begin(*_: Any) -> None:
        region = ExitStack()
        region.enter_context(record_function(name))
        regions.append(region)

    def end(*_: Any) -> None:
        regions.pop().close()

    return [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
