"""Which recordings are refused for the fraction of their events that is invalid."""

from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.data_prep.shards.format import RecordingEntry

FEW_SPIKES = 100  # so many are dropped from any recording, however short


def is_acceptable(entry: RecordingEntry, max_fraction: float) -> bool:
    """Whether the recording has events, and no larger fraction is invalid than allowed.

    Invalid are events outside the sensor, events that were moved by 1 ms or more, and spikes where
    there are many. A disorder of less than 1 ms, which some cameras have, changes few counts.
    """
    most = max_fraction * _total(entry)
    are_inside = entry.events > 0 and _outside(entry) <= most
    return are_inside and _moved(entry) <= most and _spikes(entry) <= max(most, FEW_SPIKES)


def _outside(entry: RecordingEntry) -> int:
    return entry.dropped_events.get("outside_sensor", 0)


def _moved(entry: RecordingEntry) -> int:
    """Events that were moved by 1 ms or more; in entries of earlier versions by any time."""
    dropped = entry.dropped_events
    return dropped.get("late_by_1_ms_or_more", dropped.get("late_timestamps_raised", 0))


def _spikes(entry: RecordingEntry) -> int:
    return entry.dropped_events.get("time_spikes", 0)


def _total(entry: RecordingEntry) -> int:
    """Events whose time is known."""
    return entry.events + _outside(entry) + _spikes(entry)


def refuse_invalid(path: Path, entry: RecordingEntry, max_fraction: float) -> None:
    """Raises RecordingError where the recording is not `is_acceptable`."""
    if is_acceptable(entry, max_fraction):
        return
    total = _total(entry)
    outside = _outside(entry)
    if outside > max_fraction * total:
        fraction = outside / total
        raise RecordingError(
            f"{path}: {outside} of {total} events ({fraction:.1%}) lie outside the sensor of "
            f"{entry.sensor_width} x {entry.sensor_height} pixels. {_size_remedy(entry)}; to drop "
            "these events and prepare the rest set "
            f"max_invalid_fraction={min(1, fraction + 0.001):.3f}"
        )
    wrong = max(_moved(entry), _spikes(entry))
    if wrong > max_fraction * total:
        fraction = wrong / total
        place = entry.event_warnings.get("time_order", "the time ran backwards")
        raise RecordingError(
            f"{path}: {wrong} of {total} events ({fraction:.1%}) have a wrong time: {place}. The "
            "file may be damaged, or two recordings joined: split it there, or record it again; "
            "to prepare it with these times set "
            f"max_invalid_fraction={min(1, fraction + 0.001):.3f}"
        )
    reason = " inside the sensor" if outside else ""
    unknown = entry.event_warnings.get("unknown_times")
    if unknown:
        reason = f" of known time: {unknown}"
    raise RecordingError(f"{path} holds no events{reason}. Remove it, or record it again")


def _size_remedy(entry: RecordingEntry) -> str:
    if "sensor_size" in entry.event_warnings:
        return (
            "The file does not state this size, which is assumed: set "
            "dataset.sensor_size=[HEIGHT,WIDTH]"
        )
    return "The file may be damaged, or its header may state a wrong size"
