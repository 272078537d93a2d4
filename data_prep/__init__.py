"""Recordings in, shards of frames out. For programs: `frames_of`, the frames of events."""

from typing import TYPE_CHECKING, Any

from evspan.data_prep.numba_cache import provide_numba_cache

if TYPE_CHECKING:
    from evspan.data_prep.frames.stream import frames_of

__all__ = ["frames_of"]

provide_numba_cache()


def __getattr__(name: str) -> Any:
    """`frames_of`, which is imported when it is used: it compiles its counting loop."""
    if name == "frames_of":
        from evspan.data_prep.frames.stream import frames_of

        return frames_of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
