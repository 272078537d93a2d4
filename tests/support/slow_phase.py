"""Makes one rank of a run slow in one phase, once: a sitecustomize module for PYTHONPATH.

Its rank sleeps for longer than the time limit, or stops itself, when the run comes to the phase for
the first time; a file in a folder marks that it has. No signal ends it, as with a file system that
hangs.
"""

from pathlib import Path

# Activity of the run, module, function or method, rank, number of its calls, what it does then.
PHASES = (
    ("evaluating", "evspan.pipeline.inference.streaming", "_add_results", 1, 1, "sleep"),
    ("training", "evspan.pipeline.model.loss", "detection_loss", 1, 6, "stop"),
    ("saving", "evspan.pipeline.engine.checkpoints", "Checkpoints._write", 0, 2, "sleep"),
    ("writing images", "evspan.pipeline.tensorboard.attention_probe", "probe", 0, 1, "sleep"),
    # In a thread that reads ahead: the rank leaves at SLURM's signal, without its data.
    ("training", "evspan.pipeline.data.loader", "Loader.batch", 1, 5, "sleep"),
)

CODE = '''
import importlib.util
import os
import signal
import sys
import time

PHASES = {phases!r}
MARKERS = {markers!r}


class Finder:
    """Replaces a function of a module when the module is imported."""

    def __init__(self, index, phase):
        self.marker = os.path.join(MARKERS, index)
        self.name, self.module, self.function, self.rank, self.calls, self.how = phase

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.replace(module)

        spec.loader.exec_module = exec_module
        return spec

    def replace(self, owner):
        *classes, name = self.function.split(".")
        for class_name in classes:
            owner = getattr(owner, class_name)
        real = getattr(owner, name)

        def function(*args, **kwargs):
            self.calls -= 1
            if self.calls == 0:
                self.wait_once()
            return real(*args, **kwargs)

        setattr(owner, name, function)

    def wait_once(self):
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        if self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)


index = os.environ.get("SLURM_ARRAY_TASK_ID", "0")  # a single run is no array
if "SLURM_PROCID" in os.environ:
    finder = Finder(index, PHASES[int(index)])
    if int(os.environ["SLURM_PROCID"]) == finder.rank:
        sys.meta_path.insert(0, finder)
'''


def write_slow_phases(folder: Path) -> Path:
    """Writes the module. Run I of an array is slow in PHASES[I]. Returns a folder for PYTHONPATH."""
    markers = folder / "markers"
    markers.mkdir(parents=True)
    code = CODE.format(phases=PHASES, markers=str(markers))
    (folder / "sitecustomize.py").write_text(code)
    return folder
