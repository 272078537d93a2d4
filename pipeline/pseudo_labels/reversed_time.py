"""Frames of a recording that runs backward in time, as LEOD forms them.

The events of the reversed recording come in the opposite order, and with the opposite polarity:
what became brighter becomes darker. So its windows are those of the recording, the last one first,
and in each both the polarities and the bins are reversed: channel = polarity * bins + bin becomes
2 * bins - 1 - channel. (An event on the very edge of a bin changes its bin: bins are half-open.)

A frame shows what there is at its end; the reversed frame i ends where frame i begins, which is
where frame i - 1 ends: its detections belong to frame i - 1.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import numpy as np
from evspan.data_prep.frames.codec import FrameEncoder, decode_frames
from numpy.typing import NDArray


def reversed_frame(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(2 * bins, H, W) the frame of the same window with the time reversed."""
    return frame[::-1]


class FrameSpool:
    """Frames in a temporary file, a byte an event, to be read again from the last to the first.

    A context manager; the file has no name, and is gone when it closes.

    Args:
        folder: where the file is.
    """

    def __init__(self, folder: Path) -> None:
        self.file = TemporaryFile(dir=folder)  # noqa: SIM115  closed in __exit__
        self.encode = FrameEncoder()
        self.sizes: list[int] = []
        self.shape: tuple[int, ...] = ()

    def __enter__(self) -> "FrameSpool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Appends a frame (2 * bins, H, W)."""
        self.shape = frame.shape
        code = self.encode(np.ascontiguousarray(frame))
        self.file.write(code.tobytes())
        self.sizes.append(code.size)

    def backward(self) -> Iterator[NDArray[np.uint8]]:
        """The frames of the reversed recording: the last window's first."""
        self.file.flush()
        end = sum(self.sizes)
        for size in reversed(self.sizes):
            end -= size
            self.file.seek(end)
            code = np.frombuffer(self.file.read(size), np.uint8)
            (frame,) = decode_frames(code, np.array([0, size]), self.shape)
            yield reversed_frame(frame)
