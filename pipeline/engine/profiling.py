"""Traces of a few steps: every operation on the CPU and the GPU, with the part of the step that it belongs to."""

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
FOLDER, REQUEST = "profile", "profile.request"
ON_REQUEST = 3  # steps
ROWS = 25  # of the table of what took most


class Profiler:
    """Writes RUN/profile/steps-FIRST-LAST-rank-R.json.gz, for https://ui.perfetto.dev or chrome://tracing.

    Args:
        steps: [first, last], or [] for none until somebody asks: `touch RUN/profile.request` asks for the next few steps.
        module: whose parts (children) are named in the trace.
    """

    def __init__(
        self, run: Path, rank: int, writer: TensorBoardWriter, module: nn.Module, steps: list[int]
    ) -> None:
        self.run, self.rank, self.writer, self.module = run, rank, writer, module
        self.first, self.last = steps or (0, -1)
        self.step = 0  # that runs
        self.tracer: profile | None = None
        self.regions = ExitStack()
        self.hooks: list[RemovableHandle] = []

    def requested(self) -> int:
        """How many steps somebody asks for; the request is then taken down. Rank 0 looks, and tells the others."""
        request = self.run / REQUEST
        if self.rank or not request.exists():
            return 0
        request.unlink(missing_ok=True)
        return ON_REQUEST

    def request(self, first: int, count: int) -> None:
        if self.tracer is None:
            self.first, self.last = first, first + count - 1

    def before(self, step: int) -> None:
        """A step begins; this is its number."""
        if self.tracer is None and self.first - 1 <= step <= self.last:
            self._start(step)
        if self.tracer is not None:
            self.step = step
            self.regions.enter_context(record_function(f"training step {step}"))

    def after(self) -> None:
        """It has ended."""
        if self.tracer is not None:
            self.regions.close()
            self.tracer.step()
            if self.step >= self.last:
                self.close()

    def _start(self, step: int) -> None:
        # A step before the first one warms up: the tracer's own beginning would be in it. Before step 1 there is none.
        warm_up = int(step < self.first)
        self.first = max(self.first, step)
        with warnings.catch_warnings(action="ignore"):
            steps = schedule(wait=0, warmup=warm_up, active=self.last - self.first + 1, repeat=1)
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # it tells on the console when it starts and stops
        activities = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
        ]
        self.tracer = profile(
            activities=activities, record_shapes=True, on_trace_ready=self._write, schedule=steps
        )
        self.hooks = [
            handle for name, part in self.module.named_children() for handle in _named(part, name)
        ]
        self.tracer.start()

    def close(self) -> None:
        """Writes what was traced so far, if it was not written yet."""
        self.regions.close()
        for handle in self.hooks:
            handle.remove()
        if self.tracer is not None:
            tracer, self.tracer, self.hooks = self.tracer, None, []
            tracer.stop()

    def _write(self, traced: profile) -> None:
        last = min(self.last, self.step)
        folder = self.run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"steps-{self.first}-{last}-rank-{self.rank}.json.gz"
        traced.export_chrome_trace(str(path))
        if not self.writer.enabled:
            return
        costly = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(
            sort_by=costly, row_limit=ROWS, max_name_column_width=60
        )
        self.writer.write_text(
            "run/profile",
            f"`{path}`, for [Perfetto](https://ui.perfetto.dev)\n\n```\n{table}\n```",
            last,
        )
        logger.info(
            f"profile of steps {self.first} to {last}: {path}; open it in https://ui.perfetto.dev"
        )


def _named(part: nn.Module, name: str) -> list[RemovableHandle]:
    """Hooks that name its forward in the trace."""
    open_regions: list[record_function] = []

    def begin(*_: Any) -> None:
        open_regions.append(record_function(name))
        open_regions[-1].__enter__()

    def end(*_: Any) -> None:
        open_regions.pop().__exit__(None, None, None)

    return [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
