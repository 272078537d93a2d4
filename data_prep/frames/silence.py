"""Refuses recordings whose events stop for an hour: frames would cross it one by one."""

from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import Recording

# Noise alone causes events more often. A damaged timestamp must not cause endless frames.
LONGEST_SILENCE_US = 3_600_000_000
US_PER_HOUR = 3.6e9


def refuse_silence(recording: Recording, end_us: int, next_us: int) -> None:
    """Raises RecordingError where the next event is an hour or more after the end of a window.

    Args:
        end_us: end of the window, in microseconds.
        next_us: time of the first event that is in the window or after it.
    """
    silence_us = next_us - end_us
    if silence_us >= LONGEST_SILENCE_US:
        raise RecordingError(
            f"{recording.path}: no events for {silence_us / US_PER_HOUR:.1f} hours, up to "
            f"{next_us} us. Its timestamps are damaged, or it holds several recordings: cut it "
            "there"
        )
