"""RUN/logs/rank-NN.log of a rank that was not started by SLURM: what it prints and logs.

Records of the log have timestamp, level and rank, as in the logs of SLURM's ranks. What is printed
otherwise, such as the output of libraries and tracebacks, is copied as it is; progress bars are
not. Attempts are appended, each under a line `---- attempt 2 ...`.
"""

import logging
import os
import socket
import sys
import time
from pathlib import Path

from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.secret_values import hide_values
from evspan.launch.logging_config import LOGGER, file_formatter
from evspan.launch.output_streams import copy_output


class RunLog(logging.Handler):
    """Appends to a rank's log. What cannot be written is dropped, with one warning.

    Args:
        run: the run's folder.
        cluster: its values that may be secret are hidden.
    """

    def __init__(self, run: Path, rank: int, cluster: ClusterConfig) -> None:
        super().__init__(logging.INFO)
        self.path = run / "logs" / f"rank-{rank:02d}.log"
        self.setFormatter(file_formatter(rank))
        self._secrets = [
            f"cluster.environment=[{','.join(cluster.environment)}]",
            f"cluster.setup=[{','.join(cluster.setup)}]",
        ]
        self._lost = False
        self._descriptor = -1

    def open(self, *, attempt: int, rank: int, ranks: int) -> None:
        """Starts to write, below a header of this attempt."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            self._lose(error)
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self.write(
            f"---- attempt {attempt}, {now}, rank {rank} of {ranks}, {socket.gethostname()}, "
            f"process {os.getpid()} ----\n"
        )
        logging.getLogger(LOGGER).addHandler(self)
        copy_output(self.write)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record; called by `logging`."""
        self.write(self.format(record) + "\n")

    def write(self, text: str) -> None:
        """Appends text as it is."""
        if self._descriptor < 0 or not text:
            return
        data = hide_values(text, self._secrets).encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self._lose(error)

    def close(self) -> None:
        """Ends it. Later output goes to the terminal only."""
        logging.getLogger(LOGGER).removeHandler(self)
        copy_output(None)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    def _lose(self, error: OSError) -> None:
        if self._lost:
            return
        self._lost = True
        reason = os.strerror(error.errno or 0)
        print(f"warning: {self.path}: {reason}; the run goes on without the log", file=sys.stderr)
